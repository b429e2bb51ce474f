"""The table of what was broken on purpose: trials and failures by kind, and bad inputs, from `results/faults.json`.

A kind that the machine could not do is listed with its reason, so that a row that is missing cannot be taken for a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lbllm_core.report.tables import markdown

COUNTS = (("fault_trials", "fault_failures"), ("bad_inputs", "bad_input_failures"))


def fault_table(records: Sequence[Mapping[str, Any]]) -> str:
    """A row a kind: how often it was tried, how often something was wrong, at which commit."""
    lines = [["what", "tried", "failures", "commit"]]
    for tried, failed in COUNTS:
        failures = {r["kind"]: r for r in records if r["name"] == failed}
        for record in records:
            if record["name"] == tried and record["kind"] in failures:
                kind = record["kind"] if tried == "fault_trials" else f"bad input: {record['kind']}"
                lines.append([kind, f"{record['value']:g}", f"{failures[record['kind']]['value']:g}", str(record.get("commit", ""))[:12]])
    skipped = [f"\nSkipped: {r['kind']} ({r['skipped']})." for r in records if r.get("skipped")]
    return markdown(lines) + "".join(f"{line}\n" for line in skipped)
