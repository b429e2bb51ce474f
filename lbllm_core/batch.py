"""Several runs side by side on one device: `python -m lbllm_core.batch --jobs 4 --record results/method.json run1.json run2.json`.

A small model does not fill a large GPU: its kernels take microseconds and the processor is what one waits for. So a few runs
share it, each in a process of its own (several GPUs are filled evenly), all with one home folder: steps that two runs have in common are done once (the second
waits at the step's lock and reuses it). A configuration file is what `make config ARGS=...` prints.

Every run has a log in `<home>/logs`; its rows are recorded as soon as it ends, and what it scored for zero-shot tasks (`evaluation.requests`) is
put beside the record. Files of a run are called like its configuration, so two configurations of one name are refused. `--set` changes a field in all runs.
`--minutes` ends the batch early: what is finished is kept, and the same command goes on from there. Exit code 1 when a run failed or had to be stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lbllm_core.engine.artifacts import home_folder, prepare_home
from lbllm_core.errors import ConfigError, LbllmError
from lbllm_core.report.method import same_row
from lbllm_core.report.records import Record, circumstances, read_results, write_results
from lbllm_core.report.score_records import collect_scores, scores_folder
from lbllm_core.report.tables import pivot, plain

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One run: its configuration file, where its words and its rows go, and what is changed in its configuration."""

    config: Path
    log: Path
    rows: Path
    overrides: tuple[str, ...] = ()


def check(configs: Sequence[Path]) -> None:
    """Refuse what would start in vain: files that are no JSON, and two that are one run by name. Raises ConfigError with every problem."""
    problems = []
    for i, path in enumerate(configs):
        twin = next((other for other in configs[:i] if other.stem == path.stem), None)
        if twin is not None and twin.resolve() == path.resolve():
            problems.append(f"{twin} and {path} are one file, given twice; leave one out")
        elif twin is not None:
            problems.append(f"{twin} and {path}: a run's log and rows are called like its file, and both would be {path.stem!r}; rename one")
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path} cannot be read as JSON ({error}); write it again: make config ARGS='...' > {path}")
    if problems:
        raise ConfigError(problems)


def start(job: Job, home: Path, gpu: int | None) -> subprocess.Popen[bytes]:
    """The run as a process that sees one GPU (None: as this process does); what it says goes into the log."""
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    job.rows.unlink(missing_ok=True)
    shutil.rmtree(scores_folder(job.rows), ignore_errors=True)
    with job.log.open("wb") as log:
        command = [sys.executable, "-m", "lbllm_core.run", "--config", str(job.config), "--home", str(home), "--record", str(job.rows), *job.overrides]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | seen)


def run_all(jobs: Sequence[Job], home: Path, at_once: int, seconds: float, ended: Callable[[Job], object] = lambda _: None) -> dict[str, str]:
    """Run them, `at_once` at a time, spread over the GPUs, for at most `seconds` in all; `ended` is told of each that did. What became of each, by its file's name."""
    waiting, running, outcome = list(jobs), dict[Path, tuple[Job, subprocess.Popen[bytes], float]](), dict[str, str]()
    gpus = torch.cuda.device_count()
    places = dict[Path, int]()  # running job -> GPU
    began = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once and time.monotonic() - began < seconds:
                job = waiting.pop(0)
                taken = [places[path] for path in running if path in places]
                gpu = min(range(gpus), key=taken.count) if gpus > 1 else None
                if gpu is not None:
                    places[job.config] = gpu
                running[job.config] = (job, start(job, home, gpu), time.monotonic())
            if time.monotonic() - began >= seconds:
                break
            time.sleep(POLL_SECONDS)
            for path, (job, process, since) in list(running.items()):
                if process.poll() is not None:
                    del running[path]
                    outcome[path.stem] = _end(process.returncode, job.log)
                    print(f"{path.stem}: {outcome[path.stem]}, {time.monotonic() - since:.0f} s", flush=True)
                    ended(job)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    stopped = [job.config.stem for job, _, _ in running.values()] + [job.config.stem for job in waiting]
    return outcome | dict.fromkeys(stopped, "stopped: the time was over; the same command goes on from here")


def _end(code: int, log: Path) -> str:
    if code < 0:
        return f"failed: killed by signal {-code}; the last it said: {_last_words(log)}"
    return "done" if code == 0 else f"failed: {_last_words(log)}"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def collect(jobs: Sequence[Job], record: Path, command: str) -> list[Record]:
    """Put the rows of the finished runs into the results file, in place of older ones of the same runs. Date, commit, device and versions stay those of each run."""
    read = [read_results(job.rows) for job in jobs if job.rows.exists()]
    found = [{**r, "measured": circumstances(content, r) | {"command": command}} for content in read for r in content["records"]]
    collect_scores([job.rows for job in jobs if job.rows.exists()], record)
    found = [r for i, r in enumerate(found) if not any(same_row(r, later) for later in found[i + 1 :])]
    if found:
        write_results(record, command, found, keep=lambda old: not any(same_row(old, new) for new in found))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.batch", description="Run several configurations side by side on one device.")
    parser.add_argument("configs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many minutes")
    parser.add_argument("--home", type=Path, help="home folder for artifacts (default: LBLLM_HOME, else .lbllm)")
    parser.add_argument("--record", type=Path, required=True, help="results file to add the rows to")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change a field in every run; may be repeated")
    chosen = parser.parse_args(arguments)
    try:
        check(chosen.configs)
        home = prepare_home(chosen.home) if chosen.home else home_folder()
        logs = home / "logs"
        logs.mkdir(exist_ok=True)
        jobs = [Job(path, logs / f"{path.stem}.log", logs / f"{path.stem}.rows.json", tuple(chosen.set)) for path in chosen.configs]
        names = [path.name for path in chosen.configs]
        command = f"python -m lbllm_core.batch {' '.join(names[:3])}{f' ... ({len(names)} runs)' if len(names) > 3 else ''}"
        outcome = run_all(jobs, home, max(1, chosen.jobs), 60 * chosen.minutes, lambda job: collect([job], chosen.record, command))
        began = [job for job in jobs if not outcome[job.config.stem].startswith("stopped")]  # a job that did not begin may have rows of an earlier batch
        records = collect(began, chosen.record, command)
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename or 'a file of the batch'}: {error.strerror or error}; mend that, and the same command goes on from there", file=sys.stderr)
        return 1
    shown = [r for r in records if r["name"].startswith("ppl_") and not r["name"].endswith("_stderr")]
    if shown:
        print(plain(pivot(shown, ("experiment", "scheme", "control", "act_variant", "kv_bits", "seed", "row"), "name")))
    for name, end in outcome.items():
        print(f"{name}: {end}")
    return int(any(end != "done" for end in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
