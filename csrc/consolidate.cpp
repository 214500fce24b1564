#include "consolidate.h"

#include "dispatch.h"
#include "merge_sweep.h"
#include "rng.h"

namespace le {
namespace {

const char *const kOp = "consolidate";
constexpr int64_t kMostRank = 256;
// Directions carried beyond the rank, with which the iteration converges sooner; fewer where the
// solves go on from its first sweep.
constexpr int64_t kExtra = 6, kExtraOfStart = 2;
constexpr double kNegligible = 1e-10;  // of the largest eigenvalue, of float32's squares

// delta = left^T right, [width, out] and [width, in].
struct Product {
  Floats left, right;
  int64_t width = 0;
};

template <class T>
void check_held(const std::vector<T> &values) {
  for (T value : values)
    if (!std::isfinite(value))
      fail(LE_ERROR_VALUE, "%s: slots: expected a merge that float32 holds, got Inf or NaN", kOp);
}

Doubles eigen(const Doubles &gram, int64_t width, Doubles *values) {
  check_held(gram);
  return eigenvectors(gram, width, values);
}

void fill_random(float *row, int64_t n, uint64_t key) {
  for (int64_t i = 0; i < n; ++i) {
    uint64_t bits = splitmix64(key * 0x100000001b3u + static_cast<uint64_t>(i));
    row[i] = static_cast<float>(static_cast<int64_t>(bits) >> 40) * 0x1p-23f;
  }
}

// W [rows, width] times X [width, n].
Floats combine(const Doubles &W, int64_t rows, const Floats &X, int64_t width) {
  int64_t n = width ? static_cast<int64_t>(X.size()) / width : 0;
  Floats to(static_cast<size_t>(rows * n));
  Doubles line(static_cast<size_t>(n));
  for (int64_t j = 0; j < rows; ++j) {
    std::fill(line.begin(), line.end(), 0.0);
    for (int64_t k = 0; k < width; ++k) {
      double w = W[j * width + k];
      const float *from = &X[k * n];
      for (int64_t i = 0; i < n; ++i) line[i] += w * double(from[i]);
    }
    for (int64_t i = 0; i < n; ++i) to[j * n + i] = static_cast<float>(line[i]);
  }
  return to;
}

// The W [m, width] that makes W X orthonormal, and its left inverse's transpose; m, the numerical
// rank, is returned.
int64_t whiten(const Doubles &gram, int64_t width, Doubles *W, Doubles *inverse) {
  Doubles values, Q = eigen(gram, width, &values);
  int64_t m = 0;
  while (m < width && values[m] > kNegligible * values[0] && values[m] > 0) ++m;
  *W = *inverse = Doubles(Q.begin(), Q.begin() + m * width);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t k = 0; k < width; ++k) {
      (*W)[j * width + k] /= std::sqrt(values[j]);
      (*inverse)[j * width + k] *= std::sqrt(values[j]);
    }
  }
  return m;
}

// W own [m, factors].
Inner transformed(const Inner &inner, const Doubles &W, int64_t m, int64_t width) {
  int64_t factors = static_cast<int64_t>(inner.own.size()) / width;
  Inner to;
  to.own.resize(static_cast<size_t>(m * factors));
  for (int64_t j = 0; j < m; ++j)
    for (int64_t k = 0; k < width; ++k)
      for (int64_t f = 0; f < factors; ++f)
        to.own[j * factors + f] += W[j * width + k] * inner.own[k * factors + f];
  return to;
}

// Fills rows [from, rank) with unit vectors at right angles to all rows before them, as long as
// the space has room: directions that add nothing to the delta, but can learn.
void complete(Floats &A, int64_t from, int64_t rank, int64_t n) {
  Doubles units;
  auto row_of = [&](int64_t j) {
    Doubles row(&A[j * n], &A[j * n] + n);
    for (int pass = 0; pass < 2; ++pass) {
      for (size_t first = 0; first < units.size(); first += static_cast<size_t>(n)) {
        double dot = 0;
        for (int64_t i = 0; i < n; ++i) dot += row[i] * units[first + i];
        for (int64_t i = 0; i < n; ++i) row[i] -= dot * units[first + i];
      }
      double norm = 0;
      for (double value : row) norm += value * value;
      for (double &value : row) value /= std::sqrt(std::max(norm, 1e-300));
    }
    units.insert(units.end(), row.begin(), row.end());
  };
  rank = std::min(rank, n);
  if (from >= rank) return;
  for (int64_t j = 0; j < rank; ++j) {
    if (j >= from) fill_random(&A[j * n], n, static_cast<uint64_t>(j));
    row_of(j);
    if (j >= from)
      for (int64_t i = 0; i < n; ++i) A[j * n + i] = static_cast<float>(units[j * n + i]);
  }
}

