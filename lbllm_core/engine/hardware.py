"""Where a run computes and in which precision: `auto` is resolved here, once.

Matrix products of training run in bf16 where the hardware has matrix units for it (any recent GPU, CPUs with AMX or AVX-512 BF16), else in
float32; masters, norms, losses and everything that decides a code stay in float32. The resolved choice is part of a step's
key, because it changes results.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from lbllm_core.config import HardwareConfig
from lbllm_core.engine.ranks import ALONE, Ranks
from lbllm_core.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """A resolved HardwareConfig."""

    device: torch.device
    compute_dtype: torch.dtype
    ranks: Ranks = ALONE

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Matrix products in the compute type."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def describe(self) -> dict[str, str]:
        """What goes into a step's key."""
        return {"device": self.device.type, "compute_dtype": str(self.compute_dtype).removeprefix("torch.")}


def cpu_has_bf16_units() -> bool:
    """True where bf16 products are several times faster than float32 ones: AMX tiles, or AVX-512's bf16 dot products."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(supported and supported()) for supported in asked)


def resolve(config: HardwareConfig, ranks: Ranks = ALONE) -> Hardware:
    """Hardware for a config. Raises ConfigError when `cuda` is asked for and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["hardware.device=cuda, but this machine has no usable CUDA device; choose hardware.device=cpu or auto"])
    device = torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    fast = device.type == "cuda" or cpu_has_bf16_units()
    wide = config.compute_dtype == "fp32" or (config.compute_dtype == "auto" and not fast)
    return Hardware(device, torch.float32 if wide else torch.bfloat16, ranks)
