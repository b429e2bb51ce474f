"""Two views of W(1+1)A(1x4), sixteen table entries and four binary planes: the same integers on every path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels import dispatch, planes, reference
from lbllm_kernels.activation import POWERS_OF_TWO, ActFactors, factors_of, plane_masks, plane_values, quantize_activations
from lbllm_kernels.paths import CPU_PATHS
from lbllm_kernels.synthetic import random_packed


@st.composite
def plane_weights(draw):
    found = sorted(draw(st.lists(st.integers(1, 60), min_size=4, max_size=4)))
    while sum(found) > 127:
        found = sorted(max(1, p // 2) for p in found)
    return tuple(found)


def codes(m, n, weights, seed):
    at = torch.randint(0, 16, (m, n), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(plane_values(weights), dtype=torch.int8)[at]


@settings(max_examples=60, deadline=None)
@given(plane_weights(), st.integers(1, 5), st.integers(1, 20), st.integers(1, 200), st.sampled_from([4, 12, 16, 32, 64]), st.sampled_from(["explicit", "codebook"]), st.integers(0, 99))
def test_popcounts_give_the_integers_of_the_table(weights, m, out, n, group, mode, seed):
    packed = random_packed(out, n, group, mode, seed, entries=16)
    q = codes(m, n, weights, seed)
    assert torch.equal(planes.accumulate(q, packed, weights), reference.accumulate(q, packed))


def test_popcounts_at_the_extremes():
    packed = random_packed(3, 4096, 64, extreme=True)
    q = torch.full((2, 4096), 127, dtype=torch.int8)
    assert torch.equal(planes.accumulate(q, packed, POWERS_OF_TWO), reference.accumulate(q, packed))


@pytest.mark.parametrize("path", CPU_PATHS, ids=lambda p: p.name)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_integer_path_multiplies_quantized_planes(path, tokens):
    """Real activations through the quantizer, the C++ product and the popcounts."""
    if not path.state()[0]:
        pytest.skip(path.state()[1])
    factors = ActFactors("planes", 0.9, 0.95, planes=(5, 11, 30, 62))
    packed = random_packed(24, 150, 32, "codebook", entries=20)
    x = torch.randn(tokens, 150, generator=torch.Generator().manual_seed(tokens))
    q, scale, zero = quantize_activations(x, factors)
    weight = path.derive(packed, None)
    expected = planes.accumulate(q, packed, factors.planes)
    assert torch.equal(path.accumulate(q, weight), expected)
    made = path.quantize(x, factors)
    for ours, theirs in zip(path.in_order(made), (q, scale, zero), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(path.linear(made, weight, torch.float32), reference.linear(x, packed, factors))


def test_bits_add_up_to_codes():
    for weights in (POWERS_OF_TWO, (1, 1, 1, 1), (5, 5, 10, 20), (1, 2, 4, 120)):
        q = torch.tensor(plane_values(weights), dtype=torch.int8)
        bits = planes.split_planes(q, weights)
        assert sum(w * b.int() for w, b in zip(weights, bits, strict=True)).tolist() == q.tolist()
        assert sorted(plane_masks(weights)) == list(range(16))
    with pytest.raises(ValueError, match="no sum of the planes"):
        planes.split_planes(torch.tensor([1], dtype=torch.int8), POWERS_OF_TWO)


def test_powers_of_two_are_sixteen_even_steps():
    steps = torch.tensor(plane_values(POWERS_OF_TWO)).diff()
    assert sum(POWERS_OF_TWO) == 127
    assert set(steps.tolist()) <= {8, 9}


def test_each_value_takes_its_nearest_sum():
    factors = ActFactors("planes", planes=(3, 9, 40, 60))
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 20)[:, None]
    q, scale, zero = quantize_activations(x, factors)
    t = x.double() / scale.double() + zero.double()
    table = torch.tensor(plane_values(factors.planes)).double()
    best = (t[..., None] - table).abs().amin(-1)
    assert bool(((t - q.double()).abs() <= best + 1e-4).all())


def test_factors_in_files():
    factors = ActFactors("planes", 0.5, 1.25, planes=(5, 11, 30, 62))
    assert factors_of("planes", factors.numbers()) == factors
    assert factors_of("piecewise", [0.5, 1.25, 0.125, 0.75]) == ActFactors("piecewise", 0.5, 1.25, 0.125, 0.75)
    for numbers, words in (([1, 1, 8, 17], "does not have 4"), ([1, 1, 8, 17, 34, 68.5], "integers"), ([1, 1, 8, 17, 34, 69], "at most 127"), ([1, 1, 17, 8, 34, 60], "ascending")):
        with pytest.raises(ValueError, match=words):
            factors_of("planes", [float(n) for n in numbers])


def test_dispatch_says_why_it_falls_back(monkeypatch):
    packed = random_packed(16, 64, 32)
    monkeypatch.setattr(dispatch, "table", lambda: {"cpu": {"measured": True, "ranges": [{"up_to": None, "paths": ["cuda"]}]}})
    monkeypatch.setitem(dispatch.PATHS, "cuda", dispatch.PATHS["cuda"].__class__(**{**vars(dispatch.PATHS["cuda"]), "state": lambda: (True, "here"), "unsupported": lambda _: None}))
    assert dispatch.choose(packed, "piecewise").path == "cuda"
    assert dispatch.choose(packed, "planes") == dispatch.Choice("reference", "planes activations")
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "cuda")
    with pytest.raises(dispatch.PathError, match="planes activations"):
        dispatch.choose(packed, "planes")
