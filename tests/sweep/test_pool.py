"""Cells on their way through a work pool: lost with a worker, failed, deleted, taken back. A stand-in plays Prefect's server.

With a real server, workers and a database: `make test-faults ONLY=workers`.
"""

from __future__ import annotations

import threading
import time
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows import pool_sweep, prefect_runs, worker
from flows.cells import Cell, Request, cells
from flows.pool import TAKEN_SECONDS, PoolError, PoolRun, _pool_run
from flows.pool_sweep import ATTEMPTS, PoolSweep, apart
from flows.servers import up_lock

LOST = PoolRun("", "CRASHED", "no heartbeat", "w1")


class Server:
    """The pool as a script: for each run, in the order in which it was sent, the states that it is seen in."""

    name = "lbllm"

    def __init__(self, *scripts: list[PoolRun], before: dict[tuple[str, ...], str] | None = None, online: tuple[str, ...] = ("w1",)):
        self.scripts, self.before, self.workers = scripts, before or {}, set(online)
        self.sent: list[tuple[str, ...]] = []
        self.lost: list[str] = []
        self.taken_back: list[str] = []
        self.looks: dict[str, Iterator[PoolRun]] = {run: iter(self.scripts[int(run)]) for run in self.before.values()}
        self.last: dict[str, PoolRun] = {}

    def send(self, title: str, overrides: tuple[str, ...], sweep: str) -> str:
        run = str(len(self.looks))
        self.sent.append(overrides)
        self.looks[run] = iter(self.scripts[int(run)])
        return run

    def unfinished(self, sweep: str) -> dict[tuple[str, ...], str]:
        return self.before

    def look(self, runs: list[str]) -> dict[str, PoolRun]:
        for run in runs:
            self.last[run] = next(self.looks[run], self.last.get(run, PoolRun(run, "SCHEDULED")))
        return {run: self.last[run] for run in runs if self.last[run].state}

    def online(self) -> set[str]:
        return self.workers

    def lose(self, run: str) -> None:
        self.lost.append(run)

    def take_back(self, run: str) -> None:
        self.taken_back.append(run)

    def page(self, run: str) -> str:
        return f"page/{run}"


def seen(*states: str, worker: str = "w1", message: str = "") -> list[PoolRun]:
    return [PoolRun("", state, message, worker, time.time(), 60.0) for state in states]


