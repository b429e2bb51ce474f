"""The ablations' tables and their picture, from a small results file: order, the recipe in every family, runs that have two names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lbllm_core.report import pages
from lbllm_core.report.ablation_tables import RECIPE, ablation_tables, panels, repeats_table
from lbllm_core.report.method_tables import PROTOCOLS
from lbllm_core.report.plots import in_columns

MODEL = "smollm2_135m"
WIKITEXT = PROTOCOLS[0]


def row(experiment: str, values: tuple[float, ...], seed: int = 0, of_row: str = "final", **more: Any) -> list[dict[str, Any]]:
    context = {"unit": "1", "model": MODEL, "experiment": experiment, "seed": seed, "row": of_row} | ({"effective_bpw": 2.5} if of_row != "teacher" else {})
    return [{"name": name, "value": value, **context, **more} for name, value in zip(PROTOCOLS, values, strict=False)]


RECORDS = [
    *row(RECIPE, (20.0, 40.0, 30.0), of_row="teacher"),
    *row("ablation_data_size_128", (44.0, 81.0, 63.0), effective_bpw=2.25),
    *row("ablation_data_size_008", (80.0, 200.0, 300.0)),
    *row("ablation_data_size_008", (9999.0, 1.0, 1.0), of_row="stage1"),
    *row("ablation_group_size_032", (50.0, 100.0)),
    *row("ablation_levels_explicit_g64", (60.0, 90.0, 75.0)),
    *row("ablation_stage4_off", (70.0, 95.0, 85.0)),
    *row("ablation_wat_levels", (140.0, 161.0, 121.0)),
    *row("ablation_mine_own", (41.0, 80.0, 60.0)),
    *row(RECIPE, (40.0, 80.0, 60.0)),
]


def tables(text: str) -> dict[str, list[list[str]]]:
    """Title of each family -> the lines of its table, without the head."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        title = line if line.startswith("**") else title
        if line.startswith("| ") and not line.startswith("|  |"):
            found.setdefault(title, []).append([cell.strip() for cell in line.split("|")[1:-1]])
    return found


def test_families_in_order_with_the_recipe_in_each() -> None:
    found = tables(ablation_tables(RECORDS, MODEL))
    assert list(found) == [
        "**What stage 2 (WAT) trains**, `ablation_wat_*`", "**Levels: stored, from a table, and the controls**, `ablation_levels_*`",
        "**Group size, stored levels**, `ablation_group_size_*`", "**Stage 4, end to end**, `ablation_stage4_*`", "**Calibration sequences**, `ablation_data_size_*`", "**mine**, `ablation_mine_*`",
    ]  # fmt: skip
    sizes = found.pop("**Group size, stored levels**, `ablation_group_size_*`")
    assert sizes[0] == ["064", "2.500", "60.00", "90.00", "75.00"], "stored levels are compared with stored levels"
    assert {lines[0][0].partition(":")[0] for lines in found.values()} == {"recipe"}
    assert {tuple(lines[0][1:]) for lines in found.values()} == {("2.500", "40.00", "80.00", "60.00")}


def test_values_lie_beside_their_difference_from_the_recipe() -> None:
    lines = tables(ablation_tables(RECORDS, MODEL))["**Calibration sequences**, `ablation_data_size_*`"]
    assert lines[1] == ["008", "2.500", "80.00 (+100 %)", "200.00 (+150 %)", "300.00 (+400 %)"], "in the order of the family, the final row alone"
    assert lines[2] == ["128", "2.250", "44.00 (+10.0 %)", "81.00 (+1.2 %)", "63.00 (+5.0 %)"]


def test_a_run_with_two_names_has_a_line_under_both_and_the_recipe_none() -> None:
    found = tables(ablation_tables(RECORDS, MODEL))
    sizes = found["**Group size, stored levels**, `ablation_group_size_*`"]
    assert [line[0] for line in sizes] == ["064", "032"]
    assert sizes[1][2:] == ["50.00 (-16.7 %)", "100.00 (+11.1 %)", ""], "what was not measured is empty"
    latent = tables(ablation_tables([*RECORDS, *row("ablation_wat_latent_all", (50.0, 60.0, 70.0)), *row("ablation_beta_off", (55.0, 60.0, 70.0))], MODEL))
    assert [line[:3] for line in latent["**Regulariser of the bitmap**, `ablation_beta_*`"]] == [["annealed", "2.500", "50.00"], ["off", "2.500", "55.00 (+10.0 %)"]]
    assert [line[0] for line in found["**Stage 4, end to end**, `ablation_stage4_*`"]] == ["recipe: on", "off"]
    assert [line[0] for line in found["**What stage 2 (WAT) trains**, `ablation_wat_*`"]] == ["recipe: all", "levels"]


def test_a_variant_that_was_measured_itself_stands_for_itself() -> None:
    again = [*RECORDS, *row("ablation_stage4_on", (40.5, 80.5, 60.5)), *row("ablation_group_size_064", (61.0, 91.0, 76.0))]
    found = tables(ablation_tables(again, MODEL))
    assert [line[0] for line in found["**Stage 4, end to end**, `ablation_stage4_*`"]] == ["recipe", "off", "on"]
    assert found["**Group size, stored levels**, `ablation_group_size_*`"][1][:3] == ["064", "2.500", "61.00 (+1.7 %)"]


