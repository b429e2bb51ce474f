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
  bool finite, quick; // quick: `divided` may serve
  float inverse;      // 1 / scale, correctly rounded
};

// `high` = max(x, 0) and `low` = max(-x, 0) over the token, infinite when a value is not finite.
LUT8_FN ScaleZero scale_zero(float high, float low, const Factors& f) {
  const float top = static_cast<float>(f.top), high_part = f.clip_max * high, low_part = f.clip_min * -low;
  float s = (high_part - low_part) / top;
  if (s < 1.17549435e-38f) s = 1.0f;  // the smallest normal number
  if (!(s < INFINITY)) return {NAN, 0.0f, false, false, 0.0f};
  const bool quick = s > 0x1p-40f && s < 0x1p60f && high < 0x1p60f && low < 0x1p60f;
  return {s, fminf(fmaxf(rintf(-low_part / s), 0.0f), top), true, quick, 1.0f / s};
}

// x / scale, correctly rounded, without a division: one correction makes the product with the inverse faithful, and a second one exact
// (Markstein 1990; needs the correctly rounded inverse and no underflow that matters, see `quick`).
LUT8_FN float divided(float x, const ScaleZero& t) {
  float q = x * t.inverse;
  q = fmaf(fmaf(-q, t.scale, x), t.inverse, q);
  return fmaf(fmaf(-q, t.scale, x), t.inverse, q);
}

// Value `k` (0..15) of the piecewise quantizer, see activation.py: `start` + rint(steps * span / parts) of the tail or core that k is in.
// One expression for the three, so that the lanes of a warp stay together.
LUT8_FN int piecewise_value(int k, float z, const Factors& f) {
  const float a = rintf(f.knee_low * z), b = rintf(f.knee_high * (127.0f - z));
  const bool low = k < 4, core = k < 12;
  const float start = low ? 0.0f : core ? z - a : z + b, span = low ? z - a : core ? a + b : 127.0f - z - b;
  const float steps = static_cast<float>(low ? k : core ? k - 4 : k - 11), parts = core && !low ? 7.0f : 4.0f;
  return static_cast<int>(start + rintf(steps * span / parts));
}

// The look-up table. Every midpoint (v_k + v_k+1)/2 is half an integer h_k, and  h_k/2 < t  <=>  h_k < ceil(2t), so 256 entries indexed
// by ceil(2t), clamped, hold the answer for every t: entry u is v_k+1 of the last k with h_k < u. A step is h_k and v_k+1 in one word;
// going through the 15 steps, the low byte of `entry` becomes the value.
LUT8_FN uint32_t piecewise_step(int value, int next) { return static_cast<uint32_t>(value + next) << 8 | static_cast<uint32_t>(next); }
LUT8_FN uint32_t take_step(uint32_t entry, uint32_t step, int u) { return step < static_cast<uint32_t>(u) << 8 ? step : entry; }

// ceil(2t) of a t in 0..127.5: the sum rounds up at 2^23, where neighbours are 1 apart.
LUT8_FN uint32_t half_steps(float t) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(__fmaf_ru(t, 2.0f, 8388608.0f)) & 255;
#else
  return static_cast<uint32_t>(ceilf(t * 2.0f));
#endif
}

// The code of a value, given x / scale; the table serves piecewise codes only.
template <int kTop>
LUT8_FN uint32_t code_of(float steps, const ScaleZero& t, const uint8_t* table) {
  if (kTop == 15) return static_cast<uint32_t>(fminf(fmaxf(rintf(steps) + t.zero, 0.0f), 15.0f));
  return table[half_steps(fminf(fmaxf(steps + t.zero, 0.0f), 127.5f))];
}

}  // namespace lut8
