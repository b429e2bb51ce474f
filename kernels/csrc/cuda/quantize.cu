// The activation quantizer as a launch of its own. q (m, padded), padding zeroed, in channel or wgmma order.
//
// Many tokens: one block each. Few tokens leave the machine empty, and a decode step waits for them: then several blocks share a token.
// Each of them looks for the extremes of all of it, which costs little, and writes its own slice of the codes.
// The product behind it can be launched once every block of the quantizer has started, so these must find room beside the blocks of the
// product before. Two of those, of 512 threads and 64 registers, fill a multiprocessor; what is left of the machine then are a few
// halves. A large block needs such a half for itself, of the small ones three fit.
#include "launch.cuh"
#include "quantize.cuh"

namespace lut8 {
namespace {

constexpr int kSlice = 4096;  // channels of a block that shares a token: eight a thread in a large block, sixteen in a small one
constexpr int kFit = 24;  // small blocks that fit in eight halves of a multiprocessor, what 256 blocks of a product leave of 132

template <int kThreads, int kResident, int kLoads>
__global__ void __launch_bounds__(kThreads, kResident) quantize_kernel(Tokens t, int in, int padded, int slice, int8_t* q, float* scale, int32_t* zero, bool wgmma_order) {
  __shared__ QuantizeScratch scratch;
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const int from = blockIdx.y * slice;
  const Range range = gridDim.y == 1 ? Range{0, padded} : Range{from, min(from + slice, padded)};
  quantize_tokens<kLoads>(t.x, t.x_type, row, 1, in, range, t.factors, q + row * padded, 0, scale + row, zero + row, scratch, wgmma_order);
}

}  // namespace

cudaError_t quantize(const Tokens& t, int64_t in, int64_t padded, int8_t* q, float* scale, int32_t* zero, bool small, bool wgmma_order, bool overlap,
                     cudaStream_t stream) {
  const int vectors = static_cast<int>((in + 7) / 8), most = small || t.m > 32 ? 256 : 512;
  const int threads = vectors >= most ? most : (vectors + 31) / 32 * 32;
  int slice = kSlice;
  if (small && t.m * ((padded + kSlice / 2 - 1) / (kSlice / 2)) <= kFit) slice /= 2;
  const dim3 grid(t.m, t.m > 32 ? 1 : static_cast<unsigned>((padded + slice - 1) / slice));
  return launch(small ? quantize_kernel<256, 6, 2> : quantize_kernel<512, 2, 4>, grid, dim3(threads), 0, overlap, stream, t, static_cast<int>(in),
                static_cast<int>(padded), slice, q, scale, zero, wgmma_order);
}

cudaError_t covered() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(quantize_kernel<512, 2, 4>));
  cudaGetLastError();
  return error;
}

}  // namespace lut8
