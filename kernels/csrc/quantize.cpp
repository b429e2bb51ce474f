// The activation quantizer: the float operations of lbllm_kernels/activation.py, one by one, in fp32 without contraction.
//
// Two passes over a token: range, then codes. A piecewise code is looked up: every midpoint (v_k + v_k+1)/2 is half an integer
// h_k, and  h_k/2 < t  <=>  h_k < ceil(2t)  (h_k integer, 2t exact), so a table of 256 bytes indexed by ceil(2t), clamped to
// 0..255, holds the answer for every t. The table depends on the zero point and the knees only.
#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "lut8.h"

namespace lut8 {
namespace {

// Scale and zero point from the extremes of a token; zero is a float that holds an integer. Returns false when not finite.
bool token_scale(float hi, float lo, const Factors& f, float* scale, float* zero) {
  const float high_part = f.clip_max * hi;
  const float low_part = f.clip_min * lo;
  float s = (high_part - low_part) / static_cast<float>(f.top);
  if (s < FLT_MIN) s = 1.0f;
  if (!std::isfinite(s)) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    *zero = 0.0f;
    return false;
  }
  *scale = s;
  const float z = std::nearbyintf(-low_part / s);
  *zero = z < 0.0f ? 0.0f : (z > static_cast<float>(f.top) ? static_cast<float>(f.top) : z);
  return true;
}

void piecewise_table(float z, const Factors& f, uint8_t table[256]) {
  const float a = std::nearbyintf(f.knee_low * z), b = std::nearbyintf(f.knee_high * (127.0f - z));
  int v[16];
  for (int i = 0; i < 4; ++i) v[i] = static_cast<int>(std::nearbyintf(static_cast<float>(i) * (z - a) / 4.0f));
  for (int j = 0; j < 8; ++j) v[4 + j] = static_cast<int>((z - a) + std::nearbyintf(static_cast<float>(j) * (a + b) / 7.0f));
  for (int i = 1; i < 5; ++i) v[11 + i] = static_cast<int>((z + b) + std::nearbyintf(static_cast<float>(i) * (127.0f - z - b) / 4.0f));
  int k = 0;
  for (int u = 0; u < 256; ++u) {
    while (k < 15 && v[k] + v[k + 1] < u) ++k;
    table[u] = static_cast<uint8_t>(v[k]);
  }
}

// Codes or table indices in channel order -> bytes of q, in the order that the products read (see lut8.h).
void place(const uint8_t* raw, const uint8_t* table, int64_t in, uint8_t* q, int64_t stride, bool interleave) {
  int64_t c = 0;
  if (interleave) {
    for (; c + kChunk <= in; c += kChunk)
      for (int t = 0; t < 4; ++t)
        for (int j = 0; j < 4; ++j) q[c + 4 * t + j] = table ? table[raw[c + 4 * j + t]] : raw[c + 4 * j + t];
    std::memset(q + c, 0, stride - c);
    for (int64_t k = c; k < in; ++k) q[c + 4 * ((k - c) % 4) + (k - c) / 4] = table ? table[raw[k]] : raw[k];
    return;
  }
  for (; c < in; ++c) q[c] = table ? table[raw[c]] : raw[c];
  std::memset(q + in, 0, stride - in);
}

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")))

// The same for whole blocks of 64 channels, with the table in four registers: two byte permutations look 64 values up, one
// shuffle orders them. Returns how many channels it placed; the rest is left to `place`.
VBMI int64_t place_vbmi(const uint8_t* raw, const uint8_t* table, int64_t in, uint8_t* q) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i t0 = _mm512_setzero_si512(), t1 = t0, t2 = t0, t3 = t0;
  if (table) {
    t0 = _mm512_loadu_si512(table);
    t1 = _mm512_loadu_si512(table + 64);
    t2 = _mm512_loadu_si512(table + 128);
    t3 = _mm512_loadu_si512(table + 192);
  }
  int64_t c = 0;
  for (; c + 64 <= in; c += 64) {
    __m512i v = _mm512_loadu_si512(raw + c);
    if (table) {
      const __m512i low = _mm512_permutex2var_epi8(t0, v, t1), high = _mm512_permutex2var_epi8(t2, v, t3);
      v = _mm512_mask_blend_epi8(_mm512_movepi8_mask(v), low, high);
    }
    _mm512_storeu_si512(q + c, _mm512_shuffle_epi8(v, order));
  }
  return c;
}

struct Range {
  float hi, lo;
  bool finite;
};

AVX2 Range range_avx2(const float* x, int64_t in) {
  const __m256 zero = _mm256_setzero_ps();
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256 hi = zero, lo = zero;
  __m256i bits = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= in; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    hi = _mm256_max_ps(v, hi);
    lo = _mm256_min_ps(v, lo);
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
  }
  alignas(32) float h[8], l[8];
  alignas(32) int32_t b[8];
  _mm256_store_ps(h, hi);
  _mm256_store_ps(l, lo);
  _mm256_store_si256(reinterpret_cast<__m256i*>(b), bits);
  Range r{0.0f, 0.0f, true};
  for (int j = 0; j < 8; ++j) {
    r.hi = h[j] > r.hi ? h[j] : r.hi;
    r.lo = l[j] < r.lo ? l[j] : r.lo;
    r.finite = r.finite && b[j] < 0x7f800000;
  }
  for (; i < in; ++i) {
    r.hi = x[i] > r.hi ? x[i] : r.hi;
    r.lo = x[i] < r.lo ? x[i] : r.lo;
    r.finite = r.finite && std::isfinite(x[i]);
  }
  return r;
}

