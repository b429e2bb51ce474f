"""Hidden states after the last block, of a model that is in memory or of one whose blocks come from disk.

Perplexity and choice scores both want them for many batches. A model in memory takes a batch through all blocks and forgets it. A streamed
one must not read its blocks anew for every batch, so the loops change places:

    for each batch: for each block          a model in memory: one batch's states at a time
    for each block: for each batch          a streamed model: one block at a time, states of all batches in a store (`engine/hidden_states.py`),
                                            at most WAVE_TOKENS tokens of them; then the blocks are read again for the rest

Batches are the same ones, and so is every operation on them: the figures are equal to the bit on a CPU. The store always keeps float32,
whatever `hardware.hidden_dtype` says of training; a row of it is one token, so that batches of any shape lie behind each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.config import RunConfig
from lbllm_core.engine.hardware import Hardware, resolve
from lbllm_core.engine.hidden_states import At, HiddenStates, StorePlan
from lbllm_core.engine.progress import Progress, Report, silent
from lbllm_core.engine.tiers import open_teacher, store_plan
from lbllm_core.model.blocks import Decoder

WAVE_TOKENS = 1 << 20  # 34 GB of states at 8192 channels


@dataclass(frozen=True)
class Batch:
    """Token ids `(rows, tokens)`; where rows branch, also positions and branches, both of that shape (`choice_scores.py`)."""

    ids: Tensor
    positions: Tensor | None = None
    branch: Tensor | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Ids, positions and who sees whom (booleans `(rows, 1, tokens, tokens)`), on a device."""
        if self.positions is None or self.branch is None:
            return self.ids.to(device), None, None
        return self.ids.to(device), self.positions.to(device), visible(self.branch.to(device))[:, None]


@dataclass(frozen=True)
class Streamed:
    """A decoder whose blocks come from disk; `plan` says where a stream of states of some shape may lie."""

    decoder: Decoder
    device: torch.device
    plan: Callable[[Sequence[int]], StorePlan] = lambda _: StorePlan()


Model = nn.Module | Streamed  # a module: a transformers causal language model, packed or not


def visible(branch: Tensor) -> Tensor:
    """Who sees whom, booleans `(rows, tokens, tokens)`: what stands before in one's own branch or in the context."""
    width = branch.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=branch.device).tril()
    related = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    return before & related


def device_of(model: Model) -> torch.device:
    """Where a model computes."""
    return model.device if isinstance(model, Streamed) else next(p for p in model.parameters() if p.is_floating_point()).device


@torch.no_grad()
def last_states(model: Model, batches: Sequence[Batch], report: Report = silent, name: str = "") -> Iterator[Tensor]:
    """What `logits_of` takes, `(rows, tokens, hidden)`, batch by batch. Blocks of a streamed model are reported under `name`."""
    if isinstance(model, Streamed):
        for wave in _waves(batches):
            yield from _block_by_block(model, wave, report, name)
        return
    base: Any = model.base_model
    for batch in batches:
        ids, positions, mask = batch.on(device_of(model))
        branching = {} if mask is None else {"position_ids": positions, "attention_mask": mask}
        yield base(input_ids=ids, use_cache=False, **branching).last_hidden_state


@torch.no_grad()
def logits_of(model: Model, states: Tensor) -> Tensor:
    """Logits `(..., vocabulary)` from last states `(..., hidden)`: all of a batch, or some of its tokens."""
    if isinstance(model, Streamed):
        return model.decoder.logits(states)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    made: Tensor = head(states)
    return made


def _waves(batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
    """Runs of batches with at most WAVE_TOKENS tokens, one batch at least."""
    wave: list[Batch] = []
    tokens = 0
    for batch in batches:
        if wave and tokens + batch.ids.numel() > WAVE_TOKENS:
            yield wave
            wave, tokens = [], 0
        wave.append(batch)
        tokens += batch.ids.numel()
    if wave:
        yield wave


def _block_by_block(model: Streamed, batches: Sequence[Batch], report: Report, name: str) -> Iterator[Tensor]:
    decoder, total = model.decoder, sum(batch.ids.numel() for batch in batches)
    places: list[At] = []
    for batch in batches:
        start = places[-1].stop if places else 0  # type: ignore[union-attr]
        places.append(slice(start, start + batch.ids.numel()))
    shape = (total, 1, decoder.width)
    with contextlib.closing(HiddenStates(shape, model.device, model.plan(shape))) as stream:
        stream.fill(decoder.embed(batch.ids.to(model.device)).float().flatten(0, 1)[:, None] for batch in batches)
        decoder.embedded()
        for index in range(len(decoder.blocks)):
            block = decoder.blocks[index]
            with stream.rewriting() as put:
                for batch, states in zip(batches, stream.batches(places), strict=True):
                    _, positions, mask = batch.on(model.device)
                    hidden = states.view(*batch.ids.shape, -1)
                    around = decoder.surroundings(hidden, positions, mask)
                    put(decoder.run_block(block, hidden, around, index).flatten(0, 1)[:, None])
            del block
            report(Progress(f"{name}, blocks", index + 1, len(decoder.blocks)))
        for batch, states in zip(batches, stream.batches(places), strict=True):
            yield states.view(*batch.ids.shape, -1)


def teacher_of(config: RunConfig, home: Path) -> tuple[Model, Any]:
    """The teacher of a configuration, in memory or streamed, and its tokenizer. Raises ModelError."""
    hardware = resolve(config.hardware)
    decoder, tokenizer = open_teacher(config, home, hardware)
    return (streamed(decoder, config, home, hardware) if decoder.streamed else decoder.model), tokenizer


def streamed(decoder: Decoder, config: RunConfig, home: Path, hardware: Hardware) -> Streamed:
    """A streamed decoder with room for its states where this configuration and machine have it."""
    exact = replace(config, hardware=replace(config.hardware, hidden_dtype="fp32"))
    return Streamed(decoder, hardware.device, lambda size: store_plan(exact, hardware, home, size, True))
