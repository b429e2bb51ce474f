"""Ends the MLflow row of a run whose process was killed: `python -m tasks.row_guard HOME DIGEST`, started by the run itself.

A process that is killed (signal 9, the system short of memory) cannot say so: its row would read RUNNING until somebody runs the same
configuration again. So every run starts this small companion, which sleeps at the reading end of a pipe. The run writes the id of its
row into it, and `end` before it ends by itself; when it is killed, the kernel closes the pipe without that word, and the companion ends
the row as KILLED. A store that is locked is asked again, for an hour.

It does nothing when the row's lock is held: then the same configuration runs again already and owns the row. (DIGEST is empty for the
second of two equal runs at once, which has a row of its own.) It is a session of its own,
so that what kills the run's process group does not take it too; MLflow is imported only when there is something to end.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAM = ("-P", "-m", "tasks.row_guard")  # -P: no module is looked for in the folder it runs in
END = b"end\n"
PATIENCE = 3600.0  # seconds that a locked store is asked again
PAUSE = 5.0
KILLED = "its process was killed before it could say why (signal 9, as the system does when memory runs out); the same command goes on from its finished blocks"


class RowGuard:
    """The companion as the run sees it: `watch(run_id)` once the row is known, `end()` when the run ends by itself."""

    def __init__(self, home: Path, digest: str):
        log = home / "logs" / "row_guard.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            command = [sys.executable, *PROGRAM, str(home), digest]
            # in the home: a worker of a pool removes the folder that a flow runs in, when it ends
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, start_new_session=True, bufsize=0, cwd=home)

    def watch(self, run_id: str) -> None:
        """The row that is to be ended when this process is killed."""
        self._say(run_id.encode() + b"\n")

    def end(self) -> None:
        """The run ended by itself: its row needs nobody."""
        self._say(END)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def _say(self, words: bytes) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # somebody killed the companion: the run does not need it
                self._process.stdin.write(words)


def main(arguments: Sequence[str]) -> int:
    """Wait for the end of the run that started this process; returns the exit code."""
    home, digest = Path(arguments[0]), arguments[1]
    run_id = ""
    for line in sys.stdin.buffer:
        if line == END:
            return 0
        run_id = line.decode().strip()
    if not run_id:
        return 0
    from tasks.tracking import close_row

    began = time.monotonic()
    while not close_row(home, run_id, digest, KILLED):
        if time.monotonic() - began > PATIENCE or not home.is_dir():
            return 1
        time.sleep(PAUSE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
