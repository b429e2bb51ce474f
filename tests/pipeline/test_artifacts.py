"""A step is built once, reused while nothing it reads has moved, and never loaded when its files are not as published."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lbllm_core.config import RunConfig
from lbllm_core.engine import artifacts
from lbllm_core.engine.artifacts import Handle, folder_of, read_manifest, run_step
from lbllm_core.engine.files import disk_errors_told
from lbllm_core.engine.progress import Progress
from lbllm_core.engine.step import Metrics, StepContext, StepSpec
from lbllm_core.errors import ArtifactError, MemoryShortage, NumericalError


def build(context: StepContext) -> Metrics:
    """Three block files, each kept from an earlier attempt; a visible trace of how often the body ran."""
    with (context.home / "runs.txt").open("a") as trace:
        trace.write("run\n")
    for i in range(3):
        path = context.folder / f"block_{i:03d}.bin"
        if not path.exists():
            path.write_bytes(bytes([context.config.seed % 256, i]) * 100)
        context.report(Progress("fake", i + 1, 3))
    (context.folder / "benchmark.json").write_text(str(time.time_ns()))
    return {"loss": 0.5}


SPEC = StepSpec("fake", ("seed", "scheme.group_size"), ("lbllm_core.engine.progress",), build)


def runs(home: Path) -> int:
    trace = home / "runs.txt"
    return len(trace.read_text().splitlines()) if trace.exists() else 0


def test_fresh_then_cached(tmp_path: Path) -> None:
    first = run_step(SPEC, RunConfig(), {}, tmp_path)
    again = run_step(SPEC, RunConfig(), {}, tmp_path)
    assert runs(tmp_path) == 1
    assert again == first
    assert again.reused
    assert not first.reused
    assert Handle.from_dict(json.loads(json.dumps(first.to_dict()))) == first


def test_the_seconds_of_work_are_kept_and_a_reuse_adds_none(tmp_path: Path) -> None:
    slow = replace(SPEC, run=lambda context: time.sleep(0.02) or build(context))
    folder = run_step(slow, RunConfig(), {}, tmp_path).folder(tmp_path)
    seconds = artifacts.read_seconds(folder)
    assert 0.02 <= seconds < 60
    assert run_step(slow, RunConfig(), {}, tmp_path).reused
    assert artifacts.read_seconds(folder) == seconds


def out_of_memory(kind: str) -> None:
    """What torch raises on a GPU that others fill, and on a CPU without memory."""
    if kind == "cpu":
        torch.empty(1 << 60, dtype=torch.uint8)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 21.19 MiB is free. Process 7 has 14.01 GiB memory in use.")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_device_without_memory_is_a_sentence_and_the_step_goes_on_later(kind: str, tmp_path: Path) -> None:
    def short(context: StepContext) -> Metrics:
        (context.folder / "block_000.bin").write_bytes(b"finished")
        out_of_memory(kind)
        return {}

    with pytest.raises(MemoryShortage, match=r"step fake: the device has no memory left \(.*allocate.*\); finished blocks are kept.*fewer runs") as told:
        run_step(replace(SPEC, run=short), RunConfig(), {}, tmp_path)
    assert "Process 7" not in str(told.value)
    assert (run_step(SPEC, RunConfig(), {}, tmp_path).folder(tmp_path) / "block_000.bin").read_bytes() == b"finished"


def test_other_errors_of_a_step_stay_what_they_are(tmp_path: Path) -> None:
    def broken(context: StepContext) -> Metrics:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"^a bug$"):
        run_step(replace(SPEC, run=broken), RunConfig(), {}, tmp_path)


def test_only_fields_that_are_read_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig()
    run_step(SPEC, config, {}, tmp_path)
    run_step(SPEC, replace(config, scheme=replace(config.scheme, act_bits=16)), {}, tmp_path)
    assert runs(tmp_path) == 1
    with caplog.at_level(logging.INFO):
        run_step(SPEC, replace(config, scheme=replace(config.scheme, group_size=16)), {}, tmp_path)
    assert runs(tmp_path) == 2
    assert "scheme.group_size was 32, is 16" in caplog.text


def test_dependents_follow_content_not_keys(tmp_path: Path) -> None:
    child = replace(SPEC, name="child", fields=())
    parent = run_step(SPEC, RunConfig(), {}, tmp_path)
    run_step(child, RunConfig(), {"student": parent}, tmp_path)
    same_content = replace(parent, key="0" * 64)
    assert run_step(child, RunConfig(), {"student": same_content}, tmp_path).reused
    other = run_step(SPEC, RunConfig(seed=1), {}, tmp_path)
    assert other.digest != parent.digest
    assert not run_step(child, RunConfig(), {"student": other}, tmp_path).reused


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "digest", "swap", "escape"])
def test_damage_is_named_set_aside_and_rebuilt(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    first = run_step(SPEC, RunConfig(), {}, tmp_path)
    folder = first.folder(tmp_path)
    block, manifest = folder / "block_001.bin", folder / "manifest.json"
    if harm == "flip":
        data = bytearray(block.read_bytes())
        data[7] ^= 1
        block.write_bytes(data)
    elif harm == "truncate":
        os.truncate(block, 10)
    elif harm == "remove":
        block.unlink()
    elif harm == "manifest":
        os.truncate(manifest, manifest.stat().st_size // 2)
    elif harm == "digest":
        manifest.write_text(manifest.read_text().replace(first.digest, "f" * 64))
    elif harm == "swap":
        other = run_step(SPEC, RunConfig(seed=1), {}, tmp_path).folder(tmp_path)
        manifest.write_bytes((other / "manifest.json").read_bytes())
    else:
        (folder.parent / "outside.bin").write_bytes(b"x")
        manifest.write_text(manifest.read_text().replace('"block_001.bin"', '"../outside.bin"'))
    before = runs(tmp_path)
    again = run_step(SPEC, RunConfig(), {}, tmp_path)
    assert not again.reused
    assert again.digest == first.digest
    assert runs(tmp_path) == before + 1
    assert len(list(folder.parent.glob("*.damaged-*"))) == 1
    assert "set aside" in caplog.text
    named = {"flip": "block_001", "truncate": "block_001", "remove": "block_001", "swap": "another artifact", "escape": "outside"}
    assert named.get(harm, "manifest") in caplog.text


def test_unfinished_folder_goes_on(tmp_path: Path) -> None:
    finished = run_step(SPEC, RunConfig(), {}, tmp_path)
    folder = finished.folder(tmp_path)
    for name in ("manifest.json", "block_002.bin"):
        (folder / name).unlink()
    kept = (folder / "block_000.bin").stat().st_mtime_ns
    (folder / ".block_002.bin.1.tmp").write_bytes(b"half")
    again = run_step(SPEC, RunConfig(), {}, tmp_path)
    assert again.digest == finished.digest
    assert (folder / "block_000.bin").stat().st_mtime_ns == kept
    assert not list(folder.glob("*.tmp"))


def test_failure_keeps_the_folder_unfinished(tmp_path: Path) -> None:
    def breaks(context: StepContext) -> Metrics:
        (context.folder / "block_000.bin").write_bytes(b"done")
        raise NumericalError("block 1: loss is nan")

    with pytest.raises(NumericalError):
        run_step(replace(SPEC, run=breaks), RunConfig(), {}, tmp_path)
    with pytest.raises(NumericalError, match="loss"):
        run_step(replace(SPEC, run=lambda _: {"loss": float("nan")}), RunConfig(), {}, tmp_path)
    (folder,) = (p for p in (tmp_path / "artifacts" / "fake").iterdir() if p.is_dir())
    assert not (folder / "manifest.json").exists()
    assert (folder / "block_000.bin").read_bytes() == b"done"


def test_measured_times_are_not_content(tmp_path: Path) -> None:
    first = run_step(SPEC, RunConfig(), {}, artifacts.prepare_home(tmp_path / "a"))
    second = run_step(SPEC, RunConfig(), {}, artifacts.prepare_home(tmp_path / "b"))
    assert first.digest == second.digest
    assert "benchmark.json" not in read_manifest(first.folder(tmp_path / "a"))["files"]


def _build_slowly(context: StepContext) -> Metrics:
    time.sleep(1.0)
    return build(context)


def _one_of_two(home: str, results: multiprocessing.Queue[tuple[str, bool]]) -> None:
    handle = run_step(replace(SPEC, run=_build_slowly), RunConfig(), {}, Path(home))
    results.put((handle.digest, handle.reused))


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[str, bool]] = context.Queue()
    workers = [context.Process(target=_one_of_two, args=(str(tmp_path), results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert runs(tmp_path) == 1
    assert answers[0][0] == answers[1][0]
    assert sorted(reused for _, reused in answers) == [False, True]


def test_code_change_is_noticed_and_comments_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lbllm_kernels_stub"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def half(x):\n    return x / 2\n")
    (package / "stage.py").write_text("from lbllm_kernels_stub.helper import half\n\ndef one(x):\n    return half(x)\n\ndef two(x):\n    return x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("lbllm_core.engine.fingerprint.FIRST_PARTY", ("lbllm_kernels_stub",))
    from lbllm_core.engine.fingerprint import code_fingerprint

    def both() -> tuple[dict[str, str], dict[str, str]]:
        return code_fingerprint(["lbllm_kernels_stub.stage:one"]), code_fingerprint(["lbllm_kernels_stub.stage:two"])

    one, two = both()
    assert "lbllm_kernels_stub.helper" in one
    assert "lbllm_kernels_stub.helper" not in two
    (package / "helper.py").write_text('"""Now with an essay."""\n# and a comment\ndef half(x):\n    """Half."""\n    return x / 2\n')
    assert both() == (one, two)
    (package / "helper.py").write_text("def half(x):\n    return x * 0.5\n")
    assert both()[0] != one
    assert both()[1] == two
    sys.modules.pop("lbllm_kernels_stub", None)


def test_why_names_the_nearest(tmp_path: Path) -> None:
    for seed in (1, 2):
        run_step(SPEC, RunConfig(seed=seed), {}, tmp_path)
    parts = artifacts.key_parts(SPEC, RunConfig(seed=3), {}, {"device": "cpu"})
    said = artifacts.why_not_cached(parts, tmp_path)
    assert "seed was" in said
    assert "device changed" in said
    assert "never ran" in artifacts.why_not_cached(artifacts.key_parts(replace(SPEC, name="new"), RunConfig(), {}, {}), tmp_path)


def test_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="LBLLM_HOME"):
        artifacts.prepare_home(tmp_path / "file" / "home")
    assert artifacts.prepare_home(tmp_path / "with space" / "ünï").is_dir()


def test_busy_folder_is_left_alone(tmp_path: Path) -> None:
    handle = run_step(SPEC, RunConfig(), {}, tmp_path)
    folder = folder_of(tmp_path, "fake", handle.key)
    (folder / "block_000.bin").write_bytes(b"bad")
    with artifacts._lock(folder):
        artifacts.check_unless_busy(tmp_path, "fake", handle.key)
        assert folder.exists()
    artifacts.check_unless_busy(tmp_path, "fake", handle.key)
    assert not folder.exists()


def test_step_sees_only_what_it_names(tmp_path: Path) -> None:
    seen: list[RunConfig] = []

    def look(context: StepContext) -> Metrics:
        seen.append(context.config)
        return {}

    base = RunConfig(seed=7)
    config = replace(base, scheme=replace(base.scheme, group_size=16, act_bits=16), model=replace(base.model, name="mine"))
    run_step(replace(SPEC, run=look), config, {}, tmp_path)
    assert (seen[0].seed, seen[0].scheme.group_size, seen[0].model.name) == (7, 16, "mine")
    assert seen[0].scheme.act_bits == RunConfig().scheme.act_bits


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system"), RuntimeError("IoError(Os { code: 28, kind: StorageFull })"), Exception("No space left on device (os error 28)")],
)
def test_a_disk_that_takes_no_more_is_a_sentence(error: Exception, tmp_path: Path) -> None:
    """Also where a library in another language put the system's words into an exception of its own."""

    def full(context: StepContext) -> Metrics:
        (context.folder / "block_000.bin").write_bytes(b"done")
        raise error

    with pytest.raises(ArtifactError, match="make room, or set LBLLM_HOME elsewhere"):
        run_step(replace(SPEC, run=full), RunConfig(), {}, tmp_path)
    with pytest.raises(ValueError, match="a bug"):
        run_step(replace(SPEC, run=lambda _: (_ for _ in ()).throw(ValueError("a bug"))), RunConfig(), {}, tmp_path)
    with pytest.raises(ArtifactError, match="could not be written"), disk_errors_told():
        raise error
    with pytest.raises(OSError, match="other"), disk_errors_told():
        raise OSError(errno.ENOENT, "other")
