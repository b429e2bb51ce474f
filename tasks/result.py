"""Where the numbers of a finished run go: MLflow, Prefect's page, and a JSON file in the home folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from lbllm_core.engine.files import write_atomic
from lbllm_core.report.expected import comparisons, expectation_figures, expectations_markdown
from lbllm_core.report.plots import curves, perplexity_bars
from lbllm_core.report.summary import result_rows, step_cells, step_entries
from lbllm_core.report.tables import comparison, markdown
from tasks.run_texts import lineage
from tasks.step import Run
from tasks.tracking import LabBook

log = logging.getLogger(__name__)


def link_to_mlflow(address: str) -> str:
    """Put the way to the run's row in MLflow on its page in Prefect, at once: a run that fails has it too. Returns the address."""
    try:
        create_link_artifact(link=address, link_text="this run in MLflow", key="mlflow", description=f"[This run in MLflow]({address}), served by `make up`")
    except Exception:
        log.warning("the link to MLflow could not be put on Prefect's page; it is %s", address)
    return address


def publish(run: Run, book: LabBook, mlflow: str = "") -> dict[str, Any]:
    """Write the result table to each place; returns what it keeps as JSON: rows, steps, the row in MLflow, the protocols in the order asked.

    `mlflow`: the address of the run's row there, for Prefect's page.
    """
    rows, steps = result_rows(run.finished), step_entries(run.finished)
    evaluation = run.config.evaluation
    result = {"rows": rows, "steps": steps, "mlflow_run": book.run_id, "config": book.digest, "protocols": list(evaluation.protocols)}
    if evaluation.expected:
        result["expected"] = comparisons(rows, evaluation)
        book.figures(expectation_figures(rows, evaluation))
    text = "\n".join(part for part in (markdown(comparison(rows)), expectations_markdown(rows, evaluation), markdown(step_cells(steps))) if part)
    book.text("result.md", text)
    book.text("lineage.json", lineage(run.finished))
    folder = run.home / "results" / book.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for plot in _plots(run, rows, folder):
        book.file(plot, "plots")
    try:
        create_markdown_artifact(markdown=text + (f"\n[This run in MLflow]({mlflow})\n" if mlflow else ""), key="result", description=f"{run.config.model.name}, {run.config.scheme.name}")
    except Exception:
        log.warning("the result table could not be put on Prefect's page; it is in MLflow and in the home folder")
    write_atomic(folder / "result.json", json.dumps(result, indent=1, sort_keys=True).encode())
    return result


def _plots(run: Run, rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Perplexity of the rows as bars, and what the stages left in `curves.json` as lines: losses, errors. A plot that fails is only missing."""
    drawn: list[Path] = []
    try:
        drawn += perplexity_bars(rows, folder)
        for done in run.finished:
            source = done.handle.folder(run.home) / "curves.json"
            if done.row == "final" and source.exists():
                lines = {name: [(x, y) for x, y in points] for name, points in json.loads(source.read_text(encoding="utf-8")).items() if points}
                for kind, axis in (("loss", "step" if done.handle.step == "end_to_end" else "block"), ("error", "block")):
                    own = {name: points for name, points in lines.items() if (name == "loss") == (kind == "loss") and not name.startswith("loss_")}
                    if own:
                        drawn.append(curves(own, folder / f"{done.handle.step}-{kind}.png", done.handle.step, axis, kind))
    except Exception:
        log.warning("a plot could not be drawn; the numbers are in the table", exc_info=True)
    return drawn
