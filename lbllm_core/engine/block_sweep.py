"""The one shallow-to-deep loop that stages 1, 2 and 3 share.

Two streams of hidden states run through the model side by side, block by block: the *teacher's*, through its own blocks, and
the *student's*, through blocks that are already quantized. At block i a stage is handed the student's input and the teacher's
output and returns the block's new state; the student's stream then advances through it. One block is worked on at a time,
so memory is bounded by a block and two streams, and these may lie on the host or on disk (`hidden_states.py`). A decoder whose blocks
are read from disk one at a time (`model/streamed.py`) bounds the teacher too: neither model is ever whole anywhere.

**Memory of a GPU**, stage 2, in bytes a weight of the block (W weights; LLaMA-2-7B's has 202 M, and 16 bytes a weight are 3.2 GB); a
phase ends with the allocator's cache given back, since the next one has tensors of other sizes:

    teacher's pass     2 teacher (4 while it is read)                                           + a pass of activations
    building           4 latent + 4 the state's, one linear at a time + 20 bytes a weight of the largest linear
    training           4 latent + 8 moments + 2 made weight + 2 its gradient + 0.5 levels      + activations of a batch, forward and backward
    student's pass     5 the state (codes, latent) + 2 student                                 + a pass of activations

A streamed teacher's linears are freed when its targets are made. `tests/training/test_latent_step.py` counts the copies.

Finished blocks are in the ledger: a restart replays the streams through them (a forward pass) and goes on with the first missing
one. On a CPU the replay is bit-equal, and so is everything after it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.hidden_states import At, HiddenStates, StorePlan, handfuls
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.memory import settle
from lbllm_core.engine.passes import tokens_a_pass
from lbllm_core.engine.progress import Progress, Report, silent
from lbllm_core.engine.ranks import ALONE, Ranks
from lbllm_core.model import fused_block
from lbllm_core.model.blocks import Decoder, linears_of
from lbllm_core.model.student import BlockState, state_from_tensors, state_tensors
from lbllm_core.model.student_block import build_block

Tell = Callable[[float, float, int], None]


def untold(share: float, loss: float, tokens: int) -> None:
    """For a block whose training nobody follows."""


@dataclass(frozen=True)
class BlockJob:
    """What a stage gets for one block. Streams are `(sequences, tokens, hidden)`; `target` is None when nobody asked for it.

    `tell(share, loss, tokens)`: how far the block's training is (0..1), its loss, and the tokens it has worked through.
    """

    index: int
    teacher_block: nn.Module
    inputs: HiddenStates
    target: HiddenStates | None
    decoder: Decoder
    surroundings: dict[str, Any]
    hardware: Hardware
    tell: Tell = untold

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """A block on a batch of hidden states, in the compute type; the result is float32."""
        return fused_block.run_block(self.decoder, block, hidden, self.surroundings, self.hardware, self.index)


@dataclass(frozen=True)
class SweepPlan:
    """How a stage wants the loop to run."""

    step: str
    needs_target: bool
    target_on_student_stream: bool = False
    variant: str = "none"
    kv_bits: int = 16


Work = Callable[[BlockJob], tuple[BlockState, dict[str, Any]]]  # figures of the block; what is not a number is kept, but not shown


def passes(stream: HiddenStates) -> list[At]:
    """The choices of sequences that take a stream through a block, of bounded size."""
    batch = max(1, tokens_a_pass(stream.shape[2], stream.device.type == "cuda") // stream.shape[1])
    return [slice(i, i + batch) for i in range(0, len(stream), batch)]


@torch.no_grad()
def advance(job: BlockJob, block: nn.Module, source: HiddenStates, into: HiddenStates) -> None:
    """Write what a block makes of `source` over `into`, which may be the same stream."""
    with into.rewriting() as put:
        for hidden in source.batches(passes(source)):
            put(job.run(block, hidden))


def relative_error(student: HiddenStates, target: HiddenStates, ranks: Ranks = ALONE) -> float:
    """`|student - target|^2 / |target|^2` without each sequence's first token, whose activations are massive; float64, a handful of sequences at a time."""
    every = handfuls(student.shape)
    return _relative(zip(student.batches(every), target.batches(every), strict=True), student.device, ranks)


@torch.no_grad()
def error_on_sample(job: BlockJob, block: nn.Module) -> float:
    """Relative error of a block's output on the first pass of the stream: cheap enough to be taken of a block that is only a start."""
    assert job.target is not None
    first = passes(job.inputs)[0]
    return sample_error(job.run(block, job.inputs[first]), job.target[first], job.hardware.ranks)


def sample_error(ours: Tensor, theirs: Tensor, ranks: Ranks) -> float:
    """`relative_error` of tensors `(sequences, tokens, hidden)`."""
    return _relative([(ours, theirs)], ours.device, ranks)


def _relative(pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device, ranks: Ranks) -> float:
    error = energy = torch.zeros((), dtype=torch.float64, device=device)
    for ours, theirs in pairs:  # `(sequences, tokens, hidden)` each
        error = error + (ours[:, 1:].double() - theirs[:, 1:].double()).square().sum()
        energy = energy + theirs[:, 1:].double().square().sum()
    ranks.sum_(error, energy)
    return float(error / energy)


