"""Expected, measured, delta: in the printed report, in the result table, in the lab book, and in no key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lbllm_core import run as core
from lbllm_core.config import EvaluationConfig
from lbllm_core.report.expected import (
    comparisons,
    expectation_cells,
    expectation_figures,
    expectations_markdown,
    expectations_plain,
)

ROWS = [{"row": "teacher", "ppl_ptb_s2048": 20.0, "minutes": 1.0}, {"row": "final", "ppl_ptb_s2048": 36.0, "acc_piqa": 0.5, "minutes": 2.0}]
WANTED = EvaluationConfig(
    expected={"final/ppl_ptb_s2048": 40.0, "final/acc_piqa": 0.501, "final/ppl_c4_s2048": 10.0}, tolerance=0.02, source="somebody, 2020"
)


def test_cells() -> None:
    assert expectation_cells(ROWS, WANTED) == [
        ["", "expected", "measured", "delta", "within 2%"],
        ["final: ppl_ptb_s2048", "40.00", "36.00", "-10.0%", "no"],
        ["final: acc_piqa", "0.501", "0.500", "-0.2%", "yes"],
        ["final: ppl_c4_s2048", "10.00", "not measured", "", ""],
    ]
    assert "somebody, 2020" in expectations_plain(ROWS, WANTED)
    assert "| final: acc_piqa | 0.501 | 0.500 | -0.2% | yes |" in expectations_markdown(ROWS, WANTED)
    assert expectations_plain(ROWS, EvaluationConfig()) == ""


def test_figures_for_the_lab_book() -> None:
    found = expectation_figures(ROWS, WANTED)
    assert found["expected/final/ppl_ptb_s2048"] == 40.0
    assert found["delta/final/ppl_ptb_s2048"] == pytest.approx(-0.1)
    assert found["expected/final/ppl_c4_s2048"] == 10.0
    assert "delta/final/ppl_c4_s2048" not in found
    assert [c.get("within") for c in comparisons(ROWS, WANTED)] == [False, True, None]


def test_on_tiny_through_the_command(tmp_path: Path, models_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of a run shows it, and adding an expectation to a finished run computes nothing anew."""
    (models_home / "models").mkdir(parents=True, exist_ok=True)
    (tmp_path / "models").symlink_to(models_home / "models")
    small = ["dataset.sequences=8", "ptq_init.sequences=8", "weight_distill.enabled=false", "weight_distill.sequences=8", "act_quant.enabled=false", "act_quant.sequences=8", "end_to_end.enabled=false", "pack.benchmark=false", "scheme.codebook_size=16", "--home", str(tmp_path)]
    assert core.main(small) == 0
    first = capsys.readouterr()
    assert "expected" not in first.out
    assert core.main([*small, "evaluation.expected={final/ppl_synthetic: 2.5, teacher/ppl_synthetic: 1.91}", "evaluation.source=this test", "evaluation.tolerance=0.03"]) == 0
    second = capsys.readouterr()
    assert "not cached" not in second.err
    assert "Expected values: this test" in second.out
    (line,) = [line for line in second.out.splitlines() if line.startswith("teacher: ppl_synthetic")]
    assert line.split()[2] == "1.91"
    assert line.split()[-1] == "yes"
    (line,) = [line for line in second.out.splitlines() if line.startswith("final: ppl_synthetic")]
    measured = float(line.split()[3])
    assert f"{(measured - 2.5) / 2.5:+.0%}"[:2] == line.split()[4][:2]


def test_the_result_table_and_the_lab_book_of_a_flow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`publish` writes the comparison into result.md, into result.json and as figures."""
    from lbllm_core.config import RunConfig
    from lbllm_core.engine.artifacts import Handle
    from lbllm_core.pipeline import Finished
    from tasks import result
    from tasks.step import Run
    from tasks.tracking import LabBook

    config = dataclasses.replace(RunConfig(), evaluation=EvaluationConfig(expected={"teacher/ppl_synthetic": 2.0}, source="here"))
    book = LabBook(config, tmp_path)
    noted: list[tuple[str, object]] = []
    monkeypatch.setattr(book, "_note", lambda kind, content: noted.append((kind, content)))
    monkeypatch.setattr(result, "create_markdown_artifact", lambda **_: None)
    monkeypatch.setattr(result, "_plots", lambda *_: [])
    done = Finished("teacher", Handle("evaluate_teacher", "k" * 64, "d", {"ppl_synthetic": 1.9}), 0.1)
    found = result.publish(Run(config, tmp_path, book, finished=[done]), book)
    assert found["expected"] == [{"row": "teacher", "metric": "ppl_synthetic", "expected": 2.0, "measured": 1.9, "delta": pytest.approx(-0.05), "within": True}]
    (text,) = [content for kind, content in noted if kind == "text" and content["name"] == "result.md"]
    assert "| teacher: ppl_synthetic | 2.00 | 1.90 | -5.0% | yes |" in text["content"]
    figures = {name: value for kind, content in noted if kind == "metrics" for name, value, *_ in content}
    assert figures["delta/teacher/ppl_synthetic"] == pytest.approx(-0.05)
