"""A4: an activation is one of sixteen codes, with a scale and a zero point computed for each token.

Weights can be prepared; activations come at run time, so their quantizer must be cheap and *dynamic*: for each token,

    s = (clip_max * max(x, 0) - clip_min * min(x, 0)) / steps,   z = rint(-clip_min * min(x, 0) / s),   X_hat = s * (q - z)

(arXiv 2604.19167, eq. 2). `uniform` has steps = 15 and q = clamp(rint(x / s) + z, 0, 15). `piecewise` has steps = 127, and q is
the nearest of sixteen integers in 0..127: eight in a dense core around z, four in each tail; two *knees* say how far the core
reaches. Sixteen codes, yet an outlier and the bulk of a token are both represented, and the product with int8 weights stays
one integer product. The exact definition, which every inference path follows to the bit, is `lbllm_kernels.activation`.

This module is the *trainable* view of the same function: its forward values are bit-equal to `s * (q - z)` there, and it
passes gradients to x (straight-through inside the range), to the clips (through s and z) and to the knees (through the
positions of the codes). Zero is always in range, so constant, all-positive and all-negative tokens are ordinary cases.

`per_group` gives each run of channels its own uniform quantizer. It is the reference for what a finer scale would buy; it
does not exist as a packed format.
"""

from __future__ import annotations

from typing import Any

import torch
from lbllm_kernels import cpu
from lbllm_kernels.activation import SMALLEST_SCALE, ActFactors
from torch import Tensor, nn

from lbllm_core.fused import kernels

FUSED_FROM = 2048  # channels
LOW, CORE, HIGH = 4, 8, 4  # codes in the lower tail, the core and the upper tail of `piecewise`


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity."""
    return x + (x.round() - x).detach()


def _scale_and_zero(x: Tensor, clip_max: Tensor, clip_min: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Per token: x `(..., channels)` float32 -> scale and zero point `(..., 1)`."""
    high = x.amax(-1, keepdim=True).clamp_min(0)
    low = x.amin(-1, keepdim=True).clamp_max(0)
    scale = (clip_max * high - clip_min * low) / steps
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    zero = round_ste(-clip_min * low / scale).clamp(0, steps)
    return scale, zero


def code_positions(zero: Tensor, knee_low: Tensor, knee_high: Tensor) -> Tensor:
    """The sixteen integers of `piecewise` for each token: zero `(..., 1)` -> `(..., 16)` ascending in 0..127."""
    below = round_ste(knee_low * zero)
    above = round_ste(knee_high * (127 - zero))
    steps = torch.arange(8, device=zero.device, dtype=zero.dtype)
    tail = zero - below
    lower = round_ste(steps[:LOW] * tail / LOW)
    core = tail + round_ste(steps * (below + above) / (CORE - 1))
    top = zero + above
    upper = top + round_ste((steps[:HIGH] + 1) * (127 - top) / HIGH)
    return torch.cat([lower, core, upper], dim=-1)


