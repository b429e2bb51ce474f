"""Level families: what W(1+1) may express, and what a plain 2-bit integer grid or two binary weights may (the controls).

| family     | levels of a group                          | parameters         | billed as                           |
|------------|--------------------------------------------|--------------------|-------------------------------------|
| `free`     | any four                                   | four int8          | 32 bits a group, or an entry's code |
| `affine`   | `base + c * step`, both on the int8 grid   | two int8           | 16 bits a group (`affine8`)         |
| `int2`     | `step * (c - zero)`, `zero` one of 0..3    | a scale and a zero | 16 + 2 bits a group                 |
| `residual` | `±a ± b`, `a >= b >= 0`                    | two scales         | 2 x 16 bits a group                 |

All run in the same container (codes, four levels, a row scale), start from the same stage 1 and train in the same stages, so
every difference in a comparison comes from the levels alone; each is billed in its own format (`bits.py`). `int2` and `residual`
keep their scales on the container's grid instead of in fp16, which costs `int2` some hundredths of a percent of the error.

- `round_to_nearest`: the floor of every comparison. Grid from the smallest to the largest weight of the group.
- `fit_affine`: base and step by alternating least squares under importances, from several clipped ranges.
- `fit_int2`: step for each of the four zeros, likewise; the best zero wins.
- `fit_residual`: `w ~ a sign(w) + b sign(w - a sign(w))` as in BiLLM (arXiv 2402.04291); a and b are those of least error, where BiLLM takes
  the mean of |w| and then of what is left.
- `to_family_grid`: the nearest levels that a family can store; what training rounds to, straight-through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from lbllm_core.quant.weight import GRID, TINY, nearest_codes, to_grid, weighted_error


def affine_levels(base: Tensor, step: Tensor) -> Tensor:
    """base, step `(n, 1)` -> ascending levels `(n, 4)`; steps are taken as positive."""
    return base + step.abs() * torch.arange(4, device=base.device, dtype=base.dtype)


def round_to_nearest(w: Tensor) -> Tensor:
    """Min-max grid of each group: w `(n, G)` -> levels `(n, 4)`."""
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    return affine_levels(low, (high - low) / 3)


def fit_affine(w: Tensor, h: Tensor, rounds: int = 8) -> Tensor:
    """Best affine levels by alternating least squares from four clipped ranges: w `(n, G)`, h `(n, G)` or `(G,)` -> `(n, 4)`."""
    h = h.expand_as(w)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    mid, half = (low + high) / 2, (high - low) / 2
    best: Tensor | None = None
    best_error: Tensor | None = None
    for clip in (1.0, 0.85, 0.7, 0.55):
        levels = affine_levels(mid - half * clip, 2 * half * clip / 3)
        for _ in range(rounds):
            levels = _least_squares(w, h, nearest_codes(w, levels).float(), levels)
        error = weighted_error(w, h, levels)
        if best is None or best_error is None:
            best, best_error = levels, error
        else:
            best = torch.where((error < best_error)[:, None], levels, best)
            best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def fit_int2(w: Tensor, h: Tensor, rounds: int = 8) -> Tensor:
    """Best levels `step * (c - zero)` with an integer zero: w `(n, G)`, h `(n, G)` or `(G,)` -> `(n, 4)`."""
    h = h.expand_as(w)
    start = fit_affine(w, h, rounds)
    reach = w.abs().amax(-1, keepdim=True).clamp_min(TINY)
    width = torch.maximum(start[:, 3:] - start[:, :1], 1e-3 * reach)
    best, best_error = start, torch.full_like(w[:, 0], float("inf"))
    for zero in range(4):
        levels = affine_levels(-zero * width / 3, width / 3)
        for _ in range(rounds):
            c = nearest_codes(w, levels).float() - zero
            step = (h * w * c).sum(-1, keepdim=True) / (h * c.square()).sum(-1, keepdim=True).clamp_min(TINY)
            step = torch.where(step > 0, step, levels[:, 1:2] - levels[:, :1])
            levels = affine_levels(-zero * step, step)
        error = weighted_error(w, h, levels)
        best = torch.where((error < best_error)[:, None], levels, best)
        best_error = torch.minimum(error, best_error)
    return best


def residual_levels(a: Tensor, b: Tensor) -> Tensor:
    """a, b `(..., 1)` with a >= b >= 0 -> ascending levels `±a ± b`, `(..., 4)`."""
    return torch.cat([-a - b, b - a, a - b, a + b], dim=-1)


def fit_residual(w: Tensor, h: Tensor) -> Tensor:
    """Levels `±a ± b` of least error: w `(n, G)`, h `(n, G)` or `(G,)` -> `(n, 4)`.

    The sign of a weight is that of its level, so |w| is split in two parts with a mean each, `a - b` and `a + b`: sorted, every split is tried.
    """
    h = h.expand_as(w)
    h = torch.where(h.sum(-1, keepdim=True) > TINY, h, 1.0)  # channels that were silent in calibration
    size, order = w.abs().sort(-1)
    weight = h.gather(-1, order)
    below, sums = weight.cumsum(-1), (weight * size).cumsum(-1)
    above, rest = below[:, -1:] - below, sums[:, -1:] - sums
    low, high = sums / below.clamp_min(TINY), rest / above.clamp_min(TINY)
    split = (sums * low + rest * high)[:, :-1].argmax(-1, keepdim=True)
    low, high = low.gather(-1, split), high.gather(-1, split)
    high = torch.maximum(low, high)  # where no weight is above
    return residual_levels((high + low) / 2, (high - low) / 2)


FITS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"affine": fit_affine, "int2": fit_int2, "residual": fit_residual})  # w, h -> levels


def as_residual(levels: Tensor) -> tuple[Tensor, Tensor]:
    """a and b `(..., 1)` of the levels `±a ± b` nearest to ascending `(..., 4)`; linear in the levels."""
    l0, l1, l2, l3 = (levels[..., c : c + 1] for c in range(4))
    return (l3 + l2 - l1 - l0) / 4, (l3 - l2 + l1 - l0) / 4


def as_affine(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Base and step `(..., 1)` of the equidistant levels nearest to `(..., 4)`; linear in the levels."""
    step = (0.3 * (levels[..., 3:] - levels[..., :1]) + 0.1 * (levels[..., 2:3] - levels[..., 1:2])).clamp_min(0)
    return levels.mean(-1, keepdim=True) - 1.5 * step, step


