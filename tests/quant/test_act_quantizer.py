"""The trainable activation quantizer: bit-equal to the kernels' reference, and gradients that point where the error falls."""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_products import GpuProducts
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels.activation import (
    POWERS_OF_TWO,
    ActFactors,
    dequantize_activations,
    piecewise_values,
    plane_values,
    quantize_activations,
    quantize_outliers,
)

from lbllm_core.quant.activation import ActQuantizer, _codes, code_positions, constrain, fake_quantize, fit_planes, knee_slopes

SHARES = st.floats(0.05, 1.5)
KNEES = st.floats(0.02, 0.98)


def tokens(n, channels, seed):
    """Tokens of every character, `(n + 8, channels)`: sizes over six decades, outliers, shifts, one sign, constants, zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, generator=g) * 10 ** (torch.rand(n, 1, generator=g) * 6 - 3)
    x[::5] *= torch.where(torch.rand(x[::5].shape, generator=g) < 0.05, 50.0, 1.0)
    x[1::5] += 3 * x[1::5].abs().amax(-1, keepdim=True) * torch.randn(len(x[1::5]), 1, generator=g)
    x[2::5] = x[2::5].abs()
    x[3::5] = -x[3::5].abs()
    x[4::5] = (x[4::5] / x[4::5].abs().amax(-1, keepdim=True) * 15).round() / 2  # ties
    odd = torch.zeros(8, channels)
    odd[1], odd[2], odd[3, 0], odd[4, -1], odd[5], odd[6] = 1.7, -0.3, 5, -5, 1e-30, -1e30
    odd[7] = torch.linspace(-7.5, 7.5, channels)
    return torch.cat([x, odd])


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["uniform", "piecewise"]), SHARES, SHARES, KNEES, KNEES, st.integers(1, 48), st.integers(0, 10_000))
def test_forward_is_the_kernels_reference_to_the_bit(variant, clip_max, clip_min, low, high, channels, seed):
    factors = ActFactors(variant, clip_max, clip_min, low, high)
    x = tokens(40, channels, seed)
    expected = dequantize_activations(*quantize_activations(x, factors))
    assert torch.equal(ActQuantizer(factors)(x), expected)
    shaped = x[: len(x) // 3 * 3].reshape(3, -1, channels)
    assert torch.equal(ActQuantizer(factors)(shaped), expected[: len(x) // 3 * 3].reshape(3, -1, channels))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["uniform", "piecewise"]), SHARES, SHARES, KNEES, KNEES, st.integers(0, 10_000))
def test_factors_survive_the_round_trip(variant, clip_max, clip_min, low, high, seed):
    """What training leaves in a quantizer and what a block file hands to the kernels are the same function."""
    quantizer = ActQuantizer(ActFactors(variant, clip_max, clip_min, low, high))
    x = tokens(20, 32, seed)
    again = quantizer.factors()
    stored = torch.tensor([again.clip_max, again.clip_min, again.knee_low, again.knee_high]).tolist()
    assert torch.equal(dequantize_activations(*quantize_activations(x, ActFactors(variant, *stored))), quantizer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype):
    x = (tokens(30, 32, 1)[:30]).clamp(-6e4, 6e4).to(dtype)
    factors = ActFactors("piecewise", 0.9, 0.8, 0.3, 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = ActQuantizer(factors)(x)
    assert made.dtype == dtype
    assert torch.equal(made, dequantize_activations(*quantize_activations(x, factors)).to(dtype))


@settings(max_examples=50, deadline=None)
@given(KNEES, KNEES)
def test_positions_are_the_kernels_and_ascend(low, high):
    zero = torch.arange(128.0)[:, None]
    positions = code_positions(zero, torch.tensor(low), torch.tensor(high))
    assert torch.equal(positions, piecewise_values(zero.squeeze(1), low, high))
    assert bool((positions.diff(dim=-1) >= 0).all())
    assert bool((positions[:, 0] == 0).all())
    assert bool((positions[:, -1] == 127).all())
    assert bool((positions == zero).any(-1).float().mean() > 0.05)


@pytest.mark.parametrize(("variant", "codes"), [("uniform", 16), ("piecewise", 16)])
def test_at_most_sixteen_values_a_token(variant, codes):
    x = torch.randn(50, 500, generator=torch.Generator().manual_seed(3))
    made = ActQuantizer(ActFactors(variant))(x)
    counts = [len(row.unique()) for row in made]
    assert max(counts) <= codes
    assert max(counts) >= 12  # and they are used
    near, scale = x.abs() < 1e-3, (x.amax(-1) - x.amin(-1)) / (15 if variant == "uniform" else 127)
    assert bool(near.any())
    # uniform has a code at zero; piecewise is within half a step of its core, which is 32/7 apart, rounded up
    assert bool((made.abs() <= (0 if variant == "uniform" else 2.5) * scale[:, None] + near.logical_not() * 1e9).all())


def test_error_of_uniform_is_half_a_step():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(4))
    made = ActQuantizer(ActFactors("uniform"))(x)
    scale = (x.amax(-1, keepdim=True).clamp_min(0) - x.amin(-1, keepdim=True).clamp_max(0)) / 15
    inside = (made - x).abs() <= 0.5001 * scale
    assert float(inside.float().mean()) > 0.99  # the rounded zero point may cut half a step at one end
    assert bool(((made - x).abs() <= 1.0001 * scale).all())


def test_piecewise_serves_tokens_with_outliers_better():
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(5))
    x[:, :4] *= 12
    errors = {v: float((ActQuantizer(ActFactors(v))(x) - x).detach().square().sum()) for v in ("uniform", "piecewise")}
    assert errors["piecewise"] < 0.6 * errors["uniform"]


def loss_of(x, variant, values):
    table = torch.tensor(plane_values(POWERS_OF_TWO)).float() if variant == "planes" else None
    return (fake_quantize(x, variant, *values, table=table) - x).square().sum(-1).mean()


def slopes(x, variant, at, which, step):
    """Analytic gradient of the mean squared error and its central difference for factor number `which`."""
    values = [torch.tensor(v, requires_grad=True) for v in at]
    analytic = torch.autograd.grad(loss_of(x, variant, values), values[which])[0]
    moved = []
    for sign in (1, -1):
        other = [torch.tensor(v + sign * step * (i == which)) for i, v in enumerate(at)]
        moved.append(float(loss_of(x, variant, other)))
    return float(analytic), (moved[0] - moved[1]) / (2 * step)


@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("clip", [0.3, 0.5, 0.8, 1.0])
def test_gradient_to_clips(variant, which, clip):
    x = torch.randn(6000, 64, generator=torch.Generator().manual_seed(6))
    at = [0.9, 0.9, 0.4, 0.4]
    at[which] = clip
    analytic, numeric = slopes(x, variant, at, which, 0.02)
    assert analytic == pytest.approx(numeric, rel=0.1, abs=0.12)
    assert (numeric < 0) == (clip < 0.9)  # widening a tight range helps, widening a loose one hurts
    assert analytic * numeric > 0


@pytest.mark.parametrize("which", [2, 3])
@pytest.mark.parametrize("knee", [0.1, 0.2, 0.6, 0.8])
def test_gradient_to_knees(which, knee):
    x = torch.randn(6000, 64, generator=torch.Generator().manual_seed(7))
    at = [1.0, 1.0, 0.4, 0.4]
    at[which] = knee
    analytic, numeric = slopes(x, "piecewise", at, which, 0.03)
    assert analytic == pytest.approx(numeric, rel=0.15)
    assert (numeric < 0) == (knee < 0.4)


def test_gradient_to_the_activations():
    """Straight through inside the range, nothing beyond it (the token's own extremes, which set the range, excepted)."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(8)).requires_grad_()
    for variant in ("uniform", "piecewise"):
        made = ActQuantizer(ActFactors(variant, 0.5, 0.5))(x)
        weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(9))
        (grad,) = torch.autograd.grad((made * weight).sum(), x)
        extreme = (x == x.amax(-1, keepdim=True)) | (x == x.amin(-1, keepdim=True))
        beyond = (x.detach() - made.detach()).abs() > 0.3
        near = (x > 0.4 * x.amin(-1, keepdim=True)) & (x < 0.4 * x.amax(-1, keepdim=True))
        assert torch.allclose(grad[near & ~extreme], weight[near & ~extreme], atol=1e-5)
        assert float(grad[beyond & ~extreme].abs().max()) < 1e-6
        assert int((beyond & ~extreme).sum()) > 50


