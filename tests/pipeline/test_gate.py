"""The teacher's gate: a figure that is off stops a run, and a gate that checked nothing says so."""

from __future__ import annotations

import logging

import pytest

from flows.compose import compose
from lbllm_core.engine.artifacts import Handle
from lbllm_core.errors import GateError
from lbllm_core.pipeline import check_gate

TEACHER = Handle("evaluate_teacher", "a" * 64, "b" * 64, {"ppl_embedded_16k": 5.0})


def gated(*words: str) -> None:
    check_gate(compose(["model=tiny", *words]), TEACHER)


def test_a_figure_that_is_off_stops_the_run() -> None:
    with pytest.raises(GateError, match="ppl_embedded_16k is 5, expected 6"):
        gated("model.expected={ppl_embedded_16k: 6.0, ppl_ptb_s2048: 7.0}")


def test_a_gate_that_checks_nothing_names_what_would(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        gated("model.expected={ppl_ptb_s2048: 7.0, acc_norm_piqa_n200: 0.5}")
    (told,) = [record.getMessage() for record in caplog.records]
    assert "is not checked" in told
    assert "evaluation.protocols=[ppl_ptb_s2048] or evaluation.tasks=[piqa] would" in told


@pytest.mark.parametrize("words", [("model.expected={}",), ("model.expected={ppl_embedded_16k: 5.0, ppl_ptb_s2048: 7.0}",), ("model.expected={ppl_ptb_s2048: 7.0}", "model.blocks=1")])
def test_nothing_is_said_where_a_figure_was_checked_or_there_is_no_gate(words: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        gated(*words)
    assert not caplog.records