def to_family_grid(levels: Tensor, family: str) -> Tensor:
    """The levels `(..., 4)`, in units of the row scale, that a family stores for given ones: integers in -127..127."""
    if family == "free":
        return to_grid(levels)
    if family == "residual":
        a, b = (x.round() for x in as_residual(levels.clamp(-GRID, GRID)))
        return residual_levels(a, torch.minimum(b, torch.minimum(a, GRID - a)))
    base, step = as_affine(levels)
    if family == "affine":
        step = step.round().clamp(0, 2 * GRID // 3)
        base = base.round().clamp_min(-GRID)
        return affine_levels(torch.minimum(base, GRID - 3 * step), step)
    zero = (-base / step.clamp_min(TINY)).round().clamp(0, 3)
    step = torch.minimum(step, GRID / torch.maximum(zero, 3 - zero))
    return to_grid(affine_levels(-zero * step, step))


def projected(levels: Tensor, family: str) -> Tensor:
    """The ascending levels `(..., 4)` as a family has them, before any grid; linear in the levels, so that gradients pass."""
    if family == "free":
        return levels
    return residual_levels(*as_residual(levels)) if family == "residual" else affine_levels(*as_affine(levels))


def nearest_affine(levels: Tensor, mass: Tensor) -> Tensor:
    """Equidistant levels closest to given ones under the importance of each: levels, mass `(n, 4)` -> `(n, 4)`."""
    codes = torch.arange(4, device=levels.device, dtype=levels.dtype).expand_as(levels)
    return _least_squares(levels, mass, codes, levels)


def _least_squares(w: Tensor, h: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
    """Regress w on the codes under importances h; groups with a single code keep their levels."""
    total = h.sum(-1, keepdim=True).clamp_min(TINY)
    code_mean = (h * codes).sum(-1, keepdim=True) / total
    w_mean = (h * w).sum(-1, keepdim=True) / total
    spread = (h * (codes - code_mean).square()).sum(-1, keepdim=True)
    step = (h * (codes - code_mean) * (w - w_mean)).sum(-1, keepdim=True) / spread.clamp_min(TINY)
    fitted = affine_levels(w_mean - step * code_mean, step)
    return torch.where((spread > TINY * total) & (step > 0), fitted, levels)
