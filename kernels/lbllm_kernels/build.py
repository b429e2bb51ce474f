"""Builds the CPU path: `python -m lbllm_kernels.build`.

**Problem.** The C++ sources must become a shared object on the user's machine, at install, without making a compiler a requirement:
where there is none, the reference path serves and says why.

**How.** One compiler call on `kernels/csrc/*.cpp`. No `-march`: each function names the instructions it needs, and the run-time
asks the processor. `-ffp-contract=off` keeps the quantizer's float operations apart (a fused multiply-add would move codes). The
object's name carries the digest of its sources, so an old one is never loaded for new sources; the file appears by an atomic
rename, so two builds at once do no harm.

**Trade-off.** OpenMP is tried first, because it shares torch's threads; without it the object runs on one thread.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=default")


class BuildError(RuntimeError):
    """The object could not be built; the message holds the reason."""


def source_folder() -> Path | None:
    """`kernels/csrc` beside the package, or None in an installation that carries no sources."""
    folder = PACKAGE.parent / "csrc"
    return folder if (folder / "lut8_cpu.cpp").is_file() else None


def source_digest(folder: Path) -> str:
    """sha256 (first 16 hex digits) over flags, names and contents of the sources."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(folder.glob("*.h")) + sorted(folder.glob("*.cpp")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def object_path(digest: str) -> Path:
    """Where the object of these sources lies."""
    return PACKAGE / f"_lut8_cpu_{digest}.so"


def compiler() -> str | None:
    """The C++ compiler: `CXX` if set, else the first of g++, clang++, c++ on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def build(force: bool = False) -> Path:
    """Build the object unless it is there already; returns its path. Raises BuildError with the reason."""
    folder = source_folder()
    if folder is None:
        raise BuildError("the C++ sources (kernels/csrc) are not part of this installation; install from a checkout")
    digest = source_digest(folder)
    target = object_path(digest)
    if target.is_file() and not force:
        return target
    tool = compiler()
    if tool is None:
        raise BuildError("no C++ compiler found (looked for CXX, g++, clang++, c++); install one, or use the reference path")
    failures = []
    for openmp in (["-fopenmp"], ["-Wno-unknown-pragmas"]):
        try:
            _compile([tool, *FLAGS, *openmp, f'-DLUT8_SOURCE_DIGEST="{digest}"', *map(str, sorted(folder.glob("*.cpp")))], target)
        except BuildError as error:
            failures.append(str(error))
            continue
        _remove_old(target)
        return target
    raise BuildError(failures[-1])


def _compile(command: list[str], target: Path) -> None:
    try:
        handle, name = tempfile.mkstemp(suffix=".so.tmp", dir=target.parent)
    except OSError as error:
        raise BuildError(f"cannot write into {target.parent}: {error.strerror}") from error
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", name], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
            raise BuildError(f"{Path(command[0]).name} failed: {lines[0]}")
        os.chmod(name, 0o755)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_old(keep: Path) -> None:
    for path in keep.parent.glob("_lut8_cpu_*.so"):
        if path != keep:
            path.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """Command line: exit 0 when the object is there, 1 with the reason when it is not (`--optional`: 0 then too)."""
    try:
        print(f"lbllm_kernels: {build(force='--force' in arguments)}")
    except BuildError as error:
        print(f"lbllm_kernels: CPU path not built, the reference path will be used: {error}", file=sys.stderr)
        return 0 if "--optional" in arguments else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
