"""The table of faults counts what was tried and lists what could not be."""

from __future__ import annotations

from lbllm_core.report.fault_tables import fault_table


def test_rows_and_skips() -> None:
    records = [
        {"name": "fault_trials", "value": 7, "unit": "1", "kind": "kill flow", "commit": "0123456789abcdef"},
        {"name": "fault_failures", "value": 1, "unit": "1", "kind": "kill flow", "commit": "0123456789abcdef"},
        {"name": "fault_trials", "value": 0, "unit": "1", "kind": "clock", "skipped": "libfaketime is not installed"},
        {"name": "bad_inputs", "value": 2104, "unit": "1", "kind": "typed", "commit": "fedcba9876543210"},
        {"name": "bad_input_failures", "value": 0, "unit": "1", "kind": "typed", "commit": "fedcba9876543210"},
    ]
    lines = fault_table(records).splitlines()
    assert "| kill flow | 7 | 1 | 0123456789ab |" in lines
    assert "| bad input: typed | 2104 | 0 | fedcba987654 |" in lines
    assert not [line for line in lines if line.startswith("| clock")]
    assert "Skipped: clock (libfaketime is not installed)." in lines
