// Decode kernels for level words picked from a codebook of 256.
#include "decode.cuh"

namespace lut8 {

cudaError_t decode_codebook(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream) {
  return w.groups_per_tile == 8 ? decode_any<true, true>(w, t, o, plan, stream) : decode_any<true, false>(w, t, o, plan, stream);
}

}  // namespace lut8