@pytest.mark.parametrize("channels", [64, 100, 20])
def test_per_group_is_uniform_on_each_run_of_channels(channels):
    x = torch.randn(3, 7, channels, generator=torch.Generator().manual_seed(10))
    made = ActQuantizer(ActFactors("per_group", 0.9, 0.8, group_size=32))(x)
    plain = ActQuantizer(ActFactors("uniform", 0.9, 0.8))
    for first in range(0, channels, 32):
        assert torch.equal(made[..., first : first + 32], plain(x[..., first : first + 32]))


PLANES = st.lists(st.integers(1, 31), min_size=4, max_size=4).map(lambda p: tuple(sorted(p)))


@settings(max_examples=60, deadline=None)
@given(PLANES, SHARES, SHARES, st.integers(1, 48), st.integers(0, 10_000))
def test_planes_are_the_kernels_to_the_bit(planes, clip_max, clip_min, channels, seed):
    factors = ActFactors("planes", clip_max, clip_min, planes=planes)
    x = tokens(40, channels, seed)
    quantizer = ActQuantizer(factors)
    assert torch.equal(quantizer(x), dequantize_activations(*quantize_activations(x, quantizer.factors())))
    assert quantizer.factors().planes == planes


def plane_error(x, planes, clip=1.0):
    return float((ActQuantizer(ActFactors("planes", clip, clip, planes=planes))(x) - x).detach().square().sum())


