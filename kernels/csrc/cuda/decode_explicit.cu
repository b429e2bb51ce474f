// Decode kernels for explicit level words. A file of their own: half of the instances, compiled beside the other half.
#include "decode.cuh"

namespace lut8 {

cudaError_t decode_explicit(const Lut8CudaWeight& w, const Tokens& t, const Output& o, const Plan& plan, cudaStream_t stream) {
  return w.groups_per_tile == 8 ? decode_any<false, true>(w, t, o, plan, stream) : decode_any<false, false>(w, t, o, plan, stream);
}

}  // namespace lut8
