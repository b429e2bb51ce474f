"""Measures the CPU path beside torch fp32 and writes results/kernels_cpu.json:  python kernels/bench_cpu.py

Shapes of a 7B model, M = 1 and 16 (decode) and 128 and 512 (prefill), both level modes; SmolLM2-135M's shapes at M = 1 and 2048.
Everything in one run, interleaved, because only ratios inside a run mean something on a shared machine. Weights rotate among
copies of 256 MB together, which no cache holds; `copy_gb_s` is torch's copy of 256 MB in the same run, read and write counted,
and `read_gb_s` its sum, the better of before and after all else: a slow second there would flatter every share of it. `one_thread_gb_s` says what bounds one token: a weight that stays in the last cache against weights from memory, one
thread; where both are equal it is not memory. Times are medians after a warm-up; `ours` includes the activation quantizer, which is also given alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lbllm_kernels import cpu
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.synthetic import random_packed

ROOT = Path(__file__).resolve().parent.parent
LARGE = ((4096, 4096), (11008, 4096), (4096, 11008))
SMALL = ((576, 576), (192, 576), (1536, 576), (576, 1536))
MODES = (("explicit", 128), ("codebook", 32), ("codebook", 16))
FACTORS = ActFactors("piecewise")
ROTATED_BYTES = 256 << 20  # as many as the probe of memory reads: less would leave a part of them in a large last cache


def median_us(run: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """Median time of a call in microseconds, and how many calls: at least 5, for about `seconds`."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 2000):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6, len(times)


def rotating(items: list[Any], call: Callable[[Any], Any]) -> Callable[[], Any]:
    """A function that calls with the next item each time."""
    turn = 0

    def run() -> Any:
        nonlocal turn
        turn = (turn + 1) % len(items)
        return call(items[turn])

    return run


def bandwidth(seconds: float) -> list[dict[str, Any]]:
    """What the memory gives in this run."""
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    copy, _ = median_us(lambda: target.copy_(source), seconds)
    read, _ = median_us(source.sum, seconds)
    return [
        {"name": "copy_gb_s", "value": 2 * source.numel() * 4 / copy / 1e3, "unit": "GB/s"},
        {"name": "read_gb_s", "value": source.numel() * 4 / read / 1e3, "unit": "GB/s"},
    ]


def one_thread(seconds: float) -> list[dict[str, Any]]:
    """Rates at which one thread goes through weights at one token, from the last cache and from memory, in turns."""
    threads, x, made = torch.get_num_threads(), torch.randn(1, 4096), []
    torch.set_num_threads(1)
    for mode, group in MODES:
        near = cpu.CpuWeight(random_packed(1024, 4096, group, mode))
        far = copies_of(cpu.CpuWeight(random_packed(4096, 4096, group, mode)))
        kinds = {"last cache": (near, partial(cpu.Fused([near], FACTORS), x)), "memory": (far[0], rotating([cpu.Fused([w], FACTORS) for w in far], partial(apply, x)))}
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(5):
            for kind, (weight, run) in kinds.items():
                rates[kind].append(layout_bytes(weight) / median_us(run, seconds / 5)[0] / 1e3)
        made += [
            {"name": "one_thread_gb_s", "value": max(found), "unit": "GB/s", "op": "ours", "weights_in": kind, "m": 1, "group_size": group, "level_mode": mode}
            for kind, found in rates.items()
        ]
        print(f"one thread, {mode:8} G={group:<4} " + ", ".join(f"{kind} {max(found):.1f} GB/s" for kind, found in rates.items()), flush=True)
    torch.set_num_threads(threads)
    return made


def copies_of(weight: cpu.CpuWeight) -> list[cpu.CpuWeight]:
    """The weight and as many copies as make ROTATED_BYTES, each in memory of its own."""
    size = (weight.in_features, weight.out_features, weight.group_size)
    more = ROTATED_BYTES // layout_bytes(weight)
    return [weight, *(cpu.CpuWeight.from_layout(*size, *(None if t is None else t.clone() for t in weight.layout)) for _ in range(more))]


def layout_bytes(weight: cpu.CpuWeight) -> int:
    """Bytes that one product reads of the weight."""
    tensors = (weight.codes, weight.words, weight.group_codes, weight.row_scale, weight.row_sums)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def two_calls(weight: cpu.CpuWeight, x: torch.Tensor) -> torch.Tensor:
    """Quantizer, then product: what a layer runs with many tokens."""
    return cpu.linear(cpu.quantize(x, FACTORS), weight)


def apply(x: torch.Tensor, layer: Callable[[torch.Tensor], Any]) -> Any:
    """`layer(x)`."""
    return layer(x)


def shape_records(n: int, k: int, tokens: tuple[int, ...], modes: tuple[tuple[str, int], ...], seconds: float) -> list[dict[str, Any]]:
    """torch fp32 and ours on one shape, for each number of tokens and level mode."""
    made: list[dict[str, Any]] = []
    dense = [torch.randn(n, k) for _ in range(ROTATED_BYTES // (4 * n * k) + 1)]
    for mode, group in modes:
        copies = copies_of(first := cpu.CpuWeight(random_packed(n, k, group, mode)))
        for m in tokens:
            x = torch.randn(m, k)
            context = {"n": n, "k": k, "m": m, "group_size": group, "level_mode": mode}
            torch_us, _ = median_us(rotating(dense, partial(torch.nn.functional.linear, x)), seconds)
            ours = [cpu.Fused([w], FACTORS) if m <= cpu.FUSED_UP_TO else partial(two_calls, w) for w in copies]
            ours_us, calls = median_us(rotating(ours, partial(apply, x)), seconds)
            quant_us, _ = median_us(partial(cpu.quantize, x, FACTORS), seconds / 4)
            made += [
                {"name": "kernel_us", "value": torch_us, "unit": "us", "op": "torch_fp32", **context},
                {"name": "kernel_us", "value": ours_us, "unit": "us", "op": "ours", **context, "calls": calls, "speedup": torch_us / ours_us,
                 "weights_gb_s": layout_bytes(first) / ours_us / 1e3},
                {"name": "act_quant_us", "value": quant_us, "unit": "us", "op": "ours", **context},
            ]  # fmt: skip
            print(f"{n:6} x {k:5}  M={m:<5} {mode:8} G={group:<4} torch {torch_us:9.0f} us  ours {ours_us:8.0f} us  {torch_us / ours_us:5.1f}x", flush=True)
    return made


def commit() -> str:
    """The commit that was measured, with a mark when the tree differs from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def main(arguments: list[str]) -> int:
    """Command line; exit 1 when the CPU path is not built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kernels_cpu.json")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each figure")
    options = parser.parse_args(arguments)
    if not cpu.library().levels:
        print(cpu.library().reason, file=sys.stderr)
        return 1
    before, records = bandwidth(options.seconds), one_thread(options.seconds)
    for n, k in LARGE:
        records += shape_records(n, k, (1, 16), MODES, options.seconds)
        records += shape_records(n, k, (128, 512), MODES[1:2], options.seconds)
    for n, k in SMALL:
        records += shape_records(n, k, (1, 2048), MODES[1:2], options.seconds)
    memory = [max(pair, key=lambda record: record["value"]) for pair in zip(before, bandwidth(options.seconds), strict=True)]
    result = {
        "schema": 1,
        "command": "python kernels/bench_cpu.py",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": processor(),
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "path": cpu.library().reason},
        "records": memory + records,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
