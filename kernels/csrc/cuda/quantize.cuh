// The activation quantizer as a block-wide device function; quantize_math.h has its float operations.
//
// Two passes over a token: extremes, then codes. Extremes are kept as bits of non-negative floats, which order like unsigned integers,
// so a warp reduces them in one instruction.
#pragma once
#include "lut8_cuda.cuh"

namespace lut8 {

struct QuantizeScratch {
  uint32_t high[32], low[32];
  uint8_t table[256];
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

// Quantizes token `row` of x into dst (padded bytes, 8-byte aligned, shared or global memory) with all threads of the block; every
// thread gets scale and zero. `wgmma_order`: see layout.h. The caller synchronizes before dst is read, and between two tokens (the scratch is used again).
__device__ inline ScaleZero quantize_token(const void* x, int type, int64_t row, int in, int padded, const Factors& f, int8_t* dst,
                                           QuantizeScratch& scratch, bool wgmma_order = false) {
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31;
  const int64_t base = row * in;
  const bool vector = in % 8 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  float high = 0.0f, low = 0.0f, v[8];
  bool bad = false;
  if (vector) {
    for (int i = tid * 8; i < in; i += threads * 8) {
      load_eight(x, type, base + i, v);
#pragma unroll
      for (int j = 0; j < 8; ++j) widen(v[j], high, low, bad);
    }
  } else {
    for (int i = tid; i < in; i += threads) widen(load_one(x, type, base + i), high, low, bad);
  }
  const uint32_t h = __reduce_max_sync(0xffffffffu, bad ? 0x7f800000u : __float_as_uint(high));
  const uint32_t l = __reduce_max_sync(0xffffffffu, __float_as_uint(low));
  if (lane == 0) scratch.high[tid / 32] = h, scratch.low[tid / 32] = l;
  __syncthreads();
  const bool used = lane < threads / 32;
  high = __uint_as_float(__reduce_max_sync(0xffffffffu, used ? scratch.high[lane] : 0u));
  low = __uint_as_float(__reduce_max_sync(0xffffffffu, used ? scratch.low[lane] : 0u));
  const ScaleZero t = scale_zero(high, low, f);
  for (int i = in + tid; i < padded; i += threads) dst[wgmma_order ? wgmma_place(i) : i] = 0;
  if (!t.finite) {
    for (int i = tid; i < in; i += threads) dst[wgmma_order ? wgmma_place(i) : i] = 0;
    return t;
  }
  if (f.top == 127) {
    for (int u = tid; u < 256; u += threads) scratch.table[u] = piecewise_entry(u, t.zero, f);
    __syncthreads();
  }
  if (!vector) {
    for (int i = tid; i < in; i += threads) {
      const uint32_t code = code_of(load_one(x, type, base + i), t, f.top, scratch.table);
      dst[wgmma_order ? wgmma_place(i) : i] = static_cast<int8_t>(code);
    }
    return t;
  }
  for (int i = tid * 8; i < in; i += threads * 8) {
    load_eight(x, type, base + i, v);
    uint32_t packed[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) packed[j / 4] |= code_of(v[j], t, f.top, scratch.table) << (8 * (j % 4));
    if (wgmma_order) {
      uint32_t* word = reinterpret_cast<uint32_t*>(dst + wgmma_place(i));
      word[0] = packed[0], word[4] = packed[1];
    } else {
      *reinterpret_cast<uint2*>(dst + i) = make_uint2(packed[0], packed[1]);
    }
  }
  return t;
}

}  // namespace lut8
