// kernels/csrc/cuda/ptx.cuh for the emulator: what each instruction does, from its definition. Shared addresses are offsets.
#pragma once
#include "cuda_runtime.h"

namespace lut8 {

inline uint32_t prmt(uint32_t bytes, uint32_t select) {
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = select >> (4 * i) & 15, byte = bytes >> (8 * (nibble & 3)) & 255;
    out |= (nibble & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return out;
}

// Every lane puts its registers down, then makes its own four sums: rows g, g + 8 and columns 2t, 2t + 1.
inline void mma(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& w = emulated::warp();
  const int lane = emulated::thread.x % 32;
  for (int i = 0; i < 4; ++i) w.values[lane][i] = a[i];
  w.values[lane][4] = b0, w.values[lane][5] = b1;
  emulated::warp_sync();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, high_row = i / 2, column = lane % 4 * 2 + i % 2;
    for (int t = 0; t < 4; ++t)
      for (int half = 0; half < 2; ++half)
        for (int byte = 0; byte < 4; ++byte) {
          const auto x = static_cast<int8_t>(w.values[row * 4 + t][2 * half + high_row] >> (8 * byte));
          const auto y = static_cast<int8_t>(w.values[column * 4 + t][4 + half] >> (8 * byte));
          c[i] += x * y;
        }
  }
  emulated::warp_sync();
}

inline uint4 load_once(const uint4* p) { return *p; }
inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const int8_t*>(p) - emulated::shared); }
// Tables that a kernel declares lie beside `shared`; what is megabytes away is an index that nothing set.
inline const int8_t* shared_pointer(uint32_t at) {
  if (std::abs(static_cast<int32_t>(at)) > (8 << 20)) std::fprintf(stderr, "shared memory at %d\n", static_cast<int32_t>(at)), std::abort();
  return emulated::shared + static_cast<int32_t>(at);
}
inline uint32_t load_shared(uint32_t at) {
  uint32_t v;
  std::memcpy(&v, shared_pointer(at), 4);
  return v;
}
inline uint4 load_shared_four(uint32_t at) {
  if (at % 16) std::fprintf(stderr, "a 16-byte shared load at %u\n", at), std::abort();
  uint4 v;
  std::memcpy(&v, shared_pointer(at), 16);
  return v;
}

inline void store_shared(uint32_t at, uint32_t v) { std::memcpy(const_cast<int8_t*>(shared_pointer(at)), &v, 4); }
inline void add_shared(uint32_t at, int v) {
  int sum;
  std::memcpy(&sum, shared_pointer(at), 4);
  sum += v;
  std::memcpy(const_cast<int8_t*>(shared_pointer(at)), &sum, 4);
}

// Copies land at the wait that covers them, not before: a missing wait reads poison.
struct Copy { uint32_t to; const void* from; };
inline std::vector<std::vector<std::vector<Copy>>> copies;  // [thread][group]
inline std::vector<std::vector<Copy>>& my_copies() {
  if (copies.size() <= emulated::thread.x) copies.resize(emulated::thread.x + 1);
  auto& mine = copies[emulated::thread.x];
  if (mine.empty()) mine.emplace_back();
  return mine;
}
inline void copy_async(uint32_t shared, const void* global) { my_copies().back().push_back({shared, global}); }
inline void copy_commit() { my_copies().emplace_back(); }
template <int N>
inline void copy_wait() {
  auto& mine = my_copies();
  while (static_cast<int>(mine.size()) - 1 > N) {
    for (const Copy& c : mine.front()) std::memcpy(const_cast<int8_t*>(shared_pointer(c.to)), c.from, 16);
    mine.erase(mine.begin());
  }
}

template <int kNumber>
inline void part_sync(int threads) {
  emulated::meet(emulated::parts[kNumber].arrived, emulated::parts[kNumber].generation, threads);
}

inline void prefetch_bulk(const void* global, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || bytes == 0) std::fprintf(stderr, "a bulk prefetch of %u bytes\n", bytes), std::abort();
}

inline void let_next_start() {}
inline void wait_for_previous() {}

}  // namespace lut8
