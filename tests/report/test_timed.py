"""Times of whole commands in a results file."""

from __future__ import annotations

import sys

from lbllm_core.report.records import circumstances, read_results, write_results
from lbllm_core.report.timed import main


def test_a_command_is_timed_and_the_other_figures_stay(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_results(path, "make run", [{"name": "total_s", "value": 5.0, "unit": "s"}, {"name": "test_s", "value": 9.0, "unit": "s"}])
    before = read_results(path)
    monkeypatch.setenv("LBLLM_COMMIT", "1" * 40)
    assert main([str(path), "install_s=79", "test_s", "--", sys.executable, "-c", "pass"]) == 0
    after = read_results(path)
    figures = {r["name"]: r["value"] for r in after["records"]}
    assert figures["total_s"] == 5.0
    assert figures["install_s"] == 79.0
    assert 0 <= figures["test_s"] < 9.0
    assert {k: after[k] for k in after if k != "records"} == {k: before[k] for k in before if k != "records"}
    by_name = {r["name"]: circumstances(after, r) for r in after["records"]}
    assert (by_name["test_s"]["command"], by_name["test_s"]["commit"]) == ("make test RECORD=1", "1" * 40)
    assert by_name["total_s"] == circumstances(before, {})


def test_a_command_that_fails_is_not_recorded(tmp_path):
    path = tmp_path / "r.json"
    assert main([str(path), "test_s", "--", sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert not path.exists()
