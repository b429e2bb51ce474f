"""The CUDA path: LUT8 products on NVIDIA GPUs from Ampere on, bit-exact with the reference.

**Problem.** A decode step reads every weight once and must run at memory speed; a prefill must not be slower than a dense fp16 product.
The kernels are described in `kernels/csrc/cuda/lut8_cuda.cu`; this file loads them, derives their layout (`cuda_layout.py`), and checks
every argument before a pointer crosses.

**Paths** of a product, chosen from the number of tokens M (`choose_path`), or named by the caller (tests, measurements):

| path | tokens | launches |
|---|---|---|
| `fused` | 1 (up to 8) | one: every block quantizes the tokens itself while its weights travel |
| `decode` | up to 16 | two, overlapping on Hopper: quantizer, product |
| `sliced` | up to 16 | as `decode`, the quantizer in small blocks that find room beside a running product |
| `early` | up to 16, layers of up to 4096 channels | as `sliced`, the weights expanded before the tokens are there |
| `narrow`, `middle`, `wide` | any (32, 64, 128 tokens a block) | two, likewise |
| `hopper` (`hopper128`, `hopper256`, `hopper_split`) | any, on Hopper: wgmma | two, likewise; tokens in the order that wgmma reads |
| `library` | more than 16 | expand to int8, cuBLASLt's int8 product, finish: kept to compare with |

Which path, and how decode launches are cut, was measured for the shapes in `cuda_plans.json`; other shapes follow rules.

**Streams and graphs.** Everything runs on torch's current stream of the tensor's device; memory comes from torch's allocator; nothing
synchronizes; every launch's return code is checked. Calls may be captured into a CUDA graph. On Hopper a launch overlaps the end of the
kernel before it on the stream, and reads the weight before that kernel is done: a weight's tensors must not be written by the very last
kernel before a call (`CudaWeight(packed)` sees to that; whoever lays tensors out anew for `from_layout` must).

**Trade-off.** The layout is not the stored one; `stored` gives that back bit by bit, so that nobody needs to keep both.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbllm_kernels import cuda_plans
from lbllm_kernels.activation import PIECEWISE_TOP, UNIFORM_TOP, ActFactors
from lbllm_kernels.cuda_layout import TILE_ROWS, channel_order, pad_tokens, padded_channels, wgmma_order
from lbllm_kernels.cuda_weight import CudaWeight, device_reason, ensure, functions, library, state, stored, stream_of, unsupported

__all__ = [
    "CudaTokens", "CudaWeight", "Plan", "accumulate", "choose_path", "codes_in_order", "device_reason", "expanded", "forward", "is_hopper", "library",
    "linear", "planned", "quantize", "refusal", "state", "stored", "unsupported",
]  # fmt: skip

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PATHS = {"auto": 0, "fused": 1, "decode": 2, "narrow": 3, "middle": 4, "wide": 5, "hopper": 6, "hopper128": 7, "hopper256": 8, "hopper_split": 9, "sliced": 10, "early": 11, "library": -1}
MOST_TOKENS = {"fused": 8, "decode": 16, "sliced": 16, "early": 16}
FUSED_UP_TO = 1  # tokens that are cheaper to quantize again in every block than in a launch of their own
HOPPER_FROM = 129  # tokens from which wgmma beats mma.sync
EARLY_CHANNELS = cuda_plans.EARLY_WARPS * cuda_plans.HELD_CHANNELS
FUSED_BYTES = 88 << 10  # with what the kernels declare themselves: what every covered device gives a block
OVERLAP_PAIR, OVERLAP_PREVIOUS, WGMMA_ORDER, SMALL_BLOCKS = 1, 2, 4, 8  # previous: only when the weight's tensors were complete before the kernel that ran last


@dataclass(frozen=True)
class Plan:
    """How a decode launch is cut: row tiles and warps a block, 0 to let the C++ side choose; which launches may overlap.

    `prefetch`: k tiles that a block asks into the L2 beside those it loads at once; negative lets the C++ side choose.
    """

    row_tiles: int = 0
    warps: int = 0
    flags: int = OVERLAP_PAIR | OVERLAP_PREVIOUS
    prefetch: int = -1


DEFAULT_PLAN = Plan()


@dataclass(frozen=True)
class CudaTokens:
    """Quantized tokens: `q` int8 (M, padded), row-major with zeros beyond `in_features`; `scale` fp32 and `zero` int32 (M,).

    `wgmma`: channels stand in the order of `cuda_layout.wgmma_order`, which the Hopper paths read.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    in_features: int
    wgmma: bool = False

    @property
    def tokens(self) -> int:
        return int(self.q.shape[0])


