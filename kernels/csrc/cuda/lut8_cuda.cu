// LUT8 on the GPU: a packed 2-bit linear layer at memory speed, and exact. The C interface; read this file first.
//
// Problem.   y[m][n] = (s[m] * row_scale[n]) * float(acc - z[m] * row_sum[n]) + bias[n],   acc = sum_k q[m][k] * w[n][k]
//            with q in 0..127 and w one of four int8 levels of its (row, group), picked by a 2-bit code. acc is exact in int32, so
//            every path returns the integers of lbllm_kernels/reference.py whatever order it adds in.
//            A decode step reads each weight once: (2 + 8/32) bits a weight over the memory's bandwidth is the floor. Everything else
//            (expanding codes, quantizing the token, adding up across warps, launching) must hide behind that stream.
//
// Expansion. The four levels of a group are one 32-bit word. prmt picks four of its bytes by four 4-bit selectors: four weights in
//            one instruction, if the codes stand so that a mask makes selectors of them (layout.h):
//
//              code word   nibble 7    6    5    4    3    2    1    0        & 0x33333333         low 16 bits: channels 0 .. 3
//                          15|7 14|6 13|5 12|4 11|3 10|2  9|1  8|0             (high code | low)    high 16:     channels 4 .. 7
//                                                                            >> 2, & 0x33333333     channels 8 .. 11, 12 .. 15
//
// Fragments. mma m16n8k32 (int8): A is 16 weight rows x 32 channels, B is 32 channels x 8 tokens. Lane 4g + t holds
//
//              A registers 0, 2: row g     channels 4t .. 4t+3  and  16+4t .. 16+4t+3       B registers 0, 1: token g, same channels
//              A registers 1, 3: row g + 8                                                   C: rows g, g + 8 x tokens 2t, 2t + 1
//
//            A sum over channels does not care about their order as long as A and B agree. So four mma steps (128 channels, a "tile")
//            are dealt anew: lane t takes channels 32t .. 32t + 31 of the tile, eight a step.
//
//              channels of a tile   0       32       64       96      128
//              lane t               |   0   |   1    |   2    |   3   |      each: step 0 | step 1 | step 2 | step 3, 4 + 4 channels
//
//            Three things follow. A lane's codes are contiguous in the stored rows: 8 bytes of row g and 8 of row g + 8 make one
//            16-byte load. A group of 32 channels belongs to one lane: one level word a row, where the usual order needs four. And a
//            lane's activations are 32 contiguous bytes: q stays row-major, B fragments are plain 16-byte loads, nothing is shuffled.
//
// Paths.     quantize.cu   one block a token                       decode.cuh   up to 16 tokens, weights straight into registers
//            tiled.cuh     17 tokens and more, tokens through      hopper.cuh   hundreds of tokens, wgmma with weights as register A
//                          shared memory, mma.sync                 prefill.cu   expand to int8 and finish, around a library's product
//            decode has two forms: the block quantizes the token itself while its first weights travel (one launch a layer), or a
//            quantizer runs before it and the two overlap by programmatic dependent launch (Hopper).
//
// Latency.   At a few microseconds a layer is a chain of latencies: the kernel before ends, tokens arrive, are quantized, multiplied, added up,
//            stored. Everything that is not in this chain (weights, level table, row numbers) is asked for before the wait for the kernel
//            before. Behind the chain, a block asks the next layer's weight into the L2 if it knows it (`next`).
// Trade-offs. All of K stays in one block: no workspace, no second pass, no atomics in device memory. A layer with few rows leaves
//            multiprocessors idle; its warps have at most a k tile or two each, so that splitting K over blocks would shorten nothing
//            and add a meeting of blocks. mma.sync runs on every GPU since 2020, below wgmma's rate on Hopper.
//            The derived layout is a second copy of the codes unless the stored one is dropped.
//
// Interface. C, no torch: pointers, sizes, the stream. Each call sets the device, launches, and returns a cudaError_t; nothing is
//            allocated and nothing waits, so calls may be captured into a graph. Shapes and types are checked in lbllm_kernels/cuda.py.
#include <algorithm>

