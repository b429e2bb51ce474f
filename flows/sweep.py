"""`make sweep`: models x experiments x seeds through the one step cache; only what is missing runs.

    python -m flows.sweep --models llama1,llama2 --experiments ablations --seeds 0,1 [--pool lbllm] [--record results/mine.json] [section.field=value ...]

First the plan: every cell with the steps that are cached, shared with an earlier cell, or missing, and the time these take
(`lbllm_core/forecast.py`). A cell is *done* when all its steps are cached and its row in MLflow is finished under this
sweep's tag; another runs as the flow `lbllm` does, one after the other, each in a process of its own
(`flows/cell_process.py`), or, with a pool, by the workers of a Prefect work pool (`flows/pool_sweep.py`). A cell that fails, or cannot start, does not stop the others. At the end: what each cell came to, why
the failed ones failed and what to do, and where to look in MLflow.

The same words mean the same sweep, so the same command goes on after a kill. One process works on a sweep at a time. The
Prefect runs of a sweep carry its name as a tag, and one whose process is gone is marked as crashed at once.

Exit codes: 0, 1 when a cell failed, 2 for wrong words (nothing was started), 130 when interrupted, 143 when terminated.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from flows import lab_book, prefect_runs, servers
from flows.cell_process import CellEnd, run_cell
from flows.cells import Cell, Request, cells, words
from flows.compose import about
from flows.pool import open_pool
from flows.pool_sweep import PoolSweep, apart
from flows.sweep_record import CellRecord, SweepRecord, checked_name, latest_record, read_record, sweep_lock, write_record
from flows.sweep_report import Planned, check_results_file, end_table, expected_time, failures, plan_table, show_status, write_rows
from lbllm_core.engine.artifacts import home_folder
from lbllm_core.engine.files import disk_errors_told
from lbllm_core.engine.terminal import duration
from lbllm_core.errors import ConfigError, LbllmError
from lbllm_core.forecast import Forecaster
from lbllm_core.report.tables import counted, plain
from tasks.tracking import close_rows, describe_experiment

Show = Callable[[str], None]


class SweepError(LbllmError):
    """Cells failed, or the sweep is being worked on elsewhere."""


def make_plan(found: Sequence[Cell], home: Path, finished: set[str]) -> list[Planned]:
    """Forecast the cells in their order. `finished`: the digests of the rows of this sweep that MLflow calls finished."""
    forecaster = Forecaster(home)
    planned = []
    for cell in found:
        forecast = forecaster.forecast(cell.config)
        complete = bool(forecast.steps) and forecast.count("cached") == len(forecast.steps)
        planned.append(Planned(cell, forecast, complete and (cell.digest in finished or not cell.config.tracking.enabled)))
    return planned


def run_sweep(request: Request, home: Path, show: Show = print, detail: Show = print, pool: str = "", results: Path | None = None) -> SweepRecord:
    """Plan, run what is missing, and tell the end. Raises ConfigError before anything runs, SweepError when another process has it.

    `show` hears the tables, `detail` the output of the cells. `pool`: the work pool whose workers run them; empty: this process does.
    `results`: the results file that the rows of the finished cells are added to.
    """
    name, found = cells(request)
    if results is not None:
        check_results_file(results)
    try:
        with sweep_lock(home, name).acquire(timeout=0):
            record = _Sweep(name, request, found, home, show, detail).run(pool)
    except Timeout:
        raise SweepError(f"another process works on the sweep {name}; wait for it (make sweep-status SWEEP={name}), or give this one a name: SWEEP=name") from None
    if results is not None:
        written = write_rows(results, found, record, home)
        show(f"The rows of the finished cells are in {results}" if written else f"No cell has finished: {results} is as it was")
    return record


class _Sweep:
    """One sweep at work: its cells, its record, and who hears about it."""

    def __init__(self, name: str, request: Request, found: Sequence[Cell], home: Path, show: Show, detail: Show):
        self.name, self.found, self.home, self.show, self.detail = name, found, home, show, detail
        asked = {key: list(getattr(request, key)) for key in ("models", "experiments", "seeds", "overrides")}
        blank = tuple(_blank(cell) for cell in found)
        earlier = read_record(home, name)
        question = request.question or (earlier.question if earlier else "")
        self.record = SweepRecord(name, asked, blank, datetime.now().astimezone().isoformat(timespec="seconds"), question=question)
        self.overheads: list[float] = []

    def run(self, pool: str) -> SweepRecord:
        planned = make_plan(self.found, self.home, self._finished_rows())
        for index, p in enumerate(planned):
            state, reason = ("reused", "") if p.done else ("failed", p.forecast.obstacle) if p.forecast.obstacle else ("planned", "")
            self._note(index, state=state, reason=reason)
        waiting = [index for index, cell in enumerate(self.record.cells) if cell.state == "planned"]
        self.show(f"Sweep {self.name}: {counted(len(planned), 'cell')}, {len(waiting)} to run\n\n{plain(plan_table(planned))}")
        if waiting:
            if any(cell.config.tracking.enabled for cell in self.found):
                describe_experiment(self.home, self.name, _description(self.record))
            self.show(f"Time of what is missing: {expected_time([planned[i].forecast for i in waiting])} (one cell at a time; starting a cell is not counted)")
            if pool:
                sender = PoolSweep(open_pool(self.home, servers.shared_prefect(self.home), pool), self.name, self.home, self._note, self.show)
                needs = [[step.recipe for step in planned[index].forecast.steps if step.state != "cached"] for index in waiting]
                with servers.kept_up(self.home):
                    sender.run({waiting[place]: self.found[waiting[place]] for place in apart(needs)})
            else:
                with servers.prefect_for_this_run(self.home) as port:
                    self._work(waiting, port)
        self._tell()
        return self.record

    def _work(self, waiting: Sequence[int], port: int) -> None:
        url = f"http://{servers.HOST}:{port}/api"
        self._close(url, "the process of this run is gone")
        for place, index in enumerate(waiting):
            self._announce(place, waiting)
            self._note(index, state="running", log=str(self._log(index)))
            try:
                end = run_cell(self.found[index].overrides, servers.environment(self.home, port), self._log(index), self._prefixed(index))
            except BaseException:
                self._note(index, state="stopped", reason="interrupted; the same command goes on from its finished blocks")
                self._close(url, "interrupted")
                raise
            self._ended(index, end, url)

    def _announce(self, place: int, waiting: Sequence[int]) -> None:
        """Which cell comes, and the time left by what is cached now: earlier cells of this sweep have made times known."""
        now = make_plan([self.found[i] for i in waiting[place:]], self.home, set())
        overhead = sum(self.overheads) / len(self.overheads) if self.overheads else 0.0
        this, left = (expected_time([p.forecast for p in part], overhead) for part in (now[:1], now))
        seconds = sum(p.forecast.known_seconds + overhead for p in now)
        self.record = replace(self.record, seconds_left=None if any(p.forecast.unknown for p in now) else seconds)
        more = f", {left} for all {len(now)} that are left" if len(now) > 1 else ""
        self.show(f"Cell {place + 1} of {len(waiting)}: {now[0].cell.title} ({this}{more})")

    def _ended(self, index: int, end: CellEnd, url: str) -> None:
        cell = self.found[index]
        self._note(index, state="failed" if end.reason else "finished", reason=end.reason, minutes=end.seconds / 60)
        if end.reason:
            self._close(url, end.reason)
            self.show(f"{cell.title} failed after {duration(end.seconds)}: {end.reason}")
            return
        built = sum(step["minutes"] for step in end.result["steps"] if not step["reused"]) * 60
        self.overheads.append(max(0.0, end.seconds - built))

    def _close(self, url: str, reason: str) -> None:
        """No cell runs now: whatever Prefect and MLflow still call running was killed."""
        prefect_runs.mark_crashed(url, self.name, reason)
        close_rows(self.home, self.name, reason)

    def _tell(self) -> None:
        """The last words: a table, failures with their remedies, and where to look."""
        self.record = replace(self.record, seconds_left=0.0)
        write_record(self.home, self.record)
        self.show("\n" + plain(end_table(self.record, self.home)))
        for sentence in failures(self.record):
            self.show(sentence)
        rows = lab_book.read_rows(self.home, self.name)
        if rows:
            columns = lab_book.columns_address(self.home, rows, self.name)
            running = servers.running(self.home, "mlflow")
            self.show("In MLflow" + ("" if running else " (not running now: `make up` serves it there)"))
            self.show(f"  compare page   {lab_book.compare_address(self.home, rows)}")
            self.show(f"  filtered list  {lab_book.list_address(self.home, rows, self.name)}")
            if columns:
                self.show(f"  with columns   {columns}")
        self.show(f"Side by side: make compare SWEEP={self.name}")

    def _finished_rows(self) -> set[str]:
        return {row.digest for row in lab_book.read_rows(self.home, self.name) if row.state == "finished"}

    def _note(self, index: int, /, **changes: Any) -> None:
        self.record = replace(self.record.with_cell(index, replace(self.record.cells[index], **changes)), updated=time.time())
        write_record(self.home, self.record)

    def _log(self, index: int) -> Path:
        return self.home / "logs" / "sweeps" / self.name / f"{self.found[index].title.replace(' ', '-')}-{self.found[index].digest[:8]}.log"

    def _prefixed(self, index: int) -> Show:
        front = f"[{index + 1}/{len(self.found)}] "
        return lambda line: self.detail(front + line)


def _description(record: SweepRecord) -> str:
    """What the sweep is to find out, and what its experiments are, for the experiment's page in MLflow (Markdown)."""
    models, experiments = (list(dict.fromkeys(getattr(cell, name) for cell in record.cells)) for name in ("model", "experiment"))
    seeds = list(dict.fromkeys(str(cell.seed) for cell in record.cells))
    told = [f"- `{name}`: {about(name)}" for name in experiments]
    asked = [f"{record.question}\n" if record.question else "", f"Sweep `{record.name}`: {', '.join(models)}; {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}; {counted(len(record.cells), 'cell')}.", *told]
    return "\n".join(line for line in asked if line)


