"""Where the activations of a site lie within their token's range: the picture behind clips and knees.

Each token is quantized over its own range, from its smallest value (at most 0) to its largest (at least 0), so activations are
comparable only as shares of it: with `hi = max(max x, 0)` and `lo = min(min x, 0)` of the token,

    u = x / hi  for x > 0,      u = x / |lo|  for x < 0,      in -1..1

In this coordinate the learned numbers of a site are constants: codes end at `clip_max` and at `-clip_min`, and the dense core
of `piecewise` reaches from `-knee_low * clip_min` to `knee_high * clip_max` (`lbllm_core/quant/activation.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 80  # over -1..1


@torch.no_grad()
def shares_of_range(x: Tensor) -> Tensor:
    """x `(tokens, channels)` -> `u`, the same shape, float32; 0 where the token has nothing on that side."""
    x = x.float()
    high, low = x.amax(-1, keepdim=True).clamp_min(0), x.amin(-1, keepdim=True).clamp_max(0)
    return torch.where(x > 0, x / high.clamp_min(1e-30), x / low.neg().clamp_min(1e-30))


def histogram(x: Tensor) -> list[int]:
    """How many values of `x (tokens, channels)` fall into each of BINS equal parts of -1..1; u = 1 belongs to the last."""
    at = ((shares_of_range(x) + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    counts: list[int] = torch.bincount(at.flatten(), minlength=BINS).tolist()
    return counts
