"""The derived layout of the CUDA path, as pure index functions on tensors. `kernels/csrc/cuda/layout.h` has the same in C++.

**Problem.** A warp of 32 lanes multiplies a tile of 16 rows x 128 channels in four `mma.m16n8k32` steps. Each lane should read what it
needs with one 16-byte load, and turn it into int8 weights with a mask, a shift and a byte permutation.

**Layout.** Lane `4g + t` owns rows `g`, `g + 8` and channels `32t .. 32t+31` of the tile:

    codes   (row_tiles, k_tiles, 32, 4) i32      words 0, 1: row g, channels 0..15 and 16..31 of the lane; words 2, 3: row g + 8
    levels  (row_tiles, k_tiles, 8, 128/G, 2)    i32 words or u8 codebook entries: [g][group in tile][row g, row g + 8]

Inside a word, channel `c` lies at bits `4*(c % 8) + 2*(c // 8)`: masked with 0x33333333 (after a shift by 0 or 2), every 16 bits are a
`prmt` selector of four neighbouring channels. Rows and channels beyond the layer's are zeros; activations there are zero too.

**Trade-off.** The same bytes as the stored codes, in another order; a second copy unless the stored one is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 16
TILE_K = 128
ROW_PAD = 128  # row_scale, row_sums and bias are padded with zeros to this many rows
GROUP_SIZES = (16, 32, 64, 128)


def count_tiles(out_features: int, in_features: int) -> tuple[int, int]:
    """Row tiles and k tiles of a layer."""
    return -(-out_features // TILE_ROWS), -(-in_features // TILE_K)


def padded_channels(in_features: int) -> int:
    """Bytes of a row of quantized activations: `in` rounded up to whole tiles."""
    return -(-in_features // TILE_K) * TILE_K


def _spread(half: Tensor) -> Tensor:
    """Eight 2-bit codes in 16 bits -> the same codes in the low halves of eight nibbles (int64)."""
    half = (half | half << 8) & 0x00FF00FF
    half = (half | half << 4) & 0x0F0F0F0F
    return (half | half << 2) & 0x33333333


def _gather(nibbles: Tensor) -> Tensor:
    """The inverse of `_spread`: the low halves of eight nibbles -> 16 bits."""
    nibbles = nibbles & 0x33333333
    nibbles = (nibbles | nibbles >> 2) & 0x0F0F0F0F
    nibbles = (nibbles | nibbles >> 4) & 0x00FF00FF
    return (nibbles | nibbles >> 8) & 0xFFFF


def _recoded(words: Tensor, forward: bool) -> Tensor:
    """Words of 16 codes, natural order <-> tile order, i32 -> i32."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = _spread(wide & 0xFFFF) | _spread(wide >> 16) << 2 if forward else _gather(wide) | _gather(wide >> 2) << 16
    return torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32)


def tile_codes(codes: Tensor, in_features: int) -> Tensor:
    """Stored codes `(out, ceil(in/4))` u8 -> i32 `(row_tiles, k_tiles, 32, 4)`."""
    row_tiles, k_tiles = count_tiles(codes.shape[0], in_features)
    padding = (0, k_tiles * TILE_K // 4 - codes.shape[1], 0, row_tiles * TILE_ROWS - codes.shape[0])
    natural = torch.nn.functional.pad(codes, padding).view(torch.int32)
    tiles = natural.view(row_tiles, 2, 8, k_tiles, 4, 2).permute(0, 3, 2, 4, 1, 5)
    tiled = torch.empty((row_tiles, k_tiles, 32, 4), dtype=torch.int32, device=codes.device)
    step = max(1, (1 << 20) // (k_tiles * 128))  # bounds the int64 temporaries
    for start in range(0, row_tiles, step):
        tiled[start : start + step] = _recoded(tiles[start : start + step], forward=True).reshape(-1, k_tiles, 32, 4)
    return tiled


def untile_codes(tiled: Tensor, out_features: int, in_features: int) -> Tensor:
    """The inverse of `tile_codes`: the stored codes, u8 `(out, ceil(in/4))`."""
    row_tiles, k_tiles = tiled.shape[:2]
    natural = torch.empty((row_tiles, TILE_ROWS, k_tiles * 8), dtype=torch.int32, device=tiled.device)
    step = max(1, (1 << 20) // (k_tiles * 128))
    for start in range(0, row_tiles, step):
        part = _recoded(tiled[start : start + step], forward=False).view(-1, k_tiles, 8, 4, 2, 2)
        natural[start : start + step] = part.permute(0, 4, 2, 1, 3, 5).reshape(-1, TILE_ROWS, k_tiles * 8)
    return natural.view(-1, k_tiles * 8).view(torch.uint8)[:out_features, : -(-in_features // 4)].contiguous()


def untile_groups(tiled: Tensor, out_features: int, n_groups: int) -> Tensor:
    """The inverse of `tile_groups`: `(out, n_groups)`."""
    rows = tiled.permute(0, 4, 2, 1, 3).reshape(tiled.shape[0] * TILE_ROWS, -1)
    return rows[:out_features, :n_groups].contiguous()


def tile_groups(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """Words i32 or codebook entries u8 `(out, n_groups)` -> `(row_tiles, k_tiles, 8, 128/G, 2)` of the same type."""
    row_tiles, k_tiles = count_tiles(values.shape[0], in_features)
    per_tile = TILE_K // group_size
    padding = (0, k_tiles * per_tile - values.shape[1], 0, row_tiles * TILE_ROWS - values.shape[0])
    rows = torch.nn.functional.pad(values, padding)
    return rows.view(row_tiles, 2, 8, k_tiles, per_tile).permute(0, 3, 2, 4, 1).contiguous()


def pad_rows(values: Tensor) -> Tensor:
    """`(out,)` -> padded with zeros to a multiple of 128 rows."""
    return torch.nn.functional.pad(values, (0, -values.shape[0] % ROW_PAD)).contiguous()


def pad_tokens(q: Tensor) -> Tensor:
    """Codes `(M, in)` int8 -> `(M, padded)`: what the quantizer writes."""
    return torch.nn.functional.pad(q, (0, padded_channels(q.shape[1]) - q.shape[1])).contiguous()


def wgmma_order(q: Tensor) -> Tensor:
    """Tokens `(M, padded)` in channel order -> the order that wgmma reads: word `8t + 2s + h` of each 128 channels at `8s + 4h + t`."""
    return q.view(q.shape[0], -1, 4, 4, 2, 4).permute(0, 1, 3, 4, 2, 5).reshape(q.shape)


def channel_order(q: Tensor) -> Tensor:
    """The inverse of `wgmma_order`."""
    return q.view(q.shape[0], -1, 4, 2, 4, 4).permute(0, 1, 4, 2, 3, 5).reshape(q.shape)
