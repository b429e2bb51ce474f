"""How fast large blocks are trained here, and what a whole model would take:  python -m lbllm_core.bench_scale --minutes 6

Random weights in the shape of LLaMA-2-7B (values do not matter to the clock), G=128, sequences of 2048 tokens, every block through the same
code as a run: streamed from safetensors files on disk, hidden states in pinned memory. Sections, in this order:

    step    stage 2 on one block, one optimizer step, for nearest-level codes and for latent W and G; utilisation is
            6 x parameters x tokens / time / 989 TFLOP/s. (The gradient of q, k and v towards a block's input is never needed, so this
            counts 8 % of work that is not done on a 7B block.)
    sweep   stages 1, 2 and 3 over `--blocks` blocks at `--sequences` x 2048 tokens: seconds a block with reading, passes, copies and
            writing, peak memory, growth of host memory from block to block, and the projection to the paper's budget:
            8192 sequences, two epochs of stage 2, one of stage 3, 32 blocks. The first block holds the making of the streams and counts once
            (`setup_s`); the others are averaged. Costs a block that do not grow with tokens (reading and writing weights, building
            the student) are measured with `FEW` sequences: seconds = fixed + slope x tokens; half of the tokens say how straight that is.
    step70b one step on a 70B-shaped block
    profile the kernels of a step by time (printed, not recorded)
    store   what bf16 and fp8 do to hidden states, and to the output of a block that reads them
    gpus    (with two GPUs) one block trained by two processes, each with the batch of one

Every finished section is written at once; the same command goes on with what is missing (`--again` measures everything anew), and no section is begun
that `--minutes` does not leave time for. `--shape tiny` is a rehearsal on any machine: its records never go into results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lbllm_core.bench_block import Bench, host_gb, peak_gb, reset_peak, synchronize, trained_block
from lbllm_core.config import (
    ActQuantConfig,
    DatasetConfig,
    HardwareConfig,
    PtqInitConfig,
    RunConfig,
    WeightDistillConfig,
)
from lbllm_core.engine import machine
from lbllm_core.engine.block_sweep import BlockJob, SweepPlan, advance, passes, sweep
from lbllm_core.engine.estimate import estimate
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.hidden_states import HiddenStates, decode, encode
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.memory import release
from lbllm_core.engine.progress import Progress
from lbllm_core.errors import DataError, LbllmError
from lbllm_core.model.inspect import architecture_shapes
from lbllm_core.model.student import load_block
from lbllm_core.report.records import read_results, write_results
from lbllm_core.report.tables import Cells, plain
from lbllm_core.stages.act_quant import refine_block
from lbllm_core.stages.ptq_init import quantize_block
from lbllm_core.stages.weight_distill import distill_block

PEAK = 989e12  # operations a second of an H100's bf16 matrix units, dense
BUDGET = 8192 * 2048  # the paper's tokens
MODEL_BLOCKS = 32
FEW = 4  # sequences of the run that shows what a block costs without tokens
SECTIONS = ("step", "sweep", "step70b", "profile", "store", "gpus")
SECONDS = MappingProxyType({"step": 40, "sweep": 190, "step70b": 40, "store": 10, "gpus": 60, "profile": 15})  # a guess; what it leaves is not begun
RANKS_SECONDS = 240.0  # for both measurements of two processes; a tenth on a GPU
LEAVE_SECONDS = 45.0  # torchrun gives its processes 30 s
Record = dict[str, Any]


def measured_step(bench: Bench, shape: str, parameterization: str, batch: int, repeats: int) -> list[Record]:
    """Seconds of a step (median), tokens a second, utilisation, peak memory."""
    reset_peak(bench.hardware)
    step, weights = trained_block(bench, shape, parameterization, batch)
    for _ in range(4):
        loss = step()
    synchronize(bench.hardware)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(4):
            loss = step()
        synchronize(bench.hardware)
        times.append((time.perf_counter() - began) / 4)
    if not bool(torch.isfinite(loss)):
        raise LbllmError(f"the loss of {shape}, {parameterization}, batch {batch} is not finite")
    seconds, tokens = statistics.median(times), batch * bench.tokens
    about = {"shape": shape, "gpus": 1, "parameterization": parameterization, "batch": batch, "tokens_a_step": tokens}
    return [
        {"name": "stage2_mfu", "value": 6.0 * weights * tokens / seconds / PEAK, "unit": "share of 989 TFLOP/s", **about},
        {"name": "stage2_tok_s", "value": tokens / seconds, "unit": "tokens/s", **about},
        {"name": "step_ms", "value": seconds * 1e3, "unit": "ms", **about},
        {"name": "peak_gb", "value": peak_gb(bench.hardware), "unit": "GB", "of": "one step", **about},
    ]


def step_section(bench: Bench) -> Iterator[Record]:
    """The three settings of a 7B block."""
    for parameterization, batch in (("nearest", bench.batch), ("latent", bench.batch), ("nearest", 4 * bench.batch)):
        yield from measured_step(bench, bench.shape, parameterization, batch, 5)
        release()


def step70b_section(bench: Bench) -> list[Record]:
    """A 70B-shaped block."""
    return measured_step(bench, "llama2_70b" if bench.shape != "tiny" else "tiny", "nearest", bench.batch, 3)


@dataclass
class Watch:
    """Seconds of the work of each block, of all of each block, and host memory after it."""

    work: list[float]
    ends: list[float]
    host: list[float]
    hardware: Hardware

    def around(self, work: Callable[[BlockJob], Any]) -> Callable[[BlockJob], Any]:
        def timed(job: BlockJob) -> Any:
            synchronize(self.hardware)
            began = time.perf_counter()
            made = work(job)
            synchronize(self.hardware)
            self.work.append(time.perf_counter() - began)
            return made

        return timed

    def heard(self, progress: Progress) -> None:
        if "seconds" not in progress.figures:  # of a block that is worked on
            return
        synchronize(self.hardware)
        self.ends.append(float(progress.figures["seconds"]))
        self.host.append(host_gb())

    def whole(self) -> list[float]:
        """Seconds of each block; the first holds the embedding of the streams."""
        return [b - a for a, b in zip([0.0, *self.ends], self.ends, strict=False)]


def swept(bench: Bench, stage: str, sequences: int, start: Path | None, folder: Path, blocks: int = 0) -> Watch:
    """One stage over the first blocks, with everything that a run does."""
    decoder = bench.decoder(blocks=blocks)
    scheme, seed = bench.scheme, 0
    watch = Watch([], [], [], bench.hardware)
    plan = SweepPlan(stage, stage != "ptq_init", variant=scheme.act_variant if stage == "act_quant" else "none", kv_bits=16)

    def work(job: BlockJob) -> Any:
        if stage == "ptq_init":
            return quantize_block(job, scheme, PtqInitConfig(), seed)
        assert start is not None
        state = load_block(start, job.index, "none")
        if stage == "weight_distill":
            return distill_block(job, state, scheme, WeightDistillConfig(epochs=2, batch_size=bench.batch), seed)
        return refine_block(job, state, replace(scheme, kv_bits=16), ActQuantConfig(epochs=1, batch_size=bench.batch), seed)

    shutil.rmtree(folder, ignore_errors=True)
    reset_peak(bench.hardware)
    sweep(decoder, bench.ids(sequences), watch.around(work), plan, Ledger(folder), bench.hardware, watch.heard, bench.store())
    return watch


def foretold(bench: Bench, stage: str, seconds: float, memory: float, context: Record) -> list[Record]:
    """Preflight's estimate of this sweep over what was measured: seconds, and memory of the device."""
    hardware = HardwareConfig(device=bench.hardware.device.type, streaming="on", hidden_tier=bench.tier, hidden_dtype=bench.dtype)
    config = RunConfig(
        dataset=DatasetConfig(sequences=max(bench.sequences, bench.calibration), seq_len=bench.tokens), scheme=bench.scheme, hardware=hardware,
        ptq_init=PtqInitConfig(sequences=bench.calibration), weight_distill=WeightDistillConfig(sequences=bench.sequences, epochs=2, batch_size=bench.batch),
        act_quant=ActQuantConfig(sequences=bench.sequences, epochs=1, batch_size=bench.batch),
    )  # fmt: skip
    shapes = architecture_shapes(bench.decoder().config, 0)
    on_gpu = bench.hardware.device.type == "cuda"
    rates = machine.rates(bench.hardware, shapes.hidden, shapes.ffn)
    found = estimate(config, shapes, rates, on_gpu)
    step = next(s for s in found.steps if s.step == stage)
    about = {k: v for k, v in context.items() if k != "tier"}
    made = [{"name": "total_s", "value": seconds, "unit": "s", "of": "all blocks and the making of the streams", **context}]
    if stage == "ptq_init":  # they are measured once
        made += [{"name": "rate", "value": value, "unit": "seconds" if what == "call" else "a second", "of": what, "shape": bench.shape} for what, value in vars(rates).items()]
    made += [{"name": "preflight_error", "value": step.seconds / seconds - 1, "unit": "estimate over measured, less 1", "of": "seconds", **about}]
    return made + ([{"name": "preflight_error", "value": step.device / 1e9 / memory - 1, "unit": "estimate over measured, less 1", "of": "device memory", **about}] if on_gpu else [])


