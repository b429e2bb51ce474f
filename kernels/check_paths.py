"""Are the paths of this GPU exact?  python kernels/check_paths.py [--paths triton,cuda] [--device cuda:0]

Every path that dispatch can choose for weights on the device (and the reference there, which is plain torch) against an oracle: codes, scales
and zero points of the quantizer, int32 sums, fp32 outputs bit by bit, fp16 and bf16 outputs. The oracle quantizes and finishes on the CPU
as the reference does, and multiplies in float64 on the device, which is exact: every sum of int8 products is far under 2**53. Shapes are odd
and even, both level modes, both variants, 0 to 1030 tokens; inputs are misaligned, not contiguous, not finite. Outputs and workspaces
are poisoned: `torch.empty` is told to fill what it gives. Each path also runs on a stream of its own and inside a replayed CUDA
graph. Prints a line a path whenever it knows more; exit 1 on any difference, 2 where there is no GPU. It measures nothing.

Most of the time goes into quantizing on the CPU, and on the Triton path into compiling some hundred variants of its kernels; so weights
are dealt to processes (`--processes`). After `--minutes` no further number of tokens is begun, the table says how many weights are not or
only partly checked, and a process that gives no answer for 20 seconds more is ended and counts as a difference.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from lbllm_kernels import dispatch, reference
from lbllm_kernels.activation import ActFactors
from lbllm_kernels.format import PackedWeight, to_device
from lbllm_kernels.paths import PATHS, Path
from lbllm_kernels.synthetic import random_packed
from torch import Tensor

SHAPES = ((1, 16), (7, 40), (33, 530), (64, 512), (96, 1040), (320, 576), (1536, 576), (576, 1536), (1000, 4100), (4096, 4096))
MODES = (("explicit", 16), ("explicit", 128), ("codebook", 16), ("codebook", 32))
TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 128, 130, 255, 513)
FACTORS = (ActFactors("uniform", 0.9, 1.1), ActFactors("piecewise", 0.93, 0.88, 0.31, 0.2), ActFactors("piecewise", 1.2, 1e-30, 1.0, 0.0))
KINDS = ("codes", "sums", "fp32", "half", "stream", "graph", "errors")
GRACE = 20  # seconds after the end of the time in which processes must answer
SAID_EVERY = 8  # seconds
LARGE = 1 << 22  # rows times channels from which fewer numbers of tokens are tried


@dataclass
class Row:
    """What one path was asked, and where it first differed."""

    cases: int = 0
    integers: int = 0
    wrong: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    first: str = ""
    tasks: int = 0
    whole: int = 0

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
        self.tasks += other.tasks
        self.whole += other.whole

    def line(self, name: str, tasks: int, seconds: float) -> str:
        """A line of the table; `tasks` are all that should be checked."""
        counts = " ".join(f"{self.wrong[kind]:7}" for kind in KINDS)
        left = f"  ({tasks - self.whole} of {tasks} weights not or partly checked)" if self.whole < tasks else ""
        return f"{name:12} {self.cases:6} {self.integers:13,} {counts}  {self.first or '-'}{left}  [{seconds:.0f} s]"


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
    return (1, 16, 17, 130, 1030) if packed.out_features * packed.in_features >= LARGE else TOKENS


class Oracle:
    """Exact products of one weight: float64 on the device, finished on the CPU."""

    def __init__(self, packed: PackedWeight, bias: Tensor, device: torch.device):
        self.weight, self.device = reference.ReferenceWeight(packed, bias), device
        self.dense = self.weight.weight.to(device).double()

    def sums(self, tokens: reference.ReferenceTokens) -> Tensor:
        return (tokens.q.to(self.device).double() @ self.dense.T).to(torch.int32).cpu()

    def outputs(self, tokens: reference.ReferenceTokens, sums: Tensor) -> Tensor:
        return reference.finish(sums, tokens.scale, tokens.zero, self.weight.row_sums, self.weight.row_scale, self.weight.bias)


def check_shape(path: Path, packed: PackedWeight, factors: ActFactors, device: torch.device, row: Row, what: str, until: float = math.inf) -> bool:
    """All comparisons of one weight; False when the time was over before the last."""
    bias = torch.randn(packed.out_features, generator=torch.Generator().manual_seed(1))
    oracle = Oracle(packed, bias, device)
    weight = path.derive(to_device(packed, device), bias.to(device))
    for m in numbers_of_tokens(packed):
        if time.time() > until:
            return False
        x, where = tokens_of(m, packed.in_features, m), f"{what}, {m} tokens"
        expected = reference.quantize(x, factors)
        sums = oracle.sums(expected)
        outputs = oracle.outputs(expected, sums)
        tokens = path.quantize(misaligned(x, device), factors)
        for ours, theirs in zip(path.in_order(tokens), (expected.q, expected.scale, expected.zero), strict=True):
            row.count("codes", ours, theirs, where)
        row.count("sums", path.accumulate(expected.q.to(device), weight), sums, where)
        row.count("fp32", path.linear(tokens, weight, torch.float32), outputs, where)
        if path.forward is not None:
            row.count("fp32", path.forward(misaligned(x, device), weight, factors), outputs, f"{where}, one call")
        for dtype in (torch.float16, torch.bfloat16):
            half = x.to(dtype)
            ours = path.linear(path.quantize(half.to(device).T.contiguous().T, factors), weight, dtype)
            theirs = reference.quantize(half, factors)
            row.count("half", ours, oracle.outputs(theirs, oracle.sums(theirs)).to(dtype), where)
        row.cases += 1
    return True


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


Weight = tuple[tuple[int, int], tuple[str, int]] | None  # shape and level mode of a weight; None: streams and graphs
Task = tuple[str, str, Weight, int, float]  # path, device, weight, threads, end of the time (`time.time()`)


def check_task(task: Task) -> tuple[str, Row]:
    """One weight by one path, in a process that does this alone. A path that raises is an error in its row."""
    name, device_name, what, threads, until = task
    torch.set_num_threads(threads)
    row = Row(tasks=1)
    try:
        row.whole = int(time.time() < until and check_weight(PATHS[name], torch.device(device_name), what, row, until))
    except Exception as error:  # whatever a kernel or a compiler raises: the other weights are checked
        row.wrong["errors"] += 1
        row.first = row.first or f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return name, row


def check_weight(path: Path, device: torch.device, what: Weight, row: Row, until: float) -> bool:
    """All of one task; False when the time was over first."""
    if what is None:
        check_stream_and_graph(path, device, row)
        return True
    (n, k), (mode, group) = what
    packed = random_packed(n, k, group, mode, seed=n, entries=200, extreme=(n, k) == (96, 1040))
    if path.unsupported(to_device(packed, device)) is not None:
        return True
    with poisoned():
        several = FACTORS if n * k < LARGE else FACTORS[1:2]
        return all(check_shape(path, packed, factors, device, row, f"{n} x {k}, {mode}, G={group}, {factors.variant}", until) for factors in several)


def tasks_of(name: str) -> list[Weight]:
    """Streams and graphs, then all weights, large ones first, so that no process ends late."""
    weights = sorted(itertools.product(SHAPES, MODES), key=lambda weight: -weight[0][0] * weight[0][1])
    return [*([] if name == "reference" else [None]), *weights]


def check(names: list[str], device: torch.device, processes: int, until: float) -> bool:
    """All paths, those that compile nothing first; prints their lines as they come. True when all that was compared is equal."""
    threads, start = max(1, (os.cpu_count() or 1) // processes), time.time()
    names = sorted(names, key=lambda name: name == "triton")
    tasks: list[Task] = [(name, str(device), what, threads, until) for name in names for what in tasks_of(name)]
    rows, number, said = {name: Row() for name in names}, {name: len(tasks_of(name)) for name in names}, start
    lost = 0
    with multiprocessing.get_context("spawn").Pool(min(processes, len(tasks))) as pool:  # leaving it ends its processes
        answers = pool.imap_unordered(check_task, tasks)
        for done in range(len(tasks)):
            try:
                name, found = answers.next(max(1.0, until + GRACE - time.time()))
            except multiprocessing.TimeoutError:
                lost = len(tasks) - done
                break
            rows[name].add(found)
            if time.time() - said > SAID_EVERY or rows[name].tasks == number[name]:
                said = time.time()
                print(rows[name].line(name, number[name], said - start), flush=True)
    if lost:
        print(f"{lost} weights gave no answer within {GRACE} s after the end of the time")
    print("at the end:")
    for name in names:
        print(rows[name].line(name, number[name], time.time() - start), flush=True)
    return not lost and not any(any(row.wrong.values()) for row in rows.values())


def main(arguments: list[str]) -> int:
    """Command line; 0: exact, 1: not, 2: nothing to check here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where the weights are; cpu checks the CPU paths the same way")
    parser.add_argument("--paths", default="", help="comma-separated; default: all that are present")
    parser.add_argument("--processes", type=int, default=max(1, min(20, (os.cpu_count() or 1) - 8)), help="default: all cores but eight, at most 20")
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args(arguments)
    device, until = torch.device(options.device), time.time() + 60 * options.minutes
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
    for absent, why in [(wanted_name, PATHS[wanted_name].state()[1]) for wanted_name in wanted if not PATHS[wanted_name].state()[0]]:
        print(f"{absent:12} absent: {why}")
        wanted.remove(absent)
    print(f"{'path':12} {'cases':>6} {'compared':>13} " + " ".join(f"{kind:>7}" for kind in KINDS) + "  first difference", flush=True)
    if device.type == "cuda":
        return int(not check(wanted, device, options.processes, until))
    failed = False
    for wanted_name in wanted:
        start, row = time.time(), check_without_gpu(PATHS[wanted_name], device)
        failed |= any(row.wrong.values())
        print(row.line(wanted_name, 0, time.time() - start), flush=True)
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
