"""Where the numbers of a finished run go: MLflow, Prefect's page, and a JSON file in the home folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact

from lbllm_core.engine.files import write_atomic
from lbllm_core.report.expected import comparisons, expectation_figures, expectations_markdown
from lbllm_core.report.plots import curves, perplexity_bars
from lbllm_core.report.summary import result_rows, step_cells, step_entries
from lbllm_core.report.tables import comparison, markdown
from tasks.step import Run
from tasks.tracking import LabBook

log = logging.getLogger(__name__)


def publish(run: Run, book: LabBook) -> dict[str, Any]:
    """Write the result table to each place; returns `{'rows': ..., 'steps': ..., 'mlflow_run': id}` and keeps it as JSON."""
    rows, steps = result_rows(run.finished), step_entries(run.finished)
    result = {"rows": rows, "steps": steps, "mlflow_run": book.run_id, "config": book.digest}
    evaluation = run.config.evaluation
    if evaluation.expected:
        result["expected"] = comparisons(rows, evaluation)
        book.figures(expectation_figures(rows, evaluation))
    text = "\n".join(part for part in (markdown(comparison(rows)), expectations_markdown(rows, evaluation), markdown(step_cells(steps))) if part)
    book.text("result.md", text)
    folder = run.home / "results" / book.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for plot in _plots(run, rows, folder):
        book.file(plot, "plots")
    try:
        create_markdown_artifact(markdown=text, key="result", description=f"{run.config.model.name}, {run.config.scheme.name}")
    except Exception:
        log.warning("the result table could not be put on Prefect's page; it is in MLflow and in the home folder")
    write_atomic(folder / "result.json", json.dumps(result, indent=1, sort_keys=True).encode())
    return result


def _plots(run: Run, rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Perplexity of the rows as bars, and what the stages left in `curves.json` as lines. A plot that fails is only missing."""
    drawn: list[Path] = []
    try:
        drawn += perplexity_bars(rows, folder)
        for done in run.finished:
            source = done.handle.folder(run.home) / "curves.json"
            if done.row == "final" and source.exists():
                lines = {name: [(x, y) for x, y in points] for name, points in json.loads(source.read_text(encoding="utf-8")).items() if points}
                if lines:
                    drawn.append(curves(lines, folder / f"{done.handle.step}.png", done.handle.step, "block or step", "value"))
    except Exception:
        log.warning("a plot could not be drawn; the numbers are in the table", exc_info=True)
    return drawn
