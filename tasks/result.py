"""Where the numbers of a finished run go: MLflow, Prefect's page, and a JSON file in the home folder."""

from __future__ import annotations

import json
import logging
from typing import Any

from prefect.artifacts import create_markdown_artifact

from lbllm_core.engine.files import write_atomic
from lbllm_core.report.summary import markdown_table, result_rows, steps_table
from tasks.step import Run
from tasks.tracking import LabBook

log = logging.getLogger(__name__)


def publish(run: Run, book: LabBook) -> dict[str, Any]:
    """Write the result table to each place; returns `{'rows': ..., 'minutes': ..., 'mlflow_run': id}` and keeps it as JSON."""
    rows = result_rows(run.finished)
    table = markdown_table(rows)
    minutes = steps_table(run.finished)
    book.text("result.md", f"{table}\n{minutes}\n")
    book.flush()
    try:
        create_markdown_artifact(markdown=f"{table}\n{minutes}", key="result", description=f"{run.config.model.name}, {run.config.scheme.name}")
    except Exception:
        log.warning("the result table could not be put on Prefect's page; it is in MLflow and in the home folder")
    result = {
        "rows": rows,
        "steps": [{"row": f.row, "step": f.handle.step, "minutes": f.minutes, "reused": f.handle.reused, "digest": f.handle.digest, "key": f.handle.key} for f in run.finished],
        "mlflow_run": book.run_id,
        "config": book.digest,
    }
    folder = run.home / "results"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{book.digest[:16]}.json", json.dumps(result, indent=1, sort_keys=True).encode())
    return result
