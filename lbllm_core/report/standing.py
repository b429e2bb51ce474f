"""Which run is best, and which cannot be told from it: a table of figures with their standard errors.

Runs compare within one model: perplexities of two models say nothing about their quantization. The best run of a model has the lowest
perplexity (the highest accuracy); another *ties* with it when their difference is at most one standard error of the difference,

    |a - b| <= sqrt(se_a^2 + se_b^2)

as if the two were measured on independent text. They are measured on the same, so a difference beyond it is clearer than it looks, and
a tie is a warning rather than a proof. Without standard errors there is a best run and no ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lbllm_core.report.runs import RunRow
from lbllm_core.report.tables import stderr_name

BEST, TIE = "best", "tie"


@dataclass(frozen=True)
class Entry:
    """One figure in a table: its text, `best`, `tie` or nothing, and the page of the run that measured it."""

    text: str = ""
    standing: str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table for people: each cell holds entries (several where several runs share it); a note says how to read it."""

    title: str
    head: list[str]
    lines: list[list[list[Entry]]]
    note: str = ""
    name: str = field(default="")


def standings(rows: Sequence[RunRow], name: str) -> dict[int, str]:
    """`{place in rows: best or tie}` for one figure. Only finished runs with quantized weights, and models of which there are two."""
    by_model: dict[str, list[tuple[float, float | None, int]]] = {}
    for place, row in enumerate(rows):
        value = row.value(name)
        if value is not None and row.state == "finished" and row.text("scheme.weight_bits") != "16":
            by_model.setdefault(row.text("model.name"), []).append((value, row.value(stderr_name(name)), place))
    found: dict[int, str] = {}
    for entries in by_model.values():
        if len(entries) < 2:
            continue
        sign = 1 if name.startswith("ppl_") else -1
        best, best_error, _ = min(entries, key=lambda entry: sign * entry[0])
        for value, error, place in entries:
            if value == best:
                found[place] = BEST
            elif error is not None and best_error is not None and abs(value - best) <= math.hypot(error, best_error):
                found[place] = TIE
    return found
