#include "gradient.h"

#include <algorithm>
#include <cmath>

namespace le {
namespace {

// Rows whose gradients are added up in one pass. Fixed: it sets the order of
// summation of an adapter's rows.
constexpr int64_t kChunkRows = 64;

// to [count, rank] = the dot products of the inputs with rows of weights.
void dots(const Kernels &k, int32_t dtype, const float *const *inputs, int64_t count,
          const char *weights, int64_t length, int64_t rank, float *to, GradientBuffers &b) {
  const void **rows = b.pointers.get(rank);
  for (int64_t j = 0; j < rank; ++j) rows[j] = weights + j * length * dtype_size(dtype);
  k.shrink[dtype](count, inputs, rank, rows, length, rank, to, rank);
}

// The same for one input, and the input's squared norm: with float32 weights in
// one pass, the input being one more row.
double dots_and_norm(const Kernels &k, int32_t dtype, const float *input, const char *weights,
                     int64_t length, int64_t rank, float *to, GradientBuffers &b) {
  if (dtype != LE_FLOAT32) {
    dots(k, dtype, &input, 1, weights, length, rank, to, b);
    return norm_squared(k, input, length);
  }
  const void **rows = b.pointers.get(rank + 1);
  for (int64_t j = 0; j < rank; ++j) rows[j] = weights + j * length * dtype_size(dtype);
  rows[rank] = input;
  k.shrink[dtype](1, &input, rank + 1, rows, length, rank, to, rank + 1);
  return std::isfinite(to[rank]) ? to[rank] : norm_squared(k, input, length);
}

// h [count, rank] = A x and g [count, rank] = B^T grad of one slice.
void project(const Kernels &k, const AdapterPool &pool, const SliceView &view, int s,
             const Samples &samples, int64_t first, int64_t count, int64_t rank_before,
             const float *const *x, const float **grad, float *h, float *g, GradientBuffers &b) {
  if (samples.h) {
    for (int64_t p = 0; p < count; ++p)
      load_row(k, *samples.h, samples.pairs[first + p].row, rank_before, view.rank,
               h + p * view.rank);
  } else {
    dots(k, pool.dtype(), x, count, view.a, pool.in_features(), view.rank, h, b);
  }
  dots(k, pool.dtype(), grad, count, view.bt, pool.slice_out(s), view.rank, g, b);
}

// Contiguous float32 rows of samples [first, first + count).
const float **sample_rows(const Kernels &k, const Rows &from, const Samples &samples, int64_t first,
                          int64_t count, Scratch<float> &copies, Scratch<const float *> &rows) {
  const float **to = rows.get(count);
  float *copy = copies.get(count * from.width);
  for (int64_t p = 0; p < count; ++p)
    to[p] = float_row(k, from, samples.pairs[first + p].row, copy + p * from.width);
  return to;
}

}  // namespace

double norm_squared(const Kernels &k, const float *v, int64_t n) {
  const void *self = v;
  float sum;
  k.shrink[LE_FLOAT32](1, &v, 1, &self, n, 1, &sum, 1);
  if (std::isfinite(sum)) return sum;
  double wide = 0;  // beyond float32's range squared, or not finite indeed
  for (int64_t i = 0; i < n; ++i) wide += double(v[i]) * double(v[i]);
  return wide;
}

const GradientRow *one_sample(const Kernels &k, const AdapterPool &pool, const Block &block,
                              const Samples &samples, GradientBuffers &b) {
  int64_t in = pool.in_features(), ranks = 0, count = 0;
  for (int s = 0; s < pool.num_slices(); ++s) ranks += block.ranks[s];
  GradientRow *to = b.rows.get(2 * ranks);
  const float *x = sample_rows(k, samples.x, samples, 0, 1, b.x, b.x_rows)[0];
  const float *grad = sample_rows(k, samples.grad, samples, 0, 1, b.grad, b.grad_rows)[0];
  for (int s = 0; s < pool.num_slices(); grad += pool.slice_out(s), ++s) {
    SliceView view = pool.slice(block, s);
    if (!view.rank) continue;
    int64_t rank = view.rank;
    float *h = b.h.get(rank + 1), *g = b.g.get(rank + 1);
    double x_norm2 = dots_and_norm(k, pool.dtype(), x, view.a, in, rank, h, b);
    double grad_norm2 =
        dots_and_norm(k, pool.dtype(), grad, view.bt, pool.slice_out(s), rank, g, b);
    float scale = samples.pairs[0].weight * block.scaling / static_cast<float>(samples.rows);
    for (int64_t j = 0; j < rank; ++j) to[count++] = {x, scale * g[j], x_norm2};
    for (int64_t j = 0; j < rank; ++j) to[count++] = {grad, scale * h[j], grad_norm2};
  }
  return to;
}

void add_gradient(const Kernels &k, const AdapterPool &pool, const Block &block,
                  const Samples &samples, float *gradient, GradientBuffers &b) {
  int64_t in = pool.in_features();
  for (int64_t first = 0; first < samples.count; first += kChunkRows) {
    int64_t count = std::min(kChunkRows, samples.count - first);
    const float **x = sample_rows(k, samples.x, samples, first, count, b.x, b.x_rows);
    const float **grad = sample_rows(k, samples.grad, samples, first, count, b.grad, b.grad_rows);
    int64_t rank_before = 0;
    for (int s = 0; s < pool.num_slices(); ++s) {
      SliceView view = pool.slice(block, s);
      int64_t out = pool.slice_out(s), rank = view.rank;
      if (rank) {
        float *h = b.h.get(count * rank), *g = b.g.get(count * rank);
        project(k, pool, view, s, samples, first, count, rank_before, x, grad, h, g, b);
        rank_before += rank;
        float *coef = b.coef.get(count * rank);
        void **rows = b.out_rows.get(rank);
        auto add = [&](const float *factor, const float *const *vectors, int64_t length,
                       float *to) {
          for (int64_t j = 0; j < rank; ++j) {
            rows[j] = to + j * length;
            for (int64_t p = 0; p < count; ++p)
              coef[j * count + p] =
                  samples.pairs[first + p].weight * block.scaling * factor[p * rank + j];
          }
          k.expand[LE_FLOAT32][LE_FLOAT32](rank, count, coef, count,
                                           reinterpret_cast<const void *const *>(vectors), length,
                                           rows, 1);
        };
        add(g, x, in, gradient + view.element);
        add(h, grad, out, gradient + view.element + rank * in);
      }
      for (int64_t p = 0; p < count; ++p) grad[p] += out;
    }
  }
}

const GradientRow *buffered(const Kernels &k, const AdapterPool &pool, const Block &block,
                            const float *gradient, float scale, GradientBuffers &b) {
  int64_t ranks = 0;
  for (int s = 0; s < pool.num_slices(); ++s) ranks += block.ranks[s];
  GradientRow *to = b.rows.get(2 * ranks);
  int64_t count = 0;
  for (int s = 0; s < pool.num_slices(); ++s) {
    for (int64_t length : {pool.in_features(), pool.slice_out(s)}) {
      for (int32_t j = 0; j < block.ranks[s]; ++j, gradient += length)
        to[count++] = {gradient, scale, norm_squared(k, gradient, length)};
    }
  }
  return to;
}

double gradient_norm(const AdapterPool &pool, const Block &block, const GradientRow *rows,
                     bool train_A) {
  double total = 0;
  each_row(pool, block, [&](int64_t i, bool is_a, int, int32_t) {
    if (is_a && !train_A) return;
    double coef = rows[i].coef;
    total += coef * coef * rows[i].norm2;
  });
  double norm = std::sqrt(total);
  return norm <= 3.4028234663852886e38 ? norm : NAN;
}

}  // namespace le