// The truncated SVD of left^T right, left of orthonormal rows: the delta is B^T A with rows of
// B^T and A of norm sqrt(sigma). gram: right right^T. unit: A orthonormal, B^T alone has sigma.
Product truncated(const Product &p, const Doubles &gram, int64_t rank, bool unit) {
  Doubles values, Q = eigen(gram, p.width, &values);
  int64_t kept = 0;
  while (kept < std::min(rank, p.width) && values[kept] > 0 &&
         values[kept] > kNegligible * values[0])
    ++kept;
  Doubles left(Q.begin(), Q.begin() + kept * p.width), right = left;
  for (int64_t j = 0; j < kept; ++j) {
    double sigma = std::sqrt(values[j]), b = unit ? sigma : std::sqrt(sigma);
    for (int64_t k = 0; k < p.width; ++k) {
      left[j * p.width + k] *= b;
      right[j * p.width + k] /= b;
    }
  }
  return {combine(left, kept, p.left, p.width), combine(right, kept, p.right, p.width), kept};
}

double leading(const Doubles &gram, int64_t width, int64_t rank) {
  Doubles values;
  eigen(gram, width, &values);
  double sum = 0;
  for (int64_t j = 0; j < std::min(rank, width); ++j) sum += values[j];
  return sum;
}

// The leading part of the plain sum T = sum_k weights_k D_k by subspace iteration (Halko,
// Martinsson and Tropp 2011, algorithm 4.4): left^T right, left orthonormal, right = left T. One
// sweep of it where only a start is asked for.
Product subspace(MergeSweep &sweep, const MergeTerms &terms, const Doubles &weights,
                 const le_merge &merge, bool start, Doubles *gram, int32_t *sweeps) {
  int64_t in = terms.a.n, width = merge.rank + (start ? kExtraOfStart : kExtra);
  width = std::min({width, in, terms.b.n});
  Product p;
  Floats X(static_cast<size_t>(width * in)), Y;
  for (int64_t j = 0; j < width; ++j) fill_random(&X[j * in], in, static_cast<uint64_t>(~j));
  Inner from_a = sweep.inner(terms.a, X, width, false);
  double before = 0;
  for (*sweeps = 1;; ++*sweeps) {
    Doubles W, inverse;
    Inner from_b = sweep.apply(terms.b, from_a, weights, width, &Y);
    int64_t m = whiten(from_b.gram, width, &W, &inverse);
    if (!m) return p;
    p.left = combine(W, m, Y, width);
    from_a = sweep.apply(terms.a, transformed(from_b, W, m, width), weights, m, &p.right);
    bool whole = m < width;  // nothing of T lies outside
    bool last = start || *sweeps >= merge.max_sweeps;
    p.width = width = m;
    *gram = from_a.gram;
    double captured = leading(*gram, width, merge.rank);
    if (whole || captured - before <= double(merge.tolerance) * captured || last) return p;
    before = captured;
    m = whiten(*gram, width, &W, &inverse);
    from_a = transformed(from_a, W, m, width);
    width = m;
  }
}

// The SVD of any left^T right.
Product balanced(const Product &p, const Doubles &left_gram, int64_t rank) {
  Doubles W, inverse;
  int64_t m = whiten(left_gram, p.width, &W, &inverse);
  Product q{combine(W, m, p.left, p.width), combine(inverse, m, p.right, p.width), m};
  int64_t n = m ? static_cast<int64_t>(q.right.size()) / m : 0;
  Doubles gram(static_cast<size_t>(m * m));
  for (int64_t s = 0; s < m; ++s)
    for (int64_t t = 0; t < m; ++t)
      for (int64_t i = 0; i < n; ++i)
        gram[s * m + t] += double(q.right[s * n + i]) * double(q.right[t * n + i]);
  return truncated(q, gram, rank, false);
}

