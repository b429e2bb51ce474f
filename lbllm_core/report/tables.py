"""Tables from results: the comparison a run ends with, and the tables in the documentation.

`comparison` turns result rows (teacher, baselines, final; one dictionary of figures each) into cells with a *figure a line*
and a *model a column*, each quantized figure beside its recovery against the teacher: a ratio for perplexity and size
(`45.20 (x2.37)`), a share for accuracy (`0.612 ± 0.034 (96 %)`). An empty cell means not measured, never zero.

Documents hold no number that was typed: a table stands between two comments, and the first one says what is in it.

    <!-- table pipeline_cpu.json comparison model=smollm2_135m -->
    <!-- table kernels_h100.json rows=n,k,m columns=op name=kernel_us -->
    <!-- end of table -->

`comparison` takes the records' context `row` as columns; the other form is a pivot: a line for each value of the `rows`
keys, a column for each value of the `columns` key (`name` is a key too). Other words are filters. `python -m
lbllm_core.report.tables --update README.md docs` writes them anew, `--check` only says whether they are up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbllm_core.errors import ArtifactError, LbllmError
from lbllm_core.report.records import Record, read_results

Cells = list[list[str]]
ROW_TITLES = {
    "teacher": "teacher",
    "rtn": "round to nearest",
    "stage1_explicit": "stage 1, explicit levels",
    "stage1": "stage 1 only",
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
_MARK = re.compile(r"<!-- table (?P<spec>[^\n]*?) -->\n(?P<body>.*?)<!-- end of table -->", re.DOTALL)


def comparison(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """Cells of the comparison: a head with the rows' titles, then a line for each figure that any row has.

    `rows`: dictionaries with `row` (a key of ROW_TITLES or any name) and figures by metric name; the row `teacher` is what the
    others are compared with.
    """
    teacher: Mapping[str, Any] = next((r for r in rows if r["row"] == "teacher"), {})
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [n for n in names if n.startswith("ppl_") and not n.endswith("_stderr")] + [n for n in names if _is_accuracy(n)] + [n for n in FIGURES if n in names]
    cells = [["", *(ROW_TITLES.get(str(r["row"]), str(r["row"])) for r in rows)]]
    for name in shown:
        cells.append([FIGURES[name][0] if name in FIGURES else name, *(_cell(name, row, teacher) for row in rows)])
    return cells


def _is_accuracy(name: str) -> bool:
    return name.startswith("acc_") and not name.startswith(("acc_stderr_", "acc_norm_stderr_"))


def _stderr_name(name: str) -> str:
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
    error = row.get(_stderr_name(name)) if name not in FIGURES else None
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


def table_of(spec: str, results: Path) -> str:
    """The Markdown table that a comment asks for, with its source below. Raises ArtifactError naming what is wrong with the request."""
    file, *parts = spec.split()
    content = read_results(results / file)
    words = dict(part.partition("=")[::2] for part in parts)
    layout = {key: words.pop(key) for key in ("comparison", "rows", "columns") if key in words}
    chosen = [r for r in content["records"] if all(str(r.get(key, "")) == value for key, value in words.items())]
    if not chosen:
        raise ArtifactError(f"the table `{spec}`: no record of {file} matches {words}")
    if "comparison" in layout:
        cells = comparison(rows_of(chosen))
    elif "rows" in layout and "columns" in layout:
        cells = pivot(chosen, layout["rows"].split(","), layout["columns"])
    else:
        raise ArtifactError(f"the table `{spec}` needs the word `comparison`, or rows=... and columns=...")
    source = f"`{content['command']}`, {content['date'][:10]}, {content['device']}, commit {content['commit'][:10] or 'unknown'}"
    return f"{markdown(cells)}\n{source}\n"


def updated(text: str, results: Path) -> str:
    """A document with every marked table written anew."""
    return _MARK.sub(lambda found: f"<!-- table {found['spec']} -->\n{table_of(found['spec'], results)}<!-- end of table -->", text)


def documents(paths: Iterable[Path]) -> list[Path]:
    """The Markdown files among the paths and in the folders among them. Raises ArtifactError for a path that is not there."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ArtifactError(f"there is no document {path}")
        found += sorted(path.rglob("*.md")) if path.is_dir() else [path]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 when a document could not be written, or with --check is out of date."""
    parser = argparse.ArgumentParser(prog="python -m lbllm_core.report.tables", description="Write the tables in the documentation from results/*.json.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--update", nargs="+", type=Path, metavar="PATH", help="Markdown files or folders to write")
    action.add_argument("--check", nargs="+", type=Path, metavar="PATH", help="Markdown files or folders to look at")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results files")
    options = parser.parse_args(arguments)
    stale = 0
    try:
        for path in documents(options.update or options.check):
            before = path.read_text(encoding="utf-8")
            after = updated(before, options.results)
            if before != after:
                stale += 1
                print(f"{path}: {'written' if options.update else 'out of date; run `make tables`'}")
                if options.update:
                    path.write_text(after, encoding="utf-8")
    except LbllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
