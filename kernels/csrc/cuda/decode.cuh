// Decode: at most 16 tokens. Every weight is read once, so the product must run at memory speed; lut8_cuda.cu tells the story.
//
// A block owns kRows row tiles (16 rows each) and all of K; its warps take k tiles in turn. A lane reads 16 bytes of codes and its
// level words, expands them with prmt into A fragments, and multiplies them with tokens as B (kNTiles x 8 columns; columns beyond
// the last token repeat it and are never stored). The int32 sums of all warps meet in shared memory (addition of integers: any order,
// same result), and the epilogue applies scale, zero point, bias and cast.
// A step of a small layer is a chain of latencies, not a stream. So whatever depends on no earlier kernel comes before the wait for it:
// the first two k tiles of each warp into registers, the next ones into the L2, codebook, scales and row sums into shared memory. With
// programmatic dependent launch all of this happens while the kernels before are still at work.
// kFused: the block quantizes the tokens itself, into shared memory.
#pragma once
#include "early.cuh"
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
    uint32_t words[2][2];
    tile.levels[r].words(table, words);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
      expand(tile.codes[r], words, half, a);
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

// What the epilogue needs of the block's rows.
template <int kRows>
struct RowNumbers {
  __align__(16) float scale[kRows * kTileRows];
  __align__(16) int32_t sum[kRows * kTileRows];
  __align__(16) float bias[kRows * kTileRows];
};

template <int kRows>
__device__ __forceinline__ void load_rows(const Lut8CudaWeight& w, int first_row, RowNumbers<kRows>& rows) {
  constexpr int chunks = kRows * kTileRows / 4;
  for (int i = threadIdx.x; i < chunks; i += blockDim.x) {
    const int row = first_row + 4 * i;
    if (row >= w.row_tiles * kTileRows) break;
    copy_async(shared_address(rows.scale + 4 * i), w.row_scale + row);
    copy_async(shared_address(rows.sum + 4 * i), w.row_sum + row);
    if (w.bias) copy_async(shared_address(rows.bias + 4 * i), w.bias + row);
  }
}

// A warp's sums into the block's.
template <int kRows, int kNTiles>
__device__ __forceinline__ void add_up(const int (&acc)[kRows][kNTiles][4], int tokens, int* sums) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int n = 0; n < kNTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i % 2, row = r * kTileRows + lane_row(lane, i / 2);
        if (token < tokens) atomicAdd(&sums[token * kSumStride<kRows> + row], acc[r][n][i]);
      }
}

// The block's sums, finished.
template <int kRows>
__device__ __forceinline__ void store_block(const Lut8CudaWeight& w, int tokens, const Output& o, const int* sums, const float* token_scale, const int* token_zero,
                                            const RowNumbers<kRows>& numbers, int first_row) {
  constexpr int rows = kRows * kTileRows;
  for (int i = threadIdx.x; i < tokens * rows; i += blockDim.x) {
    const int token = i / rows, r = i % rows, row = first_row + r;
    if (row >= w.out) continue;
    const int sum = sums[token * kSumStride<kRows> + r];
    const int64_t at = static_cast<int64_t>(token) * w.out + row;
    if (o.acc) {
      o.acc[at] = sum;
      continue;
    }
    float v = finish_one(sum, token_scale[token], token_zero[token], numbers.scale[r], numbers.sum[r]);
    if (w.bias) v = __fadd_rn(v, numbers.bias[r]);
    store_one(o, at, v);
  }
}

// A block's slices of the weight that comes next.
struct Ahead {
  int k_tiles;         // to prefetch of the block's own weight
  uint32_t slice[2];   // bytes a block of the next one's codes and levels
};

// The memory has nothing to do between a block's last load and the first one of the next product, with small kernels in between: one warp
// asks for the block's slice of the next weight.
__device__ __forceinline__ void prefetch_next(const Lut8CudaWeight& w, const Ahead& ahead) {
  constexpr uint32_t piece = 16 << 10;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t begin = ahead.slice[i] * blockIdx.x, bytes = w.next_bytes[i];
    const uint32_t end = begin + ahead.slice[i] < bytes ? begin + ahead.slice[i] : bytes;
    for (uint32_t at = begin + threadIdx.x % 32 * piece; at < end; at += 32 * piece)
      prefetch_bulk(static_cast<const char*>(w.next[i]) + at, end - at < piece ? end - at : piece);
  }
}

// Two blocks of most warps fit a multiprocessor at 64 registers a thread: then the next layer's can start early. Where that would spill, one.
// (`kWide`: registers for two level words a group; on Blackwell those that pick them from a table do not fit either.)
#if __CUDA_ARCH__ >= 1000
constexpr bool kTableIsWide = true;
#else
constexpr bool kTableIsWide = false;
#endif
template <int kRows, int kNTiles, bool kWide>
constexpr int kBlocks = kNTiles == 1 && (kRows == 1 || (kRows == 2 && !kWide)) ? 2 : 1;

