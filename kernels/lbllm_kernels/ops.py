"""The packed product as a torch operator, so that `torch.compile` sees one opaque node instead of pointers.

Eager code calls `dispatch.linear` directly (an operator call costs more than a small product). While compiling, `linear` below
emits `torch.ops.lbllm.lut8_linear`, whose fake implementation gives shapes without running anything. The operator quantizes and
multiplies; it is functional, has no state, and takes the derived layout as plain tensors (`cpu.CpuWeight`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm_kernels import cpu
from lbllm_kernels.activation import ActFactors


@torch.library.custom_op("lbllm::lut8_linear", mutates_args=(), device_types="cpu")
def lut8_linear(
    x: Tensor,
    codes: Tensor,
    words: Tensor | None,
    group_codes: Tensor | None,
    codebook: Tensor | None,
    row_scale: Tensor,
    row_sums: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    variant: str,
    factors: list[float],
) -> Tensor:
    """`x (..., in)` -> `(..., out)` in x's dtype; `factors` = clip_max, clip_min, knee_low, knee_high."""
    clip_max, clip_min, knee_low, knee_high = factors
    weight = cpu.CpuWeight.from_layout(x.shape[-1], out_features, group_size, codes, words, group_codes, codebook, row_scale, row_sums, bias)
    y = cpu.linear(cpu.quantize(x.reshape(-1, x.shape[-1]), ActFactors(variant, clip_max, clip_min, knee_low, knee_high)), weight)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


@lut8_linear.register_fake
def _(x, codes, words, group_codes, codebook, row_scale, row_sums, bias, out_features, group_size, variant, factors):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def linear(x: Tensor, weight: cpu.CpuWeight, factors: ActFactors) -> Tensor:
    """The operator on a prepared weight; used while compiling."""
    numbers = [factors.clip_max, factors.clip_min, factors.knee_low, factors.knee_high]
    y: Tensor = torch.ops.lbllm.lut8_linear(
        x, weight.codes, weight.words, weight.group_codes, weight.codebook, weight.row_scale, weight.row_sums, weight.bias,
        weight.out_features, weight.group_size, factors.variant, numbers,
    )  # fmt: skip
    return y
