"""The tables of docs/results.md from `results/method*.json`: a line for each question that was asked, seeds gathered into mean and spread.

A line is what the table shows of a record's context, so records of older and newer versions meet in it. The value is the mean over seeds; with two or more, ± the standard
deviation (n - 1), which is what a difference between lines has to be held against. Perplexities lie beside their ratio to the
teacher's of the same run.

Zero-shot accuracies are in per cent, ± lm-eval's standard error of the examples (over seeds: its mean; seeds share the examples). Their
mean over tasks has the error of independent tasks. Every line that was scored is shown, the teacher first. MMLU is another protocol (five examples in
the prompt) and stands apart: in no mean.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbllm_core.config import SIX
from lbllm_core.pipeline import UNPACKED
from lbllm_core.report.records import Record
from lbllm_core.report.tables import Cells, is_accuracy, markdown, stderr_name

PROTOCOLS = ("ppl_wikitext2_s2048", "ppl_ptb_s2048", "ppl_c4_s2048")
LEVELS = {"none": "free", "affine8": "affine8", "affine_cb": "affine", "int2": "INT2", "residual": "residual", "nf4": "NF4", "int8": "INT8", "rtn": "rounded", "joint": "free, joint training", "bwa": "free, predecessor"}
ABOVE_CHANCE = ("arc_easy", "hellaswag", "piqa")  # `zero_shot_table` says why
_MMLU = re.compile(r"acc_mmlu(_n\d+)?")  # all subjects, complete or limited; acc_mmlu_<subject> is no figure of the table
Line = tuple[Any, ...]


def levels_of(record: Mapping[str, Any]) -> str:
    """What a group's levels are, in words: `table of 256, free, G=16`."""
    if record["row"] == "teacher":
        return "teacher"
    kind = LEVELS.get(str(record["control"]), str(record["control"]))
    if record["row"] in UNPACKED:
        return f"bitsandbytes {kind}"
    latent = ", latent W and G" if record.get("parameterization") == "latent" else ""
    stored = "table, " if record["level_mode"] == "codebook" else ""
    return f"{stored}{kind}, G={record['group_size']}{latent}"


def activations_of(record: Mapping[str, Any]) -> str:
    """`A16`, `A4 piecewise`, `A4 uniform KV4`."""
    if record["row"] == "teacher":
        return ""
    if record["row"] in UNPACKED:  # INT8 rounds its activations too
        return "A8" if record["row"] == "int8" else "A16"
    variant = record["act_variant"]
    return ("A16" if variant == "none" else f"A4 {variant}") + (" KV4" if record["kv_bits"] == 4 else "")


