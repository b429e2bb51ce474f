"""What a sweep tells: its plan before, its table at the end, why cells failed, and how far it is in between.

Everything here is made from values: forecasts, the sweep's record, and the results that finished runs keep in the home folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.cells import Cell
from flows.sweep_record import CellRecord, SweepRecord, in_work, latest_record, read_record
from lbllm_core.engine.terminal import duration
from lbllm_core.errors import ConfigError
from lbllm_core.forecast import Forecast
from lbllm_core.report.method import method_records, same_row
from lbllm_core.report.records import Record, read_results, write_results
from lbllm_core.report.tables import Cells, counted, plain


@dataclass(frozen=True)
class Planned:
    """A cell, what it would do, and whether it is done already."""

    cell: Cell
    forecast: Forecast
    done: bool


def plan_table(planned: Sequence[Planned]) -> Cells:
    """One line a cell: its steps by state, the time of the missing ones, and what is to be said about it."""
    lines = [["cell", "scheme", "cached", "shared", "missing", "time", ""]]
    for p in planned:
        f = p.forecast
        counts = [str(f.count(state)) for state in ("cached", "shared", "missing")] if f.steps else ["", "", ""]
        remark = "done" if p.done else "cannot run" if f.obstacle else f.note
        lines.append([p.cell.title, p.cell.config.scheme.name, *counts, "" if p.done or f.obstacle else expected_time([f]), remark])
    return lines


def expected_time(forecasts: Sequence[Forecast], overhead: float = 0.0) -> str:
    """`12 min`; `12 min + 3 steps of unknown time`; `unknown`. `overhead`: seconds a cell beside its steps, when measured."""
    known = sum(f.known_seconds + overhead for f in forecasts)
    unknown = sum(f.unknown for f in forecasts)
    if unknown:
        return f"{duration(known)} + {counted(unknown, 'step')} of unknown time" if known else "unknown"
    return duration(known)


def end_table(record: SweepRecord, home: Path) -> Cells:
    """One line a cell: how it ended, its minutes in this sweep, bits, and the first perplexity with its ratio to the teacher's."""
    lines = [["cell", "state", "minutes", "bits a weight", "perplexity", "of the teacher's"]]
    for cell in record.cells:
        figures = final_figures(home, cell.digest) if cell.state in ("finished", "reused") else ["", "", ""]
        lines.append([cell.title, cell.state, f"{cell.minutes:.1f}" if cell.minutes else "", *figures])
    return lines


def failures(record: SweepRecord) -> list[str]:
    """Why cells failed, each reason once, with the cells it stopped and their logs."""
    found: dict[str, list[CellRecord]] = {}
    for cell in record.cells:
        if cell.state == "failed":
            found.setdefault(cell.reason, []).append(cell)
    sentences = []
    for reason, cells_of in found.items():
        logs = "".join(f"\n  its log: {cell.log}" for cell in cells_of if cell.log and cell.log not in reason)
        sentences.append(f"Failed: {', '.join(cell.title for cell in cells_of)}\n  {reason}{logs}")
    return sentences


def final_figures(home: Path, digest: str) -> list[str]:
    """Bits, the perplexity that was asked first, and its ratio to the teacher's, from the kept result of a run; empty where there is none."""
    result = _kept_result(home, digest)
    by_name = {row["row"]: row for row in result.get("rows", [])}
    teacher, final = by_name.get("teacher", {}), by_name.get("final", {})
    name = next((n for n in [*result.get("protocols", []), *sorted(final or teacher)] if n.startswith("ppl_") and n in (final or teacher)), "")
    value, ceiling, bits = final.get(name), teacher.get(name), final.get("effective_bpw")
    shown = f"{name} {value:.2f}" if value is not None else f"{name} {ceiling:.2f} (teacher)" if ceiling is not None else ""
    return [f"{bits:.3f}" if bits is not None else "", shown, f"x{value / ceiling:.3g}" if value is not None and ceiling else ""]


def _kept(home: Path, digest: str) -> Path:
    return home / "results" / digest[:16] / "result.json"


def _kept_result(home: Path, digest: str) -> Mapping[str, Any]:
    """What a run keeps of itself; empty where there is no result."""
    try:
        kept: Mapping[str, Any] = json.loads(_kept(home, digest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept


def check_results_file(path: Path) -> None:
    """Refuse, before anything runs, a file that the rows could not be added to. Raises ConfigError, and ArtifactError for one of another schema."""
    if path.suffix != ".json" or path.is_dir():
        raise ConfigError([f"RECORD={path} is no file that results could be written to; name one that ends in .json, such as results/mine.json"])
    if path.exists():
        read_results(path)


def rows_of(found: Sequence[Cell], record: SweepRecord, home: Path) -> list[Record]:
    """What the finished cells measured, as records for a results file, each with the time of its run."""
    records: list[Record] = []
    for cell, state in zip(found, (c.state for c in record.cells), strict=True):
        rows = _kept_result(home, cell.digest).get("rows", []) if state in ("finished", "reused") else []
        when = datetime.fromtimestamp(_kept(home, cell.digest).stat().st_mtime, UTC).isoformat(timespec="seconds") if rows else ""
        records += [{**r, "measured": {"date": when}} for r in method_records(cell.config, rows)]
    return records


def write_rows(path: Path, found: Sequence[Cell], record: SweepRecord, home: Path) -> bool:
    """Add the rows of the finished cells to a results file, in place of older ones of the same runs; False when there are none."""
    asked = " ".join(f"{key.upper()}={','.join(record.asked[key])}" for key in ("models", "experiments", "seeds") if record.asked[key])
    words = " ".join(record.asked["overrides"])
    rows = rows_of(found, record, home)
    if rows:
        write_results(path, f"make sweep {asked}" + (f" ARGS='{words}'" if words else ""), rows, keep=lambda old: not any(same_row(old, new) for new in rows))
    return bool(rows)


def show_status(home: Path, name: str) -> int:
    """How far a sweep is, from its record; the one worked on last when no name is given."""
    name = name or latest_record(home)
    record = read_record(home, name) if name else None
    if record is None:
        print(f"there is no sweep{f' {name}' if name else ''} in {home} yet; make sweep MODELS=tiny SEEDS=0,1 starts one")
        return 0
    busy = in_work(home, name)
    if not busy:  # what a killed process left
        record = replace(record, cells=tuple(replace(c, state="stopped") if c.state == "running" else c for c in record.cells))
    left = record.seconds_left
    spent = time.time() - record.updated if record.updated else 0.0
    remaining = "" if left is None else f", about {duration(max(0.0, left - spent))} left"
    print(f"Sweep {name}: {'in work' + remaining if busy else 'not in work'}\n")
    print(plain(end_table(record, home)))
    for cell in record.cells:
        if cell.reason:
            print(f"{cell.title} {cell.state}: {cell.reason}")
    if not busy and any(cell.state not in ("finished", "reused") for cell in record.cells):
        print(f"Go on: make sweep-retry SWEEP={name}")
    return 0
