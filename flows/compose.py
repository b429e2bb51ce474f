"""From words to a configuration: the only place that knows Hydra and the folder `conf/`.

Hydra merges the chosen files (`scheme=w2a4`, `experiment=tiny`); single values (`scheme.group_size=16`) are read by
`lbllm_core/overrides.py`, so that they mean the same with and without Hydra. What comes out is a checked, frozen
`RunConfig`; what goes wrong is one ConfigError that lists every problem with its place and the closest word that exists.
Hydra's own advice (to add unknown keys with a plus sign) would have them accepted and then ignored, so it is never shown.

An experiment file is one of two things. A *recipe* chooses files and sets values, by Hydra's own means. A *delta* begins with
`base: default` and only sets values: it is laid over the recipe that the chosen model has without it, so that one file
(`ablation_stage4_off`) means the same change on every model. `base: NAME` in the file lays it over that recipe instead, and so does
`base=NAME` beside a delta that says `default`.

Composing is not thread-safe (Hydra keeps a global), hence the lock.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from lbllm_core.config import SECTIONS, RunConfig, config_from_dict, config_to_dict
from lbllm_core.errors import ConfigError
from lbllm_core.overrides import all_problems, closest, explain, field_types, merged, read, split

CONF = Path(conf.__file__).resolve().parent
DEFAULT_EXPERIMENT = "embedded"
BASE = "base"  # beside experiment=DELTA: the recipe that it is laid over
_one_at_a_time = threading.Lock()


def groups() -> dict[str, tuple[str, ...]]:
    """`{folder of conf/: names of its files}`: the vocabulary of choices."""
    folders = sorted(p for p in CONF.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    return {p.name: tuple(sorted(f.stem for f in p.glob("*.yaml"))) for p in folders}


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that the overrides ask for. Raises ConfigError with every problem found; loads nothing."""
    choices, fields, problems = _sorted_out(overrides)
    values, more = read(fields)
    problems += more
    if problems:
        raise ConfigError(problems)
    experiment = choices.get("experiment") or _default_experiment(choices)
    base, delta = _delta(experiment, choices)
    choices.pop(BASE, None)
    composed = _compose_files({**choices, "experiment": base})
    choices["experiment"] = experiment
    composed = merged(composed, {**delta, "experiment": experiment, **values})
    origins = _origins(choices, [split(override)[0] for override in fields])
    found = all_problems(composed)
    if found:
        raise ConfigError([explain(problem, origins) for problem in found])
    return config_from_dict(composed)


def about(experiment: str) -> str:
    """What an experiment tests, by the comment that its file begins with; empty where there is none."""
    try:
        lines = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    comment = [line.removeprefix("#").strip() for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    return " ".join(line for line in comment if line != "@package _global_")


def published() -> dict[str, tuple[str, dict[str, float]]]:
    """`{experiment: (model, {row/metric: published value})}` of the `paper_*` experiments, as their files say. Loads and composes nothing."""
    found = {}
    for name in groups()["experiment"]:
        content = _read(name) if name.startswith("paper_") else {}
        expected = (content.get("evaluation") or {}).get("expected")
        if expected:
            found[name] = (_model_of(content), {str(key): float(value) for key, value in expected.items()})
    return found


def _model_of(content: Mapping[str, Any]) -> str:
    """The model that an experiment's file names, or the one it builds on; empty where none does."""
    choices = content.get("defaults", ())
    own = [choice["override /model"] for choice in choices if isinstance(choice, dict) and "override /model" in choice]
    inherited = [_model_of(_read(choice)) for choice in choices if isinstance(choice, str) and choice != "_self_"]
    return next((str(model) for model in (*own, *inherited) if model), "")


def _sorted_out(overrides: Sequence[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Choices of files by group, the other overrides, and what is wrong with the choices."""
    known = groups()
    choices: dict[str, str] = {}
    fields: list[str] = []
    problems: list[str] = []
    for override in overrides:
        key, value, problem = split(override)
        value = value.strip()
        if problem:
            problems.append(problem)
        elif key == BASE or (key in known and value in known[key]):
            choices[key] = value
        elif key in known:
            problems.append(f"{key}={value!r} is not a file of {CONF.name}/{key} ({', '.join(known[key])}){closest(value, known[key])}")
        elif "." not in key and key not in field_types() and closest(key, known):
            problems.append(f"{key} is not a configuration key{closest(key, known)}")
        else:
            fields.append(override)
    return choices, fields, problems


def _default_experiment(choices: Mapping[str, str]) -> str:
    model = choices.get("model", "")
    return model if model in groups()["experiment"] else DEFAULT_EXPERIMENT


def _delta(experiment: str, choices: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The recipe under an experiment and the dotted values laid over it: a recipe is its own base, with nothing over it."""
    content = _read(experiment)
    base = content.pop("base", None)
    where = f"{CONF.name}/experiment/{experiment}.yaml"
    if BASE in choices and base != "default":
        raise ConfigError([f"base={choices[BASE]}: {where} is laid over no other recipe; only a file that says `base: default` is (every ablation_*)"])
    if base is None:
        return experiment, {}
    recipe = choices.get(BASE, _default_experiment(choices)) if base == "default" else str(base)
    if recipe not in groups()["experiment"] or "base" in _read(recipe):
        recipes = [name for name in groups()["experiment"] if "base" not in _read(name)]
        said = f"base={recipe}" if BASE in choices else f"{where}: base: {recipe}"  # typed once for all cells of a sweep: told once
        raise ConfigError([f"{said} is no recipe; write `default` or the name of an experiment without a base{closest(recipe, recipes)}"])
    if "defaults" in content:
        raise ConfigError([f"{where}: a file with a base sets values only; remove `defaults`, or make it a recipe without `base`"])
    return recipe, {f"{section}.{k}": v for section, inner in content.items() if isinstance(inner, dict) for k, v in inner.items()} | {
        key: value for key, value in content.items() if not isinstance(value, dict)
    }


def _read(experiment: str) -> dict[str, Any]:
    path = CONF / "experiment" / f"{experiment}.yaml"
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))  # as Hydra reads it: 1e-4 is a number
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([f"{CONF.name}/experiment/{experiment}.yaml cannot be read: {_first_line(error)}"]) from None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _compose_files(choices: Mapping[str, str]) -> dict[str, Any]:
    with _one_at_a_time:
        # plain values, not the dataclass: types and ranges are checked by config_from_dict, which names all problems at once
        ConfigStore.instance().store(name="schema", node=config_to_dict(RunConfig()))
        try:
            with initialize_config_dir(str(CONF), version_base="1.3"):
                composed = OmegaConf.to_container(hydra_compose("config", [f"{k}={v}" for k, v in choices.items()]), resolve=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            where = ", ".join(f"{CONF.name}/{k}/{v}.yaml" for k, v in choices.items())
            raise ConfigError([f"the files {where} do not compose: {_first_line(error)}"]) from None
    if not isinstance(composed, dict):
        raise ConfigError([f"{CONF.name}/config.yaml is not a set of sections"])
    return {str(key): value for key, value in composed.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "+" not in line]
    return lines[0] if lines else type(error).__name__


def _origins(choices: Mapping[str, str], fields: Sequence[str]) -> dict[str, str]:
    """Where a section's values may come from: the file that was chosen or, for a single field, the command line."""
    experiment = f"{CONF.name}/experiment/{choices['experiment']}.yaml"
    found = {section: f"{CONF.name}/{section}/{choices[section]}.yaml" if section in choices else f"{CONF.name}/{section}/ or {experiment}" for section in SECTIONS}
    return found | dict.fromkeys(fields, "given on the command line")
