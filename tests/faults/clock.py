"""The clock of the machine jumps while a run works: a day forward, a month back, from the end of 2038's seconds back to now.

A small library (`clock_shim.c`, preloaded) moves what every program of the run takes for the time of day; the monotonic clock goes on, as it
does when a real clock is set. Programs of its own: a server that another run has started keeps its time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import RUN, Bench, Skipped, Trial

DAY = 86400
END_OF_SECONDS = 2**31 - 5
JUMPS = (("a day forward in stage 2", 0, DAY), ("a month back in stage 2", 0, -30 * DAY), ("from 2038 back to now in stage 2", END_OF_SECONDS - int(time.time()), 0))


def trials(bench: Bench) -> Iterator[Trial]:
    """One run a jump, then the run again by the ordinary clock."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        raise Skipped("moving the clock of a program needs Linux and a C compiler")
    place = Path(tempfile.mkdtemp(prefix="lbllm-clock-"))
    try:
        library = place / "clock_shim.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(Path(__file__).with_name("clock_shim.c"))], check=True)
        for number, (what, before, after) in enumerate(JUMPS):
            yield _jump(bench, place / str(number), str(library), what, before, after)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _jump(bench: Bench, home: Path, library: str, what: str, before: int, after: int) -> Trial:
    trial = Trial("clock", what)
    mine = Bench(home, bench.home / "models")
    mine.reference = bench.reference
    file = home.parent / f"{home.name}.clock"
    file.write_text(str(before))
    run = mine.start(*RUN, LD_PRELOAD=library, LBLLM_CLOCK_FILE=str(file))
    reached = mine.wait_for_units(run, 4)
    part = file.with_suffix(".part")
    part.write_text(str(after))
    os.replace(part, file)
    trial.expect(reached, "the run ended before the clock jumped")
    code = run.wait()
    trial.expect(code == 0, f"exit code {code}: {run.output[-600:]}")
    trial.expect("Traceback" not in run.output, f"a traceback: {run.log}")
    mine.equals_reference(trial)
    trial.expect(list(mine.rows().values()) == ["FINISHED"], f"rows: {mine.rows()}")
    for run_id in mine.rows():
        steps = [point[0] for point in mine.history(run_id, "stage4/loss")]
        trial.expect(steps == [1, 2, 3, 4], f"the curve of stage 4 has the steps {steps}")
    mine.same_again(trial, mine.finished_files())
    return trial
