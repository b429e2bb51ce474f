// The Hopper kernels, and which shape a product gets.
#include "hopper.cuh"

namespace lut8 {

cudaError_t hopper(const Lut8CudaWeight& w, const Tokens& t, const Output& o, int tokens, bool overlap, cudaStream_t stream) {
  const Device device = device_of(w.device);
  if (device.major != 9) return cudaErrorNotSupported;
  const int rows = (w.row_tiles + 7) / 8, narrow = rows * ((t.m + 127) / 128), wide = rows * ((t.m + 255) / 256), all = device.multiprocessors;
  if (tokens == 0) {  // in waves of blocks of 256 tokens; those of 128 stand two on a multiprocessor, and like codebooks better (factors as measured)
    const float waves = static_cast<float>((wide + all - 1) / all);
    const float halves = narrow <= all ? 0.74f : (narrow / (2.0f * all) + 0.25f) * (w.group_codes ? 0.88f : 1.09f);
    tokens = waves < halves ? 256 : 128;
  }
  if (w.group_codes) return tokens == 256 ? hopper_shape<256, true>(w, t, o, narrow, all, overlap, stream) : hopper_shape<128, true>(w, t, o, narrow, all, overlap, stream);
  return tokens == 256 ? hopper_shape<256, false>(w, t, o, narrow, all, overlap, stream) : hopper_shape<128, false>(w, t, o, narrow, all, overlap, stream);
}

}  // namespace lut8