AVX512 Range range_avx512(const float* x, int64_t in) {
  __m512 hi = _mm512_setzero_ps(), lo = hi;
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < in; i += 16) {
    const __mmask16 mask = in - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (in - i)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    hi = _mm512_max_ps(v, hi);
    lo = _mm512_min_ps(v, lo);
    bits = _mm512_max_epi32(bits, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  return {_mm512_reduce_max_ps(hi), _mm512_reduce_min_ps(lo), _mm512_reduce_max_epi32(bits) < 0x7f800000};
}

// One value, as the vector loops do it: used for the tail of a token.
uint8_t raw_code(float x, float s, float z, const Factors& f) {
  const float steps = x / s;
  float v = f.top == 15 ? std::nearbyintf(steps) + z : std::ceil((steps + z) * 2.0f);
  const float top = f.top == 15 ? 15.0f : 255.0f;
  v = v > 0.0f ? v : 0.0f;
  return static_cast<uint8_t>(v < top ? v : top);
}

AVX2 void codes_avx2(const float* x, int64_t in, float s, float z, const Factors& f, uint8_t* raw) {
  const __m256 scale = _mm256_set1_ps(s), zero = _mm256_set1_ps(z), none = _mm256_setzero_ps();
  const __m256 top = _mm256_set1_ps(f.top == 15 ? 15.0f : 255.0f);
  int64_t i = 0;
  for (; i + 8 <= in; i += 8) {
    const __m256 steps = _mm256_div_ps(_mm256_loadu_ps(x + i), scale);
    __m256 v;
    if (f.top == 15) {
      v = _mm256_add_ps(_mm256_round_ps(steps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), zero);
    } else {
      v = _mm256_ceil_ps(_mm256_mul_ps(_mm256_add_ps(steps, zero), _mm256_set1_ps(2.0f)));
    }
    const __m256i n = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(v, none), top));
    const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(raw + i), _mm_packus_epi16(half, half));
  }
  for (; i < in; ++i) raw[i] = raw_code(x[i], s, z, f);
}

AVX512 void codes_avx512(const float* x, int64_t in, float s, float z, const Factors& f, uint8_t* raw) {
  const __m512 scale = _mm512_set1_ps(s), zero = _mm512_set1_ps(z), none = _mm512_setzero_ps();
  const __m512 top = _mm512_set1_ps(f.top == 15 ? 15.0f : 255.0f);
  for (int64_t i = 0; i < in; i += 16) {
    const __mmask16 mask = in - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (in - i)) - 1);
    const __m512 steps = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
    __m512 v;
    if (f.top == 15) {
      v = _mm512_add_ps(_mm512_roundscale_ps(steps, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), zero);
    } else {
      v = _mm512_roundscale_ps(_mm512_mul_ps(_mm512_add_ps(steps, zero), _mm512_set1_ps(2.0f)), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    }
    const __m512i n = _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(v, none), top));
    _mm512_mask_cvtepi32_storeu_epi8(raw + i, mask, n);
  }
}

template <class RangeOf, class CodesOf>
void quantize_tokens(const float* x, int64_t in, const Factors& f, uint8_t* q, int64_t stride, float* scale, int32_t* zero,
                     bool interleave, int64_t first, int64_t last, RangeOf range_of, CodesOf codes_of, bool vbmi) {
  alignas(64) uint8_t table[256];
  float table_zero = -1.0f;
  constexpr int64_t kPiece = 2048;  // a multiple of kPad: pieces interleave on their own
  uint8_t raw[kPiece];
  for (int64_t m = first; m < last; ++m) {
    const float* token = x + m * in;
    uint8_t* codes = q + m * stride;
    const Range r = range_of(token, in);
    float s, z;
    if (!token_scale(r.finite ? r.hi : std::numeric_limits<float>::infinity(), r.lo, f, &s, &z)) {
      std::memset(codes, 0, stride);
    } else {
      if (f.top == 127 && z != table_zero) piecewise_table(table_zero = z, f, table);
      for (int64_t c = 0; c < in; c += kPiece) {
        const int64_t n = in - c < kPiece ? in - c : kPiece;
        codes_of(token + c, n, s, z, f, raw);
        const uint8_t* values = f.top == 127 ? table : nullptr;
        const int64_t done = vbmi && interleave ? place_vbmi(raw, values, n, codes + c) : 0;
        place(raw + done, values, n - done, codes + c + done, (in - c > kPiece ? kPiece : stride - c) - done, interleave);
      }
    }
    scale[m] = s;
    zero[m] = static_cast<int32_t>(z);
  }
}

}  // namespace

void quantize_avx2(const float* x, int64_t in, const Factors& f, uint8_t* q, int64_t stride, float* scale, int32_t* zero,
                   bool interleave, int64_t first, int64_t last) {
  quantize_tokens(x, in, f, q, stride, scale, zero, interleave, first, last, range_avx2, codes_avx2, false);
}

void quantize_avx512(const float* x, int64_t in, const Factors& f, uint8_t* q, int64_t stride, float* scale, int32_t* zero,
                     bool interleave, int64_t first, int64_t last) {
  static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  quantize_tokens(x, in, f, q, stride, scale, zero, interleave, first, last, range_avx512, codes_avx512, vbmi);
}

}  // namespace lut8
