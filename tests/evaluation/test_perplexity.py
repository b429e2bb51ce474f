"""Perplexity against a float64 oracle, and what happens when a model is broken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lbllm_core.config import RunConfig
from lbllm_core.engine.progress import Progress
from lbllm_core.errors import NumericalError
from lbllm_core.evaluation import perplexity as module
from lbllm_core.evaluation.perplexity import metric_name, perplexity, window_losses, windows


def oracle(logits: torch.Tensor, ids: torch.Tensor) -> float:
    log_p = torch.log_softmax(logits.double(), -1)
    picked = [log_p[w, t - 1, ids[w, t]].item() for w in range(ids.shape[0]) for t in range(1, ids.shape[1])]
    return math.exp(-sum(picked) / len(picked))


@given(st.integers(1, 5), st.integers(2, 12), st.integers(2, 30), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_against_the_definition(count, length, vocabulary, batch_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, length), generator=generator)
    table = torch.randn(vocabulary, vocabulary, generator=generator) * 3
    result = perplexity(lambda x: table[x], ids, batch_tokens)
    assert result.tokens == count * (length - 1)
    assert result.ppl == pytest.approx(oracle(table[ids], ids), rel=1e-5)
    assert result.nll == pytest.approx(math.log(result.ppl))


def test_chunks_of_rows_do_not_change_the_sum(monkeypatch):
    ids = torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2, 70, 50, generator=torch.Generator().manual_seed(1))
    whole = window_losses(logits, ids)
    monkeypatch.setattr(module, "ROWS", 7)
    assert torch.allclose(window_losses(logits, ids), whole, rtol=1e-7)


def test_bf16_logits_are_normalised_in_fp32():
    ids = torch.randint(5000, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1, 40, 5000, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert window_losses(logits, ids).item() == pytest.approx(window_losses(logits.double().float(), ids).item(), rel=1e-6)


def test_uniform_model_scores_the_vocabulary():
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))
    result = perplexity(lambda x: torch.zeros(*x.shape, 64), ids)
    assert result.ppl == pytest.approx(64, rel=1e-6)
    assert result.stderr == pytest.approx(0, abs=1e-4)


def test_nan_names_the_window():
    ids = torch.zeros(4, 8, dtype=torch.long)

    def forward(x: torch.Tensor) -> torch.Tensor:
        forward.calls += 1
        return torch.full((*x.shape, 4), math.nan if forward.calls == 3 else 0.0)

    forward.calls = 0
    with pytest.raises(NumericalError, match="window 2"):
        perplexity(forward, ids, batch_tokens=8)


def test_progress_reaches_the_end():
    heard: list[Progress] = []
    perplexity(lambda x: torch.zeros(*x.shape, 4), torch.zeros(5, 8, dtype=torch.long), 16, heard.append)
    assert [p.done for p in heard] == [0, 2, 4, 5]
    assert [p.begins for p in heard] == [True, False, False, False]
    assert heard[-1].total == 5


def test_no_call_sees_more_tokens_than_allowed():
    seen = []
    perplexity(lambda x: seen.append(x.numel()) or torch.zeros(*x.shape, 4), torch.zeros(7, 10, dtype=torch.long), 35)
    assert max(seen) <= 35


def test_windows_follow_the_model_context(tiny_teacher):
    assert windows("ppl_synthetic", RunConfig(), tiny_teacher.tokenizer).shape == (64, 128)
    assert metric_name("ppl_wikitext2_s2048", RunConfig(), tiny_teacher.tokenizer) == "ppl_wikitext2_s128"
