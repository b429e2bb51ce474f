"""A sweep whose cells are run by the workers of a Prefect work pool: sent, looked at, sent again when their worker was lost.

The artifacts of a cell lie in the home folder that the machines share, so the worker that gets a lost cell goes on from its
last finished block, and cells that need the same step wait for each other at its lock: they are sent in an order (`apart`) in
which workers that begin together build different things. The sender is only one who looks on: when it is killed the workers
go on, and the same command finds the runs that it had sent. An interrupt takes back what has not begun.

A cell that loses its worker ATTEMPTS times is likely the reason itself (too much memory for the machine), and counts as failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Protocol

from flows.cells import Cell
from flows.pool import Pool, PoolError, PoolRun
from lbllm_core.engine.terminal import duration
from tasks.tracking import close_rows

ATTEMPTS = 3
LOOK_SECONDS = 2.0
ROWS_SECONDS = 30.0  # between looks at rows in MLflow whose process was lost


def apart(paths: Sequence[Sequence[str]]) -> list[int]:
    """The places of `paths` in an order in which neighbours have as little as can be in common.

    A path holds what a cell has to build, first things first, and two cells that begin alike would wait for each other. The
    paths are a tree; its branches take turns, at every fork: `[ab, ac, b]` -> ab, b, ac. Cells that build the same come last.
    """

    def turns(places: Sequence[int], depth: int) -> list[int]:
        branches: dict[str | None, list[int]] = {}
        for place in places:
            branches.setdefault(paths[place][depth] if depth < len(paths[place]) else None, []).append(place)
        done = branches.pop(None, [])
        ordered = [turns(branch, depth + 1) for branch in branches.values()]
        return done[:1] + [place for place in chain.from_iterable(zip_longest(*ordered)) if place is not None] + done[1:]

    return turns(range(len(paths)), 0)


class Note(Protocol):
    """Keeps what is known of a cell in the sweep's record."""

    def __call__(self, index: int, /, *, state: str = ..., reason: str = ..., minutes: float = ..., log: str = ...) -> None:
        """The cell `index` of the sweep is so now."""


@dataclass
class _Sent:
    """A cell in the pool: its newest run, what was last seen of it, and how often its worker was lost."""

    cell: Cell
    run: str
    state: str = "SCHEDULED"
    losses: int = 0


@dataclass
class PoolSweep:
    """The cells of a sweep on their way through a pool. `note` and `show` hear what becomes of them."""

    pool: Pool
    name: str
    home: Path
    note: Note
    show: Callable[[str], None]
    sent: dict[int, _Sent] = field(default_factory=dict)
    lost: bool = False  # a worker was lost: rows in MLflow may need an end
    _looked: float = 0.0
    _said: str = ""

    def run(self, cells: Mapping[int, Cell]) -> None:
        """Send the cells, by their place in the sweep, and look on until each has ended."""
        known = self.pool.unfinished(self.name)
        for index, cell in cells.items():
            run = known.get(cell.overrides) or self.pool.send(cell.title, cell.overrides, self.name)
            self.sent[index] = _Sent(cell, run)
            self.note(index, log=self.pool.page(run))
        again = sum(cell.overrides in known for cell in cells.values())
        self.show(f"{len(cells)} cells in the work pool {self.pool.name}" + (f", {again} of them from before" if again else ""))
        try:
            while self.sent:
                self._look()
                if self.sent:
                    time.sleep(LOOK_SECONDS)
        except BaseException:
            self._take_back()
            raise
        if self.lost:
            self._close_rows()

    def _look(self) -> None:
        try:
            runs, online = self.pool.look([s.run for s in self.sent.values()]), self.pool.online()
            now = time.time()
            for index, sent in list(self.sent.items()):
                run = runs.get(sent.run, PoolRun(sent.run, "CANCELLED", "its run was deleted in Prefect"))
                if run.lost(online, now):
                    self.pool.lose(sent.run)
                elif run.state != sent.state:
                    self._changed(index, sent, run)
        except PoolError as error:
            self._say(f"{error}; the workers go on, `make up` brings it back")
            return
        if self.sent and not online and all(sent.state == "SCHEDULED" for sent in self.sent.values()):
            self._say(f"no worker of the pool {self.pool.name} is online; `make worker` starts one, on any machine that shares {self.home}")
        else:
            self._said = ""
        if self.lost and time.monotonic() - self._looked > ROWS_SECONDS:
            self._close_rows()

    def _changed(self, index: int, sent: _Sent, run: PoolRun) -> None:
        title, worker = sent.cell.title, run.worker or "a worker"
        if run.state == "RUNNING":
            self.note(index, state="running")
            self.show(f"{title} runs on {worker}")
        elif run.state == "COMPLETED":
            del self.sent[index]
            self.note(index, state="finished", minutes=run.seconds / 60, reason="")
            self.show(f"{title} finished on {worker} after {duration(run.seconds)}; {len(self.sent)} left")
            if not (self.home / "results" / sent.cell.digest[:16] / "result.json").exists():
                self.show(f"{title}: its result is not in {self.home}; the workers do not share this folder")
        elif run.state == "CRASHED" and sent.losses + 1 < ATTEMPTS:
            again = _Sent(sent.cell, self.pool.send(title, sent.cell.overrides, self.name), losses=sent.losses + 1)
            self.sent[index], self.lost = again, True
            self.note(index, state="planned", reason="", log=self.pool.page(again.run))
            self.show(f"{title} was lost with {worker} ({run.message}); sent again, it goes on from its last finished block")
            self._close_rows()
        elif run.state in ("CRASHED", "FAILED", "CANCELLED"):
            del self.sent[index]
            self.lost = self.lost or run.state == "CRASHED"
            reason = f"lost with its worker {ATTEMPTS} times, the last time: {run.message}" if run.state == "CRASHED" else run.message or run.state.lower()
            self.note(index, state="failed", reason=reason, minutes=run.seconds / 60)
            self.show(f"{title} failed on {worker}: {reason}")
        sent.state = run.state

    def _close_rows(self) -> None:
        self._looked = time.monotonic()
        close_rows(self.home, self.name, "its worker was lost; the cell goes on where it ended")

    def _take_back(self) -> None:
        """The sender is interrupted: what has not begun does not begin, what runs goes on."""
        for index, sent in self.sent.items():
            with suppress(PoolError):
                now = self.pool.look([sent.run]).get(sent.run)
                if now is not None and now.state == "SCHEDULED":
                    self.pool.take_back(sent.run)
                    self.note(index, state="planned", reason="taken back before it began")
                    continue
            self.note(index, reason="its worker goes on with it; the same command looks on")

    def _say(self, sentence: str) -> None:
        """Show a sentence once, until things are well again."""
        if sentence != self._said:
            self._said = sentence
            self.show(sentence)
