"""Where a run computes and in which number type: `auto` resolved once, to the same answer for every step.

The answer is part of each step's key, because a product in bf16 and one in fp32 do not give the same model. `auto` takes a
GPU when there is one. Training products are bf16 on a GPU and on CPUs with bf16 matrix units (AMX: several times faster),
fp32 elsewhere; a CPU that only *emulates* bf16 is slower with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lbllm_core.config import HardwareConfig
from lbllm_core.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """A device and the number type of training products there; `name` is the device in words, for reports."""

    device: torch.device
    dtype: torch.dtype
    name: str

    @property
    def dtype_name(self) -> str:
        """`fp32` or `bf16`."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


def resolve(hardware: HardwareConfig) -> Place:
    """The device and number type that a config means on this machine. Raises ConfigError for a GPU that is not there."""
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["hardware.device=cuda, but torch sees no GPU here; choose hardware.device=cpu or auto"])
    on_gpu = hardware.device != "cpu" and torch.cuda.is_available()
    fast_bf16 = on_gpu or "amx_bf16" in _cpu_flags()
    wanted = hardware.compute_dtype if hardware.compute_dtype != "auto" else "bf16" if fast_bf16 else "fp32"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    return Place(device, torch.bfloat16 if wanted == "bf16" else torch.float32, name)


def cpu_name() -> str:
    """The processor as the system names it, with the number of threads that torch uses."""
    return f"{_cpuinfo('model name') or 'CPU'}, {torch.get_num_threads()} threads"


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
