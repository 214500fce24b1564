#include "fisher.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace le {
namespace {

// Samples whose squares are summed in float32; the blocks' sums are added up in
// float64, in order, so that no thread count and no number of samples shows.
constexpr int64_t kBlockSamples = 64;
// Rows that are read twice, for h and g and then for their squares, stay in the L2.
constexpr int64_t kTileBytes = 256 * 1024;
constexpr int64_t kWaveBytes = 16 << 20;  // of blocks that wait to be added up
constexpr int64_t kMergeStep = 4096;      // elements of one task

// The sums of one call: for each rank the sum over in, then for each over out.
struct Sums {
  const Kernels &k;
  Rows x{}, grad{};
  bool weighted = false;                    // else all weights are 1
  const float *a = nullptr, *bt = nullptr;  // [rank, in], [rank, out]
  int64_t rank = 1;
  float scaling = 1.0f;
  const int32_t *offsets = nullptr;       // of samples of several rows
  const int64_t *block_starts = nullptr;  // the blocks' first samples, where there are offsets
  int64_t blocks = 0;

  int64_t in() const { return x.width; }
  int64_t out() const { return grad.width; }
  int64_t size() const { return rank * (in() + out()); }
  // How many rows a tile has. Those of more that do not fit the L1 together, a power
  // of two apart, would contend for the same 8 of its ways.
  int64_t rows_a_tile() const {
    return kProjectRows * 4 * (in() + out()) <= kTileBytes ? kProjectRows : kProjectRows / 2;
  }
};

struct Buffers {
  Scratch<float> x, grad, weights, sample;
  Scratch<const float *> x_rows, grad_rows;
  Scratch<void *> targets;
};
Buffers &buffers() {
  LE_PER_THREAD(Buffers, b);
  return b;
}

// Rows [first, first + m) as contiguous float32.
const float *const *tile_rows(const Sums &s, const Rows &from, int64_t first, int64_t m,
                              Scratch<float> &copies, Scratch<const float *> &pointers) {
  const float **rows = pointers.get(m);
  float *copy = copies.get(m * from.width);
  for (int64_t i = 0; i < m; ++i) rows[i] = float_row(s.k, from, first + i, copy + i * from.width);
  return rows;
}

// What each rank weighs the rows of a tile with, [rank, m]: scaling * the dot
// products with `factor` [rank, n], or their squares.
const float *tile_weights(const Sums &s, const float *const *rows, int64_t m, const float *factor,
                          int64_t n, bool squared, Buffers &b) {
  float *weights = b.weights.get(s.rank * m);
  if (!s.weighted) {
    std::fill(weights, weights + m, 1.0f);
    return weights;
  }
  s.k.project(m, rows, s.rank, factor, n, weights);
  for (int64_t i = 0; i < s.rank * m; ++i) {
    float w = s.scaling * weights[i];
    weights[i] = squared ? w * w : w;
  }
  return weights;
}

void **target_rows(const Sums &s, float *to, int64_t n, Buffers &b) {
  void **targets = b.targets.get(s.rank);
  for (int64_t j = 0; j < s.rank; ++j) targets[j] = to + j * n;
  return targets;
}

// Adds the gradients of rows [first, first + m) to `to`, or their squares.
void add_tile(const Sums &s, int64_t first, int64_t m, bool squared, bool accumulate, float *to,
              Buffers &b) {
  const float *const *x = tile_rows(s, s.x, first, m, b.x, b.x_rows);
  const float *const *grad = tile_rows(s, s.grad, first, m, b.grad, b.grad_rows);
  ExpandFn add = squared ? s.k.expand_squares : s.k.expand[LE_FLOAT32][LE_FLOAT32];
  auto as_void = [](const float *const *rows) {
    return reinterpret_cast<const void *const *>(rows);
  };
  const float *g = tile_weights(s, grad, m, s.bt, s.out(), squared, b);
  add(s.rank, m, g, m, as_void(x), s.in(), target_rows(s, to, s.in(), b), accumulate);
  const float *h = tile_weights(s, x, m, s.a, s.in(), squared, b);
  float *to_out = to + s.rank * s.in();
  add(s.rank, m, h, m, as_void(grad), s.out(), target_rows(s, to_out, s.out(), b), accumulate);
}

// Each row a sample.
void add_rows(const Sums &s, int64_t first, int64_t last, float *to, Buffers &b) {
  for (int64_t step = s.rows_a_tile(); first < last; first += step)
    add_tile(s, first, std::min(step, last - first), true, true, to, b);
}

// All rows one sample: its gradient is summed, then squared.
void add_sample(const Sums &s, int64_t first, int64_t last, float *to, Buffers &b) {
  if (first == last) return;
  float *sample = b.sample.get(s.size());
  int64_t step = s.rows_a_tile();
  for (int64_t row = first; row < last; row += step)
    add_tile(s, row, std::min(step, last - row), false, row > first, sample, b);
  s.k.accumulate_squares[LE_FLOAT32][LE_FLOAT32](s.size(), 1.0f, 1.0f, sample, to);
}

void sum_block(const Sums &s, int64_t block, float *to, Buffers &b) {
  std::fill(to, to + s.size(), 0.0f);
  if (!s.offsets) {
    int64_t first = block * kBlockSamples;
    return add_rows(s, first, std::min(first + kBlockSamples, s.x.n), to, b);
  }
  int64_t last = s.block_starts[block + 1];
  for (int64_t sample = s.block_starts[block]; sample < last; ++sample) {
    int64_t first = sample;
    while (sample < last && s.offsets[sample + 1] - s.offsets[sample] == 1) ++sample;
    add_rows(s, s.offsets[first], s.offsets[sample], to, b);
    if (sample < last) add_sample(s, s.offsets[sample], s.offsets[sample + 1], to, b);
  }
}

// A block ends at its 64th sample, or where it has 64 rows.
std::vector<int64_t> cut_blocks(const std::vector<int32_t> &offsets) {
  std::vector<int64_t> starts{0};
  int64_t samples = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t i = 0; i < samples; ++i) {
    int64_t begin = starts.back();
    if (i - begin >= kBlockSamples || offsets[i] - offsets[begin] >= kBlockSamples)
      starts.push_back(i);
  }
  if (samples) starts.push_back(samples);
  return starts;
}

