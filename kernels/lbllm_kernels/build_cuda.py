"""Builds the CUDA path: `python -m lbllm_kernels.build_cuda`.

**Problem.** The CUDA sources must become one shared object ahead of time, where nvcc is; where it is not, other paths serve and say why.

**How.** One nvcc call for each file of `kernels/csrc/cuda` (as many at once as there are processors), one to link. The object holds
machine code for each architecture of `ARCHITECTURES`: 80 serves Ampere and Ada (8.x), 90a Hopper. `-fmad=false` keeps the quantizer's
float operations apart. The run-time library is linked in, so the object depends on no version of it; the name carries the digest of
sources and flags, and the file appears by an atomic rename (as in `build.py`).

**Trade-off.** No PTX is embedded: a newer GPU falls back with a reason instead of compiling at start for a minute.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lbllm_kernels.build import PACKAGE, BuildError

ARCHITECTURES = ("80", "90a")
FLAGS = ("-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC")
PLACES = ("/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc")


def source_folder() -> Path | None:
    """`kernels/csrc/cuda` beside the package, or None in an installation that carries no sources."""
    folder = PACKAGE.parent / "csrc" / "cuda"
    return folder if (folder / "lut8_cuda.cu").is_file() else None


def source_digest(folder: Path) -> str:
    """sha256 (first 16 hex digits) over flags, architectures, names and contents of the sources."""
    digest = hashlib.sha256(" ".join((*FLAGS, *ARCHITECTURES)).encode())
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def object_path(digest: str) -> Path:
    """Where the object of these sources lies."""
    return PACKAGE / f"_lut8_cuda_{digest}.so"


def compiler() -> str | None:
    """nvcc: `NVCC` if set, else on the path, else under `CUDA_HOME`, else in the usual places."""
    if os.environ.get("NVCC"):
        return shutil.which(os.environ["NVCC"])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = ["nvcc", *([f"{home}/bin/nvcc"] if home else []), *PLACES]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def build(force: bool = False) -> Path:
    """Build the object unless it is there already; returns its path. Raises BuildError with the reason."""
    folder = source_folder()
    if folder is None:
        raise BuildError("the CUDA sources (kernels/csrc/cuda) are not part of this installation; install from a checkout")
    target = object_path(source_digest(folder))
    if target.is_file() and not force:
        return target
    tool = compiler()
    if tool is None:
        raise BuildError("no nvcc found (looked for NVCC, the path, CUDA_HOME, /usr/local/cuda); install the CUDA toolkit 12.3 or newer")
    try:
        with tempfile.TemporaryDirectory(prefix=".build_cuda_", dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            _run([tool, "-shared", *compile_sources(tool, folder, Path(scratch)), "-o", str(made)])
            os.replace(made, target)
    except OSError as error:
        raise BuildError(f"cannot write into {target.parent}: {error.strerror}") from error
    for path in target.parent.glob("_lut8_cuda_*.so"):
        if path != target:
            path.unlink(missing_ok=True)
    return target


def compile_sources(tool: str, folder: Path, into: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> list[str]:
    """Compile every .cu file for the architectures; the object files' paths. Raises BuildError."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    sources = sorted(folder.glob("*.cu"))
    objects = [str(into / f"{path.stem}.o") for path in sources]
    commands = [[tool, "-c", *FLAGS, *targets, str(path), "-o", made] for path, made in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(max(1, min(len(commands), os.cpu_count() or 1))) as pool:
        list(pool.map(_run, commands))
    return objects


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        text = (done.stderr + done.stdout).splitlines()
        lines = [line for line in text if "error" in line] or text or ["no message"]
        raise BuildError(f"{Path(command[0]).name} failed: {lines[0]}")


def main(arguments: list[str]) -> int:
    """Command line: exit 0 when the object is there, 1 with the reason when it is not (`--optional`: 0 then too)."""
    try:
        print(f"lbllm_kernels: {build(force='--force' in arguments)}")
    except BuildError as error:
        print(f"lbllm_kernels: CUDA path not built: {error}", file=sys.stderr)
        return 0 if "--optional" in arguments else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
