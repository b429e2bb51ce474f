"""The CUDA object and a weight in its layout: what `cuda.py` calls with.

**Problem.** The shared object is optional, a GPU may be absent or older than the object's code, and a pointer of the wrong size is a wrong
result or a crash. So loading never raises, every refusal has its reason, and a weight checks each tensor before its address is kept.

**Layout.** `cuda_layout.py`. Row sums are a product with ones: padding counts zero there by construction.

**Trade-off.** The layout is not the stored one; `stored` gives that back bit by bit, so that nobody needs to keep both.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm_kernels.build import PACKAGE
from lbllm_kernels.build_cuda import object_path, source_digest, source_folder
from lbllm_kernels.cuda_layout import (
    GROUP_SIZES,
    ROW_PAD,
    TILE_K,
    count_tiles,
    pad_rows,
    pad_tokens,
    tile_codes,
    tile_groups,
    untile_codes,
    untile_groups,
)
from lbllm_kernels.format import MAX_CODEBOOK, PackedWeight, count_groups

_MOST_AHEAD = 24 << 20  # bytes of a following weight's codes that are asked into the L2, and an eighth of that of its levels
ALIGNMENT = 16  # bytes; of every address that the kernels read words of 16 bytes from
_MOST_CELLS = 1 << 24  # row tiles x k tiles: the kernels' 32-bit indices hold


class WeightBlock(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("out", "in_", "row_tiles", "k_tiles", "groups_per_tile", "device")],
        *[(name, ctypes.c_void_p) for name in ("codes", "words", "group_codes", "codebook", "row_scale", "row_sum", "bias")],
        ("next", ctypes.c_void_p * 2), ("next_bytes", ctypes.c_uint32 * 2),
    ]


@dataclass(frozen=True)
class Library:
    """The loaded object (None when there is none that this machine can use) and the reason, or the object's name."""

    functions: ctypes.CDLL | None
    reason: str


@functools.cache
def library() -> Library:
    """Load the object built from the present sources, once a process. Never raises: `reason` says what is missing."""
    folder = source_folder()
    path = object_path(source_digest(folder)) if folder else _only_object()
    if path is None or not path.is_file():
        return Library(None, "the CUDA path is not built; run: python -m lbllm_kernels.build_cuda (needs nvcc)")
    if not torch.cuda.is_available():
        return Library(None, f"{path.name} is built, but torch sees no CUDA device")
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, f"{path.name} cannot be loaded ({error}); run: python -m lbllm_kernels.build_cuda --force")
    declare(functions)
    return Library(functions, path.name)


def _only_object() -> Path | None:
    found = sorted(PACKAGE.glob("_lut8_cuda_*.so"))
    return found[0] if len(found) == 1 else None


def declare(functions: ctypes.CDLL) -> None:
    p, i, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    functions.lut8_cuda_error.restype, functions.lut8_cuda_error.argtypes = ctypes.c_char_p, [i]
    signatures = {
        "covers": [i], "quantize": [i, p, i, i, i, i, i, p, p, p, p, i, p], "product": [p, p, p, p, i, p, i, p, i, i, i, i, i, p],
        "linear": [p, p, i, i, i, p, p, p, p, p, i, i, i, i, i, i, p], "dequantize": [p, p, p], "finish": [p, p, wide, p, p, i, p, i, p],
    }  # fmt: skip
    for name, arguments in signatures.items():
        function = getattr(functions, f"lut8_cuda_{name}")
        function.restype, function.argtypes = i, arguments


def state() -> tuple[bool, str]:
    """Whether the object is loaded on a machine with a GPU, and why or why not."""
    found = library()
    return found.functions is not None, found.reason


@functools.cache
def device_reason(index: int) -> str | None:
    """Why device `index` cannot run the kernels, or None."""
    found = library().functions
    if found is None:
        return library().reason
    with torch.cuda.device(index):
        code = found.lut8_cuda_covers(index)
    if code == 0:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (capability {major}.{minor}) is not covered by {library().reason}: {message(code)}"


def unsupported(packed: PackedWeight) -> str | None:
    """Why this weight needs another path, or None."""
    device = packed.codes.device
    if device.type != "cuda":
        return f"the weight is on {device}"
    if packed.group_size not in GROUP_SIZES:
        return f"group size {packed.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}"
    if packed.outlier_weight is not None:
        return "INT8 outlier channels"
    row_tiles, k_tiles = count_tiles(packed.out_features, packed.in_features)
    if row_tiles * k_tiles >= _MOST_CELLS:
        return f"a layer of {packed.out_features} x {packed.in_features} is beyond the kernels' 32-bit indices"
    return device_reason(torch.cuda.current_device() if device.index is None else device.index)


def functions() -> Any:
    """The C functions. RuntimeError with the reason when there are none."""
    found = library().functions
    if found is None:
        raise RuntimeError(library().reason)
    return found


def message(code: int) -> str:
    return f"{functions().lut8_cuda_error(code).decode()} (CUDA error {code})"


def ensure(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what}: {message(code)}; LBLLM_KERNEL_PATH=reference runs without the CUDA path")


