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
from lbllm_kernels.activation import ActFactors
from torch import Tensor, nn

LOW, CORE, HIGH = 4, 8, 4  # codes in the lower tail, the core and the upper tail of `piecewise`


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is that of the identity."""
    return x + (x.round() - x).detach()


def _scale_and_zero(x: Tensor, clip_max: Tensor, clip_min: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Per token: x `(..., channels)` float32 -> scale and zero point `(..., 1)`."""
    high = x.amax(-1, keepdim=True).clamp_min(0)
    low = x.amin(-1, keepdim=True).clamp_max(0)
    scale = (clip_max * high - clip_min * low) / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
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


def _uniform(x: Tensor, clip_max: Tensor, clip_min: Tensor) -> Tensor:
    scale, zero = _scale_and_zero(x, clip_max, clip_min, 15)
    code = (round_ste(x / scale) + zero).clamp(0, 15)
    return scale * (code - zero)


def _piecewise(x: Tensor, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor) -> Tensor:
    scale, zero = _scale_and_zero(x, clip_max, clip_min, 127)
    positions = code_positions(zero, knee_low, knee_high)
    t = x / scale + zero
    with torch.no_grad():
        cuts = (positions[..., 1:] + positions[..., :-1]) * 0.5
        index = torch.searchsorted(cuts.contiguous(), t.detach().contiguous())
    inside = t.clamp(0, 127)
    nearest = positions.gather(-1, index)
    # value: the nearest position. Gradient: to t where t is in range, and to the positions themselves.
    code = nearest + (inside - inside.detach())
    return scale * (code - zero)


class _Quantized(torch.autograd.Function):
    """The same function on a CPU, with codes from the C++ quantizer: a tenth of the time and of the memory.

    With `t = x / s + z`: dX_hat/dx = 1 inside the range, dX_hat/ds = q - z - (x / s inside), dX_hat/dz = -s outside; s and z follow
    the clips, and the positions of the codes follow the knees. Tokens `(n, channels)` float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, variant: str) -> Tensor:
        factors = ActFactors(variant, float(clip_max), float(clip_min), float(knee_low), float(knee_high))
        tokens = cpu.quantize(x, factors, interleaved=False)
        q, scale, zero = cpu.codes_in_order(tokens).contiguous(), tokens.scale[:, None], tokens.zero[:, None].float()
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
            with torch.enable_grad():
                knees = [v.detach().requires_grad_() for v in (knee_low, knee_high)]
                positions = code_positions(zero, knees[0], knees[1])
                index = torch.searchsorted(positions.detach().contiguous(), q.float()).clamp_max(15)
                to_positions = torch.zeros_like(positions).scatter_add_(-1, index, grad * scale)
                made[3:5] = torch.autograd.grad(positions, knees, to_positions)
        return tuple(made)


def fake_quantize(x: Tensor, variant: str, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, group_size: int = 0) -> Tensor:
    """`X_hat` for activations `(..., channels)` of any float type; computed in float32, returned in x's type."""
    wide = x.float()
    made: Tensor
    if wide.device.type == "cpu" and variant in ("uniform", "piecewise") and cpu.library().functions is not None:
        flat = wide.reshape(-1, wide.shape[-1])
        made = _Quantized.apply(flat, clip_max, clip_min, knee_low, knee_high, variant).view(wide.shape)  # type: ignore[no-untyped-call]
    elif variant == "uniform":
        made = _uniform(wide, clip_max, clip_min)
    elif variant == "piecewise":
        made = _piecewise(wide, clip_max, clip_min, knee_low, knee_high)
    elif variant == "per_group":
        short = -wide.shape[-1] % group_size
        padded = nn.functional.pad(wide, (0, short)) if short else wide
        grouped = padded.reshape(*padded.shape[:-1], -1, group_size)
        made = _uniform(grouped, clip_max, clip_min).flatten(-2)[..., : wide.shape[-1]]
    else:
        return x
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
