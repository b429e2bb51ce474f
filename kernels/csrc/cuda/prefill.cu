// The two ends of a prefill by a library's int8 product: expanded weights before it, scale, zero point, bias and cast after it.
#include "launch.cuh"

namespace lut8 {
namespace {

// One thread a lane of a tile: 64 codes -> 32 int8 weights of row g and 32 of row g + 8, row-major (padded rows, k_tiles * 128).
template <bool kCodebook, bool kTwo>
__global__ void __launch_bounds__(256) dequantize_kernel(Lut8CudaWeight w, int8_t* weight) {
  __shared__ int32_t table[kCodebook ? 256 : 1];
  if (kCodebook) {
    for (int i = threadIdx.x; i < 256; i += blockDim.x) table[i] = __ldg(w.codebook + i);
    __syncthreads();
  }
  const int lane = threadIdx.x & 31;
  const int tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (tile >= w.row_tiles * w.k_tiles) return;
  const int row_tile = tile / w.k_tiles, k_tile = tile % w.k_tiles;
  const int64_t stride = w.k_tiles * kTileK;
  const uint4 codes = load_once(reinterpret_cast<const uint4*>(w.codes + code_index(tile, lane)));
  Levels<kCodebook, kTwo> levels;
  levels.load(w, level_index(tile, lane, w.groups_per_tile));
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t level_words[2][2];
  levels.words(shared_address(table), level_words);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    int8_t* target = weight + (row_tile * kTileRows + lane_row(lane, row)) * stride + k_tile * kTileK + lane_channel(lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = words[2 * row + half], level = level_words[half][row];
      *reinterpret_cast<uint4*>(target + 16 * half) = make_uint4(prmt(level, selector(word, 0)), prmt(level, selector(word, 1)),
                                                                 prmt(level, selector(word, 2)), prmt(level, selector(word, 3)));
    }
  }
}

__global__ void __launch_bounds__(256) finish_kernel(Lut8CudaWeight w, Tokens t, const int32_t* acc, int64_t stride, Output o) {
  const int row = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
  const int64_t token = blockIdx.x;
  if (row >= w.out) return;
  const int n = min(4, w.out - row);
  const float scale = t.scale[token];
  const int zero = t.zero[token];
  int sum[4] = {};
  if (stride % 4 == 0) {  // then four sums lie in the row, used or not
    const int4 raw = *reinterpret_cast<const int4*>(acc + token * stride + row);
    sum[0] = raw.x, sum[1] = raw.y, sum[2] = raw.z, sum[3] = raw.w;
  } else {
    for (int j = 0; j < n; ++j) sum[j] = acc[token * stride + row + j];
  }
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    v[j] = finish_one(sum[j], scale, zero, __ldg(w.row_scale + row + j), __ldg(w.row_sum + row + j));
    if (w.bias) v[j] = __fadd_rn(v[j], __ldg(w.bias + row + j));
  }
  store_four(o, token * w.out + row, v, n, w.out % 4 == 0);
}

}  // namespace

cudaError_t dequantize(const Lut8CudaWeight& w, int8_t* weight, cudaStream_t stream) {
  const int64_t tiles = static_cast<int64_t>(w.row_tiles) * w.k_tiles;
  const dim3 grid(static_cast<unsigned>((tiles + 7) / 8)), block(256);
  const bool two = w.groups_per_tile == 8;
  if (w.words) return two ? launch(dequantize_kernel<false, true>, grid, block, 0, false, stream, w, weight)
                          : launch(dequantize_kernel<false, false>, grid, block, 0, false, stream, w, weight);
  return two ? launch(dequantize_kernel<true, true>, grid, block, 0, false, stream, w, weight)
             : launch(dequantize_kernel<true, false>, grid, block, 0, false, stream, w, weight);
}

cudaError_t finish(const Lut8CudaWeight& w, const Tokens& t, const int32_t* acc, int64_t stride, const Output& o, cudaStream_t stream) {
  const dim3 grid(t.m, (w.out + 1023) / 1024), block(256);
  return launch(finish_kernel, grid, block, 0, false, stream, w, t, acc, stride, o);
}

}  // namespace lut8
