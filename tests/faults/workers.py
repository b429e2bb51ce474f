"""A sweep by two workers of a work pool, over Postgres: a worker is killed with all its programs, and the sender is killed.

What stands for the second machine is a second worker; killed with its flow, and the companion that would tell of its death, it is
gone as a machine is. Judged by an undisturbed sweep of the same cells, one after the other, on another home with sqlite.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from bench import SMALL, STUCK, Bench, Program, Trial, kill, outcome
from postgres import Postgres, postgres

SHARED = [o for o in SMALL if o != "model=tiny"]
POOL = ("--pool", "lbllm")
PATIENCE = 600.0


def trials(bench: Bench) -> Iterator[Trial]:
    """A worker, then the sender."""
    with postgres("prefect", "mlflow") as server:
        bench.clear()
        quiet = _sweep(bench, "undisturbed", "0,1,2,3,4,5")
        code = quiet.wait(PATIENCE)
        assert code == 0, quiet.output
        home = bench.home.parent / "shared home"
        shared = Bench(home, bench.home / "models")
        with _variables(PREFECT_API_DATABASE_CONNECTION_URL=server.url("prefect", "+asyncpg"), MLFLOW_BACKEND_STORE_URI=server.url("mlflow", "+psycopg2")):
            try:
                shared.up()
                yield _worker_killed(shared, bench, server)
                yield _sender_killed(shared, bench, server)
            finally:
                shared.down()


def _worker_killed(shared: Bench, bench: Bench, server: Postgres) -> Trial:
    trial = Trial("workers", "one of two is killed with its flow half-way through four cells")
    first, second = _worker(shared), _worker(shared)
    try:
        sweep = _sweep(shared, "by-workers", "0,1,2,3", *POOL)
        block = _wait_for_half_a_step(first, sweep)
        trial.expect(block is not None, f"no step of the first worker was half-way: {sweep.output[-600:]}")
        kill(_all_of(first))
        since, kept = time.monotonic(), shared.finished_files()
        while "was lost with" not in sweep.output and sweep.process.poll() is None and time.monotonic() - since < PATIENCE:
            time.sleep(0.5)
        found = time.monotonic() - since
        trial.what += f"; found after {found:.0f} s"
        trial.expect(found <= STUCK, "it took longer than two minutes to find the lost cell")
        code = sweep.wait(PATIENCE)
        trial.expect(code == 0, f"the sweep ended with {code}: {sweep.output[-800:]}")
        trial.expect("Traceback" not in sweep.output, f"a traceback: {sweep.log}")
        if block is not None:
            trial.expect(f"continues the unfinished {block.name}" in second.output, "the other worker did not go on from the last finished block")
        _written_again(trial, kept)
        _same(trial, shared, bench, 4)
        _nothing_open(trial, shared, server, "by-workers", 4, {"COMPLETED": 4, "CRASHED": 1})
        _no_password(trial, shared, server)
    finally:
        _stop(trial, first, second)
    return trial


def _sender_killed(shared: Bench, bench: Bench, server: Postgres) -> Trial:
    trial = Trial("workers", "the sender is killed while a worker has a cell; the same command finds it")
    worker = _worker(shared)
    try:
        sweep = _sweep(shared, "by-one", "4,5", *POOL)
        block = _wait_for_half_a_step(worker, sweep)
        trial.expect(block is not None, f"no step was half-way: {sweep.output[-600:]}")
        kill(_all_of(sweep))
        kept = shared.finished_files()
        again = _sweep(shared, "by-one", "4,5", *POOL)
        code = again.wait(PATIENCE)
        trial.expect(code == 0, f"the sweep ended with {code}: {again.output[-800:]}")
        trial.expect("2 of them from before" in again.output, f"the runs were sent twice: {again.output[-800:]}")
        trial.expect("Traceback" not in again.output, f"a traceback: {again.log}")
        _written_again(trial, kept)
        _same(trial, shared, bench, 6)
        _nothing_open(trial, shared, server, "by-one", 2, {"COMPLETED": 2})
    finally:
        _stop(trial, worker)
    return trial


def _sweep(bench: Bench, name: str, seeds: str, *options: str) -> Program:
    return bench.start("-m", "flows.sweep", "--models", "tiny", "--seeds", seeds, "--sweep", name, *options, "--overrides", *SHARED)


def _worker(bench: Bench) -> Program:
    program = bench.start("-m", "flows.worker")
    deadline = time.monotonic() + STUCK
    while "started!" not in program.output and program.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert "started!" in program.output, program.output
    return program


def _all_of(program: Program) -> list[psutil.Process]:
    """A program and everything below it, the companions too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(program.process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _wait_for_half_a_step(worker: Program, sweep: Program) -> Path | None:
    """The folder of a step of stage 2 that a process of the worker holds, once its first block is finished and it is not."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and sweep.process.poll() is None:
        for process in _all_of(worker):
            with contextlib.suppress(psutil.Error):
                for file in process.open_files():
                    folder = Path(file.path.removesuffix(".lock"))
                    if folder.parent.name == "weight_distill" and (folder / "block_000.json").exists() and not (folder / "block_001.json").exists():
                        return folder
        time.sleep(0.02)
    return None


def _stop(trial: Trial, *workers: Program) -> None:
    """Stop the workers that live as a service manager would: they end by themselves, and nothing of theirs is left."""
    for worker in workers:
        everything = _all_of(worker)
        worker.process.terminate()
        trial.expect(worker.wait(60) != 999, "a worker did not stop within a minute")
        left = [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        trial.expect(not left, f"{len(left)} processes of a worker are left")
        kill(left)


def _written_again(trial: Trial, kept: dict[Path, int]) -> None:
    lost = [path for path, written in kept.items() if not path.exists() or path.stat().st_mtime_ns != written]
    trial.expect(not lost, f"{len(lost)} of {len(kept)} finished files were written again or are gone, the first is {lost[0] if lost else ''}")


def _same(trial: Trial, shared: Bench, bench: Bench, count: int) -> None:
    """Every cell has come to what it comes to undisturbed: the digest of every step, and every perplexity."""
    mine = {path.parent.name: outcome(json.loads(path.read_text())) for path in (shared.home / "results").glob("*/result.json")}
    theirs = {path.parent.name: outcome(json.loads(path.read_text())) for path in (bench.home / "results").glob("*/result.json")}
    trial.expect(len(mine) == count, f"{len(mine)} results for {count} cells")
    different = [name for name, value in mine.items() if not value or value != theirs.get(name)]
    trial.expect(not different, f"{len(different)} of {count} cells differ from the undisturbed sweep: {different}")


def _nothing_open(trial: Trial, shared: Bench, server: Postgres, sweep: str, rows: int, runs: dict[str, int]) -> None:
    """MLflow has one finished row a cell, and Prefect these runs and none that is open."""
    query = f"SELECT r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid WHERE t.key = 'lbllm.sweep' AND t.value = '{sweep}'"
    states = [str(row[0]) for row in server.rows("mlflow", query)]
    trial.expect(states == ["FINISHED"] * rows, f"MLflow's rows: {states}")
    found: dict[str, int] = {}
    for run in _flow_runs(shared, sweep):
        found[run["state"]["type"]] = found.get(run["state"]["type"], 0) + 1
    trial.expect(found == runs, f"Prefect's runs: {found}")


def _flow_runs(shared: Bench, sweep: str) -> list[dict[str, Any]]:
    body = json.dumps({"flow_runs": {"tags": {"all_": [sweep]}}}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{shared.stack.prefect}/api/flow_runs/filter", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        found: list[dict[str, Any]] = json.loads(reply.read())
    return found


def _no_password(trial: Trial, shared: Bench, server: Postgres) -> None:
    """The database's password is in no file of the home, in no output, and on no command line."""
    files = [p for p in (*shared.home.rglob("*"), *(shared.home.parent / f"{shared.home.name}-output").glob("*")) if p.is_file()]
    told = [str(file) for file in files if server.password.encode() in file.read_bytes()]
    trial.expect(not told, f"the database's password is written in {told[:3]}")
    for process in psutil.process_iter(["cmdline"]):
        trial.expect(server.password not in " ".join(process.info["cmdline"] or ()), f"the database's password is on the command line of {process.pid}")


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Environment variables for the time being, for everything that is started."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
