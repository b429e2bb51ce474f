"""Training one block: AdamW, cosine schedule, normalised squared error, and a stop when it diverges.

    loss = |O_student - O_teacher|^2 / |O_teacher|^2  + lambda * polarization(bitmap)          (arXiv 2604.19167, eqs. 4, 6)

The squared error is divided by the targets' energy, so that losses of different blocks compare and one learning rate serves
all. The first token of each sequence is left out: its activations are massive and would drown the rest. The order of
sequences depends on the seed and the block alone, so a resumed run repeats it exactly.

On a GPU the step is recorded once a block and replayed (`recorded_step.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine.block_sweep import BlockJob
from lbllm_core.engine.recorded_step import RecordedStep
from lbllm_core.errors import NumericalError
from lbllm_core.model.linear import LatentBitmapWeight, LearningRates
from lbllm_core.model.student_block import constrain, parameter_groups

REMEDY = "Earlier blocks are kept. Try a learning rate ten times lower, or hardware.compute_dtype=fp32"
CHECK_EVERY = 8  # steps between looks at the loss; each look waits for the device
DIVERGED = 10.0  # a loss this many times the first one, and above 1, where a block that gives nothing would be: no learning rate comes back


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
    """Squared error without first tokens over `energy`, the mean square of such targets. `(batch, tokens, hidden)`."""
    return (output[:, 1:] - target[:, 1:]).square().mean() / energy


def train_block(block: nn.Module, job: BlockJob, plan: TrainingPlan) -> dict[str, float]:
    """Train a student block in place on `job.inputs` -> `job.target`. Returns `loss_before`, `loss_after`, `train_steps`.

    Raises NumericalError naming the block, the linear, the last finite loss and what to try.
    """
    assert job.target is not None
    groups = parameter_groups(block, plan.rates)
    if not groups:
        return {}
    n = len(job.inputs)
    steps_an_epoch = -(-n // plan.batch_size)
    total = plan.epochs * steps_an_epoch
    generator = torch.Generator().manual_seed(plan.seed * 100_003 + job.index)
    energy = float(job.target[:, 1:].square().mean())

    def gradients(inputs: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        loss = block_loss(job.run(block, inputs), target, energy)
        (loss + _polarization(block, plan, progress)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    update = RecordedStep(groups, gradients, lambda: constrain(block), plan.grad_clip, job.inputs.device)
    progress = torch.zeros((), device=job.inputs.device)
    watch = _LossWatch(job.index)
    first = last = 0.0
    for step in range(total):
        if step % steps_an_epoch == 0:
            order = torch.randperm(n, generator=generator).to(job.inputs.device)
        at = order[(step % steps_an_epoch) * plan.batch_size :][: plan.batch_size]
        progress.fill_(step / max(total - 1, 1))
        loss = update(cosine(step, total, plan.lr_final), job.inputs[at], job.target[at], progress)
        if step % CHECK_EVERY == 0 or step == total - 1:
            last = watch.look(float(loss), block)
            first = last if step == 0 else first
    return {"loss_before": first, "loss_after": last, "train_steps": float(total)}


def _polarization(block: nn.Module, plan: TrainingPlan, progress: Tensor) -> Tensor | float:
    if not plan.polarize:
        return 0.0
    beta = plan.beta_start + (plan.beta_end - plan.beta_start) * progress
    terms: list[Any] = [m.polarization(beta) for m in block.modules() if isinstance(m, LatentBitmapWeight)]
    total: Tensor | float = plan.polarize * sum(terms)
    return total


class _LossWatch:
    """Remembers the first and the last finite loss, and names the culprit when one is not finite or far beyond the first."""

    def __init__(self, index: int):
        self.index, self.first, self.finite = index, math.nan, math.nan

    def look(self, loss: float, block: nn.Module) -> float:
        if math.isfinite(loss):
            self.first = loss if math.isnan(self.first) else self.first
            if loss > max(1.0, DIVERGED * self.first):
                raise NumericalError(f"block {self.index}: training diverges, the loss went from {self.first:.4g} to {loss:.4g}. {REMEDY}")
            self.finite = loss
            return loss
        bad = [name for name, p in block.named_parameters() if not bool(torch.isfinite(p).all())]
        where = f"first non-finite parameter: {bad[0]}" if bad else "all parameters are finite, so the inputs of the block are not"
        raise NumericalError(f"block {self.index}: the loss became {loss} ({where}); last finite loss {self.finite:.6g}. {REMEDY}")
