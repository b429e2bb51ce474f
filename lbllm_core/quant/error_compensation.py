"""Quantize columns in order and let the columns that remain absorb each error (GPTQ's idea).

A linear layer should keep its *outputs*, not its weights: minimise `tr((W - W_q) H (W - W_q)^T)` with `H = X X^T` over
calibration inputs. Going through the input channels from left to right, the error of column j can be compensated exactly (to
second order) by the columns to its right; with `H^-1 = U^T U` (U upper triangular) the update is

    e = (w_j - q_j) / U_jj,      W[:, k] -= e * U_jk   for k > j             (GPTQ, arXiv 2210.17323; BWA eq. for binary)

Levels are chosen group by group, on the weights as compensated so far, when the sweep arrives at the group's first column;
inside a group each column takes its nearest level. What `choose` does (four free levels, an entry of a table, an affine
grid) is the caller's. Updates inside a block of columns are applied at once, those to the right of it in one product.

Shapes: W `(out, in)`, U `(in, in)`. Cost: `out * in^2` multiply-adds plus `in` small steps; rows of all linears that share
an input go together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lbllm_core.errors import NumericalError
from lbllm_core.quant.weight import nearest_codes, take_levels

BLOCK = 128  # columns between two updates of everything to the right
ChooseLevels = Callable[[Tensor, int, int], Tensor]  # (weights (out, g), first column, group) -> levels (out, 4) ascending


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse: `(H + damping * mean(diag H) I)^-1 = U^T U`, float32.

    hessian `(in, in)`. Channels that are always zero get a unit diagonal. Raises NumericalError when no damping up to
    1000 times the given one makes the matrix positive definite.
    """
    h = hessian.double()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean().clamp_min(1e-12)
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    for factor in (1.0, 10.0, 100.0, 1000.0):
        damped = h + eye * (damping * factor * mean) + torch.diag(dead.double() * mean)
        chol, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(chol), upper=True)
            if info.item() == 0 and bool(torch.isfinite(upper).all()):
                factor_of_inverse: Tensor = upper.float()
                return factor_of_inverse
    raise NumericalError("the Hessian of a linear layer is not positive definite even with 1000 times the damping; raise ptq_init.damping or ptq_init.sequences")


def quantize_columns(w: Tensor, upper: Tensor | None, group_size: int, choose: ChooseLevels) -> tuple[Tensor, Tensor]:
    """Codes of every weight, and the compensated weights they were chosen for.

    w `(out, in)` float32; upper from `inverse_factor`, or None for no compensation -> codes `(out, in)` uint8 and
    compensated weights `(out, in)` float32 (a weight's value at the moment its column was quantized).
    """
    w = w.clone()
    rows, columns = w.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=w.device)
    span = max(BLOCK // group_size, 1) * group_size
    for left in range(0, columns, span):
        right = min(left + span, columns)
        errors = torch.zeros(rows, right - left, device=w.device)
        for first in range(left, right, group_size):
            last = min(first + group_size, right)
            levels = choose(w[:, first:last], first, first // group_size)
            if upper is None:
                codes[:, first:last] = nearest_codes(w[:, first:last], levels)
                continue
            for j in range(first, last):
                column = w[:, j : j + 1]
                code = nearest_codes(column, levels)
                codes[:, j : j + 1] = code
                error = (column - take_levels(levels, code)) / upper[j, j]
                w[:, j + 1 : right] -= error * upper[j, j + 1 : right]
                errors[:, j - left : j - left + 1] = error
        if upper is not None and right < columns:
            w[:, right:] -= errors @ upper[left:right, right:]
    return codes, w
