"""Expected beside measured: what a published (or an earlier) row says, what this run gave, and the difference.

An expectation is `evaluation.expected: {row/metric: value}` with a tolerance and a source. It stops nothing and is part of no
key: a reproduction that misses is a finding, not a failure. (The teacher's `model.expected` is the opposite: a gate.) A figure
that was not measured says so, since an empty cell would read like a success.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbllm_core.config import EvaluationConfig
from lbllm_core.report.tables import ROW_TITLES, Cells, markdown, plain


def comparisons(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> list[dict[str, Any]]:
    """One dictionary an expectation: row, metric, expected, and, where it was measured, measured, delta (relative) and within."""
    by_name = {str(row["row"]): row for row in rows}
    found: list[dict[str, Any]] = []
    for name, expected in evaluation.expected.items():
        row, _, metric = name.partition("/")
        made: dict[str, Any] = {"row": row, "metric": metric, "expected": expected}
        measured = by_name.get(row, {}).get(metric)
        if isinstance(measured, (int, float)):
            delta = (measured - expected) / expected
            made |= {"measured": measured, "delta": delta, "within": abs(delta) <= evaluation.tolerance + 1e-9}
        found.append(made)
    return found


def expectation_cells(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> Cells:
    """A line an expectation; empty when the config holds none."""
    lines = [_line(c) for c in comparisons(rows, evaluation)]
    return [["", "expected", "measured", "delta", f"within {evaluation.tolerance:.0%}"], *lines] if lines else []


def _line(c: Mapping[str, Any]) -> list[str]:
    title = f"{ROW_TITLES.get(c['row'], c['row'])}: {c['metric']}"
    form = "{:.3f}" if c["metric"].startswith("acc_") else "{:.2f}"
    if "measured" not in c:
        return [title, form.format(c["expected"]), "not measured", "", ""]
    return [title, form.format(c["expected"]), form.format(c["measured"]), f"{c['delta']:+.1%}", "yes" if c["within"] else "no"]


def expectations_plain(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> str:
    """The table for a terminal, with its source; empty when nothing is expected."""
    return _with_source(plain, rows, evaluation)


def expectations_markdown(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> str:
    """The table as Markdown, with its source; empty when nothing is expected."""
    return _with_source(markdown, rows, evaluation)


def expectation_figures(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> dict[str, float]:
    """`expected/<row>/<metric>` and `delta/<row>/<metric>` for the lab book."""
    found: dict[str, float] = {}
    for c in comparisons(rows, evaluation):
        found[f"expected/{c['row']}/{c['metric']}"] = float(c["expected"])
        if "delta" in c:
            found[f"delta/{c['row']}/{c['metric']}"] = float(c["delta"])
    return found


def _with_source(form: Any, rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> str:
    cells = expectation_cells(rows, evaluation)
    return f"{form(cells)}Expected values: {evaluation.source or 'evaluation.expected'}\n" if cells else ""
