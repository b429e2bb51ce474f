"""Other 2-bit GPU libraries, as installed packages, for `bench_gpu.py --only peers`: left out with a word where they are not installed.

GemLite: `A16W2_HQQ_INT`, G = 128, its own autotuner. Humming: uint2 weights with fp16 activations, G = 128, its own heuristics. Both get the
weights rotated past the L2 and CUDA graphs, as ours do (`ours_beside`: stored levels of G = 128, up to 16 tokens with the quantizer, above
it too, as a layer runs). `cublaslt_int8`: torch._int_mm of int8 weights, which takes more than 16 tokens, so that fewer are padded to 32.
Only speed is measured here; their numerics are their own.

Their compilers and tuners take most of the time. So processes that only fill the packages' caches on disk come first, several at once; then
each library has a share of the time, each shape an equal part of that, and what was not reached is a record of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from gpu_timing import Clock, Shapes, dense_of, graph_us, ours_us, record, rotated, weights_of  # noqa: E402
from lbllm_kernels import cuda  # noqa: E402

SHAPES: Shapes = ((4096, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 16, 2048, 256, 8, 64, 4)  # in this order: what is cut off is what others tell most about
WARMED_TOKENS = (1, 16, 256)  # one of each kind of kernel that they have
GROUP = 128
ROTATED = 200 << 20
WARM_SHARE = 0.35  # of the time that is left
LEAST_PADDED = 32


class OverTime(BaseException):
    """A row's time is over; not an Exception, so that no library takes it for a bad setting."""


@dataclass(frozen=True)
class Library:
    """A package: its import name, how its layers are made, and its share of the time."""

    module: str
    layers: Callable[[int, int], list[Any]]
    share: float


