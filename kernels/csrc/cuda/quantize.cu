// The activation quantizer as a launch of its own: one block a token. q (m, padded), padding zeroed, in channel or wgmma order.
#include "launch.cuh"
#include "quantize.cuh"

namespace lut8 {
namespace {

__global__ void __launch_bounds__(512) quantize_kernel(Tokens t, int in, int padded, int8_t* q, float* scale, int32_t* zero, bool wgmma_order) {
  __shared__ QuantizeScratch scratch;
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  quantize_tokens(t.x, t.x_type, row, 1, in, padded, t.factors, q + row * padded, 0, scale + row, zero + row, scratch, wgmma_order);
}

}  // namespace

cudaError_t quantize(const Tokens& t, int64_t in, int64_t padded, int8_t* q, float* scale, int32_t* zero, bool wgmma_order, bool overlap,
                     cudaStream_t stream) {
  const int vectors = static_cast<int>((in + 7) / 8);
  const int most = t.m <= 32 ? 512 : 256;
  const int threads = vectors >= most ? most : (vectors + 31) / 32 * 32;
  return launch(quantize_kernel, dim3(t.m), dim3(threads), 0, overlap, stream, t, static_cast<int>(in), static_cast<int>(padded), q, scale, zero,
                wgmma_order);
}

cudaError_t covered() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(quantize_kernel));
  cudaGetLastError();
  return error;
}

}  // namespace lut8
