"""MLflow's trouble never costs a run: entries wait, and arrive later, in order, in the same row."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from lbllm_core.config import RunConfig
from lbllm_core.engine.artifacts import Handle
from lbllm_core.engine.progress import Progress
from lbllm_core.pipeline import Finished
from tasks.tracking import LabBook, store_uri


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "a home"
    folder.mkdir()
    return folder


def rows(home: Path) -> list[Run]:
    client = MlflowClient(store_uri(home))
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def a_run(home: Path, config: RunConfig, losses: tuple[float, ...] = (3.0, 2.0, 1.0)) -> str:
    with LabBook(config, home) as book:
        for i, loss in enumerate(losses):
            book.progress(Progress("weight_distill", i + 1, len(losses), "block", {"loss": loss, "weight_error/q": 1.0}))
        book.finished(Finished("final", Handle("weight_distill", "a" * 64, "b" * 64, {"stage2/block_rel_mse_last": 0.5, "plain": 2.0}), 1.5))
        book.finished(Finished("stage1", Handle("evaluate_model", "c" * 64, "d" * 64, {"ppl_x": 9.0}), 0.1))
        book.text("result.md", "| a table |")
    return book.run_id


def test_one_row_with_sections_and_history(home: Path) -> None:
    run_id = a_run(home, RunConfig(seed=5))
    (row,) = rows(home)
    assert (row.info.run_id, row.info.status) == (run_id, "FINISHED")
    assert {"stage2/loss", "stage2/block_rel_mse_last", "stage2/plain", "stage1/eval/ppl_x", "minutes/weight_distill"} <= set(row.data.metrics)
    assert not any("weight_error" in name for name in row.data.metrics)
    assert row.data.params["seed"] == "5"
    assert "scheme.group_size" not in row.data.params  # only what differs from the default
    client = MlflowClient(store_uri(home))
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "stage2/loss")] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert {"config.json", "result.md"} <= {f.path for f in client.list_artifacts(run_id)}


def test_unfinished_row_goes_on_and_finished_one_is_left(home: Path) -> None:
    with pytest.raises(RuntimeError), LabBook(RunConfig(), home) as book:
        raise RuntimeError("block 3: loss is nan")
    (row,) = rows(home)
    assert row.info.status == "FAILED"
    assert "nan" in row.data.tags["lbllm.error"]
    assert a_run(home, RunConfig()) == book.run_id
    assert [r.info.status for r in rows(home)] == ["FINISHED"]
    assert a_run(home, RunConfig()) != book.run_id


def test_two_at_once_have_a_row_each(home: Path) -> None:
    with LabBook(RunConfig(), home) as first, LabBook(RunConfig(), home) as second:
        pass
    assert first.run_id != second.run_id
    assert [r.info.status for r in rows(home)] == ["FINISHED", "FINISHED"]


def test_store_that_is_down(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    (home / "mlflow.db").mkdir()  # sqlite cannot open a folder
    with caplog.at_level(logging.WARNING):
        assert a_run(home, RunConfig(seed=1)) == ""
    assert "the run goes on" in caplog.text
    assert len(list((home / "mlflow-pending").glob("*.json"))) == 1
    (home / "mlflow.db").rmdir()
    a_run(home, RunConfig(seed=2))
    by_seed = {r.data.params["seed"]: r for r in rows(home)}
    assert by_seed["1"].info.status == by_seed["2"].info.status == "FINISHED"
    assert by_seed["1"].data.metrics == by_seed["2"].data.metrics
    history = MlflowClient(store_uri(home)).get_metric_history(by_seed["1"].info.run_id, "stage2/loss")
    assert [m.value for m in history] == [3.0, 2.0, 1.0]
    assert not list((home / "mlflow-pending").glob("*.json"))


def test_tracking_off_writes_nothing(home: Path) -> None:
    from dataclasses import replace

    a_run(home, replace(RunConfig(), tracking=replace(RunConfig().tracking, enabled=False)))
    assert not (home / "mlflow.db").exists()
    assert not (home / "mlflow-pending").exists()
