"""The reference path: plain torch, exact, on every device. Every fast path is tested against it, integer by integer.

**Equation.** With activations `X_hat = s*(q - z)` and weights `row_scale * w` (`w` int8):

    y[m, n] = (s[m] * row_scale[n]) * float(acc[m, n] - z[m] * rowsum[n]) + bias[n],     acc = sum_k q[m, k] * w[n, k]

**Exactness.** torch multiplies int32 matrices slowly (187 ms where fp32 takes 25), and on a GPU not at all ("addmm_cuda" not implemented
for 'Int', 'Long'). But fp32 products of small integers are exact as long as every partial sum stays under 2**24: chunks of 1024 channels do
(1024 * 127 * 128 < 2**24), and 8 bits pass through TF32 whole. Chunks are added in int32. `int_matmul` is the one place for a product of
integers.
The subtraction is made in int32, and only then converted; the three float operations run in the order written, without fusing.

**Shapes.** `q int8 (M, in)`, `acc int32 (M, out)`, `x (..., in)` -> `y (..., out)` in x's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm_kernels.activation import ActFactors, quantize_activations, quantize_outliers
from lbllm_kernels.format import PackedWeight, dequantize, int8_weight

CHUNK = 1024


def int_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """Exact `q int8 (M, in)` times `weight int8 (out, in)`, transposed -> int32 `(M, out)`."""
    acc = torch.zeros((q.shape[0], weight.shape[0]), dtype=torch.int32, device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # it would round the sums to half precision
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


@dataclass(frozen=True)
class ReferenceTokens:
    """Quantized tokens: `q int8 (M, in)`, `scale` fp32 and `zero` int32 `(M, 1)`."""

    q: Tensor
    scale: Tensor
    zero: Tensor


class ReferenceWeight:
    """A packed weight expanded to int8 `(out, in)`: making it at each call costs more than the product."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None):
        """`bias` fp32 (out,) overrides `packed.bias`. With outlier channels only `linear` gives the layer's outputs."""
        weight = int8_weight(packed)
        self._fill(weight, weight.sum(1, dtype=torch.int32), packed.row_scale, packed.bias if bias is None else bias)

    @classmethod
    def from_layout(cls, in_features: int, out_features: int, group_size: int, *tensors: Tensor | None) -> ReferenceWeight:
        """The same from the tensors of `layout`: int8 weight, row sums, row_scale, bias."""
        weight, sums, row_scale, bias = tensors
        assert weight is not None
        assert sums is not None
        assert row_scale is not None
        self = cls.__new__(cls)
        self._fill(weight, sums, row_scale, bias)
        return self

    def _fill(self, weight: Tensor, sums: Tensor, row_scale: Tensor, bias: Tensor | None) -> None:
        self.weight, self.row_sums, self.row_scale, self.bias = weight, sums, row_scale, bias
        self.layout = (weight, sums, row_scale, bias)


def quantize(x: Tensor, factors: ActFactors) -> ReferenceTokens:
    """`x (M, in)` of any float dtype -> tokens."""
    return ReferenceTokens(*quantize_activations(x, factors))


def product(tokens: ReferenceTokens, weight: ReferenceWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Outputs `(M, out)` of quantized tokens, rounded once to `dtype`."""
    acc = int_matmul(tokens.q, weight.weight)
    return finish(acc, tokens.scale, tokens.zero, weight.row_sums, weight.row_scale, weight.bias).to(dtype)


def sums(q: Tensor, weight: ReferenceWeight) -> Tensor:
    """int32 sums `(M, out)` of codes `q int8 (M, in)`. Raises ValueError on a wrong q."""
    check_codes(q, weight.weight.shape[1])
    return int_matmul(q, weight.weight)


def unquantized(x: Tensor, weight: ReferenceWeight) -> Tensor:
    """`x (M, in)` times the dequantized weights, in fp32 (activations of 16 bits)."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.to(torch.float32), weight.weight.to(torch.float32) * weight.row_scale[:, None], weight.bias)


def split_outliers(x: Tensor, packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """`x (M, in)` -> itself in the weight's channel order with outlier channels at 0, and those channels `(M, n)` (None: there are none)."""
    if packed.perm is None:
        return x, None
    ordered = x[:, packed.perm.to(torch.int64)]
    first = packed.in_features - packed.n_outliers
    return torch.nn.functional.pad(ordered[:, :first], (0, packed.n_outliers)), ordered[:, first:] if packed.n_outliers else None


def linear(
    x: Tensor, packed: PackedWeight, factors: ActFactors, bias: Tensor | None = None, expanded: ReferenceWeight | None = None
) -> Tensor:
    """The packed linear layer: `x (..., in)` any float dtype -> `(..., out)` in the same dtype.

    `bias` overrides `packed.bias`; `expanded`: the weight's int8 form, when already at hand. Variant `none` multiplies by the
    dequantized weights in fp32. INT8 outlier channels are left out of the token's range and codes; they are 8-bit numbers of their own
    scale a token (`quantize_outliers`), and their product is added. Raises ValueError for `per_group`.
    """
    bias = packed.bias if bias is None else bias
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has {x.shape[-1]} channels; the layer takes {packed.in_features}")
    if factors.variant == "none":
        y = torch.nn.functional.linear(x.to(torch.float32), dequantize(packed), bias)
        return y.to(x.dtype)
    flat = x.reshape(-1, packed.in_features)
    flat, outliers = split_outliers(flat, packed)
    q, scale, zero = quantize_activations(flat, factors)
    weight = int8_weight(packed) if expanded is None else expanded.weight
    sums = weight.sum(1, dtype=torch.int32) if expanded is None else expanded.row_sums
    y = finish(int_matmul(q, weight), scale, zero, sums, packed.row_scale, None)
    if outliers is not None and packed.outlier_weight is not None and packed.outlier_scale is not None:
        tail, tail_scale = quantize_outliers(outliers)
        y = y + (tail_scale * packed.outlier_scale) * int_matmul(tail, packed.outlier_weight).to(torch.float32)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)
