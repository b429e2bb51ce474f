"""The C++ path against the reference: integers equal, outputs equal, every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels import cpu, reference
from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.format import unpack_codes
from lbllm_kernels.synthetic import random_packed

LEVELS = cpu.library().levels
needs_build = pytest.mark.skipif(not LEVELS, reason=cpu.library().reason)
each_level = pytest.mark.parametrize("level", LEVELS, ids=[cpu.LEVEL_NAMES[level] for level in LEVELS])


def test_code_tiles_follow_the_drawing():
    packed = random_packed(21, 50, 16, seed=3)
    codes = unpack_codes(packed.codes, 50)
    tiles = cpu.tile_codes(packed.codes, 50)
    assert tiles.shape == (2, 4, 16)
    for row in range(21):
        for k in range(50):
            lane = int(tiles[row // 16, k // 16, row % 16]) & 0xFFFFFFFF
            assert lane >> 2 * (k % 16) & 3 == int(codes[row, k])
    assert int(tiles[1, :, 5:].abs().sum()) == 0


def test_group_tiles_follow_the_drawing():
    words = torch.arange(18 * 3, dtype=torch.int32).view(18, 3)
    tiles = cpu.tile_groups(words)
    assert tiles.shape == (2, 3, 16)
    assert all(tiles[r // 16, g, r % 16] == words[r, g] for r in range(18) for g in range(3))


def test_interleaving_follows_the_drawing():
    q = torch.arange(70, dtype=torch.int8)[None]
    ordered = cpu.interleave(q)
    assert ordered.shape == (1, 128)
    for k in range(70):
        chunk, inside = divmod(k, 16)
        j, t = divmod(inside, 4)
        assert ordered[0, 16 * chunk + 4 * t + j] == k


@needs_build
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 400), st.sampled_from([16, 32, 64, 128]),
    st.sampled_from(["explicit", "codebook"]), st.integers(0, 99), st.sampled_from(LEVELS or (0,)),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_sums_are_exact(m, out, n, g, mode, seed, level):
    packed = random_packed(out, n, g, mode, seed, entries=1 + seed * 2)
    q = torch.randint(0, 128, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(cpu.accumulate(q, cpu.CpuWeight(packed), level), reference.accumulate(q, packed))


@needs_build
@each_level
@pytest.mark.parametrize("m", [1, 2, 3, 7, 16, 33, 100])
def test_sums_are_exact_at_the_extremes(level, m):
    packed = random_packed(48, 4096, 32, extreme=True)
    q = torch.full((m, 4096), 127, dtype=torch.int8)
    assert torch.equal(cpu.accumulate(q, cpu.CpuWeight(packed), level), reference.accumulate(q, packed))


@needs_build
@each_level
def test_a_panel_larger_than_the_scratch(level):
    """Many rows of many channels: the AMX panel is cut several times, and the last piece is odd."""
    packed = random_packed(1000, 2048, 64, "codebook")
    q = torch.randint(0, 128, (50, 2048), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(cpu.accumulate(q, cpu.CpuWeight(packed), level), reference.accumulate(q, packed))


@needs_build
@each_level
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 13])
@pytest.mark.parametrize(("m", "out"), [(40, 600), (300, 40), (129, 16), (64, 33)])
def test_threads_change_nothing(level, threads, m, out):
    """More threads than tiles of rows: tokens are cut too."""
    packed = random_packed(out, 1024, 32, "codebook")
    x = torch.randn(m, 1024, generator=torch.Generator().manual_seed(0))
    expected = reference.linear(x, packed, ActFactors("piecewise"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.linear(cpu.quantize(x, ActFactors("piecewise")), cpu.CpuWeight(packed), level), expected)
    finally:
        torch.set_num_threads(before)


def _tokens(kind: str, m: int, n: int, seed: int) -> torch.Tensor:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    if kind == "heavy":
        x = x * torch.exp(2 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed + 1)))
    if kind == "positive":
        x = x.abs()
    if kind == "negative":
        x = -x.abs()
    if kind == "grid":
        x = (x * 4).round() / 4
    if kind == "bad":
        x[::2, seed % n] = [float("nan"), float("inf"), -float("inf"), 3e38][seed % 4]
        x[::3] = 0
    if kind == "tiny":
        x = x * 10.0 ** -(37 + seed % 8)
    return x


@needs_build
@given(
    st.sampled_from(["normal", "heavy", "positive", "negative", "grid", "bad", "tiny"]), st.integers(1, 5), st.integers(1, 300), st.integers(0, 999),
    st.sampled_from(["uniform", "piecewise"]), *[st.floats(0.25, 1.25, width=32)] * 2, *[st.floats(0, 1, width=32)] * 2, st.sampled_from([1, 2]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_quantizer_is_bit_equal(kind, m, n, seed, variant, clip_max, clip_min, low, high, level):
    if level not in LEVELS:
        return
    x = _tokens(kind, m, n, seed)
    factors = ActFactors(variant, clip_max, clip_min, low, high)
    q, scale, zero = quantize_activations(x, factors)
    ours = cpu.quantize(x, factors, interleaved=False, level=level)
    assert torch.equal(ours.scale.view(torch.int32)[~torch.isnan(ours.scale)], scale[:, 0].view(torch.int32)[~torch.isnan(scale[:, 0])])
    assert torch.equal(torch.isnan(ours.scale), torch.isnan(scale[:, 0]))
    assert torch.equal(ours.zero, zero[:, 0])
    assert torch.equal(cpu.codes_in_order(ours), q)
    assert int(ours.q[:, n:].sum()) == 0
    assert torch.equal(cpu.quantize(x, factors, level=level).q[:m], cpu.interleave(q).view(torch.uint8))


@needs_build
@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
def test_long_tokens_are_quantized_in_pieces(variant):
    x = torch.randn(3, 5000)
    ours = cpu.quantize(x, ActFactors(variant))
    assert torch.equal(ours.q[:3], cpu.interleave(quantize_activations(x, ActFactors(variant))[0]).view(torch.uint8))


@needs_build
@each_level
@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize("m", [1, 5, 20])
def test_outputs_are_bit_equal(level, variant, mode, m):
    packed = random_packed(77, 300, 32, mode)
    bias = torch.randn(77, generator=torch.Generator().manual_seed(1))
    x = torch.randn(m, 300, generator=torch.Generator().manual_seed(2))
    for b in (None, bias):
        ours = cpu.linear(cpu.quantize(x, ActFactors(variant, 0.9, 0.95)), cpu.CpuWeight(packed, b), level)
        assert torch.equal(ours, reference.linear(x, packed, ActFactors(variant, 0.9, 0.95), b))


@needs_build
def test_a_not_finite_token_spoils_only_itself():
    packed = random_packed(20, 64, 32)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y = cpu.linear(cpu.quantize(x, ActFactors("piecewise")), cpu.CpuWeight(packed))
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[[0, 2]]).all()


@needs_build
def test_bad_arguments_are_refused():
    weight = cpu.CpuWeight(random_packed(20, 64, 32))
    with pytest.raises(ValueError, match="float CPU matrix"):
        cpu.quantize(torch.zeros(2, 3, 4), ActFactors("uniform"))
    with pytest.raises(ValueError, match="float CPU matrix"):
        cpu.quantize(torch.zeros(2, 4, dtype=torch.int32), ActFactors("uniform"))
    with pytest.raises(ValueError, match="per_group"):
        cpu.quantize(torch.zeros(2, 4), ActFactors("per_group"))
    with pytest.raises(ValueError, match="60 channels"):
        cpu.linear(cpu.quantize(torch.zeros(2, 60), ActFactors("uniform")), weight)
    with pytest.raises(ValueError, match=r"0\.\.127"):
        cpu.accumulate(torch.full((1, 64), -1, dtype=torch.int8), weight)
    with pytest.raises(ValueError, match=r"int8 \(M, 64\)"):
        cpu.accumulate(torch.zeros((1, 60), dtype=torch.int8), weight)
    with pytest.raises(ValueError, match="multiple of 16"):
        cpu.CpuWeight(random_packed(20, 64, 8))


@needs_build
def test_empty_and_strided_inputs():
    packed = random_packed(20, 64, 32)
    weight = cpu.CpuWeight(packed)
    assert cpu.linear(cpu.quantize(torch.zeros(0, 64), ActFactors("uniform")), weight).shape == (0, 20)
    assert cpu.accumulate(torch.zeros((0, 64), dtype=torch.int8), weight).shape == (0, 20)
    strided = torch.randn(64, 6).T
    assert torch.equal(cpu.quantize(strided, ActFactors("uniform")).q, cpu.quantize(strided.contiguous(), ActFactors("uniform")).q)


@needs_build
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out", "channels"), [(1, 1), (7, 31), (40, 64), (33, 579)])
@pytest.mark.parametrize("level", [1, 2])
def test_sixteen_bit_linears(dtype, out, channels, level):
    """Within the rounding of an fp32 sum, for special values too, and independent of the number of tokens."""
    if level not in LEVELS or not cpu.library().half:
        pytest.skip("not on this processor")
    g = torch.Generator().manual_seed(out)
    weight, x = torch.randn(out, channels, generator=g).to(dtype), torch.randn(7, channels, generator=g)
    weight[0, 0] = 2.0**-24 if dtype is torch.float16 else 1e-40  # a denormal number of either type
    y = cpu.half_linear(x, weight, level)
    exact = x.double() @ weight.double().T
    bound = channels * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert bool(((y.double() - exact).abs() <= bound + 1e-37).all())
    assert torch.equal(y, torch.cat([cpu.half_linear(x[i : i + 1], weight, level) for i in range(7)]))
    assert cpu.half_linear(x[:0], weight).shape == (0, out)


@needs_build
def test_sixteen_bit_linears_refuse_what_they_cannot_read():
    weight = torch.zeros(4, 8, dtype=torch.float16)
    for bad in (weight.float(), weight.T, weight[:, ::2], weight.to("meta")):
        with pytest.raises(ValueError, match="contiguous fp16 or bf16 CPU matrix"):
            cpu.half_linear(torch.zeros(1, 8), bad)
    for x in (torch.zeros(1, 7), torch.zeros(1, 8).double(), torch.zeros(1, 8, device="meta"), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x must be fp32 \(\.\.\., 8\)"):
            cpu.half_linear(x, weight)


@needs_build
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_layers_of_one_input_in_one_call(threads, m):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        factors = ActFactors("piecewise", 0.9, 1.1)
        packed = [random_packed(out, 1000, 32, "codebook", out) for out in (77, 16, 300)]
        x = torch.randn(m, 1, 1000)
        ys = cpu.Fused([cpu.CpuWeight(p) for p in packed], factors)(x)
        for y, p in zip(ys, packed, strict=True):
            assert torch.equal(y, reference.linear(x, p, factors))
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="must take the same channels"):
        cpu.Fused([cpu.CpuWeight(packed[0]), cpu.CpuWeight(random_packed(4, 64, 32))], factors)
