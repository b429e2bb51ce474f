"""What every fault trial stands on: one home with a real stack, a small run of `tiny`, and how its end is judged.

`Bench.reference` is an undisturbed run. A trial begins with no artifacts, does harm, and is judged by the same four questions: was it told
in a sentence, is finished work still there, does anything say RUNNING two minutes later, and does a rerun end with the same digests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "flow"))
from flow_stack import SMALL, Stack, free_port  # noqa: E402

PATIENCE = 300.0  # seconds that any run may take
STUCK = 120.0  # seconds after which nothing may say RUNNING
RUN = ("-m", "flows.launch", "run", *SMALL)


@dataclass
class Trial:
    """One fault and everything that was wrong afterwards; none is a pass."""

    kind: str
    what: str
    complaints: list[str] = field(default_factory=list)

    def expect(self, true: bool, complaint: str) -> None:
        """Keep the complaint unless it is true."""
        if not true:
            self.complaints.append(complaint)


class Skipped(Exception):
    """This machine cannot do such harm; the reason is kept beside the results."""


@dataclass
class Program:
    """A command at work, its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; a program that does not end is killed and gives 999."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(family(self.process.pid))
            return 999

    def child(self, word: str) -> psutil.Process | None:
        """The descendant whose command line holds a word."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if word in process.cmdline():
                        return process
        return None


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants, but not the companions that live to tell of its death."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [p for p in (parent, *parent.children(recursive=True)) if "tasks.row_guard" not in p.cmdline()]
    return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


class Bench:
    """A home and its stack."""

    def __init__(self, home: Path, models: Path | None = None):
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        if models is not None and not (home / "models").exists():
            shutil.copytree(models, home / "models", ignore=shutil.ignore_patterns(".*"))
        self.stack = Stack(home, free_port(), free_port())
        self.reference: dict[str, Any] = {}
        self.units = 0
        self._count = 0

    # commands

    def start(self, *command: str, **variables: str) -> Program:
        """`python <command>` in the background."""
        self._count += 1
        log = self.home.parent / f"{self.home.name}-output" / f"{self._count:03d}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as out:
            environment = self.stack.environment | variables
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        return Program(process, log)

    def up(self) -> None:
        """`make up`."""
        done = self.stack.call("-m", "flows.launch", "up")
        assert done.returncode == 0, done.stdout + done.stderr

    def down(self) -> None:
        """`make down`."""
        done = self.stack.call("-m", "flows.launch", "down")
        assert done.returncode == 0, done.stdout + done.stderr

    def refer(self) -> None:
        """The undisturbed run: its result, and how many units of work it finishes."""
        self.clear()
        run = self.start(*RUN)
        code = run.wait()
        assert code == 0, run.output
        self.reference, self.units = self.result(), len(self.finished_units())

    # what lies in the home

    def clear(self) -> None:
        """No artifacts and no results, as on the first day; models and databases stay."""
        for name in ("artifacts", "results"):
            shutil.rmtree(self.home / name, ignore_errors=True)

    def finished_units(self) -> set[Path]:
        """The records that make a block or a step count as done."""
        found = set()
        for pattern in ("*/*/block_*.json", "*/*/checkpoint_*.json", "*/*/manifest.json"):
            found |= {p for p in (self.home / "artifacts").glob(pattern) if ".damaged-" not in p.parent.name}
        return found

    def finished_files(self) -> dict[Path, int]:
        """Files of finished work and when they were written: blocks with their record, and whatever a manifest names."""
        kept: dict[Path, int] = {}
        for unit in self.finished_units():
            with contextlib.suppress(OSError, ValueError):
                files = [unit.parent / name for name in json.loads(unit.read_text())["files"]] if unit.name == "manifest.json" else [unit.with_suffix(".safetensors")]
                handed_on = unit.parent.parent.name == "end_to_end" and unit.name.startswith("block")  # copies out of the last checkpoint
                if not unit.name.startswith("checkpoint") and not handed_on:
                    kept |= {path: path.stat().st_mtime_ns for path in files}
        return kept

    def result(self) -> dict[str, Any]:
        """What the newest finished run came to; empty when there is none."""
        files = sorted((self.home / "results").glob("*/result.json"), key=lambda p: p.stat().st_mtime)
        return json.loads(files[-1].read_text()) if files else {}

    def wait_for_units(self, run: Program, count: int) -> bool:
        """True when so many units are done; False when the run ended before."""
        deadline = time.monotonic() + PATIENCE
        while len(self.finished_units()) < count:
            if run.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    # what others say

    def rows(self) -> dict[str, str]:
        """MLflow's rows and their states."""
        if not (self.home / "mlflow.db").exists():
            return {}
        with contextlib.closing(sqlite3.connect(f"file:{self.home / 'mlflow.db'}?mode=ro", uri=True, timeout=30)) as book:
            try:
                return dict(book.execute("select run_uuid, status from runs").fetchall())
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return {}
                raise

    def history(self, run_id: str, name: str) -> list[tuple[int, int, float]]:
        """A curve as the store holds it, in the order in which it was written: (step, time, value)."""
        with contextlib.closing(sqlite3.connect(f"file:{self.home / 'mlflow.db'}?mode=ro", uri=True, timeout=30)) as book:
            return book.execute("select step, timestamp, value from metrics where run_uuid = ? and key = ? order by rowid", (run_id, name)).fetchall()

    def prefect_running(self) -> list[str]:
        """Ids of the runs of the flow that Prefect calls running or pending."""
        body = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED"]}}}, "flows": {"name": {"any_": ["lbllm"]}}}
        request = urllib.request.Request(f"http://127.0.0.1:{self.stack.prefect}/api/flow_runs/filter", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return [run["id"] for run in json.loads(reply.read())]

    # judgement

    def nothing_runs(self, trial: Trial, since: float, prefect: bool = False) -> None:
        """Complain when a row of MLflow (and a run of Prefect) still says that it runs two minutes after `since`."""
        while True:
            rows = [run for run, state in self.rows().items() if state == "RUNNING"]
            runs = self.prefect_running() if prefect else []
            if not rows and not runs:
                return
            if time.monotonic() - since > STUCK:
                trial.expect(not rows, f"{len(rows)} rows of MLflow are RUNNING after {STUCK:.0f} s")
                trial.expect(not runs, f"{len(runs)} runs of Prefect are open after {STUCK:.0f} s")
                return
            time.sleep(0.5)

    def same_again(self, trial: Trial, kept: dict[Path, int], run: Program | None = None) -> None:
        """Run it again (or take this run): it ends well, with the digests of the undisturbed run, and keeps what was finished."""
        again = run or self.start(*RUN)
        code = again.wait()
        trial.expect(code == 0, f"the rerun ended with {code}: {again.output[-600:]}")
        trial.expect("Traceback" not in again.output, f"the rerun shows a traceback: {again.log}")
        self.equals_reference(trial)
        lost = [path for path, written in kept.items() if not path.exists() or path.stat().st_mtime_ns != written]
        trial.expect(not lost, f"{len(lost)} of {len(kept)} finished files were written again or are gone, the first is {lost[0] if lost else ''}")

    def equals_reference(self, trial: Trial) -> None:
        """Complain when the newest result is not that of the undisturbed run."""
        mine, theirs = outcome(self.result()), outcome(self.reference)
        trial.expect(bool(theirs) and mine == theirs, f"the result differs in {sorted(k for k in theirs if mine.get(k) != theirs[k])[:3]}")


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    """What two runs must have in common: the digest of every step, and every perplexity."""
    found: dict[str, Any] = {f"{step['row']}/{step['step']}": step["digest"] for step in result.get("steps", ())}
    return found | {f"{row['row']}/{name}": value for row in result.get("rows", ()) for name, value in row.items() if name.startswith("ppl_")}


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at a folder, for the time being. Skipped where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount(*options, str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def mount(*words: str) -> None:
    """`mount`, or Skipped."""
    if shutil.which("mount") is None:
        raise Skipped("there is no mount command")
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"mounting is not allowed here ({(done.stderr.strip() or 'no reason given').splitlines()[0]}; user id {os.getuid()})")