class _Watch:
    """Passes on what a block tells while it is worked on, and keeps its losses for the curves."""

    def __init__(self, step: str, total: int, report: Report):
        self.step, self.total, self.report = step, total, report
        self.index, self.began, self.tokens = 0, 0.0, 0
        self.losses: list[list[float]] = []

    def begin(self, index: int) -> None:
        self.index, self.began, self.tokens, self.losses = index, time.monotonic(), 0, []

    def tell(self, share: float, loss: float, tokens: int) -> None:
        self.tokens = tokens
        self.losses.append([share, loss])
        self.report(Progress(self.step, self.index, self.total, "block", self._now(tokens), share))

    def end(self, figures: Mapping[str, Any], stream_tokens: int, seconds: float) -> None:
        shown = {name: value for name, value in figures.items() if isinstance(value, float)}
        now = self._now(self.tokens or stream_tokens)
        self.report(Progress(self.step, self.index + 1, self.total, "block", {**now, **shown, "seconds": seconds}))

    def _now(self, tokens: int) -> dict[str, float]:
        losses = {"loss": self.losses[-1][1], "loss_before": self.losses[0][1]} if self.losses else {}
        return losses | {"tokens_per_s": tokens / max(time.monotonic() - self.began, 1e-9)}


def pass_type(hardware: Hardware) -> torch.dtype:
    """What weights are kept in that only passes are made through: on a GPU as autocast would cast them in every pass, the same numbers cast once."""
    return hardware.compute_dtype if hardware.device.type == "cuda" else torch.float32


def let_go(block: nn.Module) -> None:
    """Free the weights of a streamed teacher block's linears: its target is made, and a student block takes only the rest of it."""
    for linear in linears_of(block).values():
        linear.weight.data = linear.weight.data.new_empty(0)


def sweep(
    decoder: Decoder, ids: Tensor, work: Work, plan: SweepPlan, ledger: Ledger, hardware: Hardware, report: Report, store: StorePlan | None = None
) -> list[dict[str, Any]]:
    """Run `work` over all blocks; results are in the ledger. ids `(sequences, tokens)`. Returns the figures of each block."""
    total, ranks = len(decoder.blocks), hardware.ranks
    ids = ids[ranks.rank :: ranks.size]
    done = ledger.finished(total) if ranks.first else 0
    ranks.wait()
    done = done if ranks.first else ledger.finished(total)  # what is damaged has been set aside by now
    if done == total:
        return [ledger.figures(i) for i in range(total)]
    started = time.monotonic()
    with contextlib.ExitStack() as scratch:
        student = scratch.enter_context(contextlib.closing(embedded(decoder, ids, hardware, store)))
        teacher = scratch.enter_context(contextlib.closing(student.copy())) if plan.needs_target else None
        around = decoder.surroundings(student[slice(0, 1)])
        watch = _Watch(plan.step, total, report if ranks.first else silent)
        for index in range(total):
            if index == done:
                watch.report(Progress(plan.step, done, total, "block", begins=True))
            watch.begin(index)
            block = decoder.blocks[index]
            if decoder.streamed and plan.needs_target:  # it is ours alone
                for linear in linears_of(block).values():
                    linear.weight.data = linear.weight.data.to(pass_type(hardware))
            job = BlockJob(index, block, student, None, decoder, around, hardware, watch.tell)
            if teacher is not None and not (plan.target_on_student_stream and index < done):
                advance(job, block, student if plan.target_on_student_stream else teacher, teacher)
                job = replace(job, target=teacher)
                if decoder.streamed:
                    let_go(block)
            if index < done:
                state = state_from_tensors(ledger.load(index), plan.variant)
                figures = ledger.figures(index)
            else:
                settle(hardware.device)
                state, figures = work(job)
                settle(hardware.device)
            advance(job, build_block(block, state, "fixed", plan.kv_bits, dtype=pass_type(hardware)), student, student)
            if index >= done:
                if job.target is not None:
                    figures["block_rel_mse"] = relative_error(student, job.target, hardware.ranks)
                    first = passes(student)[0]
                    figures["error_after"] = sample_error(student[first], job.target[first], ranks)
                if watch.losses:
                    figures["losses"] = watch.losses
                if ranks.first:
                    ledger.save(index, state_tensors(state), figures)
                ranks.wait()
                watch.end(figures, student.shape[0] * student.shape[1] * ranks.size, time.monotonic() - started)
            del block, job, state
    return [ledger.figures(i) for i in range(total)]


@torch.no_grad()
def embedded(decoder: Decoder, ids: Tensor, hardware: Hardware, store: StorePlan | None) -> HiddenStates:
    """The stream that enters the first block. ids `(sequences, tokens)`."""
    stream = HiddenStates((*ids.shape, decoder.width), hardware.device, store)
    stream.fill(decoder.embed(ids[at]).float().to(hardware.device) for at in passes(stream))
    decoder.embedded()
    return stream
