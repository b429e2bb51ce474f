"""Processor, memory, disk and GPU while a run works, as MLflow itself measures them.

The instruments are MLflow's (`mlflow.system_metrics`), and so are the names, `system/...`, by which its page finds them. Only the
way into the store is ours: MLflow's own thread writes directly and gives up at the first trouble, while a sample here becomes an
entry of the lab book and waits like every other until the store takes it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

EVERY_SECONDS = 10.0
FIRST_SECONDS = 2.0  # a short run has a sample too
log = logging.getLogger(__name__)


class SystemMetrics:
    """Takes a sample every few seconds, in a thread, and hands it to `note(figures, number of the sample)`."""

    def __init__(self, note: Callable[[dict[str, float], int], None]):
        self._note = note
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No sample comes after this."""
        self._over.set()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        try:
            instruments = _instruments()
            wait, number = FIRST_SECONDS, 0
            while not self._over.wait(wait):
                self._note(_sample(instruments), number)
                wait, number = EVERY_SECONDS, number + 1
        except Exception:  # a convenience: whatever is wrong with it must not touch the run
            log.debug("system metrics ended", exc_info=True)


def _instruments() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        found.append(GPUMonitor())
    except Exception:  # no GPU, or nvidia-ml-py is not installed
        log.debug("no GPU metrics", exc_info=True)
    return found


def _sample(instruments: list[Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for instrument in instruments:
        instrument.collect_metrics()
        figures |= {f"system/{name}": float(value) for name, value in instrument.aggregate_metrics().items()}
        instrument.clear_metrics()
    return figures
