"""Starting the processes of a parallel sweep and hearing from them.

`torchrun` (as `python -m torch.distributed.run`) starts `hardware.gpus` processes of `lbllm_core.rank`, each of which runs the stage's sweep on its
share. They talk to nobody but each other and this process: the first rank prints its progress as lines, which are reported here. When one
process ends (killed, out of memory, an error), torchrun ends the others; finished blocks are in the ledger and the same command goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbllm_core.engine.progress import Progress, Report
from lbllm_core.errors import LbllmError

MARK = "PROGRESS "
FAULT = "FAULT "


class RankError(LbllmError):
    """A process of a parallel sweep ended before its work was done."""


def run_ranks(count: int, request: Mapping[str, Any], folder: Path, report: Report) -> None:
    """Run `lbllm_core.rank` in `count` processes until the sweep is done. Raises RankError with the first message of a rank."""
    file = folder / ".ranks.json"
    file.write_text(json.dumps(dict(request)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "lbllm_core.rank", str(file)]
    faults: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith(MARK):
                about = json.loads(line.removeprefix(MARK))
                report(Progress(about["step"], about["done"], about["total"], about["unit"], about["figures"], about.get("share", 0.0), about.get("begins", False)))
            elif line.startswith(FAULT):
                faults.append(line.removeprefix(FAULT).strip())
    file.unlink(missing_ok=True)
    if running.returncode:
        reason = faults[0] if faults else "it was killed, or a library under it failed"
        raise RankError(f"one of {count} processes of this step ended and the others were stopped ({reason}). Finished blocks are kept: run the same command again, or with hardware.gpus=1")
