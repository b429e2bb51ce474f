"""The fault suite: `make test-faults`. Harm on purpose, on a real stack with `tiny`, and what is left of a run afterwards.

    python tests/faults/suite.py [--only KIND,...] [--moments 20] [--record results/faults.json]

Prints a line a trial; ends with 1 when one failed (zero are allowed). What this machine cannot do (mount, libfaketime, Postgres) is skipped with its
reason. SIGTERM lets the trial at work end and records what was done. `--record` writes trials and failures by kind, in place of earlier ones of the same kinds; each carries the commit it was made at.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bad_inputs
import clock
import damage
import disk
import install
import kills
import store
import sweeps
import workers
from bench import Bench, Skipped, Trial

from lbllm_core.report.records import commit, write_results

COMMAND = "make test-faults"


def groups(bench: Bench, moments: int) -> dict[str, Callable[[], Iterator[Trial]]]:
    """What can be asked for, in the order in which it runs."""
    return {
        "install": lambda: install.trials(bench),
        "damage": lambda: damage.trials(bench),
        "store": lambda: store.trials(bench),
        "sweeps": lambda: sweeps.trials(bench),
        "workers": lambda: workers.trials(bench),
        "disk": lambda: disk.trials(bench),
        "clock": lambda: clock.trials(bench),
        "kill": lambda: kills.trials(bench, moments),
    }


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="groups, separated by commas: install, damage, store, sweeps, workers, disk, clock, kill, inputs")
    parser.add_argument("--moments", type=int, default=20, help="kills over the whole flow")
    parser.add_argument("--record", type=Path, help="write trials and failures into this results file")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the trials")
    chosen = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="lbllm-faults-"))
    print(f"trials in {place}", flush=True)
    only = [name for name in chosen.only.split(",") if name]
    found: list[Trial] = []
    made_at = commit()
    skipped: dict[str, str] = {}
    bench = Bench(place / "home")
    enough = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: enough.set())
    try:
        if only != ["inputs"] and only != ["install"]:
            bench.up()
            bench.refer()
            print(f"undisturbed: {bench.units} units of work", flush=True)
        for name, trials in groups(bench, chosen.moments).items():
            if (only and name not in only) or enough.is_set():
                continue
            began = time.monotonic()
            try:
                for trial in trials():
                    found.append(trial)
                    print(f"{'FAILED' if trial.complaints else 'ok':7} {trial.kind}: {trial.what} ({time.monotonic() - began:.0f} s)", flush=True)
                    for complaint in trial.complaints:
                        print(f"        {complaint}", flush=True)
                    began = time.monotonic()
                    if enough.is_set():
                        break
            except Skipped as reason:
                skipped[name] = str(reason)
                print(f"skipped {name}: {reason}", flush=True)
            except Exception as error:  # a suite that breaks is a failure, and keeps what it found
                found.append(Trial(name, "the trial itself", [f"{type(error).__name__}: {error}"]))
                print(f"FAILED  {name}: the trial itself: {error}", flush=True)
    finally:
        bench.down()
        if not chosen.keep and not any(t.complaints for t in found):
            shutil.rmtree(place, ignore_errors=True)
    failures = sum(bool(t.complaints) for t in found)
    print(f"{len(found)} trials, {failures} failures")
    records = fault_records(found, skipped)
    if not only or "inputs" in only:
        inputs, wrong = bad_inputs.records()
        records, failures = records + inputs, failures + wrong
    if chosen.record and records:
        kinds = {record["kind"] for record in records} | set(skipped)
        write_results(chosen.record, COMMAND, [record | {"commit": made_at} for record in records], keep=lambda old: old["kind"] not in kinds)
    return 1 if failures else 0


def fault_records(found: list[Trial], skipped: dict[str, str]) -> list[dict[str, object]]:
    """Trials and failures by kind."""
    records: list[dict[str, object]] = []
    for kind in dict.fromkeys(t.kind for t in found):
        mine = [t for t in found if t.kind == kind]
        records.append({"name": "fault_trials", "value": len(mine), "unit": "1", "kind": kind})
        records.append({"name": "fault_failures", "value": sum(bool(t.complaints) for t in mine), "unit": "1", "kind": kind})
    return records + [{"name": "fault_trials", "value": 0, "unit": "1", "kind": kind, "skipped": reason} for kind, reason in skipped.items()]


if __name__ == "__main__":
    sys.exit(main())
