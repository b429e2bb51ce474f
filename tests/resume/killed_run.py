"""A pipeline run that kills itself (SIGKILL) at a given point: `python killed_run.py HOME STEP UNITS DELAY [override ...]`.

After STEP has reported its UNITS-th finished unit, DELAY seconds pass, so that the blow falls inside the work that follows. STEP `none` means an
undisturbed run. The last line printed is the digest of every finished step as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from lbllm_core.engine.progress import Progress
from lbllm_core.run import read_config, run_pipeline


def main(home: str, step: str, units: int, delay: float, overrides: list[str]) -> None:
    seen = 0

    def report(progress: Progress) -> None:
        nonlocal seen
        if progress.step == step and not progress.share and not progress.begins:
            seen += 1
            if seen == units:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    finished = run_pipeline(read_config(None, overrides), Path(home), report)
    print(json.dumps([[f.row, f.handle.step, f.handle.digest, f.handle.reused] for f in finished]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:])