def test_what_a_sweep_wrote_down_under_every_name_is_one_run() -> None:
    """A sweep finds a run that it knows in the cache, and its rows are recorded for each of the experiments."""
    again = [*RECORDS, *(r for name in ("ablation_stage4_on", "ablation_order_heaviest", "ablation_wat_all") for r in row(name, (40.0, 80.0, 60.0)))]
    assert ablation_tables(again, MODEL) == ablation_tables(RECORDS, MODEL)


def test_how_far_runs_that_were_measured_twice_lie_apart() -> None:
    again = [
        *row("ablation_data_size_008", (88.0, 190.0, 300.0)),
        *(r for name in ("ablation_stage4_on", "ablation_aar_none") for r in row(name, (39.0, 80.8, 60.6))),  # the recipe, under two names
        *row("ablation_joint_1e-2_smoothing_on", (10.0, 10.0, 10.0)),
        *row("ablation_joint_1e-2_smoothing_on", (12.0, 10.0, 10.0)),
    ]
    lines = [line.strip("| ").split(" | ") for line in repeats_table([*RECORDS, *again], MODEL).strip().splitlines()[2:]]
    assert lines[:3] == [
        ["wikitext2_s2048", "2", "2.5 %", "10.0 %", "10.0 % (data_size_008)"],
        ["ptb_s2048", "2", "1.0 %", "5.0 %", "5.0 % (data_size_008)"],
        ["c4_s2048", "2", "0.0 %", "1.0 %", "1.0 % (method_ablations)"],
    ]
    assert lines[3][:2] == ["wikitext2_s2048, joint", "1"]
    assert lines[3][4] == "20.0 % (joint_1e-2_smoothing_on)"


def test_a_sweep_of_the_ablations_alone_knows_the_recipe_by_their_names() -> None:
    """`make sweep EXPERIMENTS=ablations RECORD=...` writes no row that is called after the recipe."""
    recipe, rest = [r for r in RECORDS if r["experiment"] == RECIPE], [r for r in RECORDS if r["experiment"] != RECIPE]
    named = [{**r, "experiment": name} for name in ("ablation_stage4_on", "ablation_wat_all") for r in recipe]
    assert ablation_tables([*rest, *named], MODEL) == ablation_tables(RECORDS, MODEL)
    assert panels([*rest, *named], MODEL) == panels(RECORDS, MODEL)


def test_teacher_and_seeds_are_told_once() -> None:
    text = ablation_tables(RECORDS, MODEL)
    assert text.count("Teacher: wikitext2_s2048 20.00, ptb_s2048 40.00, c4_s2048 30.00.") == 1
    assert "One seed (0) a line." in text
    both = ablation_tables([*RECORDS, *row("ablation_wat_levels", (144.0, 161.0, 121.0), seed=1)], MODEL)
    assert "One seed" not in both
    assert "over seeds 0, 1" in both
    assert "| levels | 2.500 | 142.00 ± 2.83 (+255 %) |" in both


def test_without_the_recipe_nothing_is_compared() -> None:
    text = ablation_tables([r for r in RECORDS if r["experiment"] != RECIPE], MODEL)
    assert "| 128 | 2.250 | 44.00 | 81.00 | 63.00 |" in text
    assert "| recipe" not in text
    assert "Teacher" not in text


def test_panels_hold_the_same_variants() -> None:
    made, recipe = panels(RECORDS, MODEL)
    assert recipe == 40.0
    assert dict(made)["Calibration sequences"] == [("008", 80.0), ("128", 44.0)]
    assert dict(made)["Group size, stored levels"] == [("064", 60.0), ("032", 50.0)], "the line that is not the recipe is drawn too"


@pytest.mark.parametrize(("heights", "columns"), [([1, 1, 1, 1], [[0, 1], [2, 3]]), ([5, 1, 1, 1], [[0], [1, 2, 3]]), ([1, 1, 6], [[0, 1], [2]]), ([2], [[0]])])
def test_columns_are_as_low_as_they_can_be(heights: list[float], columns: list[list[int]]) -> None:
    assert in_columns(heights, 2) == columns


def test_the_page_gets_tables_and_picture_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- table: ablations -->\n<!-- end -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    assert pages.main(["docs"]) == 0
    assert "Not measured yet: `results/ablations_h200.json` is not there" in page.read_text()
    assert "pictures/" not in page.read_text()
    assert not (page.parent / "pictures").exists()

    content = {"schema": 1, "command": "python -m lbllm_core.batch", "commit": "0" * 40, "date": "2026-01-01", "device": "a GPU", "versions": {"torch": "2"}, "records": RECORDS}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "ablations_h200.json").write_text(json.dumps(content))
    picture = page.parent / "pictures" / "ablations.png"
    capsys.readouterr()
    assert pages.main(["docs"]) == 0
    assert set(capsys.readouterr().out.splitlines()) == {"docs/results.md updated", "docs/pictures/ablations.png updated"}
    assert "](pictures/ablations.png)\n" in page.read_text()
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert pages.main(["docs"]) == 0
    assert capsys.readouterr().out == "", "equal figures: nothing is written"
    picture.unlink()
    assert pages.main(["docs"]) == 0
    assert picture.read_bytes() == first
    content["records"] = [r | {"value": r["value"] + 1} for r in RECORDS]
    (tmp_path / "results" / "ablations_h200.json").write_text(json.dumps(content))
    assert pages.main(["docs"]) == 0
    assert picture.read_bytes() != first