template <int kRows, int kNTiles, bool kCodebook, bool kTwo, bool kFused>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocks<kRows, kNTiles, kTwo && (!kCodebook || kTableIsWide)>) decode_kernel(Lut8CudaWeight w, Tokens t, Output o, Ahead ahead) {
  extern __shared__ __align__(16) int8_t fused_q[];
  __shared__ int sums[kNTiles * 8 * kSumStride<kRows>];
  __shared__ __align__(16) int32_t table[kCodebook ? 256 : 1];
  __shared__ RowNumbers<kRows> numbers;
  __shared__ QuantizeScratch scratch;
  __shared__ float token_scale[kNTiles * 8];
  __shared__ int token_zero[kNTiles * 8];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid / 32, warps = blockDim.x / 32;
  const int first_row_tile = blockIdx.x * kRows;
  const int padded = w.k_tiles * kTileK;

  WeightTile<kRows, kCodebook, kTwo> even, odd;
  even.load(w, first_row_tile, warp, lane);
  odd.load(w, first_row_tile, warp + warps, lane);
  prefetch_tiles<kCodebook>(w, first_row_tile, kRows, 2 * warps, ahead.k_tiles);
  if (kCodebook)
    for (int i = tid; i < 64; i += blockDim.x) copy_async(shared_address(table + 4 * i), w.codebook + 4 * i);
  if (!o.acc) load_rows<kRows>(w, first_row_tile * kTileRows, numbers);
  copy_commit();
  for (int i = tid; i < kNTiles * 8 * kSumStride<kRows>; i += blockDim.x) sums[i] = 0;
  let_next_start();
  wait_for_previous();

  const int stride = kFused ? padded + 16 : padded;
  const uint32_t table_at = shared_address(table), shared = shared_address(fused_q);
  int offset[kNTiles];
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) offset[n] = min(n * 8 + lane / 4, t.m - 1) * stride + lane_channel(lane);
  TokenTile<kNTiles, kFused> even_tokens, odd_tokens;
  float my_scale = 0.0f;
  int my_zero = 0;
  if (kFused) {
    const int together = min(kTogether, warps);
    for (int m = 0; m < t.m; m += together) {
      if (m) __syncthreads();
      quantize_tokens<1>(t.x, t.x_type, m, min(together, t.m - m), w.in, Range{0, padded}, t.factors, fused_q + m * stride, stride, token_scale + m,
                      token_zero + m, scratch);
    }
  } else {
    if (warp < w.k_tiles) even_tokens.load(t.q, shared, offset, warp);
    if (tid < t.m && !o.acc) my_scale = t.scale[tid], my_zero = t.zero[tid];
  }
  copy_wait<0>();
  __syncthreads();

  int acc[kRows][kNTiles][4] = {};
  for (int k = warp; k < w.k_tiles; k += 2 * warps) {
    const bool second = k + warps < w.k_tiles;
    if (kFused) even_tokens.load(t.q, shared, offset, k);
    else if (second) odd_tokens.load(t.q, shared, offset, k + warps);
    multiply(even, even_tokens, table_at, acc);
    even.load(w, first_row_tile, k + 2 * warps, lane);
    if (!second) break;
    if (kFused) odd_tokens.load(t.q, shared, offset, k + warps);
    else if (k + 2 * warps < w.k_tiles) even_tokens.load(t.q, shared, offset, k + 2 * warps);
    multiply(odd, odd_tokens, table_at, acc);
    odd.load(w, first_row_tile, k + 3 * warps, lane);
  }
  if (ahead.slice[0] && warp == warps - 1) prefetch_next(w, ahead);

  add_up<kRows, kNTiles>(acc, t.m, sums);
  if (!kFused && tid < t.m) token_scale[tid] = my_scale, token_zero[tid] = my_zero;
  __syncthreads();
  store_block<kRows>(w, t.m, o, sums, token_scale, token_zero, numbers, first_row_tile * kTileRows);
}

template <int kRows, bool kCodebook, bool kTwo>
cudaError_t decode_rows(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream) {
  const dim3 grid((w.row_tiles + kRows - 1) / kRows), block(32 * plan.warps);
  Ahead ahead{plan.prefetch, {}};
  for (int i = 0; i < 2; ++i) ahead.slice[i] = (w.next_bytes[i] / grid.x + 16) / 16 * 16;
  if (!w.next_bytes[0]) ahead.slice[0] = 0;
  if (t.x) return launch(decode_kernel<kRows, 1, kCodebook, kTwo, true>, grid, block, t.m * fused_stride(w), plan.overlap, stream, w, t, o, ahead);
  if (t.m <= 8) return launch(decode_kernel<kRows, 1, kCodebook, kTwo, false>, grid, block, 0, plan.overlap, stream, w, t, o, ahead);
  if constexpr (kRows < 4) return launch(decode_kernel<kRows, 2, kCodebook, kTwo, false>, grid, block, 0, plan.overlap, stream, w, t, o, ahead);
  return cudaErrorInvalidValue;  // four row tiles x sixteen tokens do not fit the registers
}

template <bool kCodebook, bool kTwo>
cudaError_t decode_any(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream) {
  if (plan.early) return early_any<kCodebook, kTwo>(w, t, o, plan, stream);
  if (plan.row_tiles == 1) return decode_rows<1, kCodebook, kTwo>(w, t, o, plan, stream);
  if (plan.row_tiles == 2) return decode_rows<2, kCodebook, kTwo>(w, t, o, plan, stream);
  if (plan.row_tiles == 3) return decode_rows<3, kCodebook, kTwo>(w, t, o, plan, stream);
  return decode_rows<4, kCodebook, kTwo>(w, t, o, plan, stream);
}

cudaError_t decode_explicit(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream);
cudaError_t decode_codebook(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream);

}  // namespace lut8
