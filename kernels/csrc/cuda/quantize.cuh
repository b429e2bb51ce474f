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

__device__ __forceinline__ float load_one(const void* x, int type, int64_t at) {
  if (type == kFloat) return static_cast<const float*>(x)[at];
  if (type == kHalf) return __half2float(static_cast<const __half*>(x)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[at]);
}

// Eight values from a 16-byte aligned place.
__device__ __forceinline__ void load_eight(const void* x, int type, int64_t at, float (&v)[8]) {
  if (type == kFloat) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(x) + at);
    const float4 a = p[0], b = p[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    return;
  }
  const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x) + at);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (type == kHalf) {
      v[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffff)));
      v[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    } else {
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

__device__ __forceinline__ void widen(float v, float& high, float& low, bool& bad) {
  high = fmaxf(high, v);
  low = fmaxf(low, -v);
  bad |= v != v;
}

// Where a warp works: its token, and every `step`-th value from `first` on.
struct Share {
  int token, first, step;
  bool active;
};

__device__ __forceinline__ void extremes(const void* x, int type, int64_t base, int in, bool vector, const Share& share, float& high, float& low, bool& bad) {
  if (vector) {
    float v[8];
    for (int i = share.first * 8; i < in; i += share.step * 8) {
      load_eight(x, type, base + i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) widen(v[j], high, low, bad);
    }
  } else {
    for (int i = share.first; i < in; i += share.step) widen(load_one(x, type, base + i), high, low, bad);
  }
}

__device__ __forceinline__ void write_codes(const void* x, int type, int64_t base, int in, int padded, bool vector, const Share& share, const ScaleZero& t,
                                            int top, const uint8_t* table, int8_t* dst, bool wgmma_order) {
  for (int i = in + share.first; i < padded; i += share.step) dst[wgmma_order ? wgmma_place(i) : i] = 0;
  if (!t.finite || !vector) {
    for (int i = share.first; i < in; i += share.step) {
      const uint32_t code = t.finite ? code_of(load_one(x, type, base + i), t, top, table) : 0;
      dst[wgmma_order ? wgmma_place(i) : i] = static_cast<int8_t>(code);
    }
    return;
  }
  for (int i = share.first * 8; i < in; i += share.step * 8) {
    float v[8];
    load_eight(x, type, base + i, v);
    uint32_t packed[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) packed[j / 4] |= code_of(v[j], t, top, table) << (8 * (j % 4));
    if (wgmma_order) {
      uint32_t* word = reinterpret_cast<uint32_t*>(dst + wgmma_place(i));
      word[0] = packed[0], word[4] = packed[1];
    } else {
      *reinterpret_cast<uint2*>(dst + i) = make_uint2(packed[0], packed[1]);
    }
  }
}

// Quantizes `count` tokens of x from `row` on (at most kTogether, at most one a warp) with all threads of the block, an equal number of
// warps for each. Token i goes to dst + i * stride (8-byte aligned, shared or global memory, `padded` bytes), its scale and zero to
// scale[i] and zero[i]. The caller synchronizes before it reads any of it, and before the scratch is used again.
__device__ inline void quantize_tokens(const void* x, int type, int64_t row, int count, int in, int padded, const Factors& f, int8_t* dst, int stride,
                                       float* scale, int* zero, QuantizeScratch& scratch, bool wgmma_order = false) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, each = blockDim.x / 32 / count;
  const Share share{warp / each, warp % each * 32 + lane, each * 32, warp < each * count};
  const bool vector = in % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const int64_t base = (row + share.token) * in;
  if (share.active) {
    float high = 0.0f, low = 0.0f;
    bool bad = false;
    extremes(x, type, base, in, vector, share, high, low, bad);
    const uint32_t h = __reduce_max_sync(0xffffffffu, bad ? 0x7f800000u : __float_as_uint(high));
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
    if (f.top == 127)
      for (int u = share.first; u < 256; u += share.step) scratch.table[share.token][u] = piecewise_entry(u, t.zero, f);
  }
  __syncthreads();
  if (share.active) write_codes(x, type, base, in, padded, vector, share, t, f.top, scratch.table[share.token], dst + share.token * stride, wgmma_order);
}

}  // namespace lut8
