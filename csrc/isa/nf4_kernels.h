// The NF4 inner loops that each instruction set fills in.
//
// All work on chunks: 64 weights, 32 bytes, counted from the start of the flat
// tensor, so that a chunk never straddles blocks of 64 and more. With `halves`
// (blocks of 32) a chunk has two scales, else one.
#pragma once

#include <cstdint>

#include "../common.h"

namespace le {

constexpr int64_t kNf4Chunk = 64;
constexpr int64_t kNf4ChunkBytes = 32;
constexpr int64_t kNf4TileRows = 4;  // rows of weights that `dots` takes at a time

// The 16 codes (QLoRA: Dettmers et al. 2023, appendix E), as bitsandbytes has them,
// and the midpoints between neighbours.
constexpr float kNf4Codes[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
constexpr float nf4_midpoint(int below) { return (kNf4Codes[below] + kNf4Codes[below + 1]) / 2; }

struct Nf4Scales {
  const float *values;  // one a chunk, or two
  bool halves;
};

// How a product is computed: what its operands are rounded to, and in which order
// they lie in the registers.
struct Nf4Compute {
  int32_t dtype;       // of x rows and decoded tiles in `dots`: LE_FLOAT32 or LE_BFLOAT16
  int64_t lane_bytes;  // of a chunk of x in `to_lanes`' order
  // One row of x, `chunks` of it, in the order in which row_dots wants it. Its
  // values are already rounded.
  void (*to_lanes)(const float *x, int64_t chunks, void *lanes);
  // Adds to m (1 to 4) vectors of acc (or sets them, with `first`) the sums over
  // chunks of scale * (codes of one row of weights * a row of x).
  void (*row_dots)(int64_t m, const void *const *lanes, const uint8_t *packed, int64_t chunks,
                   Nf4Scales scales, float *acc, bool first);
  // dst = code * scale for whole chunks, in the order of the tensor.
  void (*decode)(const uint8_t *packed, int64_t chunks, Nf4Scales scales, void *dst);
  // Adds to acc [m, kNf4TileRows] vectors (or sets them, with `first`) the products
  // of m rows of x with a tile of decoded rows, k elements.
  void (*dots)(int64_t m, const void *const *x, const void *const *tile, int64_t k, float *acc,
               bool first);
};

struct Nf4Kernels {
  Nf4Compute compute[2];  // [LE_FLOAT32, LE_BFLOAT16]
  void (*decode)(const uint8_t *packed, int64_t chunks, Nf4Scales scales, void *dst);  // float32
  int64_t lanes;  // floats in a vector of acc
  // y[i] = the sum of vector i of acc.
  void (*sums)(int64_t count, const float *acc, float *y);
  // Codes 0..15 of x[i] / absmax: the upper one iff above the midpoint.
  void (*encode)(const float *x, int64_t n, float absmax, uint8_t *codes);
  // The largest magnitude; NaN where a value is not finite.
  float (*absmax)(const float *x, int64_t n);
};

}  // namespace le
