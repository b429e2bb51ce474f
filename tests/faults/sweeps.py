"""Two sweeps at once on the same cells, and the same sweep twice: each cell is built once, and both tell the truth."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bench import SMALL, Bench, Program, Trial

SHARED = [o for o in SMALL if o != "model=tiny"]
BUILT = re.compile(r"lbllm_core\.engine\.artifacts - (\w+): (?:not cached|continues)")


def trials(bench: Bench) -> Iterator[Trial]:
    """Different names, then the same name."""
    trial = Trial("two sweeps", "the same two cells under two names")
    bench.clear()
    first, second = _sweep(bench, "one"), _sweep(bench, "two")
    codes = (first.wait(), second.wait())
    trial.expect(codes == (0, 0), f"exit codes {codes}: {first.output[-400:]} {second.output[-400:]}")
    trial.expect("Traceback" not in first.output + second.output, f"a traceback: {first.log} {second.log}")
    manifests = len(list((bench.home / "artifacts").glob("*/*/manifest.json")))
    built = len(BUILT.findall(first.output + second.output))
    trial.expect(built == manifests, f"{built} builds for {manifests} artifacts")
    trial.expect(not list((bench.home / "artifacts").glob("*/*.damaged-*")), "something was set aside")
    trial.expect("RUNNING" not in bench.rows().values(), "a row is RUNNING")
    bench.same_again(trial, bench.finished_files())
    yield trial

    trial = Trial("two sweeps", "the same sweep twice")
    bench.clear()
    first = _sweep(bench, "three")
    bench.wait_for_units(first, 1)
    second = _sweep(bench, "three")
    codes = (first.wait(), second.wait())
    trial.expect(codes == (0, 1), f"exit codes {codes}")
    trial.expect("another process works on the sweep three" in second.output, f"no word: {second.output[-300:]}")
    trial.expect("Traceback" not in first.output + second.output, "a traceback")
    bench.same_again(trial, bench.finished_files())
    yield trial


def _sweep(bench: Bench, name: str) -> Program:
    return bench.start("-m", "flows.sweep", "--models", "tiny", "--seeds", "0,1", "--sweep", name, "--overrides", *SHARED)
