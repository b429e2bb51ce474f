"""The Triton kernels of training, where there are any; importing Triton takes a second, so it waits until somebody asks.

The imports stand in the source, because a step's fingerprint is read from them (`engine/fingerprint.py`).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


@functools.cache
def kernels() -> Any:
    """`lbllm_kernels.triton_training`, or None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lbllm_kernels import triton_training

    return triton_training


@functools.cache
def compensation() -> Any:
    """`lbllm_kernels.triton_compensate`, or None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lbllm_kernels import triton_compensate

    return triton_compensate


@functools.cache
def divergence() -> Any:
    """`lbllm_kernels.triton_divergence`, or None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lbllm_kernels import triton_divergence

    return triton_divergence


@functools.cache
def entries() -> Any:
    """`lbllm_kernels.triton_entries`, or None where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lbllm_kernels import triton_entries

    return triton_entries
