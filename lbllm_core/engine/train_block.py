"""Training one block: AdamW, cosine schedule, normalised squared error, and a stop when it diverges.

    loss = |O_student - O_teacher|^2 / |O_teacher|^2  + lambda * polarization(bitmap)          (arXiv 2604.19167, eqs. 4, 6)

The squared error is divided by the targets' energy, so that losses of different blocks compare and one learning rate serves
all. The first token of each sequence is left out: its activations are massive and would drown the rest. The order of
sequences depends on the seed and the block alone, so a resumed run repeats it exactly.

On a GPU a small block's step is recorded once and replayed (`recorded_step.py`); a large block's is made of few passes over its weights
(`latent_step.py`). When the device runs out of memory the batch is taken in micro-batches of half the size, and again, down to one
sequence: gradients add up, so the effective batch stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine import latent_step
from lbllm_core.engine.block_sweep import BlockJob
from lbllm_core.engine.hidden_states import At, HiddenStates, handfuls
from lbllm_core.engine.latent_step import LatentStep
from lbllm_core.engine.memory import settle, shortage
from lbllm_core.engine.ranks import Ranks
from lbllm_core.engine.recorded_step import RecordedStep
from lbllm_core.errors import MemoryShortage, NumericalError
from lbllm_core.model.linear import LatentBitmapWeight, LearningRates, weights_held
from lbllm_core.model.student_block import constrain, parameter_groups, quant_linears

log = logging.getLogger(__name__)
SMALL_STREAM = 1 << 28  # values up to which the mean of a stream is taken at once
REMEDY = "Earlier blocks are kept. Try a learning rate ten times lower, or hardware.compute_dtype=fp32"
CHECK_EVERY = 8  # steps between looks at the loss; each look waits for the device
DIVERGED = 10.0  # a loss this many times the first one, and above 1, where a block that gives nothing would be
PATIENCE = 4  # looks in a row that such a loss may last; one batch with massive activations inside gives one too


@dataclass(frozen=True)
class TrainingPlan:
    """One block's training; `rates` says what learns."""

    rates: LearningRates
    epochs: int
    batch_size: int
    lr_final: float
    grad_clip: float
    seed: int
    polarize: float = 0.0
    beta_start: float = 20.0
    beta_end: float = 2.0


def cosine(step: int, total: int, final: float) -> float:
    """Learning-rate factor: 1 at the first step, `final` after the last."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def block_loss(output: Tensor, target: Tensor, energy: float) -> Tensor:
    """Squared error without first tokens over `energy`, the mean square of such targets. `(batch, tokens, hidden)` float32."""
    if output.is_cuda:
        return _SquaredError.apply(output, target, energy)  # type: ignore[no-any-return, no-untyped-call]
    return (output[:, 1:] - target[:, 1:]).square().mean() / energy


class _SquaredError(torch.autograd.Function):
    """The same in six passes over a state's bytes instead of fourteen, which is 2 % of a large block's step: its gradient is the difference."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, energy: float) -> Tensor:
        difference = output - target
        difference[:, 0] = 0
        ctx.save_for_backward(difference)
        ctx.weight = 1.0 / (difference[:, 1:].numel() * energy)
        loss: Tensor = torch.linalg.vector_norm(difference).square() * ctx.weight
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (grad * (2.0 * ctx.weight)), None, None


def train_block(block: nn.Module, job: BlockJob, plan: TrainingPlan) -> dict[str, float]:
    """Train a student block in place on `job.inputs` -> `job.target`. Returns `loss_before`, `loss_after`, `train_steps`.

    Raises NumericalError naming the block, the linear, the last finite loss and what to try; MemoryShortage when one sequence does not fit.
    """
    assert job.target is not None
    groups = parameter_groups(block, plan.rates)
    if not groups:
        return {}
    settle(job.hardware.device)
    ranks = job.hardware.ranks
    order = _order(len(job.inputs), plan, job.index, ranks)
    step_of = MicroBatches(block, job, plan, ranks.mean(mean_square(job.target), job.inputs.device))
    update = step_of.build(groups)
    progress = torch.zeros((), device=job.inputs.device)
    watch = _LossWatch(job.index)
    first = last = 0.0
    for step, (inputs, target) in enumerate(zip(job.inputs.batches(order), job.target.batches(order), strict=True)):
        progress.fill_(step / max(len(order) - 1, 1))
        loss = step_of.attempt(update, cosine(step, len(order), plan.lr_final), inputs, target, progress)
        if step % CHECK_EVERY == 0 or step == len(order) - 1:
            last = watch.look(ranks.mean(float(loss), job.inputs.device), block)
            first = last if step == 0 else first
            job.tell((step + 1) / len(order), last, (step + 1) * plan.batch_size * job.inputs.shape[1])
    return {"loss_before": first, "loss_after": last, "train_steps": float(len(order))}


def _order(n: int, plan: TrainingPlan, index: int, ranks: Ranks) -> list[At]:
    """This rank's sequences (of its `n`) in every step: each epoch in its own order."""
    generator = torch.Generator().manual_seed(plan.seed * 100_003 + index + 1_000_003 * ranks.rank)
    epochs = [torch.randperm(n, generator=generator) for _ in range(plan.epochs)]
    batch = plan.batch_size // ranks.size
    return [epoch[i : i + batch] for epoch in epochs for i in range(0, n, batch)]


