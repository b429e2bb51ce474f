// The activation quantizer as a block-wide device function; quantize_math.h has its float operations.
//
// Two passes over the tokens: extremes, then codes. Extremes are kept as bits of non-negative floats, which order like unsigned integers,
// so a warp reduces them in one instruction.
#pragma once
#include "lut8_cuda.cuh"

namespace lut8 {

constexpr int kTogether = 8;  // tokens that a block quantizes at once

struct QuantizeScratch {
  uint32_t high[32], low[32];  // of each warp
  uint8_t table[kTogether][256];
};

template <int kType>
__device__ __forceinline__ float load_one(const void* x, int64_t at) {
  if (kType == kFloat) return static_cast<const float*>(x)[at];
  if (kType == kHalf) return __half2float(static_cast<const __half*>(x)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[at]);
}

// Eight values from a 16-byte aligned place, as they lie in memory.
template <int kType>
struct Eight {
  uint4 raw[kType == kFloat ? 2 : 1];

  __device__ __forceinline__ void load(const void* x, int64_t at) {
    const uint4* p = reinterpret_cast<const uint4*>(static_cast<const char*>(x) + at * (kType == kFloat ? 4 : 2));
    raw[0] = p[0];
    if constexpr (kType == kFloat) raw[1] = p[1];
  }
  __device__ __forceinline__ float value(int i) const {
    const uint4& four = raw[kType == kFloat ? i / 4 : 0];
    const int at = kType == kFloat ? i % 4 : i / 2;
    const uint32_t word = at == 0 ? four.x : at == 1 ? four.y : at == 2 ? four.z : four.w;
    if (kType == kFloat) return __uint_as_float(word);
    if (kType == kHalf) return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word & 0xffff)));
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
};

// `bad` becomes NaN with the first value that is not finite.
__device__ __forceinline__ void widen(float v, float& high, float& low, float& bad) {
  high = fmaxf(high, v);
  low = fmaxf(low, -v);
  bad = fmaf(v, 0.0f, bad);
}

// Where a warp works: its token, and every `step`-th value from `first` on.
struct Share {
  int token, first, step;
  bool active;
};

// kLoads: vectors under way at once; what registers allow.
template <int kType, int kLoads>
__device__ __forceinline__ void extremes(const void* x, int64_t base, int in, bool vector, const Share& share, float& high, float& low, float& bad) {
  if (!vector) {
#pragma unroll 1
    for (int i = share.first; i < in; i += share.step) widen(load_one<kType>(x, base + i), high, low, bad);
    return;
  }
  const int stride = share.step * 8;
#pragma unroll 1
  for (int i = share.first * 8; i < in; i += kLoads * stride) {
    Eight<kType> eight[kLoads];
#pragma unroll
    for (int l = 0; l < kLoads; ++l)
      if (i + l * stride < in) eight[l].load(x, base + i + l * stride);
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (i + l * stride >= in) break;
#pragma unroll
      for (int j = 0; j < 8; ++j) widen(eight[l].value(j), high, low, bad);
    }
  }
}

// Channels of a token that a block writes, in padded channels, multiples of 128.
struct Range {
  int from, to;
};

template <int kType, int kTop>
__device__ __forceinline__ void write_codes(const void* x, int64_t base, int in, const Range& range, bool vector, const Share& share, const ScaleZero& t,
                                            const uint8_t* table, int8_t* dst, bool wgmma_order) {
  const int end = min(in, range.to);
#pragma unroll 1
  for (int i = max(in, range.from) + share.first; i < range.to; i += share.step) dst[wgmma_order ? wgmma_place(i) : i] = 0;
  if (!t.quick || !vector) {
#pragma unroll 1
    for (int i = range.from + share.first; i < end; i += share.step) {
      const uint32_t code = t.finite ? code_of<kTop>(load_one<kType>(x, base + i) / t.scale, t, table) : 0;
      dst[wgmma_order ? wgmma_place(i) : i] = static_cast<int8_t>(code);
    }
    return;
  }
#pragma unroll 1
  for (int i = range.from + share.first * 8; i < end; i += share.step * 8) {
    Eight<kType> eight;
    eight.load(x, base + i);
    uint32_t packed[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) packed[j / 4] += code_of<kTop>(divided(eight.value(j), t), t, table) << (8 * (j % 4));
    if (wgmma_order) {
      uint32_t* word = reinterpret_cast<uint32_t*>(dst + wgmma_place(i));
      word[0] = packed[0], word[4] = packed[1];
    } else {
      *reinterpret_cast<uint2*>(dst + i) = make_uint2(packed[0], packed[1]);
    }
  }
}

