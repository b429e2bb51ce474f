"""The end of `make run`: the table a person waits for, where to look next, and, when asked, the measured times as results."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lbllm_core.config import RunConfig
from lbllm_core.engine.files import write_atomic
from lbllm_core.report.summary import aligned, plain_table

PACKAGES = ("torch", "transformers", "prefect", "mlflow", "lm-eval")


def print_outcome(result: dict[str, Any], home: Path, seconds: float, peak_gb: float) -> None:
    """Result table, minutes a step, and the next places to look."""
    steps = [["step", "row", "minutes", ""]]
    steps += [[s["step"], s["row"], f"{s['minutes']:.2f}", "reused" if s["reused"] else ""] for s in result["steps"]]
    packed = next((s for s in reversed(result["steps"]) if s["step"] == "pack_and_benchmark" and s["row"] == "final"), None)
    print()
    print(plain_table(result["rows"]))
    print()
    print(aligned(steps))
    print(f"\n{seconds / 60:.1f} minutes in all, {peak_gb:.1f} GB at most (all processes)")
    print("\nWhere to look next")
    if packed:
        print(f"  the packed model    {home / 'artifacts' / 'pack_and_benchmark' / packed['key'][:16]}")
    print("  the lab book        make up, then open MLflow's address")
    print("  another model       make run ARGS='model=tiny'")


def record_results(path: Path, config: RunConfig, result: dict[str, Any], seconds: float, peak_gb: float) -> None:
    """Write times, memory and the rows of a run as a results file (schema 1). Only steps that were built now have a time."""
    context = {"model": config.model.name, "experiment": config.experiment}
    records = [{"name": "step_s", "value": s["minutes"] * 60, "unit": "s", "step": s["step"], "row": s["row"], "reused": s["reused"], **context} for s in result["steps"]]
    records += [{"name": "total_s", "value": seconds, "unit": "s", **context}, {"name": "peak_gb", "value": peak_gb, "unit": "GB", **context}]
    for row in result["rows"]:
        figures = {k: v for k, v in row.items() if k != "row" and isinstance(v, (int, float))}
        records += [{"name": name, "value": value, "unit": unit_of(name), "row": row["row"], "scheme": config.scheme.name, **context} for name, value in figures.items()]
    write_results(path, f"make run ARGS='experiment={config.experiment}'", records)


def write_results(path: Path, command: str, records: list[dict[str, Any]]) -> None:
    """A results file in the repository's schema. Records of other models that the file holds are kept."""
    models = {r.get("model") for r in records}
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8")).get("records", [])
        records = [r for r in old if r.get("model") not in models or r["name"] in ("install_s", "test_s")] + records
    content = {
        "schema": 1,
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{platform.machine()}, {_cores()} cores",
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "records": records,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")


def unit_of(name: str) -> str:
    """The unit that a figure's name promises."""
    endings = {"_s": "s", "_gb": "GB", "_mb": "MB", "_bytes": "byte", "tok_s": "token/s", "_bpw": "bit/weight", "minutes": "min", "_db": "dB"}
    return next((unit for ending, unit in sorted(endings.items(), key=lambda e: -len(e[0])) if name.endswith(ending)), "1")


def commit() -> str:
    """The checkout's commit, with `+` when files differ from it; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if dirty else "")


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
