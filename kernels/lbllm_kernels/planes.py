"""The plane view: a linear layer as a sum of binary x binary products, and the proof that it is the table view.

**Problem.** The predecessor (BWA, arXiv 2504.05352) writes an activation as four binary planes and a weight as two, so that a layer
is popcounts of `and`ed bits. Our paths multiply int8 codes by int8 levels instead. Both must give the same integers, or `planes` would
name two different models.

**Equation.** With `q[k] = sum_j p_j B_j[k]` (`activation.py`) and, in a group, `w[k] = l0 + (l1-l0) b + (l2-l0) s + (l3-l2-l1+l0) b s`
for the binary bit `b`, the bitmap bit `s` and the four levels `l`,

    acc = sum_j p_j sum_groups [ l0 |B_j| + (l1-l0) |B_j & b| + (l2-l0) |B_j & s| + (l3-l2-l1+l0) |B_j & b & s| ]

where `|.|` counts bits: four activation planes times three weight planes are twelve binary products. All terms are integers.

**Trade-off.** A reference, not a path: dispatch never takes it, it is slow, and tests hold the other view against it.

**Shapes.** `q int8 (M, in)`, planes and masks u8 `(rows, n_groups, bytes)`, eight channels a byte, each group padded with zero bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lbllm_kernels.activation import plane_masks, plane_values
from lbllm_kernels.format import PackedWeight, group_words, unpack_codes, unpack_levels
from lbllm_kernels.reference import check_codes

ROWS = 64  # output rows counted at a time


def split_planes(q: Tensor, planes: tuple[int, ...]) -> Tensor:
    """Codes `q int8 (...)` -> bits u8 `(4, ...)` with `sum_j p_j bit_j = q`. ValueError for a code that is no sum of planes."""
    values = torch.tensor(plane_values(planes), dtype=torch.int64, device=q.device)
    masks = torch.tensor(plane_masks(planes), dtype=torch.uint8, device=q.device)
    at = torch.searchsorted(values, q.to(torch.int64)).clamp(max=15)
    if not torch.equal(values[at], q.to(torch.int64)):
        raise ValueError(f"q holds codes that are no sum of the planes {planes}")
    return torch.stack([masks[at] >> j & 1 for j in range(4)])


def pack_bits(bits: Tensor, group_size: int) -> Tensor:
    """Bits u8 `(..., in)` -> bytes u8 `(..., n_groups, ceil(G/8))`; bit i of byte b of a group is its channel 8b + i."""
    channels = bits.shape[-1]
    grouped = torch.nn.functional.pad(bits, (0, -channels % group_size)).reshape(*bits.shape[:-1], -1, group_size)
    padded = torch.nn.functional.pad(grouped, (0, -group_size % 8))
    octets = padded.reshape(*padded.shape[:-1], -1, 8)
    return (octets << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def popcount(octets: Tensor) -> Tensor:
    """Set bits in the last dimension: bytes u8 `(..., n)` -> int64 `(...)`."""
    table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8, device=octets.device)
    counts: Tensor = table[octets.int()]
    return counts.sum(-1, dtype=torch.int64)


def weight_planes(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Masks of `b`, `s` and `b & s`, u8 `(3, out, n_groups, bytes)`, and the four coefficients of the equation, int64 `(out, n_groups, 4)`."""
    codes = unpack_codes(packed.codes, packed.in_features)
    if packed.n_outliers:
        raise ValueError("the plane view covers the 2-bit columns alone; take off the INT8 outlier channels first")
    binary, bitmap = codes & 1, codes >> 1
    masks = torch.stack([pack_bits(bits, packed.group_size) for bits in (binary, bitmap, binary & bitmap)])
    l0, l1, l2, l3 = unpack_levels(group_words(packed)).to(torch.int64).unbind(-1)
    return masks, torch.stack([l0, l1 - l0, l2 - l0, l3 - l2 - l1 + l0], dim=-1)


def accumulate(q: Tensor, packed: PackedWeight, planes: tuple[int, ...]) -> Tensor:
    """int32 sums `(M, out)` of codes `q int8 (M, in)` by popcounts: equal to `reference.accumulate(q, packed)`."""
    check_codes(q, packed.in_features)
    masks, coefficients = weight_planes(packed)
    total = torch.zeros(q.shape[0], packed.out_features, dtype=torch.int64, device=q.device)
    for weight, bits in zip(planes, split_planes(q, planes), strict=True):
        plane = pack_bits(bits, packed.group_size)[:, None]  # (M, 1, n_groups, bytes)
        for start in range(0, packed.out_features, ROWS):
            part = slice(start, start + ROWS)
            counts = torch.stack([popcount(plane).expand(-1, len(coefficients[part]), -1), *(popcount(plane & mask[part]) for mask in masks)], dim=-1)
            total[:, part] += weight * (counts * coefficients[part]).sum((-2, -1))
    return total.to(torch.int32)
