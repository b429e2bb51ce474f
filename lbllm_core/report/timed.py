"""Run a command and record how long it took: `python -m lbllm_core.report.timed RESULTS.json NAME -- COMMAND ...`.

For figures that are a whole command's, `test_s` and `install_s`. The record replaces an older one of the same name; its exit code is the command's, and
a command that failed is not recorded. `NAME=SECONDS` before the dashes records a time that was measured elsewhere (the install's own stamp).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lbllm_core.engine.files import write_atomic
from lbllm_core.report.records import head_now, read_results, under, write_results

COMMAND = "make test RECORD=1"


def add(path: Path, seconds: dict[str, float]) -> None:
    """Put times into a results file in place of older ones. Its head stays, and with it what the other figures say of their origin; these carry their own."""
    records = [{"name": name, "value": value, "unit": "s"} for name, value in seconds.items()]
    if not path.exists():
        write_results(path, COMMAND, records)
        return
    content = read_results(path)
    content["records"] = [r for r in content["records"] if r["name"] not in seconds] + under(content, head_now(COMMAND), records)
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the command's exit code."""
    at = list(arguments).index("--")
    path, *names = arguments[:at]
    known = {name: float(value) for name, _, value in (n.partition("=") for n in names) if value}
    began = time.monotonic()
    code = subprocess.run(arguments[at + 1 :], check=False).returncode
    if code == 0:
        add(Path(path), known | {name: round(time.monotonic() - began, 1) for name in names if "=" not in name})
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
