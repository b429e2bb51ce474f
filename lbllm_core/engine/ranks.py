"""Several processes on one sweep, each with a GPU and a share of the sequences: data parallel inside a block.

Rank r of n holds sequences r, r + n, ... and their streams; a step's batch is `batch_size / n` of each rank's own, gradients are averaged, and
every rank makes the same update of the same block. Second moments (stage 1), errors and energies are summed. Only the first rank writes.
With one process (`ALONE`) every method does nothing.

What travels: tensors up to `BUCKET` values go together in one flat buffer a number type, since a message costs more than they do; larger ones
each on their own, all under way at once. An `Exchange` sends the gradient of a weight while those of earlier layers are still being made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

BUCKET = 1 << 20  # values of a tensor up to which it travels with others
PATIENCE = timedelta(minutes=30)  # how long a process waits for the others before it gives up: a block of a large model takes minutes


def join(device: torch.device, patience: timedelta = PATIENCE) -> None:
    """Become one of the processes that torchrun started: NCCL between GPUs, gloo elsewhere. The device is set before anything uses it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", timeout=patience, device_id=device)
    else:
        torch.distributed.init_process_group("gloo", timeout=patience)


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
        if self.size > 1 and tensors:
            averages = torch.distributed.get_backend() == "nccl"
            self._reduce(tensors, "AVG" if averages else "SUM")
            if not averages:
                torch._foreach_div_(list(tensors), self.size)

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
        if self.size == 1:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        alone: list[Tensor] = []
        for t in tensors:
            (alone if t.numel() > BUCKET else small.setdefault(t.dtype, [])).append(t)
        flat = [torch.cat([t.reshape(-1) for t in some]) for some in small.values()]
        operation = getattr(torch.distributed.ReduceOp, how)
        pending = [torch.distributed.all_reduce(t, operation, async_op=True) for t in (*alone, *flat)]
        for work in pending:
            work.wait()
        for some, buffer in zip(small.values(), flat, strict=True):
            for t, part in zip(some, buffer.split([t.numel() for t in some]), strict=True):  # type: ignore[no-untyped-call]
                t.copy_(part.view(t.shape))


ALONE = Ranks()


class Exchange:
    """The averaging of one step's gradients. `follow` sends each as soon as it is complete; `finish` waits, and averages what was not sent."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.pending: dict[int, Any] = {}  # the work by where the gradient lies
        self.begun = False  # whether others have been sent something in this step: then it cannot be made again here alone

    def follow(self, leaves: Sequence[Tensor], passes: int) -> None:
        """Send the gradient of each leaf after the last of so many backward passes. The order is that of the graph, the same on every rank."""
        if self.ranks.size > 1:
            for leaf in leaves:
                leaf.register_post_accumulate_grad_hook(self._after(passes))  # type: ignore[no-untyped-call]

    def _after(self, passes: int) -> Callable[[Tensor], None]:
        left = passes

        def accumulated(leaf: Tensor) -> None:
            nonlocal left
            left -= 1
            grad = leaf.grad
            if left == 0 and grad is not None and grad.is_contiguous():
                self.begun = True
                self.pending[grad.data_ptr()] = torch.distributed.all_reduce(grad, async_op=True)

        return accumulated

    def finish(self, grads: Sequence[Tensor], small: Sequence[Tensor]) -> None:
        """All gradients are averages afterwards."""
        if self.ranks.size == 1:
            return
        self.begun = True
        sent = [g for g in grads if g.data_ptr() in self.pending]
        for work in self.pending.values():
            work.wait()
        if sent:
            torch._foreach_div_(sent, self.ranks.size)
        rest = [g for g in grads if g.data_ptr() not in self.pending]
        self.pending.clear()
        self.ranks.mean_([*rest, *small])
