// LUT8 products with AVX-512 VNNI: four operations for 64 products a token (shift, and-or, shuffle, vpdpbusd).
//
// vpdpbusd adds four u8 x s8 products to each int32 lane without saturation: exact. A few independent accumulators a token
// hide its latency when there are few tokens; with many tokens the tokens themselves do.
//
// Codebook mode: a gather of sixteen words costs more than all the work on a group of 16 channels. With VBMI the table lies in four
// planes of 256 bytes (byte b of every word), four registers each; two byte permutations look 64 group codes up in a plane, unpacking
// puts the planes together: about seven operations for sixteen words. They are made kAhead groups at a time, into the first-level cache.
// Group codes are a second, thinner stream that is read in bursts, too irregular for the hardware to foresee: each burst asks for the next
// one's. Without that it waits for memory at every start, which took more than a third of the time of a product with one token.
#include <cstring>

#include "lut8_avx512.h"

#define VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace lut8 {
namespace {

constexpr int64_t kAhead = 64;        // groups, a multiple of 4
constexpr int64_t kCodesAhead = 128;  // chunks that one token asks for in advance (8 KB)

struct Planes {
  alignas(64) uint8_t byte[4][256];
};

AVX512 void split_planes(const int32_t* codebook, Planes& planes) {
  for (int64_t e = 0; e < 256; e += 16) {
    const __m512i words = _mm512_loadu_si512(codebook + e);
    _mm_store_si128(reinterpret_cast<__m128i*>(planes.byte[0] + e), _mm512_cvtepi32_epi8(words));
    _mm_store_si128(reinterpret_cast<__m128i*>(planes.byte[1] + e), _mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(planes.byte[2] + e), _mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 16)));
    _mm_store_si128(reinterpret_cast<__m128i*>(planes.byte[3] + e), _mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 24)));
  }
}

VBMI INLINE __m512i look_up(const uint8_t* plane, __m512i index, __mmask64 high_half) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(plane), index, _mm512_load_si512(plane + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), index, _mm512_load_si512(plane + 192));
  return _mm512_mask_blend_epi8(high_half, low, high);
}

// Level words of `count` groups (at most kAhead) of a tile, from group `group` on: words (count, 16).
VBMI void look_up_words(const Lut8Weight& w, const Planes& planes, int64_t tile, int64_t group, int64_t count, int32_t* words) {
  const uint8_t* codes = w.group_codes + (tile * w.n_groups + group) * kRows;
  for (int64_t g = 0; g < count; g += 4) {
    const __mmask64 real = count - g >= 4 ? ~0ull : (1ull << 16 * (count - g)) - 1;
    const __m512i index = _mm512_maskz_loadu_epi8(real, codes + g * kRows);
    _mm_prefetch(reinterpret_cast<const char*>(codes + (g + kAhead) * kRows), _MM_HINT_T0);
    const __mmask64 high = _mm512_movepi8_mask(index);
    const __m512i b0 = look_up(planes.byte[0], index, high), b1 = look_up(planes.byte[1], index, high);
    const __m512i b2 = look_up(planes.byte[2], index, high), b3 = look_up(planes.byte[3], index, high);
    const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    // Quarter j of rI holds rows 4i .. 4i+3 of group g + j; transposed, group g + j holds all its rows.
    const __m512i r0 = _mm512_unpacklo_epi16(low01, low23), r1 = _mm512_unpackhi_epi16(low01, low23);
    const __m512i r2 = _mm512_unpacklo_epi16(high01, high23), r3 = _mm512_unpackhi_epi16(high01, high23);
    const __m512i a = _mm512_shuffle_i32x4(r0, r1, 0x44), b = _mm512_shuffle_i32x4(r2, r3, 0x44);
    const __m512i c = _mm512_shuffle_i32x4(r0, r1, 0xee), d = _mm512_shuffle_i32x4(r2, r3, 0xee);
    int32_t* to = words + g * kRows;
    _mm512_store_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(to + 16, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_store_si512(to + 32, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_store_si512(to + 48, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

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
VNNI void block(const Lut8Weight& w, const Product& p, const Planes* planes, int64_t tile, int64_t token) {
  alignas(64) int32_t looked_up[kAhead * kRows];
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
    if (planes && g % kAhead == 0) look_up_words(w, *planes, tile, g, w.n_groups - g < kAhead ? w.n_groups - g : kAhead, looked_up);
    const __m512i words = planes ? _mm512_load_si512(looked_up + g % kAhead * kRows) : level_words(w, tile, g);
    const int64_t end = (g + 1) * span < w.chunks ? (g + 1) * span : w.chunks;
    for (int64_t c = g * span; c < end; ++c) {
      const __m512i d = _mm512_loadu_si512(codes + c * kRows);
      if (MT == 1) _mm_prefetch(reinterpret_cast<const char*>(codes + (c + kCodesAhead) * kRows), _MM_HINT_T0);
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
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  Planes table;
  const Planes* planes = vbmi && w.group_codes ? &table : nullptr;
  if (planes) split_planes(w.codebook, table);
  for (int64_t tile = first; tile < last; ++tile) {
    int64_t m = 0;
    for (; m + 16 <= p.m; m += 16) block<16, 1>(w, p, planes, tile, m);
    for (; m + 8 <= p.m; m += 8) block<8, 1>(w, p, planes, tile, m);
    for (; m + 4 <= p.m; m += 4) block<4, 2>(w, p, planes, tile, m);
    for (; m + 2 <= p.m; m += 2) block<2, 4>(w, p, planes, tile, m);
    for (; m < p.m; ++m) block<1, 4>(w, p, planes, tile, m);
  }
}

}  // namespace lut8
