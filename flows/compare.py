"""`make compare`: the runs of a sweep, or all runs, side by side, as one HTML page, as Markdown and as pictures.

    python -m flows.compare [SWEEP]      writes $LBLLM_HOME/compare/<sweep or all>.html, .md, .png and -<perplexity>.png

The runs are read by `flows/lab_book.py`. It works on a sweep that is half finished: a row that is still running, or failed, is shown
as such, with what it has measured so far; cells that have no row yet are added from the sweep's own record. The page is made by
`lbllm_core/report/desk.py`, the tables are pure functions in `lbllm_core/report/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from flows.compose import published
from flows.lab_book import compare_address, kept, list_address, read_rows
from flows.sweep_record import SweepRecord, checked_name, read_record
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.engine.files import write_atomic
from lbllm_core.errors import LbllmError
from lbllm_core.pipeline import STAGES
from lbllm_core.report import desk
from lbllm_core.report.plots import perplexity_against_bits, table_picture
from lbllm_core.report.runs import RunRow, differences, lineage_table, measured, run_table, teacher_table
from lbllm_core.report.standing import BEST, TIE, standings
from lbllm_core.report.tables import Cells, counted, markdown, plain

ORDER = ("finished", "running", "stopped", "failed", "planned")
MARKS = {BEST: " ★", TIE: " ≈"}


def with_planned(rows: Sequence[RunRow], home: Path, sweep: str) -> list[RunRow]:
    """The rows, and behind them the cells of the sweep's record that have none: planned, or failed before they began."""
    known = {row.digest for row in rows}
    record = read_record(home, sweep) if sweep else None
    missing = [cell for cell in (record.cells if record else ()) if cell.digest not in known]
    extra = [
        RunRow("", "failed" if cell.reason else "planned", fields={"model.name": cell.model, "experiment": cell.experiment, "seed": cell.seed, "scheme.name": cell.scheme}, error=cell.reason, digest=cell.digest)
        for cell in missing
    ]
    return [*rows, *extra]


def in_order(rows: Sequence[RunRow], record: SweepRecord | None) -> list[RunRow]:
    """Finished runs first; runs of one state as the sweep names its cells (workers finish them in another order), others as they come."""
    places = {cell.digest: place for place, cell in enumerate(record.cells if record else ())}
    return sorted(rows, key=lambda row: (ORDER.index(row.state) if row.state in ORDER else len(ORDER), places.get(row.digest, len(places))))


def page(rows: Sequence[RunRow], name: str, home: Path, pictures: Sequence[Path]) -> str:
    """The comparison as Markdown: the tables of the HTML page that a text can hold."""
    finished = [row for row in rows if row.state == "finished"]
    linked = [row for row in rows if row.link]

    def link(row: RunRow) -> str:
        return f"[{row.title}]({row.link})" if row.link else row.title

    counts = ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in ORDER if any(row.state == state for row in rows))
    parts = [f"# Comparison: {name}", f"{counted(len(rows), 'run')} ({counts}), read on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}. Behind `±` stands a standard error of the evaluation data, in brackets the figure over that of the run's own teacher (x) or its share (%). ★ is the best finished run of its model, ≈ one within a standard error of their difference. Minutes are the work in the final model and the teacher's evaluation."]
    parts.append(markdown(_marked(rows, link)))
    parts += [f"![{picture.stem}]({quote(picture.name)})" for picture in pictures]
    for title, cells in (("Teachers", teacher_table(rows)), ("What differs", differences(finished or rows, link)), ("Lineage", lineage_table(linked, link))):
        if len(cells) > 1:
            parts += [f"## {title}", markdown(cells)]
    if len(differences(finished or rows)) == 1:
        parts.append("The runs differ in nothing but what the first table names.")
    failures = [f"- {link(row)} ({row.state}): {row.error}" for row in rows if row.error]
    if failures:
        parts += ["## Not finished", "\n".join(failures)]
    if linked:
        parts += ["## In MLflow", f"Served by `make up`: [compare page]({compare_address(home, linked)})" + (f", [list of the runs]({list_address(home, linked, name)})" if name != "all" else "")]
    return "\n\n".join(parts) + "\n"


def _marked(rows: Sequence[RunRow], title: Callable[[RunRow], str] = lambda row: row.title) -> Cells:
    """The table of runs with its best and tied figures marked."""
    marks = {name: standings(rows, name) for name in measured(rows)}
    return run_table(rows, title, lambda place, name, text: text + MARKS.get(marks[name].get(place, ""), ""))


def what_steps_kept(rows: Sequence[RunRow], home: Path) -> dict[str, desk.Kept]:
    """By run id: curves, histograms and sample texts of its steps, where they are."""
    found = {}
    for row in rows:
        curves = {step: value for step in STAGES if isinstance(value := kept(row, step, "curves.json", home), dict)}
        activations = {step: value["blocks"] for step in ("act_quant", "end_to_end") if isinstance(value := kept(row, step, "activations.json", home), dict)}
        samples = kept(row, "pack_and_benchmark", "samples.json", home)
        found[row.run_id] = desk.Kept(curves, activations, samples if isinstance(samples, list) else ())
    return found


def html_page(rows: Sequence[RunRow], name: str, home: Path) -> str:
    """The whole comparison as one HTML page."""
    linked = [row for row in rows if row.link]
    record = read_record(home, name)
    addresses = {"MLflow: compare page": compare_address(home, linked), "MLflow: list of runs": list_address(home, linked, "" if name == "all" else name)} if linked else {}
    about = desk.Page(name, f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}", record.question if record else "", addresses, published())
    return desk.render(rows, what_steps_kept(desk.drawn(rows), home), about)


def compare(home: Path, sweep: str = "") -> tuple[str, list[Path]]:
    """Write the comparison; returns the table for a terminal and the files. A sentence when there is nothing to compare yet."""
    rows = with_planned(read_rows(home, sweep), home, sweep)
    if not rows:
        known = sorted({row.sweep for row in read_rows(home) if row.sweep}) if sweep else []
        hint = f"; sweeps in it: {', '.join(known)}" if known else "; `make run` or `make sweep MODELS=tiny SEEDS=0,1` makes some"
        return f"There are no runs{f' of the sweep {sweep}' if sweep else ''} in the lab book of {home} yet{hint}.\n", []
    rows = in_order(rows, read_record(home, sweep) if sweep else None)
    name = sweep or "all"
    folder = home / "compare"
    folder.mkdir(exist_ok=True)
    pictures = [table_picture(run_table(rows), folder / f"{name}.png", f"{name}: {counted(len(rows), 'run')}")]
    pictures += perplexity_against_bits(desk.points(rows), folder, name)
    text, report = folder / f"{name}.md", folder / f"{name}.html"
    write_atomic(text, page(rows, name, home, pictures).encode())
    write_atomic(report, html_page(rows, name, home).encode())
    return _for_terminal(rows), [report, text, *pictures]


def _for_terminal(rows: Sequence[RunRow]) -> str:
    tables: list[Cells] = [_marked(rows), teacher_table(rows), differences(rows)]
    text = "\n".join(plain(cells) for cells in tables if len(cells) > 1)
    failures = [f"{row.title} ({row.state}): {row.error}" for row in rows if row.error]
    return text + ("\n" + "\n".join(failures) + "\n" if failures else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.compare", description="Compare finished runs.")
    parser.add_argument("sweep", nargs="?", default="", help="a sweep's name; without it all runs are compared")
    chosen = parser.parse_args(arguments)
    try:
        shown, files = compare(home_folder(), checked_name(chosen.sweep) if chosen.sweep else "")
    except LbllmError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    print(shown)
    for file in files:
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
