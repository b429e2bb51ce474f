// kernels/csrc/cuda/wgmma.cuh for the emulator: A from the registers of 128 threads, B from swizzled shared memory, at once.
#pragma once
#include "lut8_cuda.cuh"

namespace lut8 {

struct Group { unsigned arrived = 0, generation = 0; uint32_t values[128][4]; };
inline Group groups[8];

// Byte (token, k) of B: rows of 128 bytes, address bits 4..6 exclusive-or bits 7..9.
inline int token_byte(uint64_t descriptor, int token, int k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4, stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t at = start + token / 8 * stride + token % 8 * 128 + k;
  return *shared_pointer(at ^ ((at >> 7 & 7) << 4));
}

template <int kN>
inline void wgmma(int (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int keep) {
  Group& group = groups[threadIdx.x / 128];
  const int thread = threadIdx.x % 128, lane = thread % 32, first = thread - lane;
  for (int i = 0; i < 4; ++i) group.values[thread][i] = a[i];
  emulated::meet(group.arrived, group.generation, 128);
  for (int i = 0; i < kN / 2; ++i) {
    const int row = lane / 4, high_row = i / 2 % 2, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    int sum = keep ? d[i] : 0;
    for (int k = 0; k < 32; ++k) {
      const uint32_t word = group.values[first + row * 4 + k % 16 / 4][2 * (k / 16) + high_row];
      sum += static_cast<int8_t>(word >> (8 * (k % 4))) * token_byte(b, token, k);
    }
    d[i] = sum;
  }
  emulated::meet(group.arrived, group.generation, 128);
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kPending>
inline void wgmma_wait() {}
inline void fence_async_proxy() {}
inline uint64_t token_descriptor(uint32_t shared) { return static_cast<uint64_t>((shared & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

}  // namespace lut8
