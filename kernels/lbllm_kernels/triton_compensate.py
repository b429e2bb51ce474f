"""One group of error compensation in one kernel (GPUs; `lbllm_core/quant/error_compensation.py` has the idea and the plain form).

**Problem.** Column by column, each rounding error is pushed into the columns that follow. Written with tensor operations that is some
twenty small kernels a column, two and a half million for a model of thirty small blocks: launching them takes longer than all the rest.

**Equation.** For the columns j of a group in order, all rows at once, `right` the end of the block of columns:

    e = (w_j - level[code(w_j)]) / U_jj,      w_k -= e * U_jk   for j < k < right

A row depends on no other row, so a program keeps some rows of the block in registers and walks through the group.

Shapes: w `(rows, in)` float32, changed in place; codes `(rows, in)` uint8; errors `(rows, right - left)` float32; U `(in, in)`; levels
`(rows, 4)` ascending. **Floats** are those of the plain form, operation by operation (no fused multiply-add).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # rows a program keeps: 8 x 256 floats at most in registers


@triton.jit  # type: ignore[untyped-decorator]
def _group_kernel(  # type: ignore[no-untyped-def]
    w, codes, errors, upper, levels, rows, columns, first, last, left, right, error_stride, ROWS: tl.constexpr, SPAN: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = tl.arange(0, SPAN)
    column = first + here
    inside = (row < rows)[:, None] & (column < right)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tile = tl.load(w + at, mask=inside, other=0.0)
    level0 = tl.load(levels + row * 4, mask=row < rows, other=0.0)
    level1 = tl.load(levels + row * 4 + 1, mask=row < rows, other=0.0)
    level2 = tl.load(levels + row * 4 + 2, mask=row < rows, other=0.0)
    level3 = tl.load(levels + row * 4 + 3, mask=row < rows, other=0.0)
    mid0, mid1, mid2 = (level0 + level1) * 0.5, (level1 + level2) * 0.5, (level2 + level3) * 0.5
    for j in range(last - first):
        value = tl.sum(tl.where((here == j)[None, :], tile, 0.0), axis=1)
        code = (value > mid0).to(tl.int32) + (value > mid1).to(tl.int32) + (value > mid2).to(tl.int32)
        level = tl.where(code < 2, tl.where(code == 0, level0, level1), tl.where(code == 2, level2, level3))
        pivot = tl.load(upper + (first + j).to(tl.int64) * (columns + 1))
        error = tl.div_rn(value - level, pivot + tl.zeros_like(value))
        weights = tl.load(upper + (first + j).to(tl.int64) * columns + column, mask=(here > j) & (column < right), other=0.0)
        tile = tl.where((here > j)[None, :], tile - error[:, None] * weights[None, :], tile)
        tl.store(codes + row.to(tl.int64) * columns + first + j, code.to(tl.uint8), mask=row < rows)
        tl.store(errors + row.to(tl.int64) * error_stride + (first - left) + j, error, mask=row < rows)
    tl.store(w + at, tile, mask=inside)


def sweep_group(w: Tensor, codes: Tensor, errors: Tensor, upper: Tensor, levels: Tensor, columns: range, left: int, right: int) -> None:
    """Quantize the columns of one group and let the rest of the block, up to `right`, absorb their errors; all in place.

    All tensors contiguous, on one GPU; `columns` are consecutive.
    """
    for name, x in (("w", w), ("codes", codes), ("errors", errors), ("upper", upper)):
        if not x.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous")
    settings: dict[str, Any] = {"ROWS": ROWS, "SPAN": triton.next_power_of_2(right - columns.start), "num_warps": 4, "enable_fp_fusion": False}
    grid = (triton.cdiv(w.shape[0], ROWS),)
    sizes = (w.shape[0], w.shape[1], columns.start, columns.stop, left, right, errors.stride(0))
    _group_kernel[grid](w, codes, errors, upper, levels.contiguous(), *sizes, **settings)
