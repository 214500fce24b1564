#include "tiles.h"

#include "dispatch.h"

namespace le {
namespace {

const void **row_pointers(const char *first, int64_t stride, int64_t count, const void **to) {
  for (int64_t j = 0; j < count; ++j) to[j] = first + j * stride;
  return to;
}

constexpr int64_t kRowsToShare = 8;         // from here rows pay for what is done for all of them
constexpr int64_t kInnerBytes = 20 << 10;   // of `down`: it leaves room in the L1 for two rows of x
constexpr int64_t kAheadBytes = 256 << 10;  // of `up`: half of an L2

// Asks for rows of memory that are needed soon, a part at a time: all at once would wait for
// itself.
class Ahead {
 public:
  Ahead(const char *rows, int64_t stride, int64_t count, int64_t bytes)
      : rows_(rows), stride_(stride), bytes_(bytes) {
    left_ = std::min(count * bytes, kAheadBytes) / kLine;
  }
  // The next of so many parts, that many being left with this one.
  void fetch(int64_t parts) {
    int64_t lines = left_ / parts;
    left_ -= lines;
    for (; lines > 0; --lines) {
      __builtin_prefetch(rows_ + row_ + column_, 0, 2);
      column_ += kLine;
      if (column_ < bytes_) continue;
      column_ = 0;
      row_ += stride_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char *rows_;
  int64_t stride_, bytes_, left_, row_ = 0, column_ = 0;
};

}  // namespace

Buffers &buffers() {
  LE_PER_THREAD(Buffers, b);
  return b;
}

const float **tile_inputs(const Shape &shape, const Tile &tile, Buffers &b) {
  const float **x = b.x_rows.get(tile.m);
  float *copies = b.x.get(tile.m * shape.in());
  for (int64_t i = 0; i < tile.m; ++i)
    x[i] = float_row(*shape.kernels, shape.x, tile.rows[i], copies + i * shape.in());
  return x;
}

int64_t total_rank(const Term *terms, int64_t count) {
  int64_t rank = 0;
  for (int64_t t = 0; t < count; ++t) rank += terms[t].rank;
  return rank;
}

void shrink_terms(const Shape &shape, const Tile &tile, const float *const *x, const Term *terms,
                  int64_t count, int64_t from, int64_t to, float *h, int64_t ldh, Buffers &b) {
  int64_t base = 0;
  for (int64_t t = 0; t < count; base += terms[t].rank, ++t) {
    const Term &term = terms[t];
    int64_t first = std::max(from - base, int64_t(0)), last = std::min(to - base, term.rank);
    if (first >= last) continue;
    const void **a = row_pointers(term.down + first * term.down_stride, term.down_stride,
                                  last - first, b.pointers.get(last - first));
    float *part = h + base + first;
    shape.kernels->shrink[shape.dtype](tile.m, x, last - first, a, shape.in(), term.rank, part,
                                       ldh);
    for (int64_t i = 0; i < tile.m; ++i) {
      float scale = tile.weights ? tile.weights[i] * term.scale : term.scale;
      for (int64_t j = 0; j < last - first; ++j) part[i * ldh + j] *= scale;
    }
  }
}

void expand_terms(const Shape &shape, const Tile &tile, const Term *terms, int64_t count,
                  const float *h, int64_t ldh, int64_t at, int64_t column, int64_t n, Buffers &b) {
  int64_t rank = total_rank(terms, count);
  const void **up = b.pointers.get(rank);
  int64_t base = 0;
  for (int64_t t = 0; t < count; base += terms[t].rank, ++t)
    row_pointers(terms[t].up + at * dtype_size(shape.dtype), terms[t].up_stride, terms[t].rank,
                 up + base);
  void **y = b.y_rows.get(tile.m);
  if (shape.y.contiguous_rows()) {
    for (int64_t i = 0; i < tile.m; ++i) y[i] = shape.y.at(tile.rows[i], column);
    shape.kernels->expand[shape.dtype][shape.y.dtype](tile.m, rank, h, ldh, up, n, y,
                                                      shape.accumulate);
    return;
  }
  float *wide = b.wide.get(tile.m * n);
  for (int64_t i = 0; i < tile.m; ++i) y[i] = wide + i * n;
  shape.kernels->expand[shape.dtype][LE_FLOAT32](tile.m, rank, h, ldh, up, n, y, 0);
  for (int64_t i = 0; i < tile.m; ++i)
    store_row(*shape.kernels, shape.y, tile.rows[i], column, n, wide + i * n, shape.accumulate);
}

void no_terms(const Shape &shape, const Tile &tile, int64_t column, int64_t n, Buffers &b) {
  if (!shape.accumulate) expand_terms(shape, tile, nullptr, 0, nullptr, 0, 0, column, n, b);
}

namespace {

// shrink_terms of one adapter for many rows: by ranks whose `down` stays in the L1 while the rows
// pass, which meanwhile ask for columns [0, n) of its `up`.
void shrink_rows(const Shape &shape, const Tile &tile, const Term &term, const float *const *x,
                 int64_t n, float *h, Buffers &b) {
  int64_t size = dtype_size(shape.dtype);
  int64_t step = kInnerBytes / std::max<int64_t>(shape.in() * size, 1) / 3 * 3;
  if (step == 0) step = term.rank;
  int64_t passes = std::max<int64_t>((term.rank + step - 2) / step, 1) * ((tile.m + 1) / 2);
  Ahead up(term.up, term.up_stride, term.rank, n * size);
  for (int64_t from = 0, to; from < term.rank; from = to) {
    to = from + step + 1 < term.rank ? from + step : term.rank;  // the last is not left alone
    for (int64_t i = 0; i < tile.m; i += 2) {
      Tile two{tile.rows + i, std::min<int64_t>(2, tile.m - i),
               tile.weights ? tile.weights + i : nullptr};
      shrink_terms(shape, two, x + i, &term, 1, from, to, h + i * term.rank, term.rank, b);
      up.fetch(passes--);
    }
  }
}

}  // namespace

void run_tile(const Shape &shape, const Tile &tile, const Term *terms, int64_t count,
              const float *const *x, int64_t column, int64_t n, Buffers &b) {
  int64_t rank = total_rank(terms, count);
  if (rank == 0) return no_terms(shape, tile, column, n, b);
  float *h = b.h.get(tile.m * rank);
  if (count == 1 && tile.m >= kRowsToShare)
    shrink_rows(shape, tile, *terms, x, n, h, b);
  else
    shrink_terms(shape, tile, x, terms, count, 0, rank, h, rank, b);
  expand_terms(shape, tile, terms, count, h, rank, 0, column, n, b);
}

void shrink_split(Context &context, int threads, const Shape &shape, const Tile &tile,
                  const Term *terms, int64_t count, const float *const *x, float *h) {
  int64_t rank = total_rank(terms, count);
  int64_t step =
      threads > 1 ? std::max<int64_t>((rank + 4 * threads - 1) / (4 * threads), 4) : rank;
  context.threads.run((rank + step - 1) / step, threads, [&](int64_t task) {
    int64_t from = task * step;
    shrink_terms(shape, tile, x, terms, count, from, std::min(from + step, rank), h, rank,
                 buffers());
  });
}

void run_tile_split(Context &context, int threads, const Shape &shape, const Tile &tile,
                    const Term *terms, int64_t count, const float *const *x, int64_t column,
                    int64_t n, Buffers &b) {
  int64_t rank = total_rank(terms, count);
  if (rank == 0) return no_terms(shape, tile, column, n, b);
  float *h = b.h.get(tile.m * rank);
  shrink_split(context, threads, shape, tile, terms, count, x, h);
  int64_t step = std::max<int64_t>(n / (4 * threads) / 64 * 64, 256);
  context.threads.run((n + step - 1) / step, threads, [&](int64_t task) {
    int64_t at = task * step;
    expand_terms(shape, tile, terms, count, h, rank, at, column + at, std::min(step, n - at),
                 buffers());
  });
}

const int64_t *row_numbers(int64_t n, Scratch<int64_t> &memory) {
  int64_t *rows = memory.get(n);
  for (int64_t i = 0; i < n; ++i) rows[i] = i;
  return rows;
}

Shape checked_shape(const char *op, const le_array *x, int64_t in, const char *x_symbols,
                    const le_array *y, int64_t out, const char *y_symbols, int32_t dtype,
                    bool accumulate) {
  Shape shape;
  shape.kernels = &kernels();
  shape.x = float_matrix(op, "x", x, -1, in, x_symbols);
  shape.y = float_matrix(op, "out", y, shape.x.n, out, y_symbols);
  check_dtype(op, "out", shape.y.dtype, shape.x.dtype, ", the dtype of x");
  check_output(op, "out", y, shape.y);
  check_overlap(op, "out", shape.y, "x", shape.x);
  shape.dtype = dtype;
  shape.accumulate = accumulate;
  return shape;
}

}  // namespace le
