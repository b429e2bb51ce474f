"""Quantize columns in order and let the columns that remain absorb each error (GPTQ's idea).

A linear layer should keep its *outputs*, not its weights: minimise `tr((W - W_q) H (W - W_q)^T)` with `H = X X^T` over
calibration inputs. Going through the input channels from left to right, the error of column j can be compensated exactly (to
second order) by the columns to its right; with `H^-1 = U^T U` (U upper triangular) the update is

    e = (w_j - q_j) / U_jj,      W[:, k] -= e * U_jk   for k > j             (GPTQ, arXiv 2210.17323; BWA eq. for binary)

Levels are chosen group by group, on the weights as compensated so far, when the sweep arrives at the group's first column;
inside a group each column takes its nearest level. What `choose` does (four free levels, an entry of a table, an affine
grid) is the caller's. Updates inside a block of columns are applied at once, those to the right of it in one product.

"Left to right" need not be the order of storage. The column that comes first is rounded with nothing to make good for, the last one
bears what all others left over; so the heaviest channels go first. A group keeps its columns (its levels are chosen at once, on
all of them), only the order of groups, and of columns inside a group, follows the importance: the stored format is the same.

Shapes: W `(out, in)`, U `(in, in)`. Cost: `out * in^2` multiply-adds plus `in` small steps; rows of all linears that share
an input go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lbllm_core.errors import NumericalError
from lbllm_core.fused import compensation
from lbllm_core.quant.weight import nearest_codes, take_levels

BLOCK = 128  # columns, at least, between two updates of everything to the right
Order = Sequence[tuple[int, Tensor]]  # (group, its columns): groups in the order of the sweep, columns too
ChooseLevels = Callable[[Tensor, Tensor, int], Tensor]  # (weights (out, g), their columns (g,), group) -> levels (out, 4) ascending


def sweep_order(importance: Tensor, group_size: int, heaviest_first: bool) -> Order:
    """Groups and their columns as the sweep visits them: as stored, or by falling importance `(in,)` (groups by their mean)."""
    groups = torch.arange(importance.numel(), device=importance.device).split(group_size)  # type: ignore[no-untyped-call]
    if not heaviest_first:
        return list(enumerate(groups))
    means = torch.stack([importance[columns].mean() for columns in groups])
    within = [columns[importance[columns].argsort(descending=True, stable=True)] for columns in groups]
    return [(group, within[group]) for group in means.argsort(descending=True, stable=True).tolist()]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse: `(H + damping * mean(diag H) I)^-1 = U^T U`, float32.

    hessian `(in, in)`. Channels that are always zero get a unit diagonal. Raises NumericalError when no damping up to
    1000 times the given one makes the matrix positive definite.
    """
    diagonal = hessian.diagonal().double()
    dead = diagonal <= 0
    mean = diagonal.mean().clamp_min(1e-12)
    for factor in (1.0, 10.0, 100.0, 1000.0):
        damped = hessian.to(torch.float64, copy=True)  # 11008 channels are a gigabyte: never more than two of these at once
        damped.diagonal().add_(damping * factor * mean).add_(dead.double() * mean)
        chol, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info.item() == 0:
            inverse = torch.cholesky_inverse(chol)
            del chol
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if info.item() == 0 and bool(torch.isfinite(upper).all()):
                factor_of_inverse: Tensor = upper.float().contiguous()
                return factor_of_inverse
    raise NumericalError("the Hessian of a linear layer is not positive definite even with 1000 times the damping; raise ptq_init.damping or ptq_init.sequences")


def quantize_columns(w: Tensor, hessian: Tensor | None, damping: float, order: Order, choose: ChooseLevels) -> tuple[Tensor, Tensor]:
    """Codes of every weight, and the compensated weights they were chosen for.

    w `(out, in)` float32; hessian `(in, in)`, or None for no compensation; order from `sweep_order` -> codes `(out, in)` uint8 and
    compensated weights `(out, in)` float32 (a weight's value at the moment its column was quantized), both as stored. Columns behind those
    of the order are not quantized (code 0): they take up the errors of all others.
    """
    visit = torch.cat([columns for _, columns in order])
    visit = torch.cat([visit, torch.arange(len(visit), w.shape[1], device=visit.device)])
    upper = None if hessian is None else inverse_factor(hessian[visit][:, visit], damping)
    swept = w[:, visit]
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    left = 0
    for batch in _batches(order):
        right = left + sum(len(columns) for _, columns in batch)
        errors = torch.zeros(len(w), right - left, device=w.device)
        first = left
        for group, columns in batch:
            last = first + len(columns)
            stored = columns.argsort()  # levels are chosen on the group as it is stored, whatever the order of the sweep
            levels = choose(swept[:, first + stored], columns[stored], group)
            if upper is None:
                codes[:, first:last] = nearest_codes(swept[:, first:last], levels)
            else:
                _sweep_group(swept, codes, errors, upper, levels, range(first, last), left, right)
            first = last
        if upper is not None and right < swept.shape[1]:
            swept[:, right:] -= errors @ upper[left:right, right:]
        left = right
    back = visit.argsort()
    return codes[:, back], swept[:, back]


def _batches(order: Order) -> Iterator[Order]:
    """Runs of groups with at least BLOCK columns together."""
    batch: list[tuple[int, Tensor]] = []
    for item in order:
        batch.append(item)
        if sum(len(columns) for _, columns in batch) >= BLOCK:
            yield batch
            batch = []
    if batch:
        yield batch


def _sweep_group(w: Tensor, codes: Tensor, errors: Tensor, upper: Tensor, levels: Tensor, columns: range, left: int, right: int) -> None:
    """Quantize the columns of one group and let the rest of the block, up to `right`, absorb their errors; all in place."""
    fused = compensation() if w.is_cuda else None
    if fused is not None:
        fused.sweep_group(w, codes, errors, upper, levels, columns, left, right)
        return
    for j in columns:
        column = w[:, j : j + 1]
        code = nearest_codes(column, levels)
        codes[:, j : j + 1] = code
        error = (column - take_levels(levels, code)) / upper[j, j]
        w[:, j + 1 : right] -= error * upper[j, j + 1 : right]
        errors[:, j - left : j - left + 1] = error
