"""How far the student's next-token distribution is from the teacher's: stage 4's loss.

    L = KL(softmax(teacher logits) || softmax(student logits)),   mean over tokens

Logits are as wide as the vocabulary, so they never exist for a whole batch: a piece of the tokens at a time, made again in the backward
pass. On a GPU the gradient is made together with the loss (it is `q - p`, whatever comes after is a factor), so nothing is made twice and
two matrix products and one kernel are all there is (`lbllm_kernels/triton_divergence.py`).

Shapes: last hidden states `(batch, tokens, hidden)` float32, before the final norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lbllm_core import fused
from lbllm_core.engine.hardware import Hardware
from lbllm_core.model.blocks import Decoder

LOGIT_ROWS = 1024  # tokens whose logits exist at once
FUSED_ROWS = 4096  # the same where they exist in 16 bits and once each


def divergence(decoder: Decoder, hardware: Hardware, student: Tensor, teacher: Tensor, share: float, head: Tensor | None) -> Tensor:
    """Mean KL `()` over a `share` of the tokens (`positions`). `head`: what `fused_head` returned."""
    s, t = student.flatten(0, 1), teacher.flatten(0, 1)
    if share < 1:
        chosen = positions(len(s), share, s.device)
        s, t = s.index_select(0, chosen), t.index_select(0, chosen)
    if head is not None:
        mine, theirs = (decoder.base.norm(x).to(head.dtype) for x in (s, t))
        return _Divergence.apply(mine, theirs, head)  # type: ignore[no-any-return, no-untyped-call]

    def piece(s: Tensor, t: Tensor) -> Tensor:
        with hardware.autocast():
            mine, theirs = decoder.logits(s), decoder.logits(t)
        target = theirs.float().log_softmax(-1)
        return nn.functional.kl_div(mine.float().log_softmax(-1), target, log_target=True, reduction="sum")

    parts = [checkpoint(piece, s[i : i + LOGIT_ROWS], t[i : i + LOGIT_ROWS], use_reentrant=False, preserve_rng_state=False) for i in range(0, len(s), LOGIT_ROWS)]
    return torch.stack(parts).sum() / len(s)


def positions(count: int, share: float, device: torch.device | str = "cpu") -> Tensor:
    """The places of `share * count` of `count` tokens, rounded up to whole ones: ascending `(n,)` int64, the first one among them, gaps that differ by one at most."""
    n = max(1, math.ceil(share * count - 1e-6))  # a product that is whole but for float noise is whole
    return torch.arange(n, device=device) * count // n


def fused_head(decoder: Decoder, hardware: Hardware) -> Tensor | None:
    """The weight of a plain head in the compute type where one kernel makes divergence and gradient, else None."""
    if hardware.device.type != "cuda" or hardware.compute_dtype != torch.bfloat16 or decoder.head.bias is not None or fused.divergence() is None:
        return None
    return decoder.head.weight.detach().to(hardware.compute_dtype)


class _Divergence(torch.autograd.Function):
    """Mean KL `()` and its gradient at once: normed states mine, theirs `(n, hidden)`, head `(vocabulary, hidden)`, one type."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, theirs: Tensor, head: Tensor) -> Tensor:
        total, to_mine = torch.zeros((), device=mine.device), torch.empty_like(mine)
        for at in range(0, len(mine), FUSED_ROWS):
            rows = slice(at, at + FUSED_ROWS)
            logits, wanted = mine[rows] @ head.T, theirs[rows] @ head.T
            total += fused.divergence().divergence_rows(logits, wanted).sum()
            to_mine[rows] = logits @ head  # logits are their own gradient now
        ctx.save_for_backward(to_mine)
        return total / len(mine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (to_mine,) = ctx.saved_tensors
        return to_mine * (grad / len(to_mine)).to(to_mine.dtype), None, None
