"""MLflow's trouble never costs a run: entries wait, and arrive later, in order, in the same row."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from lbllm_core.config import RunConfig, TrackingConfig
from lbllm_core.engine.artifacts import Handle
from lbllm_core.engine.progress import Progress
from lbllm_core.errors import ConfigError
from lbllm_core.pipeline import Finished
from tasks import system_metrics, tracking
from tasks.tracking import LabBook, describe_experiment, store_uri


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


def test_store_that_goes_in_the_middle_of_a_call(home: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe found it well; what the store's own libraries say of the error is not shown, what we say is a sentence."""
    with caplog.at_level(logging.WARNING, "tasks"), LabBook(RunConfig(), home) as book:
        (home / "mlflow.db").rename(home / "aside.db")
        (home / "mlflow.db").write_bytes(b"this is no database " * 500)
        monkeypatch.setattr(tracking, "_probe", lambda store: None)
        book.progress(Progress("weight_distill", 1, 1, "block", {"loss": 1.0}))
        book.flush()
        monkeypatch.undo()
        (home / "aside.db").replace(home / "mlflow.db")
    assert "the run goes on" in caplog.text
    assert "autoflush" not in caplog.text
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())
    assert [row.info.status for row in rows(home)] == ["FINISHED"]


def test_a_store_that_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "book.db"
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{elsewhere}")
    a_run(home, RunConfig())
    assert elsewhere.exists()
    assert not (home / "mlflow.db").exists()
    for address in ("http://user:secret@127.0.0.1:1", "postgresql://user:secret@127.0.0.1:1/book"):
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", address)
        with pytest.raises(ConfigError, match="give a database's address") as refused:
            a_run(home, RunConfig())
        assert "secret" not in str(refused.value)


def test_a_database_that_does_not_answer_is_given_up_within_seconds(home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install -e '.[postgres]'")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql+psycopg2://lbllm:secret@127.0.0.1:1/none")
    with caplog.at_level(logging.WARNING):
        assert a_run(home, RunConfig()) == ""
    assert "the run goes on" in caplog.text
    assert "secret" not in caplog.text
    assert len(list((home / "mlflow-pending").glob("*.json"))) == 1
    monkeypatch.delenv("MLFLOW_BACKEND_STORE_URI")
    a_run(home, RunConfig(seed=2))
    assert len(rows(home)) == 2


def test_tracking_off_writes_nothing(home: Path) -> None:
    from dataclasses import replace

    a_run(home, replace(RunConfig(), tracking=replace(RunConfig().tracking, enabled=False)))
    assert not (home / "mlflow.db").exists()
    assert not (home / "mlflow-pending").exists()


def kept_step(home: Path, reused: bool) -> Finished:
    """A stage 2 whose folder holds the curves of two blocks, and a pack step with sample texts."""
    handle = Handle("weight_distill", "f" * 64, "b" * 64, {}, reused)
    folder = handle.folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    curves = {"error_after": [[0, 0.2], [1, 0.3]], "loss": [[0.5, 9.0], [1.0, 8.0], [1.5, 7.0], [2.0, 6.0]]}
    (folder / "curves.json").write_text(json.dumps(curves))
    return Finished("final", handle, 1.0)


def test_a_reused_step_brings_its_curves_and_a_worked_one_is_drawn_once(home: Path) -> None:
    with LabBook(RunConfig(seed=1), home) as book:
        book.finished(kept_step(home, True))
    with LabBook(RunConfig(seed=2), home) as other:
        for share, loss in ((0.5, 9.0), (1.0, 8.0)):
            other.progress(Progress("weight_distill", 0, 2, "block", {"loss": loss, "loss_before": 9.0}, share))
        other.progress(Progress("weight_distill", 1, 2, "block", {"error_after": 0.2, "loss": 8.0, "loss_after": 8.0}))
        other.finished(kept_step(home, False))
    client = MlflowClient(store_uri(home))
    for run in (book.run_id, other.run_id):
        assert [(m.step, m.value) for m in client.get_metric_history(run, "stage2/error_after")] == [(1, 0.2), (2, 0.3)]
        assert [(m.step, m.value) for m in client.get_metric_history(run, "stage2/training_loss")] == [(50, 9.0), (100, 8.0), (150, 7.0), (200, 6.0)]
        assert [f.path for f in client.list_artifacts(run, "steps/weight_distill")] == ["steps/weight_distill/curves.json"]
    assert not client.get_metric_history(other.run_id, "stage2/loss"), "loss_after says it"


def test_a_sweep_has_an_experiment_of_its_own_with_a_description(home: Path) -> None:
    describe_experiment(home, "does-it-help", "Does stage 4 help?")
    config = RunConfig(tracking=TrackingConfig(sweep="does-it-help"))
    with LabBook(config, home, about="Stage 4 left out", prefect="http://127.0.0.1:1/runs/flow-run/x"):
        pass
    a_run(home, RunConfig())
    client = MlflowClient(store_uri(home))
    described = client.get_experiment_by_name("does-it-help")
    assert described.tags["mlflow.note.content"] == "Does stage 4 help?"
    (row,) = client.search_runs([described.experiment_id])
    assert "Stage 4 left out." in row.data.tags["mlflow.note.content"]
    assert "(http://127.0.0.1:1/runs/flow-run/x)" in row.data.tags["mlflow.note.content"]
    assert row.data.tags["mlflow.runName"] == "embedded tiny"
    assert len(client.search_runs([client.get_experiment_by_name("lbllm").experiment_id])) == 1
    described_by_hand = "what a person wrote stays"
    client.set_experiment_tag(described.experiment_id, "mlflow.note.content", described_by_hand)
    describe_experiment(home, "does-it-help", "Another text")
    assert client.get_experiment_by_name("does-it-help").tags["mlflow.note.content"] == described_by_hand


def test_a_deleted_experiment_comes_back(home: Path) -> None:
    a_run(home, RunConfig(seed=1))
    client = MlflowClient(store_uri(home))
    client.delete_experiment(client.get_experiment_by_name("lbllm").experiment_id)
    assert a_run(home, RunConfig(seed=2))
    assert client.get_experiment_by_name("lbllm").lifecycle_stage == "active"


def test_surroundings_and_system_metrics(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(system_metrics, "EVERY_SECONDS", 0.01)
    with LabBook(RunConfig(), home) as book:
        deadline = time.monotonic() + 60
        while not any(e["kind"] == "metrics" and e["content"][0][3] == 2 for e in list(book.entries.events)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    client = MlflowClient(store_uri(home))
    metrics = client.get_run(book.run_id).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes", "system/disk_available_megabytes"} <= set(metrics)
    assert [m.step for m in client.get_metric_history(book.run_id, "system/cpu_utilization_percentage")][:3] == [0, 1, 2]
    kept = json.loads(Path(client.download_artifacts(book.run_id, "environment.json")).read_text())
    assert kept["packages"]["torch"]
    assert kept["python"]
