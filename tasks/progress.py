"""A step's progress on Prefect's page: one progress artifact a task run, updated every few seconds.

The page is a convenience; whatever goes wrong while it is updated must not touch the run.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from lbllm_core.engine.progress import Progress
from lbllm_core.engine.terminal import Clock, describe

EVERY_SECONDS = 5.0
log = logging.getLogger(__name__)


class PrefectPage:
    """A listener for `Progress` that draws a bar on the task run's page, with the terminal's line as its description."""

    def __init__(self, step: str):
        self.step = step
        self._artifact: Any = None
        self._last = 0.0
        self._clock = Clock(time.monotonic())

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        left = self._clock.left(progress, now)
        if now - self._last < EVERY_SECONDS and progress.done < progress.total:
            return
        self._last = now
        percent, line = 100.0 * progress.units / max(progress.total, 1), f"{self.step}: {describe(progress, left, bar=False)}"
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(progress=percent, description=line)
            else:
                update_progress_artifact(self._artifact, progress=percent, description=line)
        except Exception:
            log.debug("Prefect's page was not updated", exc_info=True)
