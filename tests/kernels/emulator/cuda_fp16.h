#pragma once
#include <immintrin.h>

#include "cuda_runtime.h"

struct __half { unsigned short bits; };
struct __half2 { __half x, y; };
inline float __half2float(__half v) { return _cvtsh_ss(v.bits); }
inline __half __float2half_rn(float v) { return {static_cast<unsigned short>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