def _blank(cell: Cell) -> CellRecord:
    c = cell.config
    return CellRecord(cell.title, cell.digest, c.model.name, c.experiment, c.scheme.name, c.seed)


def asked_before(home: Path, name: str) -> Request:
    """The request of an earlier sweep, to be made again under its name. ConfigError when there is none."""
    chosen = name or latest_record(home)
    record = read_record(home, chosen) if chosen else None
    if record is None:
        known = ", ".join(sorted(path.stem for path in (home / "sweeps").glob("*.json"))) or "none"
        raise ConfigError([f"SWEEP: there is no sweep {name!r} to retry; sweeps of {home}: {known}"])
    return Request(**{key: tuple(values) for key, values in record.asked.items()}, name=record.name, question=record.question)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description="Run models x experiments x seeds; only what is missing.")
    parser.add_argument("action", nargs="?", choices=("run", "status", "retry"), default="run")
    for option in ("models", "experiments", "seeds"):
        parser.add_argument(f"--{option}", default="", help="words separated by commas or blanks")
    parser.add_argument("--sweep", default="", help="the sweep's name; without it the words name it")
    parser.add_argument("--question", default="", help="what it is to find out: its description in MLflow and in the report")
    parser.add_argument("--pool", default="", help="a Prefect work pool whose workers run the cells (several machines); without it this process does")
    parser.add_argument("--record", default="", help="a results file (.json) to add the rows of the finished cells to; `make tables` fills pages from such files")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.field=value", help="for every cell")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cell is stopped
    try:
        with disk_errors_told():
            home = home_folder()
        name = checked_name(chosen.sweep) if chosen.sweep and chosen.action != "run" else chosen.sweep  # a run tells all problems at once
        if chosen.action == "status":
            return show_status(home, name)
        typed = Request(words(chosen.models), words(chosen.experiments), words(chosen.seeds), tuple(chosen.overrides), name, chosen.question)
        with disk_errors_told():
            record = run_sweep(asked_before(home, name) if chosen.action == "retry" else typed, home, _print, _print, chosen.pool, Path(chosen.record) if chosen.record else None)
    except LbllmError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit) as stop:
        print("\ninterrupted; finished blocks and steps are kept, the same command goes on from there", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    return 1 if any(cell.state == "failed" for cell in record.cells) else 0


def _print(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
