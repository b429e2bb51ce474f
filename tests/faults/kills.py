"""SIGKILL at seeded moments over the whole flow: its process, the process that serves the deployments, Prefect's server.

A moment is `after the n-th finished unit of work (a block, a checkpoint, a step), and so many seconds later`, both drawn from the seed;
n = 0 is the time before the first one, in which programs start.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator

import psutil
from bench import RUN, SMALL, STUCK, Bench, Program, Trial, family, kill

STARTING = 12.0  # seconds before the first unit of work
BETWEEN = 0.5


def trials(bench: Bench, moments: int, seed: int = 0) -> Iterator[Trial]:
    """`moments` kills, the victims by turns, alone and with their programs by turns; what Prefect says of a run that died with all its programs is looked at later, at the end."""
    left: list[tuple[Trial, float, set[str]]] = []
    for number in range(moments):
        victim = ("flow", "runner", "server")[number % 3]
        rng = random.Random(seed * 1000 + number)
        units = rng.randrange(bench.units)
        delay = rng.uniform(0.0, BETWEEN if units else STARTING)
        trial = Trial(f"kill {victim}", f"moment {number}: {delay:.2f} s after unit {units} of {bench.units}")
        try:
            {"flow": _flow, "runner": _runner, "server": _server}[victim](bench, trial, number // 3 % 2 == 0, units, delay, left)
        except Exception as error:  # a trial that cannot be carried out is a failure too
            trial.complaints.append(f"{type(error).__name__}: {error}")
        yield trial
    for trial, since, runs in left:
        while runs & set(bench.prefect_running()) and time.monotonic() - since < STUCK:
            time.sleep(1)
        late = Trial(f"kill {trial.kind.split()[1]}", f"Prefect's page two minutes after {trial.what}")
        late.expect(not runs & set(bench.prefect_running()), "Prefect calls the run running")
        yield late


def _arrive(bench: Bench, run: Program, units: int, delay: float) -> bool:
    there = bench.wait_for_units(run, units)
    time.sleep(delay)
    return there and run.process.poll() is None


def _flow(bench: Bench, trial: Trial, alone: bool, units: int, delay: float, left: list[tuple[Trial, float, set[str]]]) -> None:
    """The flow's own process, or that and the command that a person typed."""
    bench.clear()
    run = bench.start(*RUN)
    trial.expect(_arrive(bench, run, units, delay), "the run had ended before its moment")
    flow = run.child("flows.once")
    alone = flow is not None and alone
    open_before = set(bench.prefect_running())
    kill([flow] if alone and flow is not None else family(run.process.pid))
    since, kept = time.monotonic(), bench.finished_files()
    code = run.wait(60)
    if alone:
        trial.what += ", the flow's process alone"
        trial.expect(code == 1, f"exit code {code}")
        trial.expect("signal 9" in run.output and "the same command goes on" in run.output, f"no word of the kill: {run.output[-300:]}")
        trial.expect("Traceback" not in run.output, "a traceback")
    bench.nothing_runs(trial, since, prefect=alone)
    if not alone and open_before:
        left.append((trial, since, open_before))
    rows = bench.rows()
    bench.same_again(trial, kept)
    trial.expect(len(bench.rows()) - len(rows) <= 1, "the rerun made more than one row")
    trial.expect(set(bench.rows().values()) <= {"FINISHED"} or units == 0, f"rows that did not go on: {bench.rows()}")


def _deploy(bench: Bench) -> Program:
    overrides = json.dumps([o for o in SMALL if o != "model=tiny"])
    return bench.start("-m", "prefect", "deployment", "run", "lbllm/full-pipeline", "-p", "model=tiny", "-p", f"overrides={overrides}", "--watch")


def _runner(bench: Bench, trial: Trial, alone: bool, units: int, delay: float, left: list[tuple[Trial, float, set[str]]]) -> None:
    """The process that serves the deployments, alone or with the runs it has started."""
    bench.clear()
    run = _deploy(bench)
    trial.expect(_arrive(bench, run, units, delay), "the run had ended before its moment")
    runner = bench.stack.pids()["deployment"]
    trial.what += ", alone" if alone else ", with its runs"
    kill([psutil.Process(runner)] if alone else family(runner))
    since, kept = time.monotonic(), bench.finished_files()
    if not alone:
        bench.nothing_runs(trial, since, prefect=False)
    code = run.wait(STUCK + 60)
    trial.expect(code != 999, "`--watch` did not end within three minutes")
    trial.expect(alone or units == 0 or code == 1, f"`--watch` ended with {code}")
    bench.nothing_runs(trial, time.monotonic() - STUCK + 5, prefect=False)
    bench.up()
    bench.same_again(trial, kept, _deploy(bench))


def _server(bench: Bench, trial: Trial, alone: bool, units: int, delay: float, left: list[tuple[Trial, float, set[str]]]) -> None:
    """Prefect's server, with all its programs, while a run talks to it: the run itself starts it again and goes on."""
    bench.clear()
    run = bench.start(*RUN)
    trial.expect(_arrive(bench, run, units, delay), "the run had ended before its moment")
    kill(family(bench.stack.pids()["prefect"]))
    kept = bench.finished_files()
    code = run.wait()
    trial.expect(code == 0, f"the run ended with {code}: {run.output[-600:]}")
    trial.expect("server is gone" in run.output, f"no word of the server's end: {run.output[-300:]}")
    bench.equals_reference(trial)
    bench.nothing_runs(trial, time.monotonic() - STUCK + 10, prefect=True)
    bench.same_again(trial, kept)
