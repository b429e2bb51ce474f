"""The 4-bit activation quantizer: sixteen codes, one scale and one zero point per token.

**Problem.** Every linear layer's input is quantized at run time. Each path (torch, C++, Triton, CUDA) must produce the *same
integers*, or the packed model is a different model on each machine. So this file fixes every float operation, and the fast
paths repeat it literally: fp32, IEEE division, round half to even (`rint`), no fused multiply-add.

**Equations** (method.md, section 2; paper eq. 2 with one scale). Per token, with zero always inside the range:

    hi = max(max x, 0)      lo = min(min x, 0)      range = clip_max*hi - clip_min*lo
    s  = range / n          z = clamp(rint(-(clip_min*lo) / s), 0, n)          n = 15 (uniform) or 127 (piecewise, planes)
    X_hat = s * (q - z)

* `uniform`:   `q = clamp(rint(x/s) + z, 0, 15)`.
* `piecewise`: `q` is the one of sixteen integers `v_0 < ... < v_15` in 0..127 nearest to `t = x/s + z`; a dense core of eight
  around `z`, four sparse values on each side (`piecewise_values`). A linear layer stays ONE int8 x int8 -> int32 product.
* `planes`:    `q` is the nearest to `t` of the sixteen subset sums of four integers, the plane weights `p_0..p_3`, fitted for each site
  (BWA, arXiv 2504.05352: an activation as four binary planes, `q = p_0 B_0 + .. + p_3 B_3`). The table does not depend on the token.
  `planes.py` computes the same product plane by plane.
* `none`: no quantization (A16). `per_group` needs a flush per group and is emulated in `lbllm_core`; refused here.

**Edges.** A scale below the smallest normal fp32 (a constant-zero token, or one of denormals) becomes 1, so all codes equal
`z = 0` and X_hat = 0. A token that holds NaN or infinity, or whose range overflows, gets the scale NaN and codes 0: its outputs
are NaN, visibly, on every path.

**Trade-off.** Round-half-even on `x/s` (a true division) costs more than a multiplication by `1/s`, but a reciprocal moves codes
at ties and is rounded differently on different machines.

**Shapes.** `x (..., in)` -> `q int8 (..., in)`, `scale fp32 (..., 1)`, `zero_point int32 (..., 1)`. Codes are 0..127: never negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VARIANTS = ("none", "uniform", "piecewise", "planes", "per_group")
PACKED_VARIANTS = ("uniform", "piecewise", "planes")  # with codes a token, which the packed product takes
POWERS_OF_TWO = (8, 17, 34, 68)  # 127/15 * 2^j, rounded: planes before they are fitted
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
UNIFORM_TOP = 15
PIECEWISE_TOP = 127


@dataclass(frozen=True)
class ActFactors:
    """The learned numbers of one input site (qkv, o, gate_up or down).

    `clip_max`, `clip_min` > 0 shrink or stretch the range; `knee_low`, `knee_high` in 0..1 are the shares of the way from the
    zero point to either end that the dense core covers (piecewise only). `planes`: four plane weights, integers above 0, ascending, at
    most 127 in all (planes only). `group_size` belongs to `per_group` alone.
    Numbers are rounded to fp32 before use. Raises ValueError naming the field.
    """

    variant: str
    clip_max: float = 1.0
    clip_min: float = 1.0
    knee_low: float = 0.25
    knee_high: float = 0.25
    group_size: int = 0
    planes: tuple[int, ...] = POWERS_OF_TWO

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"activation variant {self.variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
        for name in ("clip_max", "clip_min"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"activation {name}={value!r} must be a finite number above 0")
        for name in ("knee_low", "knee_high"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"activation {name}={value!r} must lie in 0..1")
        p = self.planes
        if len(p) != 4 or any(type(w) is not int for w in p) or not 0 < p[0] <= p[1] <= p[2] <= p[3] or sum(p) > PIECEWISE_TOP:
            raise ValueError(f"activation planes={p!r} must be four ascending integers above 0 with a sum of at most {PIECEWISE_TOP}")

    def numbers(self) -> list[float]:
        """The numbers that files hold: clips and knees, or clips and plane weights."""
        rest = self.planes if self.variant == "planes" else (self.knee_low, self.knee_high)
        return [self.clip_max, self.clip_min, *map(float, rest)]


def factors_of(variant: str, numbers: Sequence[float]) -> ActFactors:
    """The inverse of `ActFactors.numbers`. Raises ValueError for numbers that are not a quantizer's."""
    if len(numbers) != len(ActFactors(variant).numbers()):
        raise ValueError(f"activation variant {variant!r} does not have {len(numbers)} numbers")
    clip_max, clip_min, *planes = numbers
    if variant != "planes":
        return ActFactors(variant, clip_max, clip_min, planes[0], planes[1])
    if not all(float(p).is_integer() for p in planes):
        raise ValueError(f"activation planes={planes!r} must be integers")
    return ActFactors(variant, clip_max, clip_min, planes=tuple(map(int, planes)))


def _fp32(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)  # made on the device: a CUDA graph can hold it