def spread(values: Sequence[float]) -> str:
    """`32.1`, or `32.1 ± 0.3` over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def lines_of(records: Iterable[Record]) -> dict[Line, dict[str, dict[int, float]]]:
    """Line -> figure -> seed -> value. A line: experiment, levels, activations, stages, tokens."""
    found: dict[Line, dict[str, dict[int, float]]] = {}
    for r in records:
        line = ("" if r["row"] in ("teacher", *UNPACKED) else r["experiment"], levels_of(r), activations_of(r), r.get("stages", ""), r.get("tokens", 0))
        figures = found.setdefault(line, {})
        figures.setdefault(str(r["name"]), {})[int(r["seed"])] = float(r["value"])
        if r.get("effective_bpw"):
            figures.setdefault("effective_bpw", {})[int(r["seed"])] = float(r["effective_bpw"])
    return found


def method_table(records: Iterable[Record], model: str, protocols: Sequence[str] = PROTOCOLS) -> str:
    """Markdown: experiment, levels, activations, stages, tokens, bits, the perplexities, seeds; the best by the first protocol first in each block."""
    lines = lines_of(r for r in records if r["model"] == model and (str(r["name"]) in protocols))
    ceiling = next((figures for line, figures in lines.items() if line[1] == "teacher"), {})
    cells: Cells = [["experiment", "levels", "activations", "stages", "tokens", "bits a weight", *(p.removeprefix("ppl_") for p in protocols), "seeds"]]
    for line, figures in sorted(lines.items(), key=lambda item: _order(item, protocols[0])):
        values = []
        for protocol in protocols:
            seeds = list(figures.get(protocol, {}).values())[: None if line[0] else 1]  # no seed moves what no experiment made
            top = list(ceiling.get(protocol, {}).values())
            ratio = f" (x{statistics.fmean(seeds) / statistics.fmean(top):.2f})" if seeds and top and line[1] != "teacher" else ""
            values.append(spread(seeds) + ratio if seeds else "")
        bits = figures.get("effective_bpw", {})
        tokens = f"{line[4] / 1e6:.2f} M" if line[4] else ""
        count = 1 if not line[0] else max(len(figures.get(p, {})) for p in protocols)
        cells.append([line[0], line[1], line[2], line[3], tokens, f"{statistics.fmean(bits.values()):.3f}" if bits else "", *values, str(count)])
    return markdown(cells)


def _order(item: tuple[Line, dict[str, dict[int, float]]], protocol: str) -> tuple[Any, ...]:
    (experiment, levels, activations, stages, _), figures = item
    quality = statistics.fmean(figures[protocol].values()) if protocol in figures else float("inf")
    return (levels != "teacher", activations, stages, quality, experiment)


def zero_shot_table(records: Iterable[Record], model: str) -> str:
    """Markdown: a line for each model that was scored; a column for each task's acc, the means of acc and of acc_norm over the six tasks, the mean acc of three, and MMLU.

    The mean of acc_norm takes acc where a task has no acc_norm, as is usual. A line that lacks a task has no mean over it. The three are
    arc_easy, hellaswag and piqa: on the others (boolq, winogrande, arc_challenge) the small model of this table only guesses, float or packed, and
    three guesses more make a retention look better than it is.
    """
    chosen = [r for r in records if r["model"] == model and str(r["name"]).startswith("acc_") and r["unit"] == "1"]
    lines = lines_of(chosen)
    names = [n for n in dict.fromkeys(str(r["name"]) for r in chosen) if is_accuracy(n) and not n.startswith("acc_norm_")]
    mmlu = sorted(n for n in names if _MMLU.fullmatch(n))
    plain = [n for n in names if not n.startswith("acc_mmlu")]
    if not plain and not mmlu:
        return "_Not measured yet._\n"
    head = ["experiment", "levels", "activations", "stages", "bits a weight", *(n.removeprefix("acc_") for n in plain)]
    cells: Cells = [[*head, "mean acc", "mean acc_norm", "mean acc of three", *(f"{n.removeprefix('acc_')}, five-shot" for n in mmlu), "seeds"]]
    ceiling = next((figures for line, figures in lines.items() if line[1] == "teacher"), {})
    for line, figures in sorted(lines.items(), key=lambda item: (item[0][1] != "teacher", item[0][2], item[0][3], -(_mean(item[1], _of_tasks(item[1], SIX)) or (0, 0))[0], item[0][0])):
        if not any(n in figures for n in (*plain, *mmlu)):
            continue
        six, three = _of_tasks(figures, SIX), _of_tasks(figures, ABOVE_CHANCE)
        normed = [b if b in figures else a for a in six for b in [a.replace("acc_", "acc_norm_", 1)]]
        bits = figures.get("effective_bpw", {})
        count = max(len(figures.get(n, {})) for n in (*plain, *mmlu))
        means = [_percent(_mean(figures, tasks), _mean(ceiling, tasks) if line[1] != "teacher" else None) for tasks in (six, normed, three)]
        accuracies, apart = ([_percent(_mean(figures, [n])) for n in group] for group in (plain, mmlu))
        cells.append([*map(str, line[:4]), f"{statistics.fmean(bits.values()):.3f}" if bits else "", *accuracies, *means, *apart, str(count)])
    return markdown(cells)


def _of_tasks(figures: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """The name under which a line has each task's acc (another split or a limit stands behind it; the bare name comes first); none when it lacks a task."""
    found = [min((n for n in figures if re.fullmatch(rf"acc_{task}(_val)?(_n\d+)?", n)), key=len, default="") for task in tasks]
    return found if all(found) else []


def _mean(figures: Mapping[str, Mapping[int, float]], names: Sequence[str]) -> tuple[float, float] | None:
    """Mean over tasks of the means over seeds, and its standard error; None when one was not measured, or there is none."""
    if not names or not all(n in figures for n in names):
        return None
    errors = [statistics.fmean(figures[stderr_name(n)].values()) for n in names]
    return statistics.fmean(statistics.fmean(figures[n].values()) for n in names), math.hypot(*errors) / len(errors)


def _percent(value: tuple[float, float] | None, ceiling: tuple[float, float] | None = None) -> str:
    """`61.2 ± 1.1`, and the share of the ceiling: `(94 %)`."""
    if value is None:
        return ""
    share = f" ({100 * value[0] / ceiling[0]:.0f} %)" if ceiling else ""
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}{share}"