// The sums over all samples, [size]. Valid until this thread's next call.
const double *sum_all(Context &context, const Sums &s) {
  struct Memory {
    Scratch<double> total;
    Scratch<float> blocks;
  };
  LE_PER_THREAD(Memory, memory);
  int64_t size = s.size();
  double *total = memory.total.get(size);
  std::fill(total, total + size, 0.0);
  if (!size || !s.blocks) return total;
  int threads = context.threads_for(s.x.n * (s.in() + s.out()) * dtype_size(s.x.dtype));
  int64_t wave = std::clamp<int64_t>(kWaveBytes / (size * 4), threads, 4 * int64_t(threads));
  wave = std::min(wave, s.blocks);
  float *blocks = memory.blocks.get(wave * size);
  for (int64_t first = 0; first < s.blocks; first += wave) {
    int64_t count = std::min(wave, s.blocks - first);
    context.threads.run(count, threads,
                        [&](int64_t i) { sum_block(s, first + i, blocks + i * size, buffers()); });
    int64_t steps = (size + kMergeStep - 1) / kMergeStep;
    context.threads.run(steps, context.threads_for(count * size * 4), [&](int64_t step) {
      int64_t begin = step * kMergeStep, end = std::min(begin + kMergeStep, size);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t e = begin; e < end; ++e) total[e] += blocks[i * size + e];
    });
  }
  return total;
}

template <class T>
void store_row_sums(T *to, int64_t step, const double *sum, int64_t sum_step, int64_t n,
                    bool accumulate) {
  if (step == 1 && sum_step == 1 && !accumulate) {
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(sum[j]);
    return;
  }
  for (int64_t j = 0; j < n; ++j, to += step, sum += sum_step)
    *to = static_cast<T>(accumulate ? double(*to) + *sum : *sum);
}

// out[i][j] = or += sum[i * row_step + j * col_step], along the longer side.
void write_sums(Rows out, const double *sum, int64_t row_step, int64_t col_step, bool accumulate) {
  if (out.n > out.width) {
    out = transposed(out);
    std::swap(row_step, col_step);
  }
  for (int64_t i = 0; i < out.n; ++i, sum += row_step) {
    if (out.dtype == LE_FLOAT64)
      store_row_sums(reinterpret_cast<double *>(out.row(i)), out.col_stride, sum, col_step,
                     out.width, accumulate);
    else
      store_row_sums(reinterpret_cast<float *>(out.row(i)), out.col_stride, sum, col_step,
                     out.width, accumulate);
  }
}

struct Named {
  const char *name;
  const Rows *rows;
};