def sweep_section(bench: Bench) -> Iterator[Record]:
    """Stages 1 to 3 over a few blocks, and the projection."""
    about = {"shape": bench.shape, "gpus": 1, "tier": bench.tier, "dtype": bench.dtype, "blocks": bench.blocks}
    hours = fixed = 0.0
    start: Path | None = None
    for stage, sequences in (("ptq_init", bench.calibration), ("weight_distill", bench.sequences), ("act_quant", bench.sequences)):
        folder = bench.scratch / stage
        watch = swept(bench, stage, sequences, start, folder)
        memory, allocated = peak_gb(bench.hardware), torch.cuda.max_memory_allocated() / 1e9
        tokens, whole, name = sequences * bench.tokens, watch.whole(), "stage1_s" if stage == "ptq_init" else "block_s"
        context = about | {"stage": stage, "tokens": tokens}
        seconds = projected = statistics.mean(whole[1:])
        setup = max(whole[0] - seconds, 0.0)
        if stage != "ptq_init":
            fixed = swept(bench, stage, FEW, start, bench.scratch / "few", 2).whole()[1]
            projected = fixed + (seconds - fixed) / (sequences - FEW) * (BUDGET / bench.tokens - FEW)
            yield ({"name": "fixed_s", "value": fixed, "unit": "s a block", "of": f"{FEW} sequences: reading, building, writing", **context})
            rate = (2 if stage == "weight_distill" else 1) * tokens / statistics.mean(watch.work[1:])
            yield ({"name": {"weight_distill": "stage2_tok_s", "act_quant": "stage3_tok_s"}[stage], "value": rate, "unit": "tokens/s", "of": "sweep", **context})
        yield from [
            {"name": name, "value": seconds, "unit": "s a block", "of": "all: reading, passes, training, error, writing", **context},
            {"name": "work_s", "value": statistics.mean(watch.work[1:]), "unit": "s a block", "of": "statistics and quantization" if stage == "ptq_init" else "training, with its batches copied from the store", **context},
            {"name": "slowest_block_s", "value": max(whole[1:]), "unit": "s", **context},
            {"name": "peak_gb", "value": memory, "unit": "GB", "of": "sweep", **context},
            {"name": "allocated_gb", "value": allocated, "unit": "GB", "of": "sweep, tensors alone", **context},
            {"name": "host_growth_gb", "value": (watch.host[-1] - watch.host[1]) / max(len(watch.host) - 2, 1), "unit": "GB a block", **context},
        ]
        yield ({"name": "setup_s", "value": setup, "unit": "s a stage", "of": "room for the streams, embedding", **context})
        if stage == "weight_distill":
            half = swept(bench, stage, sequences // 2, start, bench.scratch / "half", 2).whole()[1]
            yield ({"name": "linearity", "value": seconds / (2 * half - fixed), "unit": "time over fixed + twice the rest of half of the tokens", **context})
        yield from foretold(bench, stage, watch.ends[-1], memory, context)
        start, share = folder, (MODEL_BLOCKS * projected + setup * (1.0 if stage == "ptq_init" else BUDGET / tokens)) / 3600
        hours += share
        yield ({"name": "projected_hours", "value": share, "unit": "h", "budget_tokens": BUDGET, **context})
    yield ({"name": "projected_hours", "value": hours, "unit": "h", "stage": "all", "budget_tokens": BUDGET, "tokens": bench.sequences * bench.tokens, **about})


@torch.no_grad()
def store_section(bench: Bench) -> list[Record]:
    """Error of keeping hidden states in bf16 and fp8, and what it does to the output of the next block."""
    decoder = bench.decoder()
    n = min(8, bench.sequences)
    hidden = HiddenStates.of(decoder.embed(bench.ids(n)).to(bench.hardware.device))
    around = decoder.surroundings(hidden[slice(0, 1)])
    blocks = [decoder.blocks[i] for i in range(min(2, bench.blocks))]
    job = BlockJob(0, blocks[0], hidden, None, decoder, around, bench.hardware)
    advance(job, blocks[0], hidden, hidden)
    made: list[Record] = []
    for dtype in ("bf16", "fp8"):
        errors = {"state": 0.0, "block output": 0.0}
        energy = dict.fromkeys(errors, 0.0)
        for x in hidden.batches(passes(hidden)):
            kept = decode(encode(x, dtype))
            exact = job.run(blocks[-1], x)
            for what, a, b in (("state", kept, x), ("block output", job.run(blocks[-1], kept), exact)):
                errors[what] += float((a - b).double().square().sum())
                energy[what] += float(b.double().square().sum())
        made += [{"name": "store_rel_error", "value": (errors[w] / energy[w]) ** 0.5, "unit": "|error| / |value|", "of": w, "dtype": dtype, "shape": bench.shape, "gpus": 1} for w in errors]
    return made


def profile_section(bench: Bench) -> list[Record]:
    """Print the kernels of a step, longest first: stage 2 both ways, stage 3 (`frozen`)."""
    if bench.hardware.device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    for parameterization in ("nearest", "latent", "frozen"):
        step, _ = trained_block(bench, bench.shape, parameterization, bench.batch)
        for _ in range(3):
            step()
        synchronize(bench.hardware)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            for _ in range(4):
                step()
            synchronize(bench.hardware)
        print(f"kernels of 4 steps, {parameterization}")
        print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70), flush=True)
        del step
        release()
    return []


