"""The lab book as values: the runs in MLflow's store, and the addresses of its pages. `tasks/tracking.py` writes, this reads.

A run that MLflow calls running, but whose process is gone, is *stopped*. Of several runs of one configuration in one sweep the
newest counts, finished ones first. What a step left beside its figures (curves, histograms, sample texts) is read from the run's own
artifacts, else from the artifact of this home that its lineage names, which is where runs of earlier versions have it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlparse

from filelock import FileLock, Timeout

from flows import servers
from lbllm_core.report.runs import RunRow
from tasks.tracking import share_columns, store_uri

STATES = {"FINISHED": "finished", "RUNNING": "running", "FAILED": "failed", "KILLED": "stopped", "SCHEDULED": "running"}
ARTIFACT_TAG = "lbllm.artifact."
PAGE = 1000


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
    fields = _config(info.artifact_uri) or dict(run.data.params)
    error = "" if state == "finished" else tags.get("lbllm.error", "")
    link = run_address(home, info.experiment_id, info.run_id)
    began, sweep, folder = (info.start_time or 0) / 1000, tags.get("lbllm.sweep", ""), str(_local(info.artifact_uri))
    return RunRow(info.run_id, state, began, fields, dict(run.data.metrics), lineage, error, digest, sweep, link, folder)


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
    path = _local(artifact_uri) / "config.json"
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= {f"{name}.{leaf}": inner for leaf, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def kept(row: RunRow, step: str, name: str, home: Path) -> Any:
    """The JSON that a step of the final model left (`curves.json`, ...); None when the run has none, or of another form."""
    folders = [Path(row.folder) / "steps" / step] if row.folder else []
    if step in row.lineage:
        folders.append(home / "artifacts" / row.lineage[step])
    for folder in folders:
        try:
            return json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return None


def _local(artifact_uri: str) -> Path:
    return Path(unquote(urlparse(artifact_uri).path))


def address(home: Path) -> str:
    """Where MLflow's page is, or will be after `make up`."""
    server = servers.running(home, "mlflow")
    return f"http://{servers.HOST}:{server.port if server else servers.mlflow_port()}"


def run_address(home: Path, experiment: str, run_id: str) -> str:
    """MLflow's page of one run."""
    return f"{address(home)}/#/experiments/{experiment}/runs/{run_id}"


def experiment_of(row: RunRow) -> str:
    """The id of the experiment that a run belongs to; empty for a cell without a run."""
    return row.link.partition("/experiments/")[2].partition("/")[0]


def compare_address(home: Path, rows: Sequence[RunRow]) -> str:
    """MLflow's compare page with these runs."""
    runs = json.dumps([row.run_id for row in rows], separators=(",", ":"))
    experiments = json.dumps(sorted({experiment_of(row) for row in rows}), separators=(",", ":"))
    return f"{address(home)}/#/compare-runs?runs={quote(runs)}&experiments={quote(experiments)}"


def list_address(home: Path, rows: Sequence[RunRow], sweep: str) -> str:
    """MLflow's list of the sweep's runs."""
    experiment = experiment_of(rows[-1]) if rows else "1"
    wanted = f"tags.`lbllm.sweep` = '{sweep}'"
    return f"{address(home)}/#/experiments/{experiment}/runs?searchFilter={quote(wanted)}"


def columns_address(home: Path, rows: Sequence[RunRow], sweep: str = "") -> str:
    """MLflow's list of the runs with the columns that matter, of the newest run's experiment; empty without runs or store."""
    if not rows:
        return ""
    newest_row = max(rows, key=lambda row: row.started)
    experiment = experiment_of(newest_row)
    key = share_columns(home, experiment, sweep)
    return f"{address(home)}/#/experiments/{experiment}/runs?viewStateShareKey={key}" if key else ""
