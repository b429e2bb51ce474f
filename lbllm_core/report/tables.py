"""Tables from result rows and from records of `results/*.json`, as cells first and as text last.

`comparison` turns result rows (teacher, baselines, final; one dictionary of figures each) into cells with a *figure a line*
and a *model a column*, each quantized figure beside its recovery against the teacher: a ratio for perplexity, size and speed
(`45.20 (x2.37)`), a share for accuracy (`0.612 ± 0.034 (96 %)`). An empty cell means not measured, never zero.

`pivot` lays out records by their context: a line for each value of some keys, a column for each value of another (kernel
times by shape and operator, perplexity by scheme and model). `markdown` and `plain` print cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbllm_core.errors import ArtifactError
from lbllm_core.report.records import Record

Cells = list[list[str]]
ROW_TITLES = {
    "teacher": "teacher",
    "int8": "bitsandbytes INT8",
    "nf4": "bitsandbytes NF4",
    "rtn": "round to nearest",
    "stage1_explicit": "stage 1, explicit levels",
    "stage1": "stage 1 only",
    "stage2": "after stage 2",
    "stage3": "after stage 3",
    "final": "final",
}
# figure -> (title, format, how it is compared: ratio, share or not at all)
FIGURES: dict[str, tuple[str, str, str]] = {
    "effective_bpw": ("bits a weight, all counted", "{:.3f}", ""),
    "disk_mb": ("MB on disk", "{:.1f}", "ratio"),
    "peak_gb": ("peak memory, GB", "{:.2f}", ""),
    "load_s": ("load, s", "{:.2f}", ""),
    "prefill_tok_s": ("prefill, tokens/s", "{:.0f}", "ratio"),
    "decode_tok_s": ("decode, tokens/s", "{:.1f}", "ratio"),
    "minutes": ("minutes", "{:.1f}", ""),
}


def comparison(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Cells of the comparison: a head with the rows' titles, then a line for each figure that any row has.

    `rows`: dictionaries with `row` (a key of ROW_TITLES or any name) and figures by metric name; the row `teacher` is what the
    others are compared with.
    """
    teacher: Mapping[str, Any] = next((r for r in rows if r["row"] == "teacher"), {})
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [n for n in names if n.startswith("ppl_") and not n.endswith("_stderr")] + [n for n in names if is_accuracy(n)] + [n for n in FIGURES if n in names]
    cells = [["", *(ROW_TITLES.get(str(r["row"]), str(r["row"])) for r in rows)]]
    for name in shown:
        cells.append([FIGURES[name][0] if name in FIGURES else name, *(_cell(name, row, teacher) for row in rows)])
    return cells


def is_accuracy(name: str) -> bool:
    """True for the name of an accuracy, false for its standard error's."""
    return name.startswith("acc_") and not name.startswith(("acc_stderr_", "acc_norm_stderr_"))


def stderr_name(name: str) -> str:
    """acc_piqa -> acc_stderr_piqa, acc_norm_piqa -> acc_norm_stderr_piqa, ppl_x -> ppl_x_stderr."""
    if name.startswith("ppl_"):
        return f"{name}_stderr"
    head = "acc_norm_" if name.startswith("acc_norm_") else "acc_"
    return f"{head}stderr_{name.removeprefix(head)}"


def _cell(name: str, row: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    value, ceiling = row.get(name), teacher.get(name)
    if not isinstance(value, (int, float)):
        return ""
    form, kind = FIGURES[name][1:] if name in FIGURES else ("{:.3f}", "share") if name.startswith("acc_") else ("{:.2f}", "ratio")
    text = form.format(value)
    error = row.get(stderr_name(name)) if name not in FIGURES else None
    if isinstance(error, (int, float)):
        text += " ± " + form.format(error)
    if row["row"] == "teacher" or not isinstance(ceiling, (int, float)) or not ceiling or not kind:
        return text
    return text + (f" ({100 * value / ceiling:.0f} %)" if kind == "share" else f" (x{value / ceiling:.3g})")


def pivot(records: Iterable[Record], rows: Sequence[str], column: str) -> Cells:
    """A line for each combination of the `rows` keys in the records, a column for each value of the key `column`.

    Raises ArtifactError when two records want one cell: a filter is missing.
    """
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for record in records:
        key, title = tuple(str(record.get(name, "")) for name in rows), str(record.get(column, ""))
        line = lines.setdefault(key, {})
        if title in line:
            raise ArtifactError(f"two records give the cell {key} / {title}; add a filter or a key to `rows`")
        line[title] = number(record["value"])
        columns[title] = None
    return [[*rows, *columns]] + [[*key, *(line.get(c, "") for c in columns)] for key, line in lines.items()]


def counted(count: int, noun: str) -> str:
    """`1 run`, `6 runs`: a count before a noun whose plural ends in s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def number(value: float) -> str:
    """Four significant digits, whole numbers as they are."""
    return str(value) if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def rows_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Records with a context `row` as result rows, in order of appearance."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        if "row" in record:
            rows.setdefault(record["row"], {"row": record["row"]})[record["name"]] = record["value"]
    order = list(ROW_TITLES)
    return sorted(rows.values(), key=lambda r: order.index(r["row"]) if r["row"] in order else len(order))


def markdown(cells: Cells) -> str:
    """Cells as a Markdown table; the first line is its head, the first column is text."""
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in rest)]) + "\n"


def plain(cells: Cells) -> str:
    """Cells for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]]) + "\n"
