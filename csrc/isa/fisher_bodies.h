// The inner loops of Fisher information: sums of squares. Included by bodies.h.
#pragma once

#include "vec.h"

namespace le {
namespace {

template <class TF, class TG>
void accumulate_squares(int64_t n, float gamma, float scale, const void *from, void *to) {
  const TG *g = static_cast<const TG *>(from);
  TF *f = static_cast<TF *>(to);
  const F keep = set1(gamma), weight = set1(scale);
  auto next = [&](F before, F v) { return fma(weight * v, v, keep * before); };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      int64_t at = i + part * W;
      store(f + at, next(load(f + at), load(g + at)));
    }
  }
  for (; i + W <= n; i += W) store(f + i, next(load(f + i), load(g + i)));
  if (i < n) {
    TF part[W];
    store(part, next(load_part(f + i, n - i), load_part(g + i, n - i)));
    copy_part(f + i, part, n - i);
  }
}

// ---- project: dot products of a tile's rows with RT ranks ---------------------
//
// A block of columns at a time, so that its part of the ranks stays in the L1
// while all rows of the tile pass by. Each dot product has one accumulator a
// block, whatever the tiling.

constexpr int64_t kProjectColumns = 1024;

template <int MT, int RT>
LE_INLINE void project_block(const float *const *x, const float *const *a, int64_t at, int64_t n,
                             F (*total)[RT]) {
  F acc[MT][RT] = {};
  auto add = [&](auto &&read) {
    F av[RT];
    for (int j = 0; j < RT; ++j) av[j] = read(a[j] + at);
#pragma GCC unroll 6
    for (int i = 0; i < MT; ++i) {
      F xv = read(x[i] + at);
      for (int j = 0; j < RT; ++j) acc[i][j] = fma(xv, av[j], acc[i][j]);
    }
  };
  for (; n >= W; n -= W, at += W) add([](const float *p) { return load(p); });
  if (n > 0) add([n](const float *p) { return load_part(p, n); });
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < RT; ++j) total[i][j] = total[i][j] + acc[i][j];
}

template <int RT>
LE_INLINE void project_ranks(int64_t m, const float *const *x, const float *const *a, int64_t k,
                             float *h, int64_t ldh) {
  F total[kProjectRows][RT] = {};
  for (int64_t at = 0; at < k; at += kProjectColumns) {
    int64_t n = k - at < kProjectColumns ? k - at : kProjectColumns, i = 0;
    for (; i + 6 <= m; i += 6) project_block<6, RT>(x + i, a, at, n, total + i);
    for (; i + 4 <= m; i += 4) project_block<4, RT>(x + i, a, at, n, total + i);
    for (; i < m; ++i) project_block<1, RT>(x + i, a, at, n, total + i);
  }
  for (int64_t i = 0; i < m; ++i)
    for (int j = 0; j < RT; ++j) h[j * ldh + i] = sum(total[i][j]);
}

void project(int64_t m, const float *const *x, int64_t r, const float *a, int64_t k, float *h) {
  int64_t j = 0;
  for (; j + 2 <= r; j += 2) {
    const float *pair[2] = {a + j * k, a + (j + 1) * k};
    project_ranks<2>(m, x, pair, k, h + j * m, m);
  }
  if (j < r) {
    const float *last = a + j * k;
    project_ranks<1>(m, x, &last, k, h + j * m, m);
  }
}

// ---- expand_squares -------------------------------------------------------------

// NV vectors of columns of MT rows of y.
template <int MT, int NV>
LE_INLINE void squares_tile(int64_t terms, const float *c, int64_t ldc, const float *const *b,
                            int64_t at, float *const *y, int accumulate) {
  F acc[MT][NV] = {};
  for (int64_t t = 0; t < terms; ++t) {
    F cv[MT];
    for (int i = 0; i < MT; ++i) cv[i] = set1(c[i * ldc + t]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      F bv = load(b[t] + at + v * W);
      F square = bv * bv;
      for (int i = 0; i < MT; ++i) acc[i][v] = fma(cv[i], square, acc[i][v]);
    }
  }
  for (int i = 0; i < MT; ++i) {
    for (int v = 0; v < NV; ++v) {
      float *p = y[i] + at + v * W;
      store(p, accumulate ? load(p) + acc[i][v] : acc[i][v]);
    }
  }
}

LE_INLINE void squares_part(int64_t terms, const float *c, const float *const *b, int64_t at,
                            int64_t left, float *y, int accumulate) {
  F acc = {};
  for (int64_t t = 0; t < terms; ++t) {
    F bv = load_part(b[t] + at, left);
    acc = fma(set1(c[t]), bv * bv, acc);
  }
  if (accumulate) acc = load_part(y + at, left) + acc;
  float part[W];
  store(part, acc);
  copy_part(y + at, part, left);
}

template <int MT, int NV>
LE_INLINE void squares_rows(int64_t terms, const float *c, int64_t ldc, const float *const *b,
                            int64_t n, float *const *y, int accumulate) {
  int64_t at = 0;
  for (; at + NV * W <= n; at += NV * W) squares_tile<MT, NV>(terms, c, ldc, b, at, y, accumulate);
  for (; at + W <= n; at += W) squares_tile<MT, 1>(terms, c, ldc, b, at, y, accumulate);
  if (at < n)
    for (int i = 0; i < MT; ++i) squares_part(terms, c + i * ldc, b, at, n - at, y[i], accumulate);
}

void expand_squares(int64_t m, int64_t terms, const float *c, int64_t ldc, const void *const *rows,
                    int64_t n, void *const *out, int accumulate) {
  const float *const *b = reinterpret_cast<const float *const *>(rows);
  float *const *y = reinterpret_cast<float *const *>(out);
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) squares_rows<4, 2>(terms, c + i * ldc, ldc, b, n, y + i, accumulate);
  for (; i + 2 <= m; i += 2) squares_rows<2, 4>(terms, c + i * ldc, ldc, b, n, y + i, accumulate);
  for (; i < m; ++i) squares_rows<1, 8>(terms, c + i * ldc, ldc, b, n, y + i, accumulate);
}

}  // namespace
}  // namespace le
