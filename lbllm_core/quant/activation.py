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

`planes` takes the nearest of the sixteen subset sums of four plane weights, which are fitted once (`fit_planes`) and then stay: the
predecessor's W(1+1)A(1x4) (BWA, arXiv 2504.05352). There a few input channels with outliers may also be kept in 8 bits, with a scale of
their own (`ActQuantizer.outliers`).

`per_group` gives each run of channels its own uniform quantizer. It is the reference for what a finer scale would buy
(`evaluation/site_costs.py`), and no choice of a configuration: it does not exist as a packed format.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lbllm_kernels import cpu
from lbllm_kernels.activation import PIECEWISE_TOP, POWERS_OF_TWO, SMALLEST_SCALE, ActFactors, plane_values, quantize_outliers
from lbllm_kernels.reference import int_matmul
from torch import Tensor, nn

from lbllm_core.fused import activations

FUSED_FROM = 256  # channels
PLANE_GRID = (1, 2, 4, 6, 9, 12, 16, 21, 28, 36, 46, 58, 72)  # plane weights that a fit starts from
PLANE_SAMPLE = 1 << 17  # values a fit looks at
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


def _codes(
    x: Tensor, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, variant: str, table: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of tokens `(n, channels)`, as `lbllm_kernels.activation` defines them; no value leaves the device."""
    steps = 15 if variant == "uniform" else 127
    scale, zero = _scale_and_zero(x, clip_max, clip_min, steps)
    if variant == "uniform":
        return ((x / scale).round() + zero).clamp(0, steps).to(torch.int8), scale, zero
    if variant == "planes":
        assert table is not None
        return table.to(torch.int8)[torch.bucketize(x / scale + zero, (table[1:] + table[:-1]) * 0.5)], scale, zero
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
    def forward(
        ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor, knee_low: Tensor, knee_high: Tensor, variant: str, table: Tensor | None
    ) -> Tensor:
        if variant in cpu.QUANTIZES and x.device.type == "cpu" and cpu.library().functions is not None:
            tokens = cpu.quantize(x, ActFactors(variant, float(clip_max), float(clip_min), float(knee_low), float(knee_high)), interleaved=False)
            q, scale, zero = cpu.codes_in_order(tokens).contiguous(), tokens.scale[:, None], tokens.zero[:, None].float()
        else:
            q, scale, zero = _codes(x, clip_max, clip_min, knee_low, knee_high, variant, table)
        ctx.save_for_backward(x, q, scale, zero, clip_max, clip_min, knee_low, knee_high)
        ctx.variant, ctx.steps = variant, 15 if variant == "uniform" else PIECEWISE_TOP
        return scale * (q - zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, q, scale, zero, clip_max, clip_min, knee_low, knee_high = ctx.saved_tensors
        steps = x / scale
        t = (steps.round() if ctx.steps == 15 else steps) + zero
        inside = (t >= 0) & (t <= ctx.steps)
        to_x = grad * inside
        made: list[Tensor | None] = [to_x, *[None] * 6]
        if any(ctx.needs_input_grad[1:3]):
            to_scale = (grad * (q - zero)).sum(-1, keepdim=True) - (to_x * steps).sum(-1, keepdim=True)
            to_zero = scale * (to_x - grad).sum(-1, keepdim=True)
            with torch.enable_grad():  # s and z as functions of the clips
                clips = [v.detach().requires_grad_() for v in (clip_max, clip_min)]
                s, z = _scale_and_zero(x, clips[0], clips[1], ctx.steps)
                made[1:3] = torch.autograd.grad([s, z], clips, [to_scale, to_zero])
        if any(ctx.needs_input_grad[3:5]) and ctx.variant == "piecewise":
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
        made, about = activations().fake_quantized(x.contiguous(), (clip_max, clip_min, knee_low, knee_high), ctx.steps)
        ctx.save_for_backward(x, about, clip_max, clip_min, knee_low, knee_high)
        return made  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, about, clip_max, clip_min, knee_low, knee_high = ctx.saved_tensors
        to_x, sums = activations().fake_quantized_backward(x.contiguous(), grad.contiguous(), about, (clip_max, clip_min, knee_low, knee_high), ctx.steps)
        wanted = ctx.needs_input_grad[:5] if ctx.steps == 127 else ctx.needs_input_grad[:3]
        made = [made if asked else None for made, asked in zip((to_x, *sums.unbind()), wanted, strict=False)]
        return (*made, *[None] * (6 - len(made)))


def _fused(x: Tensor, variant: str) -> bool:
    """Whether one kernel makes these: wide tokens on a GPU, where passes over memory are what costs."""
    return x.is_cuda and variant in ("uniform", "piecewise") and FUSED_FROM <= x.shape[-1] <= 32768 and activations() is not None


def fake_quantize(
    x: Tensor,
    variant: str,
    clip_max: Tensor,
    clip_min: Tensor,
    knee_low: Tensor,
    knee_high: Tensor,
    group_size: int = 0,
    table: Tensor | None = None,
) -> Tensor:
    """`X_hat` for activations `(..., channels)` of any float type; computed in float32, returned in x's type. table `(16,)`: the values of `planes`."""
    if _fused(x, variant):
        flat: Tensor = _FusedQuantized.apply(x.reshape(-1, x.shape[-1]), clip_max, clip_min, knee_low, knee_high, variant)  # type: ignore[no-untyped-call]
        return flat.view(x.shape)
    wide = x.float()
    if variant in ("uniform", "piecewise", "planes"):
        tokens = wide.reshape(-1, wide.shape[-1])
    elif variant == "per_group":  # each run of channels is a token of its own
        variant = "uniform"
        tokens = nn.functional.pad(wide, (0, -wide.shape[-1] % group_size)).reshape(-1, group_size)
    else:
        return x
    made: Tensor = _Quantized.apply(tokens, clip_max, clip_min, knee_low, knee_high, variant, table)  # type: ignore[no-untyped-call]
    made = made.reshape(*wide.shape[:-1], -1)[..., : wide.shape[-1]]
    return made.to(x.dtype)


def fake_quantize_outliers(x: Tensor) -> Tensor:
    """8-bit values of outlier channels `(..., n)`, as `lbllm_kernels.activation.quantize_outliers` has them; gradients straight through."""
    q, scale = quantize_outliers(x.detach().reshape(-1, x.shape[-1]))
    made = (scale * q).reshape(x.shape).to(x.dtype)
    return made + (x - x.detach())  # to the bit the made value


def fit_planes(x: Tensor, clip: float) -> tuple[int, ...]:
    """The four plane weights of least squared error for the tokens `x (n, channels)` float32 of a site, at clips of `clip`.

    In units of the token's scale, `u = x / s + z` shall be a subset sum, and an error there counts `s^2`. The values enter through 256 bins
    (mass and mean of each), so that thousands of candidates cost milliseconds: a coarse grid of all weights, then steps of one unit.
    """
    x = x[:: max(1, x.numel() // PLANE_SAMPLE)]
    clips = torch.tensor(clip, device=x.device)
    scale, zero = _scale_and_zero(x, clips, clips, PIECEWISE_TOP)
    u, weight = (x / scale + zero).clamp(0, PIECEWISE_TOP).flatten(), scale.square().expand_as(x).flatten().double()
    at = (u * (255 / PIECEWISE_TOP)).long()
    mass, moment = (torch.zeros(256, dtype=torch.float64, device=x.device).index_add_(0, at, v) for v in (weight, weight * u))
    mean = (moment / mass.clamp_min(1e-300)).float()
    best, error = _best_planes([POWERS_OF_TWO, *itertools.combinations_with_replacement(PLANE_GRID, 4)], mass, mean)
    while True:
        around, nearby = _best_planes([tuple(p + d for p, d in zip(best, step, strict=True)) for step in itertools.product((-1, 0, 1), repeat=4)], mass, mean)
        if nearby >= error:
            return best
        best, error = around, nearby


def _best_planes(candidates: Iterable[Sequence[int]], mass: Tensor, mean: Tensor) -> tuple[tuple[int, ...], float]:
    """The legal candidate of least error, the first of equals, and its error; mass, mean `(bins,)`."""
    legal = [tuple(c) for c in candidates if 0 < c[0] <= c[1] <= c[2] <= c[3] and sum(c) <= PIECEWISE_TOP]
    weights, masks = (torch.tensor(rows, dtype=torch.int8, device=mean.device) for rows in (legal, list(itertools.product((0, 1), repeat=4))))
    table = int_matmul(weights, masks).float().sort(dim=1).values  # torch has no product of int64 on a GPU
    at = torch.searchsorted((table[:, 1:] + table[:, :-1]) * 0.5, mean.expand(len(legal), -1).contiguous())
    errors = (mass * (mean - table.gather(1, at)).double().square()).sum(1)
    found = int(errors.argmin())
    return legal[found], float(errors[found])


class ActQuantizer(nn.Module):
    """The trainable quantizer of one site. `factors` reads its current numbers back.

    `outliers` `(n,)`: channels that are left to 8 bits with a scale a token of their own, and out of the range of the others.
    """

    outliers: Tensor | None
    table: Tensor | None

    def __init__(self, factors: ActFactors, outliers: Tensor | None = None):
        super().__init__()
        self.variant, self.group_size, self.planes = factors.variant, factors.group_size, factors.planes
        self.register_buffer("table", torch.tensor(plane_values(factors.planes), dtype=torch.float32) if factors.variant == "planes" else None)
        self.register_buffer("outliers", None if outliers is None else outliers.long())
        self.clip_max = nn.Parameter(torch.tensor(factors.clip_max))
        self.clip_min = nn.Parameter(torch.tensor(factors.clip_min))
        self.knee_low = nn.Parameter(torch.tensor(factors.knee_low))
        self.knee_high = nn.Parameter(torch.tensor(factors.knee_high))

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., channels)` -> `X_hat`, same shape and type."""
        with torch.autocast(x.device.type, enabled=False):
            if self.outliers is None or self.variant == "none":
                return self._codes(x)
            made = self._codes(x.index_fill(-1, self.outliers, 0))
            return made.index_copy(-1, self.outliers, fake_quantize_outliers(x[..., self.outliers]))

    def _codes(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.variant, self.clip_max, self.clip_min, self.knee_low, self.knee_high, self.group_size, self.table)

    def factors(self) -> ActFactors:
        """The numbers as a plain value."""
        clip_max, clip_min, low, high = (float(p.detach()) for p in (self.clip_max, self.clip_min, self.knee_low, self.knee_high))
        return ActFactors(self.variant, clip_max, clip_min, low, high, self.group_size, self.planes)


@torch.no_grad()
def constrain(quantizers: Sequence[ActQuantizer]) -> None:
    """Keep factors where they mean something: clips in [0.05, 1.5], knees in [0.02, 0.98]. All together: each is one number, and a launch."""
    clips: list[Tensor] = [f for q in quantizers for f in (q.clip_max, q.clip_min)]
    knees: list[Tensor] = [f for q in quantizers for f in (q.knee_low, q.knee_high)]
    for factors, low, high in ((clips, 0.05, 1.5), (knees, 0.02, 0.98)):
        if factors:
            torch._foreach_clamp_min_(factors, low)
            torch._foreach_clamp_max_(factors, high)
