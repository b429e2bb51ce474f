"""Results files that are merged: each record keeps how it was measured, whatever the head says later."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lbllm_core.report.method import same_row
from lbllm_core.report.records import circumstances, read_results, write_results
from lbllm_core.report.score_records import record_figures

A, B = ({"name": "ppl_x", "value": 2.0, "unit": "1", "model": name} for name in "ab")
OLD = {"schema": 1, "command": "make old", "commit": "0" * 40, "date": "2026-01-01T10:00:00+00:00", "device": "older GPU", "versions": {"torch": "1"}}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "method.json"
    path.write_text(json.dumps({**OLD, "records": [A, B]}))
    return path


def told(path: Path, **wanted: Any) -> dict[str, Any]:
    """How the one record with this context was measured."""
    content = read_results(path)
    (record,) = [r for r in content["records"] if all(r.get(key) == value for key, value in wanted.items())]
    return circumstances(content, record)


def write(path: Path, record: dict[str, Any], device: str, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_COMMIT", commit)
    write_results(path, "make new", [record], device=device, keep=lambda r: not same_row(r, record), measured_with={"torch": "2"})


def test_what_stays_at_a_merge_keeps_how_it_was_measured(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {key: value for key, value in OLD.items() if key != "schema"}
    write(old, {**A, "value": 3.0}, "newer GPU", "1" * 40, monkeypatch)
    assert told(old, model="b") == first
    again = told(old, model="a")
    assert (again["device"], again["commit"], again["command"], again["versions"]["torch"]) == ("newer GPU", "1" * 40, "make new", "2")
    write(old, {**A, "model": "c"}, "newest GPU", "2" * 40, monkeypatch)
    assert told(old, model="b") == first, "a second merge changes nothing"
    assert told(old, model="a") == again
    assert [r["model"] for r in read_results(old)["records"]] == ["b", "a", "c"]


def test_a_record_says_only_what_differs_from_the_head(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(old, {**A, "measured": {"device": "older GPU"}}, "newer GPU", "0" * 40, monkeypatch)
    kept, new = read_results(old)["records"]
    assert set(kept["measured"]) == {"command", "date", "device", "versions"}
    assert new["measured"] == {"device": "older GPU"}
    write(old, B, "newer GPU", "0" * 40, monkeypatch)
    assert "measured" not in read_results(old)["records"][-1]


def test_how_a_record_was_measured_does_not_make_it_another_row() -> None:
    assert same_row({**A, "value": 3.0}, {**A, "measured": {"device": "another"}})
    assert not same_row(A, B)


def test_the_commit_that_older_records_name_is_theirs(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old.write_text(json.dumps({**OLD, "records": [{**A, "commit": "9" * 40}]}))
    write(old, B, "newer GPU", "1" * 40, monkeypatch)
    assert told(old, model="a")["commit"] == "9" * 40


def test_accuracies_are_of_the_machine_that_scored_each(old: Path) -> None:
    scored = []
    for seed, device in enumerate(("first GPU", "second GPU")):
        context = {"model": "a", "experiment": "e", "seed": seed, "row": "final"}
        scored.append((SimpleNamespace(facts={"context": context, "device": device, "versions": {"torch": device}}), {"acc_piqa": 0.5}))
    record_figures(old, scored)  # type: ignore[arg-type]
    assert told(old, name="acc_piqa", seed=0)["device"] == "first GPU"
    assert told(old, name="acc_piqa", seed=0)["versions"]["torch"] == "first GPU"
    assert told(old, name="acc_piqa", seed=1)["device"] == "second GPU"
    assert told(old, model="b")["command"] == "make old"
    assert read_results(old)["command"] == "python -m lbllm_core.evaluation.offline_tasks aggregate"
    record_figures(old, scored)  # type: ignore[arg-type]
    assert len(read_results(old)["records"]) == 4, "the same rows replace themselves"


def test_two_that_write_at_the_same_moment_lose_nothing(old: Path) -> None:
    def add(model: str) -> None:
        write_results(old, "make new", [{**A, "model": model}], keep=lambda record: record["model"] != model)

    names = [f"m{i}" for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, names))
    assert sorted(r["model"] for r in read_results(old)["records"]) == sorted(["a", "b", *names])
