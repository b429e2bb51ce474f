"""Checks the CUDA path and measures it on this machine's GPU:  python kernels/bench_gpu.py

One script for a bare GPU machine (torch, nvcc; nothing installed): it builds the object if it is absent, checks every path bit by bit
against the reference with fresh random inputs, and stops there with exit 1 on any difference. Then it times products of a 7B and a 70B
model's shapes beside cuBLAS fp16 in the same run, writes results/kernels_<device>.json, and prints one table last.

    --only correctness,tune,decode,prefill,thresholds,triton,peers,probe,model     sections (default: correctness,decode,prefill)
    --sanitize, --model   those sections alone
    --plans FILE          the measured plans, read, and written by `tune` (default: the file beside the kernels' code)
    --minutes 4        start no further measurement after so long

Method: CUDA graphs of calls over rotated weights (200 MB of them at least: four times the L2), medians of replays; `ours` at M <= 16
includes the activation quantizer, above it the quantizer is a row of its own (`act_quant_us`). Weights are random codes and levels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "kernels"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from gpu_timing import FACTORS, SHAPES, Clock, bandwidth, dense_of, graph_us, ours_us, record, rotated, warm_up, weights_of  # noqa: E402
from lbllm_kernels import build_cuda, cuda  # noqa: E402
from tune_gpu import probe_section, thresholds_section, tune_section  # noqa: E402

Records = Iterator[dict[str, Any]]
DECODE_TOKENS = (1, 4, 8, 16)
PREFILL_TOKENS = (128, 512, 2048)
SANITIZE_SECONDS = 70
SECONDS_BETWEEN_WRITES = 3
PREFILL_PATHS = ("narrow", "middle", "wide", "hopper128", "hopper256", "library")
MODES = (("explicit", 128), ("codebook", 32), ("codebook", 16))
TARGETS = {  # ratio to cuBLAS fp16 that a shape must reach, by tokens
    (4096, 4096): {1: 3.0, 4: 3.0, 8: 3.0, 16: 2.5, 128: 0.9, 512: 0.9, 2048: 1.0},
    (11008, 4096): {1: 4.0, 4: 4.0, 8: 4.0, 16: 3.0, 128: 0.9, 512: 1.0, 2048: 1.1},
    (4096, 11008): {1: 4.0, 4: 4.0, 8: 4.0, 16: 3.0, 128: 0.9, 512: 1.0, 2048: 1.1},
    (8192, 8192): {1: 3.5, 4: 3.5, 8: 3.5, 16: 3.0, 128: 0.9, 512: 1.0, 2048: 1.1},
    (8192, 28672): {1: 4.5, 4: 4.5, 8: 4.5, 16: 3.5, 128: 1.0, 512: 1.1, 2048: 1.2},
}


def decode_section(clock: Clock) -> Records:
    """M <= 16: quantizer and product together, beside cuBLAS fp16."""
    for n, k in SHAPES:
        dense, base = dense_of(n, k), {}
        for m in DECODE_TOKENS:
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            base[m] = graph_us(rotated(dense, partial(torch.nn.functional.linear, x)))
            yield record("cublas_fp16", base[m], n, k, m)
        del dense
        for mode, group in MODES:
            if clock.over():
                clock.say("time is over: the rest of decode is not measured")
                return
            weights = weights_of(n, k, mode, group)
            for m in DECODE_TOKENS:
                x = torch.randn(m, k, dtype=torch.float16, device="cuda")
                path, plan = cuda.planned(m, weights[0])
                us = ours_us(weights, x)
                quant = graph_us([partial(cuda.quantize, x, FACTORS)] * 20)
                context = {"group_size": group, "level_mode": mode, "path": path, "plan": [plan.row_tiles, plan.warps, plan.prefetch]}
                rate = weights[0].bytes() / us / 1e3
                yield record("ours", us, n, k, m, **context, speedup=base[m] / us, weights_gb_s=rate)
                yield {**record("ours", quant, n, k, m, group_size=group), "name": "act_quant_us"}
                clock.say(f"{n:6} x {k:5}  M={m:<3} {mode:8} G={group:<4} cuBLAS {base[m]:7.1f} us  ours {us:6.2f} us  {base[m] / us:5.2f}x  {rate:6.0f} GB/s  quantizer {quant:5.2f}  {path}")
            del weights


def prefill_section(clock: Clock) -> Records:
    """M > 16: the product and the quantizer apart, each path; int8 cuBLASLt alone beside them."""
    for n, k in SHAPES:
        dense, base = dense_of(n, k)[:4], {}
        for m in PREFILL_TOKENS:
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            base[m] = graph_us(rotated(dense, partial(torch.nn.functional.linear, x), 8), 9)
            yield record("cublas_fp16", base[m], n, k, m)
        del dense
        for mode, group in MODES[: 3 if n * k < 2e7 else 2]:
            if clock.over():
                clock.say("time is over: the rest of prefill is not measured")
                return
            weights = weights_of(n, k, mode, group)
            for m in PREFILL_TOKENS:
                x = torch.randn(m, k, dtype=torch.float16, device="cuda")
                us = {}
                for path in PREFILL_PATHS[0 if m < 512 else 1 :]:
                    tokens = cuda.quantize(x, FACTORS, path=path)
                    us[path] = graph_us(rotated(weights, lambda w, p=path, t=tokens: cuda.linear(t, w, torch.float16, path=p), 8), 9)
                quant = graph_us([partial(cuda.quantize, x, FACTORS)] * 8, 9)
                best = min(us, key=us.__getitem__)
                context = {"group_size": group, "level_mode": mode}
                yield from (record("ours", us[p], n, k, m, **context, path=p, speedup=base[m] / us[p], best=p == best) for p in us)
                yield {**record("ours", quant, n, k, m), "name": "act_quant_us"}
                if mode == "explicit":
                    int8 = [cuda.expanded(w) for w in weights[:3]]
                    lt = graph_us(rotated(int8, lambda w, t=tokens: torch._int_mm(t.q, w.T), 8), 9)
                    yield record("cublaslt_int8", lt, n, k, m)
                each = "  ".join(f"{p} {t:7.1f}" for p, t in us.items())
                clock.say(f"{n:6} x {k:5}  M={m:<4} {mode:8} G={group:<4} cuBLAS {base[m]:7.1f} us  {each}  quantizer {quant:5.1f}  best {base[m] / us[best]:5.2f}x")
            del weights


def sanitize_section(clock: Clock) -> Records:
    """Each kernel under compute-sanitizer, memcheck and racecheck side by side. Raises on any finding, and when a tool does not end."""
    started = {}
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--only", "each", "--out", os.devnull]
        started[tool] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    failed = []
    for tool, process in started.items():
        try:
            text, _ = process.communicate(timeout=SANITIZE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"{process.communicate()[0]}\n{tool} did not end within {SANITIZE_SECONDS} s"
        clock.say(f"{tool}: exit {process.returncode}; {[line for line in text.splitlines() if 'SUMMARY' in line or 'each kernel' in line]}")
        if process.returncode:
            failed.append(f"{tool} failed:\n{text[-4000:]}")
    if failed:
        raise SystemExit("\n".join(failed))
    yield from ()


def correctness_section(clock: Clock, kind: str = "all") -> Records:
    from check_gpu import check, check_each_kernel

    checks, failures = check_each_kernel(clock.say) if kind == "each" else check(clock.say, kind == "small")
    if failures:
        print("\n".join(failures[:30]))
        raise SystemExit(f"{len(failures)} of {checks} checks FAILED")
    clock.say(f"{checks} checks, none failed")
    yield {"name": "exact_checks", "value": checks, "unit": "checks", "kind": kind}


def peers_section(clock: Clock) -> Records:
    from bench_peers import measure

    return measure(clock, (1, 16, 8, 2048, 128))


def triton_section(clock: Clock) -> Records:
    """The Triton path beside ours, where it is part of the package."""
    try:
        from bench_triton import measure
    except ImportError as error:
        clock.say(f"the Triton path is not measured: {error}")
        return iter(())
    return measure(clock, DECODE_TOKENS + PREFILL_TOKENS)


def model_section(clock: Clock) -> Records:
    from bench_decode import measure

    return measure(clock)


SECTIONS: dict[str, Callable[[Clock], Records]] = {
    "correctness": correctness_section, "small": partial(correctness_section, kind="small"), "each": partial(correctness_section, kind="each"),
    "sanitize": sanitize_section, "tune": tune_section, "thresholds": thresholds_section, "decode": decode_section, "prefill": prefill_section,
    "triton": triton_section, "peers": peers_section, "probe": probe_section, "model": model_section,
}  # fmt: skip


def said(*command: str) -> str:
    """What a command prints, or "unknown" where it does not run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def commit() -> str:
    """LBLLM_COMMIT where it is set (a copied tree's own commit is not the one that was copied), else the checkout's."""
    return os.environ.get("LBLLM_COMMIT") or said("git", "describe", "--always", "--dirty", "--abbrev=12")


