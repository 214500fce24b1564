// The inner loops, written once; each instruction set's file includes this
// after vec.h's macros and names its table with LE_TABLE.
#pragma once

#include <algorithm>

#include "ewc_bodies.h"
#include "fisher_bodies.h"
#include "nf4_bodies.h"
#include "vec.h"

namespace le {
namespace {

// ---- shrink: dot products of MT rows with RT ranks, PART partial sums each --
//
// Vector v of the row goes to partial sum v % PART, so the order of summation
// is set by PART alone. PART follows the adapter's rank: 4 sums hide the FMA's
// latency at rank 1 and 2; from 3 on, the ranks of a tile do.

template <class T, int MT, int RT, int PART>
LE_INLINE void dot_tile(const float *const *x, const T *const *a, int64_t k, float *h,
                        int64_t ldh) {
  F acc[MT][RT][PART] = {};
  auto add = [&](int part, auto &&load_x, auto &&load_a) {
    F xv[MT];
    for (int i = 0; i < MT; ++i) xv[i] = load_x(x[i]);
    for (int j = 0; j < RT; ++j) {
      F av = load_a(a[j]);
      for (int i = 0; i < MT; ++i) acc[i][j][part] = fma(xv[i], av, acc[i][j][part]);
    }
  };
  int64_t p = 0;
  for (; p + PART * W <= k; p += PART * W) {
#pragma GCC unroll 4
    for (int part = 0; part < PART; ++part) {
      int64_t at = p + part * W;
      add(
          part, [at](const float *row) { return load(row + at); },
          [at](const T *row) { return load(row + at); });
    }
  }
#pragma GCC unroll 4
  for (int part = 0; part < PART; ++part) {
    int64_t left = k - p;
    if (left >= W) {
      add(
          part, [p](const float *row) { return load(row + p); },
          [p](const T *row) { return load(row + p); });
      p += W;
    } else if (left > 0) {
      add(
          part, [p, left](const float *row) { return load_part(row + p, left); },
          [p, left](const T *row) { return load_part(row + p, left); });
      p = k;
    }
  }
  for (int i = 0; i < MT; ++i) {
    for (int j = 0; j < RT; ++j) {
      F total = acc[i][j][0] + acc[i][j][1];
      if (PART == 4) total = total + (acc[i][j][PART - 2] + acc[i][j][PART - 1]);
      h[i * ldh + j] = sum(total);
    }
  }
}

template <class T, int MT, int RT, int PART>
LE_INLINE int64_t dot_tiles(const float *const *x, int64_t j, int64_t r, const T *const *a,
                            int64_t k, float *h, int64_t ldh) {
  for (; j + RT <= r; j += RT) dot_tile<T, MT, RT, PART>(x, a + j, k, h + j, ldh);
  return j;
}

template <class T>
void shrink(int64_t m, const float *const *x, int64_t r, const void *const *rows, int64_t k,
            int64_t rank_total, float *h, int64_t ldh) {
  const T *const *a = reinterpret_cast<const T *const *>(rows);
  int64_t i = 0;
  if (rank_total <= 2) {
    for (; i < m; ++i) {
      int64_t j = dot_tiles<T, 1, 3, 4>(x + i, 0, r, a, k, h + i * ldh, ldh);
      j = dot_tiles<T, 1, 2, 4>(x + i, j, r, a, k, h + i * ldh, ldh);
      dot_tiles<T, 1, 1, 4>(x + i, j, r, a, k, h + i * ldh, ldh);
    }
    return;
  }
  // By threes, and the last two or four by twos: one alone loads more than it multiplies.
  int64_t threes = r % 3 == 1 ? r - 4 : r;
  for (; i + 2 <= m; i += 2) {
    int64_t j = dot_tiles<T, 2, 3, 2>(x + i, 0, threes, a, k, h + i * ldh, ldh);
    j = dot_tiles<T, 2, 2, 2>(x + i, j, r, a, k, h + i * ldh, ldh);
    dot_tiles<T, 2, 1, 2>(x + i, j, r, a, k, h + i * ldh, ldh);
  }
  for (; i < m; ++i) {
    int64_t j = dot_tiles<T, 1, 4, 2>(x + i, 0, r, a, k, h + i * ldh, ldh);
    dot_tiles<T, 1, 1, 2>(x + i, j, r, a, k, h + i * ldh, ldh);
  }
}

// ---- expand: NV vectors of columns of MT rows, terms in order --------------

template <class TB, class TY, int MT, int NV>
LE_INLINE void columns_tile(int64_t terms, const float *c, int64_t ldc, const TB *const *b,
                            int64_t at, TY *const *y, int accumulate) {
  F acc[MT][NV] = {};
  for (int64_t t = 0; t < terms; ++t) {
    F bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = load(b[t] + at + v * W);
#pragma GCC unroll 4
    for (int i = 0; i < MT; ++i) {
      F cv = set1(c[i * ldc + t]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(cv, bv[v], acc[i][v]);
    }
  }
  for (int i = 0; i < MT; ++i) {
    for (int v = 0; v < NV; ++v) {
      TY *p = y[i] + at + v * W;
      store(p, accumulate ? load(p) + acc[i][v] : acc[i][v]);
    }
  }
}

template <class TB, class TY>
LE_INLINE void columns_part(int64_t terms, const float *c, const TB *const *b, int64_t at,
                            int64_t left, TY *y, int accumulate) {
  F acc = {};
  for (int64_t t = 0; t < terms; ++t) acc = fma(set1(c[t]), load_part(b[t] + at, left), acc);
  if (accumulate) acc = load_part(y + at, left) + acc;
  TY part[W];
  store(part, acc);
  copy_part(y + at, part, left);
}

template <class TB, class TY, int MT, int NV>
LE_INLINE void expand_rows(int64_t terms, const float *c, int64_t ldc, const TB *const *b,
                           int64_t n, TY *const *y, int accumulate) {
  int64_t at = 0;
  for (; at + NV * W <= n; at += NV * W)
    columns_tile<TB, TY, MT, NV>(terms, c, ldc, b, at, y, accumulate);
  for (; at + W <= n; at += W) columns_tile<TB, TY, MT, 1>(terms, c, ldc, b, at, y, accumulate);
  if (at < n)
    for (int i = 0; i < MT; ++i) columns_part(terms, c + i * ldc, b, at, n - at, y[i], accumulate);
}

template <class TB, class TY>
void expand(int64_t m, int64_t terms, const float *c, int64_t ldc, const void *const *rows,
            int64_t n, void *const *out, int accumulate) {
  const TB *const *b = reinterpret_cast<const TB *const *>(rows);
  TY *const *y = reinterpret_cast<TY *const *>(out);
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    expand_rows<TB, TY, 4, 2>(terms, c + i * ldc, ldc, b, n, y + i, accumulate);
  for (; i + 2 <= m; i += 2)
    expand_rows<TB, TY, 2, 4>(terms, c + i * ldc, ldc, b, n, y + i, accumulate);
  for (; i < m; ++i) expand_rows<TB, TY, 1, 8>(terms, c + i * ldc, ldc, b, n, y + i, accumulate);
}

// ---- expand_pairs: rank 2, whose columns lie side by side ---------------------

template <class TB, class TY>
LE_INLINE void pairs_at(F c0, F c1, const TB *b, TY *y, int accumulate) {
  F acc = fma_pairs(c0, c1, load(b), load(b + W));
  store(y, accumulate ? load(y) + acc : acc);
}

template <class TB, class TY>
void expand_pairs(const float *c, const void *pairs, int64_t n, void *out, int accumulate) {
  const TB *b = static_cast<const TB *>(pairs);
  TY *y = static_cast<TY *>(out);
  const F c0 = set1(c[0]), c1 = set1(c[1]);
  int64_t at = 0;
  for (; at + 2 * W <= n; at += 2 * W) {
    pairs_at(c0, c1, b + 2 * at, y + at, accumulate);
    pairs_at(c0, c1, b + 2 * at + 2 * W, y + at + W, accumulate);
  }
  for (; at < n; at += W) {
    int64_t left = std::min<int64_t>(n - at, W);
    TB part[2 * W] = {};
    TY sums[W] = {};
    copy_part(part, b + 2 * at, 2 * left);
    copy_part(sums, y + at, accumulate ? left : 0);
    pairs_at(c0, c1, part, sums, accumulate);
    copy_part(y + at, sums, left);
  }
}

// ---- update -----------------------------------------------------------------

template <class T, bool EWC>
LE_INLINE void update_loop(const Update u) {  // by value: no store can alias it
  const T *src = static_cast<const T *>(u.src);
  T *dst = static_cast<T *>(u.dst);
  const F decay = set1(u.decay), coef = set1(-u.coef), penalty = set1(u.penalty);
  auto step = [&](F theta, F vec, F fisher, F anchor) {
    F next = fma(coef, vec, decay * theta);
    if (EWC) {
      F pull = penalty * fisher;
      next = fma(pull, anchor, next) / (set1(1.0f) + pull);
    }
    return next;
  };
  int64_t i = 0;
  auto whole = [&](int64_t at) {
    F fisher = EWC ? load(u.fisher + at) : F{}, anchor = EWC ? load(u.anchor + at) : F{};
    store_stochastic(dst + at, step(load(src + at), load(u.vec + at), fisher, anchor),
                     u.element + static_cast<uint32_t>(at), u);
  };
  for (; i + 4 * W <= u.n; i += 4 * W) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) whole(i + part * W);
  }
  for (; i + W <= u.n; i += W) whole(i);
  if (i < u.n) {
    int64_t left = u.n - i;
    F fisher = EWC ? load_part(u.fisher + i, left) : F{};
    F anchor = EWC ? load_part(u.anchor + i, left) : F{};
    F next = step(load_part(src + i, left), load_part(u.vec + i, left), fisher, anchor);
    T part[W];
    store_stochastic(part, next, u.element + static_cast<uint32_t>(i), u);
    copy_part(dst + i, part, left);
  }
}

template <class T>
void update(const Update &u) {
  if (u.fisher)
    update_loop<T, true>(u);
  else
    update_loop<T, false>(u);
}

// ---- conversion -------------------------------------------------------------

template <class From, class To>
LE_INLINE void convert(const From *src, int64_t n, To *dst) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i));
  if (i < n) {
    To part[W];
    store(part, load_part(src + i, n - i));
    copy_part(dst + i, part, n - i);
  }
}

