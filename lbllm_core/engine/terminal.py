"""Progress for people: block x of y, the figures of the moment, and a time left that is true.

On a terminal one line is rewritten in place; into a file or a pipe whole lines are written, no control characters, and not
more often than every few seconds. The time left is the measured time a unit of *this* attempt times the units that remain:
blocks that an earlier attempt finished cost nothing now and are not counted, nor is what came before the first unit (a step
says when that begins). The first unit also fills caches, so it is left out as soon as another one is done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from lbllm_core.engine.progress import Progress

QUIET_SECONDS = 5.0
SHOWN_FIGURES = 3
SETTLED_UNITS = 1.0  # done after the first one, which is left out of the mean from then on


class Clock:
    """The time left of a step, from what it reports: `left(progress, now)` in seconds, None while nothing is known."""

    def __init__(self, now: float):
        self._key: tuple[str, str, int] | None = None
        self._began, self._before = now, 0.0
        self._first: tuple[float, float] | None = None  # when one unit was done, and how many were then

    def left(self, progress: Progress, now: float) -> float | None:
        """Seconds until `total`, `now` on any clock that does not jump."""
        key = (progress.step, progress.unit, progress.total)
        if key != self._key or progress.units <= self._before:
            new, self._key, self._first = self._key is None, key, None
            if new and not progress.begins:  # a step that does not say when its first unit begins
                self._before = max(progress.units - 1, 0)
            else:
                self._began, self._before = now, progress.units
        here = progress.units - self._before
        if here <= 0:
            return None
        if self._first is None and here >= 1:
            self._first = (now, progress.units)
        since, units = (self._began, self._before)
        if self._first is not None and progress.units - self._first[1] >= SETTLED_UNITS:
            since, units = self._first
        return (now - since) / (progress.units - units) * (progress.total - progress.units)


class Terminal:
    """A listener for `Progress`; `begin(step)` marks the start of a step, from where its first unit is timed."""

    def __init__(self, stream: TextIO | None = None, width: int = 110):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.width = width
        self._clock = Clock(time.monotonic())
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        left = self._clock.left(progress, now)
        last = progress.done >= progress.total
        if now - self._last < (0.1 if self.live else QUIET_SECONDS) and not last:
            return
        self._last = now
        line = describe(progress, left)
        if self.live:
            self.stream.write("\r" + line[: self.width].ljust(self.width) + ("\n" if last else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()


def describe(progress: Progress, seconds_left: float | None, bar: bool = True) -> str:
    """One line: `weight_distill  block 3 of 30 [##........]  loss 0.0123 (0.0456 before)  1650 tokens/s  4 min left`.

    The block in work is the one named; a finished step names its last. Without `bar` for a page that draws one and names the step.
    """
    filled = int(10 * progress.units / max(progress.total, 1))
    begun = min(progress.done + (progress.share > 0), progress.total)
    part = f" ({100 * progress.share:.0f} %)" if progress.share else ""
    left = "" if seconds_left is None or progress.done >= progress.total else f"{duration(seconds_left)} left"
    where = f"{progress.unit} {begun} of {progress.total}{part}"
    place = f"{progress.step:18s} {where} [{'#' * filled}{'.' * (10 - filled)}]" if bar else where
    parts = (place, *_figures(progress.figures), left)
    return "  ".join(part for part in parts if part)


def _figures(figures: Mapping[str, float]) -> list[str]:
    """Loss now and before, the error of what is done, the rate; of any others the first few."""
    shown = []
    if "loss" in figures:
        before = f" ({figures['loss_before']:.4g} before)" if "loss_before" in figures else ""
        shown.append(f"loss {figures['loss']:.4g}{before}")
    if "block_rel_mse" in figures:
        shown.append(f"error {figures['block_rel_mse']:.4g}")
    weight = [value for name, value in figures.items() if name.startswith("weight_error/")]
    if weight:
        shown.append(f"weight error {sum(weight) / len(weight):.4g}")
    if not shown:
        shown = [f"{name} {value:.4g}" for name, value in figures.items() if "/" not in name and name not in ("seconds", "tokens_per_s")][:SHOWN_FIGURES]
    return [*shown, f"{figures['tokens_per_s']:.0f} tokens/s"] if "tokens_per_s" in figures else shown


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`: one figure and its unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
