"""The script that measures a GPU in one go: a part that hangs costs its own time and nothing else; what parts measured is merged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from kernel_scripts import load

HANGS = "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(child.pid, flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def script():
    return load("measure_gpu")


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_part_that_hangs_is_killed_with_its_children_and_the_next_one_runs(script, tmp_path):
    session = script.Session(tmp_path, 1, dict(os.environ))
    start = time.monotonic()
    session.run(script.Part("hangs", ("-c", HANGS), 3, ""))
    session.run(script.Part("well", ("-c", "print('done')"), 20, ""))
    session.run(script.Part("after", ("-c", "print('never')"), 20, "hangs"))
    assert time.monotonic() - start < 40
    log = (tmp_path / "session.log").read_text()
    child = int(next(line for line in log.splitlines() if "] hangs: " in line).split(": ")[1])
    assert not alive(child)
    assert "well: done" in log
    assert "after: never" not in log
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert parts["hangs"]["how"].startswith("killed after 3")
    assert parts["hangs"]["exit"] != 0
    assert parts["well"]["exit"] == 0
    assert parts["after"]["exit"] is None


def test_no_part_begins_when_the_time_is_over(script, tmp_path):
    session = script.Session(tmp_path, 0.1, dict(os.environ))
    session.run(script.Part("late", ("-c", "print('late')"), 20, ""))
    assert "time is over" in session.results["late"]["how"]


def test_parts_become_the_files_of_results(script, tmp_path):
    rate, base = {"name": "copy_gb_s", "value": 2400.0, "unit": "GB/s"}, {"name": "kernel_us", "op": "cublas_fp16", "value": 9.0, "unit": "us", "n": 1, "k": 1, "m": 1}
    peer, model = {**base, "op": "other", "speedup": 2.0}, {"name": "decode_tok_s", "value": 1.0, "unit": "tok/s", "engine": "packed"}
    for section, records in (("decode", [rate, base]), ("peers", [rate, base, peer]), ("model", [model])):
        (tmp_path / f"part_{section}.json").write_text(json.dumps({"schema": 1, "command": section, "commit": "c", "records": records}))
    script.merge(tmp_path, ["--minutes", "9"], "exact")
    kernels, models, peers = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("kernels", "models", "peers"))
    assert kernels["records"] == [rate, base]
    assert peers["records"] == [rate, base, peer]
    assert models["records"] == [model]
    assert kernels["command"] == "python kernels/measure_gpu.py --minutes 9"
    assert kernels["correctness"] == "exact"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "models.json", "peers.json"]


def test_shapes_go_to_the_parts_that_measure_shapes(script):
    parts = {part.name: part for part in script.PARTS}
    assert script.of_shapes(parts["tune"], "4096x4096").command[-2:] == ("--shapes", "4096x4096")
    assert script.of_shapes(parts["tune"], "") == parts["tune"]
    assert script.of_shapes(parts["paths"], "4096x4096") == parts["paths"]
    assert set(script.SHAPED) | set(script.EXTRA) <= set(parts)


def test_a_part_is_told_what_time_is_left(script, tmp_path):
    session = script.Session(tmp_path, 1, dict(os.environ))
    session.run(script.Part("told", ("-c", "import sys; print('told', *sys.argv[1:])", "{minutes}", "{out}/x"), 400, ""))
    told = next(line for line in (tmp_path / "session.log").read_text().splitlines() if "] told: told" in line).split()
    assert 0.3 < float(told[-2]) < 0.6
    assert told[-1] == f"{tmp_path}/x"
