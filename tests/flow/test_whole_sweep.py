"""A sweep through the real stack, on `tiny`: what is missing runs, what cannot run is told, a rerun runs nothing, and the comparison.

Behind `test_whole_flow.py` in order, whose run of seed 0 lies in the cache then; alone it takes a little longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from flow_stack import ROOT, SMALL, Stack
from mlflow import MlflowClient

from flows import compare, lab_book
from flows.compose import compose
from flows.prefect_runs import mark_crashed
from flows.sweep_record import CellRecord, SweepRecord, read_record, sweep_lock, write_record
from lbllm_core.engine.artifacts import Handle
from lbllm_core.pipeline import Finished
from lbllm_core.report.records import read_results
from lbllm_core.report.runs import differences
from tasks.tracking import LabBook, close_rows, row_digest, store_uri

SHARED = [o for o in SMALL if o != "model=tiny"]
ASKED = ["--models", "tiny,llama2", "--experiments", "tiny", "--seeds", "0,3", "--sweep", "of-tests"]


def sweep(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    return stack.call("-m", "flows.sweep", *words)


def states(stack: Stack) -> dict[str, str]:
    record = read_record(stack.home, "of-tests")
    assert record is not None
    return {cell.title: cell.state for cell in record.cells}


def api(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{stack.prefect}/api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def flow_runs(stack: Stack, tag: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api(stack, "flow_runs/filter", {"flow_runs": {"tags": {"all_": [tag]}}})
    return found


def test_a_cell_that_cannot_run_does_not_stop_the_others(stack: Stack) -> None:
    done = sweep(stack, *ASKED, "--overrides", *SHARED)
    assert done.returncode == 1, done.stdout + done.stderr
    assert states(stack) == {"tiny tiny seed 0": "finished", "tiny tiny seed 3": "finished", "llama2 tiny seed 0": "failed", "llama2 tiny seed 3": "failed"}
    assert done.stdout.count("cannot run") == 2
    assert done.stdout.count("model.source=folder") == 1, "a reason is told once, with its remedy"
    assert "/#/compare-runs?runs=" in done.stdout
    assert "searchFilter=tags." in done.stdout
    key = done.stdout.partition("viewStateShareKey=")[2].split()[0]
    (experiment,) = (e for e in MlflowClient(store_uri(stack.home)).search_experiments() if e.name == "of-tests")
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    columns = view["selectedColumns"]
    assert set(columns) == set(view["columnOrder"][1:]) == set(view["columnWidths"]) - {"attributes.`Run Name`"}, "every column has its place and width"
    assert "tiny, llama2; seeds 0, 3; 4 cells" in experiment.tags["mlflow.note.content"]
    assert {"params.`seed`", "metrics.`eval/ppl_synthetic`", "metrics.`size/effective_bpw`"} <= set(columns)
    assert "Traceback" not in done.stdout + done.stderr
    rows = lab_book.read_rows(stack.home, "of-tests")
    assert [(row.state, row.text("seed")) for row in rows] == [("finished", "0"), ("finished", "3")]
    runs = flow_runs(stack, "of-tests")
    assert {run["state"]["type"] for run in runs} == {"COMPLETED"}
    assert len(runs) == 2


def test_the_same_words_run_nothing_again(stack: Stack, tmp_path: Path) -> None:
    before = {row.run_id for row in lab_book.read_rows(stack.home, "of-tests")}
    results = tmp_path / "rows.json"
    done = sweep(stack, "retry", "--sweep", "of-tests", "--record", str(results))
    assert done.returncode == 1
    assert "4 cells, 0 to run" in done.stdout
    plans = [line.split() for line in done.stdout.splitlines() if line.startswith("tiny tiny seed ") and line.endswith("done")]
    assert [plan[6:8] for plan in plans] == [["0", "0"], ["0", "0"]], "nothing shared, nothing missing"
    assert list(states(stack).values()) == ["reused", "reused", "failed", "failed"]
    assert {row.run_id for row in lab_book.read_rows(stack.home, "of-tests")} == before
    assert len(flow_runs(stack, "of-tests")) == 2
    content = read_results(results)
    assert content["command"].startswith("make sweep MODELS=tiny,llama2 EXPERIMENTS=tiny SEEDS=0,3 ARGS=")
    final = [r for r in content["records"] if r["row"] == "final" and r["name"] == "ppl_synthetic"]
    (figure,) = {row.text("seed"): row.value("ppl_synthetic") for row in lab_book.read_rows(stack.home, "of-tests") if row.text("seed") == "0"}.values()
    assert [(r["seed"], r["measured"]["date"] <= content["date"]) for r in final] == [(0, True), (3, True)]
    assert final[0]["value"] == figure


def test_rows_are_not_promised_to_what_is_no_results_file(stack: Stack, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "rows", "ends in .json"), (tmp_path, "ends in .json"), (stack.home / "sweeps" / "of-tests.json", "has schema None")):
        done = sweep(stack, "retry", "--sweep", "of-tests", "--record", str(path))
        assert done.returncode != 0
        assert words in done.stderr
        assert "cells" not in done.stdout, "nothing was started"


def test_deployment_of_a_sweep(stack: Stack) -> None:
    """The sweep above from Prefect: its finished cells are not run again, and `--watch` tells of those that failed."""
    given = {"models": ["tiny", "llama2"], "experiments": ["tiny"], "seeds": [0, 3], "overrides": SHARED, "sweep": "of-tests"}
    words = [word for key, value in given.items() for word in ("-p", f"{key}={json.dumps(value)}")]
    done = stack.call("-m", "prefect", "deployment", "run", "lbllm-sweep/sweep", *words, "--watch")
    log = (stack.home / "logs" / "deployment.log").read_text()
    assert done.returncode != 0, done.stdout + log
    assert list(states(stack).values()) == ["reused", "reused", "failed", "failed"], done.stdout + log
    assert "2 of 4 cells failed" in log
    assert "model.source=folder" in log
    assert "/#/compare-runs?runs=" in log
    assert "Traceback" not in log


def test_one_process_a_sweep_and_wrong_words(stack: Stack) -> None:
    with sweep_lock(stack.home, "of-tests").acquire(timeout=0):
        done = sweep(stack, "--models", "tiny", "--sweep", "of-tests")
        assert done.returncode == 1
        assert "another process works on the sweep of-tests" in done.stderr
    done = sweep(stack, "--models", "tinny", "--experiments", "tiny,smok", "--seeds", "one")
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("did you mean tiny?", "did you mean smoke?", "'one'"))
    assert "Traceback" not in done.stderr


def half_finished(home: Path) -> None:
    """A sweep of which one run is finished, one failed, one was killed, and one has not begun."""
    handle = Handle("evaluate_model", "a" * 64, "b" * 64, {"ppl_x": 30.0, "ppl_x_stderr": 1.0})
    configs = [compose(["model=tiny", f"seed={seed}", "tracking.sweep=half", f"end_to_end.steps={10 + seed}"]) for seed in range(4)]
    with LabBook(configs[0], home) as book:
        book.finished(Finished("teacher", Handle("evaluate_teacher", "c" * 64, "d" * 64, {"ppl_x": 20.0}), 0.5))
        book.finished(Finished("final", Handle("pack_and_benchmark", "e" * 64, "f" * 64, {"size/effective_bpw": 2.5}), 0.5))
        book.finished(Finished("final", handle, 0.5))
    try:
        with LabBook(configs[1], home):
            raise ValueError("not finite; lower the learning rate")
    except ValueError:
        pass
    killed = LabBook(configs[2], home)
    killed.__enter__()
    assert killed._guard is not None
    killed._guard.end()  # the companion that would end the row is gone too
    killed._row.release()  # as the kernel does when the process dies
    cells = [CellRecord(f"tiny tiny seed {c.seed}", row_digest(c), "tiny", "tiny", "w1p1a4", c.seed) for c in configs]
    write_record(home, SweepRecord("half", {"models": ["tiny"]}, tuple(cells)))


def test_comparison_of_a_half_finished_sweep(stack: Stack) -> None:
    half_finished(stack.home)
    done = stack.call("-m", "flows.compare", "half")
    assert done.returncode == 0, done.stderr
    text = (stack.home / "compare" / "half.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ") and "w1p1a4" in line}
    assert len(lines) == 4
    assert sum("finished" in line and "30.00 ± 1.00 (x1.5)" in line for line in lines.values()) == 1
    assert sum("| failed |" in line for line in lines.values()) == 1
    assert sum("| stopped |" in line for line in lines.values()) == 1, "MLflow calls it running, its process is gone"
    assert "| planned |" in lines["tiny tiny seed 3"], "a cell without a row comes from the record"
    assert "not finite; lower the learning rate" in text
    html = (stack.home / "compare" / "half.html").read_text()
    assert "4 runs" in html
    assert "has kept no curves" in html, "said, not invented"
    assert "/#/experiments/" in text
    assert {"half.html", "half.md", "half.png", "half-ppl_x.png"} <= {p.name for p in (stack.home / "compare").iterdir()}
    differing = differences(lab_book.read_rows(stack.home, "half"))
    assert differing[0] == ["run", "end_to_end.steps"]


def test_what_a_killed_cell_leaves_is_closed(stack: Stack) -> None:
    """In MLflow the row of the killed run above; in Prefect a run whose process does not exist, and no other sweep's."""
    assert close_rows(stack.home, "half", "killed (signal 9)") == 1
    assert close_rows(stack.home, "half", "again") == 0
    (row,) = (row for row in lab_book.read_rows(stack.home, "half") if row.error == "killed (signal 9)")
    assert (row.state, row.text("seed")) == ("stopped", "2")
    flow = api(stack, "flows/", {"name": "lbllm"})["id"]
    for tag in ("half", "other"):
        api(stack, "flow_runs/", {"flow_id": flow, "tags": [tag], "state": {"type": "RUNNING", "name": "Running"}})
    address = f"http://127.0.0.1:{stack.prefect}/api"
    assert mark_crashed(address, "half", "killed (signal 9)") == 1
    assert mark_crashed(address, "half", "again") == 0
    (run,) = flow_runs(stack, "half")
    assert run["state"]["type"] == "CRASHED"
    assert "signal 9" in run["state"]["message"]
    assert flow_runs(stack, "other")[0]["state"]["type"] == "RUNNING"
    assert mark_crashed("http://127.0.0.1:1/api", "half", "a server that is gone") == 0
    mark_crashed(address, "other", "end of the test")


def test_comparison_with_nothing_to_compare(tmp_path: Path, stack: Stack) -> None:
    (tmp_path / "home").mkdir()
    shown, files = compare.compare(tmp_path / "home")
    assert "no runs" in shown
    assert not files
    assert not list((tmp_path / "home").iterdir()), "looking makes nothing"
    shown, files = compare.compare(stack.home, "no-such-sweep")
    assert "of-tests" in shown
    assert not files
    done = subprocess.run([sys.executable, "-m", "flows.compare", "../x"], cwd=ROOT, env=os.environ | {"LBLLM_HOME": str(tmp_path / "home")}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
