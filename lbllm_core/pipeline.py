"""The pipeline as a table: which steps, in which order, reading which fields, fed by which results.

    teacher ──────────────────────────────────────────────┐ (first: its gate stops a run that cannot mean anything)
    ptq_init → weight_distill → act_quant → end_to_end → pack_and_benchmark → evaluate_model      the row `final`
        └──────────────────────────────────────────────→ pack_and_benchmark → evaluate_model      the row `stage1`, likewise stage2, stage3
    evaluate_control                                                                               the rows `nf4` and `int8`, which need no stage
    with `evaluation.requests`, last: score_requests for the teacher and for the row `final` (`evaluation/offline_tasks.py`)

`plan(config)` lists the steps of one run; baseline rows are the same steps under a changed config, so that they share the
cache with everything else. Nothing here knows how a step is executed: `run.py` walks the plan in this process, `flows/`
gives each step to Prefect, and both end up with the same keys, hence the same artifacts.

A step is given only the fields it names (others are at their defaults, see `artifacts.visible`), so `fields` must be complete;
it should be minimal too: one that is named but not read re-runs the step for nothing.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from lbllm_core.config import ACCURACY, PtqInitConfig, RunConfig
from lbllm_core.engine.artifacts import Handle
from lbllm_core.engine.step import Metrics, StepContext, StepSpec
from lbllm_core.errors import GateError

log = logging.getLogger(__name__)

_MODEL = tuple(f"model.{name}" for name in ("source", "path", "file", "sha256", "context", "add_bos", "blocks"))
_DATA = ("seed", *(f"dataset.{name}" for name in ("source", "files", "column", "sequences", "seq_len", "generated", "temperature")))
_WEIGHTS = tuple(f"scheme.{name}" for name in ("weight_bits", "level_mode", "level_family", "group_size", "codebook_size", "outlier_channels", "snap_levels"))
_ACTIVATIONS = tuple(f"scheme.{name}" for name in ("act_bits", "act_variant", "kv_bits"))
_START = tuple(f"ptq_init.{f.name}" for f in fields(PtqInitConfig) if f.name != "key_smoothing")  # read with a 4-bit cache alone: `spec_of`
_MEASURED = tuple(f"evaluation.{name}" for name in ("protocols", "tasks", "task_limit", "batch_tokens"))
STEPS_MODULE = "lbllm_core.steps"


def _late(name: str, context: StepContext) -> Metrics:
    """Call a step body; its module is imported when the first step runs, so that planning stays light."""
    body: Callable[[StepContext], Metrics] = getattr(importlib.import_module(STEPS_MODULE), name)
    return body(context)


def _spec(name: str, *fields: str) -> StepSpec:
    return StepSpec(name, tuple(sorted(fields)), (f"{STEPS_MODULE}:{name}",), partial(_late, name))


SPECS: Mapping[str, StepSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _spec("evaluate_teacher", *_MODEL, *_MEASURED),
            _spec("ptq_init", *_MODEL, *_DATA, *_WEIGHTS, *_START),
            _spec("weight_distill", *_MODEL, *_DATA, *_WEIGHTS, "weight_distill"),
            _spec("act_quant", *_MODEL, *_DATA, *_WEIGHTS, *_ACTIVATIONS, "act_quant"),
            _spec("end_to_end", *_MODEL, *_DATA, *_WEIGHTS, *_ACTIVATIONS, "end_to_end"),
            _spec("pack_and_benchmark", *_MODEL, "model.license", *_DATA, "scheme", "pack"),
            _spec("evaluate_model", *_MODEL, *_MEASURED, *_ACTIVATIONS),
            _spec("evaluate_control", *_MODEL, *_MEASURED, "evaluation.baselines"),
            _spec("score_requests", *_MODEL, "evaluation.requests", "evaluation.batch_tokens"),
        )
    }
)
JOINT = replace(SPECS["weight_distill"], fields=tuple(sorted({*SPECS["weight_distill"].fields, *_ACTIVATIONS})))
SMOOTH_KEYS = replace(SPECS["ptq_init"], fields=tuple(sorted({*SPECS["ptq_init"].fields, "ptq_init.key_smoothing", "scheme.kv_bits"})))
AFTER = MappingProxyType({"stage1": "ptq_init", "stage2": "weight_distill", "stage3": "act_quant"})  # rows that are the model after a stage
UNPACKED = ("nf4", "int8")  # rows that are the teacher with its linears in a format of bitsandbytes
SWEEPS = ("ptq_init", "weight_distill", "act_quant")  # stages that go through the model block by block
STAGES = (*SWEEPS, "end_to_end")  # the steps that hand a student on


@dataclass(frozen=True)
class PlannedStep:
    """One step of a run. `inputs` maps a role to the `name` of an earlier planned step; `row` is the table row it serves."""

    name: str
    spec: StepSpec
    config: RunConfig
    row: str
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """One finished step of a run: the table row it serves, its handle, and the minutes of work that are in it."""

    row: str
    handle: Handle
    minutes: float


def spec_of(name: str, config: RunConfig) -> StepSpec:
    """A step as this config runs it. Joint training reads the activations' format in stage 2, which else stays independent of it; smoothing of
    keys reads the cache's in stage 1, which is one for both widths without it."""
    if name == "ptq_init" and config.scheme.kv_bits == 4 and config.ptq_init.key_smoothing:
        return SMOOTH_KEYS
    return JOINT if name == "weight_distill" and config.weight_distill.joint else SPECS[name]