def copies(n: int, k: int) -> int:
    """Enough layers of 2.25 bits a weight to leave the L2."""
    return max(2, -(-ROTATED // (n * k * 9 // 32)))


def gemlite_layers(n: int, k: int) -> list[Any]:
    """GemLite linears with random codes, scales and zero points."""
    helper = importlib.import_module("gemlite.helper")
    made = []
    for _ in range(copies(n, k)):
        codes = torch.randint(0, 4, (n, k), dtype=torch.uint8, device="cuda")
        scales = torch.rand(n * k // GROUP, 1, dtype=torch.float16, device="cuda") * 0.01 + 0.001
        zeros = torch.full_like(scales, 1.5)
        made.append(helper.A16W2_HQQ_INT(device="cuda:0", dtype=torch.float16).from_weights(codes, scales, zeros))
    return made


def humming_layers(n: int, k: int) -> list[Any]:
    """Humming linears quantized by the package from random weights."""
    layer_type = importlib.import_module("humming.layer").HummingLayer
    weight = torch.randn(n, k, dtype=torch.float16, device="cuda") * 0.02
    made = []
    for _ in range(copies(n, k)):
        layer = layer_type(shape_n=n, shape_k=k, weight_config={"dtype": "uint2", "group_size": GROUP}, torch_dtype=torch.float16).cuda()
        layer.load_from_unquantized(weight)
        layer.transform()
        made.append(layer)
    return made


LIBRARIES = {"humming_w2": Library("humming", humming_layers, 0.3), "gemlite_a16w2": Library("gemlite", gemlite_layers, 1.0)}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def activations(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, dtype=torch.float16, device="cuda")


def first_call(layers: list[Any], m: int, k: int) -> None:
    """What compiles and tunes: may take minutes, and may be interrupted, which the recording of a graph may not."""
    layers[0](activations(m, k))
    torch.cuda.synchronize()


def library_us(layers: list[Any], m: int, k: int) -> float:
    """Time of one call after the first."""
    x = activations(m, k)
    return graph_us(rotated(layers, lambda layer: layer(x)), 9)


def cublas_us(n: int, k: int, m: int) -> float:
    x = activations(m, k)
    return graph_us(rotated(dense_of(n, k)[:4], lambda w: torch.nn.functional.linear(x, w)), 9)


def int8_us(n: int, k: int, m: int) -> float:
    """int8 product of cuBLASLt, int32 sums; no scale is applied."""
    q = torch.randint(-8, 8, (max(m, LEAST_PADDED), k), dtype=torch.int8, device="cuda")
    count = max(2, -(-ROTATED // (n * k)))
    weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(count)]
    return graph_us(rotated(weights, lambda w: torch._int_mm(q, w.T)), 9)


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OverTime in the block when it takes longer."""

    def ring(*_: Any) -> None:
        raise OverTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def own_rows(clock: Clock, shapes: Shapes, tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """cuBLAS fp16, cuBLASLt int8 and ours, for every row: seconds in all."""
    for n, k in shapes:
        weights = weights_of(n, k, "explicit", GROUP)
        for m in tokens:
            base = cublas_us(n, k, m)
            yield record("cublas_fp16", base, n, k, m)
            int8 = int8_us(n, k, m)
            yield record("cublaslt_int8", int8, n, k, m, speedup=base / int8, padded_to=max(m, LEAST_PADDED))
            us = ours_us(weights, activations(m, k))
            path, _ = cuda.planned(m, weights[0])
            yield record("ours_beside", us, n, k, m, group_size=GROUP, level_mode="explicit", path=path, speedup=base / us)
            clock.say(f"{n:6} x {k:5}  M={m:<4} cuBLAS {base:7.1f} us  int8 {int8:7.1f}  ours {us:7.2f} us  {base / us:5.2f}x")


def not_reached(op: str, n: int, k: int, m: int, seconds: float, why: str) -> dict[str, Any]:
    return {"name": "not_reached", "value": round(seconds, 1), "unit": "s", "op": op, "n": n, "k": k, "m": m, "why": why}


def library_rows(
    clock: Clock, op: str, layers_of: Callable[[int, int], list[Any]], shapes: Shapes, tokens: Sequence[int], base: dict[tuple[int, int, int], float], seconds: float
) -> Iterator[dict[str, Any]]:
    """A library's rows within `seconds`, shape after shape; one that the time or an error kept from being measured says so."""
    end = time.monotonic() + seconds
    for place, (n, k) in enumerate(shapes):
        begun = time.monotonic()
        until, made = begun + (end - begun) / (len(shapes) - place), None
        for m in tokens:
            start = time.monotonic()
            why, us = "time", None
            if start < until:
                try:
                    with limit(until - start):
                        made = made or layers_of(n, k)
                        first_call(made, m, k)
                    us = library_us(made, m, k)
                except OverTime:
                    pass
                except Exception as error:  # a foreign package may fail in any way; the run goes on and says so
                    why = f"{type(error).__name__}: {str(error)[:160]}"
            spent = time.monotonic() - start
            if us is None:
                clock.say(f"{n:6} x {k:5}  M={m:<4} {op} not measured after {spent:.1f} s: {why}")
                yield not_reached(op, n, k, m, spent, why)
            else:
                clock.say(f"{n:6} x {k:5}  M={m:<4} {op} {us:8.2f} us  {base[n, k, m] / us:5.2f}x, after {spent:.1f} s")
                yield record(op, us, n, k, m, group_size=GROUP, speedup=base[n, k, m] / us)


def warm(clock: Clock, ops: Sequence[str], shapes: Shapes, seconds: float) -> None:
    """Processes that run rows for the sake of what the packages keep on disk, as many at once as there are processors; killed after `seconds`."""
    end, waiting = time.monotonic() + seconds, list(itertools.product(ops, WARMED_TOKENS, shapes))
    running: list[subprocess.Popen[bytes]] = []
    count = len(waiting)
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < (os.cpu_count() or 1):
            op, m, (n, k) = waiting.pop(0)
            command = [sys.executable, __file__, op, str(n), str(k), str(m)]
            running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True))
        time.sleep(0.2)
        running = [process for process in running if process.poll() is None]
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    clock.say(f"compiled ahead: {count - len(waiting) - len(running)} of {count} rows ended by themselves")


def measure(clock: Clock, tokens: Sequence[int] = TOKENS, shapes: Shapes = SHAPES) -> Iterator[dict[str, Any]]:
    """Records of every row: ours, cuBLAS and cuBLASLt first, then each library within its share of the time that is left."""
    base: dict[tuple[int, int, int], float] = {}
    for made in own_rows(clock, shapes, tokens):
        if made["op"] == "cublas_fp16":
            base[made["n"], made["k"], made["m"]] = made["value"]
        yield made
    there = {op: library for op, library in LIBRARIES.items() if installed(library.module)}
    for op in LIBRARIES.keys() - there.keys():
        clock.say(f"{op}: {LIBRARIES[op].module} is not installed")
    if there:
        warm(clock, list(there), shapes, WARM_SHARE * clock.left())
    for op, library in there.items():
        yield from library_rows(clock, op, library.layers, shapes, tokens, base, library.share * clock.left())
        torch.cuda.empty_cache()


if __name__ == "__main__":  # one row, not timed
    name, n, k, m = sys.argv[1], *map(int, sys.argv[2:5])
    first_call(LIBRARIES[name].layers(n, k)[:1], m, k)
