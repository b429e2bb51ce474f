"""The rows that a run ends with: the teacher, each baseline, the final model; and the minutes of each step.

A row joins the figures of the steps that made it (evaluation, packing) under the names they were measured by; how they are
laid out is in `tables.py`. Nothing is computed here but minutes. What the pack step measures of the teacher beside the packed
model (`teacher_decode_tok_s`) goes into the teacher's row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbllm_core.pipeline import Finished
from lbllm_core.report.tables import ROW_TITLES, Cells

MEASURING = ("evaluate_teacher", "pack_and_benchmark", "evaluate_model", "evaluate_control")
OF_TEACHER = "teacher_"


def result_rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """One dictionary a row, in the order of ROW_TITLES: `row`, every figure of its steps without its section, `minutes`."""
    found: list[dict[str, Any]] = []
    for row in ROW_TITLES:
        parts = [f for f in finished if f.row == row]
        if parts:
            figures: dict[str, Any] = {"row": row}
            for part in parts:
                if part.handle.step in MEASURING:
                    figures |= {name.rpartition("/")[2]: value for name, value in part.handle.metrics.items()}
            found.append(figures | {"minutes": sum(part.minutes for part in parts)})
    by_name = {row["row"]: row for row in found}
    for figures in found:
        for name in [n for n in figures if n.startswith(OF_TEACHER)]:
            value = figures.pop(name)
            by_name.get("teacher", {}).setdefault(name.removeprefix(OF_TEACHER), value)
    return found


def step_entries(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """Every step as plain values: step, row, minutes, reused, key, digest."""
    return [
        {"step": f.handle.step, "row": f.row, "minutes": f.minutes, "reused": f.handle.reused, "key": f.handle.key, "digest": f.handle.digest} for f in finished
    ]


def step_cells(entries: Sequence[Mapping[str, Any]]) -> Cells:
    """Minutes a step; work that an earlier run did counts, and is marked."""
    return [["step", "row", "minutes", ""], *([e["step"], e["row"], f"{e['minutes']:.2f}", "reused" if e["reused"] else ""] for e in entries)]
