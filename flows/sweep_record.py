"""The record of a sweep: `$LBLLM_HOME/sweeps/<name>.json`, what was asked for and how far each cell is.

Written anew, atomically, whenever something changes, by the one process that holds the sweep's lock; read by anyone (`make
sweep-status`, `make sweep-retry`, `make compare`). Finished work is not kept here but in the artifacts and in MLflow: a
record that is lost costs nothing but the list of what was planned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from lbllm_core.engine.files import write_atomic
from lbllm_core.errors import ConfigError

LONGEST_NAME = 100
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
OPEN = ("planned", "running", "stopped")  # states that a rerun takes up again, beside `failed`


@dataclass(frozen=True)
class CellRecord:
    """One cell: `state` is planned, running, finished, reused, failed or stopped; `minutes` of this attempt; `reason` of a failure."""

    title: str
    digest: str
    model: str
    experiment: str
    scheme: str
    seed: int
    state: str = "planned"
    minutes: float = 0.0
    reason: str = ""
    log: str = ""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep: the words that were typed (`models`, `experiments`, `seeds`, `overrides`), its cells, and what it is to find out."""

    name: str
    asked: Mapping[str, list[str]]
    cells: tuple[CellRecord, ...] = ()
    started: str = ""
    seconds_left: float | None = None
    updated: float = field(default=0.0)
    question: str = ""

    def with_cell(self, index: int, cell: CellRecord) -> SweepRecord:
        """The record with one cell replaced."""
        return replace(self, cells=(*self.cells[:index], cell, *self.cells[index + 1 :]))


def name_problem(name: str) -> str:
    """Why a sweep cannot have this name (it becomes a file name and a tag); empty when it can."""
    if NAME.fullmatch(name) and len(name) <= LONGEST_NAME and ".." not in name:
        return ""
    return f"SWEEP: {name!r} is not a name of at most {LONGEST_NAME} letters, digits and . _ + = - that begins with a letter or digit"


def checked_name(name: str) -> str:
    """The name itself, or a ConfigError."""
    problem = name_problem(name)
    if problem:
        raise ConfigError([problem])
    return name


def write_record(home: Path, record: SweepRecord) -> None:
    """Replace the record on disk."""
    (home / "sweeps").mkdir(exist_ok=True)
    write_atomic(home / "sweeps" / f"{record.name}.json", json.dumps(asdict(record), indent=1).encode())


def read_record(home: Path, name: str) -> SweepRecord | None:
    """The record of a sweep; None when there is none, or none that this version reads."""
    try:
        values = json.loads((home / "sweeps" / f"{name}.json").read_text(encoding="utf-8"))
        return SweepRecord(**(values | {"cells": tuple(CellRecord(**cell) for cell in values["cells"])}))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def latest_record(home: Path) -> str:
    """The name of the sweep that was worked on last; empty when there is none."""
    files = sorted((home / "sweeps").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return files[-1].stem if files else ""


def sweep_lock(home: Path, name: str) -> FileLock:
    """Held by the process that works on the sweep; the kernel frees it when that process dies."""
    (home / "sweeps").mkdir(exist_ok=True)
    return FileLock(home / "sweeps" / f"{name}.lock")


def in_work(home: Path, name: str) -> bool:
    """Whether a process works on the sweep now."""
    try:
        with sweep_lock(home, name).acquire(timeout=0):
            return False
    except Timeout:
        return True
