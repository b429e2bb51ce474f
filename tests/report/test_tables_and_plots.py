"""Results files, the tables made from them, and plots."""

from __future__ import annotations

import json
import math

import pytest

from lbllm_core.errors import ArtifactError
from lbllm_core.report import plots, records, tables

ROWS = [
    {"row": "teacher", "ppl_synthetic": 2.0, "acc_piqa_n200": 0.8, "acc_stderr_piqa_n200": 0.03, "disk_mb": 100.0, "minutes": 1.0},
    {"row": "stage1", "ppl_synthetic": 6.0, "acc_piqa_n200": 0.6, "acc_stderr_piqa_n200": 0.04, "effective_bpw": 2.25, "disk_mb": 10.0},
    {"row": "final", "ppl_synthetic": 3.0, "effective_bpw": 2.25, "minutes": 2.5},
]


def test_comparison_puts_recovery_beside_the_figure():
    cells = {line[0]: line[1:] for line in tables.comparison(ROWS)}
    assert cells[""] == ["teacher", "stage 1 only", "final"]
    assert cells["ppl_synthetic"] == ["2.00", "6.00 (x3)", "3.00 (x1.5)"]
    assert cells["acc_piqa_n200"] == ["0.800 ± 0.030", "0.600 ± 0.040 (75 %)", ""]
    assert cells["MB on disk"] == ["100.0", "10.0 (x0.1)", ""]
    assert cells["bits a weight, all counted"] == ["", "2.250", "2.250"]
    assert not any("stderr" in name for name in cells)


def test_comparison_without_a_teacher_has_no_recovery():
    assert tables.comparison(ROWS[1:])[1] == ["ppl_synthetic", "6.00", "3.00"]


def test_plain_and_markdown_show_the_same_cells():
    cells = tables.comparison(ROWS)
    for line in cells:
        for cell in line:
            assert cell in tables.plain(cells)
            assert cell in tables.markdown(cells)
    widths = {len(line) for line in tables.markdown(cells).splitlines()[1:2]}
    assert widths


def test_pivot_refuses_two_figures_in_one_cell():
    found = [{"name": "kernel_us", "op": op, "n": n, "value": n * 1.5} for op in ("ours", "cublas") for n in (1, 2)]
    assert tables.pivot(found, ["n"], "op") == [["n", "ours", "cublas"], ["1", "1.5", "1.5"], ["2", "3", "3"]]
    with pytest.raises(ArtifactError, match="two records"):
        tables.pivot([*found, found[0]], ["n"], "op")


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    made = [{"name": k, "value": v, "unit": "1", "row": r["row"], "model": "tiny"} for r in ROWS for k, v in r.items() if k != "row"]
    records.write_results(folder / "pipeline_cpu.json", "make run", made, device="test device")
    return folder


def test_results_carry_their_circumstances(results):
    content = records.read_results(results / "pipeline_cpu.json")
    assert set(content) == {"schema", "command", "commit", "date", "device", "versions", "records"}
    assert content["versions"]["torch"]
    assert content["device"] == "test device"


def test_records_of_other_models_can_be_kept(results):
    path = results / "pipeline_cpu.json"
    new = [{"name": "total_s", "value": 3.5, "unit": "s", "model": "other"}]
    records.write_results(path, "make run", new, keep=lambda r: r["model"] == "tiny")
    assert [r["model"] for r in records.read_results(path)["records"]].count("tiny") > 5
    records.write_results(path, "make run", new)
    assert records.read_results(path)["records"] == new


@pytest.mark.parametrize("bad", [{"value": 1.0, "unit": "s"}, {"name": "x", "value": math.nan, "unit": "1"}, {"name": "x", "value": "1", "unit": "1"}, {"name": "x", "value": 1}])
def test_records_without_name_unit_or_value_are_refused(bad, tmp_path):
    with pytest.raises(ArtifactError, match="needs a name"):
        records.write_results(tmp_path / "x.json", "test", [bad])
    assert not (tmp_path / "x.json").exists()


def test_unknown_schema_is_refused(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"schema": 99, "records": []}))
    with pytest.raises(ArtifactError, match="schema 99"):
        records.read_results(tmp_path / "x.json")


def test_rows_of_records_are_result_rows_in_order(results):
    found = tables.rows_of(reversed(records.read_results(results / "pipeline_cpu.json")["records"]))
    assert [r["row"] for r in found] == ["teacher", "stage1", "final"]
    assert found[1] == ROWS[1]


def test_plots_are_png_and_stable(tmp_path):
    first = plots.perplexity_bars(ROWS, tmp_path / "a")
    assert [p.name for p in first] == ["ppl_synthetic.png"]
    second = plots.perplexity_bars(ROWS, tmp_path / "b")
    assert first[0].read_bytes() == second[0].read_bytes()
    assert first[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    curve = plots.curves({"stage 1": [(0, 0.1), (1, 0.01)], "stage 2": [(0, 0.0), (1, 0.02)]}, tmp_path / "c.png", "error", "block", "block_rel_mse")
    assert curve.stat().st_size > 1000


def test_the_table_of_other_libraries_has_a_line_a_shape_and_a_column_a_library():
    from lbllm_core.report.kernel_tables import peers_table

    def row(op, m, value, **more):
        return {"name": "kernel_us", "op": op, "n": 64, "k": 32, "m": m, "value": value, **more}

    records = [row("cublas_fp16", 1, 20.0), row("gemlite_a16w2", 1, 10.0, speedup=2.0), row("cublas_fp16", 16, 30.0), {"name": "copy_gb_s", "value": 1.0}]
    lines = peers_table(records).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["N x K", "M", "cuBLAS fp16", "GemLite A16W2"]
    assert "10 us, 2.00x" in lines[2]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["64 x 32", "16", "30 us", ""]
