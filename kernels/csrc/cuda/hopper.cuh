// Many tokens on Hopper: weights expanded into registers as the A operand of wgmma, tokens as B from shared memory.
//
// A block owns 128 rows (two warpgroups of 64; a warp has one row tile) and kN tokens; a stage is one k tile of the tokens. wgmma reads
// channels in its own order, so the quantizer writes each 128 channels in that order (layout.h, wgmma_word). While the tensor cores
// work on one k tile, the warps expand the next into a second set of A registers; loads of tokens and of weights run two k tiles ahead.
//
// A block alone on its multiprocessor leaves the tensor cores waiting for its own chain of expand, multiply, wait. For products with so few
// blocks there is kSplit = 2: parts of 256 threads with stages and a barrier of their own take every other k tile, like two blocks on one
// multiprocessor, and their sums meet in shared memory.
#pragma once
#include "tiled.cuh"
#include "wgmma.cuh"

namespace lut8 {

template <int kN, int kSplit>
struct HopperShape {
  static constexpr int kPart = 256, kThreads = kPart * kSplit, kBlockRows = 128, kBlockTokens = kN, kStages = 4;
  static constexpr int kStageBytes = kN * kTileK;
  static constexpr int kSumStride = kBlockRows + 4;
  static constexpr int kSumBytes = kN * kSumStride * 4;
  static constexpr int kShared = (kSplit * kStages * kStageBytes > kSumBytes ? kSplit * kStages * kStageBytes : kSumBytes) + 1024;  // aligned by hand
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int kN>
__device__ __forceinline__ void load_hopper_stage(const Lut8CudaWeight& w, const Tokens& t, int first_token, int k_tile, uint32_t stage) {
  const int64_t stride = w.k_tiles * kTileK;
  const int chunk = threadIdx.x % 8, token = threadIdx.x % 256 / 8;
  const int8_t* q = t.q + k_tile * kTileK + chunk * 16;
  stage += token * kTileK + ((chunk ^ (token & 7)) * 16);
#pragma unroll
  for (int j = 0; j < kN; j += 32) copy_async(stage + j * kTileK, q + min(first_token + token + j, t.m - 1) * stride);
}

// One k tile's A registers, [step][register]. The codes are pinned first: nothing of this moves above the wait before it.
template <bool kCodebook, bool kTwo>
__device__ __forceinline__ void expand_tile(WeightTile<1, kCodebook, kTwo>& tile, const uint32_t (&words)[2][2], uint32_t (&a)[4][4]) {
  uint4& c = tile.codes[0];
  asm volatile("" : "+r"(c.x), "+r"(c.y), "+r"(c.z), "+r"(c.w)::"memory");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t part[2][4];
    expand(c, words, half, part);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[2 * half][i] = part[0][i], a[2 * half + 1][i] = part[1][i];
  }
}

template <int kN>
__device__ __forceinline__ void multiply_hopper(int (&acc)[kN / 2], const uint32_t (&a)[4][4], uint32_t stage, int keep) {
  const uint64_t b = token_descriptor(stage);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma<kN>(acc, a[step], b + 2 * step, step ? 1 : keep);
  wgmma_commit();
}

#endif

template <int kN, int kSplit, bool kCodebook, bool kTwo>
__global__ void __launch_bounds__(256 * kSplit, kN == 128 && kSplit == 1 ? 2 : 1) hopper_kernel(Lut8CudaWeight w, Tokens t, Output o) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = HopperShape<kN, kSplit>;
  extern __shared__ __align__(128) int8_t memory[];
  __shared__ int32_t table[kCodebook ? 256 : 1];
  const int lane = threadIdx.x & 31, warp = (kSplit == 1 ? threadIdx.x : threadIdx.x % S::kPart) / 32;
  const int part = kSplit == 1 ? 0 : __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / S::kPart, 0);  // the same in a warp, and known to be
  const int first_token = blockIdx.x * kN, first_row_tile = blockIdx.y * (S::kBlockRows / kTileRows), row_tile = first_row_tile + warp;
  const uint32_t raw = shared_address(memory), shared = (raw + 1023) & ~1023u, table_at = shared_address(table);
  const uint32_t stages = shared + part * S::kStages * S::kStageBytes;
  const int steps = kSplit == 1 ? w.k_tiles : (w.k_tiles - part + 1) / 2;  // step i of a part is k tile i * kSplit + part
  const auto meet = [&] { kSplit == 1 ? __syncthreads() : part == 0 ? part_sync<1>(S::kPart) : part_sync<2>(S::kPart); };

  WeightTile<1, kCodebook, kTwo> even_tile, odd_tile;  // two k tiles ahead
  even_tile.load(w, row_tile, part, lane);
  odd_tile.load(w, row_tile, kSplit + part, lane);
  if (blockIdx.x == 0) prefetch_tiles<kCodebook>(w, first_row_tile, S::kBlockRows / kTileRows, 2 * kSplit, kPrefetch);
  if (kCodebook && part == 0) table[threadIdx.x] = __ldg(w.codebook + threadIdx.x);
  let_next_start();
  wait_for_previous();
