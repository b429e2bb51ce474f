"""One cell in its process: what it tells, how it fails, and that nothing is left of it. A small script stands for the flow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from flows import cell_process
from flows.cell_process import run_cell

FINISHED = "import json,sys; print('one'); print('two'); open(sys.argv[1],'w').write(json.dumps({'rows': [], 'steps': []}))"
REFUSED = "import json,sys; open(sys.argv[1],'w').write(json.dumps({'error': 'no weights; get some'})); sys.exit(1)"
CRASHED = "print('begun'); raise ValueError('a bug of ours')"
KILLED = "import os,signal; os.kill(os.getpid(), signal.SIGKILL)"
FAMILY = "import subprocess,sys,time; p = subprocess.Popen([sys.executable,'-c','import time; time.sleep(60)']); print('child', p.pid, flush=True); {end}"


@pytest.fixture
def stands_for_flow(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(cell_process, "LOOK_SECONDS", 0.05)
    return lambda script: monkeypatch.setattr(cell_process, "FLOW_PROCESS", ("-c", script))


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_result_and_output(stands_for_flow, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stands_for_flow(FINISHED)
    lines: list[str] = []
    end = run_cell((), {}, tmp_path / "a log" / "cell.log", lines.append)
    assert (end.reason, lines) == ("", ["one", "two"])
    assert end.result["rows"] == []
    assert (tmp_path / "a log" / "cell.log").read_text() == "one\ntwo\n"
    assert [p.name for p in (tmp_path / "a log").iterdir()] == ["cell.log"]


@pytest.mark.parametrize(
    ("script", "words"), [(REFUSED, ["no weights; get some"]), (CRASHED, ["code 1", "a bug of ours", "cell.log"]), (KILLED, ["signal 9", "memory", "cell.log"])]
)
def test_reasons(script: str, words: list[str], stands_for_flow, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stands_for_flow(script)
    end = run_cell((), {}, tmp_path / "cell.log", lambda _: None)
    for word in words:
        assert word in end.reason
    assert not end.result


def test_a_dead_cells_children_are_stopped(stands_for_flow, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stands_for_flow(FAMILY.format(end="import os,signal; os.kill(os.getpid(), signal.SIGKILL)"))
    lines: list[str] = []
    run_cell((), {}, tmp_path / "cell.log", lines.append)
    assert gone(int(lines[0].split()[1]))


def test_an_interrupt_ends_the_cell_and_its_children(stands_for_flow, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stands_for_flow(FAMILY.format(end="time.sleep(60)"))
    heard: list[str] = []

    def interrupt(line: str) -> None:
        heard.append(line)
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cell((), {}, tmp_path / "cell.log", interrupt)
    assert gone(int(heard[0].split()[1]))
    assert time.monotonic() - began < 15


def test_a_stubborn_cell_is_killed(stands_for_flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(cell_process, "GRACE_SECONDS", 0.3)
    stands_for_flow("import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)")
    heard: list[str] = []

    def interrupt(line: str) -> None:
        heard.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell((), {}, tmp_path / "cell.log", interrupt)
    assert gone(int(heard[0]))


def test_the_run_that_starts_a_cell_is_not_inherited(stands_for_flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "of the sweep")
    stands_for_flow("import os; print(os.environ.get('PREFECT__FLOW_RUN_ID'), os.environ['GIVEN'])")
    lines: list[str] = []
    run_cell((), {"GIVEN": "yes"}, tmp_path / "cell.log", lines.append)
    assert lines == ["None yes"]


def test_the_group_is_the_cells_own(stands_for_flow, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A Ctrl-C reaches the sweep alone, which then ends the cell."""
    stands_for_flow("import os; print(os.getpgrp())")
    lines: list[str] = []
    run_cell((), {}, tmp_path / "cell.log", lines.append)
    assert int(lines[0]) != os.getpgrp()
