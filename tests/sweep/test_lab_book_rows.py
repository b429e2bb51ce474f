"""The runs of the lab book, read straight from MLflow's tables and through its client: the same."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows import lab_book
from lbllm_core.config import RunConfig, TrackingConfig
from lbllm_core.engine.artifacts import Handle
from lbllm_core.engine.progress import Progress
from lbllm_core.pipeline import Finished
from tasks.tracking import LabBook, store_uri


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home of rows")
    for seed in range(3):
        with LabBook(RunConfig(seed=seed, tracking=TrackingConfig(sweep="s" if seed else "")), folder) as book:
            book.progress(Progress("weight_distill", 1, 2, "block", {"error_after": 0.5}))
            book.progress(Progress("weight_distill", 2, 2, "block", {"error_after": 0.25}))
            book.finished(Finished("final", Handle("evaluate_model", "a" * 64, "b" * 64, {"ppl_x": 9.0 + seed}), 0.1))
    client = MlflowClient(store_uri(folder))
    client.log_metric(book.run_id, "eval/odd", math.nan)
    lost = client.create_run("0")
    client.delete_run(lost.info.run_id)
    gone = client.create_experiment("gone")
    client.create_run(gone)
    client.delete_experiment(gone)
    return folder


def test_both_ways_give_the_same(home: Path) -> None:
    fast, slow = lab_book.runs_by_sql(home / "mlflow.db"), lab_book.runs_by_client(home)
    assert len(fast) == 3
    assert repr(fast) == repr(slow)
    assert math.isnan(fast[-1].metrics["eval/odd"])
    assert fast[0].metrics["stage2/error_after"] == 0.25, "the last point of a curve"


def test_tables_of_another_version_are_read_through_the_client(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lab_book.read_rows(home, "s")

    def unknown(_: Path) -> list[lab_book.StoredRun]:
        with closing(sqlite3.connect(":memory:")) as store:
            store.execute("SELECT * FROM latest_metrics")
        return []

    monkeypatch.setattr(lab_book, "runs_by_sql", unknown)
    rows = lab_book.read_rows(home, "s")
    assert [repr(row) for row in rows] == [repr(row) for row in expected]
    assert [row.text("seed") for row in rows] == ["1", "2"]
    assert len(lab_book.read_rows(home)) == 3


def test_a_home_without_a_lab_book(tmp_path: Path) -> None:
    assert lab_book.read_rows(tmp_path) == []
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_addresses(home: Path) -> None:
    rows = lab_book.read_rows(home, "s")
    assert lab_book.list_address(home, rows, "s").endswith("/runs?searchFilter=tags.%60lbllm.sweep%60%20%3D%20%27s%27")
    assert lab_book.list_address(home, rows).endswith(f"/#/experiments/{lab_book.experiment_of(rows[0])}/runs")
    columns = lab_book.columns_address(home, rows, "s")
    tags = MlflowClient(store_uri(home)).get_experiment(lab_book.experiment_of(rows[0])).tags
    view = tags[f"mlflow.sharedViewState.{columns.rpartition('=')[2]}"]
    assert "metrics.`eval/ppl_x`" in view
    assert "params.`seed`" in view
