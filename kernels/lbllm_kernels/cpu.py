"""The CPU path: C++ products with AVX2, AVX-512 VNNI or AMX, chosen at run time, bit-exact with the reference.

**Problem.** A decode step reads every weight once: at 2.25 bits a weight the product must run at memory speed. The C++ side is
described in `kernels/csrc/lut8.h`; this file loads it, derives its layout, and checks every argument before a pointer crosses.

**Layout** (pure index functions; `tests/kernels/test_cpu.py` checks them against a slow reader):

    codes       (tiles, chunks, 16) i32     tiles = ceil(out/16), chunks = ceil(in/16); one lane = 16 codes of one row
    words       (tiles, n_groups, 16) i32   or  group_codes (tiles, n_groups, 16) u8 with codebook (256,) i32
    row_scale, row_sums, bias (tiles*16,)   padded with zeros

**Threads** are torch's (`torch.get_num_threads()`), through the OpenMP run-time that torch has loaded.

**Trade-off.** The layout is not the stored one; `stored` gives that back bit by bit, so that nobody needs to keep both.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lbllm_kernels.activation import PIECEWISE_TOP, UNIFORM_TOP, ActFactors
from lbllm_kernels.build import object_path, source_digest, source_folder
from lbllm_kernels.format import MAX_CODEBOOK, PackedWeight, count_groups, row_sums

ROWS = 16  # rows of a tile
CHUNK = 16  # channels of a lane
PAD = 64  # activations are padded to this many channels
TOKENS = 16  # AMX takes whole blocks of tokens
AVX2, AVX512, AMX = 1, 2, 3
LEVEL_NAMES = {AVX2: "avx2", AVX512: "avx512-vnni", AMX: "amx-int8"}
AMX_FROM = 12  # tokens from which AMX beats VNNI
_CPU = torch.device("cpu")  # buffers name their device and type: defaults may be changed by the caller
FUSED_UP_TO = 8  # tokens that are cheaper to quantize again for each linear than to share
QUANTIZES = ("uniform", "piecewise")  # variants of the C++ quantizer


class _Weight(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("out", "in_", "group", "chunks", "n_groups", "tiles")],
        *[(name, ctypes.c_void_p) for name in ("codes", "words", "group_codes", "codebook", "row_scale", "row_sum", "bias")],
    ]


@dataclass(frozen=True)
class Library:
    """The loaded object and what this machine can run: `levels` ascending, `reason` when there is none."""

    functions: ctypes.CDLL | None
    levels: tuple[int, ...]
    openmp: bool
    reason: str
    half: bool = False  # 16-bit weights of plain linears


@functools.cache
def library() -> Library:
    """Load the object built from the present sources, once a process. Never raises: `reason` says what is missing."""
    folder = source_folder()
    path = object_path(source_digest(folder)) if folder else _only_object()
    if path is None or not path.is_file():
        return Library(None, (), False, "the CPU path is not built; run: python -m lbllm_kernels.build")
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, (), False, f"{path.name} cannot be loaded ({error}); run: python -m lbllm_kernels.build --force")
    _declare(functions)
    features = functions.lut8_features()
    levels = tuple(level for level, bit in ((AVX2, 1), (AVX512, 2), (AMX, 4)) if features & bit)
    reason = f"{path.name}: {', '.join(LEVEL_NAMES[level] for level in levels)}" if levels else "this processor has no AVX2"
    return Library(functions if levels else None, levels, bool(functions.lut8_has_openmp()), reason, bool(features & 8))


def _only_object() -> Path | None:
    found = sorted(Path(__file__).resolve().parent.glob("_lut8_cpu_*.so"))
    return found[0] if len(found) == 1 else None


def _declare(functions: ctypes.CDLL) -> None:
    pointer, wide, narrow, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    functions.lut8_features.restype = functions.lut8_has_openmp.restype = ctypes.c_int
    functions.lut8_quantize.restype = functions.lut8_matmul.restype = None
    functions.lut8_quantize.argtypes = [pointer, wide, wide, narrow, *[real] * 4, pointer, wide, pointer, pointer, *[narrow] * 3]
    functions.lut8_matmul.argtypes = [pointer, pointer, wide, wide, *[pointer] * 4, narrow, narrow]
    functions.lut8_forward.restype = functions.lut8_half_linear.restype = None
    functions.lut8_forward.argtypes = [pointer, wide, pointer, wide, narrow, pointer, pointer, narrow, narrow]
    functions.lut8_half_linear.argtypes = [pointer, wide, wide, narrow, pointer, wide, pointer, narrow, narrow]


def unsupported(packed: PackedWeight) -> str | None:
    """Why this weight needs the reference path, or None."""
    if packed.codes.device.type != "cpu":
        return f"the weight is on {packed.codes.device}"
    if packed.group_size % CHUNK:
        return f"group size {packed.group_size} is not a multiple of {CHUNK}"
    if packed.outlier_weight is not None:
        return "INT8 outlier channels"
    return None


def padded_channels(in_features: int) -> int:
    """Bytes of a row of quantized activations: `in` rounded up to 64."""
    return -(-in_features // PAD) * PAD


def tile_codes(codes: Tensor, in_features: int) -> Tensor:
    """Stored codes `(out, ceil(in/4))` u8 -> `(tiles, chunks, 16)` i32: lane (tile, chunk, row) holds channels 16*chunk .. +15."""
    out, chunks = codes.shape[0], -(-in_features // CHUNK)
    rows = torch.nn.functional.pad(codes, (0, 4 * chunks - codes.shape[1], 0, -out % ROWS))
    return rows.view(torch.int32).view(-1, ROWS, chunks).transpose(1, 2).contiguous()


def tile_groups(values: Tensor) -> Tensor:
    """`(out, n_groups)` -> `(tiles, n_groups, 16)`, rows padded with zeros."""
    rows = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    return rows.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def interleave(q: Tensor) -> Tensor:
    """Codes `(M, in)` int8 -> `(M, padded)`: byte 4t + j of every 16 is channel 4j + t, padding 0. What the quantizer writes."""
    padded = torch.nn.functional.pad(q, (0, padded_channels(q.shape[1]) - q.shape[1]))
    return padded.view(q.shape[0], -1, 4, 4).transpose(2, 3).contiguous().view(q.shape[0], -1)


class CpuWeight:
    """A packed weight in the C++ layout, with the pointer block that the calls take. Keeps its tensors alive."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None):
        """Derive the layout of a validated `packed`. `bias` fp32 (out,) overrides `packed.bias`. ValueError when unsupported."""
        why = unsupported(packed)
        if why:
            raise ValueError(f"the CPU path does not take this weight: {why}")
        bias = packed.bias if bias is None else bias
        words = group_codes = codebook = None
        self.entries = MAX_CODEBOOK if packed.codebook is None else packed.codebook.numel()
        if packed.levels is not None:
            words = tile_groups(packed.levels)
        elif packed.group_codes is not None and packed.codebook is not None:
            group_codes = tile_groups(packed.group_codes)
            codebook = torch.nn.functional.pad(packed.codebook, (0, MAX_CODEBOOK - packed.codebook.numel()))
        self._fill(
            packed.in_features, packed.out_features, packed.group_size, tile_codes(packed.codes, packed.in_features), words, group_codes, codebook,
            self._rows(packed.row_scale), self._rows(row_sums(packed)), None if bias is None else self._rows(bias.to(torch.float32)),
        )  # fmt: skip

    @classmethod
    def from_layout(cls, in_features: int, out_features: int, group_size: int, *tensors: Tensor | None) -> CpuWeight:
        """The same from tensors that are laid out already: codes, words, group_codes, codebook, row_scale, row_sums, bias."""
        self = cls.__new__(cls)
        self.entries = MAX_CODEBOOK
        self._fill(in_features, out_features, group_size, *tensors)
        return self

    def _fill(self, in_features: int, out_features: int, group_size: int, *tensors: Tensor | None) -> None:
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.codes, self.words, self.group_codes, self.codebook, self.row_scale, self.row_sums, self.bias = self.layout = tensors
        tiles, chunks, groups = self._check()
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        self._block = _Weight(out_features, in_features, group_size, chunks, groups, tiles, *pointers)
        self.address = ctypes.addressof(self._block)

    def _check(self) -> tuple[int, int, int]:
        """ValueError unless every tensor has the size that the C++ side will read; tiles, chunks, groups."""
        tiles, chunks, groups = -(-self.out_features // ROWS), -(-self.in_features // CHUNK), count_groups(self.in_features, self.group_size)
        rows = (tiles * ROWS,)
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.int32, (tiles, chunks, ROWS)), "row_scale": (torch.float32, rows), "row_sums": (torch.int32, rows), "bias": (torch.float32, rows),
            "words": (torch.int32, (tiles, groups, ROWS)), "group_codes": (torch.uint8, (tiles, groups, ROWS)), "codebook": (torch.int32, (MAX_CODEBOOK,)),
        }  # fmt: skip
        if (self.words is None) == (self.group_codes is None) or (self.group_codes is None) != (self.codebook is None):
            raise ValueError("give either words, or group_codes with codebook")
        for name, (dtype, shape) in wanted.items():
            tensor = getattr(self, name)
            if tensor is None and name not in ("codes", "row_scale", "row_sums"):
                continue
            if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(f"{name} must be a contiguous CPU tensor {dtype} {shape}")
        return tiles, chunks, groups

    @staticmethod
    def _rows(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, -values.shape[0] % ROWS)).contiguous()


