"""A table of runs: one line a run, from what the lab book holds of each.

`RunRow` is a run as plain values; where it was read from is not known here. Recovery compares a run with its own teacher as it
was measured in that run (a ratio for perplexity, a share for accuracy). A figure that a run has not measured, or not yet, is
an empty cell. `differences` lays out the configuration fields in which the runs are not alike; what a model or a scheme brings
with its name is left out, because the name says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lbllm_core.report.tables import Cells, is_accuracy, stderr_name

# told by the columns of the first table, or part of no result
NAMED = ("experiment", "seed", "model.", "scheme.name", "dataset.name", "tracking.", "evaluation.expected", "evaluation.tolerance", "evaluation.source")
TOLD_ANYWAY = ("model.blocks",)


@dataclass(frozen=True)
class RunRow:
    """One run. `figures`: metrics by their name in the lab book (`eval/ppl_x`, `teacher/eval/ppl_x`, `size/disk_mb`).

    `state`: finished, running, failed, stopped. `fields`: the configuration as 'section.field'. `lineage`: step -> step/key.
    `folder`: where its files are.
    """

    run_id: str
    state: str
    started: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    digest: str = ""
    sweep: str = ""
    link: str = ""
    folder: str = ""

    @property
    def title(self) -> str:
        """Model and experiment, and the seed where it is not 0."""
        name = f"{self.text('model.name')} {self.text('experiment')}".strip() or self.run_id[:8]
        return name if self.text("seed") in ("", "0") else f"{name} seed {self.text('seed')}"

    def text(self, name: str) -> str:
        """A configuration field as text; empty when it is not known."""
        return plain_value(self.fields.get(name))

    def value(self, name: str) -> float | None:
        """The figure of the final model: of `eval/name`, or of the teacher where weights and activations stay as they are."""
        unchanged = self.text("scheme.weight_bits") == "16"
        return self.figures.get(f"eval/{name}", self.figures.get(f"teacher/eval/{name}") if unchanged else None)

    def of_teacher(self, name: str) -> float | None:
        """The teacher's figure, as measured in this run."""
        return self.figures.get(f"teacher/eval/{name}")

    @property
    def minutes(self) -> float | None:
        """Minutes of work in the final model and in the teacher's evaluation; rows beside it are not counted."""
        spent = [value for name, value in self.figures.items() if name.startswith(("minutes/", "teacher/minutes/"))]
        return sum(spent) if spent else None


def plain_value(value: Any) -> str:
    """A configuration value as a person writes it."""
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def measured(rows: Sequence[RunRow]) -> list[str]:
    """Names of the perplexities in the order in which the configurations ask for them, then of the accuracies, that any run has, each without its section."""
    names = dict.fromkeys(
        name.rpartition("/")[2] for row in rows for name in row.figures if name.startswith(("eval/", "teacher/eval/")) and "stderr" not in name
    )
    asked = list(dict.fromkeys(name for row in rows for name in row.text("evaluation.protocols").split(", ")))
    perplexities = sorted((n for n in names if n.startswith("ppl_")), key=lambda n: (asked.index(n) if n in asked else len(asked), n))
    return perplexities + sorted(n for n in names if is_accuracy(n))


