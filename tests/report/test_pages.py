"""The pages' tables: seeds of several files in one line, each file with its circumstances, and what is said where nothing was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lbllm_core.errors import DataError
from lbllm_core.report.pages import TABLES, fill, render

LINE = {"unit": "1", "model": "smollm2_135m", "experiment": "method_one", "row": "final", "scheme": "w1p1a16", "control": "none", "stages": "1+2", "level_mode": "codebook"}
LINE |= {"group_size": 16, "act_variant": "none", "kv_bits": 16, "parameterization": "nearest", "effective_bpw": 2.5, "tokens": 1_000_000}
TEACHER = {"unit": "1", "model": "smollm2_135m", "experiment": "method_one", "row": "teacher", "scheme": "bf16", "control": "none", "seed": 0}
WIKITEXT = "ppl_wikitext2_s2048"


def write(folder: Path, file: str, date: str, device: str, records: list[dict[str, Any]]) -> None:
    content = {"schema": 1, "command": f"made {file}", "commit": "0123456789abcdef", "date": date, "device": device, "versions": {"torch": "2.0"}, "records": records}
    (folder / file).write_text(json.dumps(content))


def perplexity(value: float, seed: int, **more: Any) -> dict[str, Any]:
    return {"name": WIKITEXT, "value": value, **LINE, "seed": seed, **more}


def accuracy(value: float, seed: int) -> list[dict[str, Any]]:
    return [{"name": name, "value": v, **LINE, "seed": seed} for name, v in (("acc_piqa", value), ("acc_stderr_piqa", 0.01))]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    old = [{"name": WIKITEXT, "value": 20.0, **TEACHER}, perplexity(30.0, 0), perplexity(32.0, 1)]
    write(tmp_path, "method.json", "2026-01-01T00:00:00+00:00", "older GPU", old)
    return tmp_path


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def line_of(text: str, experiment: str) -> dict[str, str]:
    head, *rest = rows(text)
    (found,) = [dict(zip(head, row, strict=True)) for row in rest if row[0] == experiment]
    return found


def sources(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("_")]


def test_seeds_of_two_files_are_one_line(results: Path) -> None:
    write(results, "method_h200.json", "2026-02-01T00:00:00+00:00", "newer GPU", [perplexity(34.0, 2, a_new_key=True)])
    text = render("method", results)
    line = line_of(text, "method_one")
    assert line["wikitext2_s2048"] == "32.00 ± 2.00 (x1.60)"
    assert line["seeds"] == "3"
    one, two = sources(text)
    assert "older GPU" in one
    assert "`results/method.json` (seeds 0, 1)" in one
    assert "newer GPU" in two
    assert "`results/method_h200.json` (seed 2)" in two
    assert "\n\n" + two in text, "paragraphs of their own"


@pytest.mark.parametrize(("date", "value"), [("2026-02-01T00:00:00+00:00", "36.00"), ("2025-12-01T00:00:00+00:00", "31.00")])
def test_of_one_line_and_seed_the_newer_file_counts(results: Path, date: str, value: str) -> None:
    write(results, "method_h200.json", date, "other GPU", [perplexity(40.0, 0)])
    assert line_of(render("method", results), "method_one")["wikitext2_s2048"].startswith(f"{value} ±")
    assert line_of(render("method", results), "method_one")["seeds"] == "2"


def test_one_file_is_enough(results: Path) -> None:
    text = render("method", results)
    assert line_of(text, "method_one")["wikitext2_s2048"] == "31.00 ± 1.41 (x1.55)"
    assert len(sources(text)) == 1


def test_zero_shot_names_the_file_that_has_accuracies(results: Path) -> None:
    assert render("zero_shot", results) == "_Not measured yet: `results/method.json` holds no such figures._\n"
    write(results, "method_h200.json", "2026-02-01T00:00:00+00:00", "newer GPU", [perplexity(34.0, 2), *accuracy(0.6, 2)])
    text = render("zero_shot", results)
    assert line_of(text, "method_one")["piqa"] == "60.0 ± 1.0"
    (source,) = sources(text)
    assert "`results/method_h200.json` (seed 2)" in source


def test_every_way_in_which_a_table_was_measured_is_told(results: Path) -> None:
    """The day and not the hour; of a further way only what differs; nothing of records that the table does not show."""
    later, seed_1 = {"date": "2026-01-01T09:00:00+00:00"}, {"date": "2025-12-01T09:00:00+00:00", "commit": "fedcba9876543210", "device": "oldest GPU"}
    hidden = {**perplexity(9.0, 0), "name": "ppl_other", "measured": {"device": "unseen GPU"}}
    records = [perplexity(30.0, 0, measured=later), perplexity(32.0, 1, measured=seed_1), perplexity(34.0, 2), hidden]
    write(results, "method.json", "2026-01-01T00:00:00+00:00", "older GPU", records)
    (source,) = sources(render("method", results))
    first = "`made method.json`, commit `fedcba987654`, 2025-12-01, oldest GPU, torch 2.0"
    assert source == f"_{first}; also commit `0123456789ab`, 2026-01-01, older GPU; from `results/method.json` (seeds 0, 1, 2)._"


def test_of_one_line_and_seed_the_record_that_was_measured_last_counts(results: Path) -> None:
    """A newer file may hold older records."""
    write(results, "method_h200.json", "2026-02-01T00:00:00+00:00", "newer GPU", [perplexity(40.0, 0, measured={"date": "2025-11-01T00:00:00+00:00"}), perplexity(34.0, 1)])
    assert line_of(render("method", results), "method_one")["wikitext2_s2048"].startswith("32.00 ±")


def test_another_model_in_the_file_is_no_source(results: Path) -> None:
    write(results, "pipeline_cpu.json", "2026-01-01T00:00:00+00:00", "a CPU", [{**perplexity(3.0, 0), "model": "tiny"}, perplexity(30.0, 0, measured={"device": "another CPU"})])
    (source,) = sources(render("pipeline", results))
    assert ", a CPU," not in source
    assert "another CPU" in source


def test_what_is_not_measured_says_so(tmp_path: Path) -> None:
    assert render("kernels_h200", tmp_path) == "_Not measured yet: `results/kernels_h200.json` is not there._\n"
    assert render("method", tmp_path) == "_Not measured yet: `results/method.json` and `results/method_h200.json` are not there._\n"
    with pytest.raises(DataError, match=r"no table 'kernel_h200'; tables: .*kernels_h200"):
        render("kernel_h200", tmp_path)


def test_a_page_keeps_its_words_and_filling_it_again_changes_nothing(results: Path) -> None:
    page = "before\n<!-- table: method -->\nold\n<!-- end -->\nbetween\n<!-- table: decode_h200 -->\n<!-- end -->\nafter\n"
    once = fill(page, results)
    assert "old" not in once.replace("older", "")
    assert [line for line in once.splitlines() if line in ("before", "between", "after")] == ["before", "between", "after"]
    assert fill(once, results) == once


def test_every_slot_of_the_pages_has_a_table() -> None:
    root = Path(__file__).resolve().parents[2]
    slots = [name for page in (root / "README.md", *(root / "docs").glob("*.md")) for name in _slots(page.read_text(encoding="utf-8"))]
    assert len(slots) >= 12
    assert set(slots) <= set(TABLES)


def _slots(text: str) -> list[str]:
    return [part.partition(" -->")[0] for part in text.split("<!-- table: ")[1:]]
