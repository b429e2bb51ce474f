// What the CUDA files share: argument blocks, weights in registers, outputs.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"
#include "ptx.cuh"
#include "quantize_math.h"

namespace lut8 {

enum Type : int { kFloat = 0, kHalf = 1, kBfloat = 2 };

// A packed weight in the derived layout (all device pointers). Exactly one of words and group_codes is set.
extern "C" struct Lut8CudaWeight {
  int32_t out, in, row_tiles, k_tiles, groups_per_tile, device;
  const uint32_t* codes;
  const int32_t* words;
  const uint8_t* group_codes;
  const int32_t* codebook;  // 256 entries
  const float* row_scale;
  const int32_t* row_sum;
  const float* bias;        // may be null
  const void* next[2];      // codes and levels of the weight that is needed next, may be null: decode asks them into the L2
  uint32_t next_bytes[2];   // multiples of 16
};

// Tokens: x (m, in) to be quantized by the kernel itself, or q (m, k_tiles * 128) with scale and zero.
struct Tokens {
  const void* x;
  int32_t x_type, m;
  Factors factors;
  const int8_t* q;
  const float* scale;
  const int32_t* zero;
};

// Where results go: y (m, out) of y_type, or the raw sums when acc is not null.
struct Output {
  void* y;
  int32_t y_type;
  int32_t* acc;
};

// How a decode launch is cut. Zero fields are chosen from the shape.
struct Plan {
  int row_tiles, warps, prefetch, overlap;  // prefetch: k tiles asked into the L2 ahead, negative: chosen; overlap: programmatic dependent launch (Hopper)
  bool early;  // small layers: weights expanded before the tokens are there; one row tile a block
};

// Blocks of 128 or 256 tokens, or of 128 with K split between two halves of a block.
enum HopperCut : int { kByRule = 0, kTokens128 = 1, kTokens256 = 2, kSplitK = 3 };

cudaError_t covered();  // whether the current device has code in this object
cudaError_t quantize(const Tokens& t, int64_t in, int64_t padded, int8_t* q, float* scale, int32_t* zero, bool small, bool wgmma_order, bool overlap,
                     cudaStream_t stream);
cudaError_t decode(const Lut8CudaWeight& w, const Tokens& t, const Output& o, Plan plan, cudaStream_t stream);
cudaError_t tiled(const Lut8CudaWeight& w, const Tokens& t, const Output& o, int shape, bool overlap, cudaStream_t stream);
cudaError_t hopper(const Lut8CudaWeight& w, const Tokens& t, const Output& o, HopperCut cut, bool overlap, cudaStream_t stream);
cudaError_t dequantize(const Lut8CudaWeight& w, int8_t* weight, cudaStream_t stream);
cudaError_t finish(const Lut8CudaWeight& w, const Tokens& t, const int32_t* acc, int64_t stride, const Output& o, cudaStream_t stream);

// The float operations of reference.finish, in its order and without contraction.
__device__ __forceinline__ float finish_one(int acc, float scale, int zero, float row_scale, int row_sum) {
  return __fmul_rn(__fmul_rn(scale, row_scale), __int2float_rn(acc - zero * row_sum));
}

__device__ __forceinline__ void store_one(const Output& o, int64_t at, float v) {
  if (o.y_type == kFloat) static_cast<float*>(o.y)[at] = v;
  if (o.y_type == kHalf) static_cast<__half*>(o.y)[at] = __float2half_rn(v);
  if (o.y_type == kBfloat) static_cast<__nv_bfloat16*>(o.y)[at] = __float2bfloat16_rn(v);
}

// Up to four neighbours; `aligned`: the row length is a multiple of four, so all four lie inside one aligned word.
__device__ __forceinline__ void store_four(const Output& o, int64_t at, const float (&v)[4], int n, bool aligned) {
  if (!aligned || n < 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < n) store_one(o, at + j, v[j]);
  } else if (o.y_type == kFloat) {
    *reinterpret_cast<float4*>(static_cast<float*>(o.y) + at) = make_float4(v[0], v[1], v[2], v[3]);
  } else if (o.y_type == kHalf) {
    const __half2 low = __floats2half2_rn(v[0], v[1]), high = __floats2half2_rn(v[2], v[3]);
    *reinterpret_cast<uint2*>(static_cast<__half*>(o.y) + at) =
        make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  } else {
    const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]), high = __floats2bfloat162_rn(v[2], v[3]);
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(o.y) + at) =
        make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
  }
}