@pytest.mark.parametrize("outlier", [1, 6])
@pytest.mark.parametrize("mirrored", [False, True])
def test_fitted_planes_against_a_search_of_all(outlier, mirrored):
    """A coarse grid can be searched in full. Mirrored tokens have one zero point, so a dense core pays; else planes stay near powers of two."""
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(11))
    x[:, :2] *= outlier
    x = torch.cat([x, -x], dim=1) if mirrored else x
    every = [p for p in itertools.combinations_with_replacement(range(3, 75, 6), 4) if 100 <= sum(p) <= 127]
    best = min(plane_error(x, p) for p in every)
    found = plane_error(x, fit_planes(x, 1.0))
    assert found <= 1.02 * best
    assert found < plane_error(x, POWERS_OF_TWO) * (0.6 if mirrored and outlier > 1 else 0.99)


def test_planes_of_even_values_stay_powers_of_two():
    x = torch.rand(50, 200, generator=torch.Generator().manual_seed(12))
    assert plane_error(x, fit_planes(x, 1.0)) <= plane_error(x, POWERS_OF_TWO)
    assert max(abs(a - b) for a, b in zip(fit_planes(x, 1.0), POWERS_OF_TWO, strict=True)) <= 4


def test_planes_are_fitted_without_a_product_of_integers():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3)) ** 3
    expected = fit_planes(x, 0.9)
    with GpuProducts() as seen:
        assert fit_planes(x, 0.9) == expected
    assert seen.products


@pytest.mark.parametrize("x", [torch.zeros(3, 8), torch.full((3, 8), 2.0), -torch.ones(1, 1)])
def test_planes_of_degenerate_tokens(x):
    ActFactors("planes", planes=fit_planes(x, 0.7))  # a legal value


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_to_clips_with_planes(which):
    x = torch.randn(6000, 64, generator=torch.Generator().manual_seed(6))
    at = [0.9, 0.9, 0.4, 0.4]
    at[which] = 0.4
    analytic, numeric = slopes(x, "planes", at, which, 0.02)
    assert analytic == pytest.approx(numeric, rel=0.15)
    assert numeric < 0


def test_outlier_channels_have_codes_of_their_own():
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(13))
    outliers = torch.tensor([3, 17])
    x[..., outliers] *= 100
    factors = ActFactors("planes")
    made = ActQuantizer(factors, outliers)(x.requires_grad_())
    rest = [c for c in range(32) if c not in (3, 17)]
    assert torch.equal(made[..., rest], ActQuantizer(factors)(x[..., rest]))
    q, scale = quantize_outliers(x.detach()[..., outliers].reshape(40, 2))
    assert torch.equal(made[..., outliers], (q * scale).reshape(4, 10, 2))
    assert float((made - x).detach().square().sum()) < 0.01 * float((ActQuantizer(factors)(x) - x).detach().square().sum())
    (grad,) = torch.autograd.grad(made[..., outliers].sum(), x)
    assert torch.equal(grad[..., outliers], torch.ones(4, 10, 2))
    assert ActQuantizer(ActFactors("none"), outliers)(x) is x


def test_off_is_off():
    x = torch.randn(4, 8)
    assert ActQuantizer(ActFactors("none"))(x) is x


def test_constrain_keeps_factors_legal():
    quantizer = ActQuantizer(ActFactors("piecewise"))
    with torch.no_grad():
        for p, v in zip(quantizer.parameters(), (-1.0, 9.0, -0.5, 1.5), strict=True):
            p.fill_(v)
    constrain([quantizer])
    f = quantizer.factors()  # raises when a number is out of range
    assert (f.clip_max, f.clip_min, f.knee_low, f.knee_high) == pytest.approx((0.05, 1.5, 0.02, 0.98))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["uniform", "piecewise"]), SHARES, SHARES, KNEES, KNEES, st.integers(1, 48), st.integers(0, 10_000))
def test_codes_without_the_compiled_quantizer_are_the_same(variant, clip_max, clip_min, low, high, channels, seed):
    x = tokens(40, channels, seed)
    numbers = [torch.tensor(v) for v in (clip_max, clip_min, low, high)]
    q, scale, zero = _codes(x, *numbers, variant)
    expected = quantize_activations(x, ActFactors(variant, *(float(v) for v in numbers)))
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(zero.int(), expected[2])


@settings(max_examples=30, deadline=None)
@given(KNEES, KNEES)
def test_knee_slopes_are_those_of_the_positions(low, high):
    """Against autograd through `code_positions` in float64."""
    zero = torch.arange(0.0, 128.0, 3.0)[:, None].double()
    knees = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (low, high)]
    code = torch.arange(16).expand(len(zero), 16)
    slopes = knee_slopes(code, zero)
    positions = code_positions(zero, *knees)
    for at in range(16):
        expected = torch.autograd.grad(positions[:, at].sum(), knees, retain_graph=True)
        for mine, theirs in zip(slopes, expected, strict=True):
            assert float(mine[:, at].sum()) == pytest.approx(float(theirs), rel=1e-5, abs=1e-5)
