// LUT8 products with AMX int8 tiles, for many tokens (prefill, evaluation).
//
// A panel of rows is expanded to int8 once, in the order that a B tile wants (64 channels x 16 rows = 1 KB), into a scratch that
// stays in the second-level cache; all tokens then pass by it, 32 tokens x 32 rows at a time: four accumulator tiles, two of
// tokens, two of weights. Sums are int32: exact. Channels beyond `in` meet activations of 0.
#include <cstdlib>
#include <memory>

#include "lut8_avx512.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-int8")))

namespace lut8 {
namespace {

constexpr int64_t kPanelBytes = 768 << 10;
constexpr int64_t kTile = 1024;  // bytes of a tile: 16 rows of 64

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Scratch {
  std::unique_ptr<void, decltype(&std::free)> memory{nullptr, std::free};
  int64_t bytes = 0;
  int8_t* of(int64_t wanted) {
    if (wanted > bytes) {
      memory.reset(std::aligned_alloc(64, static_cast<size_t>(wanted)));
      bytes = memory ? wanted : 0;
    }
    return static_cast<int8_t*>(memory.get());
  }
};

AVX512 void expand_tile(const Lut8Weight& w, int64_t tile, int8_t* out) {
  const __m512i lane = lane_offsets();
  const uint32_t* codes = w.codes + tile * w.chunks * kRows;
  const int64_t span = w.group / kChunk;
  for (int64_t g = 0; g < w.n_groups; ++g) {
    const __m512i words = level_words(w, tile, g);
    const int64_t end = (g + 1) * span < w.chunks ? (g + 1) * span : w.chunks;
    for (int64_t c = g * span; c < end; ++c) {
      const __m512i d = _mm512_loadu_si512(codes + c * kRows);
      int8_t* to = out + c * 256;
      _mm512_store_si512(to, expand<0>(d, words, lane));
      _mm512_store_si512(to + 64, expand<1>(d, words, lane));
      _mm512_store_si512(to + 128, expand<2>(d, words, lane));
      _mm512_store_si512(to + 192, expand<3>(d, words, lane));
    }
  }
}

AVX512 INLINE void finish(const Lut8Weight& w, const Product& p, int64_t token, int64_t tile, const int32_t* sums) {
  const int64_t n = p.m - token < 16 ? p.m - token : 16;
  for (int64_t i = 0; i < n; ++i) store(w, p, token + i, tile, _mm512_load_si512(sums + 16 * i));
}

// Tokens [token, token + 16 * (1 + two)) by tiles `tile` and, when pair, `tile + 1`. b: the tiles' weights, b_stride bytes apart.
AMX void block(const Lut8Weight& w, const Product& p, int64_t token, bool two, int64_t tile, bool pair, const int8_t* b, int64_t b_stride) {
  alignas(64) int32_t sums[256];
  const int64_t steps = p.stride / 64;
  const uint8_t* a0 = p.q + token * p.stride;
  const uint8_t* a1 = a0 + 16 * p.stride;
  const int8_t* b1 = b + b_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (two && pair) {
    for (int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a0 + 64 * k, p.stride);
      _tile_loadd(6, b + kTile * k, 64);
      _tile_loadd(7, b1 + kTile * k, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, a1 + 64 * k, p.stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  } else {
    for (int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a0 + 64 * k, p.stride);
      _tile_loadd(6, b + kTile * k, 64);
      _tile_dpbusd(0, 4, 6);
      if (pair) {
        _tile_loadd(7, b1 + kTile * k, 64);
        _tile_dpbusd(1, 4, 7);
      }
      if (two) {
        _tile_loadd(5, a1 + 64 * k, p.stride);
        _tile_dpbusd(2, 5, 6);
      }
    }
  }
  _tile_stored(0, sums, 64);
  finish(w, p, token, tile, sums);
  if (pair) {
    _tile_stored(1, sums, 64);
    finish(w, p, token, tile + 1, sums);
  }
  if (two) {
    _tile_stored(2, sums, 64);
    finish(w, p, token + 16, tile, sums);
  }
  if (two && pair) {
    _tile_stored(3, sums, 64);
    finish(w, p, token + 16, tile + 1, sums);
  }
}

}  // namespace

AMX void matmul_amx(const Lut8Weight& w, const Product& p, int64_t first, int64_t last) {
  static thread_local Scratch scratch;
  const int64_t tile_bytes = kRows * p.stride;  // stride is `in` padded to 64: whole B tiles
  int64_t panel = kPanelBytes / tile_bytes / 2 * 2;
  panel = panel < 2 ? 2 : panel;
  panel = panel < last - first ? panel : last - first;
  int8_t* weights = scratch.of(panel * tile_bytes);
  if (weights == nullptr) return matmul_avx512(w, p, first, last);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t start = first; start < last; start += panel) {
    const int64_t end = start + panel < last ? start + panel : last;
    for (int64_t t = start; t < end; ++t) expand_tile(w, t, weights + (t - start) * tile_bytes);
    for (int64_t m = 0; m < p.m; m += 32)
      for (int64_t t = start; t < end; t += 2)
        block(w, p, m, m + 16 < p.m, t, t + 1 < end, weights + (t - start) * tile_bytes, tile_bytes);
  }
  _tile_release();
}

}  // namespace lut8
