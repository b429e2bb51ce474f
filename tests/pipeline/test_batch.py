"""Several runs side by side: each one's rows are recorded when it ends, whatever becomes of the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbllm_core import batch
from lbllm_core.batch import Job, main
from lbllm_core.config import RunConfig, config_to_dict
from lbllm_core.report.records import circumstances, read_results

START = Callable[[Job, Path, int | None], "subprocess.Popen[bytes]"]
# what stands in for a run: its own rows file and the common record are its arguments
ROWS = "import json, sys; from pathlib import Path; rows, record, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]; "
WRITE = """
row = {"name": "ppl_x", "value": 2.0, "unit": "1", "model": "m", "experiment": name, "seed": 0, "row": "final"}
rows.write_text(json.dumps({"schema": 1, "records": [row]}))
"""
AT_ONCE = ROWS + WRITE
SLOW = "import time; time.sleep(600)"
FAILS = "print('the disk is on fire'); raise SystemExit(3)"
KILLED = "import os; print('block 3', flush=True); os.kill(os.getpid(), 9)"
WHEN_FIRST_IS_RECORDED = f"""
{ROWS}
import time
until = time.monotonic() + 20
while not record.exists() or '"experiment": "first"' not in record.read_text():
    if time.monotonic() > until:
        raise SystemExit("the first run's rows are not recorded while this one runs")
    time.sleep(0.1)
{WRITE}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def configs(folder: Path, **changes: dict[str, Any]) -> list[str]:
    """A file a run: the tiny model, initialisation alone; `section: {field: value}` changes it."""
    paths = []
    for name, change in changes.items():
        values = config_to_dict(RunConfig(experiment=name))
        for section in ("weight_distill", "act_quant", "end_to_end"):
            values[section]["enabled"] = False
        values["pack"]["benchmark"] = False
        values["scheme"]["level_mode"] = "explicit"
        values["ptq_init"]["sequences"] = 16
        for section, fields in change.items():
            values[section] = values[section] | fields if isinstance(fields, dict) else fields
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(values))
    return [str(path) for path in paths]


def rows(record: Path) -> list[tuple[str, str]]:
    return [(r["experiment"], r["row"]) for r in read_results(record)["records"] if r["name"].startswith("ppl_") and not r["name"].endswith("_stderr")]


def stand_ins(record: Path, scripts: dict[str, str], started: list[Any]) -> START:
    """Instead of `start`: a small process a run. `started` gets (name, GPU, process)."""

    def start(job: Job, home: Path, gpu: int | None) -> subprocess.Popen[bytes]:
        name = job.config.stem
        with job.log.open("wb") as log:
            process = subprocess.Popen([sys.executable, "-c", scripts[name], str(job.rows), str(record), name], stdout=log, stderr=subprocess.STDOUT)
        started.append((name, gpu, process))
        return process

    return start


