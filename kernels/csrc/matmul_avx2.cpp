// LUT8 products with AVX2: vpshufb picks the levels, vpmaddubsw multiplies u8 by s8 and adds pairs.
//
// Exactness: a pair is at most 2 * 127 * 127 = 32258, so the saturating int16 sum never saturates (this is why codes stop at 127
// and levels at +-127); vpmaddwd with ones widens to int32 before anything else is added. The 16 rows of a tile are two halves
// of eight.
#include <immintrin.h>

#include <cstring>

#include "lut8.h"

#define AVX2 __attribute__((target("avx2")))

namespace lut8 {
namespace {

AVX2 inline __m256i level_words(const Lut8Weight& w, int64_t tile, int64_t group, int half) {
  const int64_t at = (tile * w.n_groups + group) * kRows + 8 * half;
  if (w.words) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.words + at));
  const __m128i entries = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.group_codes + at));
  return _mm256_i32gather_epi32(w.codebook, _mm256_cvtepu8_epi32(entries), 4);
}

AVX2 inline void store(const Lut8Weight& w, const Product& p, int64_t token, int64_t row, __m256i acc) {
  alignas(32) int32_t sums[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums), acc);
  const int64_t n = w.out - row < 8 ? w.out - row : 8;
  if (p.acc) {
    for (int64_t i = 0; i < n; ++i) p.acc[token * w.out + row + i] = sums[i];
    return;
  }
  const float s = p.scale[token];
  const int32_t z = p.zero[token];
  for (int64_t i = 0; i < n; ++i) {
    const float v = (s * w.row_scale[row + i]) * static_cast<float>(sums[i] - z * w.row_sum[row + i]);
    p.y[token * w.out + row + i] = w.bias ? v + w.bias[row + i] : v;
  }
}

template <int MT>
AVX2 void block(const Lut8Weight& w, const Product& p, int64_t tile, int half, int64_t token) {
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  const __m256i lane = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
  const uint32_t* codes = w.codes + tile * w.chunks * kRows + 8 * half;
  const uint8_t* q = p.q + token * p.stride;
  const int64_t span = w.group / kChunk;
  __m256i acc[MT];
  for (int m = 0; m < MT; ++m) acc[m] = _mm256_setzero_si256();
  for (int64_t g = 0; g < w.n_groups; ++g) {
    const __m256i words = level_words(w, tile, g, half);
    const int64_t end = (g + 1) * span < w.chunks ? (g + 1) * span : w.chunks;
    for (int64_t c = g * span; c < end; ++c) {
      __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + c * kRows));
      for (int t = 0; t < 4; ++t) {
        const __m256i level = _mm256_shuffle_epi8(words, _mm256_or_si256(_mm256_and_si256(d, three), lane));
        d = _mm256_srli_epi32(d, 2);
        for (int m = 0; m < MT; ++m) {
          int32_t four;
          std::memcpy(&four, q + m * p.stride + c * kChunk + 4 * t, 4);
          acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi32(four), level), ones));
        }
      }
    }
  }
  for (int m = 0; m < MT; ++m) store(w, p, token + m, tile * kRows + 8 * half, acc[m]);
}

}  // namespace

AVX2 void matmul_avx2(const Lut8Weight& w, const Product& p, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    for (int half = 0; half < 2 && tile * kRows + 8 * half < w.out; ++half) {
      int64_t m = 0;
      for (; m + 8 <= p.m; m += 8) block<8>(w, p, tile, half, m);
      for (; m + 4 <= p.m; m += 4) block<4>(w, p, tile, half, m);
      for (; m < p.m; ++m) block<1>(w, p, tile, half, m);
    }
  }
}

}  // namespace lut8