@dataclass(frozen=True)
class CpuTokens:
    """Quantized tokens as the C++ products read them: `q` interleaved u8 (blocks*16, padded), `scale` fp32 and `zero` i32 (M,)."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    tokens: int
    in_features: int


def best_level(tokens: int, most: int = AMX) -> int:
    """The fastest instruction set here, up to `most`, for so many tokens. RuntimeError when the path is absent."""
    levels = library().levels
    if not levels:
        raise RuntimeError(library().reason)
    best = levels[-1] if levels[-1] < AMX or tokens >= AMX_FROM else levels[-2]
    return min(best, most)


def _buffer(tokens: int, in_features: int) -> Tensor:
    """Room for quantized tokens; rows beyond them (AMX reads whole blocks) are zero."""
    rows = -(-tokens // TOKENS) * TOKENS if tokens >= AMX_FROM else tokens
    q = torch.empty((rows, padded_channels(in_features)), dtype=torch.uint8, device=_CPU)
    if rows != tokens:
        q[tokens:] = 0
    return q


def quantize(x: Tensor, factors: ActFactors, *, interleaved: bool = True, level: int = 0) -> CpuTokens:
    """Quantize `x (M, in)` (any float dtype, CPU) with the C++ quantizer. ValueError on a wrong tensor or variant."""
    functions = library().functions
    if functions is None:
        raise RuntimeError(library().reason)
    if factors.variant not in QUANTIZES:
        raise ValueError(f"activation variant {factors.variant!r} has no per-token codes")
    if x.dim() != 2 or x.shape[1] == 0 or x.device.type != "cpu" or not x.dtype.is_floating_point:
        raise ValueError(f"activations must be a float CPU matrix (M, in), got {x.dtype} {tuple(x.shape)} on {x.device}")
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.to(torch.float32).contiguous()
    tokens, in_features = x.shape
    q = _buffer(tokens, in_features)
    scale, zero = torch.empty(tokens, dtype=torch.float32, device=_CPU), torch.empty(tokens, dtype=torch.int32, device=_CPU)
    top = UNIFORM_TOP if factors.variant == "uniform" else PIECEWISE_TOP
    functions.lut8_quantize(
        x.data_ptr(), tokens, in_features, top, factors.clip_max, factors.clip_min, factors.knee_low, factors.knee_high,
        q.data_ptr(), q.shape[1], scale.data_ptr(), zero.data_ptr(), int(interleaved), level or best_level(1), torch.get_num_threads(),
    )  # fmt: skip
    return CpuTokens(q, scale, zero, tokens, in_features)


def tokens_of(q: Tensor, scale: Tensor, zero: Tensor) -> CpuTokens:
    """Tokens from codes `q int8 (M, in)` of 0..127 in channel order, `scale` fp32 and `zero` int32 (M,)."""
    ordered = _buffer(q.shape[0], q.shape[1])
    ordered[: q.shape[0]] = interleave(q).view(torch.uint8)
    return CpuTokens(ordered, scale.contiguous(), zero.contiguous(), q.shape[0], q.shape[1])


def _call(weight: CpuWeight, tokens: CpuTokens, y: Tensor | None, acc: Tensor | None, level: int) -> None:
    functions = library().functions
    assert functions is not None
    if tokens.in_features != weight.in_features:
        raise ValueError(f"tokens have {tokens.in_features} channels; the layer takes {weight.in_features}")
    level = level or best_level(tokens.tokens)
    if level == AMX and tokens.q.shape[0] % TOKENS:
        level = AVX512
    functions.lut8_matmul(
        weight.address, tokens.q.data_ptr(), tokens.q.shape[1], tokens.tokens, tokens.scale.data_ptr(), tokens.zero.data_ptr(),
        None if y is None else y.data_ptr(), None if acc is None else acc.data_ptr(), level, torch.get_num_threads(),
    )  # fmt: skip


class Fused:
    """Quantizer and products of the layers that read one input, in one call, for few tokens: what a decode step runs."""

    def __init__(self, weights: Sequence[CpuWeight], factors: ActFactors, most: int = AVX512):
        """Raises RuntimeError when the path is absent, ValueError for a variant without codes or weights of different inputs."""
        functions = library().functions
        if functions is None:
            raise RuntimeError(library().reason)
        if factors.variant not in QUANTIZES:
            raise ValueError(f"activation variant {factors.variant!r} has no per-token codes")
        if not weights or any(w.in_features != weights[0].in_features for w in weights):
            raise ValueError(f"the layers of one input must take the same channels, got {[w.in_features for w in weights]}")
        self._weights, self._run, self._level = tuple(weights), functions.lut8_forward, best_level(1, most)
        self._top = UNIFORM_TOP if factors.variant == "uniform" else PIECEWISE_TOP
        self._factors = (ctypes.c_float * 4)(factors.clip_max, factors.clip_min, factors.knee_low, factors.knee_high)
        self._factors_at = ctypes.addressof(self._factors)
        self._pointers = (ctypes.c_void_p * len(weights))(*(w.address for w in weights))
        self._pointers_at, self._array = ctypes.addressof(self._pointers), ctypes.c_void_p * len(weights)
        self._in, self._outs = weights[0].in_features, tuple(w.out_features for w in weights)
        self._most = FUSED_UP_TO * self._in

    def takes(self, x: Tensor) -> bool:
        """Whether `x (..., in)` may go this way: fp32, contiguous, on the CPU, few tokens."""
        return x.dtype is torch.float32 and 0 < x.numel() <= self._most and x.shape[-1] == self._in and x.is_contiguous() and x.is_cpu

    def __call__(self, x: Tensor) -> list[Tensor]:
        """`x (..., in)` that `takes` accepted -> fp32 `(..., out)` of each layer."""
        shape = x.shape[:-1]
        ys = [torch.empty((*shape, out), dtype=torch.float32, device=_CPU) for out in self._outs]
        to = self._array(*[y.data_ptr() for y in ys])
        self._run(
            self._pointers_at, len(ys), x.data_ptr(), x.numel() // self._in, self._top, self._factors_at, ctypes.addressof(to), self._level,
            torch.get_num_threads(),
        )  # fmt: skip
        return ys


def half_linear(x: Tensor, weight: Tensor, level: int = 0) -> Tensor:
    """`x (..., in)` fp32 times `weight (out, in)` fp16 or bf16, transposed -> fp32 `(..., out)`; the order of sums is csrc/half_linear.cpp's.

    ValueError on another type, device or layout; RuntimeError when the path is absent (`library().half`).
    """
    found = library()
    if found.functions is None or not found.half:
        raise RuntimeError(f"16-bit linears need F16C and FMA: {found.reason}")
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.dim() != 2 or not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError(f"weight must be a contiguous fp16 or bf16 CPU matrix, got {weight.dtype} {tuple(weight.shape)} on {weight.device}")
    out, channels = weight.shape
    if x.dtype != torch.float32 or x.dim() < 1 or x.shape[-1] != channels or not x.is_cpu:
        raise ValueError(f"x must be fp32 (..., {channels}) on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device}")
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], out), dtype=torch.float32, device=_CPU)
    if y.numel():
        found.functions.lut8_half_linear(
            weight.data_ptr(), out, channels, int(weight.dtype == torch.bfloat16), x.data_ptr(), x.numel() // channels, y.data_ptr(),
            level or best_level(1), torch.get_num_threads(),
        )  # fmt: skip
    return y


def linear(tokens: CpuTokens, weight: CpuWeight, level: int = 0) -> Tensor:
    """Outputs fp32 `(M, out)` of quantized tokens; bit-equal to `reference.linear`. `level` forces an instruction set (tests)."""
    y = torch.empty((tokens.tokens, weight.out_features), dtype=torch.float32, device=_CPU)
    if tokens.tokens:
        _call(weight, tokens, y, None, level)
    return y


def accumulate(q: Tensor, weight: CpuWeight, level: int = 0) -> Tensor:
    """int32 sums `(M, out)` of codes `q int8 (M, in)` in 0..127, by the same C++ product. ValueError on a wrong q."""
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] != weight.in_features or q.device.type != "cpu":
        raise ValueError(f"q must be int8 (M, {weight.in_features}) on the CPU, got {q.dtype} {tuple(q.shape)} on {q.device}")
    if q.numel() and int(q.min()) < 0:
        raise ValueError(f"q must be 0..127 on the CPU path, found {int(q.min())}")
    acc = torch.empty((q.shape[0], weight.out_features), dtype=torch.int32, device=_CPU)
    if q.shape[0]:
        ones, zeros = (torch.ones(q.shape[0], dtype=dtype, device=_CPU) for dtype in (torch.float32, torch.int32))
        _call(weight, tokens_of(q, ones, zeros), None, acc, level)
    return acc


def deinterleave(tokens: CpuTokens) -> Tensor:
    """The codes of interleaved tokens as int8 `(M, in)` in channel order: the inverse of `interleave`."""
    q = tokens.q[: tokens.tokens].view(torch.int8)
    return q.view(tokens.tokens, q.shape[1] // CHUNK, 4, 4).transpose(2, 3).reshape(tokens.tokens, q.shape[1])[:, : tokens.in_features]


def untile_codes(tiles: Tensor, out: int, in_features: int) -> Tensor:
    """The inverse of `tile_codes`."""
    rows = tiles.transpose(1, 2).contiguous().view(torch.uint8).view(tiles.shape[0] * ROWS, -1)
    return rows[:out, : -(-in_features // 4)].contiguous()


def untile_groups(tiles: Tensor, out: int) -> Tensor:
    """The inverse of `tile_groups`."""
    return tiles.transpose(1, 2).reshape(tiles.shape[0] * ROWS, -1)[:out].contiguous()


def stored(weight: CpuWeight) -> PackedWeight:
    """The tensors of the format again, bit by bit: the layout only moves them."""
    out = weight.out_features
    levels = None if weight.words is None else untile_groups(weight.words, out)
    group_codes = None if weight.group_codes is None else untile_groups(weight.group_codes, out)
    codebook = None if weight.codebook is None else weight.codebook[: weight.entries]
    bias = None if weight.bias is None else weight.bias[:out]
    assert weight.codes is not None
    assert weight.row_scale is not None
    codes = untile_codes(weight.codes, out, weight.in_features)
    return PackedWeight(codes, weight.row_scale[:out], weight.in_features, weight.group_size, levels, group_codes, codebook, bias)


def codes_in_order(tokens: CpuTokens) -> Tensor:
    """The codes of non-interleaved tokens as int8 `(M, in)` (tests and checks)."""
    return tokens.q[: tokens.tokens, : tokens.in_features].view(torch.int8)
