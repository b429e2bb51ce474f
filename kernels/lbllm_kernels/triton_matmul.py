"""The Triton path: the activation quantizer and the LUT8 product on any GPU that Triton knows.

**Problem.** Where no CUDA object is built, a GPU must still give the reference's integers, and faster than expanding weights to floats.

**Equation** (as `reference.py`):  `y[m, n] = (s[m] * row_scale[n]) * float(acc[m, n] - z[m] * rowsum[n]) + bias[n]`.

**Order of the channels.** A 32-bit word holds the codes of 16 consecutive channels, channel `16j + i` at bits `2i`. Shifting a tile of
words `(rows, 32)` by `2i` leaves the codes of the channels `16j + i`, j = 0..31: a K slice of 32 for an int8 product, without moving a
byte between lanes. So 512 channels are sixteen products of 32, and the quantizer writes its codes in that order:

    position 512c + 32i + j   holds channel   512c + 16j + i          (`position_order`; padding channels hold code 0)

**From code to weight.** `LUT_IMPL="prmt"`: four level words and four selectors give four packed int8 weights in four `prmt.b32`, each
shifting one byte in. `"shift"`: the level byte by a variable shift; for the interpreter (which knows no assembly) and other vendors.

**Few tokens** (`FEW` and below): one pass over the weights; where rows alone do not fill the machine, K is split over programs, whose
int32 partial sums a second kernel adds (exact in any order; no atomics, so no cleared workspace, and safe in graphs and on any stream).
**Many tokens:** weights are expanded once to an int8 scratch in the same order, then multiplied by a plain int8 product.

**Floats** repeat `activation.py` and `reference.finish` literally: `div_rn`, no fused multiply-add (`enable_fp_fusion=False`), and
`rint(v) = (v + 1.5*2^23) - 1.5*2^23`, exact for the clamped |v| <= 2^20.

**Layout.** The stored codes themselves (viewed as words) when rows are whole words, else a padded copy; levels as stored.
**Trade-off.** K is padded to 512: narrow layers waste up to half of the products. Those layers are small.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from lbllm_kernels.activation import PIECEWISE_TOP, SMALLEST_SCALE, UNIFORM_TOP, ActFactors
from lbllm_kernels.format import PackedWeight, count_groups, row_sums
from lbllm_kernels.reference import check_codes

CHUNK = 16  # channels of a word of codes
LANES = 32  # words of a row taken at a time
SPAN = CHUNK * LANES
FEW = 64  # tokens up to which the product expands weights as it goes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPLIT_FROM = 2  # programs a multiprocessor below which K is split


@triton.jit
def _rint(v):
    """Round half to even for any finite or infinite v: saturated at 2^20, which every caller clamps further."""
    v = tl.minimum(tl.maximum(v, -1048576.0), 1048576.0)
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _piecewise_value(k: tl.constexpr, z, a, b):
    """v_k of `activation.piecewise_values`."""
    if k < 4:
        v = _rint(k * (z - a) * 0.25)
    elif k < 12:
        v = (z - a) + _rint(tl.math.div_rn((k - 4) * (a + b), 7.0))
    else:
        v = (z + b) + _rint((k - 11) * (127.0 - z - b) * 0.25)
    return v


@triton.jit
def quantize_kernel(
    x, q, scale, zero, channels, padded, clip_max, clip_min, knee_low, knee_high, smallest, TOP: tl.constexpr, BLOCK: tl.constexpr
):
    """One token a program: x (M, channels) -> q (M, padded) in product order, scale (M,), zero (M,)."""
    token = tl.program_id(0)
    row = x + token.to(tl.int64) * channels
    lane = tl.arange(0, BLOCK)
    high = tl.zeros((BLOCK,), tl.float32)
    low = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, channels, BLOCK):
        v = tl.load(row + start + lane, mask=start + lane < channels, other=0.0).to(tl.float32)
        high = tl.maximum(high, v)
        low = tl.minimum(low, v)
        largest = tl.maximum(largest, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    hi = tl.max(high, 0)
    low_part = clip_min * tl.min(low, 0)
    s = tl.math.div_rn(clip_max * hi - low_part, TOP * 1.0)
    s = tl.where(s < smallest, 1.0, s)
    finite = (tl.max(largest, 0) < 0x7F800000) & ((s.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000)
    s = tl.where(finite, s, 1.0)
    z = tl.minimum(tl.maximum(_rint(tl.math.div_rn(-low_part, s)), 0.0), TOP * 1.0)
    z = tl.where(finite, z, 0.0)
    tl.store(scale + token, tl.where(finite, s, float("nan")))
    tl.store(zero + token, z.to(tl.int32))
    a = _rint(knee_low * z)
    b = _rint(knee_high * (127.0 - z))
    for start in range(0, padded, BLOCK):
        place = start + lane
        channel = (place // 512) * 512 + (place % 32) * 16 + (place % 512) // 32
        real = channel < channels
        v = tl.load(row + channel, mask=real, other=0.0).to(tl.float32)
        steps = tl.math.div_rn(v, s)
        if TOP == 15:
            code = tl.minimum(tl.maximum(_rint(steps) + z, 0.0), 15.0)
        else:
            t = steps + z
            before = _piecewise_value(0, z, a, b)
            code = tl.zeros_like(t) + before
            for k in tl.static_range(1, 16):
                value = _piecewise_value(k, z, a, b)
                code = tl.where(t > (before + value) * 0.5, value, code)
                before = value
        code = tl.where(real & finite, code, 0.0)
        tl.store(q + token.to(tl.int64) * padded + place, code.to(tl.int8), mask=place < padded)


@triton.jit
def _expand(words, selector, LUT_IMPL: tl.constexpr):
    """int8 weights of the codes in the low two bits of `selector`, elementwise."""
    if LUT_IMPL == "prmt":
        weights = tl.inline_asm_elementwise(
            "{ .reg .b32 t; prmt.b32 t, $4, $4, $8; prmt.b32 t, $3, t, $7; prmt.b32 t, $2, t, $6; prmt.b32 $0, $1, t, $5; }",
            "=r,r,r,r,r,r,r,r,r",
            [words, (selector & 3) | 0x6540],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        weights = (words >> ((selector & 3) * 8)).to(tl.int8)
    return weights


@triton.jit
def _tile(codes, words, group_codes, rows, row_ok, chunk, chunks, n_groups, GROUP: tl.constexpr, CODED: tl.constexpr):
    """Words of codes and level words of a tile, i32 (rows, chunk) each; zeros outside."""
    ok = row_ok[:, None] & (chunk < chunks)[None, :]
    d = tl.load(codes + rows.to(tl.int64)[:, None] * chunks + chunk[None, :], mask=ok, other=0)
    at = rows.to(tl.int64)[:, None] * n_groups + (chunk // GROUP)[None, :]
    if CODED:
        entry = tl.load(group_codes + at, mask=ok, other=0).to(tl.int32)
        w = tl.load(words + entry, mask=ok, other=0)
    else:
        w = tl.load(words + at, mask=ok, other=0)
    return d, w


@triton.jit
def _store(acc, y, rm, rn, m, n, scale, zero, row_scale, sums, bias, FINISH: tl.constexpr, BIAS: tl.constexpr):
    """The epilogue of reference.finish, or the raw sums."""
    ok = (rm < m)[:, None] & (rn < n)[None, :]
    at = rm.to(tl.int64)[:, None] * n + rn[None, :]
    if FINISH:
        s = tl.load(scale + rm, mask=rm < m, other=0.0)
        z = tl.load(zero + rm, mask=rm < m, other=0)
        factor = s[:, None] * tl.load(row_scale + rn, mask=rn < n, other=0.0)[None, :]
        v = factor * (acc - z[:, None] * tl.load(sums + rn, mask=rn < n, other=0)[None, :]).to(tl.float32)
        if BIAS:
            v = v + tl.load(bias + rn, mask=rn < n, other=0.0)[None, :]
        tl.store(y + at, v.to(y.dtype.element_ty), mask=ok)
    else:
        tl.store(y + at, acc, mask=ok)


@triton.jit(do_not_specialize=["m", "n_groups", "spans"])
def product_kernel(
    q, codes, words, group_codes, y, scale, zero, row_scale, sums, bias, m, n, chunks, n_groups, padded, spans,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, LUT_IMPL: tl.constexpr, CODED: tl.constexpr, FINISH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Tile (BM tokens, BN rows) over `spans` spans of 512 channels; y (M, n), or with several splits partial sums (split, M, n)."""
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    lane = tl.arange(0, 32)
    acc = tl.zeros((BM, BN), tl.int32)
    first = split * spans
    last = tl.minimum(first + spans, padded // 512)
    for span in range(first, last):
        d, w = _tile(codes, words, group_codes, rn, rn < n, span * 32 + lane, chunks, n_groups, GROUP, CODED)
        at = q + rm.to(tl.int64)[:, None] * padded + span * 512 + lane[None, :]
        for i in tl.static_range(16):
            tokens = tl.load(at + 32 * i, mask=(rm < m)[:, None], other=0)
            acc = tl.dot(tokens, tl.trans(_expand(w, d >> (2 * i), LUT_IMPL)), acc, out_dtype=tl.int32)
    _store(acc, y + split.to(tl.int64) * m * n, rm, rn, m, n, scale, zero, row_scale, sums, bias, FINISH, BIAS)


@triton.jit(do_not_specialize=["m", "splits"])
def reduce_kernel(
    partial, y, scale, zero, row_scale, sums, bias, m, n, splits, BM: tl.constexpr, BN: tl.constexpr, FINISH: tl.constexpr, BIAS: tl.constexpr
):
    """Adds the partial sums (splits, M, n) and finishes."""
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = (rm < m)[:, None] & (rn < n)[None, :]
    at = rm.to(tl.int64)[:, None] * n + rn[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for split in range(0, splits):
        acc += tl.load(partial + (tl.zeros_like(at) + split) * m * n + at, mask=ok, other=0)
    _store(acc, y, rm, rn, m, n, scale, zero, row_scale, sums, bias, FINISH, BIAS)


@triton.jit(do_not_specialize=["n_groups"])
def expand_kernel(
    codes, words, group_codes, dense, n, chunks, n_groups, padded,
    BN: tl.constexpr, GROUP: tl.constexpr, LUT_IMPL: tl.constexpr, CODED: tl.constexpr,
):
    """int8 weights (n, padded) in product order; channels beyond the last word are 0."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    span = tl.program_id(1)
    lane = tl.arange(0, 32)
    d, w = _tile(codes, words, group_codes, rn, rn < n, span * 32 + lane, chunks, n_groups, GROUP, CODED)
    at = dense + rn.to(tl.int64)[:, None] * padded + span * 512 + lane[None, :]
    for i in tl.static_range(16):
        tl.store(at + 32 * i, _expand(w, d >> (2 * i), LUT_IMPL), mask=(rn < n)[:, None])


@triton.jit(do_not_specialize=["m"])
def dense_kernel(
    q, dense, y, scale, zero, row_scale, sums, bias, m, n, padded,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FINISH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Plain int8 product of tokens (M, padded) and expanded weights (n, padded). Programs of eight token tiles share their rows."""
    tiles_m = tl.cdiv(m, BM)
    tiles_n = tl.cdiv(n, BN)
    band = tl.program_id(0) // (8 * tiles_n)
    height = tl.minimum(tiles_m - band * 8, 8)
    inside = tl.program_id(0) % (8 * tiles_n)
    rm = (band * 8 + inside % height) * BM + tl.arange(0, BM)
    rn = (inside // height) * BN + tl.arange(0, BN)
    lane = tl.arange(0, BK)
    a = q + rm.to(tl.int64)[:, None] * padded + lane[None, :]
    b = dense + rn.to(tl.int64)[None, :] * padded + lane[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for start in range(0, padded, BK):
        tokens = tl.load(a + start, mask=(rm < m)[:, None], other=0)
        weights = tl.load(b + start, mask=(rn < n)[None, :], other=0)
        acc = tl.dot(tokens, weights, acc, out_dtype=tl.int32)
    _store(acc, y, rm, rn, m, n, scale, zero, row_scale, sums, bias, FINISH, BIAS)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
    return bool(knobs.runtime.interpret)


def missing() -> str | None:
    """Why the path cannot run on this machine at all, or None."""
    if interpreting() or torch.cuda.is_available():
        return None
    return "no GPU that torch can use"


def describe() -> str:
    """Version and mode, for a reason string."""
    return f"Triton {triton.__version__}{' interpreted' if interpreting() else ''}"


def unsupported(packed: PackedWeight) -> str | None:
    """Why this weight needs the reference path, or None."""
    device = packed.codes.device
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"the weight is on {device}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "int8 tensor cores as Triton uses them need compute capability 8.0"
    if packed.group_size % CHUNK:
        return f"group size {packed.group_size} is not a multiple of {CHUNK}"
    if packed.outlier_weight is not None:
        return "INT8 outlier channels"
    return None


def lut_impl(device: torch.device) -> str:
    """`prmt` on NVIDIA GPUs, `shift` elsewhere."""
    return "prmt" if device.type == "cuda" and torch.version.hip is None and not interpreting() else "shift"


def padded_channels(in_features: int) -> int:
    """Bytes of a row of quantized activations: `in` rounded up to 512."""
    return -(-in_features // SPAN) * SPAN


def position_order(in_features: int, device: torch.device | None = None) -> Tensor:
    """`(padded,)` i64: the channel that each position of a row of quantized activations holds."""
    place = torch.arange(padded_channels(in_features), dtype=torch.int64, device=device)
    return place // SPAN * SPAN + place % LANES * CHUNK + place % SPAN // LANES


def to_product_order(q: Tensor) -> Tensor:
    """Codes `(M, in)` int8 in channel order -> `(M, padded)`, as the quantizer writes them."""
    padded = torch.nn.functional.pad(q, (0, padded_channels(q.shape[1]) - q.shape[1]))
    return padded[:, position_order(q.shape[1], q.device)].contiguous()


def word_codes(codes: Tensor, in_features: int) -> Tensor:
    """Stored codes `(out, ceil(in/4))` u8 -> `(out, ceil(in/16))` i32; the same memory when rows are whole, aligned words."""
    chunks = -(-in_features // CHUNK)
    whole = codes if codes.shape[1] == 4 * chunks else torch.nn.functional.pad(codes, (0, 4 * chunks - codes.shape[1]))
    whole = whole.contiguous()
    if whole.data_ptr() % 4 or whole.storage_offset() % 4:
        whole = whole.clone()
    return whole.view(torch.int32)


class TritonWeight:
    """A packed weight as the kernels read it. `layout`: codes, words (levels, or the codebook), group_codes, row_scale, row_sums, bias."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None):
        """Derive the layout of a validated `packed`. `bias` fp32 (out,) overrides `packed.bias`. ValueError when unsupported."""
        why = unsupported(packed)
        if why:
            raise ValueError(f"the Triton path does not take this weight: {why}")
        bias = packed.bias if bias is None else bias
        words = packed.levels if packed.levels is not None else packed.codebook
        assert words is not None
        group_codes = None if packed.group_codes is None else packed.group_codes.contiguous()
        self._fill(
            packed.in_features, packed.out_features, packed.group_size, word_codes(packed.codes, packed.in_features), words.contiguous(), group_codes,
            packed.row_scale.contiguous(), row_sums(packed), None if bias is None else bias.to(torch.float32).contiguous(),
        )  # fmt: skip

    @classmethod
    def from_layout(cls, in_features: int, out_features: int, group_size: int, *tensors: Tensor | None) -> TritonWeight:
        """The same from the tensors of `layout`."""
        self = cls.__new__(cls)
        self._fill(in_features, out_features, group_size, *tensors)
        return self

    def _fill(self, in_features: int, out_features: int, group_size: int, *tensors: Tensor | None) -> None:
        self.in_features, self.out_features, self.group_size, self.layout = in_features, out_features, group_size, tensors
        codes, words, group_codes, row_scale, sums, bias = tensors
        self.chunks, self.n_groups = -(-in_features // CHUNK), count_groups(in_features, group_size)
        table = (self.n_groups * out_features,) if group_codes is None else (0,)
        wanted = {
            "codes": (codes, torch.int32, (out_features, self.chunks)), "row_scale": (row_scale, torch.float32, (out_features,)),
            "row_sums": (sums, torch.int32, (out_features,)), "bias": (bias, torch.float32, (out_features,)),
            "group_codes": (group_codes, torch.uint8, (out_features, self.n_groups)),
        }  # fmt: skip
        assert codes is not None
        assert words is not None
        for name, (tensor, dtype, shape) in wanted.items():
            if tensor is None and name in ("bias", "group_codes"):
                continue
            if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != codes.device:
                raise ValueError(f"{name} must be a contiguous {dtype} {shape} on {codes.device}")
        if words.dtype != torch.int32 or not words.is_contiguous() or words.device != codes.device or (table[0] and words.numel() != table[0]):
            raise ValueError(f"words must be contiguous i32 on {codes.device}, one a (row, group) or a codebook")
        self.codes, self.words, self.group_codes, self.row_scale, self.row_sums, self.bias = codes, words, group_codes, row_scale, sums, bias


@dataclass(frozen=True)
class TritonTokens:
    """Quantized tokens: `q` int8 (M, padded) in product order, `scale` fp32 and `zero` i32 (M,)."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    in_features: int

    @property
    def tokens(self) -> int:
        return int(self.q.shape[0])


def quantize(x: Tensor, factors: ActFactors) -> TritonTokens:
    """Quantize `x (M, in)` of any float dtype. ValueError on a wrong tensor or variant."""
    if factors.variant not in ("uniform", "piecewise"):
        raise ValueError(f"activation variant {factors.variant!r} has no per-token codes")
    if x.dim() != 2 or x.shape[1] == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"activations must be a float matrix (M, in), got {x.dtype} {tuple(x.shape)}")
    x = (x if x.dtype in DTYPES else x.to(torch.float32)).contiguous()
    tokens, in_features = x.shape
    padded = padded_channels(in_features)
    q = torch.empty((tokens, padded), dtype=torch.int8, device=x.device)
    scale, zero = torch.empty(tokens, dtype=torch.float32, device=x.device), torch.empty(tokens, dtype=torch.int32, device=x.device)
    if tokens:
        top = UNIFORM_TOP if factors.variant == "uniform" else PIECEWISE_TOP
        block = min(triton.next_power_of_2(padded), 2048)
        with _on(x.device):
            quantize_kernel[(tokens,)](
                x, q, scale, zero, in_features, padded, factors.clip_max, factors.clip_min, factors.knee_low, factors.knee_high, SMALLEST_SCALE,
                TOP=top, BLOCK=block, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
    return TritonTokens(q, scale, zero, in_features)


def _on(device: torch.device) -> Any:
    """Kernels start on the device of their tensors, whatever the current one is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def splits(tiles: int, spans: int, multiprocessors: int) -> int:
    """Over how many programs to split the `spans` of a product with `tiles` output tiles: enough to fill the machine, each with work."""
    wanted = -(-SPLIT_FROM * multiprocessors // tiles)
    per_split = -(-spans // max(1, min(wanted, spans)))
    return -(-spans // per_split)


def _product(tokens: TritonTokens, weight: TritonWeight, y: Tensor, finish: bool, impl: str, split: int) -> None:
    """Fill `y (M, out)` with outputs, or with int32 sums."""
    if tokens.in_features != weight.in_features:
        raise ValueError(f"tokens have {tokens.in_features} channels; the layer takes {weight.in_features}")
    if tokens.q.device != weight.codes.device:
        raise ValueError(f"tokens are on {tokens.q.device}, the layer's weights on {weight.codes.device}")
    if tokens.tokens == 0:
        return
    with _on(y.device):
        if tokens.tokens <= FEW:
            _few(tokens, weight, y, finish, impl, split)
        else:
            _many(tokens, weight, y, finish, impl)


def _few(tokens: TritonTokens, weight: TritonWeight, y: Tensor, finish: bool, impl: str, split: int) -> None:
    m, n, padded = tokens.tokens, weight.out_features, tokens.q.shape[1]
    bm = 16 if m <= 16 else 32 if m <= 32 else 64
    bn = 32 if m <= 16 else 64
    tiles = -(-n // bn) * -(-m // bm)
    spans = padded // SPAN
    count = split or splits(tiles, spans, _multiprocessors(y.device))
    count = -(-spans // -(-spans // count))
    target = y if count == 1 else torch.empty((count, m, n), dtype=torch.int32, device=y.device)
    bias = weight.bias if weight.bias is not None else weight.row_scale
    ends = (tokens.scale, tokens.zero, weight.row_scale, weight.row_sums, bias)
    group_codes = weight.group_codes if weight.group_codes is not None else weight.codes
    has_bias = weight.bias is not None
    product_kernel[(-(-n // bn), -(-m // bm), count)](
        tokens.q, weight.codes, weight.words, group_codes, target, *ends, m, n, weight.chunks, weight.n_groups, padded, -(-spans // count),
        BM=bm, BN=bn, GROUP=weight.group_size // CHUNK, LUT_IMPL=impl, CODED=weight.group_codes is not None, FINISH=finish and count == 1, BIAS=has_bias,
        num_warps=4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    if count > 1:
        reduce_kernel[(-(-n // 256), m)](
            target, y, *ends, m, n, count, BM=1, BN=256, FINISH=finish, BIAS=has_bias, num_warps=4, enable_fp_fusion=False
        )  # fmt: skip


def _many(tokens: TritonTokens, weight: TritonWeight, y: Tensor, finish: bool, impl: str) -> None:
    m, n, padded = tokens.tokens, weight.out_features, tokens.q.shape[1]
    dense = torch.empty((n, padded), dtype=torch.int8, device=y.device)
    group_codes = weight.group_codes if weight.group_codes is not None else weight.codes
    expand_kernel[(-(-n // 32), padded // SPAN)](
        weight.codes, weight.words, group_codes, dense, n, weight.chunks, weight.n_groups, padded,
        BN=32, GROUP=weight.group_size // CHUNK, LUT_IMPL=impl, CODED=weight.group_codes is not None, num_warps=4
    )  # fmt: skip
    bm, bn = (128, 128) if m > 128 and n > 64 else (64, 64)
    bias = weight.bias if weight.bias is not None else weight.row_scale
    dense_kernel[(-(-m // bm) * -(-n // bn),)](
        tokens.q, dense, y, tokens.scale, tokens.zero, weight.row_scale, weight.row_sums, bias, m, n, padded,
        BM=bm, BN=bn, BK=128, FINISH=finish, BIAS=weight.bias is not None, num_warps=8 if bm == 128 else 4, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip


def linear(tokens: TritonTokens, weight: TritonWeight, dtype: torch.dtype = torch.float32, split: int = 0, impl: str = "") -> Tensor:
    """Outputs `(M, out)` of quantized tokens, rounded once to `dtype`; fp32 ones are bit-equal to the reference. `split`, `impl`: tests."""
    direct = dtype in DTYPES and not interpreting()  # the interpreter cuts to bf16 instead of rounding
    y = torch.empty((tokens.tokens, weight.out_features), dtype=dtype if direct else torch.float32, device=weight.codes.device)
    _product(tokens, weight, y, True, impl or lut_impl(y.device), split)
    return y.to(dtype)


def accumulate(q: Tensor, weight: TritonWeight, split: int = 0, impl: str = "") -> Tensor:
    """int32 sums `(M, out)` of codes `q int8 (M, in)` in channel order, by the same kernels. ValueError on a wrong q."""
    check_codes(q, weight.in_features)
    acc = torch.empty((q.shape[0], weight.out_features), dtype=torch.int32, device=weight.codes.device)
    ones, zeros = torch.ones(q.shape[0], device=q.device), torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
    _product(TritonTokens(to_product_order(q), ones, zeros, weight.in_features), weight, acc, False, impl or lut_impl(acc.device), split)
    return acc


def codes_in_order(tokens: TritonTokens) -> Tensor:
    """The codes of tokens as int8 `(M, in)` in channel order (tests and checks)."""
    ordered = torch.empty_like(tokens.q)
    ordered[:, position_order(tokens.in_features, tokens.q.device)] = tokens.q
    return ordered[:, : tokens.in_features]

