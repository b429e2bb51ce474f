"""What stands between a block's matrix products, on a GPU: norms (with the residual sum before them), rotary embedding, gate; forward and backward.

**Problem.** transformers computes these as some eighty operations on float32 hidden states (`lbllm_core/model/fused_block.py`); each is a pass over
memory, and in a narrow block a launch that takes longer than the pass.

**Equations.** `n = w x / rms(x)`, `rms(x)^2 = mean(x^2) + eps`; heads `(a, b)` turned by an angle, backward by its negative; `silu(g) u`.

Shapes: hidden states `(..., width)` float32, what enters a product in its type. A program takes a token; the gate takes a run of values. Everything
between reading and writing is float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

RUN = 2048  # values of a gate that a program takes


@triton.jit
def _norm_forward(x, delta, weight, summed, out, inverse, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0)
    if ADD:
        value += tl.load(delta + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(summed + row * WIDTH + at, value, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    w = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + at, (w * (value * scale)).to(out.dtype.element_ty), mask=inside)
    tl.store(inverse + row, scale)


@triton.jit
def _norm_backward(x, weight, inverse, grad, grad_sum, to_x, to_delta, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0)
    scale = tl.load(inverse + row)
    g = tl.load(grad + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32) * tl.load(weight + at, mask=inside, other=0.0)
    made = scale * g - value * (scale * scale * scale * tl.sum(g * value, axis=0) / WIDTH)
    if ADD:
        made += tl.load(grad_sum + row * WIDTH + at, mask=inside, other=0.0)
        tl.store(to_delta + row * WIDTH + at, made.to(to_delta.dtype.element_ty), mask=inside)
    tl.store(to_x + row * WIDTH + at, made, mask=inside)


def warps(block: int) -> int:
    """Warps of a program that holds a row of so many channels."""
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def norm_forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of `x + delta`: x `(..., width)` float32, delta in `dtype` -> the sum (x itself without delta), the norm in `dtype`, 1 / rms `(...)`."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    inverse = torch.empty(x.shape[:-1], device=x.device)
    summed = x if delta is None else torch.empty_like(x)
    _norm_forward[(x.numel() // width,)](x, x if delta is None else delta, weight, summed, out, inverse, eps, WIDTH=width, BLOCK=block, ADD=delta is not None, num_warps=warps(block))
    return summed, out, inverse


def norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor, grad_sum: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (float32) and, when the norm had added something, of that (the type of `grad`); `grad_sum`: what arrives at the sum itself."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    to_x = torch.empty_like(x)
    to_delta = None if grad_sum is None else torch.empty_like(grad)
    _norm_backward[(x.numel() // width,)](
        x, weight, inverse, grad, x if grad_sum is None else grad_sum, to_x, to_x if to_delta is None else to_delta,
        WIDTH=width, BLOCK=block, ADD=grad_sum is not None, num_warps=warps(block),
    )  # fmt: skip
    return to_x, to_delta


@triton.jit
def _rotated(x, cos, sin, out, tokens, sign, HEADS: tl.constexpr, HALF: tl.constexpr, ROUND_HEADS: tl.constexpr, ROUND_HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, ROUND_HEADS)[:, None], tl.arange(0, ROUND_HALF)[None, :]
    inside = (head < HEADS) & (at < HALF)
    place = row * HEADS * 2 * HALF + head * 2 * HALF + at
    angle = (row % tokens) * 2 * HALF + at
    c = tl.load(cos + angle, mask=at < HALF, other=0.0)
    s = tl.load(sin + angle, mask=at < HALF, other=0.0) * sign
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Rotary embedding of heads: x `(batch, tokens, heads, head_dim)`, cos and sin `(tokens, head_dim)` float32 with equal halves; `back` is the inverse, and the gradient."""
    batch, tokens, heads, size = x.shape
    out = torch.empty_like(x)
    half = size // 2
    _rotated[(batch * tokens,)](
        x, cos, sin, out, tokens, -1.0 if back else 1.0, HEADS=heads, HALF=half, ROUND_HEADS=triton.next_power_of_2(heads), ROUND_HALF=triton.next_power_of_2(half)
    )
    return out


@triton.jit
def _gate_forward(gate, up, out, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(gate, up, grad, to_gate, to_up, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    tl.store(to_gate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + at, (d * g * s).to(to_up.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    out = torch.empty_like(gate)
    _gate_forward[(triton.cdiv(gate.numel(), RUN),)](gate, up, out, gate.numel(), BLOCK=RUN)
    return out


def gated_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    made: tuple[Any, Any] = (torch.empty_like(gate), torch.empty_like(up))
    _gate_backward[(triton.cdiv(gate.numel(), RUN),)](gate, up, grad, *made, gate.numel(), BLOCK=RUN)
    return made
