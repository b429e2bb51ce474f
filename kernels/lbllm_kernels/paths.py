"""The table of paths: what dispatch may choose from, each row the same small interface.

**Problem.** Processors, GPUs and the plain reference answer the same questions: are you here, do you take this weight, derive your
layout, quantize, multiply. Dispatch, the operator and the final check should know these questions and no path by name.

**How.** A `Path` is a row of functions; `PATHS` lists the rows. A new path is a module with these functions and one row here.

    state()                        (present on this machine, why or why not)
    unsupported(packed)            why it does not take a weight, or None
    variants                       the activations it quantizes
    derive(packed, bias)           the weight in its own layout: an object whose `layout` is a tuple of tensors (or None)
    rebuild(in, out, G, *layout)   that object again from its tensors (what a torch operator can carry)
    quantize(x, factors)           tokens `x (M, in)` in its own layout
    linear(tokens, weight, dtype)  outputs `(M, out)`, computed in fp32 as the reference does and rounded once to `dtype`
    accumulate(q, weight)          int32 sums `(M, out)` of codes `q int8 (M, in)` in channel order
    in_order(tokens)               `(q int8 (M, in), scale (M, 1), zero (M, 1))` of its tokens, for the check
    restore(weight)                the stored tensors again, bit by bit; None when the layout cannot give them back
    forward(x, weight, factors)    quantizer and product in one call, where the path has one; `alone_up_to` tokens it is cheaper than
                                   quantizing once for all readers of an input

**Trade-off.** Rows of functions instead of a class hierarchy: the modules stay plain functions on tensors, and tests call them directly.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lbllm_kernels import cpu, cuda, reference
from lbllm_kernels.activation import PACKED_VARIANTS, ActFactors, quantize_activations
from lbllm_kernels.format import PackedWeight

Ordered = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Path:
    """One row; see the module's text. `device`: the torch device type of the weights it takes, "" for any."""

    name: str
    device: str
    state: Callable[[], tuple[bool, str]]
    unsupported: Callable[[PackedWeight], str | None]
    derive: Callable[[PackedWeight, Tensor | None], Any]
    rebuild: Callable[..., Any]
    quantize: Callable[[Tensor, ActFactors], Any]
    linear: Callable[[Any, Any, torch.dtype], Tensor]
    accumulate: Callable[[Tensor, Any], Tensor]
    in_order: Callable[[Any], Ordered]
    restore: Callable[[Any], PackedWeight] | None = None
    forward: Callable[[Tensor, Any, ActFactors], Tensor] | None = None
    alone_up_to: int = 0
    variants: tuple[str, ...] = cpu.QUANTIZES


def _cpu_state(level: int) -> tuple[bool, str]:
    found = cpu.library()
    if not found.levels:
        return False, found.reason
    return level in found.levels, found.reason if level in found.levels else f"this processor has no {cpu.LEVEL_NAMES[level]}"


def _cpu_linear(tokens: cpu.CpuTokens, weight: cpu.CpuWeight, dtype: torch.dtype, most: int) -> Tensor:
    return cpu.linear(tokens, weight, cpu.best_level(tokens.tokens, most)).to(dtype)


def _cpu_accumulate(q: Tensor, weight: cpu.CpuWeight, most: int) -> Tensor:
    return cpu.accumulate(q, weight, cpu.best_level(q.shape[0], most))


def _cpu_quantize(x: Tensor, factors: ActFactors, most: int) -> cpu.CpuTokens:
    if factors.variant not in cpu.QUANTIZES:  # quantized in torch; the product is the same
        q, scale, zero = quantize_activations(x, factors)
        return cpu.tokens_of(q, scale.squeeze(1), zero.squeeze(1))
    return cpu.quantize(x, factors, level=min(most, cpu.AVX512))


def _cpu_ordered(tokens: cpu.CpuTokens) -> Ordered:
    return cpu.deinterleave(tokens), tokens.scale[:, None], tokens.zero[:, None]


def _cpu_path(name: str, level: int) -> Path:
    """`level` is the best instruction set it uses; AMX leaves few tokens to AVX-512."""
    return Path(
        name, "cpu", partial(_cpu_state, level), cpu.unsupported, cpu.CpuWeight, cpu.CpuWeight.from_layout, partial(_cpu_quantize, most=level),
        partial(_cpu_linear, most=level), partial(_cpu_accumulate, most=level), _cpu_ordered, cpu.stored, variants=PACKED_VARIANTS,
    )  # fmt: skip


def _triton() -> Any:
    """The Triton module, imported when a GPU (or the interpreter) asks for it: importing Triton takes a second."""
    from lbllm_kernels import triton_matmul

    return triton_matmul


def _triton_state() -> tuple[bool, str]:
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return False, "no GPU that torch can use"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    why = _triton().missing()
    return why is None, why or _triton().describe()


def _triton_ordered(tokens: Any) -> Ordered:
    return _triton().codes_in_order(tokens), tokens.scale[:, None], tokens.zero[:, None]


def _cuda_ordered(tokens: cuda.CudaTokens) -> Ordered:
    return cuda.codes_in_order(tokens), tokens.scale[:, None], tokens.zero[:, None]


def _reference_ordered(tokens: reference.ReferenceTokens) -> Ordered:
    return tokens.q, tokens.scale, tokens.zero


REFERENCE = Path(
    "reference", "", lambda: (True, "plain torch"), lambda packed: None, reference.ReferenceWeight, reference.ReferenceWeight.from_layout,
    reference.quantize, reference.product, reference.sums, _reference_ordered, variants=PACKED_VARIANTS,
)  # fmt: skip
CUDA = Path(
    "cuda", "cuda", cuda.state, cuda.unsupported, cuda.CudaWeight, cuda.CudaWeight.from_layout, cuda.quantize, cuda.linear, cuda.accumulate,
    _cuda_ordered, cuda.stored, cuda.forward, cuda.FUSED_UP_TO,
)  # fmt: skip
TRITON = Path(
    "triton", "cuda", _triton_state, lambda packed: _triton().unsupported(packed), lambda packed, bias: _triton().TritonWeight(packed, bias),
    lambda *layout: _triton().TritonWeight.from_layout(*layout), lambda x, factors: _triton().quantize(x, factors),
    lambda tokens, weight, dtype: _triton().linear(tokens, weight, dtype), lambda q, weight: _triton().accumulate(q, weight), _triton_ordered,
)  # fmt: skip
CPU_PATHS = (_cpu_path("cpu_amx", cpu.AMX), _cpu_path("cpu_avx512", cpu.AVX512), _cpu_path("cpu_avx2", cpu.AVX2))
PATHS: dict[str, Path] = {path.name: path for path in (*CPU_PATHS, CUDA, TRITON, REFERENCE)}