def heard_within(command: Sequence[str], seconds: float) -> tuple[int, str, str]:
    """Exit code and what a command says; after `seconds` it is asked to end (torchrun then ends its processes), and killed if it does not."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            said, complaint = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            running.terminate()
            try:
                said, complaint = running.communicate(timeout=LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                running.kill()
                said, complaint = running.communicate()
            complaint += f"\nnot done after {seconds:.0f} s"
    return running.returncode, said, complaint


def gpus_section(bench: Bench) -> list[Record]:
    """Data parallel training of one block in two processes, batch a GPU as on one (`bench_ranks.py`)."""
    if torch.cuda.device_count() < 2 and bench.shape != "tiny":
        print("gpus: this machine has fewer than two GPUs", flush=True)
        return []
    bench.decoder()  # written once, not by two processes
    about = {f.name: getattr(bench, f.name) for f in dataclasses.fields(bench) if f.name != "hardware"} | {"scratch": str(bench.scratch)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lbllm_core.bench_ranks", json.dumps(about)]
    code, said, complaint = heard_within(command, RANKS_SECONDS)
    found = [json.loads(line.removeprefix("STEP ")) for line in said.splitlines() if line.startswith("STEP ")]
    if code or len(found) != 1:
        raise LbllmError(f"two processes ended with {code}: {complaint[-1500:]}")
    (times,) = found
    context = {"shape": bench.shape, "gpus": 2, "parameterization": "nearest", "batch": bench.batch, "tokens_a_step": 2 * bench.batch * bench.tokens}
    return [
        {"name": "two_gpu_speedup", "value": 2 * times["alone"] / times["together"], "unit": "x", **context},
        {"name": "step_ms", "value": times["together"] * 1e3, "unit": "ms", "of": "two GPUs", **context},
        {"name": "step_ms", "value": times["alone"] * 1e3, "unit": "ms", "of": "one of them", **context, "gpus": 1, "tokens_a_step": bench.batch * bench.tokens},
    ]


WORK: Any = MappingProxyType({
    "step": step_section, "sweep": sweep_section, "step70b": step70b_section, "store": store_section, "gpus": gpus_section,
    "profile": profile_section,
})  # fmt: skip


def gpu_word() -> str:
    """`h200` of `NVIDIA H200`, `h100` of `NVIDIA H100 80GB HBM3`; `cpu` without a GPU."""
    words = torch.cuda.get_device_name(0).lower().split() if torch.cuda.is_available() else ["cpu"]
    return next((word for word in words if any(letter.isdigit() for letter in word)), words[-1])


def cells(records: Sequence[Record]) -> Cells:
    """One line a record."""
    lines = [["figure", "shape", "what", "value", "unit"]]
    for r in records:
        what = ", ".join(str(r[k]) for k in ("stage", "of", "parameterization", "tokens_a_step", "tokens", "dtype") if k in r)
        lines.append([r["name"], str(r.get("shape", "")), what, f"{r['value']:.4g}", r["unit"]])
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print one table last; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.bench_scale", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no section that would end later")
    parser.add_argument("--shape", choices=("llama2_7b", "tiny"), default="llama2_7b")
    parser.add_argument("--sequences", type=int, default=512, help="of 2048 tokens, for stages 2 and 3")
    parser.add_argument("--calibration", type=int, default=128, help="sequences of stage 1")
    parser.add_argument("--blocks", type=int, default=4, help="measured blocks and one before them; at least 3")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step")
    parser.add_argument("--tier", choices=("device", "host", "disk"), default="host", help="where hidden states lie")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp8"), default="bf16", help="how they are kept")
    parser.add_argument("--scratch", type=Path, help="folder for weights and streams (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="results file (default: results/scale_h200.json on an H200, and so on)")
    parser.add_argument("--again", action="store_true", help="measure sections that the file has already")
    chosen = parser.parse_args(arguments)
    try:
        return _measured(chosen, " ".join(sys.argv[1:] if arguments is None else arguments))
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _measured(chosen: argparse.Namespace, given: str) -> int:
    began = time.monotonic()
    names = chosen.only.split(",")
    unknown = sorted(set(names) - set(SECTIONS))
    if unknown:
        raise DataError(f"--only holds {', '.join(unknown)}; sections: {', '.join(SECTIONS)}")
    if chosen.blocks < 3 or chosen.sequences <= 2 * FEW:
        raise DataError(f"--blocks must be at least 3 and --sequences more than {2 * FEW}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and chosen.shape != "tiny":
        raise DataError("this machine has no usable GPU; --shape tiny rehearses the command without one")
    hardware = Hardware(torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32)
    out = chosen.out or Path("results") / f"scale_{gpu_word()}.json"
    out = out if chosen.shape != "tiny" or out.parent.name != "results" else Path(tempfile.gettempdir()) / "scale_rehearsal.json"
    done = {r.get("section") for r in read_results(out)["records"]} if out.exists() and not chosen.again else set()
    scratch = chosen.scratch or Path(tempfile.mkdtemp(prefix="lbllm-scale-"))
    tokens = 2048 if chosen.shape != "tiny" else 64
    bench = Bench(chosen.shape, hardware, scratch, tokens, chosen.sequences, chosen.calibration, chosen.batch, chosen.blocks, chosen.tier, chosen.dtype)
    failed: list[str] = []
    try:
        for name in (n for n in SECTIONS if n in names):
            if name in done:
                print(f"{name}: measured already ({out}); --again measures it anew", flush=True)
                continue
            if time.monotonic() - began + (SECONDS[name] if on_gpu else 0) > 60 * chosen.minutes:
                print(f"{name}: not begun, --minutes {chosen.minutes:g} leaves no time for it; the same command goes on with it", flush=True)
                continue
            started = time.monotonic()
            records: list[Record] = []
            try:
                for record in WORK[name](bench):
                    records.append({**record, "section": name})
            except (LbllmError, RuntimeError, TypeError, ValueError) as error:  # the other sections are still worth their time
                failed.append(name)
                print(f"{name}: FAILED, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", file=sys.stderr, flush=True)
                if not isinstance(error, LbllmError):
                    traceback.print_exc()
                records = [{**r, "section": f"{name}, not finished"} for r in records]  # kept, and measured again by the next call
            release()
            if records:
                mine = (name, f"{name}, not finished")
                write_results(out, f"python -m lbllm_core.bench_scale {given}".strip(), records, keep=lambda r, mine=mine: r.get("section") not in mine)  # type: ignore[misc]
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
            if name != "profile" and records:
                print(plain(cells(records)), flush=True)
    finally:
        if not chosen.scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    if out.exists():
        print(f"\n{out}, {json.dumps(read_results(out)['device'])}")
        print(plain(cells(read_results(out)["records"])))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
