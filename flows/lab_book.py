"""The lab book as values: the runs in MLflow's store, and the addresses of its pages. `tasks/tracking.py` writes, this reads.

A run that MLflow calls running, but whose process is gone, is *stopped*. Of several runs of one configuration in one sweep the
newest counts, finished ones first. What a step left beside its figures (curves, histograms, sample texts) is read from the run's own
artifacts, else from the artifact of this home that its lineage names, which is where runs of earlier versions have it.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlparse

from filelock import FileLock, Timeout

from flows import servers
from lbllm_core.report.runs import RunRow, differences, measured
from tasks.tracking import share_columns, store_exists, store_file, store_uri

STATES = {"FINISHED": "finished", "RUNNING": "running", "FAILED": "failed", "KILLED": "stopped", "SCHEDULED": "running"}
ARTIFACT_TAG = "lbllm.artifact."
PAGE = 1000


@dataclass(frozen=True)
class StoredRun:
    """A run as the store has it; `started` in milliseconds."""

    run_id: str
    experiment: str
    status: str
    started: int
    artifact_uri: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def read_rows(home: Path, sweep: str = "") -> list[RunRow]:
    """The runs in a home's lab book, oldest first; with `sweep` only its own. Empty when there is no lab book yet."""
    if not store_exists(home):
        return []
    try:
        file = store_file(home)
        found = runs_by_sql(file) if file else runs_by_client(home)
    except sqlite3.OperationalError:  # another version's tables, or a store that is busy
        found = runs_by_client(home)
    wanted = [run for run in found if (run.tags.get("lbllm.sweep") == sweep if sweep else run.tags.get("lbllm.config"))]
    return newest([_row(run, home) for run in wanted])


def runs_by_sql(file: Path) -> list[StoredRun]:
    """All runs that are not deleted, straight from the tables in MLflow's sqlite file: a tenth of the time that its client takes for many metrics.

    Raises sqlite3.OperationalError when the tables are not those of the versions that we know.
    """
    active = "JOIN runs r ON r.run_uuid = v.run_uuid WHERE r.lifecycle_stage = 'active'"
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=10)) as store:
        runs = store.execute(
            "SELECT r.run_uuid, r.experiment_id, r.status, r.start_time, r.artifact_uri FROM runs r JOIN experiments e ON e.experiment_id = r.experiment_id "
            "WHERE r.lifecycle_stage = 'active' AND e.lifecycle_stage = 'active' ORDER BY r.start_time, r.run_uuid"
        ).fetchall()
        values: list[dict[str, dict[str, Any]]] = [{}, {}, {}]
        for place, columns in enumerate(("tags", "params", "latest_metrics")):
            shown = "CASE WHEN v.is_nan THEN NULL ELSE v.value END" if columns == "latest_metrics" else "v.value"
            for run_id, key, value in store.execute(f"SELECT v.run_uuid, v.key, {shown} FROM {columns} v {active}"):
                values[place].setdefault(run_id, {})[key] = math.nan if value is None and place == 2 else value
    tags, params, metrics = values
    return [StoredRun(r[0], str(r[1]), r[2], r[3] or 0, r[4], tags.get(r[0], {}), params.get(r[0], {}), metrics.get(r[0], {})) for r in runs]


def runs_by_client(home: Path) -> list[StoredRun]:
    """The same through MLflow's client."""
    from mlflow import MlflowClient

    client = MlflowClient(store_uri(home))
    experiments = [e.experiment_id for e in client.search_experiments()]
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(experiments, max_results=PAGE, page_token=token, order_by=["attributes.start_time ASC", "attributes.run_id ASC"])
        found += page
        token = page.token
        if not token:
            break
    return [StoredRun(r.info.run_id, r.info.experiment_id, r.info.status, r.info.start_time or 0, r.info.artifact_uri, dict(r.data.tags), dict(r.data.params), dict(r.data.metrics)) for r in found]


def newest(rows: Sequence[RunRow]) -> list[RunRow]:
    """One row a configuration, in order of first appearance: the newest finished one, else the newest."""
    kept: dict[str, RunRow] = {}
    for row in rows:
        before = kept.get(row.digest)
        if before is None or row.state == "finished" or before.state != "finished":
            kept[row.digest or row.run_id] = row
    return list(kept.values())


def _row(run: StoredRun, home: Path) -> RunRow:
    tags = run.tags
    digest = tags.get("lbllm.config", "")
    state = STATES.get(run.status, str(run.status).lower())
    if state == "running" and not _alive(home, digest):
        state = "stopped"
    lineage = {name.removeprefix(ARTIFACT_TAG): key for name, key in tags.items() if name.startswith(ARTIFACT_TAG)}
    fields = _config(run.artifact_uri) or dict(run.params)
    error = "" if state == "finished" else tags.get("lbllm.error", "")
    link = run_address(home, run.experiment, run.run_id)
    return RunRow(run.run_id, state, run.started / 1000, fields, run.metrics, lineage, error, digest, tags.get("lbllm.sweep", ""), link, str(_local(run.artifact_uri)))


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


def list_address(home: Path, rows: Sequence[RunRow], sweep: str = "") -> str:
    """MLflow's list of the sweep's runs; without a sweep of all runs of the newest one's experiment."""
    experiment = experiment_of(rows[-1]) if rows else "1"
    wanted = quote(f"tags.`lbllm.sweep` = '{sweep}'")
    return f"{address(home)}/#/experiments/{experiment}/runs" + (f"?searchFilter={wanted}" if sweep else "")


def columns_address(home: Path, rows: Sequence[RunRow], sweep: str = "") -> str:
    """MLflow's list of the runs with the columns that matter, of the newest run's experiment; empty without runs or store."""
    if not rows:
        return ""
    newest_row = max(rows, key=lambda row: row.started)
    experiment = experiment_of(newest_row)
    own = [row for row in rows if experiment_of(row) == experiment]
    there = {name for row in own for name in row.figures}
    scores = [name for name in (f"eval/{figure}" for figure in measured(own)) if name in there]
    key = share_columns(home, experiment, [*scores, *sorted(there - set(scores))], differences(own)[0][1:], sweep)
    return f"{address(home)}/#/experiments/{experiment}/runs?viewStateShareKey={key}" if key else ""
