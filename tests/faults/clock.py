"""The clock of the machine jumps while a run works: a day forward, a month back, to the turn of the year 2038.

libfaketime (`apt-get install faketime`) moves what every program of the run takes for the time of day; the monotonic clock goes on, as it
does when a real clock is set. Programs of its own: a server that another run has started keeps its time.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import RUN, Bench, Skipped, Trial

PLACES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/local/lib/faketime/libfaketimeMT.so.1")
JUMPS = (("a day forward in stage 2", "+0", "+1d"), ("a month back in stage 2", "+0", "-30d"), ("from 2038 back to now in stage 2", "@2038-01-19 03:14:05", "+0"))


def trials(bench: Bench) -> Iterator[Trial]:
    """One run a jump, then the run again by the ordinary clock."""
    found = [path for pattern in PLACES for path in glob.glob(pattern)]
    if not found:
        raise Skipped("libfaketime is not installed (apt-get install faketime)")
    place = Path(tempfile.mkdtemp(prefix="lbllm-clock-"))
    try:
        for number, (what, before, after) in enumerate(JUMPS):
            yield _jump(bench, place / str(number), found[0], what, before, after)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _jump(bench: Bench, home: Path, library: str, what: str, before: str, after: str) -> Trial:
    trial = Trial("clock", what)
    mine = Bench(home, bench.home / "models")
    mine.reference = bench.reference
    file = home.parent / f"{home.name}.clock"
    file.write_text(before)
    run = mine.start(*RUN, LD_PRELOAD=library, FAKETIME_TIMESTAMP_FILE=str(file), FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1", TZ="UTC")
    reached = mine.wait_for_units(run, 4)
    part = file.with_suffix(".part")
    part.write_text(after)
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
