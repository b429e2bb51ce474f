// The Hopper kernels, and which shape a product gets: 256 tokens a block when that still fills the machine.
#include "hopper.cuh"

namespace lut8 {

cudaError_t hopper(const Lut8CudaWeight& w, const Tokens& t, const Output& o, int tokens, bool overlap, cudaStream_t stream) {
  const Device device = device_of(w.device);
  if (device.major != 9) return cudaErrorNotSupported;
  if (tokens == 0) {
    const int rows = (w.row_tiles + 7) / 8, wide = rows * ((t.m + 255) / 256);
    tokens = wide >= device.multiprocessors * 3 / 4 ? 256 : 128;
  }
  if (w.group_codes) return tokens == 256 ? hopper_shape<256, true>(w, t, o, overlap, stream) : hopper_shape<128, true>(w, t, o, overlap, stream);
  return tokens == 256 ? hopper_shape<256, false>(w, t, o, overlap, stream) : hopper_shape<128, false>(w, t, o, overlap, stream);
}

}  // namespace lut8