@functools.cache
def is_hopper(index: int) -> bool:
    """Whether device `index` has wgmma."""
    return torch.cuda.get_device_capability(index)[0] == 9


def choose_path(tokens: int, hopper: bool) -> str:
    """The path of a product with so many tokens when the caller names none."""
    if tokens <= FUSED_UP_TO:
        return "fused"
    if tokens <= MOST_TOKENS["decode"]:
        return "decode"
    return "hopper" if hopper and tokens >= HOPPER_FROM else "auto"


def planned(tokens: int, weight: CudaWeight, plan: Plan = DEFAULT_PLAN) -> tuple[str, Plan]:
    """Path and plan of `forward` when the caller names no path: measured for this device and shape where there is one, else by the rules.

    A plan that says how to cut keeps its word; of DEFAULT_PLAN and those that only set flags, the flags.
    """
    index = weight.device.index or 0
    by_rule = choose_path(tokens, is_hopper(index)), plan
    if plan.row_tiles or plan.warps:
        return by_rule
    levels = f"{'codebook' if weight.words is None else 'explicit'}-{weight.group_size}"
    cut = cuda_plans.find(_device_name(index), weight.out_features, weight.in_features, levels, tokens)
    if cut is None or refusal(cut.path, tokens, weight):
        return by_rule
    return cut.path, Plan(cut.row_tiles, cut.warps, plan.flags, cut.prefetch)


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _reordered(tokens: CudaTokens, wgmma: bool) -> CudaTokens:
    if tokens.wgmma == wgmma:
        return tokens
    q = wgmma_order(tokens.q) if wgmma else channel_order(tokens.q)
    return CudaTokens(q, tokens.scale, tokens.zero, tokens.in_features, wgmma)


def _checked_input(x: Tensor) -> Tensor:
    if x.dim() != 2 or x.shape[1] == 0 or x.device.type != "cuda" or not x.dtype.is_floating_point:
        raise ValueError(f"activations must be a float CUDA matrix (M, in), got {x.dtype} {tuple(x.shape)} on {x.device}")
    if x.dtype not in DTYPES:
        x = x.to(torch.float32)
    return x.contiguous()


@functools.lru_cache(maxsize=1024)
def _numbers(factors: ActFactors) -> tuple[int, Any]:
    if factors.variant not in ("uniform", "piecewise"):
        raise ValueError(f"activation variant {factors.variant!r} has no per-token codes")
    top = UNIFORM_TOP if factors.variant == "uniform" else PIECEWISE_TOP
    return top, (ctypes.c_float * 4)(factors.clip_max, factors.clip_min, factors.knee_low, factors.knee_high)


def quantize(x: Tensor, factors: ActFactors, *, path: str = "", flags: int = 0) -> CudaTokens:
    """Quantize `x (M, in)` (any float dtype, CUDA); bit-equal to `activation.quantize_activations`. ValueError on a wrong tensor.

    `path`: the product that will read the tokens (its order), by default the one that `choose_path` gives so many tokens.
    """
    run, (top, numbers), x = functions().lut8_cuda_quantize, _numbers(factors), _checked_input(x)
    tokens, in_features = x.shape
    wgmma = (path or choose_path(tokens, is_hopper(x.device.index))).startswith("hopper")
    flags |= WGMMA_ORDER * wgmma | SMALL_BLOCKS * (path in ("sliced", "early"))
    q = torch.empty((tokens, padded_channels(in_features)), dtype=torch.int8, device=x.device)
    scale, zero = torch.empty(tokens, dtype=torch.float32, device=x.device), torch.empty(tokens, dtype=torch.int32, device=x.device)
    if tokens:
        with torch.cuda.device(x.device):
            code = run(
                x.device.index, x.data_ptr(), DTYPES[x.dtype], tokens, in_features, q.shape[1], top, numbers,
                q.data_ptr(), scale.data_ptr(), zero.data_ptr(), flags, stream_of(x.device),
            )  # fmt: skip
        ensure(code, f"quantizing {tokens} tokens of {in_features} channels")
    return CudaTokens(q, scale, zero, in_features, wgmma)


