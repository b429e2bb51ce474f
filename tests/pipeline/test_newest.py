"""The packed model that is meant when nobody names one: the final one of the newest run, not a row beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbllm_core.config import RunConfig
from lbllm_core.engine.artifacts import read_manifest, run_step
from lbllm_core.engine.step import StepContext, StepSpec
from lbllm_core.errors import ArtifactError
from lbllm_core.newest import packed_folder


def pack(context: StepContext) -> dict[str, float]:
    (context.folder / "packed").mkdir()
    (context.folder / "packed" / "config.json").write_text("{}")
    return {}


SPEC = StepSpec("pack_and_benchmark", ("seed",), ("lbllm_core.newest",), pack)


def packed(home: Path, seed: int, row: str) -> Path:
    return run_step(SPEC, RunConfig(seed=seed), {}, home, row=row).folder(home) / "packed"


def test_rows_beside_the_final_one_are_newer_and_not_meant(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="make run"):
        packed_folder(tmp_path)
    beside = packed(tmp_path, 0, "stage1")
    assert packed_folder(tmp_path) == beside, "better than none"
    final = packed(tmp_path, 1, "final")
    packed(tmp_path, 2, "stage1_explicit")
    assert packed_folder(tmp_path) == final
    assert packed_folder(tmp_path, str(beside)) == beside
    assert read_manifest(final.parent)["made_for"]["row"] == "final"
    newer = packed(tmp_path, 3, "final")
    assert packed_folder(tmp_path) == newer
