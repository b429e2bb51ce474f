"""The comparison as one HTML page: what is best and what ties, the paper's tables, pictures, and what is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lbllm_core.report import desk, plots
from lbllm_core.report.ablations import FAMILIES, SAME_CHANGE, family_of, family_table, main_table, stages_table, zero_shot_table
from lbllm_core.report.plots import histogram_chart
from lbllm_core.report.runs import RunRow
from lbllm_core.report.standing import standings

HERE = "http://127.0.0.1:5226/#/experiments/1/runs/"


def run(experiment: str, ppl: float | None, error: float = 1.0, model: str = "m", seed: int = 0, state: str = "finished", **figures: float) -> RunRow:
    made = {"teacher/eval/ppl_x": 20.0, "size/effective_bpw": 2.5, "minutes/weight_distill": 3.0} | figures
    if ppl is not None:
        made |= {"eval/ppl_x": ppl, "eval/ppl_x_stderr": error}
    run_id = f"{experiment}-{seed}-{model}"
    fields = {"model.name": model, "experiment": experiment, "scheme.name": "w1p1a4", "scheme.weight_bits": 2, "scheme.act_variant": "piecewise", "seed": seed}
    return RunRow(run_id, state, fields=fields, figures=made, lineage={"weight_distill": f"weight_distill/{run_id}"}, digest=run_id, link=HERE + run_id)


def texts(line: list[list]) -> list[str]:  # type: ignore[type-arg]
    return [" / ".join(entry.text for entry in cell) for cell in line]


def test_ties_by_the_standard_error_of_the_difference() -> None:
    rows = [run("a", 30.0, 1.0), run("b", 31.4, 1.0), run("c", 31.5, 1.0), run("d", 25.0, 1.0, model="other"), run("e", 29.0, 1.0, state="running")]
    assert standings(rows, "ppl_x") == {0: "best", 1: "tie"}, "1.4 < sqrt(2) < 1.5; one run of a model is no competition; a running one does not count"
    accurate = [run("a", None, **{"eval/acc_p": 0.5, "eval/acc_stderr_p": 0.03}), run("b", None, **{"eval/acc_p": 0.55, "eval/acc_stderr_p": 0.03}), run("c", None, **{"eval/acc_p": 0.50})]
    assert standings(accurate, "acc_p") == {1: "best"}
    assert standings([run("a", 30.0), run("b", 30.0)], "ppl_x") == {0: "best", 1: "best"}


def test_families() -> None:
    assert family_of("ablation_bitmap_start_soft") == ("bitmap_start", "soft")
    assert family_of("ablation_wat_latent_all") == ("wat", "latent_all")
    assert family_of("ablation_kv4") == ("kv4", "")
    assert family_of("embedded") == ("", "")
    assert family_of("ablation_mine_b") == ("mine", "b")


def test_every_ablation_has_a_table_and_every_pair_exists() -> None:
    from flows.compose import groups, published

    names = [name for name in groups()["experiment"] if name.startswith("ablation_")]
    assert not [name for name in names if family_of(name)[0] not in FAMILIES]
    assert {f"ablation_{family}_{variant}" for family, variants in FAMILIES.items() for variant in FAMILIES[family][1]} <= set(names)
    for (family, variant), experiment in SAME_CHANGE.items():
        assert f"ablation_{family}_{variant}" in names
        assert experiment in published()


PAPER = {"paper_wat_levels_llama2_7b_w1p1a16": ("m", {"final/ppl_x": 40.0}), "paper_main_y": ("m", {"final/ppl_x": 25.0})}


def test_a_family_beside_the_recipe_and_the_paper() -> None:
    rows = [run("ablation_wat_all", 31.0), run("ablation_wat_levels", 50.0), run("ablation_wat_levels", 52.0, seed=1), run("embedded", 30.5), run("ablation_wat_weights", None, state="failed")]
    table = family_table("wat", rows, PAPER)
    assert table.head == ["", "model", "bits a weight", "ppl_x", "paper", "delta"]
    lines = {texts(line)[0]: texts(line)[3:] for line in table.lines}
    assert list(lines) == ["levels", "weights", "all", "recipe: embedded"]
    assert lines["levels"] == ["50.00 ± 1.00 (x2.5) / 52.00 ± 1.00 (x2.6)", "40.00", "+25.0% / +30.0%"]
    assert lines["weights"] == ["failed", "", ""]
    assert lines["all"] == ["31.00 ± 1.00 (x1.55)", "", ""]
    assert [cell[0].standing for cell in (line[3] for line in table.lines)] == ["", "", "tie", "best"]
    assert table.lines[0][3][1].link == HERE + "ablation_wat_levels-1-m"
    elsewhere = family_table("wat", [run("ablation_wat_levels", 50.0, model="other")], PAPER)
    assert elsewhere.head == ["", "model", "bits a weight", "ppl_x"], "another model: no delta"
    assert elsewhere.note == "In the paper, m, ppl_x: levels 40.00."


def test_main_results_zero_shot_and_stages() -> None:
    scores = {"eval/acc_piqa": 0.6, "teacher/eval/acc_piqa": 0.7, "eval/acc_boolq": 0.5, "teacher/eval/acc_boolq": 0.6, "eval/acc_mmlu": 0.3}
    rows = [run("embedded", 30.0, **scores, **{"stage1/eval/ppl_x": 90.0, "stage1/eval/ppl_x_stderr": 4.0}), run("ablation_wat_all", 31.0)]
    main = [texts(line) for line in main_table(rows, PAPER).lines]
    assert main == [["m, teacher", "16", "20.00"], ["m embedded", "2.500", "30.00 ± 1.00 (x1.5)"], ["m, the paper's W(1+1)A4", "", "25.00"]]
    zero = zero_shot_table(rows)
    assert zero.head == ["", "acc_piqa", "acc_boolq", "acc_mmlu", "average", "lost"]
    assert texts(zero.lines[1])[-2:] == ["0.550", "-0.100"], "over the tasks that the teacher was measured on too"
    assert [texts(line) for line in stages_table(rows).lines] == [["m embedded", "ppl_x", "90.00 ± 4.00", "30.00 ± 1.00"]]


CURVES = {"error_before": [[0, 0.4], [1, 0.5]], "error_after": [[0, 0.2], [1, 0.3]], "loss": [[0.5, 0.4], [1.0, 0.2], [1.5, 0.5], [2.0, 0.3]]}
SITES = [{"qkv": {"counts": [1] * 40 + [9] * 40, "searched": [1.0, 0.9, 0.25, 0.25], "learned": [0.9, 0.8, 0.3, 0.2]}}] * 2


class Reader(HTMLParser):
    """Every address of the page, what a person reads, and whether tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("href", "xlink:href", "src", "srcset", "action")]
        if tag not in ("meta", "br", "wbr", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br", "wbr", "link", "img"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def rows() -> list[RunRow]:
    broken = run("ablation_stages_init", None, state="failed")
    return [run("embedded", 30.0), run("ablation_wat_all", 30.8), run("ablation_wat_levels", 50.0), RunRow(**{**vars(broken), "error": "<b>not finite</b> & lost"}), RunRow("", "planned", fields={"model.name": "m", "experiment": "smoke"})]


@pytest.fixture(scope="module")
def page(rows: list[RunRow]) -> str:
    kept = {rows[0].run_id: desk.Kept({"weight_distill": CURVES}, {"act_quant": SITES}, [{"prompt": "Once <i>", "teacher": "upon a time", "packed": "apon"}]), rows[1].run_id: desk.Kept({"weight_distill": {"block_rel_mse": [[0, 0.3], [1, 0.4]], "loss_before": [[0, 2.0], [1, 2.0]], "loss_after": [[0, 1.0], [1, 1.5]]}})}
    return desk.render(rows, kept, desk.Page("s", "today", "Does it <help>?", {"MLflow: table": HERE}, PAPER))


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    reader = read(page)
    assert "script" not in reader.tags
    assert not [a for a in reader.addresses if not a.startswith(("#", "http://127.0.0.1:"))]
    assert not [a for a in re.findall(r"https?://[^\s\"'<]+", page) if not a.startswith("http://127.0.0.1:")], "not even a namespace"
    assert "default-src 'none'" in page
    inner = {a.removeprefix("#") for a in reader.addresses if a.startswith("#")}
    assert inner <= set(re.findall(r'\bid="([^"]+)"', page)), "every place that is pointed at exists"


def test_what_a_person_reads(page: str) -> None:
    text = " ".join("".join(read(page).words).split())
    for words in ("5 runs (3 finished, 1 failed, 1 planned)", "Does it <help>?", "<b>not finite</b> & lost", "upon a time", "What stage 2 (WAT) trains", "Losses", "m ablation_wat_levels (finished) has kept no curves", "m ablation_wat_all: the error before a stage was not measured"):
        assert words in text, words
    assert page.count("<svg") >= 5, "bits, cost, errors, losses, a histogram"
    assert "<b>not finite" not in page
    assert "<i>" not in page.replace('<i style="', "")


def test_every_number_leads_to_its_run(rows: list[RunRow], page: str) -> None:
    table = desk.comparison(rows)
    for line, row in zip(table.lines, rows, strict=True):
        assert all(entry.link == row.link for cell in line for entry in cell if entry.text)
    assert page.count(f'xlink:href="{rows[0].link}"') >= 2, "points of the pictures too"
    assert [line[table.head.index("ppl_x")][0].standing for line in table.lines] == ["best", "tie", "", "", ""]


def test_pages_of_little(rows: list[RunRow]) -> None:
    for few in ([rows[4]], [rows[3]], [rows[0]], [run("bf16", None)]):
        text = " ".join("".join(read(desk.render(few, {}, desk.Page("s", "today"))).words).split())
        assert f"1 run (1 {few[0].state}), read on today." in text


def test_many_runs_are_drawn_by_rank() -> None:
    many = [run(f"e{i}", 30.0 + (i * 7) % 40) for i in range(40)]
    best = desk.drawn(many)
    assert [row.value("ppl_x") for row in best] == [30.0, 31.0, 32.0, 33.0, 34.0, 35.0]
    html = desk.render(many, {}, desk.Page("s", "today"))
    assert "34 more are in MLflow" in html


def test_shared_artifacts_are_drawn_once() -> None:
    first, second = run("a", 30.0), run("b", 31.0)
    second = RunRow(**{**vars(second), "lineage": first.lineage})
    kept = {row.run_id: desk.Kept({"weight_distill": CURVES}) for row in (first, second)}
    (alone,) = desk.error_charts([first], kept)
    (both,) = desk.error_charts([first, second], kept)
    assert both.svg == alone.svg
    assert both.caption == f"{alone.caption}; one line for the same artifact: m a, m b"
    assert desk.loss_charts([first], kept)[0].caption == ""


def test_names_beside_points_avoid_other_points() -> None:
    edges = (0.0, 500.0)
    assert plots._goes_right((1, 1), {(1, 1): (100.0, 50.0), (2, 1): (400.0, 50.0)}, 60.0, edges), "towards the middle"
    assert not plots._goes_right((2, 1), {(1, 1): (100.0, 50.0), (2, 1): (400.0, 50.0)}, 60.0, edges)
    assert not plots._goes_right((1, 1), {(1, 1): (100.0, 50.0), (2, 1): (150.0, 52.0)}, 60.0, edges), "a point lies there: the other side"
    assert plots._goes_right((1, 1), {(1, 1): (100.0, 50.0), (2, 1): (150.0, 80.0)}, 60.0, edges), "it lies above"
    assert plots._goes_right((1, 1), {(1, 1): (50.0, 50.0), (2, 1): (90.0, 52.0)}, 60.0, edges), "no room on the other side"


def test_histograms_of_uniform_codes_have_no_knees() -> None:
    row = run("a", 30.0)
    kept = desk.Kept(activations={"act_quant": SITES})
    uniform = RunRow(**{**vars(row), "fields": {**row.fields, "scheme.act_variant": "uniform"}})
    assert desk.activation_charts(row, kept) != desk.activation_charts(uniform, kept)
    assert desk.activation_charts(row, desk.Kept()) == []
    final = desk.Kept(activations={"act_quant": SITES, "end_to_end": [{"qkv": {"learned": [0.5, 0.5, 0.3, 0.2]}}] * 2})
    assert desk.activation_charts(row, final) != desk.activation_charts(row, kept), "stage 4 has the last word"
    assert histogram_chart([("block 1", [0, 5], [], [])], "t").startswith("<svg")
