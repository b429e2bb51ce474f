// The shapes of the many-token kernel, and which one a product gets.
#include "tiled.cuh"

namespace lut8 {

//                 tokens: 8 x, warps over rows, tokens, K; stages
using Narrow = Shape<4, 2, 1, 4, 3>;   // 64 rows x 32 tokens, K split four ways
using Middle = Shape<8, 2, 1, 4, 3>;   // 64 rows x 64 tokens, K split four ways
using Wide = Shape<8, 4, 2, 1, 4>;     // 128 rows x 128 tokens

cudaError_t tiled_codebook(const Lut8CudaWeight& w, const Tokens& t, const Output& o, int shape, bool overlap, cudaStream_t stream);

#ifndef LUT8_CODEBOOK
cudaError_t tiled(const Lut8CudaWeight& w, const Tokens& t, const Output& o, int shape, bool overlap, cudaStream_t stream) {
  if (shape == 0) shape = t.m <= 32 ? 1 : t.m <= 256 ? 2 : 3;
  if (w.group_codes) return tiled_codebook(w, t, o, shape, overlap, stream);
  if (shape == 1) return tiled_shape<Narrow, false>(w, t, o, overlap, stream);
  if (shape == 2) return tiled_shape<Middle, false>(w, t, o, overlap, stream);
  return tiled_shape<Wide, false>(w, t, o, overlap, stream);
}
#else
cudaError_t tiled_codebook(const Lut8CudaWeight& w, const Tokens& t, const Output& o, int shape, bool overlap, cudaStream_t stream) {
  if (shape == 1) return tiled_shape<Narrow, true>(w, t, o, overlap, stream);
  if (shape == 2) return tiled_shape<Middle, true>(w, t, o, overlap, stream);
  return tiled_shape<Wide, true>(w, t, o, overlap, stream);
}
#endif

}  // namespace lut8
