// The table of inner loops that each instruction set fills in. Everything
// above it is compiled once, for the baseline CPU.
#pragma once

#include <cstdint>

#include "../common.h"
#include "nf4_kernels.h"

namespace le {

// h[i * ldh + j] = dot(x[i], a[j]) over k elements, for m rows and r ranks.
// The order of summation depends on `rank_total` (the adapter's rank) and k
// alone, never on m or on how the ranks are split over calls.
using ShrinkFn = void (*)(int64_t m, const float *const *x, int64_t r, const void *const *a,
                          int64_t k, int64_t rank_total, float *h, int64_t ldh);

// y[i][0..n) = (accumulate ? y[i] : 0) + sum_t c[i * ldc + t] * b[t][0..n),
// terms in order, summed in float32 before y is added.
using ExpandFn = void (*)(int64_t m, int64_t terms, const float *c, int64_t ldc,
                          const void *const *b, int64_t n, void *const *y, int accumulate);

// The same for one row of y and two terms whose elements alternate: b [n, 2]. Bit for bit the same.
using ExpandPairsFn = void (*)(const float *c, const void *b, int64_t n, void *y, int accumulate);

// theta' = (decay theta - coef vec + penalty F anchor) / (1 + penalty F) for n
// elements; without fisher the penalty is 0. Storage of 16 bits is rounded
// stochastically by hash(key, element + i).
struct Update {
  const void *src;
  void *dst;
  const float *vec;
  const float *fisher;
  const float *anchor;
  int64_t n;
  float decay, coef, penalty;
  uint32_t key_lo, key_hi, element;
};
using UpdateFn = void (*)(const Update &);

// gram [rank, rank] = own diag(weights) own^T and cross = anchor diag(weights) own^T; own and
// anchor [rank, n], or null: cross is not asked for. wide: all in float64, else in float32 but for
// the sum of blocks of columns.
struct Products {
  const void *own;
  const float *anchor, *weights;
  int64_t rank, n;
  double *gram, *cross;
  bool wide;
};
using ProductsFn = void (*)(const Products &);

// An update of the `rank` rows at u.src, whose columns are tied: with t = u.penalty u.fisher[i],
// Q diag(lambda) Q^T a symmetric matrix and theta a column after the step without a penalty,
// Q z, z_k = (into_k [theta; t anchor]) / (1 + t lambda_k), t lambda_k at most 1e18; without
// u.anchor it counts as zeros. With `matrix`, of rank 2, Q z is (I + f M)^-1 (theta + f P anchor),
// f = u.fisher[i], and what describes it by Q is not read.
struct Solve {
  Update u;  // of the first row, but for vec and coef; fisher [n] is of all rows
  int64_t rank;
  const float *const *vec;  // [rank]
  const float *coef;        // [rank]
  const float *lambda;      // [rank]
  const float *into;        // [rank, 2 rank], Q^T in the first half of its columns
  const float *back;        // [rank, rank], Q
  const float *matrix;      // M_00, M_01, M_11, its determinant, then P [2, 2]; or null
  float *const *rows;       // scratch: 3 rank rows of strip_columns(rank)
};
using SolveFn = void (*)(const Solve &);
constexpr int64_t strip_columns(int64_t rank) { return rank < 32 ? 2048 / rank / 64 * 64 : 64; }

// F = gamma F + (scale g) g for n elements.
using AccumulateSquaresFn = void (*)(int64_t n, float gamma, float scale, const void *g, void *F);

// h[j * m + i] = dot(x[i], a + j * k) over k elements, for m <= kProjectRows
// rows and r ranks: for tiles of rows that do not fit the L1 together.
constexpr int64_t kProjectRows = 12;
using ProjectFn = void (*)(int64_t m, const float *const *x, int64_t r, const float *a, int64_t k,
                           float *h);

// Between float32 and a dtype, n elements; to nearest, ties to even.
using WidenFn = void (*)(const void *src, int64_t n, float *dst);
using RoundFn = void (*)(const float *src, int64_t n, void *dst);

constexpr int kNumDtypes = 3;  // LE_FLOAT32, LE_BFLOAT16, LE_FLOAT16

struct Kernels {
  const char *name;
  ShrinkFn shrink[kNumDtypes];                         // [dtype of a]
  ExpandFn expand[kNumDtypes][kNumDtypes];             // [dtype of b][dtype of y]
  ExpandPairsFn expand_pairs[kNumDtypes][kNumDtypes];  // the same
  UpdateFn update[kNumDtypes];                         // [dtype of theta]
  WidenFn widen[kNumDtypes];                           // [dtype of src]
  RoundFn round[kNumDtypes];                           // [dtype of dst]
  Nf4Kernels nf4;
  AccumulateSquaresFn accumulate_squares[kNumDtypes][kNumDtypes];  // [dtype of F][dtype of g]
  ProjectFn project;
  ExpandFn expand_squares;          // with the squares of b, all float32
  ProductsFn products[kNumDtypes];  // [dtype of own]
  SolveFn solve[kNumDtypes];        // [dtype of theta]
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_neon;

}  // namespace le
