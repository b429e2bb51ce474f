"""What a run would do, without doing it: which steps are cached, how long the others take, and what stands in the way.

A step's key needs the content digests of its inputs, which are known only once these are finished. So the plan is walked in
order: a step whose inputs are all finished gets its true key, and is *cached* when its manifest is there; any other gets a
*recipe*, the same hash with the recipes of its inputs in place of their digests. Equal recipes give equal results, so a step
that an earlier run of the same sweep builds is *shared* and costs nothing again. Files are not read through here (the run
does that), and a step whose input is rebuilt to the same bytes will turn out cached after all: the counts are upper bounds.

Time is what an earlier artifact of this home took (`timing.json`): the same step on the same teacher, device and number type,
measuring the same things; of those the one with the fewest other differences, then the newest. Its seconds are scaled by the
amount of training (tokens times epochs; steps times tokens), where a step's time is known to be in proportion. Without such an
artifact the time is unknown, and is said to be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbllm_core.config import ModelConfig, RunConfig, canonical_json, select
from lbllm_core.engine.artifacts import MANIFEST, Handle, folder_of, key_of, key_parts, read_manifest, read_seconds
from lbllm_core.engine.fingerprint import code_fingerprint
from lbllm_core.engine.step import StepSpec
from lbllm_core.errors import ArtifactError, LbllmError
from lbllm_core.pipeline import PlannedStep, facts, plan

TEACHER = ("model.source", "model.path", "model.file", "model.blocks")
MEASURED = ("evaluation.protocols", "evaluation.tasks", "evaluation.task_limit")
# beside the teacher, what must be equal for a time to be comparable at all
SAME = {
    "evaluate_teacher": MEASURED,
    "ptq_init": ("ptq_init.method", "scheme.level_mode"),
    "pack_and_benchmark": ("pack.benchmark", "pack.repeats"),
    "evaluate_model": MEASURED,
    "evaluate_control": (*MEASURED, "evaluation.baselines"),
    "score_requests": ("evaluation.requests",),
}
# fields whose product a step's time is in proportion to
AMOUNT = {
    "weight_distill": ("weight_distill.sequences", "weight_distill.epochs", "dataset.seq_len"),
    "act_quant": ("act_quant.sequences", "act_quant.epochs", "dataset.seq_len"),
    "end_to_end": ("end_to_end.steps", "end_to_end.batch_size", "dataset.seq_len"),
}


@dataclass(frozen=True)
class StepForecast:
    """One step: `state` is cached, shared (an earlier run of the sweep builds it) or missing; `seconds` None: unknown."""

    name: str
    recipe: str
    state: str
    seconds: float | None


@dataclass(frozen=True)
class Forecast:
    """One run. `obstacle`: why it cannot run, as a sentence with a remedy; `note`: what happens first."""

    steps: tuple[StepForecast, ...] = ()
    obstacle: str = ""
    note: str = ""

    def count(self, state: str) -> int:
        """How many steps are in that state."""
        return sum(step.state == state for step in self.steps)

    @property
    def known_seconds(self) -> float:
        """Time of the missing steps whose time is known."""
        return sum(step.seconds or 0.0 for step in self.steps if step.state == "missing")

    @property
    def unknown(self) -> int:
        """Missing steps whose time is not known."""
        return sum(step.state == "missing" and step.seconds is None for step in self.steps)


class Forecaster:
    """Forecasts for several runs of one home at one moment; digests and fingerprints are taken once."""

    def __init__(self, home: Path):
        self.home = home
        self._weights: dict[str, str] = {}
        self._facts: dict[str, dict[str, str]] = {}
        self._code: dict[str, dict[str, str]] = {}
        self._recipes: set[str] = set()

    def forecast(self, config: RunConfig) -> Forecast:
        """The run of this config, after the runs that were asked about before. Downloads, trains and converts nothing."""
        try:
            weights = self._teacher(config.model)
            steps, seen = [], dict[str, Handle]()
            for step in plan(config):
                steps.append(self._step(step, seen, weights or f"to come: {canonical_json(select(config, TEACHER))}"))
        except LbllmError as error:
            return Forecast(obstacle=str(error))
        self._recipes |= {step.recipe for step in steps}
        first = {"": "the teacher is trained first" if config.model.source == "synthetic" else f"the weights of {config.model.path} are fetched first"}
        return Forecast(tuple(steps), note=first.get(weights, ""))

    def _teacher(self, model: ModelConfig) -> str:
        """The teacher's digest; empty when it must be made or fetched first. ModelError when that is known to fail."""
        from lbllm_core.model.load import teacher_digest

        key = canonical_json(select(RunConfig(model=model), ("model",)))
        if key not in self._weights:
            self._weights[key] = teacher_digest(model, self.home) if at_hand(model, self.home) else ""
        return self._weights[key]

    def _step(self, step: PlannedStep, seen: dict[str, Handle], weights: str) -> StepForecast:
        inputs = {role: seen[source] for role, source in step.inputs.items()}
        parts = key_parts(step.spec, step.config, inputs, self._facts_of(step.spec, step.config, weights), self._code_of(step.spec))
        recipe = key_of(parts)
        handle = _finished(folder_of(self.home, step.spec.name, recipe))
        state = "cached" if handle else "shared" if recipe in self._recipes else "missing"
        seconds = estimate(parts, self.home) if state == "missing" else 0.0
        seen[step.name] = handle or Handle(step.spec.name, recipe, recipe)
        self._recipes.add(recipe)
        return StepForecast(step.name, recipe, state, seconds)

    def _facts_of(self, spec: StepSpec, config: RunConfig, weights: str) -> dict[str, str]:
        key = canonical_json([spec.name, weights, select(config, ("dataset", "evaluation", "hardware", "model.context"))])
        if key not in self._facts:
            self._facts[key] = self._facts_without_sampling(spec, config, weights)
        return self._facts[key]

    def _facts_without_sampling(self, spec: StepSpec, config: RunConfig, weights: str) -> dict[str, str]:
        """`facts`, where text that the teacher has yet to write is a word: a plan must not make it write."""
        from lbllm_core.data.self_generated import is_written, wanted

        if not wanted(config.dataset) or is_written(config, self.home):
            return facts(spec, config, self.home, weights)
        d = config.dataset
        other = replace(config, dataset=replace(d, generated=0, source="synthetic" if d.source == "self_generated" else d.source))
        found = facts(spec, other, self.home, weights)
        if "calibration text" not in found:
            return found
        if d.source == "self_generated":
            del found["calibration text"]
        return found | {"self-generated text": "not written yet"}

    def _code_of(self, spec: StepSpec) -> dict[str, str]:
        if spec.name not in self._code:
            self._code[spec.name] = code_fingerprint(spec.code)
        return self._code[spec.name]


