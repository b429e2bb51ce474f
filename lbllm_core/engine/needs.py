"""What the formulas of an estimate share: a step's needs as a value, and counts that follow from shapes.

`F = 2 W + 4 T a` operations a token and block: W weights of the block's seven linears, a = heads x head size, T tokens a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lbllm_core.config import RunConfig
from lbllm_core.engine.passes import tokens_a_pass
from lbllm_core.model.inspect import Shapes
from lbllm_core.model.key_smoothing import STEPS, TOKENS

OVERHEAD = 1.35  # attention, norms and small products do not run at the speed of the probe
SHARD = 1 << 27  # bytes of a shard of hidden states
FIT_BYTES = 90  # fitting keys: a value of a key and step
NUMBER_BYTES: Mapping[str, float] = MappingProxyType({"fp32": 4.0, "bf16": 2.0, "fp8": 1.0})  # of a stored hidden state


@dataclass(frozen=True)
class Work:
    """One step's needs: operations (in float32, in the compute type), bytes of passes, calls, seconds; bytes of memory and disk."""

    fp32: float = 0.0
    compute: float = 0.0
    passes: float = 0.0
    calls: float = 0.0
    hashed: float = 0.0
    seconds: float = 0.0
    host: float = 0.0
    device: float = 0.0  # where it computes: the host's own, when that is the CPU
    disk: float = 0.0
    overhead: float = OVERHEAD  # of operations
    whole_teacher: bool = True  # the teacher is read and hashed as a whole


def forward(s: Shapes, tokens: int) -> float:
    """Operations of one block a token, in sequences of `tokens`."""
    return 2.0 * s.linears + 4.0 * tokens * s.heads * s.head_dim


def pass_tokens(c: RunConfig, s: Shapes) -> int:
    """Tokens of a forward pass over a stream, on the resolved hardware."""
    return tokens_a_pass(s.hidden, c.hardware.device == "cuda")


def streams(c: RunConfig, s: Shapes, sequences: int) -> tuple[float, float, float]:
    """(tokens, bytes of one float32 stream, operations of one forward pass of all of them through all blocks)."""
    tokens = float(sequences * c.dataset.seq_len)
    return tokens, 4.0 * tokens * s.hidden, tokens * s.blocks * forward(s, c.dataset.seq_len)


def level_bytes(c: RunConfig) -> float:
    """Bytes a weight that levels take in a student: float32 in training, stored a group or in a table."""
    return 16.0 / c.scheme.group_size if c.scheme.level_mode == "explicit" else 1.0 / c.scheme.group_size


def key_bytes(c: RunConfig, s: Shapes) -> float:
    """Bytes that move while a 4-bit cache's keys are fitted, in all blocks (stage 1; also for models whose keys are then left alone)."""
    if c.scheme.kv_bits != 4 or not c.ptq_init.key_smoothing:
        return 0.0
    tokens = min(TOKENS, c.ptq_init.sequences * c.dataset.seq_len)
    return float(s.blocks * STEPS * tokens * s.kv_heads * s.head_dim) * FIT_BYTES


def site_sides(s: Shapes) -> tuple[int, int, int, int]:
    """Channels of the four sites."""
    return s.hidden, s.heads * s.head_dim, s.hidden, s.ffn
