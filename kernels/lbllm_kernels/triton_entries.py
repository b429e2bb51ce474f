"""Each group's best entry of a table, by trying them all, in one kernel (GPUs; `lbllm_core/quant/level_fit.py` has the idea and the search of a CPU).

**Equation.** Of the quadruples `e` of a table a group takes the one of least weighted error,

    entry(g) = argmin_e  sum_i h_i min_c (w_i - e_c)^2

and the first of equals. That is a thousand operations a weight: too many for a CPU, which ranks by histograms and compares a shortlist,
and nothing for a GPU, where the sixty small kernels of that search cost more.

Shapes: w `(n, G)` and h `(n, G)` or `(G,)` float32; table `(k, 4)` float32; entries `(n,)` int64. A program keeps the weights of ROWS groups in
registers and walks through the table, whose entries every program reads in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 1024  # weights that a program keeps


@triton.jit  # type: ignore[untyped-decorator]
def _best_entries(w, h, table, out, n, entries, h_stride, columns, G: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, G)[None, :]
    inside = (row < n)[:, None] & (column < columns)
    value = tl.load(w + row[:, None] * columns + column, mask=inside, other=0.0)
    weight = tl.load(h + row[:, None] * h_stride + column, mask=inside, other=0.0)
    best = tl.full((ROWS,), float("inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.int32)
    for e in range(entries):
        a = value - tl.load(table + e * 4)
        b = value - tl.load(table + e * 4 + 1)
        c = value - tl.load(table + e * 4 + 2)
        d = value - tl.load(table + e * 4 + 3)
        nearest = tl.minimum(tl.minimum(a * a, b * b), tl.minimum(c * c, d * d))
        error = tl.sum(weight * nearest, axis=1)
        better = error < best
        best = tl.where(better, error, best)
        chosen = tl.where(better, e, chosen)
    tl.store(out + row, chosen.to(tl.int64), mask=row < n)


def best_entries(w: Tensor, h: Tensor, table: Tensor) -> Tensor:
    """The entry of each group: w `(n, G)`, h `(n, G)` or `(G,)`, table `(k, 4)`, float32 on one device -> `(n,)` int64."""
    n, columns = w.shape
    made = torch.empty(n, dtype=torch.int64, device=w.device)
    size = triton.next_power_of_2(columns)
    rows = max(1, VALUES // size)
    shared = h.dim() == 1
    _best_entries[(triton.cdiv(n, rows),)](w.contiguous(), h.contiguous(), table.contiguous(), made, n, len(table), 0 if shared else columns, columns, G=size, ROWS=rows, num_warps=4)
    return made
