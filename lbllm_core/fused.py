"""The Triton kernels that lbllm_core uses, where there is Triton: each function returns a module of lbllm_kernels, or None.

Importing Triton takes a second, so it waits until somebody asks. The imports stand in the source, because a step's fingerprint is read from
them (`engine/fingerprint.py`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernels() -> Any:
    """What training is made of: weights, gradients of levels, norms, rotary embedding, gate, activation quantizer."""
    if not HAS_TRITON:
        return None
    from lbllm_kernels import triton_training

    return triton_training


def compensation() -> Any:
    """One group of error compensation."""
    if not HAS_TRITON:
        return None
    from lbllm_kernels import triton_compensate

    return triton_compensate


def divergence() -> Any:
    """Rows of logits: divergence and gradient."""
    if not HAS_TRITON:
        return None
    from lbllm_kernels import triton_divergence

    return triton_divergence


def entries() -> Any:
    """Each group's best entry of a table."""
    if not HAS_TRITON:
        return None
    from lbllm_kernels import triton_entries

    return triton_entries
