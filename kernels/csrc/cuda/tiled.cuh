// Many tokens: weights are expanded once into registers and multiplied with a whole tile of tokens.
//
// A block owns kRowWarps * 2 row tiles and kTokenWarps * kNTiles * 8 tokens. Activations come through shared memory, kStages deep, by
// cp.async; a stage holds kKWarps k tiles, one for each warp that splits K. Weights go straight from memory into registers, one k
// tile ahead. A lane's channels are 32 contiguous bytes, so B fragments are plain 16-byte shared loads (two mma steps each) where the
// usual channel order would need ldmatrix. Sums meet in shared memory, which also makes the stores contiguous.
#pragma once
#include "launch.cuh"

namespace lut8 {

template <int kNT, int kRW, int kCW, int kKW, int kS>
struct Shape {
  static constexpr int kRows = 2;  // row tiles a warp
  static constexpr int kNTiles = kNT, kRowWarps = kRW, kTokenWarps = kCW, kKWarps = kKW, kStages = kS;
  static constexpr int kThreads = 32 * kRW * kCW * kKW;
  static constexpr int kBlockRows = kRW * kRows * kTileRows, kBlockTokens = kCW * kNT * 8;
  static constexpr int kStageBytes = kKW * kBlockTokens * kTileK;
  static constexpr int kSumStride = kBlockRows + 4;
  static constexpr int kSumBytes = kBlockTokens * kSumStride * 4;
  static constexpr int kShared = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
};

// Step `step` of the activations into its stage. Tokens beyond the last repeat it; k tiles beyond the last are left alone.
template <class S>
__device__ __forceinline__ void load_stage(const Lut8CudaWeight& w, const Tokens& t, int first_token, int step, uint32_t stage) {
  static_assert(S::kThreads == 256 && S::kBlockTokens % 32 == 0);
  const int64_t stride = w.k_tiles * kTileK;
  const int chunk = threadIdx.x % 8, token = threadIdx.x / 8;
  const int8_t* q = t.q + step * S::kKWarps * kTileK + chunk * 16;
  stage += chunk_offset(token, chunk);
#pragma unroll
  for (int part = 0; part < S::kKWarps; ++part) {
    if (step * S::kKWarps + part >= w.k_tiles) break;
#pragma unroll
    for (int j = 0; j < S::kBlockTokens; j += 32)
      copy_async(stage + (part * S::kBlockTokens + j) * kTileK, q + part * kTileK + min(first_token + token + j, t.m - 1) * stride);
  }
}

// `tokens`: shared address of this lane's first chunk in its token column; the second half of its channels is the neighbouring chunk.
template <class S, bool kCodebook, bool kTwo>
__device__ __forceinline__ void multiply_stage(const WeightTile<S::kRows, kCodebook, kTwo>& tile, uint32_t tokens, uint32_t table,
                                               int (&acc)[S::kRows][S::kNTiles][4]) {
  uint32_t words[S::kRows][2][2];
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) tile.levels[r].words(table, words[r]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[S::kRows][2][4];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) expand(tile.codes[r], words[r], half, a[r]);
#pragma unroll
    for (int n = 0; n < S::kNTiles; ++n) {
      const uint4 b = load_shared_four((tokens ^ (16 * half)) + n * 8 * kTileK);
#pragma unroll
      for (int r = 0; r < S::kRows; ++r) {
        mma(acc[r][n], a[r][0], b.x, b.y);
        mma(acc[r][n], a[r][1], b.z, b.w);
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void store_sums(int (&acc)[S::kRows][S::kNTiles][4], int* sums, int row_warp, int token_warp, int k_warp, int lane) {
  for (int turn = 0; turn < S::kKWarps; ++turn) {
    if (k_warp == turn) {
#pragma unroll
      for (int r = 0; r < S::kRows; ++r)
#pragma unroll
        for (int n = 0; n < S::kNTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = (token_warp * S::kNTiles + n) * 8 + lane % 4 * 2 + i % 2;
            const int row = (row_warp * S::kRows + r) * kTileRows + lane_row(lane, i / 2);
            int& sum = sums[token * S::kSumStride + row];
            sum = turn ? sum + acc[r][n][i] : acc[r][n][i];
          }
    }
    __syncthreads();
  }
}

// Four rows of one token at a time: 16-byte shared loads, 8- or 16-byte stores where the shape allows.
template <class S>
__device__ __forceinline__ void tiled_epilogue(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const int* sums, int first_row, int first_token) {
  constexpr int quads = S::kBlockRows / 4;
  for (int i = threadIdx.x; i < S::kBlockTokens * quads; i += S::kThreads) {
    const int token = first_token + i / quads, row = first_row + i % quads * 4;
    if (token >= t.m || row >= w.out) continue;
    const int4 raw = *reinterpret_cast<const int4*>(sums + i / quads * S::kSumStride + i % quads * 4);
    const int sum[4] = {raw.x, raw.y, raw.z, raw.w};
    const int64_t at = static_cast<int64_t>(token) * w.out + row;
    const int n = min(4, w.out - row);
    if (o.acc) {
      for (int j = 0; j < n; ++j) o.acc[at + j] = sum[j];
      continue;
    }
    const float scale = t.scale[token];  // plain loads: a kernel that this one overlaps wrote them
    const int zero = t.zero[token];
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[j] = finish_one(sum[j], scale, zero, __ldg(w.row_scale + row + j), __ldg(w.row_sum + row + j));
      if (w.bias) v[j] = __fadd_rn(v[j], __ldg(w.bias + row + j));
    }
    store_four(o, at, v, n, w.out % 4 == 0);
  }
}

template <class S, bool kCodebook, bool kTwo>
__global__ void __launch_bounds__(S::kThreads, 1) tiled_kernel(Lut8CudaWeight w, Tokens t, Output o) {
  extern __shared__ __align__(128) int8_t memory[];
  __shared__ int32_t table[kCodebook ? 256 : 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int row_warp = warp % S::kRowWarps, token_warp = warp / S::kRowWarps % S::kTokenWarps, k_warp = warp / (S::kRowWarps * S::kTokenWarps);
  const int first_token = blockIdx.x * S::kBlockTokens, first_row_tile = blockIdx.y * S::kRowWarps * S::kRows;
  const int row_tile = first_row_tile + row_warp * S::kRows;
  const int steps = (w.k_tiles + S::kKWarps - 1) / S::kKWarps;
  const uint32_t shared = shared_address(memory), table_at = shared_address(table);

  WeightTile<S::kRows, kCodebook, kTwo> now, next;
  now.load(w, row_tile, k_warp, lane);
  if (blockIdx.x == 0) prefetch_tiles<kCodebook>(w, first_row_tile, S::kRowWarps * S::kRows, S::kKWarps, kPrefetch);
  if (kCodebook)
    for (int i = threadIdx.x; i < 256; i += S::kThreads) table[i] = __ldg(w.codebook + i);
  let_next_start();
  wait_for_previous();
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < steps) load_stage<S>(w, t, first_token, s, shared + s * S::kStageBytes);
    copy_commit();
  }

  int acc[S::kRows][S::kNTiles][4] = {};
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    copy_wait<S::kStages - 2>();
    __syncthreads();
    const int ahead = step + S::kStages - 1, free_stage = stage ? stage - 1 : S::kStages - 1;
    if (ahead < steps) load_stage<S>(w, t, first_token, ahead, shared + free_stage * S::kStageBytes);
    copy_commit();
    const int k_tile = step * S::kKWarps + k_warp;
    next.load(w, row_tile, k_tile + S::kKWarps, lane);
    if (k_tile < w.k_tiles) {
      const int column = k_warp * S::kBlockTokens + token_warp * S::kNTiles * 8 + lane / 4;
      multiply_stage<S>(now, shared + stage * S::kStageBytes + chunk_offset(column, lane % 4 * 2), table_at, acc);
    }
    now = next;
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  }
  copy_wait<0>();
  __syncthreads();
  int* sums = reinterpret_cast<int*>(memory);
  store_sums<S>(acc, sums, row_warp, token_warp, k_warp, lane);
  tiled_epilogue<S>(w, t, o, sums, first_row_tile * kTileRows, first_token);
}

template <class S, bool kCodebook>
cudaError_t tiled_shape(const Lut8CudaWeight& w, const Tokens& t, const Output& o, bool overlap, cudaStream_t stream) {
  const dim3 grid((t.m + S::kBlockTokens - 1) / S::kBlockTokens, (w.row_tiles * kTileRows + S::kBlockRows - 1) / S::kBlockRows);
  if (w.groups_per_tile == 8) return launch(tiled_kernel<S, kCodebook, true>, grid, dim3(S::kThreads), S::kShared, overlap, stream, w, t, o);
  return launch(tiled_kernel<S, kCodebook, false>, grid, dim3(S::kThreads), S::kShared, overlap, stream, w, t, o);
}

}  // namespace lut8
