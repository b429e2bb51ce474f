"""MLflow's store locked or down while a run writes into it: the run goes on, and its entries arrive later, in order.

The store is an sqlite file. It is locked as another program would lock it, taken away (a folder lies where the file was), or made
unreadable; from the start or from the middle, until the end or for a while.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import RUN, Bench, Trial

CURVE = "stage4/loss"


def trials(bench: Bench) -> Iterator[Trial]:
    """Each harm once."""
    yield _trial(bench, "locked from start to end", _locked, 0, None)
    yield _trial(bench, "locked from the first block to the end", _locked, 1, None)
    yield _trial(bench, "locked for twenty seconds", _locked, 1, 20.0)
    yield _trial(bench, "gone from start to end", _gone, 0, None)
    yield _trial(bench, "unreadable from the first block to the end", _unreadable, 1, None)


def _trial(bench: Bench, what: str, harm: Callable[[Path], contextlib.AbstractContextManager[None]], units: int, seconds: float | None) -> Trial:
    trial = Trial("mlflow store", what)
    bench.clear()
    before = set(bench.rows())
    run = None
    if units:
        run = bench.start(*RUN)
        bench.wait_for_units(run, units)
    with harm(bench.home / "mlflow.db"):
        run = run or bench.start(*RUN)
        if seconds:
            time.sleep(seconds)
        else:
            run.wait()
    code = run.wait()
    trial.expect(code == 0, f"the run ended with {code}: {run.output[-600:]}")
    trial.expect("Traceback" not in run.output, f"a traceback: {run.log}")
    bench.equals_reference(trial)
    if not seconds:
        trial.expect("the run goes on" in run.output, f"no word of the store: {run.output[-600:]}")
        trial.expect("go in with the next run" in run.output, "no word of what is kept")
    bench.same_again(trial, {})  # the next run delivers
    trial.expect(not list((bench.home / "mlflow-pending").glob("*.json")), "entries are still waiting")
    new = {run_id: state for run_id, state in bench.rows().items() if run_id not in before}
    trial.expect(set(new.values()) == {"FINISHED"}, f"states of the rows: {sorted(new.values())}")
    curves = [curve for curve in (bench.history(run_id, CURVE) for run_id in new) if curve]
    trial.expect(len(curves) >= 1, f"{CURVE} has not arrived")
    for curve in curves:
        steps, times = [point[0] for point in curve], [point[1] for point in curve]
        trial.expect(len(set(steps)) == len(steps) == 4, f"{CURVE} has the steps {steps}")
        trial.expect(steps == sorted(steps) and times == sorted(times), f"{CURVE} is out of order: {curve}")
    return trial


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(store, timeout=30, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        yield
        holder.execute("ROLLBACK")


@contextlib.contextmanager
def _gone(store: Path) -> Iterator[None]:
    aside = store.with_name("aside.db")
    store.rename(aside)
    store.mkdir()
    yield
    store.rmdir()
    aside.rename(store)


@contextlib.contextmanager
def _unreadable(store: Path) -> Iterator[None]:
    """The bytes of the file are garbage for the time being; what was written before comes back."""
    aside = store.with_name("aside.db")
    store.rename(aside)
    store.write_bytes(b"this is no database " * 500)
    yield
    store.unlink()
    aside.rename(store)