template <class T>
void widen(const void *src, int64_t n, float *dst) {
  convert(static_cast<const T *>(src), n, dst);
}
template <class T>
void round(const float *src, int64_t n, void *dst) {
  convert(src, n, static_cast<T *>(dst));
}

}  // namespace

const Kernels LE_TABLE = {
    LE_NAME,
    {shrink<float>, shrink<Bf16>, shrink<Fp16>},
    {{expand<float, float>, expand<float, Bf16>, expand<float, Fp16>},
     {expand<Bf16, float>, expand<Bf16, Bf16>, expand<Bf16, Fp16>},
     {expand<Fp16, float>, expand<Fp16, Bf16>, expand<Fp16, Fp16>}},
    {{expand_pairs<float, float>, expand_pairs<float, Bf16>, expand_pairs<float, Fp16>},
     {expand_pairs<Bf16, float>, expand_pairs<Bf16, Bf16>, expand_pairs<Bf16, Fp16>},
     {expand_pairs<Fp16, float>, expand_pairs<Fp16, Bf16>, expand_pairs<Fp16, Fp16>}},
    {update<float>, update<Bf16>, update<Fp16>},
    {widen<float>, widen<Bf16>, widen<Fp16>},
    {round<float>, round<Bf16>, round<Fp16>},
    nf4_kernels(LE_NF4_BFLOAT),
    {{accumulate_squares<float, float>, accumulate_squares<float, Bf16>,
      accumulate_squares<float, Fp16>},
     {accumulate_squares<Bf16, float>, accumulate_squares<Bf16, Bf16>,
      accumulate_squares<Bf16, Fp16>},
     {accumulate_squares<Fp16, float>, accumulate_squares<Fp16, Bf16>,
      accumulate_squares<Fp16, Fp16>}},
    project,
    expand_squares,
    {products<float>, products<Bf16>, products<Fp16>},
    {solve<float>, solve<Bf16>, solve<Fp16>},
};

}  // namespace le
