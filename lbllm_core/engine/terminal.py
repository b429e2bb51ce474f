"""Progress for people: block x of y, the figures of the moment, and a time left that is true.

On a terminal one line is rewritten in place; into a file or a pipe whole lines are written, no control characters, and not
more often than every few seconds. The time left is the measured time a unit of *this* attempt times the units that remain:
blocks that an earlier attempt finished cost nothing now and are not counted.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TextIO

from lbllm_core.engine.progress import Progress

QUIET_SECONDS = 5.0
SHOWN_FIGURES = 3


@dataclass
class _Phase:
    """One row of units in progress: when it began and how many were done before."""

    key: tuple[str, str, int]
    began: float
    before: int


class Terminal:
    """A listener for `Progress`; `begin(step)` marks the start of a step, from where its first unit is timed."""

    def __init__(self, stream: TextIO | None = None, width: int = 110):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.width = width
        self._phase: _Phase | None = None
        self._begun = time.monotonic()
        self._last = 0.0

    def begin(self) -> None:
        """A step starts now."""
        self._phase, self._begun, self._last = None, time.monotonic(), 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        last = progress.done >= progress.total
        if now - self._last < (0.1 if self.live else QUIET_SECONDS) and not last:
            self._time_left(progress, now)
            return
        self._last = now
        line = describe(progress, self._time_left(progress, now))
        if self.live:
            self.stream.write("\r" + line[: self.width].ljust(self.width) + ("\n" if last else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def _time_left(self, progress: Progress, now: float) -> float | None:
        key = (progress.step, progress.unit, progress.total)
        if self._phase is None or self._phase.key != key:
            began = self._begun if self._phase is None else now
            self._phase = _Phase(key, began, max(progress.done - 1, 0) if self._phase is None else progress.done)
        done_here = progress.done - self._phase.before
        if done_here <= 0:
            return None
        return (now - self._phase.began) / done_here * (progress.total - progress.done)


def describe(progress: Progress, seconds_left: float | None) -> str:
    """One line: `weight_distill  block 3 of 30 [##........]  loss 0.0123  4 min left`."""
    filled = int(10 * progress.done / max(progress.total, 1))
    shown = [(name, value) for name, value in progress.figures.items() if "/" not in name and name != "seconds"][:SHOWN_FIGURES]
    figures = "  ".join(f"{name} {value:.4g}" for name, value in shown)
    left = "" if seconds_left is None or progress.done >= progress.total else f"{duration(seconds_left)} left"
    parts = (f"{progress.step:18s} {progress.unit} {progress.done} of {progress.total} [{'#' * filled}{'.' * (10 - filled)}]", figures, left)
    return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`: one figure and its unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