def driver() -> str:
    return said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")


def table(records: list[dict[str, Any]]) -> str:
    """Ours against cuBLAS fp16, one line for each shape and level mode; `!` marks a row under its target."""
    ours = [r for r in records if r["name"] == "kernel_us" and r["op"] == "ours"]
    base = {(r["n"], r["k"], r["m"]): r["value"] for r in records if r.get("op") == "cublas_fp16"}
    tokens = sorted({r["m"] for r in ours})
    lines = ["| N x K | levels | " + " | ".join(f"M={m}" for m in tokens) + " |", "|---|---|" + "---|" * len(tokens)]
    rows = list(dict.fromkeys((r["n"], r["k"], r["level_mode"], r["group_size"]) for r in ours))
    for n, k, mode, group in rows:
        cells = []
        for m in tokens:
            found = [r["value"] for r in ours if (r["n"], r["k"], r["level_mode"], r["group_size"], r["m"]) == (n, k, mode, group, m)]
            if not found:
                cells.append("-")
                continue
            ratio = base[(n, k, m)] / min(found)
            missed = "!" if ratio < TARGETS.get((n, k), {}).get(m, 0) else ""
            cells.append(f"{min(found):.1f} us, {ratio:.2f}x{missed}")
        lines.append(f"| {n} x {k} | {mode} G={group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Keeper:
    """Collects records and writes them every few seconds, so that a run that is cut short leaves what it had measured."""

    def __init__(self, arguments: list[str], kernels: Path, models: Path):
        self.records: list[dict[str, Any]] = []
        self.kernels, self.models, self.written = kernels, models, time.monotonic()
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver(), "python": platform.python_version(), "path": cuda.library().reason}
        self.head = {
            "schema": 1, "command": " ".join(["python kernels/bench_gpu.py", *arguments]), "commit": commit(), "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(), "versions": versions,
        }  # fmt: skip

    def add(self, made: dict[str, Any]) -> None:
        self.records.append(made)
        if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Models' records into one file, kernels' into the other; rates alone into none."""
        self.written = time.monotonic()
        models = [r for r in self.records if r.get("engine")]
        kernels = [r for r in self.records if not r.get("engine")]
        for path, records in ((self.models, models), (self.kernels, kernels)):
            if path == Path(os.devnull) or not any(r.get("op") or r.get("engine") for r in records):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial_file = path.with_suffix(".part")
            partial_file.write_text(json.dumps({**self.head, "records": records}, indent=1) + "\n", encoding="utf-8")
            os.replace(partial_file, path)


def main(arguments: list[str]) -> int:
    """Command line; exit 1 when the path cannot run here or a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="correctness,decode,prefill", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--sanitize", action="store_true", help="the section sanitize alone: compute-sanitizer over a small set")
    parser.add_argument("--model", action="store_true", help="the section model alone: whole models into --decode-out")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kernels_h100.json")
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--decode-out", type=Path, default=ROOT / "results" / "decode_h100.json")
    options = parser.parse_args(arguments)
    names = ["sanitize"] if options.sanitize else ["model"] if options.model else options.only.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    if options.plans:
        os.environ["LBLLM_CUDA_PLANS"] = str(options.plans)
    clock = Clock(options.minutes)
    try:
        clock.say(f"object: {build_cuda.build().name}")
    except build_cuda.BuildError as error:
        print(f"the CUDA path cannot be built: {error}", file=sys.stderr)
        return 1
    reason = cuda.library().reason if cuda.library().functions is None else cuda.device_reason(0)
    if reason:
        print(f"the CUDA path cannot run here: {reason}", file=sys.stderr)
        return 1
    clock.say(f"{torch.cuda.get_device_name()}, driver {driver()}, torch {torch.__version__}")
    keep = Keeper(arguments, options.out, options.decode_out)
    with torch.inference_mode():
        if set(names) & {"decode", "prefill", "tune", "thresholds", "triton", "peers", "model"}:
            warm_up()
            rates = bandwidth()
            keep.records += rates
            clock.say("  ".join(f"{r['name']} {r['value']:.0f}" for r in rates))
        for name in names:
            clock.say(f"--- {name}")
            for made in SECTIONS[name](clock):
                keep.add(made)
            torch.cuda.empty_cache()
    keep.write()
    kernels = [r for r in keep.records if r["name"] == "kernel_us"]
    if kernels:
        print(table(kernels))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
