// The inner loops of EWC in delta form: sums of products in float64, then the
// solve of each column. Included by bodies.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace le {
namespace {

template <class TB, class TY>  // of bodies.h
void expand(int64_t m, int64_t terms, const float *c, int64_t ldc, const void *const *rows,
            int64_t n, void *const *out, int accumulate);

// ---- products: Gram matrices of weighted rows -----------------------------------

using D = double __attribute__((vector_size(4 * LE_W)));  // W / 2 lanes

// Part 0 or 1 of a vector as float64, or all of it as it is.
template <class V, int PART>
LE_INLINE V part_of(F v);
template <>
LE_INLINE F part_of<F, 0>(F v) {
  return v;
}
#ifdef LE_WIDEN_LOW  // GCC 12 converts through memory
template <>
LE_INLINE D part_of<D, 0>(F v) {
  return reinterpret_cast<D>(LE_WIDEN_LOW(v));
}
template <>
LE_INLINE D part_of<D, 1>(F v) {
  return reinterpret_cast<D>(LE_WIDEN_HIGH(v));
}
#else
template <>
LE_INLINE D part_of<D, 0>(F v) {
  D wide;
  for (int i = 0; i < W / 2; ++i) wide[i] = v[i];
  return wide;
}
template <>
LE_INLINE D part_of<D, 1>(F v) {
  D wide;
  for (int i = 0; i < W / 2; ++i) wide[i] = v[i + W / 2];
  return wide;
}
#endif
LE_INLINE D fma(D a, D b, D c) { return LE_FMA_WIDE(a, b, c); }
LE_INLINE double sum(D v) {
  double lane[W / 2];
  std::memcpy(lane, &v, sizeof v);
  for (int half = W / 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// acc_ij += left_i (weight right_j) but for j > i in the first TRIANGLE rows.
template <class V, int PART, int LT, int RT, int TRIANGLE>
LE_INLINE void add_products(F weight, const F *left, const F *right, V (*acc)[RT]) {
  V weighted[RT];
  for (int j = 0; j < RT; ++j) weighted[j] = part_of<V, PART>(weight) * part_of<V, PART>(right[j]);
  for (int i = 0; i < LT; ++i) {
    V l = part_of<V, PART>(left[i]);
    for (int j = 0; j < RT; ++j)
      if (i >= TRIANGLE || j <= i) acc[i][j] = fma(l, weighted[j], acc[i][j]);
  }
}

// Summed in vectors of V, before float64 takes over.
template <class V>
constexpr int64_t kProductColumns = std::is_same<V, F>::value ? 1024 : INT64_MAX / 2;

// OWN rows of gram from i0 and ANCHORS rows of cross, against RT rows of own from j0;
// on the diagonal what lies above it is left out. Summed in an order that the shape fixes.
template <class V, class T, int OWN, int ANCHORS, int RT, bool DIAGONAL>
LE_INLINE void product_tile(const Products &p, int64_t i0, int64_t j0) {
  constexpr int LT = OWN + ANCHORS, TRIANGLE = DIAGONAL ? OWN : 0;
  const T *own = static_cast<const T *>(p.own);
  double total[LT][RT] = {};
  for (int64_t first = 0; first < p.n; first += kProductColumns<V>) {
    V acc[2][LT][RT] = {};
    auto add = [&](int half, auto &&read) {
      F weight = read(p.weights), right[RT], left[LT];
      for (int j = 0; j < RT; ++j) right[j] = read(own + (j0 + j) * p.n);
      for (int i = 0; i < OWN; ++i) left[i] = read(own + (i0 + i) * p.n);
      for (int i = 0; i < ANCHORS; ++i) left[OWN + i] = read(p.anchor + (i0 + i) * p.n);
      add_products<V, 0, LT, RT, TRIANGLE>(weight, left, right, acc[half]);
      if constexpr (std::is_same<V, D>::value)
        add_products<V, 1, LT, RT, TRIANGLE>(weight, left, right, acc[half]);
    };
    int64_t at = first, end = std::min(p.n, first + kProductColumns<V>);
    if (LT * RT <= 4)  // few sums would wait for one another
      for (; at + 2 * W <= end; at += 2 * W) {
        add(0, [at](const auto *row) { return load(row + at); });
        add(1, [at](const auto *row) { return load(row + at + W); });
      }
    for (; at + W <= end; at += W) add(0, [at](const auto *row) { return load(row + at); });
    if (int64_t left = end - at)
      add(0, [at, left](const auto *row) { return load_part(row + at, left); });
    if (LT * RT <= 4)
      for (int i = 0; i < LT; ++i)
        for (int j = 0; j < RT; ++j) acc[0][i][j] += acc[1][i][j];
    for (int i = 0; i < LT; ++i)
      for (int j = 0; j < RT; ++j) total[i][j] += sum(acc[0][i][j]);
  }
  for (int j = 0; j < RT; ++j) {
    for (int i = 0; i < OWN; ++i)
      if (!(DIAGONAL && j > i))
        p.gram[(i0 + i) * p.rank + j0 + j] = p.gram[(j0 + j) * p.rank + i0 + i] = total[i][j];
    for (int i = 0; i < ANCHORS; ++i) p.cross[(i0 + i) * p.rank + j0 + j] = total[OWN + i][j];
  }
}

// ANCHORS: 2 a tile of two ranks, or 0: cross is not asked for.
template <class V, class T, int ANCHORS>
void products_in(const Products &p) {
  constexpr int ONE = ANCHORS / 2;
  int64_t r = p.rank, pairs = r - r % 2;
  for (int64_t j = 0; j < pairs; j += 2) {
    if constexpr (ANCHORS > 0)
      for (int64_t i = 0; i < j; i += 2) product_tile<V, T, 0, ANCHORS, 2, false>(p, i, j);
    product_tile<V, T, 2, ANCHORS, 2, true>(p, j, j);
    for (int64_t i = j + 2; i < pairs; i += 2) product_tile<V, T, 2, ANCHORS, 2, false>(p, i, j);
    if (pairs < r) product_tile<V, T, 1, ONE, 2, false>(p, pairs, j);
  }
  if (pairs == r) return;
  if constexpr (ANCHORS > 0)
    for (int64_t i = 0; i < pairs; i += 2) product_tile<V, T, 0, ANCHORS, 1, false>(p, i, pairs);
  product_tile<V, T, 1, ONE, 1, true>(p, pairs, pairs);
}

template <class T>
void products(const Products &p) {
  if (p.wide)
    p.anchor ? products_in<D, T, 2>(p) : products_in<D, T, 0>(p);
  else
    p.anchor ? products_in<F, T, 2>(p) : products_in<F, T, 0>(p);
}

// ---- solve: the columns of one factor -----------------------------------------------

// columns(at, read, write) for every vector of columns.
template <class T, class Columns>
LE_INLINE void each_vector(const Solve &s, Columns &&columns) {
  int64_t at = 0;
  for (; at + W <= s.u.n; at += W)
    columns(
        at, [](const auto *p) { return load(p); },
        [&](T *to, F v, uint32_t element) { store_stochastic(to, v, element, s.u); });
  if (int64_t left = s.u.n - at)
    columns(
        at, [left](const auto *p) { return load_part(p, left); },
        [&](T *to, F v, uint32_t element) {
          T part[W];
          store_stochastic(part, v, element, s.u);
          copy_part(to, part, left);
        });
}

// Of few ranks a column stays in registers.
template <class T, int R, bool PULL>
LE_INLINE void solve_registers(const Solve s) {  // by value: no store can alias it
  const T *src = static_cast<const T *>(s.u.src);
  T *dst = static_cast<T *>(s.u.dst);
  const int64_t n = s.u.n;
  const F decay = set1(s.u.decay), penalty = set1(s.u.penalty), one = set1(1.0f);
  const float *vec[R];
  F coef[R], lambda[R], basis[R][R], pull[R][R];
  for (int k = 0; k < R; ++k) {
    vec[k] = s.vec[k];
    coef[k] = set1(-s.coef[k]);
    lambda[k] = set1(s.lambda[k]);
    for (int j = 0; j < R; ++j) {
      basis[k][j] = set1(s.into[k * 2 * R + j]);
      if (PULL) pull[k][j] = set1(s.into[k * 2 * R + R + j]);
    }
  }
  each_vector<T>(s, [&](int64_t at, auto &&read, auto &&write) {
    F t = penalty * read(s.u.fisher + at), theta[R], z[R], over[R], next[R];
    for (int j = 0; j < R; ++j)
      theta[j] = fma(coef[j], read(vec[j] + at), decay * read(src + j * n + at));
    for (int k = 0; k < R; ++k) {
      z[k] = basis[k][0] * theta[0];
      for (int j = 1; j < R; ++j) z[k] = fma(basis[k][j], theta[j], z[k]);
      over[k] = fma(t, lambda[k], one);
    }
    if constexpr (PULL) {
      F anchor[R];
      for (int j = 0; j < R; ++j) anchor[j] = read(s.u.anchor + j * n + at);
      for (int k = 0; k < R; ++k) {
        F pulled = pull[k][0] * anchor[0];
        for (int j = 1; j < R; ++j) pulled = fma(pull[k][j], anchor[j], pulled);
        z[k] = fma(t, pulled, z[k]);
      }
    }
    if constexpr (PULL || R % 2) {
      for (int k = 0; k < R; ++k) z[k] /= over[k];
    } else {  // divisions are what takes longest here: one for two, over[k] being at most 1e18
      for (int k = 0; k < R; k += 2) {
        F both = one / (over[k] * over[k + 1]);
        z[k] *= over[k + 1] * both;
        z[k + 1] *= over[k] * both;
      }
    }
    for (int j = 0; j < R; ++j) {
      next[j] = basis[0][j] * z[0];
      for (int k = 1; k < R; ++k) next[j] = fma(basis[k][j], z[k], next[j]);
    }
    for (int j = 0; j < R; ++j)
      write(dst + j * n + at, next[j], s.u.element + static_cast<uint32_t>(j * n + at));
  });
}

// Of two ranks: (I + f M)^-1 by its adjugate, a division a column.
template <class T, bool PULL>
LE_INLINE void solve_two(const Solve s) {
  const T *src = static_cast<const T *>(s.u.src);
  T *dst = static_cast<T *>(s.u.dst);
  const float *vec[2] = {s.vec[0], s.vec[1]}, *m = s.matrix;
  const int64_t n = s.u.n;
  const F decay = set1(s.u.decay), coef[2] = {set1(-s.coef[0]), set1(-s.coef[1])};
  const F m00 = set1(m[0]), m01 = set1(m[1]), m11 = set1(m[2]), one = set1(1.0f);
  const F trace = set1(m[0] + m[2]), determinant = set1(m[3]);
  const F pull[2][2] = {{set1(m[4]), set1(m[5])}, {set1(m[6]), set1(m[7])}};
  each_vector<T>(s, [&](int64_t at, auto &&read, auto &&write) {
    F f = read(s.u.fisher + at), theta[2], next[2];
    for (int j = 0; j < 2; ++j)
      theta[j] = fma(coef[j], read(vec[j] + at), decay * read(src + j * n + at));
    if constexpr (PULL) {
      F anchor[2] = {read(s.u.anchor + at), read(s.u.anchor + n + at)};
      for (int j = 0; j < 2; ++j)
        theta[j] = fma(f, fma(pull[j][1], anchor[1], pull[j][0] * anchor[0]), theta[j]);
    }
    F inverse = one / fma(f, fma(f, determinant, trace), one);
    next[0] = fma(f, fma(m11, theta[0], -(m01 * theta[1])), theta[0]) * inverse;
    next[1] = fma(f, fma(m00, theta[1], -(m01 * theta[0])), theta[1]) * inverse;
    for (int j = 0; j < 2; ++j)
      write(dst + j * n + at, next[j], s.u.element + static_cast<uint32_t>(j * n + at));
  });
}

template <class T, int R>
void solve_few(const Solve &s) {
  s.u.anchor ? solve_registers<T, R, true>(s) : solve_registers<T, R, false>(s);
}

// Of more, a strip of columns at a time stays in the L1: rows [0, 2 rank) of s.rows hold
// theta before the penalty and t anchor, the others z.
template <class T>
void solve_strip(const Solve &s, int64_t first, int64_t count) {
  const int64_t r = s.rank, n = s.u.n;
  const bool pulls = s.u.anchor != nullptr;
  float *const *in = s.rows, *const *z = s.rows + 2 * r;
  const T *src = static_cast<const T *>(s.u.src) + first;
  T *dst = static_cast<T *>(s.u.dst) + first;
  const F decay = set1(s.u.decay), pull = set1(s.u.penalty), one = set1(1.0f);
  const float *weights = s.u.fisher + first, *anchor = pulls ? s.u.anchor + first : nullptr;
  auto each = [count](auto &&visit) {
    int64_t at = 0;
    for (; at + W <= count; at += W) visit(at, [](const auto *p) { return load(p); });
    if (int64_t left = count - at) visit(at, [left](const auto *p) { return load_part(p, left); });
  };
  for (int64_t j = 0; j < r; ++j) {
    const F coef = set1(-s.coef[j]);
    each([&, vec = s.vec[j] + first](int64_t at, auto &&read) {
      store(in[j] + at, fma(coef, read(vec + at), decay * read(src + j * n + at)));
      if (pulls) store(in[r + j] + at, pull * read(weights + at) * read(anchor + j * n + at));
    });
  }
  expand<float, float>(r, pulls ? 2 * r : r, s.into, 2 * r,
                       reinterpret_cast<const void *const *>(in), count,
                       reinterpret_cast<void *const *>(z), 0);
  for (int64_t k = 0; k < r; ++k) {
    const F lambda = set1(s.lambda[k]);
    each([&](int64_t at, auto &&read) {
      store(z[k] + at, load(z[k] + at) / fma(pull * read(weights + at), lambda, one));
    });
  }
  expand<float, float>(r, r, s.back, r, reinterpret_cast<const void *const *>(z), count,
                       reinterpret_cast<void *const *>(in), 0);
  for (int64_t j = 0; j < r; ++j) {
    T *to = dst + j * n;
    uint32_t element = s.u.element + static_cast<uint32_t>(j * n + first);
    int64_t at = 0;
    for (; at + W <= count; at += W)
      store_stochastic(to + at, load(in[j] + at), element + static_cast<uint32_t>(at), s.u);
    if (at == count) continue;
    T part[W];
    store_stochastic(part, load(in[j] + at), element + static_cast<uint32_t>(at), s.u);
    copy_part(to + at, part, count - at);
  }
}

template <class T>
void solve(const Solve &s) {
  if (s.matrix) return s.u.anchor ? solve_two<T, true>(s) : solve_two<T, false>(s);
  if (s.rank == 1) return solve_few<T, 1>(s);
  if (s.rank == 2) return solve_few<T, 2>(s);
  if (s.rank == 3) return solve_few<T, 3>(s);
  if (s.rank == 4) return solve_few<T, 4>(s);
  const int64_t width = strip_columns(s.rank);
  for (int64_t at = 0; at < s.u.n; at += width) solve_strip<T>(s, at, std::min(width, s.u.n - at));
}

}  // namespace
}  // namespace le
