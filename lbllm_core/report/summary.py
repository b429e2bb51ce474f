"""The one table that a run ends with: a row for the teacher, each baseline and the final model.

A row joins the figures of the steps that made it (evaluation, packing) under the names they were measured by; the columns
are chosen here, and nothing is computed but minutes. An empty cell means not measured, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbllm_core.pipeline import Finished

ROW_NAMES = {
    "teacher": "teacher",
    "rtn": "round to nearest, explicit levels",
    "stage1_explicit": "stage 1 only, explicit levels",
    "stage1": "stage 1 only",
    "final": "final",
}
COLUMNS = (
    ("effective_bpw", "bits a weight", "{:.3f}"),
    ("disk_mb", "MB on disk", "{:.1f}"),
    ("prefill_tok_s", "prefill tok/s", "{:.0f}"),
    ("decode_tok_s", "decode tok/s", "{:.1f}"),
    ("minutes", "minutes", "{:.1f}"),
)
RENAMED = {"packed_bytes": "disk_bytes", "teacher_bytes": "disk_bytes"}


def result_rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """One dictionary a row, in the order of ROW_NAMES: `row` and every figure of its steps by name."""
    found: list[dict[str, Any]] = []
    for row in ROW_NAMES:
        parts = [f for f in finished if f.row == row]
        if parts:
            figures: dict[str, Any] = {"row": row}
            for part in parts:
                if part.handle.step in ("evaluate_teacher", "pack_and_benchmark", "evaluate_model"):
                    figures |= {name.rpartition("/")[2]: value for name, value in part.handle.metrics.items()}
            found.append(figures | {"minutes": sum(part.minutes for part in parts)})
    return _with_teacher_figures(found)


def _with_teacher_figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pack step measures teacher and packed model side by side; `teacher_x` of the final row is `x` of the teacher's."""
    by_name = {row["row"]: row for row in rows}
    final, teacher = by_name.get("final"), by_name.get("teacher")
    if final and teacher:
        for name in [n for n in final if n.startswith("teacher_")]:
            teacher.setdefault(name.removeprefix("teacher_"), final[name])
    for row in rows:
        size = next((row[name] for name in ("packed_bytes", "bytes", "disk_bytes") if name in row), None)
        if size is not None:
            row["disk_mb"] = size / 1e6
    return rows


def table_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    measured = [n for n in names if n.startswith("ppl_")] + [n for n in names if n.startswith("acc_") and not n.startswith(("acc_stderr", "acc_norm_stderr"))]
    columns = [(n, n, "{:.2f}" if n.startswith("ppl_") else "{:.3f}") for n in measured] + [c for c in COLUMNS if c[0] in names]
    lines = [["", *(title for _, title, _ in columns)]]
    for row in rows:
        cells = [form.format(row[name]) if isinstance(row.get(name), (int, float)) else "" for name, _, form in columns]
        lines.append([ROW_NAMES.get(row["row"], row["row"]), *cells])
    return lines


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result table as Markdown."""
    return markdown(table_cells(rows))


def plain_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result table for a terminal, columns aligned."""
    return aligned(table_cells(rows))


def steps_table(finished: Sequence[Finished]) -> str:
    """Minutes a step, as Markdown; work that an earlier run did counts, and is marked."""
    lines = [["step", "row", "minutes", ""]]
    lines += [[f.handle.step, f.row, f"{f.minutes:.2f}", "reused" if f.handle.reused else ""] for f in finished]
    return markdown(lines)


def steps_plain(finished: Sequence[Finished]) -> str:
    """Minutes a step, for a terminal."""
    lines = [["step", "row", "minutes", ""]]
    return aligned(lines + [[f.handle.step, f.row, f"{f.minutes:.2f}", "reused" if f.handle.reused else ""] for f in finished])


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Text cells as a Markdown table; the first line is its head."""
    head, *rest = lines
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in rest)]) + "\n"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Text cells as columns: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines)