def why_skipped(config: RunConfig) -> dict[str, str]:
    """`{step: reason}` for the stages that this config leaves out."""
    scheme, reasons = config.scheme, {}
    if not config.weight_distill.enabled:
        reasons["weight_distill"] = "weight_distill.enabled=false"
    if scheme.act_bits == 16 and scheme.kv_bits == 16:
        reasons["act_quant"] = "activations and cache stay in full precision"
    elif not config.act_quant.enabled:
        reasons["act_quant"] = "act_quant.enabled=false"
    elif config.weight_distill.joint:
        reasons["act_quant"] = "weight_distill.joint=true trains activations in stage 2"
    if not config.end_to_end.enabled:
        reasons["end_to_end"] = "end_to_end.enabled=false"
    if scheme.weight_bits == 16:
        everything = (*STAGES, "pack_and_benchmark", "evaluate_model")
        reasons |= dict.fromkeys(everything, "scheme.weight_bits=16: the teacher is the result")
    return reasons


def plan(config: RunConfig) -> tuple[PlannedStep, ...]:
    """The steps of one run in an order in which each finds its inputs finished."""
    steps = [PlannedStep("evaluate_teacher", SPECS["evaluate_teacher"], config, "teacher")]
    skipped = why_skipped(config)
    student = ""
    for name in STAGES:
        if name not in skipped:
            steps.append(PlannedStep(name, spec_of(name, config), config, "final", {"student": student} if student else {}))
            student = name
    if student:
        steps += _measured(config, "final", student)
    for row in config.evaluation.baselines:
        if student or row in UNPACKED:
            steps += baseline_steps(config, row)
    if config.evaluation.requests:
        steps.append(PlannedStep("teacher/score_requests", SPECS["score_requests"], config, "teacher"))
        if student:
            steps.append(PlannedStep("score_requests", SPECS["score_requests"], config, "final", {"packed": "pack_and_benchmark"}))
    return tuple(steps)


def _measured(config: RunConfig, row: str, student: str) -> list[PlannedStep]:
    prefix = "" if row == "final" else f"{row}/"
    packed = PlannedStep(f"{prefix}pack_and_benchmark", SPECS["pack_and_benchmark"], config, row, {"student": student})
    inputs = {"packed": packed.name, "teacher": "evaluate_teacher"}
    return [packed, PlannedStep(f"{prefix}evaluate_model", SPECS["evaluate_model"], config, row, inputs)]


def baseline_steps(config: RunConfig, row: str) -> list[PlannedStep]:
    """The steps of a row beside the final one, packed (without a benchmark) and evaluated: the student after a stage, or stage 1
    under `baseline_config`. An unpacked one is evaluated alone."""
    changed = baseline_config(config, row)
    if row in UNPACKED:
        return [PlannedStep(f"{row}/evaluate_control", SPECS["evaluate_control"], changed, row)]
    if row in AFTER:
        return _measured(changed, row, AFTER[row])
    start = PlannedStep(f"{row}/ptq_init", spec_of("ptq_init", changed), changed, row)
    return [start, *_measured(changed, row, start.name)]


