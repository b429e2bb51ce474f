"""`make compare`: the runs of a sweep, or all runs, side by side, as Markdown and as pictures.

    python -m flows.compare [SWEEP]      writes $LBLLM_HOME/compare/<sweep or all>.md, .png and -bits.png

What is compared is read from MLflow's store; this is the only file that reads it (`tasks/tracking.py` writes). It works on a
sweep that is half finished: a row that is still running, or failed, is shown as such, with what it has measured so far. A run
that MLflow calls running, but whose process is gone, is *stopped*. Cells that have no row yet are added from the sweep's own
record. Of several runs of one configuration in one sweep the newest counts, finished ones first.

The tables themselves are pure functions in `lbllm_core/report/runs.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlparse

from filelock import FileLock, Timeout

from flows import servers
from flows.sweep_record import checked_name, read_record
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.engine.files import write_atomic
from lbllm_core.errors import LbllmError
from lbllm_core.report.plots import perplexity_against_bits, table_picture
from lbllm_core.report.runs import RunRow, differences, lineage_table, measured, run_table, teacher_table
from lbllm_core.report.tables import Cells, markdown, plain
from tasks.tracking import store_uri

STATES = {"FINISHED": "finished", "RUNNING": "running", "FAILED": "failed", "KILLED": "stopped", "SCHEDULED": "running"}
ARTIFACT_TAG = "lbllm.artifact."
PAGE = 1000
ORDER = ("finished", "running", "stopped", "failed", "planned")


def read_rows(home: Path, sweep: str = "") -> list[RunRow]:
    """The runs in a home's lab book, oldest first; with `sweep` only its own. Empty when there is no lab book yet."""
    if not (home / "mlflow.db").exists():
        return []
    from mlflow import MlflowClient

    client = MlflowClient(store_uri(home))
    experiments = [e.experiment_id for e in client.search_experiments()]
    wanted = f"tags.`lbllm.sweep` = '{sweep}'" if sweep else "tags.`lbllm.config` != ''"
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(experiments, wanted, max_results=PAGE, page_token=token, order_by=["attributes.start_time ASC"])
        found += page
        token = page.token
        if not token:
            return newest([_row(run, home) for run in found])


def newest(rows: Sequence[RunRow]) -> list[RunRow]:
    """One row a configuration, in order of first appearance: the newest finished one, else the newest."""
    kept: dict[str, RunRow] = {}
    for row in rows:
        before = kept.get(row.digest)
        if before is None or row.state == "finished" or before.state != "finished":
            kept[row.digest or row.run_id] = row
    return list(kept.values())


def _row(run: Any, home: Path) -> RunRow:
    tags, info = run.data.tags, run.info
    digest = tags.get("lbllm.config", "")
    state = STATES.get(info.status, str(info.status).lower())
    if state == "running" and not _alive(home, digest):
        state = "stopped"
    lineage = {name.removeprefix(ARTIFACT_TAG): key for name, key in tags.items() if name.startswith(ARTIFACT_TAG)}
    link = f"{address(home)}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
    fields = _config(info.artifact_uri) or dict(run.data.params)
    error = "" if state == "finished" else tags.get("lbllm.error", "")
    return RunRow(info.run_id, state, (info.start_time or 0) / 1000, fields, dict(run.data.metrics), lineage, error, digest, tags.get("lbllm.sweep", ""), link)


