"""One cell of a sweep in a process of its own: `flows/once.py`, as `make run` starts it.

A process a cell gives the memory back, and a crash or a kill (by the system, for its memory) is that cell's failure and not
the sweep's. The cell is the leader of a process group, so that stopping it stops what it started; it ends by itself when the
sweep's process is gone. Its output goes into a log file, which is also what is shown while it runs: nothing is lost when
nobody reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lbllm_core.engine.files import write_atomic

FLOW_PROCESS = ("-m", "flows.once")
LOOK_SECONDS = 0.3
GRACE_SECONDS = 20.0  # time for a stopped cell to end its row in MLflow and its run in Prefect


@dataclass(frozen=True)
class CellEnd:
    """How a cell ended: `reason` is empty when it finished, and `result` is what the flow returned."""

    seconds: float
    reason: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


def run_cell(overrides: Sequence[str], environment: Mapping[str, str], log: Path, show: Callable[[str], None]) -> CellEnd:
    """Run the flow with these overrides; `show` hears every line of its output. An interrupt of this process ends the cell first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    answer = log.with_suffix(".answer.json")
    answer.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}  # those describe the run that starts us
    began = time.monotonic()
    with log.open("wb") as out, log.open("rb") as back:
        command = [sys.executable, *FLOW_PROCESS, str(answer), *overrides]
        process = subprocess.Popen(command, env={**inherited, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(LOOK_SECONDS)
                _pass_on(back, show)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a dead cell left of its group
            process.wait()
        _pass_on(back, show, last=True)
    seconds = time.monotonic() - began
    told = _read(answer)
    answer.unlink(missing_ok=True)
    if process.returncode == 0 and "rows" in told:
        return CellEnd(seconds, result=told)
    return CellEnd(seconds, told.get("error") or _reason(process.returncode, log))


def write_error(answer: Path, error: Exception) -> None:
    """What a failed cell leaves in place of its result, for the sweep to tell."""
    with contextlib.suppress(OSError):  # a full disk: the sentence is in the cell's output, and its log
        write_atomic(answer, json.dumps({"error": str(error)}).encode())


def _pass_on(stream: BinaryIO, show: Callable[[str], None], last: bool = False) -> None:
    """Show the complete lines that were written since the last look."""
    while line := stream.readline():
        if not line.endswith(b"\n") and not last:
            stream.seek(-len(line), os.SEEK_CUR)
            return
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            show(text)


def _read(answer: Path) -> dict[str, Any]:
    try:
        told = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _reason(code: int, log: Path) -> str:
    """A cell that could not say itself why it ended."""
    if code == -signal.SIGKILL:
        return f"killed (signal 9), as the system does when memory runs out; a smaller batch or model.blocks needs less, and a rerun goes on. Its log: {log}"
    if code < 0:
        return f"ended by signal {-code}; a rerun goes on from its finished blocks. Its log: {log}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"ended with code {code}: {lines[-1].strip()[:300] if lines else 'no output'}. Its log: {log}"
