"""The quantizer against a float64 oracle, its error bounds, and its edges.

How codes are compared honestly: the oracle takes the fp32 scale and zero point (checked on their own first), computes
`t = x/s + z` in float64, and decides. fp32 may decide otherwise only when the exact `t` lies within the rounding error of its
fp32 value (half an ulp of x/s plus half an ulp of the sum) of the decision point; anywhere else a different code is a fault.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels.activation import ActFactors, dequantize_activations, piecewise_values, quantize_activations

ULP = 2.0**-24  # half an ulp, relative


def f32(value: float) -> np.float64:
    return np.float64(np.float32(value))


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["normal", "heavy", "positive", "negative", "constant", "sparse", "tiny", "huge", "grid"]))
    n = draw(st.integers(1, 200))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, n))
    x = {
        "normal": x,
        "heavy": x * np.exp(2 * rng.standard_normal((3, n))),
        "positive": np.abs(x),
        "negative": -np.abs(x),
        "constant": np.full((3, n), rng.standard_normal()),
        "sparse": x * (rng.random((3, n)) < 0.05),
        "tiny": x * 1e-30,
        "huge": x * 1e30,
        "grid": np.round(x * 4) / 4,  # many exact ties
    }[kind]
    clips = [draw(st.floats(0.25, 1.25, width=32)) for _ in range(2)]
    knees = [draw(st.floats(0.0, 1.0, width=32)) for _ in range(2)]
    variant = draw(st.sampled_from(["uniform", "piecewise"]))
    return torch.from_numpy(x.astype(np.float32)), ActFactors(variant, *clips, *knees)


def oracle_values(z: int, factors: ActFactors) -> list[int]:
    """The sixteen values in exact arithmetic on the fp32-rounded products (Python's round is half-even too)."""
    a = round(float(np.float32(factors.knee_low) * np.float32(z)))
    b = round(float(np.float32(factors.knee_high) * np.float32(127 - z)))
    low = [round(i * (z - a) / 4) for i in range(4)]
    core = [z - a + round(j * (a + b) / 7) for j in range(8)]
    return low + core + [z + b + round(i * (127 - z - b) / 4) for i in range(1, 5)]


def check_scale(row, s, z, factors, top):
    hi, lo = max(float(row.max()), 0.0), min(float(row.min()), 0.0)
    exact = (f32(factors.clip_max) * hi - f32(factors.clip_min) * lo) / top
    if exact < 2.0**-126 * 1.001:
        assert s == 1.0 or exact > 2.0**-126 * 0.999
    else:
        assert abs(s - exact) <= 4 * ULP * exact
    where = -f32(factors.clip_min) * lo / s
    slack = 4 * ULP * abs(where)
    assert min(abs(z - np.clip(np.rint(where + d), 0, top)) for d in (-slack, 0, slack)) == 0


@given(cases())
@settings(max_examples=150, deadline=None)
def test_codes_against_float64(case):
    x, factors = case
    top = 15 if factors.variant == "uniform" else 127
    q, scale, zero = quantize_activations(x, factors)
    assert q.dtype == torch.int8
    assert scale.shape == zero.shape == (3, 1)
    assert zero.dtype == torch.int32
    for row, codes, s, z in zip(x.numpy(), q.numpy(), scale[:, 0].tolist(), zero[:, 0].tolist(), strict=True):
        check_scale(row, s, z, factors, top)
        steps = row.astype(np.float64) / s
        if factors.variant == "uniform":
            slack = ULP * np.abs(steps)
            fitting = [np.clip(np.rint(steps + d) + z, 0, top) for d in (-slack, 0, slack)]
        else:
            values = np.array(oracle_values(z, factors))
            middles = (values[1:] + values[:-1]) / 2
            slack = ULP * (np.abs(steps) + np.abs(steps + z)) * 1.01
            fitting = [values[(steps[:, None] + z + np.reshape(d, (-1, 1)) > middles).sum(1)] for d in (-slack, np.zeros(len(row)), slack)]
        assert np.all((codes == fitting[0]) | (codes == fitting[1]) | (codes == fitting[2]))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_error_bounds(case):
    """Inside the clipped range the error is half a step: s (uniform: the zero point's own rounding adds half), or the widest gap."""
    x, factors = case
    q, scale, zero = quantize_activations(x, factors)
    error = (dequantize_activations(q, scale, zero).double() - x.double()).abs()
    s, z = scale.double(), zero.double()
    if factors.variant == "uniform":
        low, high, bound = -s * z, s * (15 - z), s / 2
    else:
        values = piecewise_values(zero[:, 0], factors.knee_low, factors.knee_high)
        low, high, bound = -s * z, s * (127 - z), s * values.diff(dim=1).amax(1, keepdim=True) / 2
    inside = (x >= low) & (x <= high)
    assert bool((error[inside] <= (bound * (1 + 1e-5) + s * 1e-4).expand_as(error)[inside]).all())


@given(st.integers(0, 127), st.floats(0, 1, width=32), st.floats(0, 1, width=32))
def test_piecewise_values(z, low, high):
    values = piecewise_values(torch.tensor(z), low, high).tolist()
    assert values == oracle_values(z, ActFactors("piecewise", knee_low=low, knee_high=high))
    assert values == sorted(values)
    assert len(values) == 16
    assert values[15] == 127
    assert 0 <= values[0] <= z


@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
class TestEdges:
    def test_sixteen_codes_at_most(self, variant):
        q, _, _ = quantize_activations(torch.randn(1, 5000), ActFactors(variant))
        assert q.unique().numel() <= 16

    def test_zero_token(self, variant):
        q, s, z = quantize_activations(torch.zeros(2, 8), ActFactors(variant))
        assert q.abs().sum() == 0
        assert s.tolist() == [[1.0], [1.0]]
        assert z.tolist() == [[0], [0]]

    def test_denormal_token_counts_as_zero(self, variant):
        q, s, _ = quantize_activations(torch.full((1, 8), 1e-42), ActFactors(variant))
        assert q.abs().sum() == 0
        assert s.item() == 1.0

    def test_zero_is_exact(self, variant):
        x = torch.tensor([[0.0, 3.0, -1.0, 0.1, 7.0]])
        factors = ActFactors(variant)
        restored = dequantize_activations(*quantize_activations(x, factors))
        if variant == "uniform":
            assert restored[0, 0] == 0

    @pytest.mark.parametrize("value", [2.5, -2.5])
    def test_constant_token_is_kept(self, variant, value):
        restored = dequantize_activations(*quantize_activations(torch.full((1, 8), value), ActFactors(variant)))
        assert torch.allclose(restored, torch.full((1, 8), value), rtol=1e-6)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_one_sided_tokens_use_the_whole_range(self, variant, sign):
        x = sign * torch.linspace(1, 10, 500)[None]
        q, _, z = quantize_activations(x, ActFactors(variant))
        top = 15 if variant == "uniform" else 127
        assert z.item() == (0 if sign > 0 else top)
        assert (q.max().item() if sign > 0 else q.min().item()) == (top if sign > 0 else 0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
    def test_not_finite_tokens_are_visible_and_alone(self, variant, bad):
        x = torch.randn(3, 8)
        x[1, 3] = bad
        x[1, 4] = -bad
        q, s, z = quantize_activations(x, ActFactors(variant))
        assert torch.isnan(s[:, 0]).tolist() == [False, True, False]
        assert q[1].abs().sum() == 0
        assert z[1].item() == 0
        alone, _, _ = quantize_activations(x[[0, 2]], ActFactors(variant))
        assert torch.equal(q[[0, 2]], alone)

    def test_half_precision_is_widened_first(self, variant):
        x = torch.randn(2, 3, 64).to(torch.bfloat16)
        for a, b in zip(quantize_activations(x, ActFactors(variant)), quantize_activations(x.float(), ActFactors(variant)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "fields", [{"variant": "gauss"}, {"clip_max": 0.0}, {"clip_min": -1.0}, {"clip_max": float("nan")}, {"knee_low": 1.5}, {"knee_high": -0.1}]
)
def test_bad_factors_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields)) if "variant" not in fields else "gauss"):
        ActFactors(**{"variant": "piecewise", **fields})


@pytest.mark.parametrize("variant", ["none", "per_group"])
def test_variants_without_codes_are_refused(variant):
    with pytest.raises(ValueError, match=variant):
        quantize_activations(torch.zeros(1, 4), ActFactors(variant))


def test_integers_are_refused():
    with pytest.raises(ValueError, match="float tensor"):
        quantize_activations(torch.zeros(1, 4, dtype=torch.int32), ActFactors("uniform"))