Rows sum_output(const char *op, const char *arg, const le_array *out, int64_t rows, int64_t width,
                const char *symbols, std::initializer_list<Named> inputs) {
  Rows r = matrix(op, arg, out, rows, width, symbols);
  if (r.dtype != LE_FLOAT32 && r.dtype != LE_FLOAT64)
    fail(LE_ERROR_TYPE, "%s: %s: expected float64 or float32, got %s", op, arg,
         dtype_name(r.dtype));
  check_output(op, arg, out, r);
  for (const Named &input : inputs) check_overlap(op, arg, r, input.name, *input.rows);
  return r;
}

// The offsets [S+1] of samples in n rows, copied: nobody can change them after the check.
std::vector<int32_t> read_segments(const char *op, const le_array *segments, int64_t n,
                                   Rows *rows) {
  *rows = matrix(op, "segments", segments, 1, -1, "[S+1]");
  check_dtype(op, "segments", rows->dtype, LE_INT32, "");
  if (segments->ndim != 1 || rows->width < 1)
    fail(LE_ERROR_VALUE,
         "%s: segments: expected offsets [S+1], at least one, got %d dimensions of %lld", op,
         segments->ndim, static_cast<long long>(rows->width));
  std::vector<int32_t> offsets(static_cast<size_t>(rows->width));
  for (size_t i = 0; i < offsets.size(); ++i)
    std::memcpy(&offsets[i], rows->at(0, static_cast<int64_t>(i)), sizeof(int32_t));
  if (offsets.front() != 0)
    fail(LE_ERROR_VALUE, "%s: segments: expected 0 first, got %d", op, offsets.front());
  for (size_t i = 1; i < offsets.size(); ++i)
    if (offsets[i] < offsets[i - 1])
      fail(LE_ERROR_VALUE, "%s: segments: expected ascending offsets, got %d after %d at %zu", op,
           offsets[i], offsets[i - 1], i);
  if (offsets.back() != n)
    fail(LE_ERROR_VALUE, "%s: segments: expected the number of rows last, %lld, got %d", op,
         static_cast<long long>(n), offsets.back());
  return offsets;
}

// to [n, width] = the matrix as float32, read along its memory; a few rows one by
// one, since a column would be too short to be worth it.
constexpr int64_t kFewRows = 16;
const float *float_copy(const Kernels &k, const Rows &m, Scratch<float> &memory) {
  float *to = memory.get(m.n * m.width);
  if (std::abs(m.col_stride) <= std::abs(m.row_stride) || m.n <= kFewRows) {
    for (int64_t i = 0; i < m.n; ++i) load_row(k, m, i, 0, m.width, to + i * m.width);
    return to;
  }
  LE_PER_THREAD(Scratch<float>, column_memory);
  float *column = column_memory.get(m.n);
  Rows columns = transposed(m);
  for (int64_t j = 0; j < m.width; ++j) {
    load_row(k, columns, j, 0, m.n, column);
    for (int64_t i = 0; i < m.n; ++i) to[i * m.width + j] = column[i];
  }
  return to;
}

void read_rows(const char *op, const le_array *x, int64_t in, const le_array *grad, int64_t out,
               Sums *s) {
  s->x = float_matrix(op, "x", x, -1, in, "[n, in]");
  s->grad = float_matrix(op, "grad", grad, s->x.n, out, "[n, out]");
  check_dtype(op, "grad", s->grad.dtype, s->x.dtype, ", the dtype of x");
}

// ---- op 5: elementwise ----------------------------------------------------------

constexpr int64_t kPiece = 32 * 1024;  // elements of one task

// Columns [first, first + n) of row i.
void accumulate_piece(const Kernels &k, const Rows &F, const Rows &g, float gamma, float scale,
                      int64_t i, int64_t first, int64_t n) {
  if (F.contiguous_rows() && g.contiguous_rows()) {
    k.accumulate_squares[F.dtype][g.dtype](n, gamma, scale, g.at(i, first), F.at(i, first));
    return;
  }
  constexpr int64_t kPart = 1024;
  float before[kPart], gradient[kPart];
  for (int64_t j = 0; j < n; j += kPart) {
    int64_t count = std::min(kPart, n - j);
    load_row(k, F, i, first + j, count, before);
    load_row(k, g, i, first + j, count, gradient);
    k.accumulate_squares[LE_FLOAT32][LE_FLOAT32](count, gamma, scale, gradient, before);
    store_row(k, F, i, first + j, count, before, false);
  }
}

bool one_run(const Rows &m) { return m.contiguous_rows() && m.row_stride == m.width; }

}  // namespace

