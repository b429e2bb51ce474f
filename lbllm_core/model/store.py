"""Model folders that this project makes itself: converted once, published whole, checked before use.

Reading a GGUF file takes tens of seconds and training `tiny` about as long, so the result is kept as an ordinary
transformers folder (`model.safetensors`, `config.json`, tokenizer files) under `<home>/models/<name>-<digest16>/`. The
folder is built beside its place and renamed into it, so a killed process leaves no half a model; `files.json`, written
last, holds the sha256 of each file, and a folder that does not match it is set aside and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

MANIFEST = "files.json"
log = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """sha256 (hex) over the names and contents of the files that match, in name order."""
    names = sorted({p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    listing = [[name, file_digest(folder / name)] for name in names]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def damage(folder: Path) -> str:
    """What is wrong with a published folder, as a sentence; empty when every file matches its digest."""
    try:
        listing: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in listing.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_digest(path) != expected:
            return f"{name} does not match its recorded sha256"
    return ""


def published(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build(empty folder)` when it is absent or damaged. Concurrent callers wait for the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            reason = damage(folder)
            if not reason:
                return folder
            log.warning("%s: %s; it is made again", folder, reason)
            shutil.rmtree(folder)
        for leftover in folder.parent.glob(f".{folder.name}.part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
        build(part)
        listing = {p.name: file_digest(p) for p in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(listing, indent=1, sort_keys=True))
        os.replace(part, folder)
    return folder
