"""One process of the two-GPU measurement of `bench_scale` (section `gpus`); started through torchrun, never by hand.

The first rank times a step of stage 2 alone while the other waits, then both train the same block, each with a batch of the same size, and
gradients are averaged. Speed-up: twice the alone time over the common time. A rank that waits longer than `PATIENCE` for the other gives up,
so that nothing hangs when one of them fails.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lbllm_core.bench_block import Bench, synchronize, trained_block
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.ranks import ALONE, Ranks, join

MARK = "STEP "
PATIENCE = timedelta(seconds=150)  # the alone measurement, with the building of its block, takes a fifth of that


def seconds(bench: Bench, ranks: Ranks, repeats: int = 5) -> float:
    """Median seconds of a step on this rank."""
    here = replace(bench, hardware=replace(bench.hardware, ranks=ranks))
    step, _ = trained_block(here, bench.shape, "nearest", bench.batch)
    for _ in range(4):
        step()
    times = []
    for _ in range(repeats):
        synchronize(bench.hardware)
        ranks.wait()
        began = time.perf_counter()
        for _ in range(4):
            step()
        synchronize(bench.hardware)
        times.append((time.perf_counter() - began) / 4)
    return statistics.median(times)


def main(arguments: list[str]) -> int:
    """Measure; the first rank prints both times."""
    about: dict[str, Any] = json.loads(arguments[0])
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= ranks.size
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    join(device, PATIENCE)
    hardware = Hardware(device, torch.bfloat16 if on_gpu else torch.float32)
    bench = Bench(**{**about, "hardware": hardware, "scratch": Path(about["scratch"])})
    ranks.wait()
    alone = seconds(bench, ALONE) if ranks.first else 0.0
    ranks.wait()
    together = seconds(bench, ranks)
    if ranks.first:
        print(MARK + json.dumps({"alone": alone, "together": together, "size": ranks.size}), flush=True)
    ranks.wait()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
