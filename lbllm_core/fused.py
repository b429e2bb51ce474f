"""The Triton kernels that lbllm_core uses, where there is Triton: each function returns a module of lbllm_kernels, or None.

Importing Triton takes a second, so it waits until somebody asks. The imports stand in the source, because a step's fingerprint is read from
them (`engine/fingerprint.py`).
"""

from __future__ import annotations

import importlib.util
from typing import Any

HAS_TRITON = importlib.util.find_spec("triton") is not None


def weights() -> Any:
    """Weights from latent weights and levels, gradients of levels, AdamW."""
    if not HAS_TRITON:
        return None
    from lbllm_kernels import triton_weights

    return triton_weights


def between_products() -> Any:
    """Norms, rotary embedding, gate."""
    if not HAS_TRITON:
        return None
    from lbllm_kernels import triton_block

    return triton_block


def activations() -> Any:
    """Activations through their codes."""
    if not HAS_TRITON:
        return None
    from lbllm_kernels import triton_activation

    return triton_activation


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