def at_hand(model: ModelConfig, home: Path) -> bool:
    """True when the teacher's files are on this machine, so that its digest costs no download and no training.

    Raises ModelError when the hub's cache lacks them and the hub may not be asked (HF_HUB_OFFLINE).
    """
    if model.source == "synthetic":
        from lbllm_core.model.load import tiny_folder

        return tiny_folder(model, home).exists()
    if model.source != "hub":
        return True
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(model.path, local_files_only=True)
    except LocalEntryNotFoundError:
        return bool(constants.HF_HUB_OFFLINE)  # offline: the loader is asked, and says what to do
    except (OSError, ValueError):  # not a hub id, an unreadable cache: the loader says so in its words
        return True
    return True


def estimate(parts: Mapping[str, Any], home: Path) -> float | None:
    """Seconds that a step with these key parts takes, from the most similar finished artifact; None when there is none."""
    step, fields = parts["step"], parts["fields"]
    best: tuple[int, float] | None = None
    seconds: float | None = None
    for folder, earlier in _earlier(home, step):
        old, took = earlier["fields"], read_seconds(folder)
        if not took or not _comparable(step, earlier, parts):
            continue
        rank = (sum(old.get(name) != value for name, value in fields.items()), -(folder / MANIFEST).stat().st_mtime)
        if best is None or rank < best:
            best, seconds = rank, took * _amount(step, fields) / _amount(step, old)
    return seconds


def _comparable(step: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    names = (*TEACHER, *SAME.get(step, ()))
    if any(old["fields"].get(name) != new["fields"].get(name) for name in names):
        return False
    return all(old["extra"].get(name) == new["extra"].get(name) for name in ("device", "compute_dtype"))


def _amount(step: str, fields: Mapping[str, Any]) -> float:
    product = 1.0
    for name in AMOUNT.get(step, ()):
        product *= float(fields.get(name) or 1)
    return product


def _earlier(home: Path, step: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in (home / "artifacts" / step).glob(f"*/{MANIFEST}"):
        with contextlib.suppress(ArtifactError, OSError):
            yield path.parent, read_manifest(path.parent)["parts"]


def _finished(folder: Path) -> Handle | None:
    if not (folder / MANIFEST).exists():
        return None
    try:
        return Handle.from_dict(read_manifest(folder)["handle"])
    except ArtifactError:
        return None
