// A vector of W floats as a GCC/Clang vector type, for one instruction set.
// The including file defines LE_W (lanes), LE_FMA(a, b, c) and the same of float64,
// LE_FMA_WIDE, and where the
// instruction set has them the conversions LE_WIDEN_FLOAT16(H) -> F,
// LE_ROUND_FLOAT16(F) -> H and LE_ROUND_BFLOAT16(F) -> H. Everything here
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
using S = int32_t __attribute__((vector_size(4 * LE_W)));
using H = uint16_t __attribute__((vector_size(2 * LE_W)));
// The same, at any address. A typedef: clang drops the alignment of such an alias (`using`).
typedef float FMem __attribute__((vector_size(4 * LE_W), aligned(4), may_alias));
typedef uint16_t HMem __attribute__((vector_size(2 * LE_W), aligned(2), may_alias));
static_assert(alignof(FMem) == 4 && alignof(HMem) == 2, "loads and stores at any address");

#define LE_INLINE inline __attribute__((always_inline))

LE_INLINE F set1(float a) { return a - F{}; }  // + would make 0 of -0, by one more addition
LE_INLINE U set1u(uint32_t a) { return U{} + a; }
LE_INLINE F fma(F a, F b, F c) { return LE_FMA(a, b, c); }
LE_INLINE U select(S mask, U a, U b) {
  U m = reinterpret_cast<U>(mask);
  return (m & a) | (~m & b);
}
LE_INLINE S clamp(S v, int32_t low, int32_t high) {
  S l = S{} + low, h = S{} + high, at_least = v > l, at_most = v < h;
  v = (at_least & v) | (~at_least & l);
  return (at_most & v) | (~at_most & h);
}

LE_INLINE F load(const float *p) { return *reinterpret_cast<const FMem *>(p); }
LE_INLINE F load(const Bf16 *p) {
  H half = *reinterpret_cast<const HMem *>(p);
  return reinterpret_cast<F>(__builtin_convertvector(half, U) << 16);
}
LE_INLINE void store(float *p, F v) { *reinterpret_cast<FMem *>(p) = v; }
LE_INLINE void store_bits(Bf16 *p, U v) {
  *reinterpret_cast<HMem *>(p) = __builtin_convertvector(v >> 16, H);
}

// Round to nearest, ties to even; NaN stays NaN. LE_ROUND_BFLOAT16 may flush what
// would be subnormal to zero, as the processors' own conversion does.
LE_INLINE void store(Bf16 *p, F v) {
#ifdef LE_ROUND_BFLOAT16
  *reinterpret_cast<HMem *>(p) = LE_ROUND_BFLOAT16(v);
#else
  U bits = reinterpret_cast<U>(v);
  U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  U is_nan = reinterpret_cast<U>((bits & 0x7fffffffu) > 0x7f800000u);
  store_bits(p, (is_nan & (bits | 0x400000u)) | (~is_nan & rounded));
#endif
}

// ---- float16: NaN comes out quiet, its sign and payload kept ----------------

LE_INLINE F load(const Fp16 *p) {
  H half = *reinterpret_cast<const HMem *>(p);
#ifdef LE_WIDEN_FLOAT16
  return LE_WIDEN_FLOAT16(half);
#else
  constexpr uint32_t kRebias = 112u << 23, kLeastNormal = 113u << 23;
  U bits = __builtin_convertvector(half, U);
  U size = (bits & 0x7fffu) << 13;
  S ordered = reinterpret_cast<S>(size);
  U infinite = reinterpret_cast<U>(ordered >= (0x7c00 << 13));
  U nan = reinterpret_cast<U>(ordered > (0x7c00 << 13));
  U normal = size + kRebias + (infinite & kRebias) + (nan & 0x400000u & ~size);
  // A subnormal's bits as those of a number beside 2^-14, less 2^-14.
  F tiny = reinterpret_cast<F>(size + kLeastNormal) - reinterpret_cast<F>(set1u(kLeastNormal));
  U wide = select(ordered < (1 << 23), reinterpret_cast<U>(tiny), normal);
  return reinterpret_cast<F>(wide | ((bits & 0x8000u) << 16));
#endif
}

