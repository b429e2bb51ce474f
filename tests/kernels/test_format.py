"""The layout: round trips over odd shapes, the drawing byte by byte, and every rule that `validate` keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels import format as fmt
from lbllm_kernels.synthetic import random_packed

shapes = st.tuples(st.integers(1, 37), st.integers(1, 300), st.sampled_from([4, 8, 12, 16, 32, 64, 128]), st.integers(0, 1000))
modes = st.sampled_from(["explicit", "codebook"])


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_codes_round_trip(shape):
    out, n, _, seed = shape
    codes = torch.randint(0, 4, (out, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = fmt.pack_codes(codes)
    assert packed.shape == (out, -(-n // 4))
    assert torch.equal(fmt.unpack_codes(packed, n), codes)


def test_codes_follow_the_drawing():
    packed = fmt.pack_codes(torch.tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8))
    assert packed.tolist() == [[1 | 2 << 2 | 3 << 4, 2]]


def test_levels_follow_the_drawing():
    word = fmt.pack_levels(torch.tensor([-127, -1, 2, 127]))
    assert word.item() == int.from_bytes(bytes([129, 255, 2, 127]), "little", signed=True)


@given(st.lists(st.integers(-127, 127), min_size=4, max_size=4))
def test_levels_round_trip(values):
    assert fmt.unpack_levels(fmt.pack_levels(torch.tensor(values))).tolist() == values


@pytest.mark.parametrize("bad", [-128, 128, 1000])
def test_levels_outside_the_grid_are_refused(bad):
    with pytest.raises(fmt.FormatError, match=r"-127\.\.127"):
        fmt.pack_levels(torch.tensor([[0, 1, bad, 2]]))


@pytest.mark.parametrize("bad", [-1, 4])
def test_codes_outside_two_bits_are_refused(bad):
    with pytest.raises(fmt.FormatError, match=r"0\.\.3"):
        fmt.pack_codes(torch.tensor([[0, bad]]))


@given(shapes, modes)
@settings(max_examples=40, deadline=None)
def test_weights_by_a_reader_written_from_the_drawing(shape, mode):
    """A slow reader that knows only the table in kernels/README.md finds the same weights."""
    out, n, g, seed = shape
    out = min(out, 5)
    packed = random_packed(out, n, g, mode, seed, entries=17)
    rows = packed.codes.tolist()
    words = packed.levels.tolist() if packed.levels is not None else None
    expected = torch.empty(out, n)
    for r in range(out):
        for k in range(n):
            code = rows[r][k // 4] >> 2 * (k % 4) & 3
            word = words[r][k // g] if words else int(packed.codebook[int(packed.group_codes[r, k // g])])
            level = (word & 0xFFFFFFFF) >> 8 * code & 0xFF
            expected[r, k] = level - 256 if level > 127 else level
    assert torch.equal(fmt.int8_weight(packed).float(), expected)
    assert torch.equal(fmt.row_sums(packed), expected.sum(1).int())
    assert torch.equal(fmt.dequantize(packed), expected * packed.row_scale[:, None])


def test_expansion_in_chunks_is_the_same(monkeypatch):
    packed = random_packed(33, 100, 16, "codebook")
    whole = fmt.int8_weight(packed)
    monkeypatch.setattr(fmt, "_UNPACK_CHUNK", 300)
    assert torch.equal(fmt.int8_weight(packed), whole)


def _explicit():
    return random_packed(6, 50, 16)


def _coded():
    return random_packed(6, 50, 16, "codebook", entries=9)


BROKEN = {
    "codes dtype": (lambda p: {"codes": p.codes.to(torch.int32)}, "codes: must be"),
    "codes width": (lambda p: {"codes": p.codes[:, :-1]}, "codes: must have shape"),
    "codes padding": (lambda p: {"codes": p.codes | 0xC0}, "padding codes must be 0"),
    "no rows": (lambda p: {"codes": p.codes[:0]}, "at least one row"),
    "too wide": (lambda p: {"in_features": 1 << 20}, "in_features"),
    "no channels": (lambda p: {"in_features": 0}, "in_features"),
    "group size": (lambda p: {"group_size": 6}, "multiple of 4"),
    "row scale dtype": (lambda p: {"row_scale": p.row_scale.double()}, "row_scale: must be"),
    "row scale nan": (lambda p: {"row_scale": p.row_scale * float("nan")}, "row_scale: must be finite"),
    "row scale shape": (lambda p: {"row_scale": p.row_scale[:-1]}, "row_scale: must have shape"),
    "levels shape": (lambda p: {"levels": p.levels[:, :-1]}, "levels: must have shape"),
    "level -128": (lambda p: {"levels": torch.full_like(p.levels, 0x80)}, "found -128"),
    "no levels": (lambda p: {"levels": None}, "give either levels"),
    "bias shape": (lambda p: {"bias": torch.zeros(7)}, "bias: must have shape"),
    "half of outliers": (lambda p: {"perm": torch.arange(50, dtype=torch.int32)}, "come together"),
    "not a permutation": (
        lambda p: {"perm": torch.zeros(50, dtype=torch.int32), "outlier_weight": torch.zeros(6, 2, dtype=torch.int8), "outlier_scale": torch.ones(6)},
        "permutation",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tensors_are_named(case):
    change, message = BROKEN[case]
    packed = _explicit()
    with pytest.raises(fmt.FormatError, match=message):
        fmt.validate(dataclasses.replace(packed, **change(packed)), "layers.0.q_proj")


def test_both_level_modes_at_once_are_refused():
    both = dataclasses.replace(_coded(), levels=_explicit().levels)
    with pytest.raises(fmt.FormatError, match="give either levels"):
        fmt.validate(both)


def test_group_codes_beyond_the_table_are_refused():
    packed = _coded()
    with pytest.raises(fmt.FormatError, match="point into the codebook of 5 entries"):
        fmt.validate(dataclasses.replace(packed, codebook=packed.codebook[:5]))


def test_the_message_names_the_tensor():
    packed = _explicit()
    with pytest.raises(fmt.FormatError, match=r"^layers\.3\.up\.row_scale: "):
        fmt.validate(dataclasses.replace(packed, row_scale=packed.row_scale.half()), "layers.3.up")


def test_outlier_channels_replace_the_last_columns():
    packed = random_packed(4, 12, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tail = torch.randint(-127, 128, (4, 3), dtype=torch.int8)
    with_tail = fmt.validate(dataclasses.replace(packed, perm=order, outlier_weight=tail, outlier_scale=torch.full((4,), 0.5)))
    dense = fmt.dequantize(with_tail)
    assert torch.equal(dense[:, order[9:].long()], tail.float() * 0.5)
    assert torch.equal(dense[:, order[:9].long()], fmt.dequantize(packed)[:, :9])