def expected_value(row: RunRow, name: str) -> float | None:
    """What the run's configuration expects of the final model (`evaluation.expected: {final/name: value}`), when it says so."""
    table = row.fields.get("evaluation.expected")
    value = table.get(f"final/{name}") if isinstance(table, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def run_table(rows: Sequence[RunRow], title: Callable[[RunRow], str] = lambda row: row.title, marked: Callable[[int, str, str], str] = lambda place, name, text: text) -> Cells:
    """One line a run: who it is, how far it got, bits, each figure with its standard error and recovery, size, speed, minutes.

    Columns that no run has a value for are left out; a column of expected values has one of relative differences beside it.
    `marked(place in rows, figure, text)` may mark a figure.
    """
    columns: list[tuple[str, list[str]]] = [
        ("run", [title(row) for row in rows]),
        ("scheme", [row.text("scheme.name") for row in rows]),
        ("seed", [row.text("seed") for row in rows]),
        ("state", [row.state for row in rows]),
        ("bits a weight", [_number(row.figures.get("size/effective_bpw"), "{:.3f}") for row in rows]),
    ]
    for name in measured(rows):
        columns.append((name, [marked(place, name, figure_text(row, name)) for place, row in enumerate(rows)]))
        wanted = [expected_value(row, name) for row in rows]
        if any(w is not None for w in wanted):
            columns.append((f"{name} expected", [_number(w, "{:.4g}") for w in wanted]))
            columns.append(("delta", [_delta(row.value(name), w) for row, w in zip(rows, wanted, strict=True)]))
    columns += [
        ("MB on disk", [_number(row.figures.get("size/disk_mb"), "{:.1f}") for row in rows]),
        ("decode, tokens/s", [_number(row.figures.get("speed/decode_tok_s"), "{:.1f}") for row in rows]),
        ("minutes", [_number(row.minutes, "{:.1f}") for row in rows]),
    ]
    shown = [(head, cells) for head, cells in columns if any(cells) or head == "run"]
    return [[head for head, _ in shown], *[[cells[i] for _, cells in shown] for i in range(len(rows))]]


def teacher_table(rows: Sequence[RunRow]) -> Cells:
    """The teachers that the recoveries refer to, one line a model and measured value."""
    names = measured(rows)
    lines: dict[tuple[str, ...], None] = {}
    for row in rows:
        figures = [with_error(row.of_teacher(name), row.of_teacher(stderr_name(name)), name) for name in names]
        if any(figures):
            lines.setdefault((row.text("model.name"), *figures))
    return [["teacher", *names], *[list(line) for line in lines]]


def differences(rows: Sequence[RunRow], title: Callable[[RunRow], str] = lambda row: row.title) -> Cells:
    """The fields in which the runs differ, as columns; only the head when they differ in nothing. Cells without a run are left out."""
    begun = [row for row in rows if row.run_id]
    names = sorted({name for row in begun for name in row.fields})
    named = [n for n in names if n in TOLD_ANYWAY or not any(n == word or (word.endswith(".") and n.startswith(word)) for word in NAMED)]
    moved = [n for n in named if len({row.text(n) for row in begun}) > 1]
    return [["run", *moved], *([[title(row), *(row.text(n) for n in moved)] for row in begun] if moved else [])]


def lineage_table(rows: Sequence[RunRow], title: Callable[[RunRow], str] = lambda row: row.title) -> Cells:
    """Which artifact each step of a run came from: the folders below `$LBLLM_HOME/artifacts`."""
    steps = list(dict.fromkeys(step for row in rows for step in row.lineage))
    return [["run", *steps], *[[title(row), *(row.lineage.get(step, "").rpartition("/")[2] for step in steps)] for row in rows]]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bits, perplexity) that no other beats in both, by increasing bits."""
    best: list[tuple[float, float]] = []
    for bits, value in sorted(set(points)):
        if not best or value < best[-1][1]:
            best.append((bits, value))
    return best


def figure_text(row: RunRow, name: str) -> str:
    """A figure of the final model with its standard error, and in brackets its ratio to (or share of) the teacher's; empty when not measured."""
    value, teacher = row.value(name), row.of_teacher(name)
    error = row.value(stderr_name(name))
    text = with_error(value, error, name)
    if value is None or not teacher or row.text("scheme.weight_bits") == "16":
        return text
    return text + (f" (x{value / teacher:.3g})" if name.startswith("ppl_") else f" ({100 * value / teacher:.0f} %)")


def with_error(value: float | None, error: float | None, name: str) -> str:
    """`30.00 ± 1.50`, `0.500 ± 0.035`; empty without a value."""
    form = "{:.2f}" if name.startswith("ppl_") else "{:.3f}"
    return _number(value, form) + (f" ± {form.format(error)}" if value is not None and error is not None else "")


def _delta(value: float | None, wanted: float | None) -> str:
    return "" if value is None or not wanted else f"{(value - wanted) / wanted:+.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
