"""The table of runs: recovery, expected values, what differs, and the pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbllm_core.report.plots import apart, perplexity_against_bits, table_picture
from lbllm_core.report.runs import RunRow, differences, lineage_table, measured, pareto, run_table, teacher_table

FIELDS = {"model.name": "m", "experiment": "embedded", "scheme.name": "w1p1a4", "scheme.weight_bits": 2, "seed": 0, "end_to_end.steps": 4, "model.path": "x"}
FIGURES = {
    "eval/ppl_x": 30.0,
    "eval/ppl_x_stderr": 1.5,
    "teacher/eval/ppl_x": 20.0,
    "teacher/eval/ppl_x_stderr": 1.0,
    "eval/acc_piqa_n200": 0.5,
    "eval/acc_stderr_piqa_n200": 0.035,
    "teacher/eval/acc_piqa_n200": 0.625,
    "stage1/eval/ppl_x": 99.0,
    "size/effective_bpw": 2.5634,
    "size/disk_mb": 94.4,
    "speed/decode_tok_s": 27.81,
    "minutes/ptq_init": 2.0,
    "teacher/minutes/evaluate_teacher": 1.5,
    "stage1/minutes/ptq_init": 50.0,
}
DONE = RunRow("a" * 32, "finished", fields=FIELDS, figures=FIGURES, lineage={"ptq_init": "ptq_init/0123456789abcdef"})
HALF = RunRow("b" * 32, "running", fields=FIELDS | {"seed": 3, "end_to_end.steps": 9}, figures={"teacher/eval/ppl_x": 20.0})
PLANNED = RunRow("", "planned", fields={"model.name": "other", "experiment": "embedded"})
TEACHER = RunRow("c" * 32, "finished", fields=FIELDS | {"scheme.name": "bf16", "scheme.weight_bits": 16}, figures={"teacher/eval/ppl_x": 20.0})


def column(cells: list[list[str]], head: str) -> list[str]:
    return [line[cells[0].index(head)] for line in cells[1:]]


def test_one_line_a_run_with_recovery() -> None:
    cells = run_table([DONE, HALF, PLANNED, TEACHER])
    assert column(cells, "run") == ["m embedded", "m embedded seed 3", "other embedded", "m embedded"]
    assert column(cells, "state") == ["finished", "running", "planned", "finished"]
    assert column(cells, "ppl_x") == ["30.00 ± 1.50 (x1.5)", "", "", "20.00"], "no scheme: the teacher is the result"
    assert column(cells, "acc_piqa_n200") == ["0.500 ± 0.035 (80 %)", "", "", ""]
    assert column(cells, "bits a weight")[0] == "2.563"
    assert column(cells, "minutes") == ["3.5", "", "", ""], "rows beside the final one are not counted"
    assert not [head for head in cells[0] if "stderr" in head or "expected" in head]


def test_columns_that_nobody_fills_are_left_out() -> None:
    assert run_table([PLANNED])[0] == ["run", "state"]
    assert run_table([])[0] == ["run"]


def test_expected_beside_measured() -> None:
    wanted = RunRow("d" * 32, "finished", fields=FIELDS | {"evaluation.expected": {"final/ppl_x": 25.0, "final/acc_piqa_n200": 0.5}}, figures=FIGURES)
    cells = run_table([wanted, HALF])
    assert column(cells, "ppl_x expected") == ["25", ""]
    assert [line[cells[0].index("ppl_x expected") + 1] for line in cells] == ["delta", "+20.0%", ""]
    assert column(cells, "acc_piqa_n200 expected") == ["0.5", ""]


def test_only_what_differs() -> None:
    cells = differences([DONE, HALF, PLANNED])
    assert cells == [["run", "end_to_end.steps"], ["m embedded", "4"], ["m embedded seed 3", "9"]]
    assert differences([DONE, DONE]) == [["run"]]
    moved = differences([DONE, RunRow("e" * 32, "finished", fields=FIELDS | {"model.blocks": 4, "model.path": "y", "tracking.sweep": "z"})])
    assert moved[0] == ["run", "model.blocks"], "a model's name says the rest of the model"


def test_teachers_and_lineage() -> None:
    assert teacher_table([DONE, HALF, PLANNED])[1] == ["m", "20.00 ± 1.00", "0.625"]
    assert lineage_table([DONE]) == [["run", "ptq_init"], ["m embedded", "0123456789abcdef"]]
    assert measured([DONE]) == ["ppl_x", "acc_piqa_n200"]


def test_perplexities_stand_in_the_order_in_which_they_were_asked() -> None:
    figures = {f"eval/ppl_{text}": 30.0 for text in ("c4", "ptb", "wikitext2")}
    asked = RunRow("d" * 32, "finished", fields=FIELDS | {"evaluation.protocols": "ppl_wikitext2, ppl_c4"}, figures=figures)
    assert measured([asked]) == ["ppl_wikitext2", "ppl_c4", "ppl_ptb"], "one that nobody asks for any more comes last"
    planned = RunRow("", "planned", fields={"evaluation.protocols": ["ppl_wikitext2", "ppl_c4"]})
    assert measured([planned, RunRow("e" * 32, "finished", fields=FIELDS, figures=figures)]) == ["ppl_wikitext2", "ppl_c4", "ppl_ptb"]


def test_pareto_keeps_what_nobody_beats() -> None:
    assert pareto([(2.5, 40.0), (2.0, 60.0), (2.2, 80.0), (3.0, 40.0), (4.0, 30.0)]) == [(2.0, 60.0), (2.5, 40.0), (4.0, 30.0)]
    assert pareto([]) == []


def test_labels_are_moved_apart_as_little_as_it_takes() -> None:
    assert apart([0.0, 20.0, 40.0], 9.0) == [0.0, 20.0, 40.0]
    assert apart([10.0, 10.0], 8.0) == [6.0, 14.0]
    crowded = apart([0.0, 1.0, 2.0, 11.0, 50.0], 10.0)
    assert crowded == [-11.5, -1.5, 8.5, 18.5, 50.0]
    assert apart([], 9.0) == []


@pytest.mark.parametrize("spread", [1.2, 50.0])
def test_pictures(spread: float, tmp_path: Path) -> None:
    picture = table_picture(run_table([DONE, HALF, PLANNED]), tmp_path / "table.png", "a $ in the title")
    point = {"title": "m a", "model": "m", "bits": 2.5, "value": 30.0, "error": 1.0, "teacher": 20.0}
    points = {"ppl_x": [point, point | {"title": "m b", "bits": 2.3, "value": 30.0 * spread}, point | {"title": "n a", "model": "n", "teacher": None}]}
    drawn = [picture, *perplexity_against_bits(points, tmp_path, "s")]
    assert [p.name for p in drawn] == ["table.png", "s-ppl_x.png"]
    for path in drawn:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000
    assert perplexity_against_bits(points, tmp_path / "again", "s")[0].read_bytes() == drawn[1].read_bytes()
