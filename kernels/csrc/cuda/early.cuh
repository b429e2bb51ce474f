// Decode of small layers: at most kHeld k tiles a warp, one row tile a block, at most 16 tokens.
//
// Behind the wait for the quantizer every instruction counts, because all warps go through it at once: decode.cuh has some 300 there. So the
// weights are expanded before it, while the quantizer is still at work, and what is left are loads of tokens, products, and sums. A k tile
// beyond the last has zeros for weights and the last one's tokens, so that no branch comes between the loads. A thread finishes one output.
#pragma once
#include "launch.cuh"

namespace lut8 {

constexpr int kEarlyStride = kTileRows + 4;  // of a token's sums: the four columns of a quad in different banks
constexpr int kHeld = 4, kEarlyWarps = 8;  // two blocks a multiprocessor, at 128 registers

template <int kNTiles, bool kCodebook, bool kTwo>
__global__ void __launch_bounds__(32 * kEarlyWarps, 2) early_kernel(Lut8CudaWeight w, Tokens t, Output o) {
  __shared__ int sums[kNTiles * 8 * kEarlyStride];
  __shared__ __align__(16) int32_t table[kCodebook ? 256 : 1];
  __shared__ uint32_t kept[32 * kEarlyWarps];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid / 32, warps = blockDim.x / 32, row_tile = blockIdx.x;

  WeightTile<1, kCodebook, kTwo> tile[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) tile[h].load(w, row_tile, warp + h * warps, lane);
  if (kCodebook)
    for (int i = tid; i < 64; i += blockDim.x) copy_async(shared_address(table + 4 * i), w.codebook + 4 * i);
  copy_commit();
  for (int i = tid; i < kNTiles * 8 * kEarlyStride; i += blockDim.x) sums[i] = 0;
  // Each thread finishes one output at most: what that needs of its row.
  const int token = tid / kTileRows, row = row_tile * kTileRows + tid % kTileRows;
  const bool mine = token < t.m && row < w.out, finished = mine && !o.acc;
  const float row_scale = finished ? __ldg(w.row_scale + row) : 0.0f, bias = finished && w.bias ? __ldg(w.bias + row) : 0.0f;
  const int row_sum = finished ? __ldg(w.row_sum + row) : 0;
  const int64_t at = static_cast<int64_t>(token) * w.out + row;
  let_next_start();
  const uint4* q[kNTiles][kHeld];  // this lane's token columns
#pragma unroll
  for (int n = 0; n < kNTiles; ++n)
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int column = min(n * 8 + lane / 4, t.m - 1) * w.k_tiles + min(warp + h * warps, w.k_tiles - 1);
      q[n][h] = reinterpret_cast<const uint4*>(t.q + column * kTileK + lane_channel(lane));
    }
  const uint32_t table_at = shared_address(table), into = shared_address(sums) + (lane % 4 * 2 * kEarlyStride + lane / 4) * 4;
  copy_wait<0>();
  __syncthreads();  // the table and the zeros are there
  uint32_t a[kHeld][4][4], mixed = 0;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    uint32_t words[2][2] = {};
    if (warp + h * warps < w.k_tiles) tile[h].levels[0].words(table_at, words);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t part[2][4];
      expand(tile[h].codes[0], words, half, part);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[h][2 * half][i] = part[0][i], a[h][2 * half + 1][i] = part[1][i];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) mixed ^= a[h][i / 4][i % 4];
  }
  store_shared(shared_address(kept + tid), mixed);  // else the assembler puts all of this behind the wait, where it is used
  wait_for_previous();

  const float scale = finished ? t.scale[token] : 0.0f;
  const int zero = finished ? t.zero[token] : 0;
  int acc[2][kNTiles][4] = {};  // two chains
  constexpr int together = kHeld / kNTiles;
#pragma unroll
  for (int from = 0; from < kHeld; from += together) {
    uint4 b[together][kNTiles][2];
#pragma unroll
    for (int h = 0; h < together; ++h)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) b[h][n][0] = q[n][from + h][0], b[h][n][1] = q[n][from + h][1];
#pragma unroll
    for (int h = 0; h < together; ++h)
#pragma unroll
      for (int n = 0; n < kNTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          mma(acc[h % 2][n], a[from + h][2 * half], b[h][n][half].x, b[h][n][half].y);
          mma(acc[h % 2][n], a[from + h][2 * half + 1], b[h][n][half].z, b[h][n][half].w);
        }
  }
#pragma unroll
  for (int n = 0; n < kNTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)  // columns beyond the last token add up to what nobody reads
      add_shared(into + ((n * 8 + i % 2) * kEarlyStride + lane_row(0, i / 2)) * 4, acc[0][n][i] + acc[1][n][i]);
  __syncthreads();
  if (!mine) return;
  const int sum = sums[token * kEarlyStride + tid % kTileRows];
  if (o.acc) {
    o.acc[at] = sum;
    return;
  }
  const float v = finish_one(sum, scale, zero, row_scale, row_sum);
  store_one(o, at, w.bias ? __fadd_rn(v, bias) : v);
}

template <bool kCodebook, bool kTwo>
cudaError_t early_any(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream) {
  const dim3 grid(w.row_tiles), block(32 * plan.warps);
  if (kHeld * plan.warps < w.k_tiles || 2 * plan.warps < t.m || plan.warps > kEarlyWarps) return cudaErrorInvalidValue;
  if (t.m <= 8) return launch(early_kernel<1, kCodebook, kTwo>, grid, block, 0, plan.overlap, stream, w, t, o);
  return launch(early_kernel<2, kCodebook, kTwo>, grid, block, 0, plan.overlap, stream, w, t, o);
}

}  // namespace lut8
