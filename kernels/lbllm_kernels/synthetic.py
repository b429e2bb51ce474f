"""Random packed weights of any shape, in either level mode: what tests and benchmarks feed the paths with.

Levels are uniform integers and codes are uniform, so every table entry is used; no claim about real weights is made.
"""

from __future__ import annotations

import torch

from lbllm_kernels.format import PackedWeight, pack_codes, pack_levels, validate


def random_packed(
    out: int, in_features: int, group_size: int, mode: str = "explicit", seed: int = 0, entries: int = 256, extreme: bool = False
) -> PackedWeight:
    """A valid random weight; `extreme` draws levels of -127 and 127 only, the case closest to overflow."""
    g = torch.Generator().manual_seed(seed)
    n_groups = -(-in_features // group_size)

    def levels(*shape: int) -> torch.Tensor:
        if extreme:
            return pack_levels(torch.randint(0, 2, (*shape, 4), generator=g, dtype=torch.int16) * 254 - 127)
        return pack_levels(torch.randint(-127, 128, (*shape, 4), generator=g, dtype=torch.int16))

    codes = pack_codes(torch.randint(0, 4, (out, in_features), generator=g, dtype=torch.uint8))
    row_scale = torch.rand(out, generator=g) * 0.01 + 1e-4
    if mode == "explicit":
        return validate(PackedWeight(codes, row_scale, in_features, group_size, levels=levels(out, n_groups)))
    group_codes = torch.randint(0, entries, (out, n_groups), generator=g, dtype=torch.uint8)
    return validate(PackedWeight(codes, row_scale, in_features, group_size, group_codes=group_codes, codebook=levels(entries)))
