"""Runs the tests of bad input and counts what they tried: the table as typed, fuzzed overrides, fuzzed packed folders.

A test says how many inputs it tried through pytest's `record_property("inputs", n)`; one that says nothing is one input.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench import ROOT

SUITES = {"typed": "tests/conf/test_bad_input.py", "overrides, fuzzed": "tests/conf/test_fuzz.py", "packed folders, fuzzed": "tests/packed/test_fuzz_folder.py"}


def records() -> tuple[list[dict[str, object]], int]:
    """Records by kind, and how many tests failed."""
    found: list[dict[str, object]] = []
    wrong = 0
    for kind, file in SUITES.items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            environment = os.environ | {"LBLLM_LONG_TESTS": "1"}
            subprocess.run([sys.executable, "-m", "pytest", "-q", file, f"--junitxml={report}", "-o", "junit_family=xunit1"], cwd=ROOT, env=environment, check=False)
            tried, failed = counted(report)
        wrong += failed
        found.append({"name": "bad_inputs", "value": tried, "unit": "1", "kind": kind})
        found.append({"name": "bad_input_failures", "value": failed, "unit": "1", "kind": kind})
        print(f"{tried} bad inputs, {failed} failures: {kind}", flush=True)
    return found, wrong


def counted(report: Path) -> tuple[int, int]:
    """Inputs tried and tests failed in a junit report."""
    tried = failed = 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("skipped") is not None:
            continue
        said = [int(p.get("value", "1")) for p in case.iter("property") if p.get("name") == "inputs"]
        tried += said[0] if said else 1
        failed += case.find("failure") is not None or case.find("error") is not None
    return tried, failed
