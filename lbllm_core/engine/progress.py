"""What a long step says while it runs: one value, sent to whoever listens.

A step calls `report(Progress(...))` after each block or optimizer step. The terminal, the Prefect page and the tests each
pass their own listener; the step knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s of `step`; `figures` holds the numbers of the moment (loss, tokens_per_s, ...)."""

    step: str
    done: int
    total: int
    unit: str = "block"
    figures: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A listener that hears nothing."""
