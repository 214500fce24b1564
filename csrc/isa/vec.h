// A vector of W floats as a GCC/Clang vector type, for one instruction set.
// The including file defines LE_W (lanes) and LE_FMA(a, b, c). Everything here
// is in an unnamed namespace: the same function compiled for two instruction
// sets must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace le {
namespace {

constexpr int W = LE_W;
using F = float __attribute__((vector_size(4 * LE_W)));
using U = uint32_t __attribute__((vector_size(4 * LE_W)));
using H = uint16_t __attribute__((vector_size(2 * LE_W)));
// The same, at any address.
using FMem = float __attribute__((vector_size(4 * LE_W), aligned(4), may_alias));
using HMem = uint16_t __attribute__((vector_size(2 * LE_W), aligned(2), may_alias));

#define LE_INLINE inline __attribute__((always_inline))

LE_INLINE F set1(float a) { return F{} + a; }
LE_INLINE U set1u(uint32_t a) { return U{} + a; }
LE_INLINE F fma(F a, F b, F c) { return LE_FMA(a, b, c); }

LE_INLINE F load(const float *p) { return *reinterpret_cast<const FMem *>(p); }
LE_INLINE F load(const Bf16 *p) {
  H half = *reinterpret_cast<const HMem *>(p);
  return reinterpret_cast<F>(__builtin_convertvector(half, U) << 16);
}
LE_INLINE void store(float *p, F v) { *reinterpret_cast<FMem *>(p) = v; }
LE_INLINE void store_bits(Bf16 *p, U v) {
  *reinterpret_cast<HMem *>(p) = __builtin_convertvector(v >> 16, H);
}

// Round to nearest, ties to even; NaN stays NaN.
LE_INLINE void store(Bf16 *p, F v) {
  U bits = reinterpret_cast<U>(v);
  U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  U is_nan = reinterpret_cast<U>((bits & 0x7fffffffu) > 0x7f800000u);
  store_bits(p, (is_nan & (bits | 0x400000u)) | (~is_nan & rounded));
}

// Counter generator: a bijective mix of the element's index, keyed by 64 bits.
// reference.py holds the same formula.
LE_INLINE U hash(U element, uint32_t key_lo, uint32_t key_hi) {
  U z = element ^ key_lo;
  z = (z ^ (z >> 16)) * 0x7feb352du ^ key_hi;
  z = (z ^ (z >> 15)) * 0x846ca68bu;
  return z ^ (z >> 16);
}

LE_INLINE U iota() {
  U v;
  for (int i = 0; i < W; ++i) v[i] = static_cast<uint32_t>(i);
  return v;
}

LE_INLINE void store_stochastic(float *p, F v, uint32_t, const Update &) { store(p, v); }
LE_INLINE void store_stochastic(Bf16 *p, F v, uint32_t element, const Update &u) {
  U bits = reinterpret_cast<U>(v);
  U finite = reinterpret_cast<U>((bits & 0x7f800000u) != 0x7f800000u);
  U random = hash(set1u(element) + iota(), u.key_lo, u.key_hi) >> 16;
  store_bits(p, bits + (random & finite));
}

// The first n < W lanes, zeros behind them.
template <class T>
LE_INLINE F load_part(const T *p, int64_t n) {
  T part[W] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}
template <class T>
LE_INLINE void copy_part(T *p, const T *part, int64_t n) {
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

// Lanes added in a fixed tree.
LE_INLINE float sum(F v) {
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

}  // namespace
}  // namespace le
