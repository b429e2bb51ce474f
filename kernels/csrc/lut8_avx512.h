// Pieces that the AVX-512 and the AMX product share: level words of a tile, expansion of codes, the epilogue of sixteen sums.
#pragma once
#include <immintrin.h>

#include "lut8.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define INLINE __attribute__((always_inline)) inline

namespace lut8 {

AVX512 INLINE __m512i level_words(const Lut8Weight& w, int64_t tile, int64_t group) {
  const int64_t at = (tile * w.n_groups + group) * kRows;
  if (w.words) return _mm512_loadu_si512(w.words + at);
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.group_codes + at));
  return _mm512_i32gather_epi32(_mm512_cvtepu8_epi32(entries), w.codebook, 4);
}

// The index offset of each lane inside its 128-bit quarter: 0, 4, 8, 12.
AVX512 INLINE __m512i lane_offsets() {
  return _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
}

// int8 weights of channels 4j + t (j = byte) of the chunk `d`, all sixteen rows. (d >> 2t & 3 | lane) in one ternary operation.
template <int T>
AVX512 INLINE __m512i expand(__m512i d, __m512i words, __m512i lane) {
  const __m512i shifted = T == 0 ? d : _mm512_srli_epi32(d, 2 * T);
  return _mm512_shuffle_epi8(words, _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(3), lane, 0xea));
}

AVX512 INLINE void store(const Lut8Weight& w, const Product& p, int64_t token, int64_t tile, __m512i acc) {
  const int64_t row = tile * kRows, n = w.out - row;
  const __mmask16 mask = n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  if (p.acc) {
    _mm512_mask_storeu_epi32(p.acc + token * w.out + row, mask, acc);
    return;
  }
  const __m512i shift = _mm512_mullo_epi32(_mm512_set1_epi32(p.zero[token]), _mm512_loadu_si512(w.row_sum + row));
  const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(p.scale[token]), _mm512_loadu_ps(w.row_scale + row));
  __m512 v = _mm512_mul_ps(factor, _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, shift)));
  if (w.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(w.bias + row));
  _mm512_mask_storeu_ps(p.y + token * w.out + row, mask, v);
}

}  // namespace lut8
