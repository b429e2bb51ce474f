"""The reference path: plain torch, exact, on every device. Every fast path is tested against it, integer by integer.

**Equation.** With activations `X_hat = s*(q - z)` and weights `row_scale * w` (`w` int8):

    y[m, n] = (s[m] * row_scale[n]) * float(acc[m, n] - z[m] * rowsum[n]) + bias[n],     acc = sum_k q[m, k] * w[n, k]

**Exactness.** torch multiplies int32 matrices slowly (187 ms where fp32 takes 25), but fp32 products of small integers are exact as
long as every partial sum stays under 2**24: chunks of 1024 channels do (1024 * 127 * 128 < 2**24). Chunks are added in int32.
The subtraction is made in int32, and only then converted; the three float operations run in the order written, without fusing.

**Shapes.** `q int8 (M, in)`, `acc int32 (M, out)`, `x (..., in)` -> `y (..., out)` in x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.format import PackedWeight, dequantize, int8_weight

CHUNK = 1024


def int_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Exact `q int8 (M, in)` times `weight int8 (out, in)`, transposed -> int32 `(M, out)`."""
    acc = torch.zeros((q.shape[0], weight.shape[0]), dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        acc += (q[:, part].to(torch.float32) @ weight[:, part].to(torch.float32).T).to(torch.int32)
    return acc


def accumulate(q: Tensor, packed: PackedWeight) -> Tensor:
    """The int32 sums `acc (M, out)` of codes `q int8 (M, in)` and the packed int8 weights. Raises ValueError on a wrong q."""
    check_codes(q, packed.in_features)
    return int_matmul(q, int8_weight(packed))


def check_codes(q: Tensor, in_features: int) -> None:
    """ValueError unless `q` is int8 `(M, in)`."""
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] != in_features:
        raise ValueError(f"q must be int8 (M, {in_features}), got {q.dtype} {tuple(q.shape)}")


def finish(acc: Tensor, scale: Tensor, zero_point: Tensor, sums: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """int32 sums -> fp32 outputs: `(s * row_scale) * (acc - z * rowsum) + bias`. `scale`, `zero_point` are (M, 1)."""
    y = (scale * row_scale) * (acc - zero_point * sums).to(torch.float32)
    return y if bias is None else y + bias


def linear(x: Tensor, packed: PackedWeight, factors: ActFactors, bias: Tensor | None = None) -> Tensor:
    """The packed linear layer: `x (..., in)` any float dtype -> `(..., out)` in the same dtype.

    `bias` overrides `packed.bias`. Variant `none` multiplies by the dequantized weights in fp32. A weight with INT8 outlier
    channels adds their product, computed with the same codes. Raises ValueError for `per_group`.
    """
    bias = packed.bias if bias is None else bias
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has {x.shape[-1]} channels; the layer takes {packed.in_features}")
    if factors.variant == "none":
        y = torch.nn.functional.linear(x.to(torch.float32), dequantize(packed), bias)
        return y.to(x.dtype)
    flat = x.reshape(-1, packed.in_features)
    q, scale, zero = quantize_activations(flat, factors)
    if packed.perm is not None:
        q = q[:, packed.perm.to(torch.int64)]
    weight = int8_weight(packed)
    y = finish(int_matmul(q, weight), scale, zero, weight.sum(1, dtype=torch.int32), packed.row_scale, None)
    if packed.outlier_weight is not None and packed.outlier_scale is not None:
        tail = q[:, packed.in_features - packed.n_outliers :]
        sums = packed.outlier_weight.sum(1, dtype=torch.int32)
        y = y + finish(int_matmul(tail, packed.outlier_weight), scale, zero, sums, packed.outlier_scale, None)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)
