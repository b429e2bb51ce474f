"""Checks the CUDA path and measures it on this machine's GPU:  python kernels/bench_gpu.py

One script for a bare GPU machine (torch, nvcc; nothing installed): it builds the object if it is absent, checks every path bit by bit
against the reference with fresh random inputs, and stops there with exit 1 on any difference. Then it times products of a 7B and a 70B
model's shapes beside cuBLAS fp16 in the same run, writes results/kernels_<device>.json, and prints one table last.

    --only correctness,tune,decode,prefill,split,thresholds,triton,peers,probe,model     sections (default: correctness,decode,prefill)
    --shapes 4096x4096,4096x11008     other shapes than those of the tables
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
from gpu_tables import paths_table, speed_table  # noqa: E402
from gpu_timing import FACTORS, SHAPES, Clock, Shapes, bandwidth, dense_of, graph_us, ours_us, record, rotated, warm_up, weights_of  # noqa: E402
from lbllm_kernels import build_cuda, cuda  # noqa: E402
from tune_gpu import probe_section, thresholds_section, tune_section  # noqa: E402

from lbllm_core.report.kernel_tables import peers_table  # noqa: E402

Records = Iterator[dict[str, Any]]
DECODE_TOKENS = (1, 4, 8, 16)
PREFILL_TOKENS = (128, 512, 2048)
SANITIZE_SECONDS = 70
SECONDS_BETWEEN_WRITES = 3
PREFILL_PATHS = ("narrow", "middle", "wide", "hopper128", "hopper256", "hopper_split", "library")
MODES = (("explicit", 128), ("codebook", 32), ("codebook", 16))
FEW_BLOCKS = ((4096, 4096), (4096, 11008), (11008, 4096))  # shapes whose blocks do not fill the machine at some hundred tokens
SPLIT_TOKENS = (128, 256, 512)


def decode_section(clock: Clock, shapes: Shapes = ()) -> Records:
    """M <= 16: quantizer and product together, beside cuBLAS fp16."""
    for n, k in shapes or SHAPES:
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
                quant = graph_us([partial(cuda.quantize, x, FACTORS, path="" if path == "fused" else path)] * 20)
                context = {"group_size": group, "level_mode": mode, "path": path, "plan": [plan.row_tiles, plan.warps, plan.prefetch]}
                rate = weights[0].bytes() / us / 1e3
                yield record("ours", us, n, k, m, **context, speedup=base[m] / us, weights_gb_s=rate)
                yield {**record("ours", quant, n, k, m, group_size=group), "name": "act_quant_us"}
                clock.say(f"{n:6} x {k:5}  M={m:<3} {mode:8} G={group:<4} cuBLAS {base[m]:7.1f} us  ours {us:6.2f} us  {base[m] / us:5.2f}x  {rate:6.0f} GB/s  quantizer {quant:5.2f}  {path}")
            del weights


def prefill_section(clock: Clock, shapes: Shapes = (), counts: tuple[int, ...] = PREFILL_TOKENS, paths: tuple[str, ...] = PREFILL_PATHS) -> Records:
    """M > 16: the product and the quantizer apart, each path; int8 cuBLASLt alone beside them. A path whose output differs is not timed."""
    for n, k in shapes or SHAPES:
        dense, base = dense_of(n, k)[:4], {}
        for m in counts:
            x = torch.randn(m, k, dtype=torch.float16, device="cuda")
            base[m] = graph_us(rotated(dense, partial(torch.nn.functional.linear, x), 8), 9)
            yield record("cublas_fp16", base[m], n, k, m)
        del dense
        for mode, group in MODES[: 3 if n * k < 2e7 else 2]:
            if clock.over():
                clock.say("time is over: the rest of prefill is not measured")
                return
            weights = weights_of(n, k, mode, group)
            for m in counts:
                x = torch.randn(m, k, dtype=torch.float16, device="cuda")
                us, expected = {}, cuda.forward(x, weights[0], FACTORS, path="wide")
                for path in paths[int(m >= 512 and paths[0] == "narrow") :]:
                    tokens = cuda.quantize(x, FACTORS, path=path)
                    if not torch.equal(cuda.linear(tokens, weights[0], torch.float16, path=path), expected):
                        clock.say(f"WRONG: {path} with {m} tokens, {n} x {k} {mode} G={group}")
                        yield {**record("ours", 0.0, n, k, m, group_size=group, level_mode=mode, path=path), "name": "wrong_output"}
                        continue
                    us[path] = graph_us(rotated(weights, lambda w, p=path, t=tokens: cuda.linear(t, w, torch.float16, path=p), 8), 9)
                quant = graph_us([partial(cuda.quantize, x, FACTORS)] * 8, 9)
                if not us:
                    continue
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


def peers_section(clock: Clock, shapes: Shapes = ()) -> Records:
    import bench_peers

    return bench_peers.measure(clock, shapes=shapes or bench_peers.SHAPES)


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


def sections(shapes: Shapes) -> dict[str, Callable[[Clock], Records]]:
    """What can be asked for, by name. `shapes`: for tune, decode, prefill, peers in place of their own."""
    split = partial(prefill_section, shapes=shapes or FEW_BLOCKS, counts=SPLIT_TOKENS, paths=("narrow", "hopper128", "hopper256", "hopper_split"))
    return {
        "correctness": correctness_section, "small": partial(correctness_section, kind="small"), "each": partial(correctness_section, kind="each"),
        "sanitize": sanitize_section, "tune": partial(tune_section, shapes=shapes), "thresholds": thresholds_section,
        "decode": partial(decode_section, shapes=shapes), "prefill": partial(prefill_section, shapes=shapes), "split": split,
        "triton": triton_section, "peers": partial(peers_section, shapes=shapes), "probe": probe_section, "model": model_section,
    }  # fmt: skip


def shapes_of(text: str) -> Shapes:
    """`4096x4096,4096x11008` as pairs (out, in); ValueError on anything else."""
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",") if part]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError(f"--shapes {text!r}: expected pairs like 4096x11008, separated by commas")
    return tuple((n, k) for n, k in pairs)


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
    parser.add_argument("--only", default="correctness,decode,prefill", help=f"sections, separated by commas: {', '.join(sections(()))}")
    parser.add_argument("--shapes", type=shapes_of, default=(), help="out x in of what tune, decode, prefill, split and peers measure, such as 4096x4096,4096x11008")
    parser.add_argument("--sanitize", action="store_true", help="the section sanitize alone: compute-sanitizer over a small set")
    parser.add_argument("--model", action="store_true", help="the section model alone: whole models into --decode-out")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kernels_h100.json")
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--decode-out", type=Path, default=ROOT / "results" / "decode_h100.json")
    options = parser.parse_args(arguments)
    names = ["sanitize"] if options.sanitize else ["model"] if options.model else options.only.split(",")
    if unknown := [name for name in names if name not in sections(())]:
        parser.error(f"unknown section {unknown[0]!r}; choose from {', '.join(sections(()))}")
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
        if set(names) & {"decode", "prefill", "split", "tune", "thresholds", "triton", "peers", "model"}:
            warm_up()
            rates = bandwidth()
            keep.records += rates
            clock.say("  ".join(f"{r['name']} {r['value']:.0f}" for r in rates))
        for name in names:
            clock.say(f"--- {name}")
            for made in sections(options.shapes)[name](clock):
                keep.add(made)
            torch.cuda.empty_cache()
    keep.write()
    kernels = [r for r in keep.records if r["name"] in ("kernel_us", "wrong_output")]
    beside = [peers_table(keep.records)] if "peers" in names else []
    for text in (speed_table(kernels), paths_table(kernels), *beside):
        if text:
            print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
