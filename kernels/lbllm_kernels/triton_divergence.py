"""The divergence of two rows of logits and its gradient in one kernel (GPUs; `lbllm_core/stages/end_to_end.py` has the plain form).

**Problem.** A token's logits are as wide as the vocabulary: 49 152 for SmolLM2, two hundred times a step's other tensors. In plain operations
`KL(softmax(theirs) || softmax(mine))` and its gradient are some twenty passes over them in float32, a fifth of a step of a small model.

**Equation.** With `p = softmax(theirs)`, `q = softmax(mine)`, `m` and `s` a row's maximum and sum of exponentials:

    KL = sum p (log p - log q),      dKL/dmine = q - p

Two passes over a row: maxima and sums while the row streams by (the sums are rescaled when a maximum grows), then divergence and gradient,
which is written over `mine`. Everything between reading and writing is float32.

Shapes: mine, theirs `(rows, vocabulary)` of one float type, contiguous; divergences `(rows,)` float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _divergence_rows(mine, theirs, divergence, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    top_q = tl.full((), -3.0e38, tl.float32)
    top_p, sum_q, sum_p = top_q, tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        a = tl.load(mine + row + start + at, mask=inside, other=-3.0e38).to(tl.float32)
        b = tl.load(theirs + row + start + at, mask=inside, other=-3.0e38).to(tl.float32)
        new_q, new_p = tl.maximum(top_q, tl.max(a, 0)), tl.maximum(top_p, tl.max(b, 0))
        sum_q = sum_q * tl.exp(top_q - new_q) + tl.sum(tl.where(inside, tl.exp(a - new_q), 0.0), 0)
        sum_p = sum_p * tl.exp(top_p - new_p) + tl.sum(tl.where(inside, tl.exp(b - new_p), 0.0), 0)
        top_q, top_p = new_q, new_p
    log_q, log_p = top_q + tl.log(sum_q), top_p + tl.log(sum_p)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        a = tl.load(mine + row + start + at, mask=inside, other=0.0).to(tl.float32) - log_q
        b = tl.load(theirs + row + start + at, mask=inside, other=0.0).to(tl.float32) - log_p
        p = tl.where(inside, tl.exp(b), 0.0)
        total += tl.sum(p * (b - a), 0)
        tl.store(mine + row + start + at, (tl.exp(a) - p).to(mine.dtype.element_ty), mask=inside)
    tl.store(divergence + tl.program_id(0), total)


def divergence_rows(mine: Tensor, theirs: Tensor) -> Tensor:
    """Divergence of each row `(rows,)` float32; `mine` becomes the gradient of their sum. mine, theirs `(rows, vocabulary)`."""
    for name, x in (("mine", mine), ("theirs", theirs)):
        if not x.is_contiguous() or x.shape != mine.shape or x.dtype != mine.dtype:
            raise ValueError(f"`{name}` must be contiguous, and both must have one shape and type: {tuple(mine.shape)} {mine.dtype}, {tuple(theirs.shape)} {theirs.dtype}")
    made = torch.empty(mine.shape[0], device=mine.device)
    _divergence_rows[(mine.shape[0],)](mine, theirs, made, mine.shape[1], BLOCK=BLOCK, num_warps=8)
    return made
