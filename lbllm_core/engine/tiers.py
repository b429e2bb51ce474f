"""Where the teacher and the hidden states of a sweep go: decided from what is there, before a weight is read.

A block in training needs `BLOCK_BYTES` a weight on the device (master, gradient, two moments, made weight, the teacher's own; twice that with
a bitmap), the teacher `4 P` bytes unless it is streamed, and each of the two streams its bytes in `hardware.hidden_dtype`. The first tier with
room for both streams beside the rest is taken: device, host, disk. On a CPU `device` is host memory.

What a tier must deliver: in stage 2 every stored value is read about `1 + 2 x epochs + 4` times (passes, batches of input and target, error), so

    bytes a second = streams' reads of a block / seconds of a block's training
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbllm_core.config import RunConfig
from lbllm_core.engine import machine
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.hidden_states import StorePlan, choose_tier, stored_bytes
from lbllm_core.errors import PreflightError
from lbllm_core.model.blocks import Decoder
from lbllm_core.model.inspect import Shapes, inspect_model

BLOCK_BYTES = 40.0
KEPT_FREE = 0.85  # the share of what is free that is planned with
SCRATCH = "streams"


@dataclass(frozen=True)
class Tiers:
    """`tier` for `size` bytes of both streams; `reads`: bytes that one block of stage 2 moves."""

    tier: str
    dtype: str
    size: int
    reads: float
    streamed: bool


def streams_teacher(config: RunConfig, shapes: Shapes, hardware: Hardware, device_bytes: float) -> bool:
    """Whether the steps, all but stage 4, read the teacher block by block."""
    if config.hardware.streaming != "auto":
        return config.hardware.streaming == "on"
    return hardware.device.type == "cuda" and 4.0 * shapes.parameters > 0.5 * device_bytes


def choose_streaming(config: RunConfig, hardware: Hardware, home: Path, packed: float = 0.0) -> bool:
    """`streams_teacher` for the machine as it is; or, for a packed model of `packed` bytes, whether that one would half fill the GPU."""
    if config.hardware.streaming != "auto" or hardware.device.type != "cuda":
        return config.hardware.streaming == "on"
    device = machine.limits(hardware, home).device
    return packed > 0.5 * device if packed else streams_teacher(config, inspect_model(config.model, home), hardware, device)


def open_teacher(config: RunConfig, home: Path, hardware: Hardware, whole: bool = False) -> tuple[Decoder, Any]:
    """The teacher on the device, whole or streamed as this configuration and machine want it, and its tokenizer. Raises ModelError."""
    from lbllm_core.model.load import load_teacher
    from lbllm_core.model.streamed import load_streamed

    if not whole and choose_streaming(config, hardware, home):
        return load_streamed(config.model, home, hardware.device)
    teacher = load_teacher(config.model, home)
    return Decoder(teacher.model.to(hardware.device).requires_grad_(False)), teacher.tokenizer


def tiers(config: RunConfig, shapes: Shapes, hardware: Hardware, limits: machine.Limits, size: Sequence[int]) -> Tiers:
    """Where streams `(sequences, tokens, hidden)` of a sweep go. Raises PreflightError when they fit nowhere."""
    streamed = streams_teacher(config, shapes, hardware, limits.device)
    dtype = config.hardware.hidden_dtype
    both = 2 * stored_bytes(size, dtype)
    on_gpu = hardware.device.type == "cuda"
    bitmap = 2.0 if config.weight_distill.parameterization == "latent" else 1.0
    block = bitmap * BLOCK_BYTES * shapes.linears + (0.0 if streamed else 4.0 * shapes.parameters)
    free = limits.device_free if on_gpu else limits.host_free
    host = KEPT_FREE * limits.host_free if on_gpu else 0.0  # on a CPU the device is the host
    tier = config.hardware.hidden_tier
    if tier == "auto":
        tier = choose_tier(both, KEPT_FREE * free - block, host, KEPT_FREE * limits.disk)
    return Tiers(tier, dtype, both, both / 2 * (5 + 2 * config.weight_distill.epochs), streamed)


def resolved(config: RunConfig, shapes: Shapes, hardware: Hardware, limits: machine.Limits) -> tuple[RunConfig, Tiers]:
    """The configuration with `streaming` and `hidden_tier` decided for the largest sweep, and that decision. Raises PreflightError."""
    sequences = max(config.ptq_init.sequences, config.weight_distill.sequences, config.act_quant.sequences)
    found = tiers(config, shapes, hardware, limits, (sequences, config.dataset.seq_len, shapes.hidden))
    decided = replace(config.hardware, device=hardware.device.type, streaming="on" if found.streamed else "off", hidden_tier=found.tier)
    return replace(config, hardware=decided), found


def store_plan(config: RunConfig, hardware: Hardware, home: Path, size: Sequence[int], streamed: bool) -> StorePlan:
    """The plan of a sweep's streams on this machine. Raises PreflightError."""
    folder = home / SCRATCH
    if config.hardware.hidden_tier != "auto":
        return StorePlan(config.hardware.hidden_tier, config.hardware.hidden_dtype, folder)
    limits = machine.limits(hardware, home)
    if 4 * 2 * stored_bytes(size, config.hardware.hidden_dtype) < (limits.device_free or limits.host_free):  # a small run needs no count
        return StorePlan("device", config.hardware.hidden_dtype, folder)
    try:
        shapes = inspect_model(config.model, home)
        return StorePlan(tiers(config, shapes, hardware, limits, size).tier, config.hardware.hidden_dtype, folder)
    except PreflightError:
        if config.hardware.preflight == "refuse":
            raise
        return StorePlan("device", config.hardware.hidden_dtype, folder)  # the user wants to try


def told(found: Tiers, seconds_a_block: float) -> str:
    """One line: bytes, tier, and the bandwidth that the tier must deliver."""
    rate = found.reads / max(seconds_a_block, 1e-9)
    where = {"device": "on the device", "host": "in host memory", "disk": "on disk"}[found.tier]
    need = "" if found.tier == "device" else f"; a block of stage 2 moves {found.reads / 1e9:.0f} GB in about {seconds_a_block:.0f} s, so {found.tier} must deliver {rate / 1e9:.2g} GB/s or it binds"
    return f"hidden states: two streams of {found.size / 2e9:.3g} GB ({found.dtype}) {where}; teacher {'read block by block' if found.streamed else 'whole'}{need}"
