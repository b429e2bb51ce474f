"""Log-likelihoods of answer choices, with as little computing as they need.

A choice `y` after a context `c` is scored by `sum_t log p(y_t | c, y_<t)`. Done naively that is one pass over `c, y` for each
choice and a distribution over the vocabulary for each of their tokens. Here:
- choices of one question share its tokens: a row is `c, y1, y2, ...`, each choice with the positions it would have had
  alone and a mask that hides the others (PIQA 18 %, four-choice tasks about half of the tokens saved);
- rows are sorted by length and batched by a token budget, not by a fixed count;
- the head and the log-softmax run on the positions of the continuations alone: with 49152 tokens in the vocabulary that is a
  fraction of the work and of the memory.

A streamed model is read once for all the pairs of a call (`last_states.py`). The mask is passed as `(rows, 1, tokens, tokens)` booleans, which transformers hands to scaled-dot-product attention as it is.
A test holds the scores against those of lm-eval's own HFLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbllm_core.engine.progress import Report, silent
from lbllm_core.errors import NumericalError
from lbllm_core.evaluation.last_states import Batch, Model, last_states, logits_of

HEAD_ROWS = {"cpu": 256, "cuda": 4096}  # positions whose logits are alive at once: what fits a cache; 0.8 GB at 49152 tokens in the vocabulary


@dataclass(frozen=True)
class _Row:
    """One input: a context and the continuations that branch off it; `members` are their places among the answers."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    members: Sequence[int]

    def __len__(self) -> int:
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)


@torch.no_grad()
def score(
    model: Model, pairs: Sequence[tuple[list[int], list[int]]], max_length: int, batch_tokens: int = 2048, done: Any = lambda done, total: None,
    report: Report = silent, name: str = "choices",
) -> list[tuple[float, bool]]:
    """For each (context ids, continuation ids): the continuation's log-likelihood, and whether it is the greedy one.

    What is too long for `max_length` loses its first tokens, the context's first. `done(answered, of)` is told after each batch, `report` (as `name`)
    after each block of a streamed model. Raises NumericalError when a likelihood is not finite.
    """
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    finished = 0
    batches = list(_batches(sorted(_rows(pairs, max_length, batch_tokens), key=len, reverse=True), batch_tokens))
    for batch, states in zip(batches, last_states(model, [_layout(batch) for batch in batches], report, name), strict=True):
        for index, answer in _answers(model, batch, states):
            if not math.isfinite(answer[0]):
                raise NumericalError(f"the likelihood of choice {index} is not finite; look at the model's weights and scales")
            answers[index] = answer
            finished += 1
        done(finished, len(pairs))
    return answers


def _rows(pairs: Sequence[tuple[list[int], list[int]]], max_length: int, batch_tokens: int) -> list[_Row]:
    """Choices with one context in one row, as long as all of it fits; the others alone, cut on the left."""
    together: dict[tuple[int, ...], list[int]] = {}
    rows: list[_Row] = []
    for index, (context, _) in enumerate(pairs):
        together.setdefault(tuple(context), []).append(index)
    for prefix, members in together.items():
        shared = _Row(prefix, [pairs[i][1] for i in members], members)
        if len(prefix) + max(len(c) for c in shared.continuations) - 1 <= max_length and len(shared) <= batch_tokens:
            rows.append(shared)
            continue
        for index in members:
            kept = (list(prefix) + pairs[index][1])[-(max_length + 1) :]
            width = min(len(pairs[index][1]), len(kept) - 1)
            rows.append(_Row(kept[:-width], [kept[-width:]], [index]))
    return rows


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[Sequence[_Row]]:
    """Runs of rows, longest first, whose padded size stays within the budget; at least one row each."""
    start = 0
    while start < len(rows):
        stop = start + max(1, batch_tokens // len(rows[start]))
        yield rows[start:stop]
        start = stop


def _answers(model: Model, batch: Sequence[_Row], states: Tensor) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(place, (log-likelihood, greedy)) of every continuation in the batch, from its last states."""
    rows, places, wanted, owners = [], [], [], []
    for r, row in enumerate(batch):
        start = len(row.context)
        for index, continuation in zip(row.members, row.continuations, strict=True):
            places += [len(row.context) - 1, *range(start, start + len(continuation) - 1)]
            start += len(continuation) - 1
            rows += [r] * len(continuation)
            wanted += list(continuation)
            owners.append((index, len(continuation)))
    values, greedy = _token_scores(model, states[rows, places], torch.tensor(wanted, device=states.device))
    done = 0
    for index, width in owners:
        yield index, (float(values[done : done + width].double().sum()), bool(greedy[done : done + width].all()))
        done += width


def _token_scores(model: Model, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each wanted token `(n,)` and whether it is the likeliest, from hidden states `(n, hidden)`, HEAD_ROWS at a time. On the host."""
    rows = HEAD_ROWS[hidden.device.type]
    values, greedy = [], []
    for part, tokens in zip(torch.split(hidden, rows), torch.split(wanted, rows), strict=True):
        logits = logits_of(model, part).float()
        values.append(logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1))
        greedy.append(logits.argmax(1) == tokens)
    return torch.cat(values).cpu(), torch.cat(greedy).cpu()


def _layout(batch: Sequence[_Row]) -> Batch:
    """The batch as tensors: branch 0 is the context, 1, 2, ... its continuations, -1 padding on the right."""
    width = max(map(len, batch))
    ids, positions = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    branch = torch.full((len(batch), width), -1)
    for r, row in enumerate(batch):
        shared, start = len(row.context), len(row.context)
        ids[r, :shared], positions[r, :shared], branch[r, :shared] = torch.tensor(row.context), torch.arange(shared), 0
        for number, continuation in enumerate(row.continuations, 1):
            stop = start + len(continuation) - 1
            ids[r, start:stop] = torch.tensor(continuation[:-1], dtype=torch.long)
            positions[r, start:stop], branch[r, start:stop] = torch.arange(shared, shared + stop - start), number
            start = stop
    return Batch(ids, positions, branch) if any(len(row.continuations) > 1 for row in batch) else Batch(ids)
