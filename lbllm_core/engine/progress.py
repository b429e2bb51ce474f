"""What a long step says while it runs: one value, sent to whoever listens.

A step calls `report(Progress(...))` when its first unit begins, after each block or optimizer step, and, where a block takes
long, while it is worked on. The terminal, the Prefect page and the tests each pass their own listener; the step knows none of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s of `step`, and `share` (0..1) of the next one; `figures` are the numbers of the moment (loss, ...).

    `begins`: units are about to be worked on; those that are done are of an earlier attempt, and time counts from here.
    """

    step: str
    done: int
    total: int
    unit: str = "block"
    figures: Mapping[str, float] = field(default_factory=dict)
    share: float = 0.0
    begins: bool = False

    @property
    def units(self) -> float:
        """Units done, the begun one by its share."""
        return self.done + self.share


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A listener that hears nothing."""
