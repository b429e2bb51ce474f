// The codebook half of tiled.cu.
#define LUT8_CODEBOOK
#include "tiled.cu"
