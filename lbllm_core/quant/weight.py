"""W(1+1): a weight is one bit and one bitmap bit; a group of weights has four levels.

The idea of the whole project in one page. A linear layer has a weight `W (out, in)`. A *group* is `G` consecutive input
channels of one output row. Every weight carries a binary bit `b` and a bitmap bit `s`, and every group two pairs
(scale, offset), one for each value of the bitmap:

    W_q = s * (alpha0 * b + mu0) + (1 - s) * (alpha1 * b + mu1)                    (arXiv 2604.19167, eq. 3)

Two bits select one of *four free levels*: with the code `c = 2 s + b`,

    W_q = row_scale * level[c]                                                     four levels a group, any four numbers

so quantizing means: find good levels for each group (`level_fit.py`), and give each weight the code of its nearest one.
Levels need not be equidistant, which is what separates W(1+1) from a 2-bit integer grid.

Two ways to store the four levels of a group, both held by `QuantizedWeight`:

- *explicit*: four int8 numbers for each (row, group), times one fp32 scale for each row. 32 bits a group.
- *codebook*: one byte for each (row, group) picks a quadruple out of a table of at most 256. 8 bits a group, so groups can
  be four times smaller at the same cost, and small groups are what fits real weights best.

The predecessor keeps a few *outlier channels* of the input apart, in INT8 with a scale a row (`OutlierColumns`); where a weight has them, its
columns are in their order, outliers last, and codes and levels under those count for nothing.

Levels are kept in units of the row scale, ascending; `snap` rounds them to the int8 grid -127..127 that the packed format
stores. Ascending order makes the code of a weight the number of *midpoints* below it, three comparisons and no search.
Shapes: codes `(out, in)`, levels `(out, n_groups, 4)`, with `n_groups = ceil(in / G)`; a short last group is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

GRID = 127  # levels live on the int8 grid -127..127; -128 is never used, so that negation is exact
TINY = 1e-12  # an importance below this counts as none


@dataclass(frozen=True)
class OutlierColumns:
    """Input channels kept in INT8: column j of the weight is channel `perm[j]`, and the last n columns are `scale * weight`."""

    perm: Tensor  # (in,) int32
    weight: Tensor  # (out, n) int8, -127..127
    scale: Tensor  # (out,) float32

    @property
    def channels(self) -> Tensor:
        """The outlier channels, `(n,)`."""
        return self.perm[len(self.perm) - self.weight.shape[1] :]

    def rows(self, rows: slice) -> OutlierColumns:
        """The same channels for some output rows."""
        return OutlierColumns(self.perm, self.weight[rows].contiguous(), self.scale[rows].clone())

    def placed(self, columns: Tensor) -> Tensor:
        """`(out, in)` in the weight's column order -> in the order of the channels, with the INT8 columns in place."""
        kept = columns[:, : columns.shape[1] - self.weight.shape[1]]
        return torch.cat([kept, (self.weight * self.scale[:, None]).to(columns.dtype)], dim=1)[:, self.perm.long().argsort()]


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight in W(1+1); exactly one of `levels` and (`group_codes`, `codebook`) is present."""

    codes: Tensor  # (out, in) uint8, 0..3
    row_scale: Tensor  # (out,) float32
    group_size: int
    levels: Tensor | None = None  # (out, n_groups, 4) float32, ascending, in units of row_scale
    group_codes: Tensor | None = None  # (out, n_groups) uint8
    codebook: Tensor | None = None  # (entries, 4) float32, each ascending, in units of row_scale
    outliers: OutlierColumns | None = None

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same value on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if self.outliers is not None:
            moved["outliers"] = OutlierColumns(*(v.to(device) for v in vars(self.outliers).values()))
        return replace(self, **moved)


def n_groups(in_features: int, group_size: int) -> int:
    """Groups in a row, the last one possibly short."""
    return -(-in_features // group_size)


def split_groups(w: Tensor, group_size: int) -> Tensor:
    """`(out, in)` -> `(out, n_groups, group_size)`; a short last group is padded by repeating its last weight."""
    short = -w.shape[1] % group_size
    if short:
        w = torch.cat([w, w[:, -1:].expand(-1, short)], dim=1)
    return w.reshape(w.shape[0], -1, group_size)


def join_groups(grouped: Tensor, in_features: int) -> Tensor:
    """Inverse of `split_groups`: drops the padding."""
    return grouped.reshape(grouped.shape[0], -1)[:, :in_features]


def midpoints(levels: Tensor) -> Tensor:
    """`(..., 4)` ascending levels -> `(..., 3)`: a weight above k midpoints belongs to level k."""
    return (levels[..., :-1] + levels[..., 1:]) * 0.5


def nearest_codes(w: Tensor, levels: Tensor) -> Tensor:
    """Code of the nearest level. w `(..., G)`, levels `(..., 4)` ascending -> `(..., G)` uint8."""
    mid = midpoints(levels)
    above = (w > mid[..., 0:1]).to(torch.uint8)
    above += w > mid[..., 1:2]
    above += w > mid[..., 2:3]
    return above


def into_cells(w: Tensor, levels: Tensor, codes: Tensor) -> Tensor:
    """Weights that disagree with their code move onto its level; the others stay. w, codes `(..., G)`, levels `(..., 4)` -> `(..., G)`."""
    return torch.where(nearest_codes(w, levels) == codes, w, take_levels(levels, codes))


def take_levels(levels: Tensor, codes: Tensor) -> Tensor:
    """levels `(..., 4)`, codes `(..., G)` -> `(..., G)`. Selection, not arithmetic: the levels come out bit-equal."""
    low = torch.where(codes == 0, levels[..., 0:1], levels[..., 1:2])
    high = torch.where(codes == 2, levels[..., 2:3], levels[..., 3:4])
    return torch.where(codes < 2, low, high)


def weighted_error(w: Tensor, h: Tensor, levels: Tensor) -> Tensor:
    """`sum_i h_i (w_i - nearest level)^2` for each group: w, h `(..., G)`, levels `(..., 4)` -> `(...)`."""
    return (h * (w - take_levels(levels, nearest_codes(w, levels))).square()).sum(-1)


def group_levels(q: QuantizedWeight) -> Tensor:
    """Four levels of each group in units of the row scale, `(out, n_groups, 4)`, whichever way they are stored."""
    if q.levels is not None:
        return q.levels
    assert q.codebook is not None
    assert q.group_codes is not None
    return q.codebook[q.group_codes.long()]


def dequantize(q: QuantizedWeight) -> Tensor:
    """The weight that the codes stand for: `(out, in)` float32, eq. 3."""
    grouped = take_levels(group_levels(q), split_groups(q.codes, q.group_size))
    columns = join_groups(grouped, q.codes.shape[1]) * q.row_scale[:, None]
    return columns if q.outliers is None else q.outliers.placed(columns)


def to_outliers(columns: Tensor, perm: Tensor) -> OutlierColumns:
    """Round the last columns `(out, n)` of a weight to INT8, a scale a row. perm `(in,)`."""
    largest = columns.abs().amax(1)
    scale = torch.where(largest > 0, largest / GRID, torch.ones_like(largest))
    return OutlierColumns(perm.int(), (columns / scale[:, None]).round().clamp(-GRID, GRID).to(torch.int8), scale)


def snap(q: QuantizedWeight) -> QuantizedWeight:
    """Round the levels to the int8 grid of the packed format. Idempotent; codes and row scales stay."""
    if q.levels is not None:
        return replace(q, levels=to_grid(q.levels))
    assert q.codebook is not None
    return replace(q, codebook=to_grid(q.codebook))


def to_grid(levels: Tensor) -> Tensor:
    """Nearest integers in -127..127, half to even."""
    return levels.round().clamp(-GRID, GRID)


def from_real_levels(codes: Tensor, levels: Tensor, group_size: int) -> QuantizedWeight:
    """Explicit mode from real-valued levels `(out, n_groups, 4)`: the row scale makes the largest of a row 127."""
    largest = levels.abs().amax(dim=(1, 2))
    row_scale = torch.where(largest > 0, largest / GRID, torch.ones_like(largest))
    return QuantizedWeight(codes=codes, row_scale=row_scale, group_size=group_size, levels=levels / row_scale[:, None, None])
