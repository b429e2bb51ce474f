"""The tables of a sweep: which figure stands for a cell, results that are missing or damaged, the order of the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.compare import in_order
from flows.sweep_record import CellRecord, SweepRecord
from flows.sweep_report import final_figures
from lbllm_core.report.runs import RunRow

DIGEST = "0123456789abcdef" * 4


def keep(home: Path, **result: Any) -> None:
    folder = home / "results" / DIGEST[:16]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


ROWS = [
    {"row": "teacher", "ppl_c4_s2048": 36.0, "ppl_wikitext2_s2048": 20.0},
    {"row": "final", "effective_bpw": 2.5, "ppl_c4_s2048": 66.0, "ppl_c4_s2048_stderr": 0.5, "ppl_wikitext2_s2048": 45.0, "ppl_wikitext2_s2048_stderr": 0.4},
]


def test_the_protocol_that_was_asked_first_stands_for_a_cell(tmp_path: Path) -> None:
    keep(tmp_path, rows=ROWS, protocols=["ppl_wikitext2_s2048", "ppl_c4_s2048"])
    assert final_figures(tmp_path, DIGEST) == ["2.500", "ppl_wikitext2_s2048 45.00", "x2.25"]


def test_a_result_of_before_the_protocols_were_kept_shows_one_of_them(tmp_path: Path) -> None:
    keep(tmp_path, rows=ROWS)
    assert final_figures(tmp_path, DIGEST) == ["2.500", "ppl_c4_s2048 66.00", "x1.83"]


def test_a_run_of_the_teacher_alone(tmp_path: Path) -> None:
    keep(tmp_path, rows=ROWS[:1], protocols=["ppl_wikitext2_s2048"])
    assert final_figures(tmp_path, DIGEST) == ["", "ppl_wikitext2_s2048 20.00 (teacher)", ""]


@pytest.mark.parametrize("text", ["", "{", '{"rows": []}'])
def test_what_cannot_be_read_is_empty(text: str, tmp_path: Path) -> None:
    assert final_figures(tmp_path, DIGEST) == ["", "", ""]
    keep(tmp_path)
    (tmp_path / "results" / DIGEST[:16] / "result.json").write_text(text)
    assert final_figures(tmp_path, DIGEST) == ["", "", ""]


def test_a_comparison_has_the_order_of_the_sweep_whoever_was_first() -> None:
    cells = tuple(CellRecord(name, name * 64, "tiny", name, "w1p1a4", 0) for name in "abcd")
    rows = [RunRow("1", "finished", digest="c" * 64), RunRow("2", "failed", digest="a" * 64), RunRow("3", "finished", digest="x" * 64), RunRow("4", "finished", digest="b" * 64)]
    assert [row.run_id for row in in_order(rows, SweepRecord("s", {}, cells, ""))] == ["4", "1", "3", "2"]
    assert [row.run_id for row in in_order(rows, None)] == ["1", "3", "4", "2"]
