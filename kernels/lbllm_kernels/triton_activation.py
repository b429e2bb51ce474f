"""Activations through their sixteen codes while they train, on a GPU: one kernel each way (`lbllm_core/quant/activation.py` has the plain form).

**Equation.** A token's scale `s` and zero point `z` follow from its largest and smallest value and the clips; `x_hat = s (q - z)` with q the nearest of
sixteen positions (evenly spaced, or `piecewise` by two knees). Gradients: the identity inside the range; to s, z and the knees the sums over a
token's channels, and from those, in the same kernel, to the clips.

Shapes: x `(n, channels)`; a program takes a token, the backward pass in pieces of WIDEST channels, since it holds several things of each. Forward values
are bit-equal to the plain form. A channel and token: in 2 bytes, out 2; backward in 4, out 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbllm_kernels.activation import SMALLEST_SCALE
from lbllm_kernels.triton_block import warps
from lbllm_kernels.triton_matmul import _piecewise_value, _rint

WIDEST = 2048  # channels; more would not fit into registers


@triton.jit
def _fake_quantized(x, out, about, clip_max_at, clip_min_at, knee_low_at, knee_high_at, smallest, channels, TOP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < channels
    v = tl.load(x + row * channels + at, mask=inside, other=0.0).to(tl.float32)
    high, low = tl.maximum(tl.max(v, 0), 0.0), tl.minimum(tl.min(v, 0), 0.0)
    low_part = tl.load(clip_min_at) * low
    s = tl.math.div_rn(tl.load(clip_max_at) * high - low_part, TOP * 1.0)
    s = tl.where(s < smallest, 1.0, s)
    z = tl.minimum(tl.maximum(_rint(tl.math.div_rn(-low_part, s)), 0.0), TOP * 1.0)
    steps = tl.math.div_rn(v, s)
    if TOP == 15:
        q = tl.minimum(tl.maximum(_rint(steps) + z, 0.0), 15.0)
    else:
        a, b = _rint(tl.load(knee_low_at) * z), _rint(tl.load(knee_high_at) * (127.0 - z))
        before = _piecewise_value(0, z, a, b)
        q = tl.zeros_like(steps) + before
        for k in tl.static_range(1, 16):
            value = _piecewise_value(k, z, a, b)
            q = tl.where(steps + z > (before + value) * 0.5, value, q)
            before = value
    tl.store(out + row * channels + at, (s * (q - z)).to(out.dtype.element_ty), mask=inside)
    tl.store(about + row * 4, s)
    tl.store(about + row * 4 + 1, z)
    tl.store(about + row * 4 + 2, high)
    tl.store(about + row * 4 + 3, low)


@triton.jit
def _fake_quantized_backward(x, grad, about, clip_max_at, clip_min_at, knee_low_at, knee_high_at, to_x, sums, smallest, channels, TOP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, z = tl.load(about + row * 4), tl.load(about + row * 4 + 1)
    a, b = 0.0, 0.0
    if TOP == 127:
        a, b = _rint(tl.load(knee_low_at) * z), _rint(tl.load(knee_high_at) * (127.0 - z))
    to_scale, to_zero, to_low, to_high = 0.0, 0.0, 0.0, 0.0
    for start in range(0, channels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < channels
        v = tl.load(x + row * channels + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row * channels + at, mask=inside, other=0.0).to(tl.float32)
        steps = tl.math.div_rn(v, s)
        if TOP == 15:
            t = _rint(steps) + z
            q = tl.minimum(tl.maximum(t, 0.0), 15.0)
        else:
            t = steps + z
            before = _piecewise_value(0, z, a, b)
            q = tl.zeros_like(t) + before
            code = tl.zeros_like(t)
            for k in tl.static_range(1, 16):
                value = _piecewise_value(k, z, a, b)
                above = t > (before + value) * 0.5
                code = tl.where(above, tl.where(tl.zeros_like(t) + value > before, k * 1.0, code), code)
                q = tl.where(above, value, q)
                before = value
            core = (code - 4.0) / 7.0
            low_slope = tl.where(code < 4.0, code * -0.25, tl.where(code > 11.0, 0.0, core - 1.0)) * z
            high_slope = tl.where(code < 4.0, 0.0, tl.where(code > 11.0, 1.0 - (code - 11.0) * 0.25, core)) * (127.0 - z)
            to_low += tl.sum(g * low_slope, 0)
            to_high += tl.sum(g * high_slope, 0)
        kept = tl.where((t >= 0.0) & (t <= TOP * 1.0), g, 0.0)
        tl.store(to_x + row * channels + at, kept.to(to_x.dtype.element_ty), mask=inside)
        to_scale += tl.sum(g * (q - z), 0) - tl.sum(kept * steps, 0)
        to_zero += tl.sum(kept - g, 0)
    # s = (clip_max high - clip_min low) / TOP, or 1 where that is too small; z = rint(-clip_min low / s), straight-through
    high, low = tl.load(about + row * 4 + 2), tl.load(about + row * 4 + 3)
    clip_max, clip_min = tl.load(clip_max_at), tl.load(clip_min_at)
    point = -clip_min * low / s
    to_point = tl.where((_rint(point) >= 0.0) & (_rint(point) <= TOP * 1.0), s * to_zero, 0.0)
    raw = tl.math.div_rn(clip_max * high - clip_min * low, TOP * 1.0)
    spread = tl.where(raw < smallest, 0.0, (to_scale - to_point * point / s) / TOP)
    tl.store(sums + row * 4, spread * high)
    tl.store(sums + row * 4 + 1, -low * (to_point / s + spread))
    tl.store(sums + row * 4 + 2, to_low * s)
    tl.store(sums + row * 4 + 3, to_high * s)


def fake_quantized(x: Tensor, factors: tuple[Tensor, Tensor, Tensor, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Activations `(n, channels)` through their sixteen codes, in their own type, and `(n, 4)`: scale, zero point, largest and smallest value
    (zero included). factors: clip_max, clip_min, knee_low, knee_high `()`; steps 15 (uniform) or 127 (piecewise)."""
    rows, channels = x.shape
    out, about = torch.empty_like(x), torch.empty(rows, 4, device=x.device)
    block = triton.next_power_of_2(channels)
    _fake_quantized[(rows,)](x, out, about, *factors, SMALLEST_SCALE, channels, TOP=steps, BLOCK=block, num_warps=warps(block), enable_fp_fusion=False)
    return out, about


def fake_quantized_backward(x: Tensor, grad: Tensor, about: Tensor, factors: tuple[Tensor, Tensor, Tensor, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Gradient of x, and `(4,)`: those of clip_max, clip_min, knee_low and knee_high (0 for the knees of `uniform`)."""
    rows, channels = x.shape
    to_x, sums = torch.empty_like(x), torch.empty(rows, 4, device=x.device)
    block = min(triton.next_power_of_2(channels), WIDEST)
    _fake_quantized_backward[(rows,)](
        x, grad, about, *factors, to_x, sums, SMALLEST_SCALE, channels, TOP=steps, BLOCK=block, num_warps=warps(block), enable_fp_fusion=False
    )
    return to_x, sums.sum(0)