// Inf and NaN of float32, as float16 without the sign.
LE_INLINE U infinite_half(U size) {
  U nan = reinterpret_cast<U>(reinterpret_cast<S>(size) > 0x7f800000);
  return 0x7c00u | (nan & (0x200u | ((size >> 13) & 0x3ffu)));
}
LE_INLINE void store_half(Fp16 *p, U half) {
  *reinterpret_cast<HMem *>(p) = __builtin_convertvector(half, H);
}

// Round to nearest, ties to even; beyond the range to Inf.
LE_INLINE void store(Fp16 *p, F v) {
#ifdef LE_ROUND_FLOAT16
  *reinterpret_cast<HMem *>(p) = LE_ROUND_FLOAT16(v);
#else
  U bits = reinterpret_cast<U>(v), size = bits & 0x7fffffffu;
  S ordered = reinterpret_cast<S>(size);
  U normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // Beside 1/2, float32's last place is float16's least number: the sum rounds.
  U tiny = reinterpret_cast<U>(reinterpret_cast<F>(size) + set1(0.5f)) - (126u << 23);
  U half = select(ordered < (113 << 23), tiny, normal);
  half = select(ordered >= (143 << 23), set1u(0x7c00u), half);
  half = select(ordered >= (255 << 23), infinite_half(size), half);
  store_half(p, half | ((bits >> 16) & 0x8000u));
#endif
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

// As round_float16_stochastic of reference.py: 13 bits are cut off, more of
// float16's subnormals, after random ones of as many were added.
LE_INLINE void store_stochastic(Fp16 *p, F v, uint32_t element, const Update &u) {
  U bits = reinterpret_cast<U>(v), size = bits & 0x7fffffffu;
  S exponent = reinterpret_cast<S>(size >> 23);
  U cut = reinterpret_cast<U>(clamp(126 - exponent, 13, 31));
  U below = reinterpret_cast<U>(clamp(95 - exponent, 0, 31));
  U tiny = ((size & 0x7fffffu) | 0x800000u) >> below;
  U kept = select(exponent < 113, tiny, size - (112u << 23));
  U random = hash(set1u(element) + iota(), u.key_lo, u.key_hi) >> (32u - cut);
  S half = clamp(reinterpret_cast<S>((kept + random) >> cut), 0, 0x7bff);
  U out = select(exponent == 255, infinite_half(size), reinterpret_cast<U>(half));
  store_half(p, out | ((bits >> 16) & 0x8000u));
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

// c0 v[2i] + c1 v[2i + 1] over two vectors v that lie one behind the other: split within parts of
// four lanes, which takes a cycle, and put in order once, behind the sums.
LE_INLINE F fma_pairs(F c0, F c1, F low, F high) {
  constexpr int P = W / 4;
  S even, order;
  for (int i = 0; i < W; ++i) {
    int pair = i / 2, part = pair < P ? 2 * pair : 2 * (pair - P) + 1;
    even[i] = i / 4 * 4 + i % 2 * 2 + i % 4 / 2 * W;
    order[i] = 2 * part + i % 2;
  }
  S odd = even + 1;
#ifdef __clang__
  F e, o, sum, ordered;
  for (int i = 0; i < W; ++i) {
    e[i] = even[i] < W ? low[even[i]] : high[even[i] - W];
    o[i] = odd[i] < W ? low[odd[i]] : high[odd[i] - W];
  }
  sum = fma(c1, o, fma(c0, e, F{}));
  for (int i = 0; i < W; ++i) ordered[i] = sum[order[i]];
  return ordered;
#else
  F e = __builtin_shuffle(low, high, even), o = __builtin_shuffle(low, high, odd);
  return __builtin_shuffle(fma(c1, o, fma(c0, e, F{})), order);
#endif
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
