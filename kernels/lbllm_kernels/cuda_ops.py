"""The CUDA path as a torch operator, so that `torch.compile` sees one opaque node instead of pointers.

Eager code calls `cuda.forward` directly. While compiling, `linear` below emits `torch.ops.lbllm.lut8_linear_cuda`, whose fake
implementation gives shapes without running anything. The operator is functional, has no state, and takes the derived layout as plain
tensors (`cuda.CudaWeight`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm_kernels import cuda
from lbllm_kernels.activation import ActFactors


@torch.library.custom_op("lbllm::lut8_linear_cuda", mutates_args=(), device_types="cuda")
def lut8_linear_cuda(
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
    weight = cuda.CudaWeight.from_layout(x.shape[-1], out_features, group_size, codes, words, group_codes, codebook, row_scale, row_sums, bias)
    y = cuda.forward(x.reshape(-1, x.shape[-1]), weight, ActFactors(variant, clip_max, clip_min, knee_low, knee_high))
    return y.reshape(*x.shape[:-1], out_features)


@lut8_linear_cuda.register_fake
def _(x, codes, words, group_codes, codebook, row_scale, row_sums, bias, out_features, group_size, variant, factors):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def linear(x: Tensor, weight: cuda.CudaWeight, factors: ActFactors) -> Tensor:
    """The operator on a prepared weight; used while compiling."""
    numbers = [factors.clip_max, factors.clip_min, factors.knee_low, factors.knee_high]
    y: Tensor = torch.ops.lbllm.lut8_linear_cuda(
        x, weight.codes, weight.words, weight.group_codes, weight.codebook, weight.row_scale, weight.row_sums, weight.bias,
        weight.out_features, weight.group_size, factors.variant, numbers,
    )  # fmt: skip
    return y
