"""Linear layers whose W(1+1) weight can be trained.

Three views of one weight, all giving `W_q (out, in)` in the forward pass:

- `NearestWeight`: a latent full-precision weight; the code of each weight is its nearest level. Gradient to the latent weight
  is straight-through; gradient to a level is the sum over the weights that hold it. Both codes and levels move (stage 2).
- `FrozenWeight`: codes are fixed, only the levels (or the table and the row scales) move (stages 3 and 4).
- `LatentBitmapWeight`: the paper's own (arXiv 2604.19167, eqs. 3, 6): latent W gives the binary bit, latent G in [0, 1] the
  bitmap bit, each straight-through; (alpha, mu) are the four levels in another coordinate system.

Levels are learned as fractions of the row's largest (levels / 127) and row scales as exponents of a gain, so that one learning
rate means the same relative step in every row of every model. Levels are rounded to the int8 grid of the packed format inside
the forward pass (straight-through), so that what is trained is what will be packed and the final snap changes nothing; the
controls round to what their family can store (`quant/uniform.py`); the family `real` leaves them unrounded until they are packed. A table may be shared by the linears of a site: it is
the same `nn.Parameter` object in each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lbllm_core import fused
from lbllm_core.quant.uniform import projected, to_family_grid
from lbllm_core.quant.weight import (
    GRID,
    OutlierColumns,
    QuantizedWeight,
    from_real_levels,
    group_levels,
    into_cells,
    join_groups,
    midpoints,
    nearest_codes,
    split_groups,
    take_levels,
)


def _sums_by_code(grad: Tensor, codes: Tensor) -> Tensor:
    """What each level of a group receives: grad, codes `(..., G)` -> `(..., 4)`. The last is the rest of the total."""
    sums = [(grad * (codes == c)).sum(-1) for c in range(3)]
    return torch.stack([*sums, grad.sum(-1) - sums[0] - sums[1] - sums[2]], dim=-1)


class _Select(torch.autograd.Function):
    """`levels[code]`; gradients: identity to the latent weight, sums over holders to the levels."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return take_levels(levels, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (codes,) = ctx.saved_tensors
        to_levels = None
        if ctx.needs_input_grad[1]:
            to_levels = _sums_by_code(grad, codes)
        return (grad if ctx.needs_input_grad[0] else None), to_levels, None


