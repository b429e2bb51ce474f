"""Which path a packed linear layer takes, and why.

**Problem.** The same folder runs on machines with and without a compiler, with old and new processors, later with GPUs. Each layer
must take the fastest path that computes exactly the reference's integers, and be able to say which one and for what reason:
silent fallbacks are how benchmarks lie.

**How.** `choose` looks at device, layout and activation variant and returns a `Choice(path, reason)`; `prepare` derives what that
path needs, once; `quantize`, `linear` and `accumulate` run it. The environment variable `LBLLM_KERNEL_PATH=reference` forces the
reference (tests, fault finding).

| path | when |
|---|---|
| `cpu_avx2`, `cpu_avx512`, `cpu_amx` | CPU, built object, G a multiple of 16, activations in 4 bits; AMX from 12 tokens on |
| `reference` | everything else: A16, INT8 outlier channels, other devices, nothing built |

**Trade-off.** The reference keeps the int8 weights expanded (1 byte a weight): expanding them at each call costs more than the
product.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lbllm_kernels import cpu, reference
from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.format import PackedWeight, int8_weight

PATH_VARIABLE = "LBLLM_KERNEL_PATH"
_CPU_PATHS = {cpu.AVX2: "cpu_avx2", cpu.AVX512: "cpu_avx512", cpu.AMX: "cpu_amx"}


@dataclass(frozen=True)
class Choice:
    """A path's name (the fastest one it may use for some number of tokens) and the reason it was taken."""

    path: str
    reason: str

    @property
    def is_cpu(self) -> bool:
        return self.path.startswith("cpu_")


@dataclass(frozen=True)
class ReferenceTokens:
    """Quantized tokens of the reference path: `q int8 (M, in)`, `scale` fp32 and `zero` int32 `(M, 1)`."""

    q: Tensor
    scale: Tensor
    zero: Tensor


Tokens = cpu.CpuTokens | ReferenceTokens


@dataclass(frozen=True)
class Prepared:
    """A packed weight ready for its path; `fast` for the C++ paths, `weight` (int8) and `sums` for the reference."""

    packed: PackedWeight
    choice: Choice
    bias: Tensor | None
    fast: cpu.CpuWeight | None = None
    weight: Tensor | None = None
    sums: Tensor | None = None


def choose(packed: PackedWeight, variant: str) -> Choice:
    """The path of this weight with activations of `variant`, with its reason."""
    forced = os.environ.get(PATH_VARIABLE, "")
    if forced == "reference":
        return Choice("reference", f"{PATH_VARIABLE}=reference")
    if variant == "none":
        return Choice("reference", "activations are not quantized")
    unsupported = cpu.unsupported(packed)
    if unsupported:
        return Choice("reference", unsupported)
    found = cpu.library()
    if not found.levels:
        return Choice("reference", found.reason)
    return Choice(_CPU_PATHS[found.levels[-1]], found.reason)


def prepare(packed: PackedWeight, variant: str, bias: Tensor | None = None) -> Prepared:
    """Choose a path for a validated weight and derive its layout. `bias` fp32 (out,) overrides `packed.bias`."""
    bias = packed.bias if bias is None else bias
    choice = choose(packed, variant)
    if choice.is_cpu:
        return Prepared(packed, choice, bias, fast=cpu.CpuWeight(packed, bias))
    if packed.outlier_weight is not None:
        return Prepared(packed, choice, bias)
    weight = int8_weight(packed)
    return Prepared(packed, choice, bias, weight=weight, sums=weight.sum(1, dtype=torch.int32))


def quantize(x: Tensor, factors: ActFactors, choice: Choice) -> Tokens:
    """Quantize `x (M, in)` for the path; linears that share a site and a path kind may share the result."""
    if choice.is_cpu:
        return cpu.quantize(x, factors)
    return ReferenceTokens(*quantize_activations(x, factors))


def linear(x: Tensor, prepared: Prepared, factors: ActFactors, tokens: Tokens | None = None) -> Tensor:
    """`x (..., in)` -> `(..., out)` in x's dtype, by the prepared path. `tokens`: the quantized `x`, when already at hand."""
    packed = prepared.packed
    if x.shape[-1] != packed.in_features:
        raise ValueError(f"x has {x.shape[-1]} channels; the layer takes {packed.in_features}")
    if x.device != packed.codes.device:
        raise ValueError(f"x is on {x.device}, the layer's weights on {packed.codes.device}")
    if packed.outlier_weight is not None:
        return reference.linear(x, packed, factors, prepared.bias)
    flat = x.reshape(-1, packed.in_features)
    if factors.variant == "none":
        assert prepared.weight is not None
        dense = prepared.weight.to(torch.float32) * packed.row_scale[:, None]
        y = torch.nn.functional.linear(flat.to(torch.float32), dense, prepared.bias)
    else:
        tokens = quantize(flat, factors, prepared.choice) if tokens is None else tokens
        y = _product(prepared, tokens)
    return y.to(x.dtype).reshape(*x.shape[:-1], packed.out_features)


def _product(prepared: Prepared, tokens: Tokens) -> Tensor:
    if isinstance(tokens, cpu.CpuTokens):
        assert prepared.fast is not None
        return cpu.linear(tokens, prepared.fast)
    assert prepared.weight is not None
    assert prepared.sums is not None
    acc = reference.int_matmul(tokens.q, prepared.weight)
    return reference.finish(acc, tokens.scale, tokens.zero, prepared.sums, prepared.packed.row_scale, prepared.bias)


def accumulate(q: Tensor, prepared: Prepared) -> Tensor:
    """int32 sums `(M, out)` of codes `q int8 (M, in)` in 0..127, by the path that `linear` would take (the final check)."""
    if prepared.fast is not None:
        return cpu.accumulate(q, prepared.fast)
    return reference.accumulate(q, prepared.packed)


def describe() -> Choice:
    """What a usual packed layer would take on this machine's CPU: for `doctor`."""
    if os.environ.get(PATH_VARIABLE, "") == "reference":
        return Choice("reference", f"{PATH_VARIABLE}=reference")
    found = cpu.library()
    return Choice(_CPU_PATHS[found.levels[-1]], found.reason) if found.levels else Choice("reference", found.reason)
