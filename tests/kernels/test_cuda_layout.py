"""The CUDA layout without a GPU: index functions against the stored format, and the mma fragments lane by lane."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lbllm_kernels import build, cuda_layout, reference
from lbllm_kernels.build_cuda import source_folder
from lbllm_kernels.format import group_words, int8_weight, unpack_codes
from lbllm_kernels.synthetic import random_packed

GROUPS = st.sampled_from(cuda_layout.GROUP_SIZES)
MODES = st.sampled_from(["explicit", "codebook"])


def code_in_word(word: int, channel: int) -> int:
    return (word & 0xFFFFFFFF) >> 4 * (channel % 8) + 2 * (channel // 8) & 3


def test_code_tiles_follow_the_drawing():
    packed = random_packed(21, 150, 16, seed=3)
    codes = unpack_codes(packed.codes, 150)
    tiles = cuda_layout.tile_codes(packed.codes, 150)
    assert tiles.shape == (2, 2, 32, 4)
    for row in range(32):
        for k in range(256):
            g, half, t, inside = row % 8, row // 8 % 2, k % 128 // 32, k % 32
            word = int(tiles[row // 16, k // 128, 4 * g + t, 2 * half + inside // 16])
            assert code_in_word(word, inside % 16) == (int(codes[row, k]) if row < 21 and k < 150 else 0)


@pytest.mark.parametrize("group", cuda_layout.GROUP_SIZES)
def test_group_tiles_follow_the_drawing(group):
    n_groups = -(-150 // group)
    words = torch.arange(1, 18 * n_groups + 1, dtype=torch.int32).view(18, n_groups)
    tiles = cuda_layout.tile_groups(words, 150, group)
    per_tile = 128 // group
    assert tiles.shape == (2, 2, 8, per_tile, 2)
    for row in range(32):
        for j in range(2 * per_tile):
            expected = int(words[row, j]) if row < 18 and j < n_groups else 0
            assert tiles[row // 16, j // per_tile, row % 8, j % per_tile, row // 8 % 2] == expected


@given(st.integers(1, 40), st.integers(1, 400), GROUPS, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_stored_tensors_come_back(out, n, group, seed):
    packed = random_packed(out, n, group, "codebook", seed)
    assert torch.equal(cuda_layout.untile_codes(cuda_layout.tile_codes(packed.codes, n), out, n), packed.codes)
    groups = cuda_layout.tile_groups(packed.group_codes, n, group)
    assert torch.equal(cuda_layout.untile_groups(groups, out, packed.n_groups), packed.group_codes)


def prmt(word: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """`prmt.b32 d, word, word, selector` for selectors whose nibbles are 0..3: int64 bits -> int8 (..., 4)."""
    nibbles = torch.stack([selector >> 4 * i & 15 for i in range(4)], -1)
    assert int(nibbles.max()) <= 3
    picked = word[..., None] >> 8 * nibbles & 255
    return torch.where(picked > 127, picked - 256, picked)


def bits(words: torch.Tensor) -> torch.Tensor:
    return words.to(torch.int64) & 0xFFFFFFFF


def emulated_sums(packed, q: torch.Tensor) -> torch.Tensor:
    """What the kernels compute for `q (M, in)`: every lane's registers, multiplied as mma.m16n8k32 defines them, tile by tile.

    Register i of A in lane 4g+t holds row `g + 8*(i % 2)` and k `4t + 16*(i // 2) .. +3`; register i of B holds token g, the same k.
    """
    n, group = packed.in_features, packed.group_size
    codes = bits(cuda_layout.tile_codes(packed.codes, n))
    levels = bits(cuda_layout.tile_groups(group_words(packed), n, group))
    row_tiles, k_tiles = codes.shape[:2]
    padded = cuda_layout.pad_tokens(q).to(torch.int64)
    acc = torch.zeros((row_tiles, 16, q.shape[0]), dtype=torch.int64)
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    flat = levels.reshape(row_tiles, k_tiles, -1)
    offset = (g * (128 // group) + t * (128 // group) // 4) * 2
    for half in range(2):
        second = 2 * half if group == 16 else 0
        upper, lower = flat[..., offset + second], flat[..., offset + second + 1]
        for step in range(2):
            a = torch.zeros((row_tiles, k_tiles, 16, 32), dtype=torch.int64)  # rows x k of one mma
            b = torch.zeros((k_tiles, 32, q.shape[0]), dtype=torch.int64)
            for register in range(4):
                row, high = register % 2, register // 2
                word = codes[..., half + 2 * row] >> 2 * step & 0x33333333
                weights = prmt(lower if row else upper, word >> 16 if high else word & 0xFFFF)
                k = 4 * t[:, None] + 16 * high + torch.arange(4)
                a[:, :, (g + 8 * row)[:, None].expand(32, 4), k] = weights
                channel = 32 * t[:, None] + 16 * half + 8 * step + 4 * high + torch.arange(4)
                tokens = padded.view(q.shape[0], k_tiles, 128)[:, :, channel]
                b[:, k] = tokens.permute(1, 2, 3, 0)
            acc += torch.einsum("rkij,kjm->rim", a, b)
    return acc.reshape(row_tiles * 16, -1)[: packed.out_features].T.to(torch.int32)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 400), GROUPS, MODES, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_fragments_multiply_to_the_reference(m, out, n, group, mode, seed):
    packed = random_packed(out, n, group, mode, seed, entries=1 + seed * 2)
    q = torch.randint(0, 128, (m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert torch.equal(emulated_sums(packed, q), reference.accumulate(q, packed))


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """layout.h compiled as plain C++: the same functions that the kernels call."""
    folder, tool = source_folder(), build.compiler()
    if folder is None or tool is None:
        pytest.skip("no C++ compiler")
    at = tmp_path_factory.mktemp("layout")
    (at / "shim.cpp").write_text(
        '#include "layout.h"\nusing namespace lut8;\nextern "C" {\n'
        "int tile(int r, int k, int n) { return tile_index(r, k, n); }\n"
        "long long code(int tile, int lane) { return code_index(tile, lane); }\n"
        "int level(int tile, int lane, int groups) { return level_index(tile, lane, groups); }\n"
        "unsigned select(unsigned word, int quad) { return selector(word, quad) & 0xffff; }\n"
        "int shift(int channel) { return code_shift(channel); }\n"
        "int row(int lane, int half) { return lane_row(lane, half); }\n"
        "int channel(int lane) { return lane_channel(lane); }\n"
        "int place(int channel) { return wgmma_place(channel); }\n"
        "int chunk(int token, int chunk) { return chunk_offset(token, chunk); }\n}\n"
    )
    done = subprocess.run([tool, "-shared", "-fPIC", "-std=c++17", f"-I{folder}", str(at / "shim.cpp"), "-o", str(at / "shim.so")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(at / "shim.so"))
    library.code.restype = ctypes.c_longlong
    library.select.restype = library.select.argtypes = None
    library.select.argtypes, library.select.restype = [ctypes.c_uint32, ctypes.c_int], ctypes.c_uint32
    return library


@pytest.mark.parametrize(("group", "mode"), [(16, "codebook"), (32, "codebook"), (64, "explicit"), (128, "explicit"), (16, "explicit")])
def test_the_header_reads_the_layout(header, group, mode):
    """Every weight through the C++ index functions: code word, selector, level, row and channel."""
    packed = random_packed(40, 300, group, mode, seed=group)
    weight = int8_weight(packed)
    codes = cuda_layout.tile_codes(packed.codes, 300).view(-1)
    words = cuda_layout.tile_groups(group_words(packed), 300, group).view(-1)
    per_tile = 128 // group
    for row_tile in range(3):
        for k_tile in range(3):
            tile = header.tile(row_tile, k_tile, 3)
            for lane in range(32):
                for register in range(4):
                    word = int(codes[header.code(tile, lane) + register]) & 0xFFFFFFFF
                    row = 16 * row_tile + header.row(lane, register // 2)
                    extra = 2 * (register % 2) if group == 16 else 0
                    level = words[header.level(tile, lane, per_tile) + extra + register // 2].view(1).view(torch.int8)
                    for c in range(16):
                        k = 128 * k_tile + header.channel(lane) + 16 * (register % 2) + c
                        nibble = header.select(word, c // 4) >> 4 * (c % 4) & 15
                        assert nibble == word >> header.shift(c) & 3
                        if row < 40 and k < 300:
                            assert level[nibble] == weight[row, k]


def test_shared_chunks_are_a_permutation_without_bank_conflicts(header):
    offsets = [header.chunk(token, chunk) for token in range(16) for chunk in range(8)]
    assert sorted(offsets) == list(range(0, 16 * 128, 16))
    for half in range(2):
        for phase in range(4):  # eight lanes a phase of a 16-byte load
            lanes = range(8 * phase, 8 * phase + 8)
            banks = {header.chunk(lane // 4, lane % 4 * 2 + half) // 16 % 8 for lane in lanes}
            assert len(banks) == 8
        for token in range(8):  # the second half of a lane's channels is one bit away
            for t in range(4):
                assert header.chunk(token, 2 * t + 1) == header.chunk(token, 2 * t) ^ 16


def test_wgmma_order_is_where_the_registers_look(header):
    """Step s reads place 32s + 16h + 4t + j for register pair h of lane t; A holds channel 32t + 8s + 4h + j there."""
    q = torch.arange(256, dtype=torch.int16)[None].to(torch.int8)
    ordered = cuda_layout.wgmma_order(q)
    assert torch.equal(cuda_layout.channel_order(ordered), q)
    for block in (0, 128):
        for s in range(4):
            for h in range(2):
                for t in range(4):
                    for j in range(4):
                        place, channel = block + 32 * s + 16 * h + 4 * t + j, block + 32 * t + 8 * s + 4 * h + j
                        assert ordered[0, place] == q[0, channel]
                        assert header.place(channel) == place
