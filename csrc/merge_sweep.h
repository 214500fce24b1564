// The two long sums of a merge, over all adapters and one side's columns, in one pass.
#pragma once

#include "merge_terms.h"

namespace le {

using Floats = std::vector<float>;

// What one side's factor X [width, n] gives the other: inner products over columns with every
// adapter's rows. `own`: [width, factors]. `shared` (with Fisher): [pairs, fishers], for each row d
// of Fisher factors the entries of X diag(d) X^T from the diagonal on, then of base diag(d) X^T.
struct Inner {
  Doubles own, shared, gram;  // gram: X X^T
  double decrease = 0;        // of the objective by the new X
  double size = 0;            // the quadratic part of the objective at the new X
};

class MergeSweep {
 public:
  MergeSweep(Context &context, const MergeTerms &terms, int threads);

  // Inner products of a given X.
  Inner inner(const MergeSide &side, const Floats &X, int64_t width, bool fisher);
  // X [width, n] = sum over factor rows f of coefficient own[f] times the row: T Xᵀ of the
  // other side's X, T the plain sum. Then its inner products.
  Inner apply(const MergeSide &side, const Inner &other, const Doubles &weights, int64_t width,
              Floats *X);
  // The X that minimises the objective for the other side's X. had: X holds the previous one.
  Inner solve(const MergeSide &side, const Inner &other, int64_t width, bool had, Floats *X);

 private:
  struct Work;
  template <class Columns>
  Inner run(const MergeSide &side, int64_t width, bool fisher, Floats *X, Columns &&columns);
  void add_inner(const MergeSide &side, int64_t tile, int64_t width, bool fisher, Work &work);
  template <class Group>
  void gather(const float *coefficients, int64_t lines, int64_t terms, Group &&group, Work &work,
              double *to);
  template <class Group>
  void scatter(int64_t lines, Group &&group, const float *right, int64_t columns, Work &work,
               double *to);
  const float *weighed(const MergeSide &side, int64_t tile, int64_t first, int64_t count,
                       Work &work);
  void solve_columns(const MergeSide &side, int64_t tile, int64_t width, bool had, const Floats &X,
                     Work &work);
  int64_t pairs(int64_t width) const { return width * (width + 1) / 2 + terms_.base_rank * width; }
  int64_t own_first(bool fisher) const { return fisher ? terms_.base_rank : 0; }

  Context &context_;
  const Kernels &kernels_;
  const MergeTerms &terms_;
  const int threads_;
};

}  // namespace le