// The levels of one lane and row tile: the words of rows g and g + 8, for one group or (groups of 16 channels) for two.
// `words` gives them as [half of the channels][row]; `table` is the shared address of the codebook.
template <bool kCodebook, bool kTwo>
struct Levels;
template <>
struct Levels<false, false> {
  int2 raw;
  __device__ __forceinline__ void load(const Lut8CudaWeight& w, int at) { raw = __ldg(reinterpret_cast<const int2*>(w.words + at)); }
  __device__ __forceinline__ void words(uint32_t, uint32_t (&to)[2][2]) const { to[0][0] = to[1][0] = raw.x, to[0][1] = to[1][1] = raw.y; }
};
template <>
struct Levels<false, true> {
  int4 raw;
  __device__ __forceinline__ void load(const Lut8CudaWeight& w, int at) { raw = __ldg(reinterpret_cast<const int4*>(w.words + at)); }
  __device__ __forceinline__ void words(uint32_t, uint32_t (&to)[2][2]) const { to[0][0] = raw.x, to[0][1] = raw.y, to[1][0] = raw.z, to[1][1] = raw.w; }
};
template <>
struct Levels<true, false> {
  uint32_t raw;
  __device__ __forceinline__ void load(const Lut8CudaWeight& w, int at) { raw = __ldg(reinterpret_cast<const unsigned short*>(w.group_codes + at)); }
  __device__ __forceinline__ void words(uint32_t table, uint32_t (&to)[2][2]) const {
    to[0][0] = to[1][0] = load_shared(table + (raw & 255) * 4);
    to[0][1] = to[1][1] = load_shared(table + (raw >> 8 & 255) * 4);  // masked: a k tile beyond the last was never loaded, and is looked up all the same
  }
};
template <>
struct Levels<true, true> {
  uint32_t raw;
  __device__ __forceinline__ void load(const Lut8CudaWeight& w, int at) { raw = __ldg(reinterpret_cast<const uint32_t*>(w.group_codes + at)); }
  __device__ __forceinline__ void words(uint32_t table, uint32_t (&to)[2][2]) const {
    to[0][0] = load_shared(table + (raw & 255) * 4), to[0][1] = load_shared(table + (raw >> 8 & 255) * 4);
    to[1][0] = load_shared(table + (raw >> 16 & 255) * 4), to[1][1] = load_shared(table + (raw >> 24) * 4);
  }
};

// Codes and levels of a lane in kRows row tiles of one k tile. Row tiles beyond the last repeat it: their sums are never stored.
template <int kRows, bool kCodebook, bool kTwo>
struct WeightTile {
  uint4 codes[kRows];
  Levels<kCodebook, kTwo> levels[kRows];

  __device__ __forceinline__ void load(const Lut8CudaWeight& w, int first_row_tile, int k_tile, int lane) {
    if (k_tile >= w.k_tiles) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int tile = tile_index(min(first_row_tile + r, w.row_tiles - 1), k_tile, w.k_tiles);
      codes[r] = load_once(reinterpret_cast<const uint4*>(w.codes) + tile * 32 + lane);
      levels[r].load(w, tile * (16 * w.groups_per_tile) + level_offset(lane, w.groups_per_tile));
    }
  }
};

// Asks for `count` k tiles, from `from` on, of the block's row tiles to be in the L2: one thread a row tile. Registers hold a tile or two a
// warp; the rest of the memory's latency is hidden here.
constexpr int kPrefetch = 64;  // k tiles where nothing else was measured: a multiprocessor's share stays far below the L2's size

template <bool kCodebook>
__device__ __forceinline__ void prefetch_tiles(const Lut8CudaWeight& w, int first_row_tile, int rows, int from, int count) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, tiles = min(count, w.k_tiles - from);
  if (threadIdx.x % 32 || tiles <= 0) return;
  for (int r = warp; r < rows; r += warps) {
    if (first_row_tile + r >= w.row_tiles) break;
    const int64_t at = tile_index(first_row_tile + r, from, w.k_tiles);
    const int entries = 16 * w.groups_per_tile;
    prefetch_bulk(w.codes + at * 128, tiles * 512);
    if (kCodebook) prefetch_bulk(w.group_codes + at * entries, tiles * entries);
    else prefetch_bulk(w.words + at * entries, tiles * entries * 4);
  }
}

// Half a tile (16 channels a lane, two mma steps) of A fragments: a[step] for rows g (registers 0, 2) and g + 8 (registers 1, 3).
__device__ __forceinline__ void expand(const uint4& codes, const uint32_t (&words)[2][2], int half, uint32_t (&a)[2][4]) {
  const uint32_t upper_codes = half ? codes.y : codes.x, lower_codes = half ? codes.w : codes.z, upper = words[half][0], lower = words[half][1];
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint32_t u = upper_codes >> (2 * step) & kSelector, l = lower_codes >> (2 * step) & kSelector;
    a[step][0] = prmt(upper, u);
    a[step][1] = prmt(lower, l);
    a[step][2] = prmt(upper, u >> 16);
    a[step][3] = prmt(lower, l >> 16);
  }
}

}  // namespace lut8
