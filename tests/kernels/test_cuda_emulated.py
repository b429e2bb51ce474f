"""The CUDA kernels themselves, run on the CPU: the sources compiled by a C++ compiler against `emulator/`, bit-exact with the reference.

Everything but the PTX wrappers and the launch is the code that nvcc compiles: index arithmetic, pipelines, barriers,
reductions, quantizer, epilogues, the C interface. The emulator's mma, wgmma and prmt follow their definitions lane by lane.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels import build, cuda, cuda_layout, cuda_weight, reference
from lbllm_kernels.activation import ActFactors, quantize_activations
from lbllm_kernels.build_cuda import source_folder
from lbllm_kernels.format import PackedWeight, int8_weight, row_sums
from lbllm_kernels.synthetic import random_packed

EMULATOR = Path(__file__).resolve().parent / "emulator"
PIECEWISE = ActFactors("piecewise", 0.9, 0.95, 0.3, 0.2)
POISONED_LOCALS = ("-ftrivial-auto-var-init=pattern",)  # an index that nothing set is far out of bounds, as it may be in a register


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The C interface, compiled for the CPU."""
    folder, tool = source_folder(), build.compiler()
    if folder is None or tool is None:
        pytest.skip("no C++ compiler")
    at = tmp_path_factory.mktemp("emulated")
    for source in folder.iterdir():
        text = re.sub(r"extern __shared__ __align__\(\d+\) int8_t (\w+)\[\];", r"int8_t* \1 = emulated::shared;", source.read_text())
        (at / (source.stem + ".cpp" if source.suffix == ".cu" else source.name)).write_text(text)
    for stand_in in EMULATOR.iterdir():
        shutil.copy(stand_in, at / stand_in.name)
    (at / "tiled_codebook.cpp").write_text((at / "tiled_codebook.cpp").read_text().replace("tiled.cu", "tiled.cpp"))
    (at / "all.cpp").write_text("".join(f'#include "{name}.cpp"\n' for name in ("quantize", "decode_explicit", "decode_codebook", "tiled", "hopper", "prefill", "lut8_cuda")))
    command = [tool, "-O1", "-shared", "-fPIC", "-std=c++17", "-mf16c", "-ffp-contract=off", "-w", *POISONED_LOCALS, f"-I{at}", "-o", str(at / "emulated.so"), "tiled_codebook.cpp", "all.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=at)
    if "trivial-auto-var-init" in done.stderr:  # compilers older than GCC 12
        done = subprocess.run([word for word in command if word not in POISONED_LOCALS], capture_output=True, text=True, check=False, cwd=at)
    assert done.returncode == 0, done.stderr[:2000]
    library = ctypes.CDLL(str(at / "emulated.so"))
    cuda_weight.declare(library)
    return library


class Weight:
    """A packed weight in the derived layout on the CPU, with the block that the C side reads."""

    def __init__(self, packed: PackedWeight):
        n, g = packed.in_features, packed.group_size
        row_tiles, k_tiles = cuda_layout.count_tiles(packed.out_features, n)
        self.padded, self.rows = 128 * k_tiles, 16 * row_tiles
        groups = cuda_layout.tile_groups(packed.levels if packed.levels is not None else packed.group_codes, n, g)
        book = None if packed.codebook is None else torch.nn.functional.pad(packed.codebook, (0, 256 - packed.codebook.numel()))
        explicit = packed.levels is not None
        self.tensors = [
            cuda_layout.tile_codes(packed.codes, n), groups if explicit else None, None if explicit else groups, book,
            *(cuda_layout.pad_rows(t) for t in (packed.row_scale, row_sums(packed))), None if packed.bias is None else cuda_layout.pad_rows(packed.bias),
        ]  # fmt: skip
        pointers = [None if t is None else t.data_ptr() for t in self.tensors]
        self.block = cuda_weight.WeightBlock(packed.out_features, n, row_tiles, k_tiles, 128 // g, 0, *pointers)
        self.address = ctypes.addressof(self.block)


def numbers(factors: ActFactors) -> tuple[int, ctypes.Array]:
    return cuda._numbers(factors)


def ordered(q: torch.Tensor, path: str) -> torch.Tensor:
    padded = cuda_layout.pad_tokens(q)
    return cuda_layout.wgmma_order(padded) if path.startswith("hopper") else padded


def sums(library, packed: PackedWeight, q: torch.Tensor, path: str, rows: int = 0, warps: int = 0) -> torch.Tensor:
    weight, padded = Weight(packed), ordered(q, path)
    acc = torch.full((q.shape[0], packed.out_features), -(2**31), dtype=torch.int32)
    code = library.lut8_cuda_product(weight.address, padded.data_ptr(), None, None, q.shape[0], None, 0, acc.data_ptr(), cuda.PATHS[path], rows, warps, 64, 0, None)
    assert code == 0
    return acc


def output(library, packed: PackedWeight, x: torch.Tensor, factors: ActFactors, path: str) -> torch.Tensor:
    weight, (top, four) = Weight(packed), numbers(factors)
    m = x.shape[0]
    y = torch.full((m, packed.out_features), float("nan"), dtype=x.dtype)
    q, scale, zero = torch.full((m, weight.padded), 99, dtype=torch.int8), torch.empty(m), torch.empty(m, dtype=torch.int32)
    dtype = cuda.DTYPES[x.dtype]
    pointers = [t.data_ptr() for t in (q, scale, zero, y)]
    code = library.lut8_cuda_linear(weight.address, x.data_ptr(), dtype, m, top, four, *pointers, dtype, cuda.PATHS[path], 0, 0, -1, 0, None)
    assert code == 0
    return y


def test_asking_for_the_next_weight_changes_nothing(emulated):
    """The emulator aborts on a prefetch that is empty or not aligned."""
    packed = random_packed(70, 700, 32, "codebook", 3)
    x = torch.randn(2, 700, generator=torch.Generator().manual_seed(0))
    weight, (top, four) = Weight(packed), numbers(PIECEWISE)
    for size in (16, 528, 40_000, 3_000_000):
        ahead = torch.empty(size, dtype=torch.uint8)
        weight.block.next[0], weight.block.next[1] = ahead.data_ptr(), ahead.data_ptr()
        weight.block.next_bytes[0], weight.block.next_bytes[1] = size, size // 16 // 8 * 16
        y = torch.empty(2, 70)
        assert emulated.lut8_cuda_linear(weight.address, x.data_ptr(), 0, 2, top, four, None, None, None, y.data_ptr(), 0, cuda.PATHS["fused"], 2, 3, 1, 0, None) == 0
        assert torch.equal(y, reference.linear(x, packed, PIECEWISE))


def random_q(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 128, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@given(
    st.integers(1, 16), st.integers(1, 70), st.integers(1, 700), st.sampled_from(cuda_layout.GROUP_SIZES), st.sampled_from(["explicit", "codebook"]),
    st.integers(1, 3), st.sampled_from([1, 2, 3, 5]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_decode_sums_are_exact(emulated, m, out, n, group, mode, rows, warps, seed):
    packed = random_packed(out, n, group, mode, seed)
    q = random_q(m, n, seed)
    assert torch.equal(sums(emulated, packed, q, "decode", rows, warps), reference.accumulate(q, packed))


@given(
    st.integers(1, 16), st.integers(1, 40), st.integers(1, 1500), st.sampled_from(cuda_layout.GROUP_SIZES), st.sampled_from(["explicit", "codebook"]),
    st.sampled_from([0, 8]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_early_sums_are_exact(emulated, m, out, n, group, mode, warps, seed):
    """Warps with four, with fewer and with no k tiles."""
    packed = random_packed(out, n, group, mode, seed)
    q = random_q(m, n, seed)
    assert torch.equal(sums(emulated, packed, q, "early", 1, warps), reference.accumulate(q, packed))


@pytest.mark.parametrize(("m", "n", "warps"), [(8, 4097, 8), (1, 1024, 9), (1, 513, 1), (9, 512, 4)])
def test_early_refuses_what_it_cannot_hold(emulated, m, n, warps):
    weight = Weight(random_packed(16, n, 32, "codebook", 0))
    q, acc = torch.zeros(m, weight.padded, dtype=torch.int8), torch.zeros(m, 16, dtype=torch.int32)
    assert emulated.lut8_cuda_product(weight.address, q.data_ptr(), None, None, m, None, 0, acc.data_ptr(), cuda.PATHS["early"], 1, warps, 0, 0, None) == 1


@pytest.mark.parametrize(
    ("path", "m", "n"),
    [("narrow", 33, 700), ("narrow", 5, 50), ("middle", 70, 1300), ("wide", 17, 400), ("wide", 130, 900), ("hopper128", 5, 100), ("hopper128", 150, 900),
     ("hopper256", 40, 520), ("hopper256", 260, 130)],
)  # fmt: skip
@pytest.mark.parametrize(("mode", "group"), [("explicit", 128), ("codebook", 16)])
def test_many_token_sums_are_exact(emulated, path, m, n, mode, group):
    packed = random_packed(70, n, group, mode, seed=m)
    q = random_q(m, n, seed=n)
    assert torch.equal(sums(emulated, packed, q, path), reference.accumulate(q, packed))


@pytest.mark.parametrize("k_tiles", range(1, 11))
@pytest.mark.parametrize(("mode", "group"), [(mode, group) for mode in ("explicit", "codebook") for group in cuda_layout.GROUP_SIZES])
def test_sums_of_split_blocks_are_exact(emulated, k_tiles, mode, group):
    """Parts with equal and with unequal numbers of k tiles, one of them with none; row and token tiles that are full, short and several."""
    m, out, n = 1 + k_tiles * 29 % 140, 1 + k_tiles * 53 % 280, 128 * k_tiles - k_tiles * 37 % 128
    packed = random_packed(out, n, group, mode, seed=k_tiles, extreme=k_tiles % 2 == 0)
    q = random_q(m, n, seed=n)
    assert torch.equal(sums(emulated, packed, q, "hopper_split"), reference.accumulate(q, packed))


@pytest.mark.parametrize(("path", "m"), [("fused", 1), ("fused", 3), ("fused", 8), ("decode", 1), ("decode", 12), ("sliced", 1), ("sliced", 12), ("early", 3), ("early", 12), ("narrow", 20), ("hopper", 20), ("hopper_split", 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "factors"), [(136, PIECEWISE), (50, ActFactors("uniform")), (300, ActFactors("piecewise"))])
def test_outputs_are_equal(emulated, path, m, dtype, n, factors):
    packed = random_packed(37, n, 32, "codebook", seed=m)
    if n == 136:
        packed = PackedWeight(**{**vars(packed), "bias": torch.randn(37, generator=torch.Generator().manual_seed(1))})
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    if m > 1:
        x[1, 3] = float("nan")
        x[2] = 0
    expected = reference.linear(x, packed, factors)
    assert torch.equal(torch.nan_to_num(output(emulated, packed, x, factors, path).float(), nan=1e9), torch.nan_to_num(expected.float(), nan=1e9))


@pytest.mark.parametrize("flags", [0, cuda.WGMMA_ORDER, cuda.SMALL_BLOCKS])
@pytest.mark.parametrize(("n", "dtype"), [(50, torch.float16), (136, torch.float32), (4096, torch.bfloat16), (8330, torch.float16), (9000, torch.float32)])
def test_the_quantizer_writes_either_order_in_large_and_small_blocks(emulated, n, dtype, flags):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    top, four = numbers(PIECEWISE)
    q, scale, zero = torch.full((5, cuda_layout.padded_channels(n)), 99, dtype=torch.int8), torch.empty(5), torch.empty(5, dtype=torch.int32)
    pointers = [t.data_ptr() for t in (q, scale, zero)]
    assert emulated.lut8_cuda_quantize(0, x.data_ptr(), cuda.DTYPES[dtype], 5, n, q.shape[1], top, four, *pointers, flags, None) == 0
    expected = quantize_activations(x, PIECEWISE)
    assert torch.equal(cuda_layout.channel_order(q) if flags == cuda.WGMMA_ORDER else q, cuda_layout.pad_tokens(expected[0]))
    assert torch.equal(scale, expected[1][:, 0])
    assert torch.equal(zero, expected[2][:, 0])


@pytest.mark.parametrize(("mode", "group"), [("explicit", 16), ("explicit", 64), ("codebook", 32)])
def test_expansion_and_finish_are_exact(emulated, mode, group):
    packed = random_packed(37, 300, group, mode)
    weight, dense = Weight(packed), int8_weight(packed)
    expanded = torch.full((weight.rows, weight.padded), 99, dtype=torch.int8)
    assert emulated.lut8_cuda_dequantize(weight.address, expanded.data_ptr(), None) == 0
    assert torch.equal(expanded[:37, :300], dense)
    q, scale, zero = random_q(20, 300, 1), torch.rand(20), torch.randint(0, 128, (20,), dtype=torch.int32)
    acc, y = torch.nn.functional.pad(reference.int_matmul(q, dense), (0, 11)).contiguous(), torch.empty(20, 37)
    assert emulated.lut8_cuda_finish(weight.address, acc.data_ptr(), 48, scale.data_ptr(), zero.data_ptr(), 20, y.data_ptr(), 0, None) == 0
    assert torch.equal(y, reference.finish(acc[:, :37], scale[:, None], zero[:, None], row_sums(packed), packed.row_scale, None))