def piecewise_values(zero_point: Tensor, knee_low: float, knee_high: float) -> Tensor:
    """The sixteen integers a piecewise code may stand for, ascending: four up to the core, eight in it, four beyond.

    `zero_point (...,)` integers in 0..127 -> fp32 `(..., 16)` holding integers, `v_0 = 0` and `v_15 = 127`. The core reaches from
    `z - a` to `z + b` with `a = rint(knee_low*z)`, `b = rint(knee_high*(127 - z))`. Equal neighbours are allowed (z = 0 has no low
    tail); they only make codes coincide.
    """
    z = zero_point.to(torch.float32)
    a = torch.round(_fp32(knee_low, z) * z)
    b = torch.round(_fp32(knee_high, z) * (PIECEWISE_TOP - z))
    values = [torch.round(i * (z - a) / 4) for i in range(4)]
    values += [(z - a) + torch.round(j * (a + b) / _fp32(7, z)) for j in range(8)]
    values += [(z + b) + torch.round(i * (PIECEWISE_TOP - z - b) / 4) for i in range(1, 5)]
    return torch.stack(values, dim=-1)


def plane_masks(planes: tuple[int, ...]) -> tuple[int, ...]:
    """Which planes make each of the sixteen values, by ascending value: bit j of a mask is plane j. Of equal sums the smaller mask is first."""
    return tuple(sorted(range(16), key=lambda mask: (_subset_sum(planes, mask), mask)))


def plane_values(planes: tuple[int, ...]) -> list[int]:
    """The sixteen subset sums of four plane weights, ascending, 0 first."""
    return [_subset_sum(planes, mask) for mask in plane_masks(planes)]


def _subset_sum(planes: tuple[int, ...], mask: int) -> int:
    return sum(weight for j, weight in enumerate(planes) if mask >> j & 1)


def token_scale(x: Tensor, factors: ActFactors) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every token: fp32 `(..., 1)` each, the zero point still a float that holds an integer.

    `x (..., in)` fp32. A scale of NaN marks a token that is not finite.
    """
    top = UNIFORM_TOP if factors.variant == "uniform" else PIECEWISE_TOP
    hi = x.amax(-1, keepdim=True).clamp(min=0)
    lo = x.amin(-1, keepdim=True).clamp(max=0)
    low_part = _fp32(factors.clip_min, x) * lo
    span = _fp32(factors.clip_max, x) * hi - low_part
    scale = span / _fp32(top, x)  # by a tensor: a GPU multiplies by the rounded reciprocal of a number
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    scale = torch.where(torch.isfinite(scale), scale, torch.full_like(scale, math.nan))
    zero = torch.round(-low_part / scale).clamp(0, top)
    return scale, torch.nan_to_num(zero, nan=0.0)


def quantize_activations(x: Tensor, factors: ActFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize tokens: `x (..., in)` of any float type -> `(q int8 (..., in), scale fp32 (..., 1), zero_point int32 (..., 1))`.

    `X_hat = scale * (q - zero_point)`. Raises ValueError for variants without per-token codes (`none`, `per_group`).
    """
    if factors.variant not in PACKED_VARIANTS:
        raise ValueError(f"activation variant {factors.variant!r} has no per-token codes; the packed path takes {', '.join(PACKED_VARIANTS)}")
    if not x.dtype.is_floating_point or x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"activations must be a float tensor (..., in) with in > 0, got {x.dtype} {tuple(x.shape)}")
    x = x.to(torch.float32)
    scale, zero = token_scale(x, factors)
    steps = x / scale
    if factors.variant == "uniform":
        q = (torch.round(steps) + zero).clamp(0, UNIFORM_TOP)
    elif factors.variant == "planes":
        q = _nearest(steps + zero, torch.tensor(plane_values(factors.planes), dtype=torch.float32, device=x.device).expand(*zero.shape[:-1], 16))
    else:
        values = piecewise_values(zero, factors.knee_low, factors.knee_high).squeeze(-2)
        q = _nearest(steps + zero, values)
    q = torch.where(torch.isnan(scale), torch.zeros_like(q), q)
    return q.to(torch.int8), scale, zero.to(torch.int32)


def _nearest(t: Tensor, values: Tensor) -> Tensor:
    """The entry of `values (..., 16)` chosen for each `t (..., in)`: the index counts the midpoints strictly below `t`."""
    midpoints = (values[..., 1:] + values[..., :-1]) / 2
    index = torch.zeros_like(t, dtype=torch.int64)
    for k in range(midpoints.shape[-1]):
        index += t > midpoints[..., k : k + 1]
    return values.gather(-1, index)


def quantize_outliers(x: Tensor) -> tuple[Tensor, Tensor]:
    """The INT8 outlier channels of tokens, symmetric: `x (M, n)` -> `(q int8 (M, n) in -127..127, scale fp32 (M, 1))`, value `scale * q`.

    `scale = max |x| / 127`, 1 for a token of zeros, NaN for one that is not finite.
    """
    x = x.to(torch.float32)
    scale = x.abs().amax(-1, keepdim=True) / _fp32(127.0, x)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    scale = torch.where(torch.isfinite(scale), scale, torch.full_like(scale, math.nan))
    return torch.nan_to_num(torch.round(x / scale), nan=0.0).clamp(-127, 127).to(torch.int8), scale


def dequantize_activations(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`X_hat = scale * (q - zero_point)`, fp32 `(..., in)`."""
    return scale * (q.to(torch.int32) - zero_point).to(torch.float32)
