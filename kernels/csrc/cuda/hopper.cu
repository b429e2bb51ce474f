// The Hopper kernels, and which shape a product gets.
#include "hopper.cuh"

namespace lut8 {
namespace {

constexpr int kWorthSplitting = 4;  // k tiles

// Blocks that would each have a multiprocessor of their own split K between their halves (19 us instead of 35 at 4096 x 4096 with 512 tokens).
// Else in waves of blocks of 256 tokens; those of 128 stand two on a multiprocessor, and like codebooks better (factors as measured).
HopperCut choose(const Lut8CudaWeight& w, int m, int multiprocessors) {
  const int rows = (w.row_tiles + 7) / 8, narrow = rows * ((m + 127) / 128), wide = rows * ((m + 255) / 256), all = multiprocessors;
  if (narrow <= all && w.k_tiles >= kWorthSplitting) return kSplitK;
  const float waves = static_cast<float>((wide + all - 1) / all);
  const float halves = narrow <= all ? 0.74f : (narrow / (2.0f * all) + 0.25f) * (w.group_codes ? 0.88f : 1.09f);
  return waves < halves ? kTokens256 : kTokens128;
}

template <bool kCodebook>
cudaError_t run(const Lut8CudaWeight& w, const Tokens& t, const Output& o, HopperCut cut, bool overlap, cudaStream_t stream) {
  if (cut == kTokens256) return hopper_shape<256, 1, kCodebook>(w, t, o, overlap, stream);
  if (cut == kSplitK) return hopper_shape<128, 2, kCodebook>(w, t, o, overlap, stream);
  return hopper_shape<128, 1, kCodebook>(w, t, o, overlap, stream);
}

}  // namespace

cudaError_t hopper(const Lut8CudaWeight& w, const Tokens& t, const Output& o, HopperCut cut, bool overlap, cudaStream_t stream) {
  const Device device = device_of(w.device);
  if (device.major != 9) return cudaErrorNotSupported;
  if (cut == kByRule) cut = choose(w, t.m, device.multiprocessors);
  return w.group_codes ? run<true>(w, t, o, cut, overlap, stream) : run<false>(w, t, o, cut, overlap, stream);
}

}  // namespace lut8
