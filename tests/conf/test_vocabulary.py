"""Every file under conf/ composes, says what it is, and means what it says."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from flows.compose import CONF, about, compose, groups, published
from lbllm_core.config import SECTIONS, RunConfig, select
from lbllm_core.overrides import field_types
from lbllm_core.pipeline import SPECS

EXPERIMENTS = groups()["experiment"]
NEEDS = {  # choices that only make sense beside another one
    ("ptq_init", "rtn"): ["scheme.level_mode=explicit"],
    ("weight_distill", "latent"): ["scheme.level_mode=explicit"],
    ("dataset", "self_generated"): [],
    ("dataset", "synthetic"): [],
    ("dataset", "files"): [],
}
ALL = [(group, name) for group, names in groups().items() for name in names if group != "experiment"]


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if not name.startswith("ablation_")])  # those: twice, below
def test_every_experiment_composes(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    assert config.experiment == experiment


@pytest.mark.parametrize(("group", "name"), ALL)
def test_every_choice_composes(group: str, name: str) -> None:
    config = compose([f"{group}={name}", *NEEDS.get((group, name), [])])
    section = getattr(config, group)
    assert getattr(section, "name", name) == name


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_every_file_is_explained_and_holds_only_known_keys(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    comments = [line for line in text.splitlines() if line.startswith("#") and not line.startswith("# @package")]
    assert comments, "a comment says what the choice is"
    values = {k: v for k, v in (yaml.safe_load(text) or {}).items() if k not in ("defaults", "base")}
    keys = {f"{path.parent.name}.{k}" for k in values} if path.parent.name in SECTIONS else set(values)
    if path.parent.name == "experiment":
        keys = {f"{section}.{k}" for section, inner in values.items() if isinstance(inner, dict) for k in inner} | {k for k, v in values.items() if not isinstance(v, dict)}
    assert keys <= set(field_types())


ABLATIONS = [name for name in EXPERIMENTS if name.startswith("ablation_")]
PUBLISHED = [name for name in EXPERIMENTS if name.startswith(("paper_", "control_")) and name != "paper_recipe"]
AXES = ("stages", "stage4", "wat", "aar", "init", "act", "smoothing", "beta", "bitmap", "group", "levels", "data", "joint", "predecessor", "pairing", "snap")


@functools.cache
def recipe(model: str) -> RunConfig:
    return compose([f"model={model}"])


def differences(one: RunConfig, other: RunConfig) -> set[str]:
    a, b = (select(c, ["seed", *SECTIONS]) for c in (one, other))
    return {name for name in a if a[name] != b[name]}


@pytest.mark.parametrize("model", ["tiny", "smollm2_135m"])
@pytest.mark.parametrize("experiment", ABLATIONS)
@pytest.mark.usefixtures("composed_once")
def test_an_ablation_is_the_models_recipe_plus_its_own_lines(experiment: str, model: str) -> None:
    own = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    assert own.pop("base") == "default"
    config = compose([f"model={model}", f"experiment={experiment}"])
    written = {f"{section}.{name}": value for section, values in own.items() for name, value in values.items()}
    assert differences(config, recipe(model)) <= set(written)
    for name, value in written.items():
        assert select(config, [name])[name] == (tuple(value) if isinstance(value, list) else value)
    assert not {"model", "evaluation", "hardware", "tracking"} & set(own)


def test_every_axis_has_its_experiments() -> None:
    assert {name.split("_")[1] for name in ABLATIONS} >= set(AXES)
    contents = {yaml.dump(yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))) for name in ABLATIONS}
    assert len(contents) == len(ABLATIONS), "no two files say the same"


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_published_row_says_what_it_expects_and_where_that_stands(experiment: str) -> None:
    evaluation = compose([f"experiment={experiment}"]).evaluation
    assert evaluation.expected
    assert evaluation.source
    assert 0 < evaluation.tolerance <= 0.1
    for name in evaluation.expected:
        row, _, metric = name.partition("/")
        assert row in ("teacher", "final")
        assert metric in evaluation.protocols or metric.removeprefix("acc_") in evaluation.tasks


def test_expected_values_and_refusals_are_in_no_key() -> None:
    read = {name for spec in SPECS.values() for name in select(RunConfig(), spec.fields)}
    assert not read & {"evaluation.expected", "evaluation.tolerance", "evaluation.source", "hardware.preflight", "dataset.min_distinct"}
    assert {"dataset.source", "dataset.temperature"} <= read


def test_single_values_win_over_a_delta_and_a_delta_over_its_recipe() -> None:
    assert not compose(["experiment=ablation_stage4_off"]).end_to_end.enabled
    assert compose(["end_to_end.enabled=true", "experiment=ablation_stage4_off"]).end_to_end.enabled
    assert compose(["experiment=ablation_stage4_off"]).model == compose().model


def test_vocabularies_said_twice_agree() -> None:
    from lbllm_core.config import ROWS, TASKS, TEXTS
    from lbllm_core.data import protocols, tasks
    from lbllm_core.report.tables import ROW_TITLES

    assert set(TEXTS) == set(protocols.WINDOW)
    assert set(TASKS) == {*tasks.TASKS, tasks.MMLU}
    assert set(ROWS) == set(ROW_TITLES)


def test_the_default_is_the_embedded_experiment() -> None:
    assert compose() == compose(["experiment=embedded"])
    assert compose().model.source == "package"


def test_a_model_of_its_own_experiment_brings_it() -> None:
    assert compose(["model=tiny"]) == compose(["experiment=tiny"])
    assert compose(["model=tiny", "experiment=embedded", "dataset.seq_len=128"]).dataset.source == "embedded"


def test_choices_then_single_values_whatever_their_order() -> None:
    one = compose(["scheme.group_size=16", "scheme=w1p1a16"])
    assert one == compose(["scheme=w1p1a16", "scheme.group_size=16"])
    assert (one.scheme.group_size, one.scheme.act_bits) == (16, 16)


def test_values_are_taken_as_written() -> None:
    config = compose(["model.source=folder", "model.path=/a b/it's=ü,x", "model.expected={ppl_embedded: 3, ppl_c4_s512: 1e1}", "evaluation.tasks=[piqa, boolq]", "tracking.enabled=False"])
    assert config.model.path == "/a b/it's=ü,x"
    assert config.model.expected == {"ppl_embedded": 3.0, "ppl_c4_s512": 10.0}
    assert config.evaluation.tasks == ("piqa", "boolq")
    assert config.tracking.enabled is False


def test_composing_in_threads() -> None:
    wanted = ["w1p1a4", "w1p1a16", "w2a4", "w2a16"] * 2
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: compose([f"scheme={name}"]).scheme.name, wanted))
    assert found == wanted


def test_schema_and_files_agree_on_sections() -> None:
    assert set(groups()) - {"experiment"} <= set(SECTIONS)
    assert isinstance(compose(), RunConfig)


def test_published_values_are_those_of_the_composed_files() -> None:
    found = published()
    assert len(found) >= 10
    for name, (model, expected) in found.items():
        config = compose([f"experiment={name}"])
        assert (model, expected) == (config.model.name, dict(config.evaluation.expected))


def test_every_experiment_says_what_it_tests() -> None:
    assert not [name for name in groups()["experiment"] if len(about(name)) < 20]
    assert about("ablation_stage4_off") == "Stage 4, the end-to-end refinement, left out."
    assert about("no such") == ""
