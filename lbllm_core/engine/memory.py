"""Memory between steps: what a step has let go of goes back to the system.

The C library keeps freed memory for later; after stage 4 that is some gigabytes, which the next step's child processes would need at the
same time. Where the library can be asked to give it back (glibc), it is; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any


def settle(device: Any) -> None:
    """Give a GPU's cached memory back between phases, whose tensors have other sizes: pieces that fit nothing would add up. A few milliseconds."""
    if device.type == "cuda":
        sys.modules["torch"].cuda.empty_cache()


def shortage(error: Exception) -> str:
    """What torch says of memory that was not there, without its list of all processes."""
    return str(error).partition(". GPU")[0].partition("\n")[0].rstrip(".") or "no memory"


def release() -> None:
    """Collect what is unreachable, and give free pages (and a GPU's cached ones) back."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
