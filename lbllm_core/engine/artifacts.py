"""Artifacts: a step's finished result on disk, and the only way to get one.

    $LBLLM_HOME/artifacts/<step>/<first 16 digits of the key>/     files of the step · timing.json · manifest.json
                                 <first 16 digits of the key>.lock  held while a process builds or checks the folder

    key    = sha256 {step, schema, the config fields the step reads, content digests of its inputs, code, machine facts}
    digest = sha256 {file name: sha256 of the file}, over every file that is a result (measured times are not)

A key says what a result is made *of*; a digest says what it *is*. Dependents are keyed on the digest, so an edit that
changes nothing upstream leaves them cached. The manifest is written last, atomically: a folder without one is unfinished,
and is handed to the step again, which goes on from its own per-block files. A folder with one is checked, file by file,
before every use; one that fails is renamed to `<key>.damaged-<time>` and built anew, never loaded.

Trade-offs: checking costs one read of every file (about a second a gigabyte), which is cheap beside building it. The lock
lies beside the folder, not in it, so that setting a folder aside cannot take the lock away from a process that waits.
What tasks exchange is the `Handle`, a small value; tensors stay on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lbllm_core.config import RunConfig, canonical_json, select
from lbllm_core.engine.files import disk_problem, sha256_file, write_atomic
from lbllm_core.engine.fingerprint import code_fingerprint
from lbllm_core.engine.memory import release, shortage
from lbllm_core.engine.progress import Progress, Report, silent
from lbllm_core.engine.step import Metrics, StepContext, StepSpec
from lbllm_core.errors import ArtifactError, HomeError, MemoryShortage, NumericalError

SCHEMA = 1
MANIFEST = "manifest.json"
ADDRESS_CHARACTERS = ("?", "%")  # a store under such a path would lie elsewhere
NOT_RESULTS = ("manifest.json", "prefect.json", "timing", "benchmark", "damaged-")  # files whose names start so are not content
SMALLER = {  # what a step needs less memory with
    "ptq_init": "shorter sequences (dataset.seq_len)",
    "end_to_end": "end_to_end.micro_batch=1",
    "evaluate_teacher": "evaluation.batch_tokens=2048",
    "evaluate_model": "evaluation.batch_tokens=2048",
}
ALWAYS_VISIBLE = ("experiment", "model.name", "dataset.name", "hardware")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Handle:
    """A finished artifact: which step, made of what (`key`), being what (`digest`), with its figures. `reused`: not built just now."""

    step: str
    key: str
    digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    reused: bool = field(default=False, compare=False)

    def folder(self, home: Path) -> Path:
        """Where its files lie."""
        return folder_of(home, self.step, self.key)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"step": self.step, "key": self.key, "digest": self.digest, "metrics": dict(self.metrics)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Handle:
        """The inverse of `to_dict`."""
        return Handle(values["step"], values["key"], values["digest"], {k: float(v) for k, v in values["metrics"].items()})


def folder_of(home: Path, step: str, key: str) -> Path:
    """The artifact folder of a step and key."""
    return home / "artifacts" / step / key[:16]


def home_folder() -> Path:
    """The home folder that LBLLM_HOME names (`.lbllm` here when it is not set), made ready."""
    return prepare_home(Path(os.environ.get("LBLLM_HOME") or ".lbllm"))


def prepare_home(home: Path) -> Path:
    """The home folder, absolute and writable; a HomeError says why when it cannot be."""
    home = home.expanduser().absolute()
    if any(c in str(home) for c in ADDRESS_CHARACTERS):
        raise HomeError(f"home folder {home}: its path holds one of {' '.join(ADDRESS_CHARACTERS)}, which mean something else in a database's address; set LBLLM_HOME to another")
    try:
        (home / "artifacts").mkdir(parents=True, exist_ok=True)
        probe = home / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise HomeError(f"home folder {home} cannot be written ({error.strerror}); set LBLLM_HOME to a folder that can") from error
    return home


def key_parts(
    spec: StepSpec, config: RunConfig, inputs: Mapping[str, Handle], extra: Mapping[str, str], code: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Everything the result depends on, by name. `extra` holds facts from outside the config: model and data digests, the device.

    `code`: the step's code fingerprint, for a caller that asks for many keys at one moment; None: it is taken now.
    """
    return {
        "step": spec.name,
        "schema": [SCHEMA, spec.schema],
        "fields": json.loads(canonical_json(select(config, spec.fields))),
        "upstream": {role: handle.digest for role, handle in sorted(inputs.items())},
        "code": dict(code_fingerprint(spec.code) if code is None else code),
        "extra": dict(sorted(extra.items())),
    }


