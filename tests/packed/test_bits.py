"""The bill of a weight: the figures that the documents quote, from the arithmetic."""

from __future__ import annotations

import pytest

from lbllm_core.quant.bits import Bits, add, kv_bits_per_element, linear_bits


@pytest.mark.parametrize(
    ("group", "entries", "bill", "expected"),
    [(128, 0, "lut8", 2.25), (64, 0, "lut8", 2.5), (32, 256, "lut8", 2.25), (16, 256, "lut8", 2.5), (32, 0, "affine8", 2.5), (64, 0, "affine8", 2.25)],
)
def test_published_figures(group, entries, bill, expected):
    bits = linear_bits(4096, 4096, group, entries, bill=bill)
    extra = 32 / 4096 + 32 * entries / 4096**2
    assert bits.effective_bpw == pytest.approx(expected + extra, abs=1e-12)


@pytest.mark.parametrize(("group", "expected"), [(64, 2.28125), (32, 2.5625)])
def test_uniform_int2_has_no_row_scale(group, expected):
    assert linear_bits(576, 576, group, bill="int2").effective_bpw == expected


@pytest.mark.parametrize(("group", "expected"), [(128, 2.25), (64, 2.5)])
def test_residual_binarization_has_two_scales_a_group(group, expected):
    assert linear_bits(512, 512, group, bill="residual").effective_bpw == expected


def test_small_layers_pay_for_their_table():
    bits = linear_bits(576, 576, 32, 256).per_weight()
    assert bits["row_scales"] == pytest.approx(32 / 576)
    assert bits["codebook"] == pytest.approx(0.0247, abs=1e-4)


def test_short_groups_are_charged_in_full():
    assert linear_bits(2, 172, 128).items["levels"] == 2 * 2 * 32


def test_sums_keep_the_items_apart():
    total = add([linear_bits(8, 64, 32, 16), linear_bits(8, 64, 64)])
    assert total.weights == 1024
    assert total.items["binary"] == 1024
    assert total.items["levels"] == 8 * 32
    assert total.effective_bpw == pytest.approx(sum(total.per_weight().values()))
    assert add([]) == Bits(0, {})


def test_outliers_are_charged():
    for bill in ("lut8", "int2", "residual"):
        assert linear_bits(10, 128, 128, outliers=4, bill=bill).items["outliers"] == 8 * 40 + 320 + 32 * 128


def test_unknown_bill():
    with pytest.raises(ValueError, match="lut8, int2, affine8, residual"):
        linear_bits(1, 4, 4, bill="fp4")


def test_cache_bits():
    assert kv_bits_per_element(4, 64) == 4.5
    assert kv_bits_per_element(16, 64) == 16
