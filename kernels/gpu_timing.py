"""Timing on a GPU: graphs, rotation, random weights. What `bench_gpu.py` and the scripts beside it measure with.

A call is timed as one of many in a CUDA graph that goes around enough weights to leave the L2 (200 MB of them: four times an H100's),
because a decode step never finds its weights there. Medians of replays, by events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lbllm_kernels import cuda
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.cuda_layout import ROW_PAD, TILE_K, count_tiles

Shapes = tuple[tuple[int, int], ...]
SHAPES: Shapes = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (8192, 28672))
FACTORS = ActFactors("piecewise")
ROTATED_BYTES = 200 << 20


class Clock:
    """The time that is left for measurements."""

    def __init__(self, minutes: float):
        self.start, self.seconds = time.monotonic(), minutes * 60

    def left(self) -> float:
        return max(0.0, self.start + self.seconds - time.monotonic())

    def over(self) -> bool:
        return self.left() == 0

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)


def graph_us(calls: Sequence[Callable[[], Any]], replays: int = 15) -> float:
    """Median time of one call in microseconds: all calls in one CUDA graph, replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(calls)


def rotated(items: Sequence[Any], call: Callable[[Any], Any], least: int = 20) -> list[Callable[[], Any]]:
    """At least `least` calls, going around the items."""
    rounds = -(-least // len(items))
    return [partial(call, item) for _ in range(rounds) for item in items]


def random_weight(n: int, k: int, mode: str, group: int, seed: int = 0, bias: bool = False) -> cuda.CudaWeight:
    """A weight made in the derived layout on the GPU: any 32 bits are codes. For timing; correctness packs the stored format."""
    g = torch.Generator("cuda").manual_seed(seed)
    row_tiles, k_tiles = count_tiles(n, k)
    rows = n + -n % ROW_PAD

    def levels(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, (*shape, 4), generator=g, dtype=torch.int8, device="cuda").view(torch.int32).squeeze(-1)

    codes = torch.randint(-(2**31), 2**31 - 1, (row_tiles, k_tiles, 32, 4), generator=g, dtype=torch.int32, device="cuda")
    groups = (row_tiles, k_tiles, 8, TILE_K // group, 2)
    words = levels(*groups) if mode == "explicit" else None
    group_codes = torch.randint(0, 256, groups, generator=g, dtype=torch.uint8, device="cuda") if mode == "codebook" else None
    codebook = levels(256) if mode == "codebook" else None
    scale = torch.rand(rows, generator=g, device="cuda") * 1e-3 + 1e-4
    sums = torch.zeros(rows, dtype=torch.int32, device="cuda")
    weight = cuda.CudaWeight.from_layout(k, n, group, codes, words, group_codes, codebook, scale, sums, torch.randn(rows, device="cuda") if bias else None)
    sums[:n] = cuda.accumulate(torch.ones((1, k), dtype=torch.int8, device="cuda"), weight)[0]
    torch.zeros(1, device="cuda")  # the last kernel before a product must not be one that writes its weight (cuda.py)
    return weight


def weights_of(n: int, k: int, mode: str, group: int) -> list[cuda.CudaWeight]:
    first = random_weight(n, k, mode, group)
    return [first, *(random_weight(n, k, mode, group, seed) for seed in range(1, -(-ROTATED_BYTES // first.bytes())))]


def dense_of(n: int, k: int) -> list[torch.Tensor]:
    return [torch.randn(n, k, dtype=torch.float16, device="cuda") for _ in range(max(2, -(-ROTATED_BYTES // (2 * n * k))))]


def warm_up() -> None:
    """A second of matrix products: clocks up, handles made."""
    a = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
    end = time.monotonic() + 1
    while time.monotonic() < end:
        for _ in range(50):
            a @ a
        torch.cuda.synchronize()


def bandwidth() -> list[dict[str, Any]]:
    """Device copy, bytes read plus bytes written, and the fp16 product rate, in this run."""
    source = torch.randint(-128, 127, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = graph_us([lambda: target.copy_(source)] * 4, 5)
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    dense = graph_us([lambda: a @ b] * 2, 5)
    return [
        {"name": "copy_gb_s", "value": 2 * source.numel() / copy / 1e3, "unit": "GB/s"},
        {"name": "fp16_tflop_s", "value": 2 * 8192**3 / dense / 1e6, "unit": "TFLOP/s"},
    ]


def record(op: str, us: float, n: int, k: int, m: int, **context: Any) -> dict[str, Any]:
    return {"name": "kernel_us", "value": us, "unit": "us", "op": op, "n": n, "k": k, "m": m, **context}


def ours_us(weights: list[cuda.CudaWeight], x: torch.Tensor, path: str = "", plan: cuda.Plan = cuda.DEFAULT_PLAN) -> float:
    return graph_us(rotated(weights, lambda w: cuda.forward(x, w, FACTORS, path=path, plan=plan)))
