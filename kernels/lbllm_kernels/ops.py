"""The packed product as a torch operator, so that `torch.compile` sees one opaque node instead of pointers.

Eager code calls `dispatch.linear` directly (an operator call costs more than a small product). While compiling, `linear` below
emits `torch.ops.lbllm.lut8_linear`, whose fake implementation gives shapes without running anything. The operator quantizes and
multiplies by a path named in its arguments; it is functional, has no state, and takes the path's layout as plain tensors. The
reference path goes through it too: a compiler must not fuse its float operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lbllm_kernels.activation import ActFactors, factors_of
from lbllm_kernels.dispatch import Prepared
from lbllm_kernels.paths import PATHS


@torch.library.custom_op("lbllm::lut8_linear", mutates_args=())
def lut8_linear(
    x: Tensor, layout: Sequence[Tensor | None], path: str, out_features: int, group_size: int, variant: str, factors: Sequence[float]
) -> Tensor:
    """`x (..., in)` -> `(..., out)` in x's dtype; `factors`: `ActFactors.numbers`."""
    row, channels = PATHS[path], x.shape[-1]
    weight = row.rebuild(channels, out_features, group_size, *layout)
    flat, values = x.reshape(-1, channels), factors_of(variant, factors)
    y = row.forward(flat, weight, values) if row.forward is not None else row.linear(row.quantize(flat, values), weight, x.dtype)
    return y.reshape(*x.shape[:-1], out_features)


@lut8_linear.register_fake
def _(x, layout, path, out_features, group_size, variant, factors):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def linear(x: Tensor, prepared: Prepared, group_size: int, factors: ActFactors) -> Tensor:
    """The operator on a prepared weight; used while compiling."""
    route = prepared.route(x.numel() // x.shape[-1])
    y: Tensor = torch.ops.lbllm.lut8_linear(x, list(route.weight.layout), route.path.name, prepared.out_features, group_size, factors.variant, factors.numbers())
    return y
