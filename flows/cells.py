"""The cells of a sweep: models x experiments x seeds, from words to checked configurations.

A cell is one run of the flow. Words are the files of `conf/`; two of them stand for many: `ablations` for every experiment
whose name begins with `ablation_`, `paper` for every `paper_*` but its recipe (with MODELS given: those of these models, because a row of
the paper belongs to its model). Without EXPERIMENTS each model gets its own default, as in `make run`; without MODELS each
experiment keeps its own model. Where both are given they compose as overrides do: the model's file wins over the one that the
experiment names, the experiment's single values stay.

Everything that is wrong is found before anything runs and told in one message. A sweep's name is made of its words, so that
the same command means the same sweep.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flows.compose import compose, groups
from flows.sweep_record import name_problem
from lbllm_core.config import RunConfig
from lbllm_core.errors import ConfigError
from lbllm_core.overrides import closest
from tasks.tracking import row_digest

SETS: Mapping[str, str] = {"ablations": "ablation_", "paper": "paper_"}  # word -> how the names of its experiments begin
RECIPE = "_recipe"  # a file that others are made from is no row of its own
READABLE = 60  # letters of a name that the words make


@dataclass(frozen=True)
class Request:
    """What was asked for. `overrides` go to every cell; `name` is empty where the words shall name the sweep; `question` is what it is to find out."""

    models: tuple[str, ...] = ()
    experiments: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    name: str = ""
    question: str = ""


@dataclass(frozen=True)
class Cell:
    """One run of the flow: what is typed for it, and the configuration that it means."""

    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def digest(self) -> str:
        """What its row in MLflow is known by; equal cells have equal digests."""
        return row_digest(self.config)

    @property
    def title(self) -> str:
        """`smollm2_135m embedded seed 0`: how the cell is called in tables and messages."""
        return f"{self.config.model.name} {self.config.experiment} seed {self.config.seed}"


def words(text: str) -> tuple[str, ...]:
    """`a, b,,a` -> `('a', 'b')`: what stands between commas or blanks, each once, in its order."""
    return tuple(dict.fromkeys(word for word in re.split(r"[,\s]+", text) if word))


def cells(request: Request) -> tuple[str, tuple[Cell, ...]]:
    """The sweep's name and its cells, each once, in the order of the words. ConfigError holds every problem; loads nothing."""
    known = groups()
    problems = _unknown("MODELS", request.models, known["model"], "conf/model")
    problems += _unknown("EXPERIMENTS", request.experiments, (*known["experiment"], *SETS), "conf/experiment")
    problems += [f"SEEDS: {seed!r} is not a whole number from 0 to 2147483647" for seed in request.seeds if not _is_seed(seed)]
    if not request.models and not request.experiments:
        problems.append("a sweep needs MODELS=a,b or EXPERIMENTS=a,b (files of conf/model and conf/experiment), for example: make sweep MODELS=tiny SEEDS=0,1")
    name = request.name or default_name(request)
    problems += [problem for problem in (name_problem(name),) if problem]
    models = [m for m in request.models if m in known["model"]]
    experiments = [e for e in request.experiments if e in known["experiment"] or e in SETS]
    seeds = [s for s in request.seeds if _is_seed(s)] or [""]
    pairs = _pairs(models, experiments, known["experiment"], problems)
    found: dict[str, Cell] = {}
    wrong: dict[str, list[str]] = {}
    asked = [{key: value for key, value in zip(("model", "experiment", "seed"), (*pair, seed), strict=True) if value} for pair in pairs for seed in seeds]
    for chosen in asked:
        overrides = (*(f"{key}={value}" for key, value in chosen.items()), *request.overrides, f"tracking.sweep={name}")
        try:
            cell = Cell(overrides, compose(overrides))
            found.setdefault(cell.digest, cell)
        except ConfigError as error:
            for problem in error.problems:
                wrong.setdefault(problem, []).append(" x ".join(chosen.values()))
    problems += _told(wrong, len(asked))
    if problems:
        raise ConfigError(problems)
    return name, tuple(found.values())


def default_name(request: Request) -> str:
    """`smollm2_135m+tiny--embedded--0+1`: the words in alphabetical order; overrides, and what is too long, as a digest."""
    asked = [sorted(request.models), sorted(request.experiments), sorted(request.seeds)]
    name = "--".join(re.sub(r"[^A-Za-z0-9_+-]+", "_", "+".join(group)) for group in asked if group).lstrip("_+-") or "sweep"
    if len(name) <= READABLE and not request.overrides:
        return name
    digest = hashlib.sha256(repr((asked, request.overrides)).encode()).hexdigest()[:8]
    return f"{name[:READABLE]}--{digest}"


def _unknown(variable: str, given: Iterable[str], known: Sequence[str], where: str) -> list[str]:
    return [f"{variable}: {word!r} is not a file of {where} ({', '.join(known)}){closest(word, known)}" for word in given if word not in known]


def _is_seed(word: str) -> bool:
    return word.isdecimal() and word.isascii() and int(word) < 2**31


def _pairs(models: Sequence[str], experiments: Sequence[str], known: Sequence[str], problems: list[str]) -> list[tuple[str, str]]:
    """(model, experiment) of every cell, a model's cells together; an empty word leaves the choice to the other."""
    members: dict[str, list[str]] = {}
    for word in experiments:
        members[word] = [name for name in known if name.startswith(SETS[word]) and not name.endswith(RECIPE)] if word in SETS else [word]
        if not members[word]:
            problems.append(f"EXPERIMENTS: {word!r} stands for the files {SETS[word]}* of conf/experiment, and there are none")
    pairs = []
    for model in models or [""]:
        for word in experiments or [""]:
            for experiment in members.get(word, [word]):
                if not (model and word == "paper" and _model_of(experiment) != model):
                    pairs.append((model, experiment))
    if "paper" in experiments and members["paper"] and models:
        without = [m for m in models if all(_model_of(e) != m for e in members["paper"])]
        problems += [f"MODELS: the paper has no row of {model}; drop it or drop EXPERIMENTS=paper" for model in without]
    return pairs


def _model_of(experiment: str) -> str:
    try:
        return compose([f"experiment={experiment}"]).model.name
    except ConfigError:  # told when its cell is composed
        return ""


def _told(found: Mapping[str, Sequence[str]], all_cells: int) -> list[str]:
    """Problems of single cells, with the cell; one that every cell has (a mistyped override) is told once, without."""
    return [problem if len(where) == all_cells else f"{cell}: {problem}" for problem, where in found.items() for cell in (where[:1] if len(where) == all_cells else where)]
