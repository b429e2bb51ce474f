"""One process of a parallel sweep; started by `engine/launch_ranks.py` through torchrun, never by hand.

    torchrun --standalone --nproc-per-node 2 -m lbllm_core.rank request.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from lbllm_core.config import config_from_dict
from lbllm_core.engine.launch_ranks import FAULT, MARK
from lbllm_core.engine.progress import Progress
from lbllm_core.engine.ranks import Ranks, join
from lbllm_core.engine.step import StepContext
from lbllm_core.errors import LbllmError


def main(file: Path) -> int:
    """Join the others, run the sweep, leave. Returns the exit code."""
    from lbllm_core.steps import sweep_here

    request = json.loads(file.read_text(encoding="utf-8"))
    config = config_from_dict(request["config"])
    here, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available() and config.hardware.device != "cpu"
    join(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu"))

    def report(p: Progress) -> None:
        print(MARK + json.dumps({"step": p.step, "done": p.done, "total": p.total, "unit": p.unit, "figures": dict(p.figures), "share": p.share, "begins": p.begins}), flush=True)

    inputs = {role: Path(folder) for role, folder in request["inputs"].items()}
    context = StepContext(config, inputs, Path(request["folder"]), Path(request["home"]), report)
    try:
        sweep_here(request["step"], context, Ranks(here, size))
    except LbllmError as error:
        print(f"{FAULT}rank {here}: {str(error).splitlines()[0]}", flush=True)
        return 1
    except Exception as error:
        print(f"{FAULT}rank {here}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        raise
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