#include "decode.cuh"

namespace lut8 {
namespace {

// Row tiles a block and warps a block: the least work for the busiest multiprocessor; among equals one wave of two blocks each, then two
// row tiles, which halve the reading of activations.
Plan choose(const Lut8CudaWeight& w, int m, Plan plan, int multiprocessors) {
  if (plan.early) {
    plan.row_tiles = 1;
    if (plan.warps < 1) plan.warps = std::max({4, (w.k_tiles + kHeld - 1) / kHeld, (m + 1) / 2});
    return plan;
  }
  if (plan.row_tiles < 1 || plan.row_tiles > 4) {
    int best = 1 << 30;
    for (const int rows : {2, 1, 3, 4}) {
      if (rows == 4 && m > 8) continue;
      const int blocks = (w.row_tiles + rows - 1) / rows;
      const int cost = (blocks + multiprocessors - 1) / multiprocessors * rows * 4 + (blocks > 2 * multiprocessors);
      if (cost < best) best = cost, plan.row_tiles = rows;
    }
  }
  if (plan.warps < 1 || plan.warps > kMaxWarps) {
    plan.warps = (w.row_tiles + plan.row_tiles - 1) / plan.row_tiles > multiprocessors ? 8 : 16;
    plan.warps = std::min(plan.warps, std::max(4, w.k_tiles));
  }
  if (plan.prefetch < 0) plan.prefetch = kPrefetch;
  return plan;
}

Tokens raw_tokens(const void* x, int x_type, int m, int top, const float* factors) {
  return {x, x_type, m, {top, factors[0], factors[1], factors[2], factors[3]}, nullptr, nullptr, nullptr};
}

}  // namespace

cudaError_t decode(const Lut8CudaWeight& w, const Tokens& t, const Output& o, Plan plan, cudaStream_t stream) {
  plan = choose(w, t.m, plan, device_of(w.device).multiprocessors);
  return w.words ? decode_explicit(w, t, o, plan, stream) : decode_codebook(w, t, o, plan, stream);
}

}  // namespace lut8

using namespace lut8;

// Paths of a product. Fused exists for lut8_cuda_linear alone; the Hopper ones read tokens in wgmma order; sliced is decode behind a quantizer
// of small blocks, early too, with a kernel for small layers.
enum Path : int { kAuto = 0, kFusedDecode = 1, kDecode = 2, kNarrow = 3, kMiddle = 4, kWide = 5, kHopper = 6, kHopper128 = 7, kHopper256 = 8, kHopperSplit = 9, kSliced = 10, kEarly = 11 };
// Flags: the product may overlap the quantizer before it; the first kernel may overlap whatever was launched before it.
// A quantizer alone: in which order it writes, and whether with small blocks.
enum Flag : int { kOverlapPair = 1, kOverlapPrevious = 2, kWgmmaOrder = 4, kSmallBlocks = 8 };

static bool is_hopper(int path) { return path >= kHopper && path <= kHopperSplit; }

static cudaError_t product(const Lut8CudaWeight& w, const Tokens& t, const Output& o, int path, int rows, int warps, int prefetch, bool overlap,
                           cudaStream_t stream) {
  if (path == kDecode || path == kSliced || path == kEarly || (path == kAuto && t.m <= 16))
    return t.m <= 16 ? decode(w, t, o, {rows, warps, prefetch, overlap, path == kEarly}, stream) : cudaErrorInvalidValue;
  if (is_hopper(path)) return hopper(w, t, o, static_cast<HopperCut>(path - kHopper), overlap, stream);
  if (path < kAuto || path > kWide || path == kFusedDecode) return cudaErrorInvalidValue;
  return tiled(w, t, o, path == kAuto ? 0 : path - kNarrow + 1, overlap, stream);
}

