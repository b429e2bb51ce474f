"""One optimizer step as a function that a GPU can replay.

A step of a small model is thousands of kernels of a few microseconds; calling them one by one from Python takes longer than
running them. On a GPU the whole step (forward, backward, clipping, update) is therefore recorded once as a CUDA graph and
replayed: inputs are copied into fixed buffers, learning rates are tensors, moments live where the graph expects them. A batch of
another shape (the last one of an epoch) runs as plain calls of the same function. On a CPU nothing is recorded.

Recording runs the step a few times; parameters and moments are put back afterwards, so it leaves no trace in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine.ranks import ALONE, Ranks

WARM_UP = 3  # plain steps before a graph is recorded: lazy initialisation must not be part of it


class RecordedStep:
    """AdamW over parameter groups with `gradients(*inputs) -> loss` as the differentiable part.

    `gradients` accumulates into `.grad` and returns the loss without a graph; `after` runs when the parameters have moved.
    """

    def __init__(self, groups: list[dict[str, Any]], gradients: Callable[..., Tensor], after: Callable[[], None], grad_clip: float, device: torch.device, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.gradients, self.after, self.grad_clip = gradients, after, grad_clip
        self.on_gpu = device.type == "cuda"
        self.base = [float(g["lr"]) for g in groups]
        if self.on_gpu:  # a recorded step reads its rates from tensors
            groups = [g | {"lr": torch.tensor(g["lr"], device=device)} for g in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=self.on_gpu)
        self.parameters: list[nn.Parameter] = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.graph: Any = None
        self.buffers: tuple[Tensor, ...] = ()
        self.loss: Tensor | None = None

    def __call__(self, factor: float, *inputs: Tensor) -> Tensor:
        """One step at `factor` times the base rates; returns the loss before the update, `()`."""
        for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
            if self.on_gpu:
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor
        if self.on_gpu and self.graph is None and self.ranks.size == 1:
            self._record(inputs)
        if self.loss is None or any(x.shape != b.shape for x, b in zip(inputs, self.buffers, strict=True)):
            return self._plain(inputs)
        for x, buffer in zip(inputs, self.buffers, strict=True):
            buffer.copy_(x)
        self.graph.replay()
        return self.loss

    def _plain(self, inputs: tuple[Tensor, ...]) -> Tensor:
        loss = self.gradients(*inputs)
        self.ranks.mean_([p.grad for p in self.parameters if p.grad is not None])
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after()
        return loss

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        kept = [p.detach().clone() for p in self.parameters]
        moments = {p: {k: v.clone() for k, v in state.items()} for p, state in self.optimizer.state.items()}
        self.buffers = tuple(x.clone() for x in inputs)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._plain(self.buffers)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.empty_cache()  # the graph allocates from a pool of its own
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # threads that fetch hidden states go on
                self.loss = self._plain(self.buffers)
        finally:  # also when the device ran out of memory half-way
            with torch.no_grad():
                for p, before in zip(self.parameters, kept, strict=True):
                    p.copy_(before)
                for parameter, state in self.optimizer.state.items():
                    for name, moment in state.items():
                        moment.copy_(moments[parameter][name]) if parameter in moments else moment.zero_()

    def forget(self) -> None:
        """After an out-of-memory: the recorded graph and the gradients of the broken step go; parameters and moments stay."""
        self.graph, self.buffers, self.loss = None, (), None
        self.optimizer.zero_grad(set_to_none=True)
        if self.on_gpu:
            torch.cuda.empty_cache()
