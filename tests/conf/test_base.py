"""`base=NAME` lays an ablation over another recipe than the model's own; what it cannot mean is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from flows import compose as module
from flows.compose import CONF, compose, groups
from lbllm_core.config import SECTIONS, RunConfig, select
from lbllm_core.errors import ConfigError
from lbllm_core.report.ablation_tables import RECIPE, SAME_RUN

ABLATIONS = [name for name in groups()["experiment"] if name.startswith("ablation_")]
MODEL = "model=smollm2_135m"
pytestmark = pytest.mark.usefixtures("composed_once")


def values(config: RunConfig) -> dict[str, Any]:
    """Everything that decides a run, but for its experiment's name."""
    return select(config, ["seed", *SECTIONS])


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    (found,) = caught.value.problems
    return found


@pytest.mark.parametrize("experiment", ABLATIONS)
def test_an_ablation_over_another_recipe_is_that_recipe_plus_its_own_lines(experiment: str) -> None:
    own = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    written = {f"{section}.{name}": value for section, inner in own.items() if section != "base" for name, value in inner.items()}
    recipe, config = compose([MODEL, f"experiment={RECIPE}"]), compose([MODEL, f"experiment={experiment}", f"base={RECIPE}"])
    expected = values(recipe) | {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}
    assert values(config) == expected
    assert config.experiment == experiment


def test_the_recipe_matters_and_the_order_of_the_words_does_not() -> None:
    over_method = compose(["base=method", "experiment=ablation_stage4_off", MODEL])
    assert over_method == compose([MODEL, "experiment=ablation_stage4_off", "base=method"])
    assert (over_method.dataset.sequences, over_method.end_to_end.enabled) == (1216, False)
    assert compose([MODEL, "experiment=ablation_stage4_off", f"base={RECIPE}"]).dataset.sequences == 320
    assert compose([MODEL, "experiment=ablation_stage4_off", "base=embedded"]) == compose([MODEL, "experiment=ablation_stage4_off"])


def test_single_values_win_over_all_of_it() -> None:
    config = compose([MODEL, "experiment=ablation_stage4_off", f"base={RECIPE}", "end_to_end.enabled=true", "dataset.sequences=400"])
    assert (config.end_to_end.enabled, config.dataset.sequences) == (True, 400)


def test_an_unknown_recipe_is_refused_with_the_closest() -> None:
    found = problem("experiment=ablation_stage4_off", "base=method_ablation")
    assert found.startswith("base=method_ablation is no recipe")
    assert f"did you mean {RECIPE}?" in found


def test_a_delta_is_no_recipe() -> None:
    assert "base=ablation_stage4_on is no recipe" in problem("experiment=ablation_stage4_off", "base=ablation_stage4_on")


def test_a_recipe_lies_over_no_other() -> None:
    found = problem("experiment=method", f"base={RECIPE}")
    assert f"base={RECIPE}: conf/experiment/method.yaml is laid over no other recipe" in found
    assert "embedded.yaml is laid over no other recipe" in problem(f"base={RECIPE}"), "and so without an experiment"


def test_a_delta_with_a_recipe_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._read
    own: dict[str, Any] = {"base": "method", "end_to_end": {"enabled": False}}
    monkeypatch.setattr(module, "_read", lambda name: dict(own) if name == "ablation_stage4_off" else real(name))
    assert compose([MODEL, "experiment=ablation_stage4_off"]).dataset.sequences == 1216
    assert "ablation_stage4_off.yaml is laid over no other recipe" in problem(MODEL, "experiment=ablation_stage4_off", f"base={RECIPE}")
    own["base"] = "metod"
    found = problem(MODEL, "experiment=ablation_stage4_off")
    assert found.startswith("conf/experiment/ablation_stage4_off.yaml: base: metod is no recipe")
    assert "did you mean method?" in found


def test_experiments_of_one_configuration_are_known_to_the_tables() -> None:
    groups_found: dict[str, list[str]] = {str(values(compose([MODEL, f"experiment={RECIPE}"]))): [RECIPE]}
    for name in ABLATIONS:
        groups_found.setdefault(str(values(compose([MODEL, f"experiment={name}", f"base={RECIPE}"]))), []).append(name)
    assert {frozenset(names) for names in groups_found.values() if len(names) > 1} == set(map(frozenset, SAME_RUN))