void fisher_accumulate(Context &context, const le_array *F, const le_array *g, float gamma,
                       float scale) {
  const char *op = "fisher_accumulate";
  Rows to = float_matrix(op, "F", F, -1, -1, "[n, m]");
  Rows from = float_matrix(op, "g", g, to.n, to.width, "like F");
  check_output(op, "F", F, to);
  check_overlap(op, "F", to, "g", from);
  check_finite(op, "gamma", gamma);
  check_finite(op, "scale", scale);
  if (!to.n || !to.width) return;

  if (std::abs(to.row_stride) < std::abs(to.col_stride)) {  // elements in the order of memory
    to = transposed(to);
    from = transposed(from);
  }
  if (one_run(to) && one_run(from)) {
    to.width = from.width = to.n * to.width;
    to.n = from.n = 1;
  }
  const Kernels &k = kernels();
  int64_t columns = std::min(to.width, kPiece), rows = std::min(to.n, kPiece / columns);
  int64_t across = (to.width + columns - 1) / columns, down = (to.n + rows - 1) / rows;
  int64_t bytes = to.n * to.width * (2 * dtype_size(to.dtype) + dtype_size(from.dtype));
  context.threads.run(across * down, context.threads_for(bytes), [&](int64_t task) {
    int64_t i = task / across * rows, first = task % across * columns;
    for (int64_t end = std::min(i + rows, to.n); i < end; ++i)
      accumulate_piece(k, to, from, gamma, scale, i, first, std::min(columns, to.width - first));
  });
}

// ---- op 6 -----------------------------------------------------------------------

void lora_fisher(Context &context, const le_array *x, const le_array *grad, const le_array *A,
                 const le_array *B, float scaling, const le_array *segments, bool accumulate,
                 const le_array *F_A, const le_array *F_B) {
  const char *op = "lora_fisher";
  Sums s{kernels()};
  Rows a = float_matrix(op, "A", A, -1, -1, "[r, in]");
  check_rank(op, a.n);
  Rows b = float_matrix(op, "B", B, -1, a.n, "[out, r]");
  check_dtype(op, "B", b.dtype, a.dtype, ", the dtype of A");
  read_rows(op, x, a.width, grad, b.n, &s);
  check_finite(op, "scaling", scaling);
  Rows segment_row{};
  std::vector<int32_t> offsets;
  std::vector<int64_t> starts;
  s.blocks = (s.x.n + kBlockSamples - 1) / kBlockSamples;
  if (present(segments)) {
    offsets = read_segments(op, segments, s.x.n, &segment_row);
    starts = cut_blocks(offsets);
    s.offsets = offsets.data();
    s.block_starts = starts.data();
    s.blocks = static_cast<int64_t>(starts.size()) - 1;
  }
  std::initializer_list<Named> inputs = {
      {"x", &s.x}, {"grad", &s.grad}, {"A", &a}, {"B", &b}, {"segments", &segment_row}};
  Rows f_a = sum_output(op, "F_A", F_A, a.n, a.width, "[r, in]", inputs);
  Rows f_b = sum_output(op, "F_B", F_B, b.n, a.n, "[out, r]", inputs);
  check_overlap(op, "F_B", f_b, "F_A", f_a);

  LE_PER_THREAD(Scratch<float>, a_memory);
  LE_PER_THREAD(Scratch<float>, b_memory);
  s.a = float_copy(s.k, a, a_memory);
  s.bt = float_copy(s.k, transposed(b), b_memory);
  s.weighted = true;
  s.rank = a.n;
  s.scaling = scaling;
  const double *total = sum_all(context, s);
  write_sums(f_a, total, s.in(), 1, accumulate);
  write_sums(f_b, total + s.rank * s.in(), 1, s.out(), accumulate);
}

void lora_fisher_factors(Context &context, const le_array *x, const le_array *grad, bool accumulate,
                         const le_array *u, const le_array *v) {
  const char *op = "lora_fisher_factors";
  Sums s{kernels()};
  read_rows(op, x, -1, grad, -1, &s);
  std::initializer_list<Named> inputs = {{"x", &s.x}, {"grad", &s.grad}};
  Rows u_row = sum_output(op, "u", u, 1, s.out(), "[out]", inputs);
  Rows v_row = sum_output(op, "v", v, 1, s.in(), "[in]", inputs);
  check_overlap(op, "v", v_row, "u", u_row);
  s.blocks = (s.x.n + kBlockSamples - 1) / kBlockSamples;
  const double *total = sum_all(context, s);
  write_sums(v_row, total, 0, 1, accumulate);
  write_sums(u_row, total + s.in(), 0, 1, accumulate);
}

}  // namespace le
