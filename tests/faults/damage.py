"""Finished work that is not what it was: a bit flipped, a file cut short, two artifacts exchanged; after the end and in the middle of a run.

A damaged artifact is named, set aside and built anew; nothing of it is ever loaded, and the result is that of the undisturbed run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from bench import RUN, Bench, Trial, kill

HARMS = ("bit flipped", "truncated", "swapped with another's file", "swapped with another artifact")
STEPS = ("ptq_init", "weight_distill", "act_quant", "end_to_end", "pack_and_benchmark")


def trials(bench: Bench) -> Iterator[Trial]:
    """Every harm on a finished step that the seed chooses, then on a block of an unfinished one."""
    bench.clear()
    first = bench.start(*RUN)
    assert first.wait() == 0, first.output
    other = bench.start(*RUN, "seed=1")
    assert other.wait() == 0, other.output
    for number, harm in enumerate(HARMS):
        yield _finished(bench, harm, random.Random(number))
    for number, harm in enumerate(HARMS[:3]):
        yield _unfinished(bench, harm, random.Random(number))
    for number, harm in enumerate(HARMS[:3]):
        yield _record(bench, harm, random.Random(number))


def _finished(bench: Bench, harm: str, rng: random.Random) -> Trial:
    step = rng.choice(STEPS)
    keys = {s["step"]: s["key"][:16] for s in bench.reference["steps"] if s["row"] == "final"}
    folder = bench.home / "artifacts" / step / keys[step]
    trial = Trial("damage", f"{harm}: {step}, finished")
    named = _harm(harm, folder, rng)
    run = bench.start(*RUN)
    code = run.wait()
    trial.expect(code == 0, f"exit code {code}: {run.output[-400:]}")
    trial.expect("set aside" in run.output and named in run.output, f"{named} is not named: {run.output[-400:]}")
    trial.expect("Traceback" not in run.output, "a traceback")
    bench.equals_reference(trial)
    built = {f"{s['row']}/{s['step']}" for s in bench.result()["steps"] if not s["reused"]}
    trial.expect(built == {f"final/{step}"}, f"built again: {sorted(built)}")
    return trial


def _unfinished(bench: Bench, harm: str, rng: random.Random) -> Trial:
    """A run is killed in stage 2, a finished block of it damaged, and the run goes on."""
    trial = Trial("damage", f"{harm}: a block of stage 2, unfinished")
    bench.clear()
    run = bench.start(*RUN)
    folder = None
    while folder is None and run.process.poll() is None:
        folder = next((p.parent for p in (bench.home / "artifacts" / "weight_distill").glob("*/block_000.json")), None)
    flow = run.child("flows.once")
    kill([flow] if flow else [])
    run.wait(60)
    if folder is None or (folder / "manifest.json").exists():
        trial.complaints.append("the run was not stopped inside stage 2")
        return trial
    block = folder / "block_000.safetensors"
    upstream = next((bench.home / "artifacts" / "ptq_init").glob("*/block_000.safetensors"))
    _spoil(harm, block, upstream, rng)
    again = bench.start(*RUN)
    bench.same_again(trial, {}, again)
    trial.expect("block_000.safetensors does not match its checksum" in again.output, f"the block is not named: {again.output[-400:]}")
    return trial


def _record(bench: Bench, harm: str, rng: random.Random) -> Trial:
    """Prefect's own record of a finished step, which lies beside the manifest and is none of its files."""
    trial = Trial("damage", f"{harm}: Prefect's record of a step")
    step = rng.choice(STEPS)
    key = next(s["key"][:16] for s in bench.result()["steps"] if s["row"] == "final" and s["step"] == step)
    file = bench.home / "artifacts" / step / key / "prefect.json"
    other = next(p for p in sorted((bench.home / "artifacts").glob("*/*/prefect.json")) if p != file and ".damaged-" not in p.parent.name)
    _spoil(harm, file, other, rng)
    run = bench.start(*RUN)
    bench.same_again(trial, {}, run)
    again = bench.start(*RUN)
    bench.same_again(trial, {}, again)
    trial.expect(all(s["reused"] for s in bench.result()["steps"]), "a step was built again")
    return trial


def _harm(harm: str, folder: Path, rng: random.Random) -> str:
    """Do it, and return a word of the message that must come."""
    files = sorted(p for p in folder.rglob("*.safetensors"))
    if harm == HARMS[3]:
        theirs = next(p for p in sorted(folder.parent.iterdir()) if p.is_dir() and p != folder and ".damaged-" not in p.name)
        aside = folder.with_name("aside")
        folder.rename(aside)
        theirs.rename(folder)
        aside.rename(theirs)
        return "another artifact"
    file = rng.choice(files)
    other = rng.choice([p for p in sorted(folder.parent.parent.rglob("*.safetensors")) if p.read_bytes() != file.read_bytes()])
    _spoil(harm, file, other, rng)
    return file.name


def _spoil(harm: str, file: Path, other: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if harm == HARMS[0]:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif harm == HARMS[1]:
        os.truncate(file, rng.randrange(len(data)))
    else:
        file.write_bytes(other.read_bytes())