#pragma unroll
  for (int s = 0; s < S::kStages - 2; ++s) {
    if (s < steps) load_hopper_stage<kN>(w, t, first_token, s * kSplit + part, stages + s * S::kStageBytes);
    copy_commit();
  }
  __syncthreads();  // the table
  int acc[kN / 2];  // the first product writes it
  uint32_t even[4][4], odd[4][4], words[2][2];
  even_tile.levels[0].words(table_at, words);
  expand_tile(even_tile, words, even);
  even_tile.load(w, row_tile, 2 * kSplit + part, lane);

  const auto step = [&](int i, uint32_t (&now)[4][4], uint32_t (&next)[4][4], WeightTile<1, kCodebook, kTwo>& tile) {
    copy_wait<S::kStages - 3>();
    fence_async_proxy();
    meet();
    multiply_hopper<kN>(acc, now, stages + i % S::kStages * S::kStageBytes, i);
    const int ahead = i + S::kStages - 2;
    if (ahead < steps) load_hopper_stage<kN>(w, t, first_token, ahead * kSplit + part, stages + ahead % S::kStages * S::kStageBytes);
    copy_commit();
    tile.levels[0].words(table_at, words);  // before the wait: look-ups take their time beside the products
    wgmma_wait<1>();  // the k tile before this one is done: its stage and its registers are free
    expand_tile(tile, words, next);
    tile.load(w, row_tile, (i + 3) * kSplit + part, lane);
  };
  int i = 0;
  for (; i + 1 < steps; i += 2) {
    step(i, even, odd, odd_tile);
    step(i + 1, odd, even, even_tile);
  }
  if (i < steps) step(i, even, odd, odd_tile);
  wgmma_wait<0>();
  copy_wait<0>();
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) asm volatile("" : "+r"(acc[i])::"memory");
  __syncthreads();

  int* sums = reinterpret_cast<int*>(memory + (shared - raw));
  for (int turn = 0; turn < kSplit; ++turn) {
    if (part == turn && steps > 0) {  // with a single k tile the second part has nothing to add
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = warp * kTileRows + lane_row(lane, i / 2 % 2);
        int& sum = sums[token * S::kSumStride + row];
        sum = turn ? sum + acc[i] : acc[i];
      }
    }
    __syncthreads();
  }
  tiled_epilogue<S>(w, t, o, sums, first_row_tile * kTileRows, first_token);
#endif
}

template <int kN, int kSplit, bool kCodebook>
cudaError_t hopper_shape(const Lut8CudaWeight& w, const Tokens& t, const Output& o, bool overlap, cudaStream_t stream) {
  using S = HopperShape<kN, kSplit>;
  const dim3 grid((t.m + kN - 1) / kN, (w.row_tiles * kTileRows + S::kBlockRows - 1) / S::kBlockRows), block(S::kThreads);
  if (w.groups_per_tile == 8) return launch(hopper_kernel<kN, kSplit, kCodebook, true>, grid, block, S::kShared, overlap, stream, w, t, o);
  return launch(hopper_kernel<kN, kSplit, kCodebook, false>, grid, block, S::kShared, overlap, stream, w, t, o);
}

}  // namespace lut8
