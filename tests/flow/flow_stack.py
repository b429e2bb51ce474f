"""How the flow tests talk to the stack under test: its home, its ports, and commands run as a person runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model=tiny",
    "dataset.sequences=16",
    "ptq_init.sequences=16",
    "weight_distill.sequences=16",
    "act_quant.sequences=16",
    "end_to_end.steps=4",
    "pack.benchmark=false",
    "evaluation.baselines=stage1",
]
# What somebody may have in the environment; `test_whole_trace.py` looks for it in everything that the stack leaves.
SECRETS = {
    "HF_TOKEN": "hf_planted0token0of0the0hub0",
    "AWS_SECRET_ACCESS_KEY": "planted0secret0of0a0bucket",
    "MLFLOW_TRACKING_PASSWORD": "planted0password0of0a0book",
    "OPENAI_API_KEY": "sk-planted0key0of0somebody",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Stack:
    home: Path
    prefect: int
    mlflow: int

    @property
    def environment(self) -> dict[str, str]:
        from flows.servers import environment

        own = {"OMP_NUM_THREADS": "1", "LBLLM_PREFECT_PORT": str(self.prefect), "LBLLM_MLFLOW_PORT": str(self.mlflow)}
        return os.environ | environment(self.home, self.prefect) | own | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.home / "no hub")} | SECRETS

    def call(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run `python <command>` from the repository's root, as a person would."""
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)

    def run(self, *overrides: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        """One run of the flow in a process of its own, and its result (empty when it failed)."""
        answer = self.home / "answer.json"
        answer.unlink(missing_ok=True)
        done = self.call("-m", "flows.once", str(answer), *SMALL, *overrides)
        told = json.loads(answer.read_text()) if answer.exists() else {}
        assert ("error" in told) == (done.returncode != 0 and bool(told)), "the file says how the run ended"
        return done, {} if "error" in told else told

    def pids(self) -> dict[str, int]:
        return {p.stem: json.loads(p.read_text())["pid"] for p in (self.home / "servers").glob("*.json")}