def stream_of(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


class CudaWeight:
    """A packed weight in the kernels' layout, with the block of pointers that the calls take. Keeps its tensors alive."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None):
        """Derive the layout of a validated `packed`. `bias` fp32 (out,) overrides `packed.bias`. ValueError when unsupported."""
        why = unsupported(packed)
        if why:
            raise ValueError(f"the CUDA path does not take this weight: {why}")
        bias = packed.bias if bias is None else bias
        n, g = packed.in_features, packed.group_size
        words = group_codes = codebook = None
        if packed.levels is not None:
            words = tile_groups(packed.levels, n, g)
        elif packed.group_codes is not None and packed.codebook is not None:
            group_codes = tile_groups(packed.group_codes, n, g)
            codebook = torch.nn.functional.pad(packed.codebook, (0, MAX_CODEBOOK - packed.codebook.numel())).contiguous()
        entries = MAX_CODEBOOK if packed.codebook is None else packed.codebook.numel()
        self._fill(
            n, packed.out_features, g, tile_codes(packed.codes, n), words, group_codes, codebook,
            pad_rows(packed.row_scale), pad_rows(torch.zeros_like(packed.row_scale, dtype=torch.int32)), None if bias is None else pad_rows(bias.to(torch.float32)),
        )  # fmt: skip
        self.entries = entries
        assert self.row_sums is not None
        ones = pad_tokens(torch.ones((1, n), dtype=torch.int8, device=self.device))
        with torch.cuda.device(self.device):
            stream, sums = stream_of(self.device), self.row_sums.data_ptr()
            code = functions().lut8_cuda_product(self.address, ones.data_ptr(), None, None, 1, None, 0, sums, 0, 0, 0, 0, 0, stream)
        ensure(code, f"row sums of {self.out_features} x {n}")
        torch.zeros(1, device=self.device)  # a launch may overlap the last kernel before it, so the last one must not be that of the sums

    @classmethod
    def from_layout(cls, in_features: int, out_features: int, group_size: int, *tensors: Tensor | None) -> CudaWeight:
        """The same from tensors that are laid out already: codes, words, group_codes, codebook, row_scale, row_sums, bias."""
        self = cls.__new__(cls)
        self._fill(in_features, out_features, group_size, *tensors)
        return self

    def _fill(self, in_features: int, out_features: int, group_size: int, *tensors: Tensor | None) -> None:
        self.in_features, self.out_features, self.group_size, self.entries = in_features, out_features, group_size, MAX_CODEBOOK
        self.codes, self.words, self.group_codes, self.codebook, self.row_scale, self.row_sums, self.bias = self.layout = tensors
        row_tiles, k_tiles = self._check()
        self.row_tiles, self.padded = row_tiles, k_tiles * TILE_K
        assert self.codes is not None
        self.device = self.codes.device
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        self._block = WeightBlock(out_features, in_features, row_tiles, k_tiles, TILE_K // group_size, self.device.index or 0, *pointers)
        self.address = ctypes.addressof(self._block)

    def _check(self) -> tuple[int, int]:
        """ValueError unless every tensor has the size that the kernels will read; row tiles, k tiles."""
        row_tiles, k_tiles = count_tiles(self.out_features, self.in_features)
        rows, groups = (self.out_features + -self.out_features % ROW_PAD,), (row_tiles, k_tiles, 8, TILE_K // self.group_size, 2)
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.int32, (row_tiles, k_tiles, 32, 4)), "row_scale": (torch.float32, rows), "row_sums": (torch.int32, rows), "bias": (torch.float32, rows),
            "words": (torch.int32, groups), "group_codes": (torch.uint8, groups), "codebook": (torch.int32, (MAX_CODEBOOK,)),
        }  # fmt: skip
        if (self.words is None) == (self.group_codes is None) or (self.group_codes is None) != (self.codebook is None):
            raise ValueError("give either words, or group_codes with codebook")
        for name, (dtype, shape) in wanted.items():
            tensor = getattr(self, name)
            if tensor is None and name not in ("codes", "row_scale", "row_sums"):
                continue
            if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device.type != "cuda":
                raise ValueError(f"{name} must be a contiguous CUDA tensor {dtype} {shape}")
            if tensor.data_ptr() % ALIGNMENT:
                raise ValueError(f"{name} lies at {tensor.data_ptr():#x}; its address must be a multiple of {ALIGNMENT}: pass a copy (`.clone()`)")
        return row_tiles, k_tiles

    def followed_by(self, following: CudaWeight | None) -> None:
        """Say which weight a model needs after this one: decode products of this one then ask it into the L2. A hint; changes no result."""
        self._following = following  # keeps its tensors alive
        levels = None if following is None else following.words if following.words is not None else following.group_codes
        for i, tensor in enumerate((None if following is None else following.codes, levels)):
            self._block.next[i] = None if tensor is None else tensor.data_ptr()
            self._block.next_bytes[i] = 0 if tensor is None else min(tensor.numel() * tensor.element_size(), _MOST_AHEAD >> 3 * i)

    def bytes(self) -> int:
        """Bytes that one product reads of the weight."""
        tensors = (self.codes, self.words, self.group_codes, self.row_scale, self.row_sums, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def stored(weight: CudaWeight) -> PackedWeight:
    """The tensors of the format again, bit by bit: the layout only moves them."""
    out, n, g = weight.out_features, weight.in_features, weight.group_size
    words, group_codes = (None if t is None else untile_groups(t, out, count_groups(n, g)) for t in (weight.words, weight.group_codes))
    assert weight.codes is not None
    assert weight.row_scale is not None
    codebook = None if weight.codebook is None else weight.codebook[: weight.entries]
    bias = None if weight.bias is None else weight.bias[:out]
    return PackedWeight(untile_codes(weight.codes, out, n), weight.row_scale[:out], n, g, words, group_codes, codebook, bias)
