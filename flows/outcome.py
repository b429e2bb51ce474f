"""The end of `make run`: the table a person waits for, where to look next, and, when asked, the measured times as results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lbllm_core.config import RunConfig
from lbllm_core.report.expected import expectations_plain
from lbllm_core.report.records import write_results
from lbllm_core.report.summary import step_cells
from lbllm_core.report.tables import comparison, plain

UNITS = {"tok_s": "token/s", "minutes": "min", "_bytes": "byte", "_bpw": "bit/weight", "_mb": "MB", "_gb": "GB", "_db": "dB", "_s": "s"}


def print_outcome(config: RunConfig, result: dict[str, Any], home: Path, seconds: float, peak_gb: float) -> None:
    """Result table, minutes a step, and the next places to look."""
    packed = [s for s in result["steps"] if s["step"] == "pack_and_benchmark" and s["row"] == "final"]
    print()
    print(plain(comparison(result["rows"])))
    if config.evaluation.expected:
        print(expectations_plain(result["rows"], config.evaluation))
    print(plain(step_cells(result["steps"])))
    print(f"{seconds / 60:.1f} minutes in all, {peak_gb:.1f} GB at most (all processes)")
    print("\nWhere to look next")
    for step in packed:
        print(f"  the packed model    {home / 'artifacts' / step['step'] / step['key'][:16]}")
    print("  the lab book        make up, then open MLflow's address")
    print("  another model       make run ARGS='model=tiny'")


def record_results(path: Path, config: RunConfig, result: dict[str, Any], seconds: float, peak_gb: float) -> None:
    """Write times, memory and the rows of a run into a results file, in place of earlier records of the same model."""
    context = {"model": config.model.name, "experiment": config.experiment, "seed": config.seed}
    records = [{"name": "step_s", "value": s["minutes"] * 60, "unit": "s", "step": s["step"], "of_row": s["row"], "reused": s["reused"], **context} for s in result["steps"]]
    records += [{"name": "total_s", "value": seconds, "unit": "s", **context}, {"name": "peak_gb", "value": peak_gb, "unit": "GB", "step": "all", **context}]
    for row in result["rows"]:
        figures = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        records += [{"name": name, "value": value, "unit": unit_of(name), "row": row["row"], "scheme": config.scheme.name, **context} for name, value in figures.items()]
    write_results(path, f"make run ARGS='experiment={config.experiment}'", records, keep=lambda record: record.get("model") != config.model.name)


def unit_of(name: str) -> str:
    """The unit that a figure's name promises."""
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), "1")
