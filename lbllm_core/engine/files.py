"""Files that are written whole or not at all, and what identifies their content. Needs nothing but the standard library."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lbllm_core.errors import ArtifactError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """`path` holds either its old content or all of `data`, even if the machine stops in between."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_atomic(path, write)


def replace_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """As `write_atomic`, for content that `write` puts into the file it is given."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def disk_problem(error: BaseException) -> str:
    """Why the disk took no more (full, over the quota, read-only); empty for an error of another kind.

    Libraries in other languages (safetensors, tokenizers) put the system's words into an exception of their own.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in NO_ROOM else ""
    return next((os.strerror(number) for number in NO_ROOM if os.strerror(number) in str(error) or f"os error {number}" in str(error) or f"code: {number}," in str(error)), "")


@contextlib.contextmanager
def disk_errors_told() -> Iterator[None]:
    """A disk that takes no more is an ArtifactError with a remedy, wherever it showed; for the entry points."""
    try:
        yield
    except Exception as error:
        problem = "" if isinstance(error, ArtifactError) else disk_problem(error)
        if not problem:
            raise
        place = getattr(error, "filename", None) or "a file"
        raise ArtifactError(f"{place} could not be written ({problem}); make room, or set LBLLM_HOME elsewhere, and run again: finished blocks are kept") from error