// A warp's share of a token's look-up table. Lane k makes value k; the steps go around by shuffles.
__device__ __forceinline__ void write_table(const Share& share, float zero, const Factors& f, uint8_t* table) {
  const int lane = threadIdx.x & 31, value = piecewise_value(min(lane, 15), zero, f);
  const uint32_t step = piecewise_step(value, __shfl_down_sync(0xffffffffu, value, 1));
  for (int u = share.first; u - lane < 256; u += share.step) {
    uint32_t entry = 0;
#pragma unroll
    for (int k = 0; k < 15; ++k) entry = take_step(entry, __shfl_sync(0xffffffffu, step, k), u);
    table[u] = static_cast<uint8_t>(entry);
  }
}

// Quantizes `count` tokens of x from `row` on (at most kTogether, at most one a warp) with all threads of the block, an equal number of
// warps for each. Token i goes to dst + i * stride (8-byte aligned, shared or global memory, the channels of `range`), its scale and zero
// to scale[i] and zero[i]. The caller synchronizes before it reads any of it, and before the scratch is used again.
template <int kType, int kLoads>
__device__ __forceinline__ void quantize_typed(const void* x, int64_t row, int count, int in, const Range& range, const Factors& f, int8_t* dst, int stride,
                                               float* scale, int* zero, QuantizeScratch& scratch, bool wgmma_order) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, each = count == 1 ? blockDim.x / 32 : blockDim.x / 32 / count;
  const int token = count == 1 ? 0 : warp / each;
  const Share share{token, (warp - token * each) * 32 + lane, each * 32, warp < each * count};
  const bool vector = in % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int64_t base = (row + share.token) * in;
  if (share.active) {
    float high = 0.0f, low = 0.0f, bad = 0.0f;
    extremes<kType, kLoads>(x, base, in, vector, share, high, low, bad);
    const uint32_t h = __reduce_max_sync(0xffffffffu, bad != bad ? 0x7f800000u : __float_as_uint(high));
    const uint32_t l = __reduce_max_sync(0xffffffffu, __float_as_uint(low));
    if (lane == 0) scratch.high[warp] = h, scratch.low[warp] = l;
  }
  __syncthreads();
  ScaleZero t{};
  if (share.active) {
    const int from = share.token * each + lane;
    const uint32_t h = __reduce_max_sync(0xffffffffu, lane < each ? scratch.high[from] : 0u);
    const uint32_t l = __reduce_max_sync(0xffffffffu, lane < each ? scratch.low[from] : 0u);
    t = scale_zero(__uint_as_float(h), __uint_as_float(l), f);
    if (share.first == 0) scale[share.token] = t.scale, zero[share.token] = static_cast<int>(t.zero);
    if (f.top == 127) write_table(share, t.zero, f, scratch.table[share.token]);
  }
  __syncthreads();
  if (!share.active) return;
  const uint8_t* table = scratch.table[share.token];
  dst += share.token * stride;
  if (f.top == 127) write_codes<kType, 127>(x, base, in, range, vector, share, t, table, dst, wgmma_order);
  else write_codes<kType, 15>(x, base, in, range, vector, share, t, table, dst, wgmma_order);
}

template <int kLoads>
__device__ __forceinline__ void quantize_tokens(const void* x, int type, int64_t row, int count, int in, const Range& range, const Factors& f, int8_t* dst, int stride,
                                       float* scale, int* zero, QuantizeScratch& scratch, bool wgmma_order = false) {
  if (type == kFloat) quantize_typed<kFloat, kLoads>(x, row, count, in, range, f, dst, stride, scale, zero, scratch, wgmma_order);
  if (type == kHalf) quantize_typed<kHalf, kLoads>(x, row, count, in, range, f, dst, stride, scale, zero, scratch, wgmma_order);
  if (type == kBfloat) quantize_typed<kBfloat, kLoads>(x, row, count, in, range, f, dst, stride, scale, zero, scratch, wgmma_order);
}

}  // namespace lut8
