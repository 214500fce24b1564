// NF4 codes on AVX-512: one permute looks up 16 float32 codes in one register. The
// permute ignores the bits above its index, so that 16 bits with four nibbles give
// four vectors by shifts alone. The same on AVX2 instructions, to test the order of
// the lanes on a CPU without AVX-512.
#pragma once

#include "nf4_kernels.h"
#include "vec.h"

namespace le {
namespace {

#ifdef __AVX512F__
LE_INLINE F permute(const float *table, U index) {
  return reinterpret_cast<F>(_mm512_maskz_permutexvar_ps(
      ~__mmask16(0), reinterpret_cast<__m512i>(index), _mm512_loadu_ps(table)));
}
LE_INLINE U permute(U values, U index) {
  return reinterpret_cast<U>(_mm512_maskz_permutexvar_epi32(
      ~__mmask16(0), reinterpret_cast<__m512i>(index), reinterpret_cast<__m512i>(values)));
}
#else
LE_INLINE F permute(const float *table, U index) {
  F r;
  for (int i = 0; i < W; ++i) r[i] = table[index[i] & 15];
  return r;
}
LE_INLINE U permute(U values, U index) {
  U r;
  for (int i = 0; i < W; ++i) r[i] = values[index[i] & 15];
  return r;
}
#endif

LE_INLINE void natural_codes(const uint8_t *p, F *c) {
  U words = {};
  std::memcpy(&words, p, kNf4ChunkBytes);
  U shift, which;
  for (uint32_t i = 0; i < 16; ++i) {
    shift[i] = 8 * (i / 2 % 4) + (i % 2 ? 0 : 4);
    which[i] = i / 8;
  }
#pragma GCC unroll 4
  for (uint32_t v = 0; v < 4; ++v)
    c[v] = permute(kNf4Codes, permute(words, which + 2 * v) >> shift);
}

// Nibble n (from the lowest) of 16 bits that hold elements 0 to 3.
constexpr int nibble_element(int n) { return n ^ 1; }

struct FloatLanes {
  static constexpr int element(int v, int lane) { return 4 * lane + nibble_element(v); }
  template <class Use>
  static LE_INLINE void each(const uint8_t *p, Use &&use) {
    HMem packed;
    std::memcpy(&packed, p, kNf4ChunkBytes);
    U words = __builtin_convertvector(packed, U);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) use(v, permute(kNf4Codes, words >> (4 * v)));
  }
};

}  // namespace
}  // namespace le
