"""LUT8: how a W(1+1) linear layer lies in memory and on disk. The one owner of the layout.

**Problem.** A weight is a 2-bit code `c = 2*bitmap + binary` and four free levels per (row, group). Stored as int8 on one fp32
scale per row, four levels are one 32-bit word, so a byte shuffle (`prmt`, `vpshufb`) turns codes into int8 weights and the whole
inner dimension adds up in one int32.

    weight[n, k] = row_scale[n] * int8(level byte c of the word of (n, k // G)),      c = code of (n, k)

**Bytes** (format version 1, little-endian; the full drawing is in `kernels/README.md`):

    codes    (out, ceil(in/4)) u8    byte j of a row:   bit 7 6 | 5 4 | 3 2 | 1 0
                                     channel           4j+3 |4j+2|4j+1| 4j        (padding codes are 0)
    levels   (out, n_groups) i32     byte 0 | 1 | 2 | 3  =  level of code 0 | 1 | 2 | 3, each -127..127      explicit mode
    group_codes (out, n_groups) u8,  codebook (entries <= 256,) i32: the word is codebook[group_code]        codebook mode
    row_scale (out,) f32             bias (out,) f32, optional
    perm (in,) i32, outlier_weight (out, n) s8, outlier_scale (out,) f32: optional INT8 channels, reference path only; column j of a row
    is channel perm[j], the last n columns are the outliers

`n_groups = ceil(in/G)`. A last group that is shorter counts its real channels only. -128 is refused: products of codes 0..127 and
levels -127..127 fit the pairwise int16 sums of AVX2, and negation stays inside int8.

**Trade-off.** Snapping levels to an int8 grid per row costs 0.02-0.05 % of the quantization error on real layers and buys a single
int32 accumulation with no flush per group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORMAT_VERSION = 1
MAX_LEVEL = 127
MAX_IN_FEATURES = 66_560  # 2 * 127 * 127 * in stays under 2**31: acc - z * rowsum cannot leave int32
MAX_CODEBOOK = 256
PER_ROW = ("codes", "row_scale", "levels", "group_codes", "bias", "outlier_weight", "outlier_scale")
_UNPACK_CHUNK = 1 << 18  # weights expanded at a time: bounds the index tensors to a few MB


class FormatError(ValueError):
    """A packed tensor breaks a rule of the format. The message names the tensor and the rule."""


@dataclass(frozen=True)
class PackedWeight:
    """The tensors of one packed linear layer (all on one device). `validate` checks what the types cannot say."""

    codes: Tensor
    row_scale: Tensor
    in_features: int
    group_size: int
    levels: Tensor | None = None
    group_codes: Tensor | None = None
    codebook: Tensor | None = None
    bias: Tensor | None = None
    perm: Tensor | None = None
    outlier_weight: Tensor | None = None
    outlier_scale: Tensor | None = None

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def n_groups(self) -> int:
        return count_groups(self.in_features, self.group_size)

    @property
    def n_outliers(self) -> int:
        """INT8 channels at the end of the permuted input; whatever 2-bit codes lie under them count as weight 0."""
        return 0 if self.outlier_weight is None else int(self.outlier_weight.shape[1])


def count_groups(in_features: int, group_size: int) -> int:
    """`ceil(in / G)`."""
    return -(-in_features // group_size)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes `(out, in)` of 0..3 -> bytes u8 `(out, ceil(in/4))`; channel `4j+i` in bits `2i..2i+1` of byte `j`, padding 0.

    Raises FormatError when a code is outside 0..3 or the tensor is not a matrix.
    """
    if codes.dim() != 2 or codes.dtype.is_floating_point:
        raise FormatError(f"codes must be an integer matrix (out, in), got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > 3):
        raise FormatError(f"codes must be 0..3, found {int(codes.min())}..{int(codes.max())}")
    quads = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % 4)).view(codes.shape[0], -1, 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack_codes(packed: Tensor, in_features: int) -> Tensor:
    """Bytes u8 `(out, ceil(in/4))` -> codes u8 `(out, in)` of 0..3. The inverse of `pack_codes`."""
    if packed.dim() != 2 or packed.dtype != torch.uint8:
        raise FormatError(f"packed codes must be u8 (out, ceil(in/4)), got {packed.dtype} {tuple(packed.shape)}")
    if packed.shape[1] != -(-in_features // 4):
        raise FormatError(f"packed codes have {packed.shape[1]} bytes a row; {in_features} input channels need {-(-in_features // 4)}")
    quads = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return quads.view(packed.shape[0], -1)[:, :in_features].contiguous()


def pack_levels(levels: Tensor) -> Tensor:
    """Integer levels `(..., 4)` in -127..127 -> words i32 `(...)`, level `c` in byte `c`. Raises FormatError outside that range."""
    if levels.dtype.is_floating_point or levels.dim() < 1 or levels.shape[-1] != 4:
        raise FormatError(f"levels must be integers (..., 4), got {levels.dtype} {tuple(levels.shape)}")
    if levels.numel() and (int(levels.min()) < -MAX_LEVEL or int(levels.max()) > MAX_LEVEL):
        raise FormatError(f"levels must be -127..127, found {int(levels.min())}..{int(levels.max())}")
    return levels.to(torch.int8).contiguous().view(torch.int32).squeeze(-1)


def unpack_levels(words: Tensor) -> Tensor:
    """Words i32 `(...)` -> levels int8 `(..., 4)`. The inverse of `pack_levels`; no range check."""
    if words.dtype != torch.int32:
        raise FormatError(f"level words must be i32, got {words.dtype}")
    return words.contiguous().unsqueeze(-1).view(torch.int8)


def group_words(packed: PackedWeight) -> Tensor:
    """The level word of every (row, group), i32 `(out, n_groups)`, in either level mode."""
    if packed.levels is not None:
        return packed.levels
    assert packed.group_codes is not None
    assert packed.codebook is not None
    return packed.codebook[packed.group_codes.to(torch.int32)]


def int8_weight(packed: PackedWeight) -> Tensor:
    """The int8 weights `(out, in)`: level byte `code` of each group's word. A validated `packed` is assumed.

    With outlier channels the columns are in the permuted order, and the last `n_outliers` of them are 0.
    """
    out, n, g = packed.out_features, packed.n_groups, packed.group_size
    words = group_words(packed)
    weight = torch.empty((out, packed.in_features), dtype=torch.int8, device=packed.codes.device)
    rows = max(1, _UNPACK_CHUNK // max(1, n * g))
    for start in range(0, out, rows):
        part = slice(start, min(start + rows, out))
        codes = unpack_codes(packed.codes[part], packed.in_features)
        codes = torch.nn.functional.pad(codes, (0, n * g - packed.in_features)).view(-1, n, g)
        picked = unpack_levels(words[part]).gather(2, codes.to(torch.int64))
        weight[part] = picked.view(-1, n * g)[:, : packed.in_features]
    if packed.n_outliers:
        weight[:, packed.in_features - packed.n_outliers :] = 0
    return weight


def dequantize(packed: PackedWeight) -> Tensor:
    """The weights that the layer computes with, fp32 `(out, in)` in the original channel order."""
    weight = int8_weight(packed).to(torch.float32) * packed.row_scale[:, None]
    if packed.outlier_weight is None:
        return weight
    assert packed.outlier_scale is not None
    assert packed.perm is not None
    weight[:, packed.in_features - packed.n_outliers :] = packed.outlier_weight.to(torch.float32) * packed.outlier_scale[:, None]
    restored = torch.empty_like(weight)
    restored[:, packed.perm.to(torch.int64)] = weight
    return restored


def row_sums(packed: PackedWeight) -> Tensor:
    """Sums of the int8 weights of each row, int32 `(out,)`: derived at load, never stored."""
    rows = max(1, _UNPACK_CHUNK // packed.in_features)
    parts = [int8_weight(rows_of(packed, start, start + rows)).sum(1, dtype=torch.int32) for start in range(0, packed.out_features, rows)]
    return torch.cat(parts)


def rows_of(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Output rows `start..stop-1` as a packed weight of their own (views)."""
    cut = {name: getattr(packed, name)[start:stop] for name in PER_ROW if getattr(packed, name) is not None}
    return replace(packed, **cut)


def to_device(packed: PackedWeight, device: torch.device) -> PackedWeight:
    """The same weight with its tensors on `device`."""
    moved = {name: getattr(packed, name).to(device) for name in (*PER_ROW, "codebook", "perm") if getattr(packed, name) is not None}
    return replace(packed, **moved)


def _require(ok: bool, tensor: str, rule: str) -> None:
    if not ok:
        raise FormatError(f"{tensor}: {rule}")


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    _require(value.dtype == dtype, name, f"must be {dtype}, is {value.dtype}")
    _require(tuple(value.shape) == shape, name, f"must have shape {shape}, has {tuple(value.shape)}")
    _require(value.device == device, name, f"must be on {device} like codes, is on {value.device}")


def _check_words(name: str, words: Tensor) -> None:
    _require(not bool((unpack_levels(words) == -128).any()), name, "levels must be -127..127, found -128")


def validate(packed: PackedWeight, name: str = "") -> PackedWeight:
    """`packed` itself when it keeps every rule of the format; otherwise FormatError naming tensor (prefixed by `name`) and rule."""
    prefix = f"{name}." if name else ""
    codes, in_features, g = packed.codes, packed.in_features, packed.group_size
    _require(codes.dim() == 2 and codes.dtype == torch.uint8, f"{prefix}codes", f"must be a u8 matrix, is {codes.dtype} {tuple(codes.shape)}")
    out, device = codes.shape[0], codes.device
    _require(0 < in_features <= MAX_IN_FEATURES, f"{prefix}codes", f"in_features must be 1..{MAX_IN_FEATURES}, is {in_features}")
    _require(out > 0, f"{prefix}codes", "must have at least one row")
    _require(g > 0 and g % 4 == 0, f"{prefix}codes", f"group_size must be a positive multiple of 4, is {g}")
    _check_tensor(f"{prefix}codes", codes, torch.uint8, (out, -(-in_features // 4)), device)
    if in_features % 4:
        _require(not bool((codes[:, -1] >> 2 * (in_features % 4)).any()), f"{prefix}codes", "padding codes must be 0")
    _check_tensor(f"{prefix}row_scale", packed.row_scale, torch.float32, (out,), device)
    _require(bool(torch.isfinite(packed.row_scale).all()), f"{prefix}row_scale", "must be finite")
    _validate_levels(packed, prefix, (out, packed.n_groups), device)
    if packed.bias is not None:
        _check_tensor(f"{prefix}bias", packed.bias, torch.float32, (out,), device)
        _require(bool(torch.isfinite(packed.bias).all()), f"{prefix}bias", "must be finite")
    _validate_outliers(packed, prefix, out, device)
    return packed


def _validate_levels(packed: PackedWeight, prefix: str, shape: tuple[int, int], device: torch.device) -> None:
    explicit, coded = packed.levels is not None, packed.group_codes is not None and packed.codebook is not None
    partial = (packed.group_codes is None) != (packed.codebook is None)
    _require(explicit != coded and not partial, f"{prefix}levels", "give either levels, or group_codes with codebook")
    if packed.levels is not None:
        _check_tensor(f"{prefix}levels", packed.levels, torch.int32, shape, device)
        _check_words(f"{prefix}levels", packed.levels)
        return
    assert packed.group_codes is not None
    assert packed.codebook is not None
    entries = packed.codebook.numel()
    _require(0 < entries <= MAX_CODEBOOK, f"{prefix}codebook", f"must have 1..{MAX_CODEBOOK} entries, has {entries}")
    _check_tensor(f"{prefix}codebook", packed.codebook, torch.int32, (entries,), device)
    _check_words(f"{prefix}codebook", packed.codebook)
    _check_tensor(f"{prefix}group_codes", packed.group_codes, torch.uint8, shape, device)
    top = int(packed.group_codes.max())
    _require(top < entries, f"{prefix}group_codes", f"must point into the codebook of {entries} entries, found {top}")


def _validate_outliers(packed: PackedWeight, prefix: str, out: int, device: torch.device) -> None:
    parts = (packed.perm, packed.outlier_weight, packed.outlier_scale)
    _require(all(p is None for p in parts) or all(p is not None for p in parts), f"{prefix}outlier_weight", "perm, outlier_weight and outlier_scale come together")
    if packed.perm is None or packed.outlier_weight is None or packed.outlier_scale is None:
        return
    n = packed.outlier_weight.shape[1] if packed.outlier_weight.dim() == 2 else -1
    _require(0 <= n <= packed.in_features, f"{prefix}outlier_weight", f"must be (out, n) with n <= {packed.in_features}")
    _check_tensor(f"{prefix}outlier_weight", packed.outlier_weight, torch.int8, (out, n), device)
    _require(not bool((packed.outlier_weight == -128).any()), f"{prefix}outlier_weight", "must be -127..127, found -128")
    _check_tensor(f"{prefix}outlier_scale", packed.outlier_scale, torch.float32, (out,), device)
    _check_tensor(f"{prefix}perm", packed.perm, torch.int32, (packed.in_features,), device)
    order = torch.arange(packed.in_features, dtype=torch.int32, device=device)
    _require(bool(torch.equal(packed.perm.sort().values, order)), f"{prefix}perm", "must be a permutation of the input channels")
