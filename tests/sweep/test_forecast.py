"""What a run would do: cached, shared and missing steps, known times, and what stands in the way, without loading anything."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.compose import compose
from lbllm_core import forecast as module
from lbllm_core.config import RunConfig
from lbllm_core.engine.artifacts import key_of, key_parts
from lbllm_core.engine.files import write_atomic
from lbllm_core.forecast import Forecaster, estimate
from lbllm_core.pipeline import SPECS

EXTRA = {"device": "cpu", "compute_dtype": "float32", "model weights": "w" * 64}


@pytest.fixture
def teacher_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that needs no file: the digest of its name."""
    monkeypatch.setattr(module, "at_hand", lambda model, home: True)
    monkeypatch.setattr("lbllm_core.model.load.teacher_digest", lambda model, home: f"digest of {model.name}")


def publish(home: Path, step: str, config: RunConfig, seconds: float, recipe: str = "", age: float = 0.0, **extra: str) -> None:
    """A finished artifact on disk, as small as it can be."""
    parts: dict[str, Any] = key_parts(SPECS[step], config, {}, EXTRA | extra)
    key = recipe or key_of(parts)
    folder = home / "artifacts" / step / key[:16]
    folder.mkdir(parents=True)
    manifest = {"schema": 1, "handle": {"step": step, "key": key, "digest": f"content of {key}", "metrics": {}}, "parts": parts}
    write_atomic(folder / "manifest.json", json.dumps(manifest).encode())
    (folder / "timing.json").write_text(json.dumps({"seconds": seconds}))
    now = (folder / "manifest.json").stat().st_mtime
    os.utime(folder / "manifest.json", (now - age, now - age))


def test_nothing_there_all_missing_and_unknown(tmp_path: Path) -> None:
    found = Forecaster(tmp_path).forecast(compose(["model=tiny"]))
    assert found.count("missing") == len({step.recipe for step in found.steps})
    assert found.unknown == found.count("missing")
    assert found.note == "the teacher is trained first"
    assert not list(tmp_path.iterdir()), "a forecast makes nothing"


def test_steps_of_an_earlier_run_are_shared(tmp_path: Path, teacher_at_hand: None) -> None:
    forecaster = Forecaster(tmp_path)
    forecaster.forecast(compose(["model=tiny"]))
    again = forecaster.forecast(compose(["model=tiny", "end_to_end.steps=9"]))
    missing = {step.name for step in again.steps if step.state == "missing"}
    assert missing == {"end_to_end", "pack_and_benchmark", "evaluate_model"}, "a changed stage, and what depends on it"
    other_seed = forecaster.forecast(compose(["model=tiny", "seed=5"]))
    assert {step.name for step in other_seed.steps if step.state == "shared"} == {"evaluate_teacher"}


def test_finished_steps_are_cached_and_their_content_gives_the_next_key(tmp_path: Path, teacher_at_hand: None) -> None:
    config = compose(["model=tiny"])
    first = {step.name: step for step in Forecaster(tmp_path).forecast(config).steps}
    for step in ("evaluate_teacher", "ptq_init"):
        publish(tmp_path, step, config, 3.0, first[step].recipe)
    second = {step.name: step for step in Forecaster(tmp_path).forecast(config).steps}
    assert [name for name, step in second.items() if step.state == "cached"] == ["evaluate_teacher", "ptq_init"]
    assert second["weight_distill"].recipe != first["weight_distill"].recipe
    publish(tmp_path, "weight_distill", config, 3.0, second["weight_distill"].recipe)
    third = {step.name: step for step in Forecaster(tmp_path).forecast(config).steps}
    assert third["weight_distill"].state == "cached"
    assert third["act_quant"].state == "missing"


def test_an_unfinished_or_foreign_folder_is_not_cached(tmp_path: Path, teacher_at_hand: None) -> None:
    config = compose(["model=tiny"])
    recipe = next(s.recipe for s in Forecaster(tmp_path).forecast(config).steps if s.name == "ptq_init")
    publish(tmp_path, "ptq_init", config, 3.0, recipe)
    manifest = tmp_path / "artifacts" / "ptq_init" / recipe[:16] / "manifest.json"
    manifest.write_text("{")
    assert next(s.state for s in Forecaster(tmp_path).forecast(config).steps if s.name == "ptq_init") == "missing"


def test_time_comes_from_the_most_similar_artifact(tmp_path: Path) -> None:
    config = compose(["model=tiny"])
    parts = key_parts(SPECS["weight_distill"], config, {}, EXTRA)
    assert estimate(parts, tmp_path) is None
    far = replace(config, weight_distill=replace(config.weight_distill, lr_weight=0.1, lr_levels=0.1), seed=1)
    publish(tmp_path, "weight_distill", far, 99.0)
    assert estimate(parts, tmp_path) == 99.0
    near = replace(config, seed=2)
    publish(tmp_path, "weight_distill", near, 40.0, age=50)
    assert estimate(parts, tmp_path) == 40.0, "fewer differences win over newer"
    publish(tmp_path, "weight_distill", replace(config, seed=3), 44.0)
    assert estimate(parts, tmp_path) == 44.0, "then the newer wins"


def test_time_is_in_proportion_to_the_training(tmp_path: Path) -> None:
    config = compose(["model=tiny", "weight_distill.epochs=4", "weight_distill.sequences=64"])
    publish(tmp_path, "weight_distill", config, 80.0)
    less = replace(config, weight_distill=replace(config.weight_distill, epochs=1, sequences=32))
    assert estimate(key_parts(SPECS["weight_distill"], less, {}, EXTRA), tmp_path) == pytest.approx(10.0)


def test_times_of_other_teachers_and_machines_do_not_count(tmp_path: Path) -> None:
    config = compose(["model=tiny"])
    publish(tmp_path, "ptq_init", compose(["model=tiny", "model.blocks=1"]), 5.0)
    publish(tmp_path, "ptq_init", replace(config, seed=4), 5.0, device="cuda")
    publish(tmp_path, "ptq_init", replace(config, scheme=replace(config.scheme, level_mode="explicit")), 5.0)
    assert estimate(key_parts(SPECS["ptq_init"], config, {}, EXTRA), tmp_path) is None


def test_what_stands_in_the_way_is_known_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = Forecaster(tmp_path).forecast(compose(["model=llama2", "model.path=nobody/nothing-of-this-name"]))
    assert "nobody/nothing-of-this-name" in offline.obstacle
    assert "model.source=folder" in offline.obstacle
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    online = Forecaster(tmp_path).forecast(compose(["model=llama2", "model.path=nobody/nothing-of-this-name"]))
    assert not online.obstacle
    assert "fetched first" in online.note
    folder = Forecaster(tmp_path).forecast(compose(["model=tiny", "model.source=folder", f"model.path={tmp_path / 'absent'}"]))
    assert "there is no model folder" in folder.obstacle
