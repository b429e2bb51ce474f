"""Errors of the stages, read back from the artifacts of a run."""

import json

import pytest

from lbllm_core.errors import ArtifactError
from lbllm_core.report.block_errors import errors_table, records_of, site_costs_table, student_folders
from lbllm_core.run import read_config, run_pipeline


def test_the_chain_of_a_run_is_followed_back(models_home):
    config = read_config(None, ["end_to_end.enabled=false", "weight_distill.sequences=8", "act_quant.sequences=8", "pack.benchmark=false", "evaluation.protocols=[]"])
    packed = next(f.handle for f in run_pipeline(config, models_home) if f.handle.step == "pack_and_benchmark").folder(models_home) / "packed"
    folders = student_folders(packed, models_home)
    assert list(folders) == ["ptq_init", "weight_distill", "act_quant"]
    records = records_of(folders)
    linears = {r["linear"]: r for r in records if r["name"] == "weight_error"}
    assert len(linears) == 7
    assert all(r["least"] <= r["value"] <= r["largest"] for r in linears.values())
    figures = json.loads((folders["ptq_init"] / "block_001.json").read_text())["figures"]
    assert linears["mlp.down_proj"]["least"] <= figures["weight_error/mlp.down_proj"] <= linears["mlp.down_proj"]["largest"]
    errors = {(r["stage"], r["when"], r["block"]): r["value"] for r in records if r["name"] == "block_error"}
    assert set(errors) == {(stage, when, block) for stage in (2, 3) for when in ("before", "after") for block in (1, 2)}
    assert errors[2, "after", 1] < errors[2, "before", 1]
    assert errors[2, "after", 1] < errors[2, "after", 2]
    assert f"{errors[3, 'before', 2]:.3f}" in errors_table(records)


def test_a_folder_without_an_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not part of an artifact"):
        student_folders(tmp_path / "packed", tmp_path)


def test_blocks_are_thinned_and_the_mean_is_over_all():
    records = [{"name": "block_error", "value": float(i), "stage": 2, "when": "after", "block": i} for i in range(1, 31)]
    lines = errors_table(records).splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ") and line[2].isdigit()] == ["1", "7", "13", "18", "24", "30"]
    assert "| mean of 30 | 15.500 |" in lines


def test_sites_stand_beside_none():
    records = [{"name": "ppl_x", "value": v, "stderr": 0.5, "sites": s, "unit": "1"} for s, v in (("none", 20.0), ("o", 21.0), ("all", 30.0))]
    assert site_costs_table(records).splitlines()[3:] == ["| o | 21.00 ± 0.50 | 5.0 % |", "| all | 30.00 ± 0.50 | 50.0 % |"]


