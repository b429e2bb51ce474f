"""Are the paths of this GPU exact?  python kernels/check_paths.py [--paths triton,cuda] [--device cuda:0]

Every path that dispatch can choose for weights on the device (and the reference there, which is plain torch) against the reference
on the CPU: codes, scales and zero points of the quantizer, int32 sums, fp32 outputs bit by bit, fp16 and bf16 outputs. Shapes are odd
and even, both level modes, both variants, 0 to 2000 tokens; inputs are misaligned, not contiguous, not finite. Outputs and workspaces
are poisoned: `torch.empty` is told to fill what it gives. Each path also runs on a stream of its own and inside a replayed CUDA
graph. Prints one table; exit 1 on any difference, 2 where there is no GPU. It measures nothing.

Most of the time goes into the reference on the CPU, and on the Triton path into compiling some hundred variants of its kernels; so weights
are dealt to processes (`--processes`, by default one a CPU core, at most 16). After `--minutes` no further weight is begun, and the table
says how many were not.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from lbllm_kernels import dispatch, reference
from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.format import PackedWeight, to_device
from lbllm_kernels.paths import PATHS, Path
from lbllm_kernels.synthetic import random_packed
from torch import Tensor

SHAPES = ((1, 16), (7, 40), (33, 530), (64, 512), (96, 1040), (320, 576), (1536, 576), (576, 1536), (1000, 4100), (4096, 4096))
MODES = (("explicit", 16), ("explicit", 128), ("codebook", 16), ("codebook", 32))
TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 128, 130, 255, 513)
FACTORS = (ActFactors("uniform", 0.9, 1.1), ActFactors("piecewise", 0.93, 0.88, 0.31, 0.2), ActFactors("piecewise", 1.2, 1e-30, 1.0, 0.0))
LARGE = 1 << 22  # rows times channels from which fewer numbers of tokens are tried


@dataclass
class Row:
    """What one path was asked, and where it first differed."""

    cases: int = 0
    integers: int = 0
    wrong: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("codes", "sums", "fp32", "half", "stream", "graph"), 0))
    first: str = ""

    def count(self, kind: str, ours: Tensor, expected: Tensor, what: str) -> None:
        """Compare bit by bit; NaN equals NaN."""
        ours = ours.cpu()
        same = (ours == expected) | (torch.isnan(ours) & torch.isnan(expected)) if ours.is_floating_point() else ours == expected
        bad = ours.numel() if ours.shape != expected.shape or ours.dtype != expected.dtype else int((~same).sum())
        self.integers += ours.numel()
        self.wrong[kind] += bad
        if bad and not self.first:
            self.first = f"{kind} of {what}"

    def add(self, other: Row) -> None:
        """Take another process's counts in."""
        self.cases += other.cases
        self.integers += other.integers
        self.wrong = {kind: bad + other.wrong[kind] for kind, bad in self.wrong.items()}
        self.first = self.first or other.first


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` fills memory with NaN and largest integers."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def tokens_of(m: int, channels: int, seed: int) -> Tensor:
    """Tokens of many kinds: normal, heavy-tailed, one-sided, on a grid of ties, zero, denormal, huge, not finite."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, channels, generator=g)
    kinds = (
        lambda t: t, lambda t: t * torch.exp(2 * t), torch.abs, lambda t: -t.abs(), lambda t: torch.round(t * 4) / 4, lambda t: t * 0,
        lambda t: t * 1e-42, lambda t: t * 1e30, lambda t: t * (t.abs() > 2), lambda t: t.clamp(-1, 1),
    )  # fmt: skip
    for i in range(m):
        x[i] = kinds[(i + seed) % len(kinds)](x[i])
    if m > 12:
        x[11, 0], x[12, -1] = float("nan"), float("inf")
    return x


def misaligned(x: Tensor, device: torch.device) -> Tensor:
    """The same values on the device, one element off the allocator's alignment."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
    room[1:] = x.reshape(-1).to(device)
    return room[1:].view(x.shape)


def numbers_of_tokens(packed: PackedWeight) -> tuple[int, ...]:
    return (1, 16, 17, 130, 2000) if packed.out_features * packed.in_features >= LARGE else TOKENS


def check_shape(path: Path, packed: PackedWeight, factors: ActFactors, device: torch.device, row: Row, what: str) -> None:
    """All comparisons of one weight."""
    bias = torch.randn(packed.out_features, generator=torch.Generator().manual_seed(1))
    dense = reference.ReferenceWeight(packed, bias)
    weight = path.derive(to_device(packed, device), bias.to(device))
    for m in numbers_of_tokens(packed):
        x, where = tokens_of(m, packed.in_features, m), f"{what}, {m} tokens"
        expected = reference.ReferenceTokens(*quantize_activations(x, factors))
        tokens = path.quantize(misaligned(x, device), factors)
        for ours, theirs in zip(path.in_order(tokens), (expected.q, expected.scale, expected.zero), strict=True):
            row.count("codes", ours, theirs, where)
        row.count("sums", path.accumulate(expected.q.to(device), weight), reference.sums(expected.q, dense), where)
        row.count("fp32", path.linear(tokens, weight, torch.float32), reference.product(expected, dense), where)
        if path.forward is not None:
            row.count("fp32", path.forward(misaligned(x, device), weight, factors), reference.product(expected, dense), f"{where}, one call")
        for dtype in (torch.float16, torch.bfloat16):
            half = x.to(dtype)
            ours = path.linear(path.quantize(half.to(device).T.contiguous().T, factors), weight, dtype)
            row.count("half", ours, reference.product(reference.quantize(half, factors), dense, dtype), where)
        row.cases += 1


def check_stream_and_graph(path: Path, device: torch.device, row: Row) -> None:
    """A stream of its own, and a CUDA graph captured on one input and replayed on others."""
    packed, factors = random_packed(320, 1040, 32, "codebook"), FACTORS[1]
    weight = path.derive(to_device(packed, device), None)
    for m in (1, 16, 33, 130):
        def run(x: Tensor) -> Tensor:
            if path.forward is not None:
                return path.forward(x, weight, factors)
            return path.linear(path.quantize(x, factors), weight, torch.float32)

        inputs = [torch.randn(m, 1040, generator=torch.Generator().manual_seed(s)) for s in range(3)]
        expected = [reference.linear(x, packed, factors) for x in inputs]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            on_stream = run(inputs[0].to(device))
        stream.synchronize()
        row.count("stream", on_stream, expected[0], f"{m} tokens")
        try:
            held = inputs[0].to(device)
            run(held)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run(held)
            for x, theirs in zip(inputs, expected, strict=True):
                held.copy_(x)
                graph.replay()
                torch.cuda.synchronize(device)
                row.count("graph", y, theirs, f"{m} tokens")
        except RuntimeError as error:
            row.wrong["graph"] += 1
            row.first = row.first or f"graph: {str(error).splitlines()[0]}"


Task = tuple[tuple[int, int], tuple[str, int]] | None  # shape and level mode of a weight; None: streams and graphs


def check_task(name: str, device_name: str, task: Task, threads: int, until: float) -> Row | None:
    """One weight by one path, in a process of its own; None when the time (`time.time()`) is over."""
    if time.time() > until:
        return None
    torch.set_num_threads(threads)
    path, device, row = PATHS[name], torch.device(device_name), Row()
    if task is None:
        check_stream_and_graph(path, device, row)
        return row
    (n, k), (mode, group) = task
    packed = random_packed(n, k, group, mode, seed=n, entries=200, extreme=(n, k) == (96, 1040))
    if path.unsupported(to_device(packed, device)) is not None:
        return row
    with poisoned():
        for factors in FACTORS if n * k < LARGE else FACTORS[1:2]:
            check_shape(path, packed, factors, device, row, f"{n} x {k}, {mode}, G={group}, {factors.variant}")
    return row


def check(path: Path, device: torch.device, processes: int, until: float) -> tuple[Row, int]:
    """Everything about one path, and how many weights were not begun in time. Large weights first, so that no process ends late."""
    row, left = Row(), 0
    weights = sorted(itertools.product(SHAPES, MODES), key=lambda task: -task[0][0] * task[0][1])
    tasks: list[Task] = [*weights[:4], *([] if path.name == "reference" else [None]), *weights[4:]]
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(check_task, path.name, str(device), task, threads, until) for task in tasks]
        for future in as_completed(futures):
            found = future.result()
            if found is None:
                left += 1
            else:
                row.add(found)
    return row, left


def main(arguments: list[str]) -> int:
    """Command line; 0: exact, 1: not, 2: nothing to check here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where the weights are; cpu checks the CPU paths the same way")
    parser.add_argument("--paths", default="", help="comma-separated; default: all that are present")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; nothing was checked", file=sys.stderr)
        return 2
    os.environ.pop(dispatch.PATH_VARIABLE, None)
    wanted = [name for name in options.paths.split(",") if name] or [p.name for p in PATHS.values() if p.device in (device.type, "")]
    unknown = [name for name in wanted if name not in PATHS]
    if unknown:
        print(f"unknown paths {unknown}; known: {', '.join(PATHS)}", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}; dispatch would choose: {dispatch.describe(options.device)}")
    head = ("codes", "sums", "fp32", "half", "stream", "graph")
    print(f"{'path':12} {'cases':>6} {'compared':>13} " + " ".join(f"{h:>7}" for h in head) + "  first difference")
    failed, until = False, time.time() + 60 * options.minutes
    for wanted_name in wanted:
        path = PATHS[wanted_name]
        present, why = path.state()
        if not present:
            print(f"{wanted_name:12} absent: {why}")
            continue
        start = time.time()
        row, left = check(path, device, options.processes, until) if device.type == "cuda" else (check_without_gpu(path, device), 0)
        failed |= any(row.wrong.values())
        line = f"{wanted_name:12} {row.cases:6} {row.integers:13,} " + " ".join(f"{row.wrong[h]:7}" for h in head) + f"  {row.first or '-'}"
        print(line + (f"  ({left} weights were not checked: out of time)" if left else "") + f"  [{time.time() - start:.0f} s]", flush=True)
    return int(failed)


def check_without_gpu(path: Path, device: torch.device) -> Row:
    """The comparisons that need no GPU, on the smaller shapes."""
    row = Row()
    for n, k in SHAPES[:4]:
        for mode, group in MODES:
            check_shape(path, random_packed(n, k, group, mode, seed=n, entries=200), FACTORS[1], device, row, f"{n} x {k}, {mode}, G={group}")
    return row


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
