// LUT8 on the GPU: the derived layout, as pure index functions. The kernels, lbllm_kernels/cuda_layout.py and the tests share them.
//
// A tile is 16 rows x 128 channels. Lane 4g + t of a warp owns rows g and g + 8 and channels 32t .. 32t + 31 of the tile.
//   codes   [row tile][k tile][lane]{4 words}   words 0, 1: row g, channels 0..15 and 16..31 of the lane; words 2, 3: row g + 8
//   levels  [row tile][k tile][g][group in tile][row g, row g + 8]    i32 words, or u8 indices into the codebook
// Inside a word, channel c (0..15) lies at bits 4(c % 8) + 2(c / 8): the low halves of the nibbles are channels 0..7, the high halves
// 8..15, so  word & 0x33333333  and  word >> 2 & 0x33333333  are prmt selectors, four channels in each 16 bits.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LUT8_FN __host__ __device__ __forceinline__
#else
#define LUT8_FN inline
#endif

namespace lut8 {

constexpr int kTileRows = 16;
constexpr int kTileK = 128;
constexpr int kLaneK = 32;                // channels of a lane in a tile
constexpr int kRowPad = 128;              // row_scale, row_sum and bias are padded with zeros to this many rows
constexpr uint32_t kSelector = 0x33333333u;

LUT8_FN int lane_row(int lane, int half) { return lane / 4 + 8 * half; }
LUT8_FN int lane_channel(int lane) { return kLaneK * (lane % 4); }
LUT8_FN int code_shift(int channel) { return 4 * (channel % 8) + 2 * (channel / 8); }

// 32-bit indices: lbllm_kernels/cuda.py refuses a layer whose index would leave them.
LUT8_FN int tile_index(int row_tile, int k_tile, int k_tiles) { return row_tile * k_tiles + k_tile; }

// First of the four code words of a lane.
LUT8_FN int64_t code_index(int tile, int lane) { return (static_cast<int64_t>(tile) * 32 + lane) * 4; }

// First of the entries (row g, row g + 8) of a lane's group; with groups of 16 channels two such pairs follow each other.
LUT8_FN int level_offset(int lane, int groups_per_tile) { return (lane / 4 * groups_per_tile + lane % 4 * groups_per_tile / 4) * 2; }
LUT8_FN int level_index(int tile, int lane, int groups_per_tile) { return tile * (16 * groups_per_tile) + level_offset(lane, groups_per_tile); }

// The prmt selector of four channels: quad 0..3 of a word are its channels 4 quad .. 4 quad + 3.
LUT8_FN uint32_t selector(uint32_t word, int quad) { return (word >> (quad / 2 * 2) & kSelector) >> (quad % 2 * 16); }

// The activations of a tile in shared memory: rows of 128 bytes, 16-byte chunks swizzled so that eight lanes meet eight bank groups.
LUT8_FN int chunk_offset(int token, int chunk) { return token * kTileK + ((chunk ^ (token & 1)) * 16); }

// wgmma reads 32 channels a step in its own order. For its sake tokens are written so: word (four channels) 8t + 2s + h of each 128
// channels goes to place 8s + 4h + t, where step s and register pair h of lane t look for it.
LUT8_FN int wgmma_word(int word) { return word % 8 / 2 * 8 + word % 2 * 4 + word / 8; }
LUT8_FN int wgmma_place(int channel) { return channel / kTileK * kTileK + wgmma_word(channel % kTileK / 4) * 4 + channel % 4; }

}  // namespace lut8
