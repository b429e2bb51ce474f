// The activation quantizer as a launch of its own. q (m, padded), padding zeroed, in channel or wgmma order.
//
// Many tokens: one block each. Few tokens leave the machine empty, and a decode step waits for them: then several blocks share a token.
// Each of them looks for the extremes of all of it, which costs little, and writes its own slice of the codes.
#include "launch.cuh"
#include "quantize.cuh"

namespace lut8 {
namespace {

constexpr int kSlice = 4096;  // channels of a block that shares a token: eight a thread

__global__ void __launch_bounds__(512, 2) quantize_kernel(Tokens t, int in, int padded, int8_t* q, float* scale, int32_t* zero, bool wgmma_order) {
  __shared__ QuantizeScratch scratch;
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  const int from = blockIdx.y * kSlice;
  const Range range = gridDim.y == 1 ? Range{0, padded} : Range{from, min(from + kSlice, padded)};
  quantize_tokens<4>(t.x, t.x_type, row, 1, in, range, t.factors, q + row * padded, 0, scale + row, zero + row, scratch, wgmma_order);
}

}  // namespace

cudaError_t quantize(const Tokens& t, int64_t in, int64_t padded, int8_t* q, float* scale, int32_t* zero, bool wgmma_order, bool overlap,
                     cudaStream_t stream) {
  const int vectors = static_cast<int>((in + 7) / 8), most = t.m > 32 ? 256 : 512;
  const int threads = vectors >= most ? most : (vectors + 31) / 32 * 32;
  const int slices = t.m > 32 ? 1 : static_cast<int>((padded + kSlice - 1) / kSlice);
  return launch(quantize_kernel, dim3(t.m, slices), dim3(threads), 0, overlap, stream, t, static_cast<int>(in), static_cast<int>(padded), q, scale, zero,
                wgmma_order);
}

cudaError_t covered() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(quantize_kernel));
  cudaGetLastError();
  return error;
}

}  // namespace lut8
