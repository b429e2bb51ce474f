"""The one shallow-to-deep loop that stages 1, 2 and 3 share.

Two streams of hidden states run through the model side by side, block by block: the *teacher's*, through its own blocks, and
the *student's*, through blocks that are already quantized. At block i a stage is handed the student's input and the teacher's
output and returns the block's new state; the student's stream then advances through it. One block is worked on at a time,
so memory is bounded by a block and two streams.

Finished blocks are in the ledger: a restart replays the streams through them (a forward pass) and goes on with the first missing
one. On a CPU the replay is bit-equal, and so is everything after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.progress import Progress, Report
from lbllm_core.model.blocks import Decoder
from lbllm_core.model.student import BlockState, state_from_tensors, state_tensors
from lbllm_core.model.student_block import build_block

TOKENS_A_PASS = 8192


@dataclass(frozen=True)
class BlockJob:
    """What a stage gets for one block. Streams are `(sequences, tokens, hidden)`; `target` is None when nobody asked for it."""

    index: int
    teacher_block: nn.Module
    inputs: Tensor
    target: Tensor | None
    decoder: Decoder
    surroundings: dict[str, Any]
    hardware: Hardware

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """A block on a batch of hidden states, in the compute type; the result is float32."""
        with self.hardware.autocast():
            return self.decoder.run_block(block, hidden, self.surroundings, self.index).float()


@dataclass(frozen=True)
class SweepPlan:
    """How a stage wants the loop to run."""

    step: str
    needs_target: bool
    target_on_student_stream: bool = False
    variant: str = "none"
    act_group_size: int = 0
    kv_bits: int = 16


Work = Callable[[BlockJob], tuple[BlockState, dict[str, float]]]


@torch.no_grad()
def advance(job: BlockJob, block: nn.Module, stream: Tensor) -> Tensor:
    """A stream after one block, in passes of bounded size."""
    batch = max(1, TOKENS_A_PASS // stream.shape[1])
    return torch.cat([job.run(block, stream[i : i + batch]) for i in range(0, len(stream), batch)])


def relative_error(student: Tensor, target: Tensor) -> float:
    """`|student - target|^2 / |target|^2` without each sequence's first token, whose activations are massive; float64, a sequence at a time."""
    error = energy = torch.zeros((), dtype=torch.float64, device=student.device)
    for ours, theirs in zip(student, target, strict=True):
        error = error + (ours[1:].double() - theirs[1:].double()).square().sum()
        energy = energy + theirs[1:].double().square().sum()
    return float(error / energy)


def sweep(decoder: Decoder, ids: Tensor, work: Work, plan: SweepPlan, ledger: Ledger, hardware: Hardware, report: Report) -> list[dict[str, float]]:
    """Run `work` over all blocks; results are in the ledger. ids `(sequences, tokens)`. Returns the figures of each block."""
    total = len(decoder.blocks)
    done = ledger.finished(total)
    if done == total:
        return [ledger.figures(i) for i in range(total)]
    started = time.monotonic()
    with torch.no_grad():
        student = decoder.embed(ids).float()
    teacher = student
    around = decoder.surroundings(student[:1])
    for index in range(total):
        target_input = student if plan.target_on_student_stream else teacher
        job = BlockJob(index, decoder.blocks[index], student, None, decoder, around, hardware)
        if plan.needs_target and not (plan.target_on_student_stream and index < done):
            teacher = advance(job, decoder.blocks[index], target_input)
            job = BlockJob(index, decoder.blocks[index], student, teacher, decoder, around, hardware)
        if index < done:
            state = state_from_tensors(ledger.load(index), plan.variant, plan.act_group_size)
            figures = ledger.figures(index)
        else:
            state, figures = work(job)
        fixed = build_block(decoder.blocks[index], state, "fixed", plan.kv_bits)
        student = advance(job, fixed, student)
        if index >= done:
            if job.target is not None:
                figures["block_rel_mse"] = relative_error(student, job.target)
            ledger.save(index, state_tensors(state), figures)
            report(Progress(plan.step, index + 1, total, "block", {**figures, "seconds": time.monotonic() - started}))
    return [ledger.figures(i) for i in range(total)]
