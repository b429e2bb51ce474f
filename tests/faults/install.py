"""SIGKILL while `make install` works: an environment of unknown state is never taken for a finished one.

The rule of the Makefile is the real one, in a copy of the folder; Python and pip are stand-ins, small scripts that take their time and leave
half-done files behind, so that a trial takes seconds and nothing is downloaded. What is judged: no stamp after the kill, a fresh environment at
the next call, every step of it done. Then the same for the compiler of the CPU kernels, which is the real one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench import ROOT, Bench, Trial, family, kill

FILES = ("Makefile", "pyproject.toml", "constraints.txt", "requirements-data.txt")
MOMENTS = 6
STEPS = 3  # pip itself, the packages, the data
PYTHON = """#!/bin/sh
# stands for python3: makes an environment, as `venv --clear` does
case "$1" in
-c) exit 0;;
esac
rm -rf .venv; mkdir -p .venv/bin; sleep 0.2
cat > .venv/bin/python <<'END'
#!/bin/sh
# stands for the Python of .venv: `-m pip install` takes a second and leaves a half-written file while it works
case "$3" in
--version) [ -e .venv/bin/python ]; exit;;
install) touch .venv/half-written; for i in 1 2 3 4 5; do sleep 0.1; done; rm .venv/half-written; echo done >> .venv/steps;;
esac
END
chmod +x .venv/bin/python
"""


def trials(bench: Bench) -> Iterator[Trial]:
    """Kills at seeded moments of a fresh install, of an update, and of the build."""
    for number in range(MOMENTS):
        yield _install(random.Random(number), update=number % 3 == 2)
    yield _build(random.Random(0))


def _make(place: Path) -> subprocess.Popen[bytes]:
    command = ["make", ".venv/.installed", f"PYTHON={place / 'python3'}"]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _install(rng: random.Random, update: bool) -> Trial:
    delay = rng.uniform(0.0, 1.2 if update else 1.7)  # an undisturbed one takes 1.5 and 1.9 s
    trial = Trial("install", f"killed after {delay:.2f} s of {'an update' if update else 'a fresh install'}")
    place = Path(tempfile.mkdtemp(prefix="lbllm-install-"))
    try:
        for name in FILES:
            shutil.copy(ROOT / name, place / name)
        (place / "python3").write_text(PYTHON)
        (place / "python3").chmod(0o755)
        stamp = place / ".venv" / ".installed"
        if update:
            trial.expect(_make(place).wait(60) == 0, "the first install failed")
            os.utime(place / "pyproject.toml", (time.time() + 2, time.time() + 2))
        run = _make(place)
        time.sleep(delay)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        if update:
            os.utime(place / "pyproject.toml")
        done = (place / ".venv" / "steps").read_text().count("done") if (place / ".venv" / "steps").exists() else 0
        trial.expect(not stamp.exists() or delay < 0.1, "a stamp stands although the install was killed")
        trial.what += f", {done} of pip's steps done"
        trial.expect(_make(place).wait(60) == 0, "the next install failed")
        trial.expect(stamp.exists(), "no stamp after the next install")
        trial.expect(not (place / ".venv" / "half-written").exists(), "a half-written file of the killed install is still there")
        trial.expect((place / ".venv" / "steps").read_text().count("done") == STEPS, "the environment is not a fresh one")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return trial


def _build(rng: random.Random) -> Trial:
    """The compiler is killed: no object that cannot be loaded, and the next build makes one."""
    trial = Trial("install", "killed while the CPU kernels are compiled")
    place = Path(tempfile.mkdtemp(prefix="lbllm-build-"))
    try:
        shutil.copytree(ROOT / "kernels", place / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        environment = os.environ | {"PYTHONPATH": str(place / "kernels")}
        command = [sys.executable, "-m", "lbllm_kernels.build"]
        run = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.uniform(2.0, 5.0))
        trial.expect(run.poll() is None, "the build had ended before its moment")
        kill(family(run.pid))
        run.wait()
        trial.expect(not list((place / "kernels").rglob("*.so")), "an object stands although the build was killed")
        again = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        trial.expect(again.returncode == 0, f"the next build failed: {again.stderr[-300:]}")
        loads = [sys.executable, "-c", "from lbllm_kernels import cpu; cpu.library()"]
        there = subprocess.run(loads, cwd=place, env=environment, capture_output=True, text=True, check=False)
        trial.expect(there.returncode == 0, f"the kernels do not load: {there.stderr[-300:]}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return trial
