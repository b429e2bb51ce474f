"""The experimenter's desk in a real browser: `make test-browser`. Not a part of `make test`: it needs Chromium and some minutes.

A stack as `make up` starts it, a sweep of six small cells and one that cannot run, and then what a person sees: MLflow's table of runs
behind the printed address, a run's page, the compare page, the HTML report (wide, on a phone, in the dark), Prefect's pages, and the
ways between them.

    apt-get install chromium chromium-driver

LBLLM_BROWSER_HOME names a folder that keeps the sweep from one time to the next.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "flow"))
from browser import Browser, BrowserError, browser
from flow_stack import SMALL, Stack, free_port

from flows import lab_book
from lbllm_core.report.runs import RunRow

EXPERIMENTS = ("tiny", "ablation_stages_init", "ablation_stages_wat", "ablation_stages_wat_aar", "ablation_aar_none", "ablation_wat_levels")
CANNOT = "ablation_data_source_c4"  # its text lies under LBLLM_DATA, which is not set here
QUESTION = "Which stage earns its place?"


@dataclass(frozen=True)
class Desk:
    stack: Stack
    told: str
    rows: list[RunRow]

    def printed(self, title: str) -> str:
        """The address that the sweep printed behind a title."""
        found = re.search(rf"{title}\s+(\S+)", self.told)
        assert found, self.told
        return found[1]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    os.environ.pop("LBLLM_DATA", None)
    kept = os.environ.get("LBLLM_BROWSER_HOME")
    stack = Stack(Path(kept) if kept else tmp_path_factory.mktemp("desk") / "home", free_port(), free_port())
    stack.home.mkdir(exist_ok=True)
    up = stack.call("-m", "flows.launch", "up")
    try:
        assert up.returncode == 0, up.stderr
        words = ["--models", "tiny", "--experiments", ",".join([*EXPERIMENTS, CANNOT]), "--sweep", "desk", "--question", QUESTION]
        done = stack.call("-m", "flows.sweep", *words, "--overrides", *(o for o in SMALL if o != "model=tiny"), timeout=3000)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        compared = stack.call("-m", "flows.compare", "desk")
        assert compared.returncode == 0, compared.stderr
        os.environ["LBLLM_MLFLOW_PORT"] = str(stack.mlflow)
        rows = lab_book.read_rows(stack.home, "desk")
        assert [row.state for row in rows] == ["finished"] * len(EXPERIMENTS)
        yield Desk(stack, done.stdout, rows)
    finally:
        stack.call("-m", "flows.launch", "down")


@pytest.fixture(scope="module")
def page(desk: Desk) -> Iterator[Browser]:
    """A wide window that has met MLflow before: its assistant is closed, its menu is that for training."""
    with browser(1700, 1200) as made:
        made.go(f"http://127.0.0.1:{desk.stack.mlflow}/#/experiments")
        made.wait_for("Model training")
        for label in ("Model training", "Close"):
            with contextlib.suppress(BrowserError):
                made.click(label)
            time.sleep(1)
        yield made


def test_the_table_of_runs_shows_names_figures_and_the_question(desk: Desk, page: Browser) -> None:
    page.go(desk.printed("with columns"))
    text = page.wait_for(QUESTION, "matching runs", "stages_wat_aar tiny", "eval/ppl_synthetic", "size/effective_bpw")
    for name in ("tiny", "stages_init tiny", "stages_wat tiny", "aar_none tiny", "wat_levels tiny"):
        assert name in text
    assert re.search(rf"\b{len(EXPERIMENTS)}\s+matching runs", text)
    for row in desk.rows:
        assert str(row.value("ppl_synthetic"))[:6] in text, "each run's perplexity is to be read without a click"
    heads = page.run("return [...document.querySelectorAll('.ag-header-cell')].filter(e => e.getBoundingClientRect().right <= innerWidth).map(e => e.innerText.trim())")
    assert {"Run Name", "eval/ppl_synthetic", "size/effective_bpw"} <= set(heads), "the columns that matter are in the window"
    cut = page.run("return [...document.querySelectorAll('.ag-header-cell *')].filter(e => e.innerText && e.clientWidth && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)")
    assert not cut, "a head is too narrow for its name"


def test_a_runs_page_says_what_it_tests_and_leads_to_prefect(desk: Desk, page: Browser) -> None:
    row = next(row for row in desk.rows if row.text("experiment") == "ablation_stages_wat")
    page.go(row.link)
    page.wait_for("stages_wat tiny", "Stages: initialisation and WAT (stage 2).", "Its steps on Prefect's page", "Finished", "act_quant.enabled")
    page.go(f"{row.link}/model-metrics")
    text = page.wait_for("stage2", "eval", "minutes")
    assert not re.search(r"^system", text, re.MULTILINE), "system metrics have a page of their own"
    page.go(f"{row.link}/system-metrics")
    page.wait_for("cpu_utilization_percentage")
    page.go(f"{row.link}/artifacts")
    page.wait_for("config.json", "environment.json", "lineage.json", "result.md", "samples.md", "steps", "plots")


def test_the_compare_page_takes_all_runs(desk: Desk, page: Browser) -> None:
    page.go(desk.printed("compare page"))
    page.wait_for(f"Comparing {len(EXPERIMENTS)} Runs", "Parameters", *(row.run_id for row in desk.rows))


def test_prefect_mirrors_the_table_and_links_both_ways(desk: Desk, page: Browser) -> None:
    from mlflow import MlflowClient

    from tasks.tracking import store_uri

    row = desk.rows[0]
    address = MlflowClient(store_uri(desk.stack.home)).get_run(row.run_id).data.tags["lbllm.prefect"]
    page.go(re.sub(r":\d+/", f":{desk.stack.prefect}/", address))  # a kept home was made on another port
    page.wait_for("Completed", "lbllm", "evaluate_model")
    page.press("//li[normalize-space(.)='Artifacts']")
    page.wait_for("result", "mlflow", "in MLflow", "weight_distill", "block 2 of 2", "tokens/s")
    page.go(f"http://127.0.0.1:{desk.stack.prefect}/artifacts/key/result")
    page.wait_for("result")
    page.go(f"http://127.0.0.1:{desk.stack.prefect}/runs")
    page.wait_for(f"{len(EXPERIMENTS)} runs", *(f"model=tiny experiment={name}" for name in EXPERIMENTS))


def report_address(desk: Desk) -> str:
    return (desk.stack.home / "compare" / "desk.html").as_uri()


def test_the_report_opens_from_its_file_and_fetches_nothing(desk: Desk, page: Browser) -> None:
    page.go(report_address(desk))
    text = page.wait_for("Comparison: desk", QUESTION, "7 runs (6 finished, 1 failed)")
    for words in ("Stages, within each run", "What stage 2 (WAT) trains", "What stage 3 (AAR) trains", "Perplexity against effective bits", "Errors by block", "Losses", "Activations, clips and knees", "Cost against quality", "Sample texts", "What differs", "Lineage", "Not finished", "LBLLM_DATA"):
        assert words in text, words
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert "has kept no curves" not in text, "every finished run has curves"
    best = min(row.value("ppl_synthetic") or 9e9 for row in desk.rows)
    assert re.search(rf"{best:.2f} ± \d\.\d\d \(x[\d.]+\) ★", text)
    drawn = page.run("return [...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height, s.querySelectorAll('path, use').length])")
    assert len(drawn) >= 10
    assert all(width > 200 and height > 100 and shapes > 10 for width, height, shapes in drawn)


def test_every_number_of_the_first_table_leads_to_its_run(desk: Desk, page: Browser) -> None:
    page.go(report_address(desk))
    page.wait_for("Comparison: desk")
    script = "return [...document.querySelectorAll('#comparison table')[0].querySelectorAll('tbody tr')].map(r => [...r.querySelectorAll('th, td')].filter(c => c.innerText.trim()).map(c => c.querySelector('a') ? c.querySelector('a').href : ''))"
    lines = page.run(script)
    assert len(lines) == len(EXPERIMENTS) + 1
    by_link = {row.link: row for row in desk.rows}
    assert [set(line) for line in lines[:-1]] == [{link} for link in by_link], "each cell of a line leads to that line's run"
    page.go(lines[2][3])
    page.wait_for("stages_wat tiny", "Finished")


@pytest.mark.parametrize("width", [500, 820, 1700])
def test_the_report_fits_its_window(desk: Desk, width: int) -> None:
    with browser(width, 900) as window:
        window.go(report_address(desk))
        window.wait_for("Comparison: desk")
        wide, inner = window.run("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= inner, "tables scroll by themselves, the page does not"
        small = window.run("return [...document.querySelectorAll('p, td, th, li')].filter(e => e.innerText.trim() && parseFloat(getComputedStyle(e).fontSize) < 11).length")
        assert small == 0
        hidden = window.run("return [...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'auto').length")
        assert hidden == 0


def test_the_report_in_the_dark(desk: Desk) -> None:
    with browser(900, 900, ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")) as window:
        window.go(report_address(desk))
        window.wait_for("Comparison: desk")
        assert window.run("return matchMedia('(prefers-color-scheme: dark)').matches")
        ink, paper = window.run("return ['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k].match(/\\d+/g).map(Number).reduce((a, b) => a + b))")
        assert ink > 500
        assert paper < 150
