"""A run that is killed cannot end its row in MLflow; the companion that it started does, and never the row of a run that lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from lbllm_core.config import RunConfig
from tasks.row_guard import RowGuard
from tasks.tracking import LabBook, close_row, row_digest, store_uri

RUNS = """
import sys, time
from pathlib import Path
from lbllm_core.config import RunConfig
from tasks.tracking import LabBook
with LabBook(RunConfig(), Path(sys.argv[1])) as book:
    print(book.run_id, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "a home"
    folder.mkdir()
    with LabBook(RunConfig(seed=9), folder):  # the database is made here
        pass
    return folder


def row(home: Path, run_id: str) -> Run:
    return MlflowClient(store_uri(home)).get_run(run_id)


def started(home: Path, seconds: float = 600, folder: Path | None = None) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", RUNS, str(home), str(seconds)], stdout=subprocess.PIPE, text=True, cwd=folder)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def until(home: Path, run_id: str, status: str) -> bool:
    deadline = time.monotonic() + 100
    while row(home, run_id).info.status != status and time.monotonic() < deadline:
        time.sleep(0.2)
    return row(home, run_id).info.status == status


def test_a_killed_run_is_ended_and_goes_on(home: Path) -> None:
    process, run_id = started(home)
    assert row(home, run_id).info.status == "RUNNING"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert until(home, run_id, "KILLED")
    assert "signal 9" in row(home, run_id).data.tags["lbllm.error"]
    again, same = started(home, 0)
    assert again.wait() == 0
    assert same == run_id
    assert row(home, run_id).info.status == "FINISHED"


def test_a_killed_run_whose_folder_is_gone_is_ended(home: Path, tmp_path: Path) -> None:
    """A worker of a pool runs each flow in a temporary folder and removes it when it is stopped."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    process, run_id = started(home, folder=folder)
    folder.rmdir()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert until(home, run_id, "KILLED")


def test_a_run_that_ended_by_itself_is_left_alone(home: Path) -> None:
    process, run_id = started(home, 0)
    assert process.wait() == 0
    assert row(home, run_id).info.status == "FINISHED"
    assert close_row(home, run_id, row_digest(RunConfig()), "late")
    assert row(home, run_id).info.status == "FINISHED"


def test_a_row_that_was_taken_up_is_left_alone(home: Path) -> None:
    with LabBook(RunConfig(), home) as book:
        assert close_row(home, book.run_id, row_digest(RunConfig()), "late")
        assert row(home, book.run_id).info.status == "RUNNING"


def test_a_store_that_is_down_is_to_be_asked_again(home: Path) -> None:
    (home / "mlflow.db").rename(home / "aside.db")
    (home / "mlflow.db").mkdir()
    assert not close_row(home, "a" * 32, row_digest(RunConfig()), "late")


def test_the_companion_may_die_first(home: Path) -> None:
    guard = RowGuard(home, row_digest(RunConfig()))
    guard._process.kill()
    guard._process.wait()
    guard.watch("a" * 32)
    guard.end()
