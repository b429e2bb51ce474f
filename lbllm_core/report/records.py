"""Results that stay in the repository: `results/<topic>.json`, written by the command that measured.

    {"schema": 1, "command": ..., "commit": ..., "date": ..., "device": ..., "versions": {...},
     "records": [{"name": ..., "value": number, "unit": ..., context...}]}

A figure carries its circumstances: a name with the protocol in it, a unit, and the context (model, scheme, row, ...) that
tells two figures of one name apart.
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

from lbllm_core.errors import ArtifactError

SCHEMA = 1
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
    """Write a results file. `keep` chooses records of the file as it is that stay in front; `device` defaults to processor and cores.

    `measured_with`: versions of the machine that measured, where it was another one than this.

    Raises ArtifactError for a record without name or unit, or with a value that is no finite number.
    """
    found = [dict(r) for r in records]
    for record in found:
        value = record.get("value")
        if not record.get("name") or "unit" not in record or isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ArtifactError(f"{path.name}: the record {record!r} needs a name, a unit and a finite value")
    old = [r for r in read_results(path)["records"] if keep(r)] if path.exists() else []
    content = {
        "schema": SCHEMA,
        "command": command,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device or device_name(),
        "versions": versions() | dict(measured_with),
        "records": old + found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


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
