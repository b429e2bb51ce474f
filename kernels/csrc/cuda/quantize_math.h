// The float operations of the activation quantizer, one by one as in lbllm_kernels/activation.py, for one thread. Plain C++ as well, so that
// the tests run them without a GPU. Both compilers must keep multiplications and additions apart (-fmad=false, -ffp-contract=off).
#pragma once
#include <cmath>
#include <cstdint>

#include "layout.h"

namespace lut8 {

// The activation quantizer's numbers; top 15: uniform, 127: piecewise.
struct Factors {
  int32_t top;
  float clip_max, clip_min, knee_low, knee_high;
};

struct ScaleZero {
  float scale, zero;  // zero holds an integer
  bool finite;
};

// `high` = max(x, 0) and `low` = max(-x, 0) over the token, infinite when a value is not finite.
LUT8_FN ScaleZero scale_zero(float high, float low, const Factors& f) {
  const float top = static_cast<float>(f.top), high_part = f.clip_max * high, low_part = f.clip_min * -low;
  float s = (high_part - low_part) / top;
  if (s < 1.17549435e-38f) s = 1.0f;  // the smallest normal number
  if (!(s < INFINITY)) return {NAN, 0.0f, false};
  return {s, fminf(fmaxf(rintf(-low_part / s), 0.0f), top), true};
}

// Entry `u` of the look-up table: the value whose lower midpoint is the last one under u. Every midpoint (v_k + v_k+1)/2 is half an
// integer h_k, and  h_k/2 < t  <=>  h_k < ceil(2t), so 256 entries indexed by ceil(2t), clamped, hold the answer for every t.
LUT8_FN uint8_t piecewise_entry(int u, float z, const Factors& f) {
  const float a = rintf(f.knee_low * z), b = rintf(f.knee_high * (127.0f - z));
  int last = 0, value = 0;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 1; k < 16; ++k) {
    float v;
    if (k < 4) v = rintf(static_cast<float>(k) * (z - a) / 4.0f);
    else if (k < 12) v = (z - a) + rintf(static_cast<float>(k - 4) * (a + b) / 7.0f);
    else v = (z + b) + rintf(static_cast<float>(k - 11) * (127.0f - z - b) / 4.0f);
    const int now = static_cast<int>(v);
    if (last + now < u) value = now;
    last = now;
  }
  return static_cast<uint8_t>(value);
}

// The code of one value; the table serves piecewise codes only.
LUT8_FN uint32_t code_of(float x, const ScaleZero& t, int top, const uint8_t* table) {
  const float steps = x / t.scale;
  if (top == 15) return static_cast<uint32_t>(fminf(fmaxf(rintf(steps) + t.zero, 0.0f), 15.0f));
  return table[static_cast<uint32_t>(fminf(fmaxf(ceilf((steps + t.zero) * 2.0f), 0.0f), 255.0f))];
}

}  // namespace lut8
