"""Every file under conf/ composes, says what it is, and means what it says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from flows.compose import CONF, compose, groups
from lbllm_core.config import SECTIONS, RunConfig
from lbllm_core.overrides import field_types

EXPERIMENTS = groups()["experiment"]
NEEDS = {  # choices that only make sense beside another one
    ("ptq_init", "rtn"): ["scheme.level_mode=explicit"],
    ("weight_distill", "latent"): ["scheme.level_mode=explicit"],
    ("dataset", "synthetic"): [],
    ("dataset", "files"): [],
}
ALL = [(group, name) for group, names in groups().items() for name in names if group != "experiment"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
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
    values = {k: v for k, v in (yaml.safe_load(text) or {}).items() if k != "defaults"}
    keys = {f"{path.parent.name}.{k}" for k in values} if path.parent.name in SECTIONS else set(values)
    if path.parent.name == "experiment":
        keys = {f"{section}.{k}" for section, inner in values.items() if isinstance(inner, dict) for k in inner} | {k for k, v in values.items() if not isinstance(v, dict)}
    assert keys <= set(field_types())


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
    config = compose(["model.source=folder", "model.path=/a b/it's=ü,x", "model.expected={ppl_x: 3, ppl_y: 1e1}", "evaluation.tasks=[piqa, boolq]", "tracking.enabled=False"])
    assert config.model.path == "/a b/it's=ü,x"
    assert config.model.expected == {"ppl_x": 3.0, "ppl_y": 10.0}
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
