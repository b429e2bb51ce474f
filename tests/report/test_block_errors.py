"""Errors of the stages, read back from the artifacts of a run."""

import json
import shutil

import pytest

from lbllm_core.engine.artifacts import MANIFEST
from lbllm_core.errors import ArtifactError
from lbllm_core.evaluation import site_costs
from lbllm_core.report import block_errors
from lbllm_core.report.block_errors import errors_table, records_of, site_costs_table, student_folders
from lbllm_core.report.records import read_results
from lbllm_core.run import read_config, run_pipeline

COSTS = ["--protocol", "ppl_synthetic", "--windows", "1"]


@pytest.fixture(scope="module")
def home(models_home, tiny_teacher, tmp_path_factory):
    """A home of its own: a kept one may hold artifacts of another version."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").symlink_to(models_home.absolute() / "models")
    return folder


@pytest.fixture(scope="module")
def packed(home):
    small = ["end_to_end.enabled=false", "weight_distill.sequences=8", "act_quant.sequences=8", "pack.benchmark=false", "evaluation.protocols=[]"]
    config = read_config(None, ["experiment=of_this_test", "seed=3", *small])
    return next(f.handle for f in run_pipeline(config, home) if f.handle.step == "pack_and_benchmark").folder(home) / "packed"


@pytest.fixture
def here(home, packed, tmp_path, monkeypatch):
    """A working folder with committed results, as a checkout has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LBLLM_HOME", str(home))
    (tmp_path / "results").mkdir()
    for name in ("errors_cpu", "site_costs_cpu"):
        (tmp_path / "results" / f"{name}.json").write_text("committed")
    return tmp_path


@pytest.mark.parametrize(("main", "arguments"), [(block_errors.main, []), (site_costs.main, COSTS)])
def test_only_a_file_that_is_named_is_written_and_its_records_name_their_run(main, arguments, here, capsys):
    assert main(arguments) == 0
    assert {path.read_text() for path in (here / "results").iterdir()} == {"committed"}
    assert capsys.readouterr().out
    assert main([*arguments, "--out", "found.json"]) == 0
    content = read_results(here / "found.json")
    assert {(r["model"], r["experiment"], r["seed"]) for r in content["records"]} == {("tiny", "of_this_test", 3)}
    assert content["command"].endswith("--out found.json")


@pytest.mark.parametrize(("main", "arguments"), [(block_errors.main, []), (site_costs.main, COSTS)])
def test_a_model_whose_run_is_not_known_is_recorded_under_given_names(main, arguments, here, home, packed, capsys):
    """As of an artifact that an older version made."""
    old = packed.parents[1] / "older"
    shutil.copytree(packed.parent, old)
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["made_for"]
    (old / MANIFEST).write_text(json.dumps(manifest))
    try:
        asked = [*arguments, "--model-dir", str(old), "--out", "found.json"]
        assert main(asked) == 1
        assert "name what is missing: --model --experiment --seed" in capsys.readouterr().err
        assert not (here / "found.json").exists()
        assert main([*asked, "--model", "m", "--experiment", "e", "--seed", "0"]) == 0
        assert {(r["model"], r["experiment"], r["seed"]) for r in read_results(here / "found.json")["records"]} == {("m", "e", 0)}
    finally:
        shutil.rmtree(old)


def test_negative_windows_are_a_usage_error(capsys):
    with pytest.raises(SystemExit) as end:
        site_costs.main(["--windows", "-2"])
    assert end.value.code == 2
    assert "--windows must be at least 0" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told(here, capsys):
    assert block_errors.main(["--out", "results/errors_cpu.json/found.json"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_chain_of_a_run_is_followed_back(home, packed):
    folders = student_folders(packed, home)
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