class _FusedSelect(torch.autograd.Function):
    """Nearest levels (`source`: latent weights) or given codes (`source`: codes), `(out, in)`: one kernel each way, for a GPU."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, levels: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(source, levels)
        ctx.group_size = group_size
        return fused.weights().quantized_weight(source, None, levels, group_size, dtype)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        source, levels = ctx.saved_tensors
        grad, to_levels = grad.contiguous(), None
        if ctx.needs_input_grad[1]:
            to_levels, _ = fused.weights().gradient_sums(grad, source, None, levels, ctx.group_size, levels.new_empty(levels.numel() // 4), 0)
        return grad.float() if ctx.needs_input_grad[0] else None, to_levels, None, None


class _FusedLearned(torch.autograd.Function):
    """The same from free levels as they are learned: explicit ones `(out, n_groups, 4)` or a table `(entries, 4)`, and gains `(out,)`."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, learned: Tensor, gain: Tensor, store: _LevelStore, dtype: torch.dtype) -> Tensor:
        scale = store.row_scale * gain.exp()
        made, levels = fused.weights().quantized_weight(source, None, learned, store.group_size, dtype, scale, store.group_codes)
        ctx.save_for_backward(source, learned, levels, scale)
        ctx.store = store
        return made  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        source, learned, levels, scale = ctx.saved_tensors
        grad, store, to_levels, to_gain = grad.contiguous(), ctx.store, None, None
        if any(ctx.needs_input_grad[1:3]):
            unused = levels.new_empty(levels.numel() // 4)
            to_levels, to_gain = fused.weights().gradient_sums(grad, source, None, levels, store.group_size, unused, 0, (learned, scale), group_codes=store.group_codes)
            if store.group_codes is not None:
                to_levels = fused.weights().entry_sums(to_levels, *store.groups_by_entry())
        return grad.float() if ctx.needs_input_grad[0] else None, to_levels, to_gain, None, None


def fusable(source: Tensor, group_size: int) -> bool:
    """Whether one kernel makes a weight `(out, in)`: on a GPU, in whole groups."""
    return source.is_cuda and fused.weights() is not None and bool(fused.weights().fits(source.shape[1], group_size))


def _selected(source: Tensor, store: _LevelStore) -> Tensor | None:
    """The made weight by one kernel, in the type that products take it in; None where that kernel does not apply."""
    if not fusable(source, store.group_size):
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
    if store.family == "free":
        learned = store.table if store.levels is None else store.levels
        return _FusedLearned.apply(source, learned, store.gain, store, dtype)  # type: ignore[no-any-return, no-untyped-call]
    return _FusedSelect.apply(source, store.scaled(), store.group_size, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Through(torch.autograd.Function):
    """The first argument's value with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def grid_ste(levels: Tensor, family: str = "free") -> Tensor:
    """Ascending levels as their family will store them; the gradient is that of the identity (of the projection, where steps are equal)."""
    if family == "real":
        return _Through.apply(levels.detach().clamp(-GRID, GRID), levels)  # type: ignore[no-any-return, no-untyped-call]
    return _Through.apply(to_family_grid(levels.detach(), family), projected(levels, family))  # type: ignore[no-any-return, no-untyped-call]


class _LevelStore(nn.Module):
    """Levels of one linear in units of its row scale: explicit, or a (shared) table with fixed group codes."""

    group_codes: Tensor | None
    row_scale: Tensor

    def __init__(self, q: QuantizedWeight, table: nn.Parameter | None, family: str):
        super().__init__()
        self.family = family
        self.register_buffer("row_scale", q.row_scale)
        self.gain = nn.Parameter(torch.zeros_like(q.row_scale))
        self.group_size = q.group_size
        self._by_entry: tuple[Tensor, Tensor] | None = None
        if q.levels is not None:
            self.levels: nn.Parameter | None = nn.Parameter((q.levels / GRID).contiguous())
            self.table: nn.Parameter | None = None
            self.register_buffer("group_codes", None)
        else:
            assert table is not None
            assert q.group_codes is not None
            self.levels, self.table = None, table
            self.register_buffer("group_codes", q.group_codes)

    def units(self) -> Tensor:
        """Levels on the int8 grid, ascending, `(out, n_groups, 4)`, with gradients to whatever holds them."""
        if self.levels is not None:
            return grid_ste(self.levels.sort(dim=-1).values * GRID, self.family)
        assert self.group_codes is not None
        ordered = self.entries()
        flat = ordered.index_select(0, self.group_codes.flatten().int())
        return flat.view(*self.group_codes.shape, 4)

    def entries(self) -> Tensor:
        """The table on the int8 grid, each entry ascending, `(entries, 4)`."""
        assert self.table is not None
        return grid_ste(self.table.sort(dim=-1).values * GRID, self.family)

    def groups_by_entry(self) -> tuple[Tensor, Tensor]:
        """The groups in the order of the entries that they pick `(groups,)`, and where each entry's begin `(entries + 1,)`; int32."""
        if self._by_entry is None:
            assert self.table is not None
            assert self.group_codes is not None
            codes = self.group_codes.flatten().int()
            ends = torch.bincount(codes, minlength=len(self.table)).cumsum(0)
            self._by_entry = codes.argsort(stable=True).int(), torch.cat([ends.new_zeros(1), ends]).int()
        return self._by_entry

    def scaled(self) -> Tensor:
        """Levels as real numbers, `(out, n_groups, 4)`."""
        return self.units() * self.scale()[:, None, None]

    def scale(self) -> Tensor:
        """Row scales `(out,)`."""
        return self.row_scale * self.gain.exp()

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        """The current value as a plain QuantizedWeight with the given codes."""
        scale = self.scale().detach().clone()
        if self.levels is not None:
            return QuantizedWeight(codes, scale, self.group_size, levels=self.units().detach())
        assert self.table is not None
        assert self.group_codes is not None
        return QuantizedWeight(codes, scale, self.group_size, group_codes=self.group_codes.clone(), codebook=self.entries().detach())


class NearestWeight(nn.Module):
    """Latent weight and levels; codes are nearest levels, recomputed at every step."""

    def __init__(self, q: QuantizedWeight, latent: Tensor, table: nn.Parameter | None = None, family: str = "free"):
        super().__init__()
        self.store = _LevelStore(q, table, family)
        with torch.no_grad():  # codes may be older than the levels: the first forward pass must give the codes that came in
            cells = into_cells(split_groups(latent, q.group_size), self.store.scaled(), split_groups(q.codes, q.group_size))
        self.latent = nn.Parameter(join_groups(cells, latent.shape[1]).clone())

    def forward(self) -> Tensor:
        fused = _selected(self.latent, self.store)
        if fused is not None:
            return fused
        levels = self.store.scaled()
        grouped = split_groups(self.latent, self.store.group_size)
        with torch.no_grad():
            codes = nearest_codes(grouped, levels)
        return join_groups(_Select.apply(grouped, levels, codes), self.latent.shape[1])  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The trained weight as a value."""
        codes = nearest_codes(split_groups(self.latent, self.store.group_size), self.store.scaled())
        return self.store.quantized(join_groups(codes, self.latent.shape[1]).contiguous())


class FrozenWeight(nn.Module):
    """Fixed codes; levels, table and row scales learn."""

    codes: Tensor

    def __init__(self, q: QuantizedWeight, table: nn.Parameter | None = None, family: str = "free"):
        super().__init__()
        self.register_buffer("codes", q.codes)
        self.store = _LevelStore(q, table, family)

    def forward(self) -> Tensor:
        fused = _selected(self.codes, self.store)
        if fused is not None:
            return fused
        levels = self.store.scaled()
        grouped = split_groups(self.codes, self.store.group_size)
        made = _Select.apply(None, levels, grouped)  # type: ignore[no-untyped-call]
        return join_groups(made, self.codes.shape[1])

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The trained weight as a value."""
        return self.store.quantized(self.codes.clone())


class _Bits(torch.autograd.Function):
    """eq. 3 with straight-through bits: `level[2 s + b]`; d/dW = 1, d/dG = difference of the two values s would select."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, bitmap: Tensor, levels: Tensor) -> Tensor:
        low_bit = latent > midpoints(levels)[..., 0:1]
        high_bit = latent > midpoints(levels)[..., 2:3]
        value_low = torch.where(low_bit, levels[..., 1:2], levels[..., 0:1])
        value_high = torch.where(high_bit, levels[..., 3:4], levels[..., 2:3])
        s = bitmap > 0.5
        ctx.save_for_backward(torch.where(s, 2 + high_bit.to(torch.uint8), low_bit.to(torch.uint8)), value_high - value_low)
        return torch.where(s, value_high, value_low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, difference = ctx.saved_tensors
        return grad, grad * difference, _sums_by_code(grad, codes)


SMALLEST = 1e-30  # what a power is taken of instead of zero
PAIRINGS = {"low_high": [0, 1, 2, 3], "outer_inner": [0, 3, 1, 2]}  # of sorted levels, by 2 s + b; b is the larger of its pair


class LatentBitmapWeight(nn.Module):
    """The paper's parameterisation: latent W, latent bitmap G, and four levels in two pairs, the first of s = 0, the second of s = 1."""

    unit: Tensor

    def __init__(self, q: QuantizedWeight, latent: Tensor, soft: bool, pairing: str = "low_high"):
        super().__init__()
        real = (group_levels(q) * q.row_scale[:, None, None])[..., PAIRINGS[pairing]]
        self.group_size, self.columns = q.group_size, latent.shape[1]
        self.register_buffer("unit", (q.row_scale * GRID)[:, None, None])
        self.latent = nn.Parameter(latent.clone())
        self.levels = nn.Parameter(real / self.unit)
        self.bitmap = nn.Parameter(_initial_bitmap(split_groups(latent, q.group_size), real, soft))

    def forward(self) -> Tensor:
        grouped = split_groups(self.latent, self.group_size)
        return join_groups(_Bits.apply(grouped, self.bitmap, self.levels * self.unit), self.columns)  # type: ignore[no-untyped-call]

    def polarization(self, beta: Tensor | float) -> Tensor:
        """`mean((1 - |2 G - 1|^beta)^2)`: zero where every bitmap entry has decided (eq. 6). Its slope at one half, infinite below beta = 1, counts as 0.

        Entries that fill up a short last group stand for no weight and are left out; where `LatentStep` trains there are none (`tiled`).
        """
        size = (2 * join_groups(self.bitmap, self.columns).clamp(0, 1) - 1).abs()
        return (1 - size.clamp_min(SMALLEST).pow(beta)).square().mean()

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep G in [0, 1]."""
        self.bitmap.clamp_(0, 1)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The trained weight as a value; levels that crossed are put in order and their codes renamed."""
        grouped = split_groups(self.latent, self.group_size)
        levels = self.levels * self.unit
        mid = midpoints(levels)
        high = 2 + (grouped > mid[..., 2:3]).to(torch.uint8)
        codes = torch.where(self.bitmap > 0.5, high, (grouped > mid[..., 0:1]).to(torch.uint8))
        ordered, order = levels.sort(dim=-1)
        rank = order.argsort(dim=-1).to(torch.uint8)
        codes = take_levels(rank, codes)
        return from_real_levels(join_groups(codes, self.columns).contiguous(), ordered, self.group_size)


def _initial_bitmap(grouped: Tensor, levels: Tensor, soft: bool) -> Tensor:
    """G from the better pair: exactly 0 or 1, or softly by how much better it is (undecided near the boundary)."""
    low = torch.minimum((grouped - levels[..., 0:1]).abs(), (grouped - levels[..., 1:2]).abs())
    high = torch.minimum((grouped - levels[..., 2:3]).abs(), (grouped - levels[..., 3:4]).abs())
    if not soft:
        return (high < low).to(grouped.dtype)
    gap = (low - high) / (low + high).clamp_min(1e-12)
    return 0.5 + 0.5 * gap


@dataclass(frozen=True)
class LearningRates:
    """Learning rates by kind of parameter; kinds at 0 stay frozen."""

    weight: float = 0.0
    levels: float = 0.0
    row_scale: float = 0.0
    bitmap: float = 0.0
    norms: float = 0.0
    clips: float = 0.0
    knees: float = 0.0


class QuantLinear(nn.Module):
    """A linear layer around one of the weight views, and the INT8 columns beside it, which stay as they are."""

    def __init__(self, weight: NearestWeight | FrozenWeight | LatentBitmapWeight, bias: Tensor | None, outliers: OutlierColumns | None = None):
        super().__init__()
        self.weight_view, self.outliers = weight, outliers
        self.held: Tensor | None = None  # the weight of this step, where somebody computed it once for several passes
        self.register_buffer("bias", bias)

    def numel(self) -> int:
        """How many weights it has."""
        view = self.weight_view
        return (view.codes if isinstance(view, FrozenWeight) else view.latent).numel()

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., in)` -> `(..., out)`."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        return nn.functional.linear(x, self.weight() if self.held is None else self.held, bias)

    def weight(self) -> Tensor:
        """The weight `(out, in)` that the codes stand for."""
        columns: Tensor = self.weight_view()
        return columns if self.outliers is None else self.outliers.placed(columns)

    def quantized(self) -> QuantizedWeight:
        """The current weight as a value."""
        return replace(self.weight_view.quantized(), outliers=self.outliers)


@contextmanager
def weights_held(linears: Sequence[QuantLinear]) -> Iterator[None]:
    """Compute each weight once for all passes inside the block; on leaving, send the summed gradients on to its parameters.

    Making a weight from codes and levels costs as much as using it for a few hundred tokens, so micro-batches share it.
    """
    made = [linear.weight() for linear in linears]
    for linear, weight in zip(linears, made, strict=True):
        linear.held = weight.detach().requires_grad_()
    try:
        yield
        for linear in reversed(linears):  # one at a time, so that gradients of weights and of parameters are never all there at once
            weight, held = made.pop(), linear.held
            linear.held = None
            if held is not None and held.grad is not None:
                torch.autograd.backward([weight], [held.grad])
    finally:
        for linear in linears:
            linear.held = None


__all__ = ["GRID", "FrozenWeight", "LatentBitmapWeight", "LearningRates", "NearestWeight", "QuantLinear", "grid_ste"]
