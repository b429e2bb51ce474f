"""The whole flow through a real Prefect server and MLflow store, on `tiny`: as typed, cached, changed, killed, refused.

The tests build on one another's cache and run in the order of the file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from flow_stack import ROOT, SMALL, Stack
from mlflow import MlflowClient
from mlflow.entities import Run

from tasks.tracking import store_uri


def lab_book(stack: Stack) -> list[Run]:
    client = MlflowClient(store_uri(stack.home))
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["attributes.start_time DESC"]))


def api(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{stack.prefect}/api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def test_deployment_as_typed(stack: Stack) -> None:
    overrides = json.dumps([o for o in SMALL if o != "model=tiny"])
    done = stack.call("-m", "prefect", "deployment", "run", "lbllm/full-pipeline", "-p", "model=tiny", "-p", f"overrides={overrides}", "--watch")
    log = (stack.home / "logs" / "deployment.log").read_text()
    assert done.returncode == 0, done.stdout + log
    (row,) = lab_book(stack)
    assert row.info.status == "FINISHED"
    assert row.data.params["model.name"] == "tiny"
    assert any(name.startswith("eval/ppl_synthetic") for name in row.data.metrics)
    files = {f.path for f in MlflowClient(store_uri(stack.home)).list_artifacts(row.info.run_id)}
    assert {"config.json", "environment.json", "lineage.json", "result.md", "samples.md", "manifests", "plots", "steps"} <= files
    assert {"stage2/training_loss", "stage2/error_before", "stage2/error_after", "stage2/tokens_per_s", "stage4/loss"} <= set(row.data.metrics)
    (flow_run,) = api(stack, "flow_runs/filter", {})
    assert flow_run["state"]["name"] == "Completed"
    tables = api(stack, "artifacts/latest/filter", {"artifacts": {"key": {"any_": ["result"]}}})
    assert "stage 1 only" in tables[0]["data"]
    page = f"/runs/{row.info.run_id}"
    assert page in tables[0]["data"], "the table leads to MLflow"
    (link,) = api(stack, "artifacts/latest/filter", {"artifacts": {"key": {"any_": ["mlflow"]}}})
    assert page in link["data"]
    assert row.data.tags["lbllm.prefect"].endswith(flow_run["id"]), "and MLflow leads back"
    bars = api(stack, "artifacts/filter", {"artifacts": {"type": {"any_": ["progress"]}}})
    told = [bar["description"] for bar in bars]
    assert any("weight_distill" in words and "block 2 of 2" in words and "tokens/s" in words for words in told), told


def test_deployment_that_fails_says_so(stack: Stack) -> None:
    done = stack.call("-m", "prefect", "deployment", "run", "lbllm/full-pipeline", "-p", "model=tinny", "--watch")
    assert done.returncode != 0
    log = (stack.home / "logs" / "deployment.log").read_text()
    assert "did you mean tiny?" in log
    assert "Traceback" not in log


def test_second_run_is_all_from_the_cache(stack: Stack) -> None:
    done, result = stack.run()
    assert done.returncode == 0, done.stderr
    assert [s["step"] for s in result["steps"] if not s["reused"]] == []
    (stack.home / "undisturbed.json").write_text(json.dumps(result))
    assert {row["row"] for row in result["rows"]} == {"teacher", "stage1", "final"}
    final, stage1, teacher = ({r["row"]: r for r in result["rows"]}[name] for name in ("final", "stage1", "teacher"))
    name = next(n for n in final if n.startswith("ppl_synthetic"))
    assert teacher[name] < final[name] < stage1[name]


def test_damaged_artifact_is_rebuilt_behind_prefects_cache(stack: Stack) -> None:
    before = json.loads((stack.home / "undisturbed.json").read_text())
    key = next(s["key"] for s in before["steps"] if s["step"] == "act_quant")
    block = stack.home / "artifacts" / "act_quant" / key[:16] / "block_001.safetensors"
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(data)
    done, after = stack.run()
    assert done.returncode == 0, done.stderr
    assert "block_001.safetensors was altered" in done.stdout + done.stderr
    assert [s["step"] for s in after["steps"] if not s["reused"]] == ["act_quant"]
    assert [s["digest"] for s in after["steps"]] == [s["digest"] for s in before["steps"]]


def test_changed_field_reruns_only_what_reads_it_and_says_why(stack: Stack) -> None:
    done, result = stack.run("end_to_end.lr_levels=2e-4")
    assert done.returncode == 0, done.stderr
    built = [s["step"] for s in result["steps"] if not s["reused"]]
    assert built == ["end_to_end", "pack_and_benchmark", "evaluate_model"]
    assert re.search(r"end_to_end\.lr_levels was \S+ is 0\.0002", done.stdout + done.stderr)


def test_killed_run_goes_on_in_its_row(stack: Stack) -> None:
    rows = len(lab_book(stack))
    command = [sys.executable, "-m", "flows.once", str(stack.home / "answer.json"), *SMALL, "seed=7"]
    process = subprocess.Popen(command, cwd=ROOT, env=stack.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stage = stack.home / "artifacts" / "weight_distill"
    known = set(stage.iterdir())
    deadline = time.monotonic() + 200
    while not [p for p in set(stage.iterdir()) - known if (p / "block_000.json").exists()]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = lab_book(stack)[0]
    while killed.info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.2)
        killed = lab_book(stack)[0]
    assert killed.info.status == "KILLED", "nobody but its companion could say so"
    assert "signal 9" in killed.data.tags["lbllm.error"]
    assert len(lab_book(stack)) == rows + 1

    done, result = stack.run("seed=7")
    assert done.returncode == 0, done.stderr
    assert result["mlflow_run"] == killed.info.run_id
    assert len(lab_book(stack)) == rows + 1
    assert MlflowClient(store_uri(stack.home)).get_run(killed.info.run_id).info.status == "FINISHED"
    reused = {s["step"]: s["reused"] for s in result["steps"] if s["row"] == "final"}
    assert reused["ptq_init"]
    assert not reused["weight_distill"]


def test_gate_stops_a_run_before_it_costs_anything(stack: Stack) -> None:
    done, result = stack.run("model.expected={ppl_synthetic: 1.0}", "seed=8")
    assert done.returncode == 1
    assert not result
    assert "expected 1" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert lab_book(stack)[0].info.status == "FAILED"


def test_wrong_word_starts_nothing(stack: Stack) -> None:
    rows = len(lab_book(stack))
    done, _ = stack.run("scheme.weight_bit=2")
    assert done.returncode == 2
    assert "did you mean scheme.weight_bits?" in done.stderr
    assert len(lab_book(stack)) == rows


def test_pages_answer(stack: Stack) -> None:
    for url in (f"http://127.0.0.1:{stack.mlflow}/", f"http://127.0.0.1:{stack.prefect}/api/health"):
        with urllib.request.urlopen(url, timeout=30) as reply:
            assert reply.status == 200


def test_same_keys_with_and_without_prefect(stack: Stack, tmp_path: Path) -> None:
    """What the flow built, the plain run reuses."""
    result = json.loads((stack.home / "undisturbed.json").read_text())
    book = MlflowClient(store_uri(stack.home))
    config_file = book.download_artifacts(result["mlflow_run"], "config.json", str(tmp_path))
    done = stack.call("-m", "lbllm_core.run", "--config", config_file, "--home", str(stack.home))
    assert done.returncode == 0, done.stderr
    assert "not cached" not in done.stderr
    assert done.stderr.count("reused") >= len(result["steps"]) - 1
