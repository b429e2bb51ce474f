"""Affine levels: what a plain 2-bit integer grid can express (the INT2 controls).

`level[c] = base + c * step`: two parameters a group where W(1+1) has four. It runs in the same container (codes and four
levels), so every difference in a comparison comes from the levels alone; it is billed in its own format (`bits.py`).

- `round_to_nearest`: the floor of every comparison. Grid from the smallest to the largest weight of the group.
- `fit_affine`: base and step by alternating least squares under importances, from several clipped ranges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm_core.quant.weight import TINY, nearest_codes, weighted_error


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
