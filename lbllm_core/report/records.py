"""Results that stay in the repository: `results/<topic>.json`, written by the command that measured.

    {"schema": 1, "command": ..., "commit": ..., "date": ..., "device": ..., "versions": {...},
     "records": [{"name": ..., "value": number, "unit": ..., context...}]}

A figure carries its circumstances: a name with the protocol in it, a unit, and the context (model, scheme, row, ...) that
tells two figures of one name apart. How it was measured (command, commit, date, device, versions) is said once, in the file's head; a record
that came about otherwise, because the file was merged, carries what differs as `measured: {"date": ..., ...}`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from lbllm_core.errors import ArtifactError

SCHEMA = 1
CIRCUMSTANCES = ("command", "commit", "date", "device", "versions")
PACKAGES = ("torch", "transformers", "lm-eval", "triton", "bitsandbytes")
Record = dict[str, Any]


def write_results(
    path: Path,
    command: str,
    records: Sequence[Mapping[str, Any]],
    device: str = "",
    keep: Callable[[Record], bool] = lambda record: False,
    measured_with: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a results file. `keep` chooses records of the file as it is that stay in front, with how they were measured; `device` defaults to processor and cores.

    `measured_with`: versions of the machine that measured, where it was another one than this. A record that was measured otherwise than all that
    may say so itself: `measured`, any of CIRCUMSTANCES.

    Raises ArtifactError for a record without name or unit or with a value that is no finite number, and where the file cannot be read or written.
    """
    found = [dict(r) for r in records]
    for record in found:
        value = record.get("value")
        if not record.get("name") or "unit" not in record or isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ArtifactError(f"{path.name}: the record {record!r} needs a name, a unit and a finite value")
    head = head_now(command, device, measured_with)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # two batches may end in the same moment
            before = read_results(path) if path.exists() else {"records": []}
            stay = [r for r in before["records"] if keep(r)]
            content = {"schema": SCHEMA, **head, "records": under(head, before, stay) + under(head, head, found)}
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written ({error.strerror}); mend that, or name another file") from error


def head_now(command: str, device: str = "", measured_with: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """The circumstances of what this process measures, as a file's head has them; arguments as for `write_results`."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": command, "commit": commit(), "date": date, "device": device or device_name(), "versions": versions() | dict(measured_with)}


def circumstances(head: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """How a record of a file with this head was measured: what it says itself, else what the head says."""
    return {key: head[key] for key in CIRCUMSTANCES if key in head} | dict(record.get("measured", {}))


def under(head: Mapping[str, Any], old: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Records of a file with the head `old` as records of one with `head`: each carries as `measured` what was otherwise for it, and nothing else."""
    moved = []
    for record in records:
        said = {"commit": record["commit"]} if "commit" in record else {}  # where the context names it, as the faults' does
        measured = circumstances(old, {"measured": {**said, **record.get("measured", {})}})
        own = {key: value for key, value in measured.items() if value != head.get(key)}
        moved.append({k: v for k, v in record.items() if k != "measured"} | ({"measured": own} if own else {}))
    return moved


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file. Raises ArtifactError when it is absent, no JSON, or of another schema."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a results file ({type(error).__name__}); write it again with the command that measures") from error
    if content.get("schema") != SCHEMA or not isinstance(content.get("records"), list):
        raise ArtifactError(f"{path} has schema {content.get('schema')!r}, expected {SCHEMA}; write it again with the command that measures")
    return content


def device_name() -> str:
    """What ran: the GPU's name when there is one, and architecture and cores of the processor."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processor = f"{platform.machine()}, {cores} cores"
    return f"{torch.cuda.get_device_name()}; {processor}" if torch.cuda.is_available() else processor


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a figure."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """LBLLM_COMMIT where it is set (a copied tree's own commit is not the one that was copied), else the checkout's, with `+` when tracked files differ from it."""
    told = os.environ.get("LBLLM_COMMIT")
    if told:
        return told
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")
