// A CPU stand-in for the CUDA run-time, just large enough for the kernels of kernels/csrc/cuda: one block at a time, a fiber a thread.
//
// __syncthreads and the warp-wide instructions yield until everyone has arrived, so a missing or divergent barrier shows as a deadlock
// (reported) or as wrong sums, not as luck. Between barriers threads run in another order each time; a race shows if that order matters.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n)

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorNotSupported = 801 };
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned __float_as_uint(float v) { unsigned u; std::memcpy(&u, &v, 4); return u; }
inline float __uint_as_float(unsigned u) { float v; std::memcpy(&v, &u, 4); return v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
template <class T> T __ldg(const T* p) { return *p; }
inline int atomicAdd(int* p, int v) { const int old = *p; *p += v; return old; }

namespace emulated {

constexpr size_t kShared = 256 << 10;
alignas(1024) inline int8_t shared[kShared];
inline dim3 thread, block_index, block_size, grid_size;
struct Warp { unsigned arrived = 0, generation = 0; uint32_t values[32][8]; };
inline std::vector<Warp> warps;
struct Part { unsigned arrived = 0, generation = 0; };
inline Part parts[16];
inline unsigned block_arrived, block_generation, finished, idle;
inline ucontext_t scheduler;
inline std::vector<ucontext_t> fibers;
inline std::vector<char> done;
inline std::vector<std::vector<char>> stacks;
inline std::function<void()> body;

inline void yield() {
  const unsigned me = thread.x;
  if (++idle > 64 * fibers.size()) std::fprintf(stderr, "deadlock: threads wait for a barrier that others never reach\n"), std::abort();
  swapcontext(&fibers[me], &scheduler);
  thread.x = me;
}

inline void meet(unsigned& arrived, unsigned& generation, unsigned everyone) {
  const unsigned now = generation;
  if (++arrived == everyone) arrived = 0, ++generation, idle = 0;
  while (generation == now) yield();
}

inline Warp& warp() { return warps[thread.x / 32]; }
inline void warp_sync() { meet(warp().arrived, warp().generation, 32); }

inline void run() {
  body();
  done[thread.x] = 1, ++finished, idle = 0;
  swapcontext(&fibers[thread.x], &scheduler);
}

inline void run_block(dim3 at, dim3 size, const std::function<void()>& kernel) {
  const unsigned n = size.x;
  block_index = at, block_size = size, body = kernel;
  block_arrived = finished = idle = 0;
  for (Part& part : parts) part = Part{};
  warps.assign(n / 32, Warp{});
  fibers.assign(n, ucontext_t{});
  done.assign(n, 0);
  if (stacks.size() < n) stacks.resize(n, std::vector<char>(128 << 10));
  std::memset(shared, 0x5a, kShared);  // nothing may rely on what a block finds
  for (unsigned i = 0; i < n; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i].data(), fibers[i].uc_stack.ss_size = stacks[i].size(), fibers[i].uc_link = nullptr;
    makecontext(&fibers[i], run, 0);
  }
  for (unsigned round = 0; finished < n; ++round) {
    const unsigned step = 2 * (round * 7919 % 64) + 1, first = round * 31;  // odd, so a permutation of the next power of two
    unsigned span = 32;
    while (span < n) span *= 2;
    for (unsigned j = 0; j < span; ++j) {
      const unsigned i = (first + j * step) % span;
      if (i < n && !done[i]) thread.x = i, swapcontext(&scheduler, &fibers[i]);
    }
  }
}

}  // namespace emulated

#define gridDim emulated::grid_size
#define threadIdx emulated::thread
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
inline void __syncthreads() { emulated::meet(emulated::block_arrived, emulated::block_generation, emulated::block_size.x); }
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  auto& w = emulated::warp();
  w.values[emulated::thread.x % 32][0] = v;
  emulated::warp_sync();
  unsigned most = 0;
  for (auto& lane : w.values) most = lane[0] > most ? lane[0] : most;
  emulated::warp_sync();
  return most;
}
inline int shuffled(int v, int from) {
  auto& w = emulated::warp();
  w.values[emulated::thread.x % 32][0] = static_cast<uint32_t>(v);
  emulated::warp_sync();
  const uint32_t got = w.values[from % 32][0];
  emulated::warp_sync();
  return static_cast<int>(got);
}
template <class T> T __shfl_sync(unsigned, T v, int from) { return static_cast<T>(shuffled(static_cast<int>(v), from)); }
template <class T> T __shfl_down_sync(unsigned, T v, int by) {
  const int lane = emulated::thread.x % 32;
  return static_cast<T>(shuffled(static_cast<int>(v), lane + by < 32 ? lane + by : lane));
}
