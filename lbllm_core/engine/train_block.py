"""Training one block: AdamW, cosine schedule, normalised squared error, and a stop at the first NaN.

    loss = |O_student - O_teacher|^2 / |O_teacher|^2  + lambda * polarization(bitmap)          (arXiv 2604.19167, eqs. 4, 6)

The squared error is divided by the targets' energy, so that losses of different blocks compare and one learning rate serves
all. The first token of each sequence is left out: its activations are massive and would drown the rest. The order of
sequences depends on the seed and the block alone, so a resumed run repeats it exactly.

A block of a small model is hundreds of kernels of a few microseconds each. On a GPU the whole step (forward, backward, clipping,
update) is therefore recorded once a block as a CUDA graph and replayed; batches are copied into fixed buffers, and learning
rates are tensors. A batch of another size (the last one of an epoch) runs as plain calls of the same step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine.block_sweep import BlockJob
from lbllm_core.errors import NumericalError
from lbllm_core.model.linear import LatentBitmapWeight, LearningRates
from lbllm_core.model.student_block import constrain, parameter_groups

CHECK_EVERY = 8  # steps between looks at the loss; each look waits for the device
WARM_UP = 3  # plain steps before a graph is recorded: lazy initialisation must not be part of it


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
    trainer = _Trainer(block, job, plan, groups)
    watch = _LossWatch(job.index)
    first = last = 0.0
    for step in range(total):
        if step % steps_an_epoch == 0:
            order = torch.randperm(n, generator=generator).to(job.inputs.device)
        at = order[(step % steps_an_epoch) * plan.batch_size :][: plan.batch_size]
        loss = trainer.step(at, cosine(step, total, plan.lr_final), step / max(total - 1, 1))
        if step % CHECK_EVERY == 0 or step == total - 1:
            last = watch.look(float(loss.detach()), block)
            first = last if step == 0 else first
    return {"loss_before": first, "loss_after": last, "train_steps": float(total)}


class _Trainer:
    """One optimizer step of a block, as plain calls or as a recorded graph."""

    def __init__(self, block: nn.Module, job: BlockJob, plan: TrainingPlan, groups: list[dict[str, Any]]):
        self.block, self.job, self.plan = block, job, plan
        self.on_gpu = job.inputs.device.type == "cuda"
        self.base = [float(g["lr"]) for g in groups]
        if self.on_gpu:  # a recorded step reads its rates from tensors
            groups = [g | {"lr": torch.tensor(g["lr"], device=job.inputs.device)} for g in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=self.on_gpu)
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        assert job.target is not None
        self.energy = float(job.target[:, 1:].square().mean())
        self.progress = torch.zeros((), device=job.inputs.device)
        self.graph: Any = None
        self.buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def step(self, at: Tensor, factor: float, progress: float) -> Tensor:
        """Train on the sequences `at`; returns the loss before the update. Learning rates are `factor` of their base."""
        assert self.job.target is not None
        inputs, target = self.job.inputs[at], self.job.target[at]
        if self.on_gpu and self.graph is None:
            self._record(inputs, target)
        self._set_rates(factor)
        self.progress.fill_(progress)
        if self.buffers is None or inputs.shape != self.buffers[0].shape:
            return self._plain(inputs, target)
        self.buffers[0].copy_(inputs)
        self.buffers[1].copy_(target)
        self.graph.replay()
        return self.buffers[2]

    def _plain(self, inputs: Tensor, target: Tensor) -> Tensor:
        loss = block_loss(self.job.run(self.block, inputs), target, self.energy)
        (loss + _polarization(self.block, self.plan, self.progress)).backward()  # type: ignore[no-untyped-call]
        if self.plan.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        constrain(self.block)
        return loss.detach()

    def _set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
            if self.on_gpu:
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def _record(self, inputs: Tensor, target: Tensor) -> None:
        """Record the step on copies of a batch. Rates are zero meanwhile and moments are cleared after, so nothing is learned."""
        self._set_rates(0.0)
        x, y = inputs.clone(), target.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._plain(x, y)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            loss = self._plain(x, y)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.buffers = (x, y, loss)


def _polarization(block: nn.Module, plan: TrainingPlan, progress: Tensor) -> Tensor | float:
    if not plan.polarize:
        return 0.0
    beta = plan.beta_start + (plan.beta_end - plan.beta_start) * progress
    terms: list[Any] = [m.polarization(beta) for m in block.modules() if isinstance(m, LatentBitmapWeight)]
    total: Tensor | float = plan.polarize * sum(terms)
    return total


class _LossWatch:
    """Remembers the last finite loss and names the culprit when one is not."""

    def __init__(self, index: int):
        self.index, self.finite = index, math.nan

    def look(self, loss: float, block: nn.Module) -> float:
        if math.isfinite(loss):
            self.finite = loss
            return loss
        bad = [name for name, p in block.named_parameters() if not bool(torch.isfinite(p).all())]
        where = f"first non-finite parameter: {bad[0]}" if bad else "all parameters are finite, so the inputs of the block are not"
        raise NumericalError(f"block {self.index}: the loss became {loss} ({where}); last finite loss {self.finite:.6g}. Earlier blocks are kept. Try a learning rate ten times lower, or hardware.compute_dtype=fp32")
