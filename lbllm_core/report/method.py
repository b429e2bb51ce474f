"""The rows of a run as records of `results/method.json`: what was trained how, on how much text, and what the packed model scored.

Two figures are comparable when model, protocol (in the name), activations and bits agree; everything that can differ is in the
context. `control` names the level family that was asked the same question (`none` is ours, W(1+1) with free levels), `stages` the
stages that the row went through, `tokens` the distinct tokens that it learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbllm_core.config import RunConfig
from lbllm_core.pipeline import UNPACKED, baseline_config, why_skipped
from lbllm_core.report.records import Record

PREFIXES = ("ppl_", "acc_")
STAGE_OF = {"stage1": 1, "stage2": 2, "stage3": 3, "final": 4, "stage1_explicit": 1, "rtn": 1}
STEPS = {1: "ptq_init", 2: "weight_distill", 3: "act_quant", 4: "end_to_end"}


def control_of(config: RunConfig, stages: tuple[int, ...]) -> str:
    """The word of method.json for a config that went through these stages: one training stage for all, the predecessor, else its levels."""
    s = config.scheme
    if config.ptq_init.method == "rtn":
        return "rtn"
    if config.weight_distill.joint and 2 in stages:
        return "joint"
    if s.act_bits == 4 and s.act_variant == "planes" and not {2, 4} & set(stages):
        return "bwa"
    if s.level_family == "free":
        return "none"
    return s.level_family if s.level_family in ("int2", "residual") else "affine_cb" if s.level_mode == "codebook" else "affine8"


def stages_of(config: RunConfig, row: str) -> tuple[int, ...]:
    """The stages that a row's model went through."""
    skipped = why_skipped(config)
    return tuple(n for n, step in STEPS.items() if n <= STAGE_OF[row] and step not in skipped)


def row_context(config: RunConfig, row: str, effective_bpw: float | None = None) -> dict[str, Any]:
    """All that tells the figures of one row from those of another."""
    context: dict[str, Any] = {"model": config.model.name, "experiment": config.experiment, "seed": config.seed, "row": row}
    if row == "teacher":
        return context | {"scheme": "bf16", "control": "none", "packed": False}
    if row in UNPACKED:
        return context | {"scheme": row, "control": row, "effective_bpw": effective_bpw, "packed": False}
    used = baseline_config(config, row) if row != "final" else config
    s, stages = used.scheme, stages_of(used, row)
    sequences = [used.ptq_init.sequences, used.weight_distill.sequences, used.act_quant.sequences, used.dataset.sequences]
    return context | {
        "scheme": s.name,
        "control": control_of(used, stages),
        "stages": "+".join(map(str, stages)),
        "level_mode": s.level_mode,
        "group_size": s.group_size,
        "act_variant": s.act_variant if s.act_bits < 16 else "none",
        "kv_bits": s.kv_bits,
        "smoothing": used.ptq_init.smoothing_exponent,
        "parameterization": used.weight_distill.parameterization if 2 in stages else "",
        "effective_bpw": effective_bpw,
        "tokens": max(sequences[n - 1] for n in stages) * used.dataset.seq_len,
        "packed": True,
    }


def figure_records(figures: Mapping[str, Any], context: Mapping[str, Any]) -> list[Record]:
    """One record for each perplexity or accuracy among the figures."""
    return [{"name": k, "value": v, "unit": "1", **context} for k, v in figures.items() if k.startswith(PREFIXES) and isinstance(v, (int, float))]


def method_records(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Perplexities and accuracies of the result rows, one record a figure, with all that tells two of one name apart."""
    return [record for row in rows for record in figure_records(row, row_context(config, str(row["row"]), row.get("effective_bpw")))]


MEASURED = ("value", "effective_bpw", "measured")


def same_row(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two records are one figure of one row of one run, so that the newer replaces the older: all but what was measured is equal."""
    return all(a.get(key) == b.get(key) for key in (a.keys() | b.keys()) - set(MEASURED))
