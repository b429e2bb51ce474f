// Decode: at most 16 tokens. Every weight is read once, so the product must run at memory speed; lut8_cuda.cu tells the story.
//
// A block owns kRows row tiles (16 rows each) and all of K; its warps take k tiles in turn. A lane reads 16 bytes of codes and its
// level words, expands them with prmt into A fragments, and multiplies them with tokens as B (kNTiles x 8 columns; columns beyond
// the last token repeat it and are never stored). Two k tiles are in flight a warp, and the first two before anything else happens:
// weights depend on no earlier kernel. The int32 sums of all warps meet in shared memory (addition of integers: any order, same
// result), and the epilogue applies scale, zero point, bias and cast.
// kFused: the block quantizes the tokens itself, into shared memory, while its first weights travel.
#pragma once
#include "launch.cuh"
#include "quantize.cuh"

namespace lut8 {

constexpr int kMaxWarps = 16;

// The 32 channels of a lane's token column, for each column tile: from shared memory (kFused) or through L1.
template <int kNTiles, bool kFused>
struct TokenTile {
  uint4 chunk[kNTiles][2];

  __device__ __forceinline__ void load(const int8_t* q, uint32_t shared, const int (&offset)[kNTiles], int k_tile) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const int at = offset[n] + k_tile * kTileK;
      if (kFused) {
        chunk[n][0] = load_shared_four(shared + at);
        chunk[n][1] = load_shared_four(shared + at + 16);
      } else {
        const uint4* p = reinterpret_cast<const uint4*>(q + at);
        chunk[n][0] = p[0];
        chunk[n][1] = p[1];
      }
    }
  }
};

template <int kRows, int kNTiles, bool kCodebook, bool kTwo, bool kFused>
__device__ __forceinline__ void multiply(const WeightTile<kRows, kCodebook, kTwo>& tile, const TokenTile<kNTiles, kFused>& tokens, uint32_t table,
                                         int (&acc)[kRows][kNTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
      const uint4 c = tile.codes[r];
      expand(half ? c.y : c.x, half ? c.w : c.z, tile.levels[r].word(table, half, 0), tile.levels[r].word(table, half, 1), a);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        mma(acc[r][n], a[0], tokens.chunk[n][half].x, tokens.chunk[n][half].y);
        mma(acc[r][n], a[1], tokens.chunk[n][half].z, tokens.chunk[n][half].w);
      }
    }
  }
}

// A row of sums in shared memory; the odd stride keeps the four columns of a quad in different banks.
template <int kRows>
constexpr int kSumStride = kRows * kTileRows + 4;

inline int64_t fused_stride(const Lut8CudaWeight& w) { return static_cast<int64_t>(w.k_tiles) * kTileK + 16; }