// Alternating exact solves from the rows of A given; every one lowers the objective.
Product alternate(MergeSweep &sweep, const MergeTerms &terms, Floats A, const le_merge &merge,
                  int32_t *sweeps) {
  int64_t rank = merge.rank;
  Inner from_a = sweep.inner(terms.a, A, rank, true), from_b;
  Floats B;
  for (*sweeps = 1;; ++*sweeps) {
    from_b = sweep.solve(terms.b, from_a, rank, *sweeps > 1, &B);
    from_a = sweep.solve(terms.a, from_b, rank, true, &A);
    double gain = from_b.decrease + from_a.decrease;
    if (gain <= double(merge.tolerance) * from_a.size || *sweeps >= merge.max_sweeps) break;
  }
  return balanced({std::move(B), std::move(A), rank}, from_b.gram, rank);
}

void check_options(const AdapterPool &pool, const le_merge &m) {
  if (pool.num_slices() != 1)
    fail(LE_ERROR_VALUE, "%s: pool: expected a pool of one slice, got %d", kOp, pool.num_slices());
  int64_t most = std::min({kMostRank, pool.in_features(), pool.slice_out(0)});
  if (m.rank < 1 || m.rank > most)
    fail(LE_ERROR_VALUE, "%s: rank: expected 1 to %lld, got %d", kOp, static_cast<long long>(most),
         m.rank);
  check_finite(kOp, "scaling", m.scaling);
  if (!(m.scaling > 0))
    fail(LE_ERROR_VALUE, "%s: scaling: expected a number above 0, got %g", kOp, m.scaling);
  check_finite(kOp, "tolerance", m.tolerance);
  if (m.tolerance < 0)
    fail(LE_ERROR_VALUE, "%s: tolerance: expected 0 or more, got %g", kOp, m.tolerance);
  if (m.max_sweeps < 1)
    fail(LE_ERROR_VALUE, "%s: max_sweeps: expected at least 1, got %d", kOp, m.max_sweeps);
  if (m.num_threads < 1)
    fail(LE_ERROR_VALUE, "%s: num_threads: expected at least 1, got %d", kOp, m.num_threads);
}

void store(const Kernels &k, const Product &p, int64_t rank, float scaling, const Rows &a,
           const Rows &bt) {
  Floats A = p.right, B = p.left;
  A.resize(static_cast<size_t>(rank * a.width));
  B.resize(static_cast<size_t>(rank * bt.width));
  for (Floats *side : {&A, &B})
    for (float &value : *side) value /= std::sqrt(scaling);
  complete(A, p.width, rank, a.width);
  check_held(A);
  check_held(B);
  for (int64_t j = 0; j < rank; ++j) {
    store_row(k, a, j, 0, a.width, &A[j * a.width], false);
    store_row(k, bt, j, 0, bt.width, &B[j * bt.width], false);
  }
}

}  // namespace

void consolidate(AdapterPool &pool, int32_t base, const le_merge &merge, const le_array *A,
                 const le_array *B, uint64_t *versions, le_merge_info *info) {
  check_options(pool, merge);
  Rows a = float_matrix(kOp, "A", A, merge.rank, pool.in_features(), "[r, in]");
  Rows bt = float_matrix(kOp, "B", B, pool.slice_out(0), merge.rank, "[out, r]");
  check_output(kOp, "A", A, a);
  check_output(kOp, "B", B, bt);
  check_overlap(kOp, "A", a, "B", bt);
  bt = transposed(bt);

  MergeTerms terms = read_terms(pool, base, merge);
  bool fisher = terms.fishers > 0;
  Doubles weights = terms.weights;
  double total = 0;
  for (size_t k = 1; k < weights.size(); ++k) total += weights[k];
  if (fisher && total > 0)
    for (double &w : weights) w /= total;
  weights[0] = 1;
  MergeSweep sweep(pool.context(), terms, merge.num_threads);
  le_merge_info told{0, 0};
  Doubles gram;
  Product p = subspace(sweep, terms, weights, merge, fisher, &gram, &told.subspace_sweeps);
  p = truncated(p, gram, merge.rank, fisher);
  if (fisher) {
    Floats start = p.right;
    start.resize(static_cast<size_t>(merge.rank * a.width));
    complete(start, p.width, merge.rank, a.width);
    p = alternate(sweep, terms, std::move(start), merge, &told.sweeps);
  }
  store(kernels(), p, merge.rank, merge.scaling, a, bt);
  std::copy(terms.versions.begin(), terms.versions.end(), versions);
  *info = told;
}

}  // namespace le