def baseline_config(config: RunConfig, row: str) -> RunConfig:
    """stage1, stage2, stage3: as configured; stage1_explicit: four stored levels, G=64; rtn: those by rounding to nearest, uncompensated;
    nf4, int8: the one of `evaluation.baselines` that the step takes.

    Packed rows beside the final one are measured by perplexity alone: zero-shot tasks would double the time of a run.
    """
    if row in UNPACKED:
        return replace(config, evaluation=replace(config.evaluation, baselines=(row,)))
    changed = replace(config, pack=replace(config.pack, benchmark=False, sample_tokens=0), evaluation=replace(config.evaluation, tasks=()))
    if row in ("stage1_explicit", "rtn"):
        changed = replace(changed, scheme=replace(changed.scheme, level_mode="explicit", level_family="free", group_size=64))
    if row == "rtn":
        changed = replace(changed, ptq_init=replace(changed.ptq_init, method="rtn", error_compensation=False))
    return changed


def facts(spec: StepSpec, config: RunConfig, home: Path, weights: str = "") -> dict[str, str]:
    """What a step's result depends on beside the config: the bytes of teacher and text, the device, the number type.

    `weights`: the teacher's digest when the caller has it already (seven billion parameters take half a minute to read).
    """
    from lbllm_core.data.self_generated import generated_digest, wanted
    from lbllm_core.data.tokens import data_digest, evaluation_digest
    from lbllm_core.engine.hardware import resolve
    from lbllm_core.evaluation.request_file import located
    from lbllm_core.model.bitsandbytes_linear import library
    from lbllm_core.model.load import teacher_digest
    from lbllm_core.model.store import file_digest

    found = resolve(config.hardware).describe() | {"model weights": weights or teacher_digest(config.model, home)}
    if spec.name in SWEEPS and config.hardware.hidden_dtype != "fp32":
        found["hidden states"] = config.hardware.hidden_dtype
    if spec.name in SWEEPS and config.hardware.gpus > 1:
        found["gpus"] = str(config.hardware.gpus)
    if any(name.startswith("dataset.") for name in spec.fields):
        if config.dataset.source != "self_generated":
            found["calibration text"] = data_digest(config.dataset)
        if wanted(config.dataset):
            found["self-generated text"] = generated_digest(config, home)
    if "evaluation.protocols" in spec.fields:
        found["evaluation data"] = evaluation_digest(config)
    if "evaluation.requests" in spec.fields:
        found["requests"] = file_digest(located(config.evaluation.requests))
    if spec.name == "evaluate_control":
        found["bitsandbytes"] = library().__version__
    if spec.name == "pack_and_benchmark":  # the products are the same on every path, their speed is not
        found["CPU kernels"] = _kernels()
    return found


def _kernels() -> str:
    from lbllm_kernels.build import object_path, source_digest, source_folder

    folder = source_folder()
    digest = source_digest(folder) if folder else ""
    return f"{digest} {'built' if digest and object_path(digest).exists() else 'not built'}"


def check_gate(config: RunConfig, teacher: Handle | None) -> None:
    """GateError when the teacher does not score what the config expects: every later number would be measured against a wrong one.

    A model cut to its first blocks is not the one that the expected values describe, so it has no gate. Where no expected figure was measured,
    a warning says what would.
    """
    if config.model.blocks or teacher is None or not config.model.expected:
        return
    wrong = []
    figures = {name.rpartition("/")[2]: value for name, value in teacher.metrics.items()}
    for name, expected in config.model.expected.items():
        measured = figures.get(name)
        if measured is not None and abs(measured - expected) > config.model.tolerance * abs(expected):
            wrong.append(f"{name} is {measured:.4g}, expected {expected:.4g}")
    if not figures.keys() & config.model.expected.keys():
        log.warning("teacher %s is not checked: no figure of model.expected was measured; %s would check it", config.model.name, " or ".join(map(_measuring, config.model.expected)))
    if wrong:
        raise GateError(
            f"teacher {config.model.name}: {'; '.join(wrong)} (tolerance {config.model.tolerance:.1%}). "
            "Check the weights and the evaluation data, or correct model.expected"
        )


def _measuring(metric: str) -> str:
    """The word that makes a run measure this metric."""
    task = ACCURACY.fullmatch(metric)
    return f"evaluation.tasks=[{task[1]}]" if task else f"evaluation.protocols=[{metric}]"
