"""What this machine has and how fast it is, measured in a second: the numbers that a plan of memory and time is held against.

    matmul        floating-point operations a second of a product of the model's own shape, in float32 and in the compute type
    traffic       bytes a second of an elementwise pass over a tensor that no cache holds (read and write counted)
    call          seconds that one small operation costs whatever its size (Python, dispatch, a kernel launch)
    hashing       bytes a second of sha256, which every artifact goes through

On a GPU the product is that of a training step: thousands of tokens, weights in the compute type already, values that differ (constant ones draw
less power and run faster).

Constants of one machine would be wrong on the next; these are measured where the run will be, once a process. Other programs on the
machine make them lower, as they will make the run.

Memory limits are the container's where there is one (cgroup), since what the host has is not what the run may use.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lbllm_core.engine.hardware import Hardware

PROBE_SECONDS = 0.12
PROBE_TOKENS = 512
GPU_TOKENS = 4096
LARGE = 1 << 24  # elements of the tensor that traffic is measured on: 64 MB
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Limits:
    """Bytes: what the run may use of host memory, device memory (0: there is no device) and disk, and what is free of them now."""

    host: int
    host_free: int
    device: int
    device_free: int
    disk: int


@dataclass(frozen=True)
class Rates:
    """Measured speeds: operations a second, bytes a second, seconds a call."""

    matmul_fp32: float
    matmul_compute: float
    traffic: float
    call: float
    hashing: float


def limits(hardware: Hardware, home: Path) -> Limits:
    """What is there. `home` may not exist yet: the nearest folder above it that does is asked."""
    total, available = host_memory()
    host = min([total, *_cgroup_limits()])
    device = free = 0
    if hardware.device.type == "cuda":
        free, device = torch.cuda.mem_get_info(hardware.device)
    place = next(p for p in (home, *home.parents) if p.exists())
    return Limits(host, min(host, available), device, free, shutil.disk_usage(place).free)


def host_memory() -> tuple[int, int]:
    """Bytes of memory: all of it, and what programs could get now (all of it where the system does not say)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if ":" in line)
        return int(lines["MemTotal"].split()[0]) * 1024, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return total, total


def _cgroup_limits() -> list[int]:
    found = []
    for name in CGROUP_LIMITS:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            found.append(int(text))
    return found


@functools.lru_cache(maxsize=16)
def rates(hardware: Hardware, inner: int, outer: int) -> Rates:
    """Speeds for products `(tokens, inner) x (inner, outer)`; about a second the first time, remembered in this process."""
    device, wide, narrow = hardware.device, torch.float32, hardware.compute_dtype
    tokens = GPU_TOKENS if device.type == "cuda" else PROBE_TOKENS
    drawn = torch.Generator(device).manual_seed(0)  # its own: a run's random numbers stay what they are
    x, w = (torch.rand(size, inner, device=device, generator=drawn) - 0.5 for size in (tokens, outer))
    operations = 2.0 * tokens * inner * outer

    with torch.no_grad():
        fp32 = compute = operations / _seconds(lambda: torch.nn.functional.linear(x, w), hardware)
        if narrow != wide and device.type == "cuda":
            made = x.to(narrow), w.to(narrow)
            compute = operations / _seconds(lambda: torch.nn.functional.linear(*made), hardware)
        elif narrow != wide:
            with hardware.autocast():
                compute = operations / _seconds(lambda: torch.nn.functional.linear(x, w), hardware)
        large, small = torch.zeros(LARGE, device=device), torch.zeros(16, device=device)
        traffic = 8.0 * LARGE / _seconds(lambda: large.mul_(1.0), hardware)
        call = _seconds(lambda: small.mul_(1.0), hardware)
    block = b"\0" * (4 << 20)
    return Rates(fp32, compute, traffic, call, len(block) / _seconds(lambda: hashlib.sha256(block).digest(), hardware))


def _seconds(work: Callable[[], object], hardware: Hardware) -> float:
    """Seconds of one call: the mean over PROBE_SECONDS, after one call that does not count."""
    work()
    _wait(hardware)
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < PROBE_SECONDS:
        work()
        calls += 1
        if calls % 16 == 0:
            _wait(hardware)
    _wait(hardware)
    return max((time.perf_counter() - began) / calls, 1e-9)


def _wait(hardware: Hardware) -> None:
    if hardware.device.type == "cuda":
        torch.cuda.synchronize(hardware.device)
