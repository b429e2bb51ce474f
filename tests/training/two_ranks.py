"""One of two processes that make the same steps as one process with both batches; started through torchrun by `test_latent_step.py`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_latent_step import RATES, small_job

from lbllm_core.config import PtqInitConfig, SchemeConfig
from lbllm_core.engine import latent_step
from lbllm_core.engine.latent_step import LatentStep
from lbllm_core.engine.ranks import ALONE, Exchange, Ranks, join
from lbllm_core.engine.train_block import MicroBatches, TrainingPlan
from lbllm_core.model.linear import LearningRates
from lbllm_core.model.student_block import build_block, constrain, parameter_groups
from lbllm_core.stages.ptq_init import quantize_block

STEPS = 3


def trained(ranks: Ranks, micro: int) -> tuple[torch.nn.Module, list[float], list[int]]:
    """A block after a few steps on this process's sequences, its losses, and how many gradients were on their way when the backward pass was over."""
    job, target = small_job()
    start, _ = quantize_block(job, SchemeConfig(level_mode="explicit", group_size=16, act_bits=16), PtqInitConfig(), 0)
    block = build_block(job.teacher_block, start, "nearest")
    plan = TrainingPlan(LearningRates(**RATES), 1, 4, 0.05, 0.05, 0)
    pieces = MicroBatches(block, job, plan, 0.7)
    pieces.size = micro
    update = LatentStep(block, parameter_groups(block, plan.rates), pieces._pieces, lambda: constrain(block), 0.05, torch.float32, ranks=ranks, pieces=lambda n: -(-n // micro))
    early: list[int] = []
    finish = update.exchange.finish
    update.exchange.finish = lambda *given: (early.append(len(update.exchange.pending)), finish(*given))[1]  # type: ignore[method-assign]
    mine = slice(ranks.rank, None, ranks.size)
    losses = [float(update(1.0, job.inputs.whole()[mine], target.whole()[mine], torch.zeros(()))) for _ in range(STEPS)]
    return block, losses, early


def main() -> int:
    """Compare; returns the exit code."""
    join(torch.device("cpu"), timedelta(seconds=60))
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    flat = [torch.full((3,), float(ranks.rank)), torch.full((2, 2), 1.0 + ranks.rank, dtype=torch.float64), torch.full((1 << 21,), 2.0 * ranks.rank)]
    ranks.mean_(flat)
    assert [float(t.flatten()[-1]) for t in flat] == [0.5, 1.5, 1.0]
    assert latent_step.tiled(trained(ALONE, 4)[0])
    for micro in (2, 1):
        whole, losses, _ = trained(ALONE, 4)
        shared, parts, early = trained(ranks, micro)
        assert early == [0, *[7] * (STEPS - 1)], early
        for (name, a), (_, b) in zip(whole.named_parameters(), shared.named_parameters(), strict=True):
            assert float((a - b).abs().max()) < 2e-4, name
        both = [ranks.mean(loss, torch.device("cpu")) for loss in parts]
        assert all(abs(a - b) < 1e-4 * abs(a) for a, b in zip(losses, both, strict=True)), (losses, both)
    assert not Exchange(ranks).pending
    ranks.wait()
    torch.distributed.destroy_process_group()
    print("equal", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
