"""Perplexity by named protocol.

    ppl = exp( - 1/N  sum_w sum_{t>=1} log p(x_{w,t} | x_{w,<t}) )

over windows `w` of equal length without overlap; the first token of a window is given, not predicted, so a window of `s`
tokens counts `s - 1`. The log-softmax is fp32 whatever the model computes in, and it is taken over a few hundred rows at a
time: with 49152 tokens in the vocabulary one window of 2048 is 400 MB of logits already, and a second copy is not needed.

The standard error treats windows as independent: stderr(ppl) = ppl * std(window means) / sqrt(n). It speaks of the text, not of
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbllm_core.config import RunConfig
from lbllm_core.data import protocols
from lbllm_core.engine.progress import Progress, Report, silent
from lbllm_core.errors import NumericalError
from lbllm_core.evaluation.last_states import Batch, Model, last_states, logits_of

ROWS = 256  # rows of logits whose log-softmax is alive at once


@dataclass(frozen=True)
class PerplexityResult:
    """`nll`: mean negative log-likelihood a token, in nats. `tokens`: tokens predicted. `stderr`: of `ppl`, over windows."""

    ppl: float
    nll: float
    tokens: int
    stderr: float


def windows(protocol: str, config: RunConfig, tokenizer: Any) -> Tensor:
    """The token windows `(n, s)` of a protocol for this model. Raises ConfigError, DataError."""
    return protocols.token_windows(protocols.resolve(protocol, config, tokenizer), config, tokenizer)


def metric_name(protocol: str, config: RunConfig, tokenizer: Any) -> str:
    """What the figure is called: the protocol's name with the window that the model's context allows."""
    return protocols.resolve(protocol, config, tokenizer).name


def in_batches(token_windows: Tensor, batch_tokens: int) -> Sequence[Tensor]:
    """The windows `(n, s)` of each call."""
    return torch.split(token_windows, max(1, batch_tokens // token_windows.shape[1]))


def forward_of(model: Model, token_windows: Tensor, batch_tokens: int, report: Report = silent, name: str = "perplexity") -> Callable[[Tensor], Tensor]:
    """`forward` of a model for `perplexity` of these very windows, which asks for one batch after the other: a streamed model is read once."""
    made = last_states(model, [Batch(ids) for ids in in_batches(token_windows, batch_tokens)], report, name)
    return lambda _: logits_of(model, next(made))


@torch.no_grad()
def perplexity(
    forward: Callable[[Tensor], Tensor], token_windows: Tensor, batch_tokens: int = 4096, report: Report = silent, device: str | torch.device = "cpu", name: str = "perplexity"
) -> PerplexityResult:
    """Perplexity of `forward`: ids `(b, s)` -> logits `(b, s, vocabulary)`, at most `batch_tokens` tokens a call (one window
    at least). Raises NumericalError when a window's likelihood is not finite."""
    count, length = token_windows.shape
    losses: list[float] = []
    report(Progress(name, 0, count, "window", begins=True))
    for batch in in_batches(token_windows, batch_tokens):
        start, ids = len(losses), batch.to(device)
        sums = window_losses(forward(ids), ids)
        if not torch.isfinite(sums).all():
            raise NumericalError(f"{name}: the likelihood of window {start + int((~torch.isfinite(sums)).nonzero()[0])} is not finite; look at the model's weights and scales")
        losses += (sums / (length - 1)).tolist()
        mean = sum(losses) / len(losses)
        report(Progress(name, len(losses), count, "window", {"ppl": _exp(mean)}))
    mean = math.fsum(losses) / count
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (count - 1)) if count > 1 else 0.0
    return PerplexityResult(_exp(mean), mean, count * (length - 1), _exp(mean) * spread / math.sqrt(count))


def window_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed negative log-likelihood of each window, fp64 `(b,)`, from logits `(b, s, vocabulary)` and ids `(b, s)`."""
    sums = []
    for window, targets in zip(logits, ids, strict=True):
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for part, wanted in zip(torch.split(window[:-1], ROWS), torch.split(targets[1:], ROWS), strict=True):
            part = part.float()
            picked = part.gather(1, wanted[:, None]).squeeze(1)
            total += (part.logsumexp(1) - picked).double().sum()
        sums.append(total)
    return torch.stack(sums)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