@pytest.mark.usefixtures("tiny_teacher")
def test_two_runs_at_once_are_both_recorded_beside_one_that_fails(home: Path, models_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real runs; the failing one asks for more tokens than there are. Exit code 0 has the test below."""
    home.mkdir()
    (home / "models").symlink_to(models_home.absolute() / "models")
    record = tmp_path / "results" / "method.json"
    asked = configs(tmp_path, greedy={"dataset": {"source": "embedded", "sequences": 1_000_000}}, fine={}, coarse={"scheme": {"group_size": 64}})
    assert main(["--home", str(home), "--record", str(record), "--jobs", "2", *asked]) == 1
    assert sorted(rows(record)) == [("coarse", "final"), ("coarse", "teacher"), ("fine", "final"), ("fine", "teacher")]
    bits = {r["experiment"]: r["effective_bpw"] for r in read_results(record)["records"] if r["row"] == "final"}
    assert bits["coarse"] < bits["fine"]
    told = capsys.readouterr().out
    assert "greedy: failed: dataset" in told
    assert "128000000 are needed" in told
    assert "coarse: done" in told
    assert "fine: done" in told


def test_rows_are_recorded_while_other_runs_go_on(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run ends well only when it sees the first one's rows in the record."""
    record, started = tmp_path / "record.json", list[Any]()
    monkeypatch.setattr(batch, "start", stand_ins(record, {"second": WHEN_FIRST_IS_RECORDED, "first": AT_ONCE}, started))
    code = main(["--home", str(home), "--record", str(record), "--jobs", "2", *configs(tmp_path, second={}, first={})])
    assert code == 0, capsys.readouterr().out
    assert sorted(rows(record)) == [("first", "final"), ("second", "final")]
    assert read_results(record)["command"] == "python -m lbllm_core.batch second.json first.json"


def test_each_row_keeps_when_and_where_its_run_measured(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.json"
    head = {"command": "python -m lbllm_core.run", "commit": "7" * 40, "date": "2026-01-01T00:00:00+00:00", "device": "a GPU", "versions": {"torch": "2"}}
    dated = AT_ONCE.replace('{"schema": 1', f'{{"schema": 1, **{head}')
    monkeypatch.setattr(batch, "start", stand_ins(record, {"first": dated, "second": AT_ONCE}, []))
    assert main(["--home", str(home), "--record", str(record), *configs(tmp_path, first={}, second={})]) == 0
    content = read_results(record)
    first = next(r for r in content["records"] if r["experiment"] == "first")
    assert circumstances(content, first) == head | {"command": "python -m lbllm_core.batch first.json second.json"}


def test_a_failed_run_is_told_by_its_last_words(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    monkeypatch.setattr(batch, "start", stand_ins(record, {"bad": FAILS, "killed": KILLED, "first": AT_ONCE}, []))
    assert main(["--home", str(home), "--record", str(record), *configs(tmp_path, bad={}, killed={}, first={})]) == 1
    told = capsys.readouterr().out
    assert "bad: failed: the disk is on fire" in told
    assert "killed: failed: killed by signal 9; the last it said: block 3" in told
    assert rows(record) == [("first", "final")], "one at a time: the next one runs all the same"


def test_when_the_time_is_over_what_is_finished_stays(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record, started = tmp_path / "record.json", list[Any]()
    monkeypatch.setattr(batch, "start", stand_ins(record, {"first": AT_ONCE, "slow": SLOW, "never": AT_ONCE}, started))
    asked = ["--home", str(home), "--record", str(record), "--minutes", "0.06", *configs(tmp_path, first={}, slow={}, never={})]
    (home / "logs").mkdir(parents=True)
    stale = {"name": "ppl_x", "value": 9.0, "unit": "1", "model": "m", "experiment": "never", "seed": 0, "row": "final"}
    (home / "logs" / "never.rows.json").write_text(json.dumps({"schema": 1, "records": [stale]}))
    assert main(asked) == 1
    assert [name for name, _, _ in started] == ["first", "slow"]
    assert all(process.poll() is not None for _, _, process in started), "nothing is left running"
    assert rows(record) == [("first", "final")], "rows that an earlier batch left behind are not this one's"
    told = capsys.readouterr().out
    assert "slow: stopped: the time was over" in told
    assert "never: stopped: the time was over" in told


def test_runs_are_spread_over_the_gpus(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, started = tmp_path / "record.json", list[Any]()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = ("a", "b", "c", "d")
    monkeypatch.setattr(batch, "start", stand_ins(record, dict.fromkeys(names, AT_ONCE), started))
    assert main(["--home", str(home), "--record", str(record), "--jobs", "4", *configs(tmp_path, **{name: {} for name in names})]) == 0
    assert [gpu for _, gpu, _ in started] == [0, 1, 0, 1]
    assert len(rows(record)) == 4


def test_a_file_that_is_no_configuration_starts_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = list[Any]()
    monkeypatch.setattr(batch, "start", stand_ins(tmp_path / "record.json", {}, started))
    (tmp_path / "broken.json").write_text("{")
    assert main(["--home", str(home), "--record", str(tmp_path / "record.json"), *configs(tmp_path, fine={}), str(tmp_path / "broken.json")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'broken.json'} cannot be read as JSON" in told
    assert "fine.json" not in told
    assert not started


def test_two_runs_of_one_name_are_refused_before_anything_starts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They would share a log and rows, and the one that failed could be told as done."""
    started, record = list[Any](), tmp_path / "record.json"
    monkeypatch.setattr(batch, "start", stand_ins(record, {"run": AT_ONCE}, started))
    asked = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        asked += configs(tmp_path / folder, run={})
    assert main(["--home", str(home), "--record", str(record), *asked]) == 2
    told = capsys.readouterr().err
    assert all(path in told for path in asked)
    assert "rename one" in told
    assert main(["--home", str(home), "--record", str(record), asked[0], str(tmp_path / "a" / ".." / "a" / "run.json")]) == 2
    assert "given twice; leave one out" in capsys.readouterr().err
    assert not started
    assert not record.exists()


def test_a_record_that_cannot_be_written_is_told_as_that(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").write_text("a file where a folder should be")
    record = tmp_path / "results" / "method.json"
    monkeypatch.setattr(batch, "start", stand_ins(record, {"first": AT_ONCE}, []))
    assert main(["--home", str(home), "--record", str(record), *configs(tmp_path, first={})]) == 1
    told = capsys.readouterr().err
    assert str(tmp_path / "results") in told
    assert "configuration" not in told


def test_a_folder_that_cannot_be_made_is_told_as_that(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started = list[Any]()
    monkeypatch.setattr(batch, "start", stand_ins(tmp_path / "record.json", {}, started))
    home.mkdir()
    (home / "logs").write_text("a file where a folder should be")
    assert main(["--home", str(home), "--record", str(tmp_path / "record.json"), *configs(tmp_path, first={})]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"{home / 'logs'}: File exists")
    assert "configuration" not in told
    assert not started
