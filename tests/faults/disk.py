"""A disk that is full, and a home that cannot be written.

The home lies on a small file system of its own (tmpfs), which holds so many kilobytes more than the programs need to start; so it fills up at
different points of the run. Then there is room again, and the same command ends as if nothing had been. A read-only home is the same folder,
mounted so.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import SMALL, Bench, Trial, mount, mounted

FLOW = ("-m", "flows.launch", "run", *SMALL, "hardware.preflight=off")
ROOM = (0, 60, 250)  # kilobytes that are left for the work of the plain run
FLOW_ROOM = (300, 1200)  # the same for a run with its databases and logs, which grow too
KB = 1024


def trials(bench: Bench) -> Iterator[Trial]:
    """Full at several points, without and with Prefect; then read-only."""
    place = Path(tempfile.mkdtemp(prefix="lbllm-disk-"))
    config = place / "run.json"
    config.write_text(bench.stack.call("-m", "flows.launch", "config", *SMALL, "hardware.preflight=off").stdout)
    plain = ("-m", "lbllm_core.run", "--config", str(config))
    try:
        for number, room in enumerate(ROOM):
            yield _full(bench, place / f"plain{number}", plain, room, False)
        for number, room in enumerate(FLOW_ROOM):
            yield _full(bench, place / f"flow{number}", FLOW, room, True)
        yield from _read_only(bench, place, plain)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def used(folder: Path) -> int:
    """Bytes of a folder on tmpfs, where a file takes whole pages."""
    return sum(-(-p.stat().st_size // 4096) * 4096 if p.is_file() else 4096 for p in folder.rglob("*"))


def _full(bench: Bench, home: Path, command: tuple[str, ...], room: int, flow: bool) -> Trial:
    trial = Trial("disk full", f"{'make run' if flow else 'plain run'}, {room} KB left")
    with mounted(home, "-t", "tmpfs", "-o", "size=200m", "lbllm"):
        small = Bench(home, bench.home / "models")
        small.reference = bench.reference
        if flow:  # databases as they are after a first run of something else
            for name in ("mlflow.db", "prefect"):
                source = bench.home / name
                shutil.copytree(source, home / name) if source.is_dir() else shutil.copy(source, home / name)
        mount("-o", f"remount,size={used(home) + room * KB}", str(home))
        run = small.start(*command)
        code = run.wait()
        trial.expect(code in (1, 2), f"exit code {code} on a full disk")
        trial.expect("No space left" in run.output or "disk is full" in run.output, f"no word of the disk: {run.output[-500:]}")
        trial.expect("make room" in run.output, f"no remedy: {run.output[-500:]}")
        trial.expect("Traceback" not in run.output, f"a traceback: {run.log}")
        kept = small.finished_files()
        mount("-o", "remount,size=200m", str(home))
        again = small.start(*command)
        code = again.wait()
        trial.expect(code == 0, f"with room again it ended with {code}: {again.output[-500:]}")
        if flow:
            small.equals_reference(trial)
            small.nothing_runs(trial, 0.0)
        else:
            _equal_artifacts(bench, small, trial)
        lost = [path for path, written in kept.items() if not path.exists() or path.stat().st_mtime_ns != written]
        trial.expect(not lost, f"{len(lost)} of {len(kept)} finished files were written again")
        with contextlib.suppress(AssertionError):
            small.down()
    return trial


def _equal_artifacts(bench: Bench, small: Bench, trial: Trial) -> None:
    """The same artifacts under the same keys; the plain run has no result file to compare."""
    wanted = {(s["step"], s["key"][:16]) for s in bench.reference["steps"] if s["row"] == "final"}
    missing = [key for key in wanted if not (small.home / "artifacts" / key[0] / key[1] / "manifest.json").exists()]
    trial.expect(not missing, f"keys that differ from the undisturbed run's: {missing}")


def _read_only(bench: Bench, place: Path, plain: tuple[str, ...]) -> Iterator[Trial]:
    home = place / "read-only"
    shutil.copytree(bench.home / "models", home / "models", ignore=shutil.ignore_patterns(".*"))
    small = Bench(home)
    (home / "prefect").mkdir()
    for what, folder in (("the whole home", home), ("the folder of one step", home / "artifacts" / "weight_distill")):
        for name, command in (("plain run", plain), ("make run", FLOW)):
            trial = Trial("read-only home", f"{what}, {name}")
            with mounted(folder, "--bind", str(folder)):
                mount("-o", "remount,ro,bind", str(folder))
                run = small.start(*command)
                code = run.wait()
                trial.expect(code in (1, 2), f"exit code {code}")
                trial.expect("Read-only file system" in run.output and "LBLLM_HOME" in run.output, f"no clear word: {run.output[-500:]}")
                trial.expect("Traceback" not in run.output, f"a traceback: {run.log}")
            yield trial
    trial = Trial("read-only home", "writable again")
    small.reference = bench.reference
    small.same_again(trial, small.finished_files(), small.start(*FLOW))
    yield trial
