// Gradients of one adapter: over one sample as coefficients, over several in a
// buffer that is laid out like the slot's weights.
#pragma once

#include "forward.h"

namespace le {

// The gradient of one row of weights (a row of A, or of B's transpose) is
// coef * vec: with one sample vec is that sample's x or grad, and no gradient
// is ever stored; with several it lies in a buffer.
struct GradientRow {
  const float *vec;
  float coef;
  double norm2;  // of vec
};

struct GradientBuffers {
  Scratch<float> x, grad, h, g, coef, gradient;
  Scratch<const float *> x_rows, grad_rows;
  Scratch<const void *> pointers;
  Scratch<void *> out_rows;
  Scratch<GradientRow> rows;
  Scratch<Pair> pairs;
};

struct Samples {
  Rows x, grad;
  const Pair *pairs;  // of one slot, in row order
  int64_t count;
  int64_t rows;             // distinct ones: what the mean divides by
  const Rows *h = nullptr;  // A x where the caller kept it
};

double norm_squared(const Kernels &k, const float *v, int64_t n);

// visit(row number, is_a, slice, rank index) for each row of weights, in
// storage order.
template <class Visit>
void each_row(const AdapterPool &pool, const Block &block, Visit &&visit) {
  int64_t row = 0;
  for (int s = 0; s < pool.num_slices(); ++s)
    for (bool is_a : {true, false})
      for (int32_t j = 0; j < block.ranks[s]; ++j) visit(row++, is_a, s, j);
}

// The mean gradient of one sample, row by row of the weights.
const GradientRow *one_sample(const Kernels &k, const AdapterPool &pool, const Block &block,
                              const Samples &samples, GradientBuffers &b);

// gradient += sum over the samples, in the slot's layout: A, then B's transpose,
// slice by slice.
void add_gradient(const Kernels &k, const AdapterPool &pool, const Block &block,
                  const Samples &samples, float *gradient, GradientBuffers &b);

// scale * gradient, row by row of the weights.
const GradientRow *buffered(const Kernels &k, const AdapterPool &pool, const Block &block,
                            const float *gradient, float scale, GradientBuffers &b);

// The norm over what learns; NaN where the gradient holds NaN or Inf.
double gradient_norm(const AdapterPool &pool, const Block &block, const GradientRow *rows,
                     bool train_A);

}  // namespace le
