// A plain linear layer whose weights are stored in 16 bits (the output head): fp32 activations, fp32 sums, few tokens.
//
// Problem.   The head of a small model is half of what a decode step reads. Its values are fp16 (or bf16) numbers, so reading them as
//            such and widening in registers gives the same products as an fp32 copy of twice the bytes.
// Order.     Two accumulators of `lanes` sums a row (channels 2*lanes*i + lane, and lanes further), fused multiply-add, added at the end
//            in lane order. It depends on neither the number of tokens nor of threads. Against another order of the same fp32 sum the
//            difference is rounding alone: at most in * 2^-24 * sum |w x|.
// Trade-off. Widening costs one operation for 16 weights; above a few tokens an expanded copy and a blocked product are better.
#include <immintrin.h>

#include "lut8.h"

namespace lut8 {
namespace {

#define AVX2 __attribute__((target("avx2,f16c,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define INLINE __attribute__((always_inline)) inline

// One weight, widened; used for channels that do not fill a vector.
AVX2 INLINE float widen(uint16_t w, bool bf16) {
  if (!bf16) return _cvtsh_ss(w);
  const uint32_t bits = static_cast<uint32_t>(w) << 16;
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

template <bool BF16>
AVX2 INLINE __m256 widen8(const uint16_t* w) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  if (!BF16) return _mm256_cvtph_ps(raw);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

template <bool BF16>
AVX512 INLINE __m512 widen16(const uint16_t* w) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  if (!BF16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

AVX2 float tail(const HalfWeight& h, const uint16_t* w, const float* x, int64_t from) {
  float sum = 0.0f;
  for (int64_t k = from; k < h.in; ++k) sum += widen(w[k], h.bf16 != 0) * x[k];
  return sum;
}

template <int MT, bool BF16>
AVX2 void rows_avx2(const HalfWeight& h, const float* x, float* y, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const uint16_t* w = h.weight + r * h.in;
    __m256 acc[MT][2];
    for (int m = 0; m < MT; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= h.in; k += 16) {
      const __m256 a = widen8<BF16>(w + k), b = widen8<BF16>(w + k + 8);
      for (int m = 0; m < MT; ++m) {
        acc[m][0] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x + m * h.in + k), acc[m][0]);
        acc[m][1] = _mm256_fmadd_ps(b, _mm256_loadu_ps(x + m * h.in + k + 8), acc[m][1]);
      }
    }
    for (int m = 0; m < MT; ++m) {
      alignas(32) float lanes[8];
      _mm256_store_ps(lanes, _mm256_add_ps(acc[m][0], acc[m][1]));
      float sum = 0.0f;
      for (int j = 0; j < 8; ++j) sum += lanes[j];
      y[m * h.out + r] = sum + tail(h, w, x + m * h.in, k);
    }
  }
}

template <int MT, bool BF16>
AVX512 void rows_avx512(const HalfWeight& h, const float* x, float* y, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    const uint16_t* w = h.weight + r * h.in;
    __m512 acc[MT][2];
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= h.in; k += 32) {
      if (MT == 1) _mm_prefetch(reinterpret_cast<const char*>(w + k + 1024), _MM_HINT_T0);
      const __m512 a = widen16<BF16>(w + k), b = widen16<BF16>(w + k + 16);
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        acc[m][0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x + m * h.in + k), acc[m][0]);
        acc[m][1] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + m * h.in + k + 16), acc[m][1]);
      }
    }
    for (int m = 0; m < MT; ++m) {
      alignas(64) float lanes[16];
      _mm512_store_ps(lanes, _mm512_add_ps(acc[m][0], acc[m][1]));
      float sum = 0.0f;
      for (int j = 0; j < 16; ++j) sum += lanes[j];
      y[m * h.out + r] = sum + tail(h, w, x + m * h.in, k);
    }
  }
}

template <bool BF16>
void run(const HalfWeight& h, const float* x, int64_t m, float* y, int32_t level, int64_t first, int64_t last) {
  for (int64_t at = 0; at < m;) {
    const int64_t left = m - at;
    const float* in = x + at * h.in;
    float* out = y + at * h.out;
    if (level >= 2) {
      if (left >= 4) rows_avx512<4, BF16>(h, in, out, first, last);
      else if (left >= 2) rows_avx512<2, BF16>(h, in, out, first, last);
      else rows_avx512<1, BF16>(h, in, out, first, last);
    } else {
      if (left >= 4) rows_avx2<4, BF16>(h, in, out, first, last);
      else if (left >= 2) rows_avx2<2, BF16>(h, in, out, first, last);
      else rows_avx2<1, BF16>(h, in, out, first, last);
    }
    at += left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
}

}  // namespace

void half_linear(const HalfWeight& h, const float* x, int64_t m, float* y, int32_t level, int64_t first, int64_t last) {
  if (h.bf16) run<true>(h, x, m, y, level, first, last);
  else run<false>(h, x, m, y, level, first, last);
}

}  // namespace lut8
