"""Kill -9 in the middle of a stage: the next run reuses what was finished, and ends with the same bytes as an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("killed_run.py")
SMALL = [
    "scheme.codebook_size=32",
    "dataset.sequences=16",
    "ptq_init.sequences=16",
    "weight_distill.sequences=16",
    "act_quant.sequences=16",
    "end_to_end.steps=8",
    "end_to_end.checkpoint_every=2",
    "pack.benchmark=false",
]
# (seed, stage, how many of its reports come first): the delay after the last of them is drawn from the seed
POINTS = [(11, "ptq_init", 1), (12, "weight_distill", 1), (13, "end_to_end", 5)]
Digests = list[list[Any]]


def run(home: Path, step: str = "none", units: int = 0, delay: float = 0.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DRIVER), str(home), step, str(units), str(delay), *SMALL]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, timeout=300)


def digests(done: subprocess.CompletedProcess[str]) -> Digests:
    assert done.returncode == 0, done.stderr
    found: Digests = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Digests]:
    home = tmp_path_factory.mktemp("undisturbed")
    return home, digests(run(home))


def test_killed_three_times_and_continued(undisturbed: tuple[Path, Digests], tmp_path: Path) -> None:
    reference_home, reference = undisturbed
    shutil.copytree(reference_home / "models", tmp_path / "models")  # the teacher is not what is tested here
    kept: dict[Path, int] = {}
    for seed, step, units in POINTS:
        killed = run(tmp_path, step, units, random.Random(seed).uniform(0.0, 0.05))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        folder = next(p for p in (tmp_path / "artifacts" / step).iterdir() if p.is_dir())
        assert not (folder / "manifest.json").exists(), f"{step} was to be killed in the middle"
        assert list(folder.glob("*_000.safetensors")), f"{step} had finished its first unit"
        kept |= {p: p.stat().st_mtime_ns for p in (tmp_path / "artifacts").rglob("block_*.safetensors")}

    continued = digests(run(tmp_path))
    assert [entry[:3] for entry in continued] == [entry[:3] for entry in reference]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept, "finished blocks were not written again"
    stages = {entry[1]: entry[3] for entry in continued if entry[0] == "final"}
    assert stages["ptq_init"]
    assert stages["weight_distill"]
    assert not stages["end_to_end"]


def test_finished_run_builds_nothing_again(undisturbed: tuple[Path, Digests]) -> None:
    home, reference = undisturbed
    again = digests(run(home))
    assert all(entry[3] for entry in again)
    assert [entry[:3] for entry in again] == [entry[:3] for entry in reference]