def _alive(home: Path, digest: str) -> bool:
    """Whether a process holds the row: the lab book keeps this lock while its run lasts."""
    try:
        with FileLock(home / "runs" / f"{digest[:16]}.lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _config(artifact_uri: str) -> dict[str, Any]:
    """The run's resolved configuration as 'section.field': value; empty when it is not at hand."""
    path = Path(unquote(urlparse(artifact_uri).path)) / "config.json"
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= {f"{name}.{leaf}": inner for leaf, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def address(home: Path) -> str:
    """Where MLflow's page is, or will be after `make up`."""
    server = servers.running(home, "mlflow")
    return f"http://{servers.HOST}:{server.port if server else servers.mlflow_port()}"


def compare_address(home: Path, rows: Sequence[RunRow]) -> str:
    """MLflow's compare page with these runs."""
    runs = json.dumps([row.run_id for row in rows], separators=(",", ":"))
    experiments = json.dumps(sorted({row.link.partition("/experiments/")[2].partition("/")[0] for row in rows}), separators=(",", ":"))
    return f"{address(home)}/#/compare-runs?runs={quote(runs)}&experiments={quote(experiments)}"


def list_address(home: Path, rows: Sequence[RunRow], sweep: str) -> str:
    """MLflow's list of the sweep's runs."""
    experiment = next((row.link.partition("/experiments/")[2].partition("/")[0] for row in rows), "1")
    wanted = f"tags.`lbllm.sweep` = '{sweep}'"
    return f"{address(home)}/#/experiments/{experiment}/runs?searchFilter={quote(wanted)}"


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


def page(rows: Sequence[RunRow], name: str, home: Path, pictures: Sequence[Path]) -> str:
    """The whole comparison as Markdown."""
    finished = [row for row in rows if row.state == "finished"]
    linked = [row for row in rows if row.link]

    def link(row: RunRow) -> str:
        return f"[{row.title}]({row.link})" if row.link else row.title

    counts = ", ".join(f"{sum(row.state == state for row in rows)} {state}" for state in ORDER if any(row.state == state for row in rows))
    parts = [f"# Comparison: {name}", f"{len(rows)} runs ({counts}), read on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}. Behind `±` stands a standard error of the evaluation data, in brackets the figure over that of the run's own teacher (x) or its share (%). Minutes are the work in the final model and the teacher's evaluation."]
    parts.append(markdown(run_table(rows, link)))
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


def compare(home: Path, sweep: str = "") -> tuple[str, list[Path]]:
    """Write the comparison; returns the table for a terminal and the files. A sentence when there is nothing to compare yet."""
    rows = with_planned(read_rows(home, sweep), home, sweep)
    if not rows:
        known = sorted({row.sweep for row in read_rows(home) if row.sweep}) if sweep else []
        hint = f"; sweeps in it: {', '.join(known)}" if known else "; `make run` or `make sweep MODELS=tiny SEEDS=0,1` makes some"
        return f"There are no runs{f' of the sweep {sweep}' if sweep else ''} in the lab book of {home} yet{hint}.\n", []
    rows.sort(key=lambda row: ORDER.index(row.state) if row.state in ORDER else len(ORDER))
    name = sweep or "all"
    folder = home / "compare"
    folder.mkdir(exist_ok=True)
    pictures = [table_picture(run_table(rows), folder / f"{name}.png", f"{name}: {len(rows)} runs")]
    pictures += perplexity_against_bits(_points(rows), folder, name)
    text = folder / f"{name}.md"
    write_atomic(text, page(rows, name, home, pictures).encode())
    return _for_terminal(rows), [text, *pictures]


def _points(rows: Sequence[RunRow]) -> dict[str, list[dict[str, Any]]]:
    """For each perplexity the runs that have it, as plain values for the plot, and their teachers at 16 bits."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in (n for n in measured(rows) if n.startswith("ppl_")):
        for row in rows:
            bits, value = row.figures.get("size/effective_bpw"), row.value(name)
            if bits is not None and value is not None:
                point = {"title": row.title, "model": row.text("model.name"), "bits": bits, "value": value, "error": row.value(f"{name}_stderr") or 0.0}
                found.setdefault(name, []).append(point | {"teacher": row.of_teacher(name)})
    return found


def _for_terminal(rows: Sequence[RunRow]) -> str:
    tables: list[Cells] = [run_table(rows), teacher_table(rows), differences(rows)]
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