def visible(config: RunConfig, fields: Iterable[str]) -> RunConfig:
    """The config as a step sees it: the fields it names, every other one at its default.

    So a field that a step reads but does not name cannot slip into a result past the key. Names, which appear in messages,
    and the hardware, whose meaning here is part of `extra`, stay.
    """
    shown = select(config, [*fields, *ALWAYS_VISIBLE])
    made: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        default = getattr(RunConfig(), spec.name)
        if dataclasses.is_dataclass(default):
            own = {name.partition(".")[2]: value for name, value in shown.items() if name.startswith(f"{spec.name}.")}
            made[spec.name] = dataclasses.replace(default, **own)  # type: ignore[type-var]
        elif spec.name in shown:
            made[spec.name] = shown[spec.name]
    return RunConfig(**made)


def key_of(parts: Mapping[str, Any]) -> str:
    """sha256 (hex) of the parts."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


def run_step(
    spec: StepSpec, config: RunConfig, inputs: Mapping[str, Handle], home: Path, report: Report = silent, extra: Mapping[str, str] | None = None, row: str = "final"
) -> Handle:
    """The step's artifact: the one on disk when it is finished and sound, else built (or continued) now, for this row of the run's table.

    A second process that asks for the same artifact waits for the first and reuses. Raises what the step raises; its
    finished blocks stay for the next attempt.
    """
    parts = key_parts(spec, config, inputs, extra or {})
    key = key_of(parts)
    folder = folder_of(home, spec.name, key)
    with _disk_errors(spec.name, folder), _memory_errors(spec.name), _locked(folder):
        handle = sound(folder)
        if handle is not None:
            log.info("%s: reused %s", spec.name, folder.name)
            return replace(handle, reused=True)
        log.info("%s: %s", spec.name, why_not_cached(parts, home))
        folder.mkdir(parents=True, exist_ok=True)
        with _stopwatch(folder, report) as listener:
            folders = {role: upstream.folder(home) for role, upstream in inputs.items()}
            metrics = spec.run(StepContext(visible(config, spec.fields), folders, folder, home, listener))
        release()
        return _publish(folder, key, parts, inputs, metrics, {"model": config.model.name, "experiment": config.experiment, "seed": config.seed, "row": row})


def sound(folder: Path) -> Handle | None:
    """The handle of a finished artifact whose files are all as published; None when it is unfinished or was damaged.

    A damaged folder is named in a warning and set aside. The caller holds the lock.
    """
    if not (folder / MANIFEST).exists():
        return None
    try:
        return verify(folder)
    except ArtifactError as error:
        aside = folder.with_name(f"{folder.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}")
        folder.rename(aside)
        log.warning("%s: %s; set aside as %s, will be built anew", folder.parent.name, error, aside.name)
        return None


def check_unless_busy(home: Path, step: str, key: str) -> None:
    """Set a damaged artifact aside now, before a cache in front of this one is asked; a folder that is being built is left alone."""
    folder = folder_of(home, step, key)
    if (folder / MANIFEST).exists():
        with contextlib.suppress(Timeout), _lock(folder).acquire(timeout=0):
            sound(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as written. Raises ArtifactError when it is absent, unreadable, or of another schema."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise ArtifactError(f"{folder}: manifest of schema {manifest['schema']}, this version reads {SCHEMA}; remove the folder")
        Handle.from_dict(manifest["handle"])
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}); remove the folder") from error


def verify(folder: Path) -> Handle:
    """The artifact's handle, after every file was compared with the manifest. ArtifactError names the first that differs."""
    manifest = read_manifest(folder)
    handle = Handle.from_dict(manifest["handle"])
    if handle.key[:16] != folder.name or handle.step != folder.parent.name or key_of(manifest["parts"]) != handle.key:
        raise ArtifactError(f"{folder} holds the manifest of another artifact ({handle.step}/{handle.key[:16]})")
    for name, facts in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{folder}: the manifest names {name!r}, which lies outside the folder")
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        if path.stat().st_size != facts["bytes"]:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes instead of {facts['bytes']}")
        if sha256_file(path) != facts["sha256"]:
            raise ArtifactError(f"{path} was altered (its sha256 is not the published one)")
    if _content_digest(manifest["files"]) != handle.digest:
        raise ArtifactError(f"{folder / MANIFEST} was altered (its digest does not match its files)")
    return handle


