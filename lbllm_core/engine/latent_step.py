"""One optimizer step of a large block on a GPU, in bounded passes over its latent weights.

The small block's step (`recorded_step.py`) is a graph of ordinary operations. For hundreds of millions of latent weights each ordinary
operation is a pass over gigabytes, so here the weights leave autograd:

1. each linear's weight is made once (`quantized_weight`) and *held*: micro-batches share it, and its gradient adds up in the compute type;
2. the gradient of the made weight is that of the latent weight (straight-through), and its sums over the weights of a level are that of
   the level (`gradient_sums`). Explicit free levels are sorted, rounded and scaled by the kernel that makes the weight, and get their gradient
   from the one that sums it; tables, other families and the levels of bitmaps go on through autograd, all linears in one call;
3. the norm of all gradients is clipped without waiting for the device; a fused AdamW moves levels and factors, `adamw_` latent weights
   and bitmaps (with the gradient of the polarization, if there is one).

What waits for no number stays on the device: a step has no synchronisation, so the host is ahead of it. Small tensors are taken together
(`torch._foreach_*`), since a launch costs more than they do.

**Several GPUs.** Gradients of weights are averaged while the backward pass still makes those of earlier linears, from the second step on: by
then the largest step has fitted, and memory that runs out amid an exchange cannot be mended by one process alone.

It computes what `RecordedStep` computes up to rounding; `tests/engine/test_latent_step.py` holds one against the other. The update is plain AdamW, betas
(0.9, 0.95), no weight decay, float32 masters and moments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core import fused
from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.ranks import ALONE, Exchange, Ranks
from lbllm_core.errors import MemoryShortage
from lbllm_core.model.fused_block import LARGE, weights_of
from lbllm_core.model.linear import FrozenWeight, LatentBitmapWeight, QuantLinear
from lbllm_core.model.student_block import quant_linears

BETAS = (0.9, 0.95)
EPS = 1e-8
Passes = Callable[[Tensor, Tensor], Tensor]  # forward and backward of a batch, in micro-batches; returns the loss


def suits(block: nn.Module, hardware: Hardware) -> bool:
    """Whether a student block is trained this way: large, on a GPU, groups that tile its weights."""
    large = hardware.device.type == "cuda" and fused.weights() is not None and weights_of(block) >= LARGE
    return large and tiled(block)


def tiled(block: nn.Module) -> bool:
    """Whether every linear's weight is a table of whole groups, with no columns of another kind beside it."""
    return all(linear.outliers is None and fused.weights().fits(_columns(linear), _group_size(linear)) for linear in quant_linears(block).values())


def _columns(linear: QuantLinear) -> int:
    view = linear.weight_view
    return int((view.codes if isinstance(view, FrozenWeight) else view.latent).shape[1])


def _group_size(linear: QuantLinear) -> int:
    view = linear.weight_view
    return view.group_size if isinstance(view, LatentBitmapWeight) else view.store.group_size


@dataclass(frozen=True)
class _Made:
    """One linear's weight in one step: its parts, and how gradients get back to what is learned."""

    source: Tensor  # latent weight, or codes
    bitmap: Tensor | None
    levels: Tensor  # real numbers, ascending where the kernel sorts, `(out, n_groups, 4)`
    graph: Tensor | None  # the same with its autograd graph, where there is one
    learned: tuple[nn.Parameter, Tensor] | None  # levels as stored and the scale, where the kernels do without a graph