class Sweep:
    """A sweep of so many cells at work on a stand-in, and what was noted and shown."""

    def __init__(self, server: Server, count: int, home: Path, monkeypatch: pytest.MonkeyPatch):
        self.cells: dict[int, Cell] = dict(enumerate(cells(Request(models=("tiny",), seeds=tuple(map(str, range(count)))))[1]))
        self.notes: dict[int, dict[str, Any]] = {index: {} for index in self.cells}
        self.shown: list[str] = []
        self.closed = 0
        monkeypatch.setattr(pool_sweep, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(pool_sweep, "close_rows", self.close)
        self.sweep = PoolSweep(server, "of-tests", home, self.note, self.shown.append)  # type: ignore[arg-type]

    def note(self, index: int, **changes: Any) -> None:
        self.notes[index] |= changes

    def close(self, home: Path, sweep: str, reason: str) -> int:
        self.closed += 1
        return 0

    def states(self) -> list[str]:
        return [note["state"] for note in self.notes.values()]


def test_cells_are_sent_in_order_and_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(seen("SCHEDULED", "PENDING", "RUNNING", "COMPLETED"), seen("SCHEDULED", "RUNNING", "COMPLETED"))
    it = Sweep(server, 2, tmp_path, monkeypatch)
    folder = tmp_path / "results" / it.cells[0].digest[:16]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    it.sweep.run(it.cells)
    assert server.sent == [cell.overrides for cell in it.cells.values()]
    assert it.states() == ["finished", "finished"]
    assert it.notes[0]["minutes"] == 1.0
    assert it.notes[1]["log"] == "page/1"
    assert [line for line in it.shown if "do not share this folder" in line] == [f"tiny tiny seed 1: its result is not in {tmp_path}; the workers do not share this folder"]
    assert it.closed == 0


def test_a_cell_that_lost_its_worker_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([*seen("RUNNING"), LOST], seen("SCHEDULED", "PENDING", "RUNNING", "COMPLETED", worker="w2"))
    it = Sweep(server, 1, tmp_path, monkeypatch)
    it.sweep.run(it.cells)
    assert server.sent == [it.cells[0].overrides] * 2
    assert it.states() == ["finished"]
    assert any("was lost with w1 (no heartbeat); sent again" in line for line in it.shown)
    assert any("finished on w2" in line for line in it.shown)
    assert it.closed >= 1, "its row in MLflow is ended"


def test_a_cell_that_loses_every_worker_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(*([[*seen("RUNNING"), LOST]] * ATTEMPTS))
    it = Sweep(server, 1, tmp_path, monkeypatch)
    it.sweep.run(it.cells)
    assert len(server.sent) == ATTEMPTS
    assert it.states() == ["failed"]
    assert "no heartbeat" in it.notes[0]["reason"]
    assert f"{ATTEMPTS} times" in it.notes[0]["reason"]


def test_a_worker_that_dies_before_its_cell_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([*seen("PENDING", worker="gone"), LOST], seen("RUNNING", "COMPLETED"))
    it = Sweep(server, 1, tmp_path, monkeypatch)
    it.sweep.run(it.cells)
    assert server.lost == ["0"]
    assert it.states() == ["finished"]


@pytest.mark.parametrize(
    ("run", "lost"),
    [
        (PoolRun("", "PENDING", "", "w1", 0.0), False),  # it is online: it says itself when the process cannot begin
        (PoolRun("", "PENDING", "", "w2", 0.0), True),
        (PoolRun("", "PENDING", "", "", 1000.0 - TAKEN_SECONDS + 1), False),
        (PoolRun("", "PENDING", "", "", 1000.0 - TAKEN_SECONDS - 1), True),
        (PoolRun("", "RUNNING", "", "w2", 0.0), False),  # its heartbeat decides
        (PoolRun("", "SCHEDULED", "", "", 0.0), False),
    ],
)
def test_which_runs_are_lost(run: PoolRun, lost: bool) -> None:
    assert run.lost({"w1"}, 1000.0) is lost


def test_failed_cancelled_and_deleted_cells_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(seen("RUNNING", "FAILED", message="not finite; lower the learning rate"), seen("CANCELLED"), [PoolRun("", "")])
    it = Sweep(server, 3, tmp_path, monkeypatch)
    it.sweep.run(it.cells)
    assert it.states() == ["failed"] * 3
    assert [note["reason"] for note in it.notes.values()] == ["not finite; lower the learning rate", "cancelled", "its run was deleted in Prefect"]
    assert len(server.sent) == 3, "only a lost worker is a reason to send a cell again"


def test_the_same_command_finds_what_it_had_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cells(Request(models=("tiny",), seeds=("0", "1")))[1]
    server = Server(seen("RUNNING", "COMPLETED"), seen("RUNNING", "COMPLETED"), before={found[1].overrides: "0"})
    it = Sweep(server, 2, tmp_path, monkeypatch)
    it.sweep.run(it.cells)
    assert server.sent == [found[0].overrides]
    assert it.states() == ["finished", "finished"]
    assert "1 of them from before" in it.shown[0]


def test_an_interrupt_takes_back_what_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(seen("RUNNING", "RUNNING"), seen("SCHEDULED", "SCHEDULED", worker=""))
    it = Sweep(server, 2, tmp_path, monkeypatch)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool_sweep.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        it.sweep.run(it.cells)
    assert server.taken_back == ["1"]
    assert it.states() == ["running", "planned"]


def test_without_a_worker_it_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server([*seen("SCHEDULED", "SCHEDULED", "SCHEDULED", worker=""), *seen("RUNNING", "COMPLETED")], online=())
    it = Sweep(server, 1, tmp_path, monkeypatch)
    it.sweep.run(it.cells)
    assert sum("make worker" in line for line in it.shown) == 1


def test_a_server_that_does_not_answer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(seen("RUNNING", "COMPLETED"))
    it = Sweep(server, 1, tmp_path, monkeypatch)
    answers = server.look
    failures = iter([PoolError("Prefect's server does not answer (refused)")] * 2)

    def look(runs: list[str]) -> dict[str, PoolRun]:
        error = next(failures, None)
        if error:
            raise error
        return answers(runs)

    monkeypatch.setattr(server, "look", look)
    it.sweep.run(it.cells)
    assert it.states() == ["finished"]
    assert sum("does not answer" in line for line in it.shown) == 1


def test_a_run_as_the_server_tells_it() -> None:
    told = {
        "id": "7",
        "state": {"type": "FAILED", "message": "Flow run encountered an exception: ConfigError: no such model", "timestamp": "2026-01-01T00:00:00Z"},
        "labels": {"prefect.worker.name": "w1", "prefect.flow.id": "x"},
        "total_run_time": 12.5,
    }
    assert _pool_run(told) == PoolRun("7", "FAILED", "ConfigError: no such model", "w1", 1767225600.0, 12.5)
    assert _pool_run({"id": "8", "state": None}).state == ""


def test_a_worker_needs_the_locks_of_the_servers(tmp_path: Path) -> None:
    with pytest.raises(worker.WorkerError, match="make up"):
        worker.check_locks(tmp_path)
    with up_lock(tmp_path).acquire(timeout=0):
        worker.check_locks(tmp_path)


def test_cells_that_begin_alike_are_sent_apart() -> None:
    steps = [["a", "b"], ["a", "b"], ["a", "c"], ["d", "e"], [], ["a"], ["d", "f"]]
    order = apart(steps)
    assert sorted(order) == list(range(len(steps)))
    assert order[0] == 4  # nothing to build: it keeps no worker waiting
    assert [steps[place][0] for place in order[1:4]] in (["a", "d", "a"], ["d", "a", "d"])
    assert order.index(1) > order.index(2)  # the same again comes after what differs
    assert apart([]) == []


@pytest.fixture
def busy_server() -> Iterator[tuple[str, list[int]]]:
    """A server on the loopback that answers with the codes of a list, one after the other, then with 200."""
    codes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(codes.pop(0) if codes else 200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", codes
    server.shutdown()
    server.server_close()


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(busy_server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, codes = busy_server
    codes += [503, 503]  # Prefect's word for an sqlite file that many workers write to
    assert prefect_runs.post(url, {}) == {}
    codes += [422, 200]
    with pytest.raises(urllib.error.HTTPError):
        prefect_runs.post(url, {})
    assert codes == [200]
    monkeypatch.setattr(prefect_runs, "BUSY_SECONDS", 0.1)
    codes[:] = [503] * 9
    with pytest.raises(urllib.error.HTTPError):
        prefect_runs.post(url, {})
    assert codes