template <int kRows, int kNTiles, bool kCodebook, bool kTwo, bool kFused>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) decode_kernel(Lut8CudaWeight w, Tokens t, Output o) {
  extern __shared__ __align__(16) int8_t fused_q[];
  __shared__ int sums[kNTiles * 8 * kSumStride<kRows>];
  __shared__ int32_t table[kCodebook ? 256 : 1];
  __shared__ QuantizeScratch scratch;
  __shared__ float token_scale[kNTiles * 8];
  __shared__ int token_zero[kNTiles * 8];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid / 32, warps = blockDim.x / 32;
  const int first_row_tile = blockIdx.x * kRows;
  const int padded = w.k_tiles * kTileK;

  WeightTile<kRows, kCodebook, kTwo> even, odd;
  even.load(w, first_row_tile, warp, lane);
  odd.load(w, first_row_tile, warp + warps, lane);
  if (kCodebook)
    for (int i = tid; i < 256; i += blockDim.x) table[i] = __ldg(w.codebook + i);
  for (int i = tid; i < kNTiles * 8 * kSumStride<kRows>; i += blockDim.x) sums[i] = 0;
  let_next_start();
  wait_for_previous();

  const int stride = kFused ? padded + 16 : padded;
  if (kFused) {
    const int together = min(kTogether, warps);
    for (int m = 0; m < t.m; m += together) {
      if (m) __syncthreads();
      quantize_tokens(t.x, t.x_type, m, min(together, t.m - m), w.in, padded, t.factors, fused_q + m * stride, stride, token_scale + m, token_zero + m, scratch);
    }
  } else if (tid < t.m && !o.acc) {
    token_scale[tid] = t.scale[tid], token_zero[tid] = t.zero[tid];
  }
  __syncthreads();

  int offset[kNTiles];
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) offset[n] = min(n * 8 + lane / 4, t.m - 1) * stride + lane_channel(lane);
  const uint32_t table_at = shared_address(table), shared = shared_address(fused_q);
  int acc[kRows][kNTiles][4] = {};
  TokenTile<kNTiles, kFused> even_tokens, odd_tokens;
  if (warp < w.k_tiles) even_tokens.load(t.q, shared, offset, warp);
  for (int k = warp; k < w.k_tiles; k += 2 * warps) {
    const bool second = k + warps < w.k_tiles;
    if (second) odd_tokens.load(t.q, shared, offset, k + warps);
    multiply(even, even_tokens, table_at, acc);
    even.load(w, first_row_tile, k + 2 * warps, lane);
    if (!second) break;
    if (k + 2 * warps < w.k_tiles) even_tokens.load(t.q, shared, offset, k + 2 * warps);
    multiply(odd, odd_tokens, table_at, acc);
    odd.load(w, first_row_tile, k + 3 * warps, lane);
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2, row = r * kTileRows + lane_row(lane, i / 2);
        if (token < t.m) atomicAdd(&sums[token * kSumStride<kRows> + row], acc[r][n][i]);
      }
  __syncthreads();

  constexpr int rows = kRows * kTileRows;
  for (int i = tid; i < t.m * rows; i += blockDim.x) {
    const int token = i / rows, r = i % rows, row = first_row_tile * kTileRows + r;
    if (row >= w.out) continue;
    const int sum = sums[token * kSumStride<kRows> + r];
    const int64_t at = static_cast<int64_t>(token) * w.out + row;
    if (o.acc) {
      o.acc[at] = sum;
      continue;
    }
    float v = finish_one(sum, token_scale[token], token_zero[token], w.row_scale[row], w.row_sum[row]);
    if (w.bias) v = __fadd_rn(v, w.bias[row]);
    store_one(o, at, v);
  }
}

template <int kRows, bool kCodebook, bool kTwo>
cudaError_t decode_rows(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream) {
  const dim3 grid((w.row_tiles + kRows - 1) / kRows), block(32 * plan.warps);
  if (t.x) return launch(decode_kernel<kRows, 1, kCodebook, kTwo, true>, grid, block, t.m * fused_stride(w), plan.overlap, stream, w, t, o);
  if (t.m <= 8) return launch(decode_kernel<kRows, 1, kCodebook, kTwo, false>, grid, block, 0, plan.overlap, stream, w, t, o);
  if constexpr (kRows < 4) return launch(decode_kernel<kRows, 2, kCodebook, kTwo, false>, grid, block, 0, plan.overlap, stream, w, t, o);
  return cudaErrorInvalidValue;  // four row tiles x sixteen tokens do not fit the registers
}

template <bool kCodebook, bool kTwo>
cudaError_t decode_any(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream) {
  if (plan.row_tiles == 1) return decode_rows<1, kCodebook, kTwo>(w, t, o, plan, stream);
  if (plan.row_tiles == 2) return decode_rows<2, kCodebook, kTwo>(w, t, o, plan, stream);
  if (plan.row_tiles == 3) return decode_rows<3, kCodebook, kTwo>(w, t, o, plan, stream);
  return decode_rows<4, kCodebook, kTwo>(w, t, o, plan, stream);
}

cudaError_t decode_explicit(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream);
cudaError_t decode_codebook(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream);

}  // namespace lut8
