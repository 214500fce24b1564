// The NF4 loops, written once over two primitives of each instruction set:
//   natural_codes(p, c)     the 64 codes of a chunk, in order
//   FloatLanes, BfloatLanes the same in whatever order decodes fastest:
//     ::element(v, lane)    which element lane `lane` of vector v holds; lanes of the
//                           first half of a vector hold elements of the chunk's first half
//     ::each(p, use)        use(v, codes of vector v)
#pragma once

#include <type_traits>

#include "nf4_kernels.h"
#include "vec.h"

namespace le {
namespace {

constexpr int kVectors = static_cast<int>(kNf4Chunk) / W;

// `first` in the lower half of the lanes.
LE_INLINE F half_scales(float first, float second) {
  return iota() < static_cast<uint32_t>(W / 2) ? set1(first) : set1(second);
}

// ---- few rows of x: codes stay in registers ----------------------------------

template <class Lanes>
void to_lanes(const float *x, int64_t chunks, void *to) {
  float *lanes = static_cast<float *>(to);
  for (int64_t c = 0; c < chunks; ++c)
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < W; ++i)
        lanes[c * kNf4Chunk + v * W + i] = x[c * kNf4Chunk + Lanes::element(v, i)];
}

// With few rows two partial sums a chunk hide the FMA's latency.
template <class Lanes, int M, bool HALVES>
LE_INLINE void row_dots_of(const float *const *x, const uint8_t *packed, int64_t chunks,
                           const float *scales, float *to, bool first) {
  constexpr int kParts = M <= 2 ? 2 : 1;
  F total[M] = {};
  if (!first)
    for (int i = 0; i < M; ++i) total[i] = load(to + i * W);
  for (int64_t c = 0; c < chunks; ++c) {
    F acc[M][kParts] = {};
    Lanes::each(packed + c * kNf4ChunkBytes, [&](int v, F code) {
      for (int i = 0; i < M; ++i) {
        F &to = acc[i][v % kParts];
        to = fma(code, load(x[i] + c * kNf4Chunk + v * W), to);
      }
    });
    F scale = HALVES ? half_scales(scales[2 * c], scales[2 * c + 1]) : set1(scales[c]);
    for (int i = 0; i < M; ++i)
      total[i] = fma(kParts == 2 ? acc[i][0] + acc[i][kParts - 1] : acc[i][0], scale, total[i]);
  }
  for (int i = 0; i < M; ++i) store(to + i * W, total[i]);
}

template <class Lanes, bool HALVES>
LE_INLINE void row_dots_by_m(int64_t m, const float *const *x, const uint8_t *packed,
                             int64_t chunks, const float *scales, float *acc, bool first) {
  if (m == 1) row_dots_of<Lanes, 1, HALVES>(x, packed, chunks, scales, acc, first);
  if (m == 2) row_dots_of<Lanes, 2, HALVES>(x, packed, chunks, scales, acc, first);
  if (m == 3) row_dots_of<Lanes, 3, HALVES>(x, packed, chunks, scales, acc, first);
  if (m == 4) row_dots_of<Lanes, 4, HALVES>(x, packed, chunks, scales, acc, first);
}

template <class Lanes>
void row_dots(int64_t m, const void *const *lanes, const uint8_t *packed, int64_t chunks,
              Nf4Scales scales, float *acc, bool first) {
  const float *const *x = reinterpret_cast<const float *const *>(lanes);
  if (scales.halves)
    row_dots_by_m<Lanes, true>(m, x, packed, chunks, scales.values, acc, first);
  else
    row_dots_by_m<Lanes, false>(m, x, packed, chunks, scales.values, acc, first);
}

// ---- decoding a tile, and its products with many rows -----------------------

void decode(const uint8_t *packed, int64_t chunks, Nf4Scales scales, void *to) {
  float *dst = static_cast<float *>(to);
  for (int64_t c = 0; c < chunks; ++c, packed += kNf4ChunkBytes, dst += kNf4Chunk) {
    F code[kVectors];
    natural_codes(packed, code);
    const float *s = scales.values + (scales.halves ? 2 * c : c);
    F first = set1(s[0]), second = set1(s[scales.halves ? 1 : 0]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      store(dst + v * W, code[v] * (v < kVectors / 2 ? first : second));
  }
}

// Cuts m rows into tiles of 3 and 2, of 1 only where there is one row.
template <class Run>
LE_INLINE void in_tiles(int64_t m, Run &&run) {
  int64_t i = 0;
  for (; m - i >= 3 && m - i != 4; i += 3) run(std::integral_constant<int, 3>(), i);
  for (; m - i >= 2; i += 2) run(std::integral_constant<int, 2>(), i);
  if (i < m) run(std::integral_constant<int, 1>(), i);
}

template <int MT>
LE_INLINE void dots_tile(const float *const *x, const float *const *w, int64_t k, float *to,
                         bool first) {
  constexpr int N = static_cast<int>(kNf4TileRows);
  F acc[MT][N] = {};
  if (!first)
    for (int i = 0; i < MT; ++i)
      for (int j = 0; j < N; ++j) acc[i][j] = load(to + (i * N + j) * W);
  int64_t p = 0;
  for (; p + W <= k; p += W) {
    F wv[N];
    for (int j = 0; j < N; ++j) wv[j] = load(w[j] + p);
    for (int i = 0; i < MT; ++i) {
      F xv = load(x[i] + p);
      for (int j = 0; j < N; ++j) acc[i][j] = fma(xv, wv[j], acc[i][j]);
    }
  }
  if (p < k)
    for (int i = 0; i < MT; ++i)
      for (int j = 0; j < N; ++j)
        acc[i][j] = fma(load_part(x[i] + p, k - p), load_part(w[j] + p, k - p), acc[i][j]);
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < N; ++j) store(to + (i * N + j) * W, acc[i][j]);
}

void dots(int64_t m, const void *const *x_rows, const void *const *tile, int64_t k, float *acc,
          bool first) {
  const float *const *x = reinterpret_cast<const float *const *>(x_rows);
  const float *const *w = reinterpret_cast<const float *const *>(tile);
  in_tiles(m, [&](auto count, int64_t i) {
    dots_tile<count>(x + i, w, k, acc + i * kNf4TileRows * W, first);
  });
}

void sums(int64_t count, const float *acc, float *y) {
  for (int64_t i = 0; i < count; ++i) y[i] = sum(load(acc + i * W));
}

// ---- encoding ---------------------------------------------------------------

using Codes = uint8_t __attribute__((vector_size(W)));

// Of x / absmax: how many midpoints lie below it.
LE_INLINE Codes codes_of(F x, F absmax) {
  F value = x / absmax;
  U code = {};
#pragma GCC unroll 15
  for (int j = 0; j < 15; ++j) code -= reinterpret_cast<U>(value > set1(nf4_midpoint(j)));
  return __builtin_convertvector(code, Codes);
}

void encode(const float *x, int64_t n, float absmax, uint8_t *to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Codes codes = codes_of(load(x + i), set1(absmax));
    std::memcpy(to + i, &codes, W);
  }
  if (i < n) {
    Codes codes = codes_of(load_part(x + i, n - i), set1(absmax));
    std::memcpy(to + i, &codes, static_cast<size_t>(n - i));
  }
}

float absmax(const float *x, int64_t n) {
  F largest = {}, not_finite = {};
  auto see = [&](F v) {
    F magnitude = reinterpret_cast<F>(reinterpret_cast<U>(v) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
    not_finite += v * 0.0f;  // NaN from NaN and from infinity
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) see(load(x + i));
  if (i < n) see(load_part(x + i, n - i));
  float result = sum(not_finite);
  for (int e = 0; e < W; ++e) result = largest[e] > result ? largest[e] : result;
  return result;
}

template <class Lanes>
constexpr Nf4Compute float_compute() {
  return {LE_FLOAT32, kNf4Chunk * 4, to_lanes<Lanes>, row_dots<Lanes>, decode, dots};
}

constexpr Nf4Kernels nf4_kernels(Nf4Compute bfloat) {
  return {{float_compute<FloatLanes>(), bfloat}, decode, W, sums, encode, absmax};
}

}  // namespace
}  // namespace le
