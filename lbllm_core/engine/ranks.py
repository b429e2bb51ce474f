"""Several processes on one sweep, each with a GPU and a share of the sequences: data parallel inside a block.

Rank r of n holds sequences r, r + n, ... and their streams; a step's batch is `batch_size / n` of each rank's own, gradients are averaged, and
every rank makes the same update of the same block. Second moments (stage 1), errors and energies are summed. Only the first rank writes.
With one process (`ALONE`) every method does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size`; torch.distributed is initialised when there are several."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Add up over all ranks, in place."""
        self._reduce(tensors, "SUM")

    def largest_(self, *tensors: Tensor) -> None:
        """Elementwise largest over all ranks, in place."""
        self._reduce(tensors, "MAX")

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average over all ranks, in place."""
        self.sum_(*tensors)
        if self.size > 1:
            for tensor in tensors:
                tensor.div_(self.size)

    def mean(self, value: float, device: torch.device) -> float:
        """Average of a number."""
        if self.size == 1:
            return value
        made = torch.tensor(value, dtype=torch.float64, device=device)
        self.mean_([made])
        return float(made)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def _reduce(self, tensors: Sequence[Tensor], how: str) -> None:
        if self.size > 1:
            pending = [torch.distributed.all_reduce(t, getattr(torch.distributed.ReduceOp, how), async_op=True) for t in tensors]
            for work in pending:
                work.wait()


ALONE = Ranks()
