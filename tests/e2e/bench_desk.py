"""How long the desk takes when it is full: `make bench-desk`, with RECORD=1 into results/desk.json.

A home of its own gets 200 runs in MLflow's store, each with 500 metrics (500 names; curves come on top), its configuration, and what
its steps keep: curves of 30 blocks, histograms, sample texts. Then, each in a fresh process as a person would start it:

    desk_compare_s      `make compare`: all of it, from the command to the written page
    desk_read_s         of it, the reading of the runs from the store
    desk_page_s         of it, the making of the HTML page
    desk_write_s        one run of 500 metrics and its files into the store, as a run does it (mean)

The store is written through the same code as by a run. `--time-left` also works through stages 1 and 2 of SmolLM2's 30 blocks with few
tokens, and compares the time left that was told after two blocks with the time that it took: `time_left_error`, relative.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.compose import compose
from lbllm_core.config import RunConfig, config_to_dict
from lbllm_core.engine.artifacts import run_step
from lbllm_core.engine.progress import Progress
from lbllm_core.engine.terminal import Clock
from lbllm_core.pipeline import SPECS, facts
from lbllm_core.report.records import write_results
from tasks.tracking import Entries, deliver, row_digest

RUNS, METRICS, BLOCKS = 200, 500, 30
EXPERIMENTS = ("embedded", "ablation_wat_levels", "ablation_wat_all", "ablation_aar_none", "ablation_aar_clips", "ablation_stages_init", "ablation_levels_explicit_g64", "ablation_kv4")
INSIDE = """
import sys, time
from pathlib import Path
from flows import compare, lab_book
home = Path(sys.argv[1])
began = time.perf_counter(); rows = lab_book.read_rows(home); read = time.perf_counter()
page = compare.html_page(rows, "all", home); done = time.perf_counter()
print(len(rows), read - began, done - read, len(page))
"""


def fill(home: Path, runs: int) -> float:
    """Write the runs; mean seconds of one."""
    chance = random.Random(0)
    began = time.perf_counter()
    for number in range(runs):
        config = replace(RunConfig(experiment=EXPERIMENTS[number % len(EXPERIMENTS)], seed=number // len(EXPERIMENTS)), model=replace(RunConfig().model, name="smollm2_135m"))
        deliver(home, one_run(home, config, chance, number))
    return (time.perf_counter() - began) / runs


def one_run(home: Path, config: RunConfig, chance: random.Random, number: int) -> Entries:
    """The entries of a run as its lab book would hold them."""
    folder = home / "made" / str(number)
    kept = {"weight_distill": {"curves.json": curves(chance)}, "act_quant": {"curves.json": curves(chance), "activations.json": activations(chance)}, "pack_and_benchmark": {"samples.json": [{"prompt": "a", "teacher": "b", "packed": "c"}] * 3}}
    figures = final_figures(chance)
    names = [*figures, *(f"size/bpw_part_{i:03d}" for i in range(METRICS - len(figures)))]
    now = time.time_ns() // 1_000_000
    points = [[name, figures.get(name, chance.random()), now, 0] for name in names]
    points += [[f"stage2/{name}", y, now, x + 1] for name, values in kept["weight_distill"]["curves.json"].items() for x, y in values if isinstance(x, int)]
    events: list[dict[str, Any]] = [
        {"kind": "params", "content": {"model.name": config.model.name, "experiment": config.experiment, "scheme.name": config.scheme.name, "seed": str(config.seed)}},
        {"kind": "tags", "content": {"lbllm.model": config.model.name, "lbllm.artifact.weight_distill": f"weight_distill/{number:016x}"}},
        {"kind": "text", "content": {"name": "config.json", "content": json.dumps(config_to_dict(config))}},
        {"kind": "metrics", "content": points},
    ]
    for step, files in kept.items():
        for name, content in files.items():
            path = folder / step / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
            events.append({"kind": "file", "content": {"path": str(path), "folder": f"steps/{step}"}})
    events.append({"kind": "status", "content": "FINISHED"})
    return Entries(config.tracking.experiment, row_digest(config), f"run {number}", events=events)


def final_figures(chance: random.Random) -> dict[str, float]:
    ppl = 25 + 30 * chance.random()
    found = {"eval/ppl_embedded_16k": ppl, "eval/ppl_embedded_16k_stderr": ppl / 20, "teacher/eval/ppl_embedded_16k": 19.0, "eval/acc_piqa_n200": 0.6, "eval/acc_stderr_piqa_n200": 0.03, "teacher/eval/acc_piqa_n200": 0.64}
    found |= {"size/effective_bpw": 2.2 + chance.random(), "size/disk_mb": 94.0, "speed/decode_tok_s": 90.0}
    return found | {f"minutes/{step}": 1.0 + chance.random() for step in ("ptq_init", "weight_distill", "act_quant", "end_to_end")}


def curves(chance: random.Random) -> dict[str, list[list[float]]]:
    by_block = {name: [[i, 0.1 + 0.2 * chance.random()] for i in range(BLOCKS)] for name in ("error_before", "error_after", "block_rel_mse", "loss_before", "loss_after")}
    return {**by_block, "loss": [[i + (k + 1) / 8, chance.random()] for i in range(BLOCKS) for k in range(8)]}


def activations(chance: random.Random) -> dict[str, Any]:
    site = {"counts": [int(3000 * math.exp(-abs(i - 40) / 8)) for i in range(80)], "searched": [1.0, 1.0, 0.25, 0.25], "learned": [0.9, 0.9, 0.3, 0.3]}
    return {"blocks": [dict.fromkeys(("qkv", "o", "gate_up", "down"), site)] * BLOCKS}


def compare_times(home: Path) -> dict[str, float]:
    """Seconds of the command, and inside a second fresh process of its two parts."""
    environment = os.environ | {"LBLLM_HOME": str(home)}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "flows.compare"], env=environment, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - began
    told = subprocess.run([sys.executable, "-c", INSIDE, str(home)], env=environment, check=True, capture_output=True, text=True).stdout.split()
    assert int(told[0]) == RUNS, told
    print(f"the page has {int(told[3]) / 1e6:.1f} MB")
    return {"desk_compare_s": whole, "desk_read_s": float(told[1]), "desk_page_s": float(told[2])}


def time_left_errors(home: Path) -> dict[str, float]:
    """For stages 1 and 2 over 30 blocks: how far the time left that was told after two blocks was from the time that it took."""
    few = ["dataset.sequences=8", "dataset.seq_len=256", "ptq_init.sequences=8", "weight_distill.sequences=8", "act_quant.sequences=8"]
    config = compose(["experiment=embedded", *few])
    errors, inputs = {}, {}
    for step in ("ptq_init", "weight_distill"):
        clock, told = Clock(time.monotonic()), dict[str, float]()

        def hear(progress: Progress, clock: Clock = clock, told: dict[str, float] = told) -> None:
            now = time.monotonic()
            left = clock.left(progress, now)
            if progress.units == 2 and left is not None:
                told.setdefault("left", left)
                told.setdefault("at", now)
            told["last"] = now

        handle = run_step(SPECS[step], config, inputs, home, hear, facts(SPECS[step], config, home))
        inputs = {"student": handle}
        took = told["last"] - told["at"]
        errors[step] = abs(told["left"] - took) / took
        print(f"{step}: told {told['left']:.1f} s after two blocks, took {took:.1f} s")
    return errors


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time the desk with 200 runs in the store.")
    parser.add_argument("--record", type=Path, help="results file to write")
    parser.add_argument("--time-left", action="store_true", help="also check the time left that stages 1 and 2 tell")
    chosen = parser.parse_args()
    context = {"runs": RUNS, "metrics_a_run": METRICS}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        wrote = fill(home, RUNS)
        figures = compare_times(home) | {"desk_write_s": wrote}
        records: list[dict[str, Any]] = [{"name": name, "value": value, "unit": "s", **context} for name, value in figures.items()]
        if chosen.time_left:
            records += [{"name": "time_left_error", "value": value, "unit": "1", "step": step, "model": "smollm2_135m", "after_blocks": 2} for step, value in time_left_errors(home).items()]
    for record in records:
        print(f"{record['name']:16s} {record['value']:.3f} {record['unit']} {record.get('step', '')}")
    if chosen.record:
        write_results(chosen.record, "make bench-desk RECORD=1", records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