def knee_slopes(code: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """d position / d knee_low and / d knee_high of codes `(n, channels)` 0..15, rounding passed over; `code_positions` has the formulas."""
    c = code.float()
    core = (c - LOW) / (CORE - 1)
    below, above = c < LOW, c >= LOW + CORE
    none = torch.zeros_like(c)
    low = torch.where(below, -c / LOW, torch.where(above, none, core - 1))
    high = torch.where(below, none, torch.where(above, 1 - (c - LOW - CORE + 1) / HIGH, core))
    return low * zero, high * (127 - zero)


def _codes(x: Tensor, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of tokens `(n, channels)`, as `lbllm_kernels.activation` defines them; no value leaves the device."""
    steps = 15 if variant == "uniform" else 127
    scale, zero = _scale_and_zero(x, clip_max, clip_min, steps)
    if variant == "uniform":
        return ((x / scale).round() + zero).clamp(0, steps).to(torch.int8), scale, zero
    positions = code_positions(zero, knee_low, knee_high)
    cuts = ((positions[..., 1:] + positions[..., :-1]) * 0.5).contiguous()
    index = torch.searchsorted(cuts, (x / scale + zero).contiguous(), out_int32=True)
    return positions.to(torch.int8).gather(-1, index.long()), scale, zero


class _Quantized(torch.autograd.Function):
    """`s * (q - z)` with its gradients, keeping the codes as bytes instead of a graph of float tensors.

    With `t = x / s + z`: dX_hat/dx = 1 inside the range, dX_hat/ds = q - z - (x / s inside), dX_hat/dz = -s outside; s and z follow
    the clips, and the positions of the codes follow the knees. Tokens `(n, channels)` float32. On a CPU the C++ quantizer makes
    the codes, where it is built: a tenth of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, variant: str) -> Tensor:
        if x.device.type == "cpu" and cpu.library().functions is not None:
            tokens = cpu.quantize(x, ActFactors(variant, float(clip_max), float(clip_min), float(knee_low), float(knee_high)), interleaved=False)
            q, scale, zero = cpu.codes_in_order(tokens).contiguous(), tokens.scale[:, None], tokens.zero[:, None].float()
        else:
            q, scale, zero = _codes(x, clip_max, clip_min, knee_low, knee_high, variant)
        ctx.save_for_backward(x, q, scale, zero, clip_max, clip_min, knee_low, knee_high)
        ctx.steps = 15 if variant == "uniform" else 127
        return scale * (q - zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, q, scale, zero, clip_max, clip_min, knee_low, knee_high = ctx.saved_tensors
        steps = x / scale
        t = (steps.round() if ctx.steps == 15 else steps) + zero
        inside = (t >= 0) & (t <= ctx.steps)
        to_x = grad * inside
        made: list[Tensor | None] = [to_x, None, None, None, None, None]
        if any(ctx.needs_input_grad[1:3]):
            to_scale = (grad * (q - zero)).sum(-1, keepdim=True) - (to_x * steps).sum(-1, keepdim=True)
            to_zero = scale * (to_x - grad).sum(-1, keepdim=True)
            with torch.enable_grad():  # s and z as functions of the clips
                clips = [v.detach().requires_grad_() for v in (clip_max, clip_min)]
                s, z = _scale_and_zero(x, clips[0], clips[1], ctx.steps)
                made[1:3] = torch.autograd.grad([s, z], clips, [to_scale, to_zero])
        if any(ctx.needs_input_grad[3:5]) and ctx.steps == 127:
            positions = code_positions(zero, knee_low, knee_high).contiguous()
            code = torch.searchsorted(positions, q.float(), out_int32=True).clamp_max_(15)
            for at, slope in enumerate(knee_slopes(code, zero), 3):
                made[at] = ((grad * slope).sum(-1, keepdim=True) * scale).sum()
        return tuple(made)


class _FusedQuantized(torch.autograd.Function):
    """The same in one kernel each way, for a GPU: tokens `(n, channels)` of any float type, whose forward values are bit-equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, variant: str) -> Tensor:
        ctx.steps = 15 if variant == "uniform" else 127
        made, about = kernels().fake_quantized(x.contiguous(), (clip_max, clip_min, knee_low, knee_high), ctx.steps)
        ctx.save_for_backward(x, about, clip_max, clip_min, knee_low, knee_high)
        return made  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, about, clip_max, clip_min, knee_low, knee_high = ctx.saved_tensors
        to_x, sums = kernels().fake_quantized_backward(x.contiguous(), grad.contiguous(), about, (knee_low, knee_high), ctx.steps)
        made: list[Tensor | None] = [to_x if ctx.needs_input_grad[0] else None, None, None, None, None, None]
        if any(ctx.needs_input_grad[1:3]):
            with torch.enable_grad():  # s and z as functions of the clips; a token's largest and smallest value are all they need of it
                clips = [v.detach().requires_grad_() for v in (clip_max, clip_min)]
                s, z = _scale_and_zero(about[:, 2:4], clips[0], clips[1], ctx.steps)
                made[1:3] = torch.autograd.grad([s, z], clips, [sums[:, 0:1].contiguous(), sums[:, 1:2].contiguous()])
        if any(ctx.needs_input_grad[3:5]) and ctx.steps == 127:
            made[3:5] = sums[:, 2].sum(), sums[:, 3].sum()
        return tuple(made)


def _fused(x: Tensor, variant: str) -> bool:
    """Whether one kernel makes these: wide tokens on a GPU, where passes over memory are what costs."""
    return x.is_cuda and variant in ("uniform", "piecewise") and FUSED_FROM <= x.shape[-1] <= 32768 and kernels() is not None


def fake_quantize(x: Tensor, variant: str, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, group_size: int = 0) -> Tensor:
    """`X_hat` for activations `(..., channels)` of any float type; computed in float32, returned in x's type."""
    if _fused(x, variant):
        flat: Tensor = _FusedQuantized.apply(x.reshape(-1, x.shape[-1]), clip_max, clip_min, knee_low, knee_high, variant)  # type: ignore[no-untyped-call]
        return flat.view(x.shape)
    wide = x.float()
    if variant in ("uniform", "piecewise"):
        tokens = wide.reshape(-1, wide.shape[-1])
    elif variant == "per_group":  # each run of channels is a token of its own
        variant = "uniform"
        tokens = nn.functional.pad(wide, (0, -wide.shape[-1] % group_size)).reshape(-1, group_size)
    else:
        return x
    made: Tensor = _Quantized.apply(tokens, clip_max, clip_min, knee_low, knee_high, variant)  # type: ignore[no-untyped-call]
    made = made.reshape(*wide.shape[:-1], -1)[..., : wide.shape[-1]]
    return made.to(x.dtype)


class ActQuantizer(nn.Module):
    """The trainable quantizer of one site. `factors` reads its current numbers back."""

    def __init__(self, factors: ActFactors):
        super().__init__()
        self.variant, self.group_size = factors.variant, factors.group_size
        self.clip_max = nn.Parameter(torch.tensor(factors.clip_max))
        self.clip_min = nn.Parameter(torch.tensor(factors.clip_min))
        self.knee_low = nn.Parameter(torch.tensor(factors.knee_low))
        self.knee_high = nn.Parameter(torch.tensor(factors.knee_high))

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., channels)` -> `X_hat`, same shape and type."""
        with torch.autocast(x.device.type, enabled=False):
            return fake_quantize(x, self.variant, self.clip_max, self.clip_min, self.knee_low, self.knee_high, self.group_size)

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep the factors where they mean something: clips in [0.05, 1.5], knees in [0.02, 0.98]."""
        self.clip_max.clamp_(0.05, 1.5)
        self.clip_min.clamp_(0.05, 1.5)
        self.knee_low.clamp_(0.02, 0.98)
        self.knee_high.clamp_(0.02, 0.98)

    def factors(self) -> ActFactors:
        """The numbers as a plain value."""
        clip_max, clip_min, low, high = (float(p.detach()) for p in (self.clip_max, self.clip_min, self.knee_low, self.knee_high))
        return ActFactors(self.variant, clip_max, clip_min, low, high, self.group_size)