class LatentStep:
    """AdamW on a student block; same call as RecordedStep. `passes` runs forward and backward and leaves gradients in `.grad`; `pieces` says in how many passes it takes so many sequences."""

    def __init__(self, block: nn.Module, groups: list[dict[str, Any]], passes: Passes, after: Callable[[], None], grad_clip: float, dtype: torch.dtype, polarize: float = 0.0, betas: tuple[float, float] = (20.0, 2.0), ranks: Ranks = ALONE, pieces: Callable[[int], int] = lambda n: 1):
        self.ranks, self.pieces = ranks, pieces
        self.linears = list(quant_linears(block).values())
        self.passes, self.after, self.grad_clip, self.dtype = passes, after, grad_clip, dtype
        self.polarize, self.beta_range = polarize, betas
        self.rates = {kind: next((float(g["lr"]) for g in groups if g["kind"] == kind), 0.0) for kind in ("weight", "bitmap")}
        small = [g for g in groups if g["kind"] not in self.rates]
        self.base = [float(g["lr"]) for g in small]
        self.optimizer = torch.optim.AdamW(small, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True) if small else None
        self.small: list[nn.Parameter] = [p for g in small for p in g["params"]]
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}
        for linear in self.linears:
            for p in _large(linear.weight_view, self.rates):
                p.requires_grad_(False)  # moved by hand
                self.moments[id(p)] = (torch.zeros_like(p), torch.zeros_like(p))
        self.exchange = Exchange(ranks)
        self.steps = 0

    def __call__(self, factor: float, inputs: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        """One step at `factor` times the base rates; returns the loss before the update, `()`."""
        beta = self.beta_range[0] + (self.beta_range[1] - self.beta_range[0]) * progress if self.polarize else None
        self.exchange.begun = False
        try:
            made = self._weights()
            if self.steps:
                self.exchange.follow([linear.held for linear in self.linears if linear.held is not None], self.pieces(len(inputs)))
            loss = self.passes(inputs, target)
            grads = [_gradient(linear) for linear in self.linears]
            self.exchange.finish(grads, [p.grad for p in self.small if p.grad is not None])
            clip = self._small_gradients(made, grads, beta)
            self._update(factor, made, grads, clip, beta)
        finally:
            for linear in self.linears:
                linear.held = None
        self.after()
        return loss

    def _weights(self) -> list[_Made]:
        """Every linear's weight, held by it."""
        made = []
        for linear, scale in zip(self.linears, _scales(self.linears), strict=True):
            view = linear.weight_view
            source = view.codes if isinstance(view, FrozenWeight) else view.latent
            bitmap = view.bitmap if isinstance(view, LatentBitmapWeight) else None
            learned, graph = None, None
            if isinstance(view, LatentBitmapWeight):
                graph = view.levels * view.unit
            elif scale is None or view.store.levels is None:
                graph = view.store.scaled()
            else:
                learned = (view.store.levels, scale)
            levels = (graph if learned is None else learned[0]).detach()  # type: ignore[union-attr]  # there is one of them
            weight, real = fused.weights().quantized_weight(source.detach(), bitmap, levels, _group_size(linear), self.dtype, None if learned is None else scale)
            linear.held = weight.requires_grad_()
            made.append(_Made(source, bitmap, real, graph, learned))
        return made

    @torch.no_grad()
    def _small_gradients(self, made: list[_Made], grads: list[Tensor], beta: Tensor | None) -> Tensor:
        """Send gradients on to the levels; returns the factor that clips the norm of all."""
        squares = torch.empty(sum(m.levels.numel() // 4 for m in made), device=made[0].levels.device)
        places = squares.split([m.levels.numel() // 4 for m in made])  # type: ignore[no-untyped-call]
        graphs, onward = [], []
        for linear, m, grad, place in zip(self.linears, made, grads, places, strict=True):
            moving = (id(m.source) in self.moments) + (m.bitmap is not None and id(m.bitmap) in self.moments)
            learned = (m.learned[0].detach(), m.learned[1]) if m.learned is not None and m.learned[0].requires_grad else None
            sums, rows = fused.weights().gradient_sums(grad, m.source, m.bitmap, m.levels, _group_size(linear), place, moving, learned, beta, _weight(self.polarize, m.bitmap))
            if learned is not None and m.learned is not None and not isinstance(linear.weight_view, LatentBitmapWeight):
                m.learned[0].grad, linear.weight_view.store.gain.grad = sums, rows
            elif m.graph is not None and m.graph.requires_grad:
                graphs.append(m.graph)
                onward.append(sums)
        if graphs:
            torch.autograd.backward(graphs, onward)
        if not self.grad_clip:
            return torch.ones((), device=squares.device)
        done = {id(m.learned[0]) for m in made if m.learned is not None}  # their squares are among those of the groups
        others = [p.grad for p in self.small if p.grad is not None and id(p) not in done]
        norms = [squares.sum().sqrt(), *torch._foreach_norm(others)] if others else [squares.sum().sqrt()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return (self.grad_clip / (norm + 1e-6)).clamp_max(1.0)

    @torch.no_grad()
    def _update(self, factor: float, made: list[_Made], grads: list[Tensor], clip: Tensor, beta: Tensor | None) -> None:
        self.steps += 1
        if self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = rate * factor
            small = [p.grad for p in self.small if p.grad is not None]
            if self.grad_clip and small:
                torch._foreach_mul_(small, clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        rates = (self.rates["weight"] * factor, self.rates["bitmap"] * factor)
        for linear, m, grad in zip(self.linears, made, grads, strict=True):
            if id(m.source) not in self.moments:
                continue
            pair = self.moments.get(id(m.bitmap)) if m.bitmap is not None else None
            fused.weights().adamw_(
                grad, m.source, self.moments[id(m.source)], m.levels, _group_size(linear), clip, rates, self.steps, BETAS, EPS,
                m.bitmap if pair else None, pair, beta, _weight(self.polarize, m.bitmap),
            )  # fmt: skip

    def forget(self) -> None:
        """After an out-of-memory: no gradient of the broken step stays. Raises MemoryShortage when it was exchanging them with other processes."""
        if self.exchange.begun:
            raise MemoryShortage("the device ran out of memory while gradients were exchanged with other processes. Earlier blocks are kept. Run the same command again with a smaller batch_size, or hardware.hidden_tier=host")
        for p in self.small:
            p.grad = None
        if self.optimizer is not None and not self.steps:
            self.optimizer.state.clear()


def _large(view: Any, rates: dict[str, float]) -> list[nn.Parameter]:
    """The latent weight, if it or a bitmap learns, and the bitmap if it learns."""
    if isinstance(view, FrozenWeight) or not any(rates.values()):
        return []
    return [view.latent, view.bitmap] if isinstance(view, LatentBitmapWeight) and rates["bitmap"] else [view.latent]


def _scales(linears: list[QuantLinear]) -> list[Tensor | None]:
    """Row scales `(out,)` of the linears whose levels are explicit and free, which the kernels sort and round; None for the others."""
    mine = [linear.weight_view.store if not isinstance(linear.weight_view, LatentBitmapWeight) else None for linear in linears]
    plain = [store for store in mine if store is not None and store.levels is not None and store.family == "free"]
    if not plain:
        return [None] * len(linears)
    with torch.no_grad():
        made = torch._foreach_mul(torch._foreach_exp([store.gain for store in plain]), [store.row_scale for store in plain])
    of = {id(store): scale for store, scale in zip(plain, made, strict=True)}
    return [of.get(id(store)) for store in mine]


def _gradient(linear: QuantLinear) -> Tensor:
    assert linear.held is not None
    held = linear.held
    return torch.zeros_like(held) if held.grad is None else held.grad.contiguous()


def _weight(polarize: float, bitmap: Tensor | None) -> float:
    """Weight of one entry in the mean that is regularised; groups are whole here (`tiled`), so every entry stands for a weight."""
    return polarize / bitmap.numel() if bitmap is not None else 0.0