extern "C" {

const char* lut8_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// 0 when the device can run this object's code.
int lut8_cuda_covers(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess ? covered() : error;
}

// x (m, in) -> q (m, padded), scale (m), zero (m).
int lut8_cuda_quantize(int device, const void* x, int x_type, int m, int in, int padded, int top, const float* factors, void* q, void* scale, void* zero,
                       int flags, void* stream) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  return quantize(raw_tokens(x, x_type, m, top, factors), in, padded, static_cast<int8_t*>(q), static_cast<float*>(scale), static_cast<int32_t*>(zero),
                  flags & kSmallBlocks, flags & kWgmmaOrder, flags & kOverlapPrevious, static_cast<cudaStream_t>(stream));
}

// Quantized tokens -> y (m, out), or the raw sums when acc is given.
int lut8_cuda_product(const Lut8CudaWeight* w, const void* q, const void* scale, const void* zero, int m, void* y, int y_type, void* acc, int path, int rows,
                      int warps, int prefetch, int flags, void* stream) {
  if (const cudaError_t error = cudaSetDevice(w->device)) return error;
  Tokens t{};
  t.m = m, t.q = static_cast<const int8_t*>(q), t.scale = static_cast<const float*>(scale), t.zero = static_cast<const int32_t*>(zero);
  return product(*w, t, {y, y_type, static_cast<int32_t*>(acc)}, path, rows, warps, prefetch, flags & kOverlapPrevious, static_cast<cudaStream_t>(stream));
}

// x (m, in) -> y (m, out): one launch (fused) or two. q, scale and zero are workspace, unused by the fused path.
int lut8_cuda_linear(const Lut8CudaWeight* w, const void* x, int x_type, int m, int top, const float* factors, void* q, void* scale, void* zero, void* y,
                     int y_type, int path, int rows, int warps, int prefetch, int flags, void* stream) {
  if (const cudaError_t error = cudaSetDevice(w->device)) return error;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  Tokens t = raw_tokens(x, x_type, m, top, factors);
  const Output o{y, y_type, nullptr};
  if (path == kFusedDecode) return m <= 8 ? decode(*w, t, o, {rows, warps, prefetch, flags & kOverlapPrevious, false}, on) : cudaErrorInvalidValue;
  const cudaError_t error = quantize(t, w->in, w->k_tiles * kTileK, static_cast<int8_t*>(q), static_cast<float*>(scale), static_cast<int32_t*>(zero),
                                     path == kSliced || path == kEarly, is_hopper(path), flags & kOverlapPrevious, on);
  if (error != cudaSuccess) return error;
  t.x = nullptr, t.q = static_cast<int8_t*>(q), t.scale = static_cast<float*>(scale), t.zero = static_cast<int32_t*>(zero);
  return product(*w, t, o, path, rows, warps, prefetch, flags & kOverlapPair, on);
}

// int8 weights (row_tiles * 16, k_tiles * 128), row-major: rows and channels beyond the layer's hold anything but meet q = 0 or no row.
int lut8_cuda_dequantize(const Lut8CudaWeight* w, void* weight, void* stream) {
  if (const cudaError_t error = cudaSetDevice(w->device)) return error;
  return dequantize(*w, static_cast<int8_t*>(weight), static_cast<cudaStream_t>(stream));
}

// Sums of a library's product, rows of `stride` -> y (m, out).
int lut8_cuda_finish(const Lut8CudaWeight* w, const void* acc, int64_t stride, const void* scale, const void* zero, int m, void* y, int y_type, void* stream) {
  if (const cudaError_t error = cudaSetDevice(w->device)) return error;
  Tokens t{};
  t.m = m, t.scale = static_cast<const float*>(scale), t.zero = static_cast<const int32_t*>(zero);
  return finish(*w, t, static_cast<const int32_t*>(acc), stride, {y, y_type, nullptr}, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
