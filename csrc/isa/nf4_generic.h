// NF4 codes through a table of all bytes: two codes a load.
#pragma once

#include "nf4_kernels.h"
#include "vec.h"

namespace le {
namespace {

struct PairTable {
  float codes[256][2];
  constexpr PairTable() : codes() {
    for (int i = 0; i < 256; ++i) {
      codes[i][0] = kNf4Codes[i >> 4];
      codes[i][1] = kNf4Codes[i & 15];
    }
  }
};
constexpr PairTable kPairs;

LE_INLINE F two_pairs(uint8_t first, uint8_t second) {
  const float *a = kPairs.codes[first], *b = kPairs.codes[second];
  return F{a[0], a[1], b[0], b[1]};
}

LE_INLINE void natural_codes(const uint8_t *p, F *c) {
  for (int v = 0; v < 16; ++v) c[v] = two_pairs(p[2 * v], p[2 * v + 1]);
}

struct FloatLanes {
  static constexpr int element(int v, int lane) {
    return lane < 2 ? 2 * v + lane : 30 + 2 * v + lane;
  }
  template <class Use>
  static LE_INLINE void each(const uint8_t *p, Use &&use) {
    for (int v = 0; v < 16; ++v) use(v, two_pairs(p[v], p[16 + v]));
  }
};
}  // namespace
}  // namespace le
