// LUT8 on the CPU: what the files of this folder share.
//
// Problem.   y[m][n] = (s[m] * row_scale[n]) * float(acc - z[m] * row_sum[n]) + bias[n],  acc = sum_k q[m][k] * w[n][k]
//            with q in 0..127 (u8) and w an int8 level picked by a 2-bit code. acc is exact in int32 on every path.
//
// Layout.    The stored format has one row after the other. Here sixteen rows are interleaved ("tile"), so that one 64-byte
//            load holds 16 channels of 16 rows, one 32-bit lane a row:
//
//              codes       [tile][chunk][row]   u32: codes of channels 16*chunk .. +15 of one row, channel c at bits 2c
//              words       [tile][group][row]   i32: the four int8 levels              (explicit mode)
//              group_codes [tile][group][row]   u8 : index into codebook i32[256]      (codebook mode)
//              row_scale, row_sum, bias         padded with zeros to whole tiles
//
//            (d >> 2t) & 0x03030303 leaves, in byte j of a lane, the code of channel 4j + t. A byte shuffle turns the four codes
//            of all sixteen rows into int8 weights at once, because the level word of a row lies in the row's own lane. The
//            activations are stored in the same order: byte 4t + j of every 16 is channel 4j + t ("interleaved").
//            A lane of 4 channels x 16 rows is also exactly one row of an AMX B tile.
//
// Source.    Own design; the pure index functions are repeated in lbllm_kernels/cpu.py, and the tests compare both.
// Trade-off. A second copy of the codes in memory (2 bits a weight) buys sequential loads and no cross-row reduction.
#pragma once
#include <cstdint>

namespace lut8 {

constexpr int64_t kRows = 16;   // rows a tile
constexpr int64_t kChunk = 16;  // channels a lane of codes
constexpr int64_t kPad = 64;    // activations are padded with zeros to this many channels

extern "C" struct Lut8Weight {
  int64_t out, in, group, chunks, n_groups, tiles;
  const uint32_t* codes;
  const int32_t* words;         // null in codebook mode
  const uint8_t* group_codes;   // null in explicit mode
  const int32_t* codebook;
  const float* row_scale;
  const int32_t* row_sum;
  const float* bias;            // may be null
};

// Quantized tokens, and where results go: y, or the raw sums when acc is not null. q has rows of `stride` bytes.
struct Product {
  const uint8_t* q;
  int64_t stride, m;
  const float* scale;
  const int32_t* zero;
  float* y;
  int32_t* acc;
};

struct Factors {
  int32_t top;  // 15: uniform, 127: piecewise
  float clip_max, clip_min, knee_low, knee_high;
};

// A plain linear layer stored in 16 bits: weight (out, in) fp16, or bf16 where `bf16` is not 0.
struct HalfWeight {
  const uint16_t* weight;
  int64_t out, in;
  int32_t bf16;
};

// Rows [first, last) of y (m, out) = x (m, in) times the weight, transposed. level: 1 AVX2 with F16C and FMA, 2 AVX-512.
void half_linear(const HalfWeight& h, const float* x, int64_t m, float* y, int32_t level, int64_t first, int64_t last);

// Each handles tiles [first, last) and all tokens. The AMX one takes q padded to whole blocks of 16 tokens.
void matmul_avx2(const Lut8Weight& w, const Product& p, int64_t first, int64_t last);
void matmul_avx512(const Lut8Weight& w, const Product& p, int64_t first, int64_t last);
void matmul_amx(const Lut8Weight& w, const Product& p, int64_t first, int64_t last);

// Quantizes tokens [first, last) of x (rows of `in` floats) into q (rows of `stride` bytes, padding zeroed).
void quantize_avx2(const float* x, int64_t in, const Factors& f, uint8_t* q, int64_t stride, float* scale, int32_t* zero,
                   bool interleave, int64_t first, int64_t last);
void quantize_avx512(const float* x, int64_t in, const Factors& f, uint8_t* q, int64_t stride, float* scale, int32_t* zero,
                     bool interleave, int64_t first, int64_t last);

}  // namespace lut8