def mean_square(stream: HiddenStates) -> float:
    """Mean square of a stream without first tokens; of a large one in float64, a handful of sequences at a time."""
    if stream.shape.numel() <= SMALL_STREAM:
        return float(stream.whole()[:, 1:].square().mean())
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for states in stream.batches(handfuls(stream.shape)):
        total += states[:, 1:].square().sum(dtype=torch.float64)
    return float(total) / (len(stream) * (stream.shape[1] - 1) * stream.shape[2])


class MicroBatches:
    """Forward and backward of a batch in pieces of `size` sequences, which halves when the device has no room."""

    def __init__(self, block: nn.Module, job: BlockJob, plan: TrainingPlan, energy: float):
        self.block, self.job, self.plan, self.energy = block, job, plan, energy
        self.size = plan.batch_size // job.hardware.ranks.size

    def build(self, groups: list[dict[str, Any]]) -> LatentStep | RecordedStep:
        """The optimizer step that suits the block."""
        plan, hardware = self.plan, self.job.hardware
        if latent_step.suits(self.block, hardware):
            after: Callable[[], None] = lambda: constrain(self.block, bitmaps=False)  # noqa: E731
            return LatentStep(self.block, groups, self._pieces, after, plan.grad_clip, hardware.compute_dtype, plan.polarize, (plan.beta_start, plan.beta_end), hardware.ranks, lambda n: -(-n // self.size))
        after = lambda: constrain(self.block)  # noqa: E731
        return RecordedStep(groups, self._gradients, after, plan.grad_clip, self.job.inputs.device, self.job.hardware.ranks)

    def attempt(self, update: LatentStep | RecordedStep, factor: float, inputs: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        """One step; while the device runs out of memory, the same step again in smaller pieces."""
        while True:
            try:
                return update(factor, inputs, target, progress)
            except torch.OutOfMemoryError as error:
                reason = shortage(error)
            update.forget()
            self._halve(min(self.size, len(inputs)), inputs.shape[1], reason)

    def _halve(self, size: int, tokens: int, reason: str) -> None:
        if size == 1:
            raise MemoryShortage(f"block {self.job.index}: the device has no memory for a step of one sequence of {tokens} tokens ({reason}). Earlier blocks are kept. Try shorter sequences (dataset.seq_len), hardware.hidden_tier=host, or a larger device")
        self.size = size // 2
        log.warning("block %d: the device ran out of memory; a batch is now taken in micro-batches of %d sequences (the effective batch stays %d)", self.job.index, self.size, self.plan.batch_size)

    def _pieces(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Leave the batch's gradients in `.grad`; returns its loss."""
        if self.size >= len(inputs):
            loss = block_loss(self.job.run(self.block, inputs), target, self.energy)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        total = torch.zeros((), device=inputs.device)
        for at in range(0, len(inputs), self.size):
            mine, theirs = inputs[at : at + self.size], target[at : at + self.size]
            loss = block_loss(self.job.run(self.block, mine), theirs, self.energy) * (len(mine) / len(inputs))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _gradients(self, inputs: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        """The same with the regulariser, which has no batch; weights are made once where there are several pieces."""
        if self.size >= len(inputs):
            loss = block_loss(self.job.run(self.block, inputs), target, self.energy)
            (loss + _polarization(self.block, self.plan, progress)).backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        with weights_held(list(quant_linears(self.block).values())):
            total = self._pieces(inputs, target)
        regular = _polarization(self.block, self.plan, progress)
        if isinstance(regular, Tensor):
            regular.backward()  # type: ignore[no-untyped-call]
        return total


def _polarization(block: nn.Module, plan: TrainingPlan, progress: Tensor) -> Tensor | float:
    if not plan.polarize:
        return 0.0
    beta = plan.beta_start + (plan.beta_end - plan.beta_start) * progress
    terms: list[Any] = [m.polarization(beta) for m in block.modules() if isinstance(m, LatentBitmapWeight)]
    total: Tensor | float = plan.polarize * sum(terms)
    return total


class _LossWatch:
    """Remembers the first and the last finite loss, and names the culprit when one is not finite, or several in a row are far beyond the first."""

    def __init__(self, index: int):
        self.index, self.first, self.finite, self.far = index, math.nan, math.nan, 0

    def look(self, loss: float, block: nn.Module) -> float:
        if math.isfinite(loss):
            self.first = loss if math.isnan(self.first) else self.first
            self.far = self.far + 1 if loss > max(1.0, DIVERGED * self.first) else 0
            if self.far > PATIENCE:
                raise NumericalError(f"block {self.index}: training diverges, the loss went from {self.first:.4g} to {loss:.4g}. {REMEDY}")
            self.finite = loss
            return loss
        bad = [name for name, p in block.named_parameters() if not bool(torch.isfinite(p).all())]
        where = f"first non-finite parameter: {bad[0]}" if bad else "all parameters are finite, so the inputs of the block are not"
        raise NumericalError(f"block {self.index}: the loss became {loss} ({where}); last finite loss {self.finite:.6g}. {REMEDY}")
