"""The reference path against int64 and float64 oracles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gpu_products import GpuProducts
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels import dispatch, planes, reference
from lbllm_kernels.activation import ActFactors, dequantize_activations, quantize_activations
from lbllm_kernels.format import dequantize, int8_weight
from lbllm_kernels.synthetic import random_packed


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 3000), st.sampled_from(["explicit", "codebook"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_accumulate_is_exact(m, out, n, mode, seed):
    packed = random_packed(out, n, 32, mode, seed)
    q = torch.randint(0, 128, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    exact = q.to(torch.int64) @ int8_weight(packed).to(torch.int64).T
    assert torch.equal(reference.accumulate(q, packed).to(torch.int64), exact)


def test_accumulate_is_exact_at_the_extremes():
    """Every product 127 * 127 with one sign: the largest partial sums the format allows."""
    packed = random_packed(3, 11008, 32, extreme=True)
    packed = dataclasses.replace(packed, levels=torch.full_like(packed.levels, 0x7F7F7F7F))
    q = torch.full((2, 11008), 127, dtype=torch.int8)
    assert reference.accumulate(q, packed).unique().tolist() == [11008 * 127 * 127]


@pytest.mark.parametrize("variant", ["uniform", "piecewise"])
@pytest.mark.parametrize("mode", ["explicit", "codebook"])
def test_linear_is_the_product_of_the_dequantized_parts(variant, mode):
    packed = random_packed(31, 200, 32, mode)
    factors = ActFactors(variant, 0.9, 0.8)
    x = torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(31)
    y = reference.linear(x, packed, factors, bias)
    expected = dequantize_activations(*quantize_activations(x, factors)).double() @ dequantize(packed).double().T + bias.double()
    assert y.shape == (2, 5, 31)
    assert (y.double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_linear_without_activation_quantization():
    packed = random_packed(8, 64, 32)
    x = torch.randn(3, 64)
    assert torch.equal(reference.linear(x, packed, ActFactors("none")), torch.nn.functional.linear(x, dequantize(packed)))


def test_linear_with_outlier_channels():
    packed = random_packed(7, 40, 8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    tail = torch.randint(-127, 128, (7, 6), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
    packed = dataclasses.replace(packed, perm=order, outlier_weight=tail, outlier_scale=torch.full((7,), 0.02))
    factors = ActFactors("planes", 0.9, planes=(3, 9, 40, 60))
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(4))
    x[:, order[-6:].long()] *= 1000  # they must not widen the range of the others
    x[3] = 0
    plain, outliers = order[:-6].long(), order[-6:].long()
    hat = torch.zeros(4, 40, dtype=torch.float64)
    hat[:, plain] = dequantize_activations(*quantize_activations(x[:, plain], factors)).double()
    scale = (x[:, outliers].abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
    hat[:, outliers] = (torch.round(x[:, outliers] / scale) * scale).double()
    expected = hat @ dequantize(packed).double().T
    assert (reference.linear(x, packed, factors).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(reference.linear(x, packed, factors), reference.linear(x, packed, factors, expanded=reference.ReferenceWeight(packed)))


def test_an_empty_batch_is_an_empty_answer():
    packed = random_packed(8, 64, 32)
    assert reference.accumulate(torch.empty(0, 64, dtype=torch.int8), packed).shape == (0, 8)


@pytest.mark.parametrize("q", [torch.zeros(2, 63, dtype=torch.int8), torch.zeros(64, dtype=torch.int8), torch.zeros(2, 64, dtype=torch.int32)])
def test_wrong_codes_are_refused(q):
    with pytest.raises(ValueError, match=r"int8 \(M, 64\)"):
        reference.accumulate(q, random_packed(8, 64, 32))


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match="takes 64"):
        reference.linear(torch.zeros(2, 60), random_packed(8, 64, 32), ActFactors("uniform"))


def with_outliers(n, mode):
    packed = random_packed(24, 150, 32, mode)
    if not n:
        return packed
    g = torch.Generator().manual_seed(5)
    tail = torch.randint(-127, 128, (24, n), generator=g, dtype=torch.int8)
    return dataclasses.replace(packed, perm=torch.randperm(150, generator=g).to(torch.int32), outlier_weight=tail, outlier_scale=torch.full((24,), 0.02))


@pytest.mark.parametrize("mode", ["explicit", "codebook"])
@pytest.mark.parametrize("outliers", [0, 16])
@pytest.mark.parametrize("variant", ["uniform", "piecewise", "planes", "none"])
def test_no_product_that_a_gpu_does_not_have(variant, outliers, mode, monkeypatch):
    packed, factors = with_outliers(outliers, mode), ActFactors(variant)
    x = torch.randn(5, 150, generator=torch.Generator().manual_seed(1))
    expected = reference.linear(x, packed, factors)
    monkeypatch.setenv(dispatch.PATH_VARIABLE, "reference")
    with GpuProducts() as seen:
        assert torch.equal(reference.linear(x, packed, factors), expected)
        assert torch.equal(dispatch.linear(x, dispatch.prepare(packed, variant), factors), expected)
        if variant != "none":
            q = quantize_activations(x, factors)[0]
            reference.accumulate(q, packed)
            if variant == "planes" and not outliers:
                planes.accumulate(q, packed, factors.planes)
    assert seen.products >= 2


def test_products_of_integers_are_seen():
    """The instrument itself: what a GPU would refuse is refused."""
    q = torch.randint(0, 9, (3, 4))
    for product in (lambda: q @ q.T, lambda: torch.nn.functional.linear(q, q), lambda: q[0] @ q[0], lambda: torch.einsum("bik,bjk->bij", q[None].int(), q[None].int())):
        with GpuProducts(), pytest.raises(NotImplementedError, match="not implemented for torch"):
            product()
