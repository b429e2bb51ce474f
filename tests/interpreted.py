"""Running a test file once more with Triton's interpreter: Triton decides at import whether it interprets, so that needs a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreted process")
outside = pytest.mark.skipif(INTERPRETED, reason="runs in the outer process")


def run_interpreted(file: str) -> None:
    """The cases of `file` that are marked `inside`; at least one has to pass, none may fail."""
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("older interpreters fail on numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-3000:]