def refusal(path: str, tokens: int, weight: CudaWeight) -> str | None:
    """Why a path cannot take so many tokens of a layer, or None."""
    if path not in PATHS:
        return f"path {path!r} is unknown; choose one of {', '.join(PATHS)}"
    if path.startswith("hopper") and not is_hopper(weight.device.index or 0):
        return f"path {path!r} needs a Hopper GPU"
    if tokens > MOST_TOKENS.get(path, tokens):
        return f"path {path!r} takes at most {MOST_TOKENS[path]} tokens, got {tokens}"
    if path == "library" and tokens <= MOST_TOKENS["decode"]:
        return f"path 'library' takes more than {MOST_TOKENS['decode']} tokens, got {tokens}"
    if path == "fused" and tokens * (weight.padded + 16) > FUSED_BYTES:
        return f"path 'fused' holds its tokens in {FUSED_BYTES} bytes of shared memory; {tokens} of {weight.padded} channels are more"
    if path == "early" and weight.padded > EARLY_CHANNELS:
        return f"path 'early' holds {EARLY_CHANNELS} channels in registers; the layer has {weight.padded}"
    return None


def _check_path(path: str, tokens: int, weight: CudaWeight) -> None:
    if reason := refusal(path, tokens, weight):
        raise ValueError(reason)


def _product(tokens: CudaTokens, weight: CudaWeight, y: Tensor | None, acc: Tensor | None, path: str, plan: Plan) -> None:
    if tokens.in_features != weight.in_features:
        raise ValueError(f"tokens have {tokens.in_features} channels; the layer takes {weight.in_features}")
    if tokens.q.device != weight.device:
        raise ValueError(f"tokens are on {tokens.q.device}, the layer's weights on {weight.device}")
    path = path if path != "auto" or not tokens.wgmma else "hopper"
    _check_path(path, tokens.tokens, weight)
    tokens = _reordered(tokens, path.startswith("hopper"))
    with torch.cuda.device(weight.device):
        if path == "library":
            _library_product(tokens, weight, y, acc)
            return
        code = functions().lut8_cuda_product(
            weight.address, tokens.q.data_ptr(), tokens.scale.data_ptr(), tokens.zero.data_ptr(), tokens.tokens,
            None if y is None else y.data_ptr(), 0 if y is None else DTYPES[y.dtype], None if acc is None else acc.data_ptr(),
            PATHS[path], plan.row_tiles, plan.warps, plan.prefetch, plan.flags & OVERLAP_PREVIOUS, stream_of(weight.device),
        )  # fmt: skip
    ensure(code, f"product of {tokens.tokens} tokens with {weight.out_features} x {weight.in_features} by path {path}")


def expanded(weight: CudaWeight) -> Tensor:
    """int8 weights `(rows, padded)`, rows padded to 16 and channels to 128. What lies beyond the layer's is not meant to be read."""
    dense = torch.empty((weight.row_tiles * TILE_ROWS, weight.padded), dtype=torch.int8, device=weight.device)
    ensure(functions().lut8_cuda_dequantize(weight.address, dense.data_ptr(), stream_of(weight.device)), "expanding a weight")
    return dense