def why_not_cached(parts: Mapping[str, Any], home: Path) -> str:
    """One line: which parts of the key moved, compared with the most similar finished artifact of the same step."""
    folder = folder_of(home, parts["step"], key_of(parts))
    if folder.is_dir():
        return f"continues the unfinished {folder.name}"
    nearest: list[str] | None = None
    for manifest_file in sorted(folder.parent.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime, reverse=True):
        with contextlib.suppress(ArtifactError):
            moved = _differences(read_manifest(manifest_file.parent)["parts"], parts)
            if nearest is None or len(moved) < len(nearest):
                nearest = moved
    if nearest is None:
        return "not cached: it never ran in this home folder"
    shown = "; ".join(nearest[:4]) + (f"; and {len(nearest) - 4} more" if len(nearest) > 4 else "")
    return f"not cached: {shown or 'the finished one was removed'}"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = [] if old.get("schema") == new["schema"] else ["artifact schema changed"]
    for part, sentence in (("fields", "{name} was {old!r}, is {new!r}"), ("upstream", "input '{name}' changed"), ("code", "code changed: {name}")):
        before, after = old.get(part, {}), new[part]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                found.append(sentence.format(name=name, old=before.get(name), new=after.get(name)))
    before, after = old.get("extra", {}), new["extra"]
    return found + [f"{name} changed" for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]


def _publish(folder: Path, key: str, parts: Mapping[str, Any], inputs: Mapping[str, Handle], metrics: Metrics, made_for: Mapping[str, Any]) -> Handle:
    figures = {name: float(value) for name, value in metrics.items()}
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    if bad:
        raise NumericalError(f"step {parts['step']} ended with {', '.join(bad)} not finite; see its log, and try a lower learning rate")
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(NOT_RESULTS):
            continue
        if path.name.endswith(".tmp"):  # left by an attempt that was killed while it wrote
            path.unlink()
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    handle = Handle(parts["step"], key, _content_digest(files), figures)
    manifest = {
        "schema": SCHEMA,
        "handle": handle.to_dict(),
        "parts": parts,
        "upstream": {role: {"step": h.step, "key": h.key, "digest": h.digest} for role, h in sorted(inputs.items())},
        "files": files,
        "made_for": dict(made_for),  # the run that built it; others may share it, so it is no part of key or digest
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode())
    return handle


def _content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    return hashlib.sha256(canonical_json({name: facts["sha256"] for name, facts in files.items()}).encode()).hexdigest()


def _lock(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f"{folder.name}.lock")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the artifact's lock; say so when another process has it. The kernel frees it when its holder dies."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: another process is building %s; waiting for it", folder.parent.name, folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors(step: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problem = disk_problem(error)
        if not problem:
            raise
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free / 1e9
        raise ArtifactError(f"step {step} could not write to {folder} ({problem}; {free:.1f} GB free); make room, or set LBLLM_HOME elsewhere, and run again: finished blocks are kept") from error


@contextlib.contextmanager
def _memory_errors(step: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "DefaultCPUAllocator" not in str(error):  # torch's; this module does not load torch
            raise
        tried = SMALLER.get(step, "a smaller batch_size")
        raise MemoryShortage(
            f"step {step}: the device has no memory left ({shortage(error)}); finished blocks are kept, the same command goes on from there. Try fewer runs on this device at once, {tried}, or a larger device"
        ) from error


@contextlib.contextmanager
def _stopwatch(folder: Path, report: Report) -> Iterator[Report]:
    """Keep timing.json: seconds of work over all attempts, up to date within a few seconds even when the process is killed."""
    path = folder / "timing.json"
    earlier = read_seconds(folder)
    started = written = time.monotonic()

    def write() -> None:
        seconds = earlier + time.monotonic() - started
        write_atomic(path, json.dumps({"seconds": round(seconds, 3)}).encode())

    def listener(progress: Progress) -> None:
        nonlocal written
        if time.monotonic() - written > 5:
            written = time.monotonic()
            write()
        report(progress)

    try:
        yield listener
    finally:
        with contextlib.suppress(OSError):  # a full disk is reported by the step itself
            write()


def read_seconds(folder: Path) -> float:
    """Seconds of work that went into a folder so far, all attempts together."""
    try:
        return float(json.loads((folder / "timing.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
