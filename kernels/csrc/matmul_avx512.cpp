// LUT8 products with AVX-512 VNNI: four operations for 64 products a token (shift, and-or, shuffle, vpdpbusd).
//
// vpdpbusd adds four u8 x s8 products to each int32 lane without saturation: exact. A few independent accumulators a token
// hide its latency when there are few tokens; with many tokens the tokens themselves do.
#include <cstring>

#include "lut8_avx512.h"

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace lut8 {
namespace {

template <int MT, int S, int T>
VNNI INLINE void step(__m512i (&acc)[MT][S], __m512i level, const uint8_t* q, int64_t stride) {
#pragma GCC unroll 16
  for (int m = 0; m < MT; ++m) {
    int32_t four;
    std::memcpy(&four, q + m * stride + 4 * T, 4);
    acc[m][T % S] = _mm512_dpbusd_epi32(acc[m][T % S], _mm512_set1_epi32(four), level);
  }
}

template <int MT, int S>
VNNI void block(const Lut8Weight& w, const Product& p, int64_t tile, int64_t token) {
  const __m512i lane = lane_offsets();
  const uint32_t* codes = w.codes + tile * w.chunks * kRows;
  const uint8_t* q = p.q + token * p.stride;
  const int64_t span = w.group / kChunk;
  __m512i acc[MT][S];
#pragma GCC unroll 16
  for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) acc[m][s] = _mm512_setzero_si512();
  for (int64_t g = 0; g < w.n_groups; ++g) {
    const __m512i words = level_words(w, tile, g);
    const int64_t end = (g + 1) * span < w.chunks ? (g + 1) * span : w.chunks;
    for (int64_t c = g * span; c < end; ++c) {
      const __m512i d = _mm512_loadu_si512(codes + c * kRows);
      if (MT == 1) _mm_prefetch(reinterpret_cast<const char*>(codes + (c + 24) * kRows), _MM_HINT_T0);
      const uint8_t* at = q + c * kChunk;
      step<MT, S, 0>(acc, expand<0>(d, words, lane), at, p.stride);
      step<MT, S, 1>(acc, expand<1>(d, words, lane), at, p.stride);
      step<MT, S, 2>(acc, expand<2>(d, words, lane), at, p.stride);
      step<MT, S, 3>(acc, expand<3>(d, words, lane), at, p.stride);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MT; ++m) {
    __m512i sum = acc[m][0];
#pragma GCC unroll 4
    for (int s = 1; s < S; ++s) sum = _mm512_add_epi32(sum, acc[m][s]);
    store(w, p, token + m, tile, sum);
  }
}

}  // namespace

VNNI void matmul_avx512(const Lut8Weight& w, const Product& p, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    int64_t m = 0;
    for (; m + 16 <= p.m; m += 16) block<16, 1>(w, p, tile, m);
    for (; m + 8 <= p.m; m += 8) block<8, 1>(w, p, tile, m);
    for (; m + 4 <= p.m; m += 4) block<4, 2>(w, p, tile, m);
    for (; m + 2 <= p.m; m += 2) block<2, 4>(w, p, tile, m);
    for (; m < p.m; ++m) block<1, 4>(w, p, tile, m);
  }
}

}  // namespace lut8