def _library_product(tokens: CudaTokens, weight: CudaWeight, y: Tensor | None, acc: Tensor | None) -> None:
    """cuBLASLt's int8 product between an expansion and a finish."""
    sums = torch._int_mm(tokens.q, expanded(weight).T)
    if acc is not None:
        acc.copy_(sums[:, : weight.out_features])
        return
    assert y is not None
    code = functions().lut8_cuda_finish(
        weight.address, sums.data_ptr(), sums.shape[1], tokens.scale.data_ptr(), tokens.zero.data_ptr(), tokens.tokens, y.data_ptr(), DTYPES[y.dtype],
        stream_of(weight.device),
    )  # fmt: skip
    ensure(code, "finishing a product")


def _output_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in DTYPES else torch.float32


def linear(tokens: CudaTokens, weight: CudaWeight, dtype: torch.dtype = torch.float32, *, path: str = "auto", plan: Plan = DEFAULT_PLAN) -> Tensor:
    """Outputs `(M, out)` of quantized tokens in `dtype`; bit-equal to `reference.linear`, cast."""
    y = torch.empty((tokens.tokens, weight.out_features), dtype=_output_dtype(dtype), device=weight.device)
    if path == "auto" and not tokens.wgmma:
        measured = planned(tokens.tokens, weight, plan)
        path, plan = measured if measured[0] in ("decode", "sliced", "early", "narrow", "middle", "wide") else (path, plan)  # the others want other tokens
    if y.numel():
        _product(tokens, weight, y, None, path, plan)
    return y.to(dtype)


def forward(x: Tensor, weight: CudaWeight, factors: ActFactors, *, path: str = "", plan: Plan = DEFAULT_PLAN) -> Tensor:
    """`x (M, in)` -> `(M, out)` in x's dtype: quantizer and product in one call, one or two launches. The usual entry."""
    dtype, (top, numbers), x = x.dtype, _numbers(factors), _checked_input(x)
    tokens, in_features = x.shape
    if not path:
        path, plan = planned(tokens, weight, plan)
    _check_path(path, tokens, weight)
    if in_features != weight.in_features:
        raise ValueError(f"tokens have {in_features} channels; the layer takes {weight.in_features}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the layer's weights on {weight.device}")
    if path == "library":
        return linear(quantize(x, factors, path=path), weight, dtype, path=path)
    y = torch.empty((tokens, weight.out_features), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y.to(dtype)
    work = torch.empty(0 if path == "fused" else tokens * (weight.padded + 8), dtype=torch.uint8, device=x.device)  # q, scale, zero
    q, scale = work.data_ptr(), work.data_ptr() + tokens * weight.padded
    with torch.cuda.device(x.device):
        code = functions().lut8_cuda_linear(
            weight.address, x.data_ptr(), DTYPES[x.dtype], tokens, top, numbers, q, scale, scale + 4 * tokens,
            y.data_ptr(), DTYPES[y.dtype], PATHS[path], plan.row_tiles, plan.warps, plan.prefetch, plan.flags, stream_of(x.device),
        )  # fmt: skip
    ensure(code, f"linear of {tokens} tokens with {weight.out_features} x {weight.in_features} by path {path}")
    return y.to(dtype)


def accumulate(q: Tensor, weight: CudaWeight, *, path: str = "auto", plan: Plan = DEFAULT_PLAN) -> Tensor:
    """int32 sums `(M, out)` of codes `q int8 (M, in)` in 0..127, by the same kernels. ValueError on a wrong q."""
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] != weight.in_features or q.device != weight.device:
        raise ValueError(f"q must be int8 (M, {weight.in_features}) on {weight.device}, got {q.dtype} {tuple(q.shape)} on {q.device}")
    acc = torch.full((q.shape[0], weight.out_features), -(2**31), dtype=torch.int32, device=q.device)
    if acc.numel():
        none = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
        _product(CudaTokens(pad_tokens(q), none.view(torch.float32), none, weight.in_features), weight, None, acc, path, plan)
    return acc


def codes_in_order(tokens: CudaTokens) -> Tensor:
    """The codes of tokens as int8 `(M, in)` (tests and checks)."""
    return _reordered(tokens, False).q[:, : tokens.in_features]
