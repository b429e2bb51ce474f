// The C interface of the CPU path: which instructions this machine has, how work is cut into threads.
//
// No torch headers: a plain shared object, called through ctypes (lbllm_kernels/cpu.py), which checks every shape before it
// calls. Threads come from OpenMP, whose run-time torch has already loaded: one pool for both, no two pools spinning against
// each other. Built without OpenMP, everything runs on the calling thread.
#include <cstdint>
#include <vector>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "lut8.h"

#ifndef LUT8_SOURCE_DIGEST
#define LUT8_SOURCE_DIGEST "unknown"
#endif

namespace {

constexpr int kAvx2 = 1, kVnni = 2, kAmx = 4, kHalf = 8;
constexpr int64_t kSlab = 64;  // tokens: a multiple of the blocks that every path works in
constexpr int64_t kWorkPerThread = 1 << 18;  // products below which a second thread costs more than it brings

// AMX needs the kernel's permission, once a process (ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool allow_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

int detect() {
  __builtin_cpu_init();
  int found = 0;
  if (__builtin_cpu_supports("avx2")) found |= kAvx2;
  unsigned a1 = 1, b1 = 0, c1 = 0, d1 = 0;
  __asm__ volatile("cpuid" : "+a"(a1), "=b"(b1), "+c"(c1), "=d"(d1));
  if ((found & kAvx2) && __builtin_cpu_supports("fma") && (c1 >> 29 & 1)) found |= kHalf;  // f16c
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    found |= kVnni;
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if ((d >> 24 & 3) == 3 && allow_amx()) found |= kAmx;  // amx-tile, amx-int8
  }
  return found;
}

// body(first, last) on consecutive shares of [0, items), one a thread.
template <class Body>
void parallel(int64_t items, int threads, const Body& body) {
  if (threads > items) threads = static_cast<int>(items);
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
      if (items * i / n < items * (i + 1) / n) body(items * i / n, items * (i + 1) / n);
    }
    return;
  }
#endif
  if (items > 0) body(static_cast<int64_t>(0), items);
}

int useful_threads(int64_t work, int threads) {
  const int64_t most = work / kWorkPerThread + 1;
  return static_cast<int>(most < threads ? most : threads);
}

}  // namespace

extern "C" {

const char* lut8_source_digest() { return LUT8_SOURCE_DIGEST; }

// Bits: 1 AVX2, 2 AVX-512 VNNI, 4 AMX int8, 8 F16C and FMA.
int lut8_features() {
  static const int found = detect();
  return found;
}

int lut8_has_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

// x (m, in) floats -> q (m, stride) bytes, scale (m), zero (m). level: 1 AVX2, 2 AVX-512.
void lut8_quantize(const float* x, int64_t m, int64_t in, int32_t top, float clip_max, float clip_min, float knee_low, float knee_high,
                   uint8_t* q, int64_t stride, float* scale, int32_t* zero, int32_t interleave, int32_t level, int32_t threads) {
  const lut8::Factors factors{top, clip_max, clip_min, knee_low, knee_high};
  const auto run = level >= 2 ? lut8::quantize_avx512 : lut8::quantize_avx2;
  parallel(m, useful_threads(8 * m * in, threads),
           [&](int64_t first, int64_t last) { run(x, in, factors, q, stride, scale, zero, interleave != 0, first, last); });
}

// Products of interleaved q; level 1 AVX2, 2 AVX-512, 3 AMX (q padded to whole blocks of 16 tokens). acc not null: raw sums only.
void lut8_matmul(const lut8::Lut8Weight* w, const uint8_t* q, int64_t stride, int64_t m, const float* scale, const int32_t* zero,
                 float* y, int32_t* acc, int32_t level, int32_t threads) {
  const auto run = level >= 3 ? lut8::matmul_amx : level == 2 ? lut8::matmul_avx512 : lut8::matmul_avx2;
  threads = useful_threads(m * w->out * w->in, threads);
  // Rows are cut among threads; where there are more threads than pairs of tiles, tokens are cut too, into slabs of whole blocks.
  const int64_t width = level >= 3 ? 2 : 1, blocks = (w->tiles + width - 1) / width;
  int64_t slabs = threads > blocks ? threads / blocks : 1;
  if (slabs > m / kSlab) slabs = m / kSlab > 0 ? m / kSlab : 1;
  const int64_t tokens = ((m + slabs - 1) / slabs + kSlab - 1) / kSlab * kSlab;
  parallel(blocks * slabs, threads, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t slab = first / blocks, end = (slab + 1) * blocks < last ? (slab + 1) * blocks : last;
      const int64_t at = slab * tokens, count = m - at < tokens ? m - at : tokens;
      const int64_t tile = (first - slab * blocks) * width, stop = (end - slab * blocks) * width;
      const lut8::Product part{q + at * stride, stride, count, scale + at, zero + at, y ? y + at * w->out : nullptr,
                               acc ? acc + at * w->out : nullptr};
      if (count > 0) run(*w, part, tile, stop < w->tiles ? stop : w->tiles);
      first = end;
    }
  });
}

// A few tokens of one input, quantized once and multiplied by `count` weights in one call: a decode step is too short to pay for
// more. q, scale and zero live in scratch of the calling thread; x (m, in) floats -> y[i] (m, out of weight i). factors: clip_max,
// clip_min, knee_low, knee_high. The tiles of all weights are one range that threads share.
void lut8_forward(const lut8::Lut8Weight* const* w, int64_t count, const float* x, int64_t m, int32_t top, const float* factors,
                  float* const* y, int32_t level, int32_t threads) {
  static thread_local std::vector<uint8_t> q;
  static thread_local std::vector<float> scale;
  static thread_local std::vector<int32_t> zero;
  const int64_t in = w[0]->in, stride = (in + lut8::kPad - 1) / lut8::kPad * lut8::kPad;
  q.resize(static_cast<size_t>(m * stride));
  scale.resize(static_cast<size_t>(m));
  zero.resize(static_cast<size_t>(m));
  lut8_quantize(x, m, in, top, factors[0], factors[1], factors[2], factors[3], q.data(), stride, scale.data(), zero.data(), 1, level,
                threads);
  const auto run = level >= 2 ? lut8::matmul_avx512 : lut8::matmul_avx2;
  int64_t tiles = 0, rows = 0;
  for (int64_t i = 0; i < count; ++i) tiles += w[i]->tiles, rows += w[i]->out;
  const uint8_t* codes = q.data();  // of this thread: the names above mean another thread's scratch in the others
  const float* s = scale.data();
  const int32_t* z = zero.data();
  parallel(tiles, useful_threads(m * rows * in, threads), [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = first - start > 0 ? first - start : 0, to = last - start < w[i]->tiles ? last - start : w[i]->tiles;
      if (from < to) run(*w[i], lut8::Product{codes, stride, m, s, z, y[i], nullptr}, from, to);
      start += w[i]->tiles;
    }
  });
}

// x (m, in) floats -> y (m, out), weights stored in 16 bits.
void lut8_half_linear(const uint16_t* weight, int64_t out, int64_t in, int32_t bf16, const float* x, int64_t m, float* y, int32_t level,
                      int32_t threads) {
  const lut8::HalfWeight h{weight, out, in, bf16};
  parallel(out, useful_threads(m * out * in, threads),
           [&](int64_t first, int64_t last) { lut8::half_linear(h, x, m, y, level, first, last); });
}
}
