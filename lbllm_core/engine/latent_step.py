"""One optimizer step of a large block on a GPU, in bounded passes over its latent weights.

The small block's step (`recorded_step.py`) is a graph of ordinary operations. For hundreds of millions of latent weights each ordinary
operation is a pass over gigabytes, so here the weights leave autograd:

1. each linear's weight is made once (`quantized_weight`) and *held*: micro-batches share it, and its gradient adds up in the compute type;
2. the gradient of the made weight is that of the latent weight (straight-through), and its sums over the weights of a level are that of
   the level (`gradient_sums`); only levels, scales and activation factors, a few percent, go on through autograd;
3. the norm of all gradients is clipped without waiting for the device; a fused AdamW moves levels and factors, `adamw_` latent weights
   and bitmaps (with the gradient of the polarization, if there is one).

It computes what `RecordedStep` computes up to rounding; `tests/engine/test_latent_step.py` holds one against the other. The update is plain AdamW, betas
(0.9, 0.95), no weight decay, float32 masters and moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core.engine.hardware import Hardware
from lbllm_core.engine.ranks import ALONE, Ranks
from lbllm_core.fused import kernels
from lbllm_core.model.fused_block import LARGE, weights_of
from lbllm_core.model.linear import FrozenWeight, LatentBitmapWeight, NearestWeight, QuantLinear
from lbllm_core.model.student_block import quant_linears

BETAS = (0.9, 0.95)
EPS = 1e-8
Passes = Callable[[Tensor, Tensor], Tensor]  # forward and backward of a batch, in micro-batches; returns the loss


def suits(block: nn.Module, hardware: Hardware) -> bool:
    """Whether a student block is trained this way: large, on a GPU, groups that tile its weights."""
    large = hardware.device.type == "cuda" and kernels() is not None and weights_of(block) >= LARGE
    return large and tiled(block)


def tiled(block: nn.Module) -> bool:
    """Whether every linear's weight is a table of whole groups, with no columns of another kind beside it."""
    return all(linear.outliers is None and kernels().fits(_columns(linear), _group_size(linear)) for linear in quant_linears(block).values())


def _columns(linear: QuantLinear) -> int:
    view = linear.weight_view
    return int((view.codes if isinstance(view, FrozenWeight) else view.latent).shape[1])


def _group_size(linear: QuantLinear) -> int:
    view = linear.weight_view
    return view.group_size if isinstance(view, LatentBitmapWeight) else view.store.group_size


class LatentStep:
    """AdamW on a student block; same call as RecordedStep. `passes` runs forward and backward and leaves gradients in `.grad`."""

    def __init__(self, block: nn.Module, groups: list[dict[str, Any]], passes: Passes, after: Callable[[], None], grad_clip: float, dtype: torch.dtype, polarize: float = 0.0, betas: tuple[float, float] = (20.0, 2.0), ranks: Ranks = ALONE):
        self.ranks = ranks
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
        self.steps = 0

    def __call__(self, factor: float, inputs: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        """One step at `factor` times the base rates; returns the loss before the update, `()`."""
        levels = []
        beta = self.beta_range[0] + (self.beta_range[1] - self.beta_range[0]) * progress if self.polarize else None
        try:
            for linear in self.linears:
                source, bitmap, scaled = _parts(linear.weight_view)
                levels.append(scaled)
                made = kernels().quantized_weight(source.detach(), bitmap, scaled.detach(), _group_size(linear), self.dtype)
                linear.held = made.requires_grad_()
            loss = self.passes(inputs, target)
            self.ranks.mean_([g for g in (*(linear.held.grad for linear in self.linears if linear.held is not None), *(p.grad for p in self.small)) if g is not None])
            factor_of_clip = self._small_gradients(levels, beta)
            self._update(factor, levels, factor_of_clip, beta)
        finally:
            for linear in self.linears:
                linear.held = None
        self.after()
        return loss

    @torch.no_grad()
    def _small_gradients(self, levels: list[Tensor], beta: Tensor | None) -> Tensor:
        """Send gradients on to the levels; returns the factor that clips the norm of all."""
        squares = []
        for linear, scaled in zip(self.linears, levels, strict=True):
            source, bitmap, _ = _parts(linear.weight_view)
            grad = _gradient(linear)
            sums, square = kernels().gradient_sums(grad, source, bitmap, scaled.detach(), _group_size(linear), beta, _weight(self.polarize, bitmap))
            if id(source) in self.moments or (bitmap is not None and id(bitmap) in self.moments):
                squares.append(square)
            if scaled.requires_grad:
                torch.autograd.backward([scaled], [sums])
        squares += [p.grad.square().sum() for p in self.small if p.grad is not None]
        if not self.grad_clip or not squares:
            return torch.ones((), device=levels[0].device)
        return (self.grad_clip / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp_max(1.0)

    @torch.no_grad()
    def _update(self, factor: float, levels: list[Tensor], clip: Tensor, beta: Tensor | None) -> None:
        self.steps += 1
        if self.optimizer is not None:
            for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = rate * factor
            for p in self.small:
                if p.grad is not None:
                    p.grad.mul_(clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        rates = (self.rates["weight"] * factor, self.rates["bitmap"] * factor)
        for linear, scaled in zip(self.linears, levels, strict=True):
            source, bitmap, _ = _parts(linear.weight_view)
            if id(source) not in self.moments:
                continue
            pair = self.moments.get(id(bitmap)) if bitmap is not None else None
            kernels().adamw_(
                _gradient(linear), source, self.moments[id(source)], scaled.detach(), _group_size(linear), clip, rates, self.steps, BETAS, EPS,
                bitmap if pair else None, pair, beta, _weight(self.polarize, bitmap),
            )  # fmt: skip
            linear.held = None  # its gradient is not needed any more

    def forget(self) -> None:
        """After an out-of-memory: no gradient of the broken step stays."""
        for p in self.small:
            p.grad = None
        if self.optimizer is not None and not self.steps:
            self.optimizer.state.clear()


def _large(view: Any, rates: dict[str, float]) -> list[nn.Parameter]:
    """The latent weight, if it or a bitmap learns, and the bitmap if it learns."""
    if isinstance(view, FrozenWeight) or not any(rates.values()):
        return []
    return [view.latent, view.bitmap] if isinstance(view, LatentBitmapWeight) and rates["bitmap"] else [view.latent]


def _parts(view: NearestWeight | FrozenWeight | LatentBitmapWeight) -> tuple[Tensor, Tensor | None, Tensor]:
    """Where codes come from (latent weight or codes), the bitmap or None, and levels as real numbers with their graph."""
    if isinstance(view, LatentBitmapWeight):
        return view.latent, view.bitmap, view.levels * view.unit
    return (view.codes if isinstance(view, FrozenWeight) else view.latent), None, view.store.scaled()


def _gradient(linear: QuantLinear) -> Tensor:
    assert linear.held is not None
    held = linear.held
    return torch.zeros_like(held) if held.grad is None else held.grad.contiguous()


def _weight(polarize: float, bitmap: Tensor | None) -> float:
    """Weight of one entry in the mean that is regularised."""
    return polarize / bitmap.numel() if bitmap is not None else 0.0
