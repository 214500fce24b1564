#include "forward.h"

#include <algorithm>

#include "dispatch.h"

namespace le {
namespace {

constexpr int64_t kTileRows = 16;         // rows that share one pass over an adapter's weights
constexpr int64_t kSplitBytes = 1 << 20;  // from here a single tile is worth splitting over threads

// One low-rank product that a tile of rows adds to its output: the rows of
// `down` are dotted with the input, the rows of `up` are added up.
struct Term {
  const char *down, *up;
  int64_t down_stride, up_stride;  // bytes from row to row
  int64_t rank;
  float scale;  // scaling, times the weight where the row is a mixture
};

// Rows computed together, with the same terms.
struct Tile {
  const int64_t *rows;
  int64_t m;
  const float *weights = nullptr;  // one a row, or none
};

struct Buffers {
  Scratch<float> x, h, wide;
  Scratch<const void *> pointers;
  Scratch<const float *> x_rows;
  Scratch<void *> y_rows;
  Scratch<Term> terms;
};
Buffers &buffers() {
  static thread_local Buffers b;
  return b;
}

struct Shape {
  const Kernels *kernels;
  Rows x, y;
  int32_t dtype;  // of the weights
  bool accumulate;
  int64_t in() const { return x.width; }
};

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

const void **row_pointers(const char *first, int64_t stride, int64_t count, const void **to) {
  for (int64_t j = 0; j < count; ++j) to[j] = first + j * stride;
  return to;
}

// h [m, R] = scale * (down x) for ranks [from, to) of the terms laid end to end.
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

// y columns [column, column + n) from columns [at, at + n) of the terms' `up`.
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

// Rows that no adapter touches: their bits stay, or become zeros.
void no_terms(const Shape &shape, const Tile &tile, int64_t column, int64_t n, Buffers &b) {
  if (!shape.accumulate) expand_terms(shape, tile, nullptr, 0, nullptr, 0, 0, column, n, b);
}

// A tile on one thread: shrink, then expand.
void run_tile(const Shape &shape, const Tile &tile, const Term *terms, int64_t count,
              const float *const *x, int64_t column, int64_t n, Buffers &b) {
  int64_t rank = total_rank(terms, count);
  if (rank == 0) return no_terms(shape, tile, column, n, b);
  float *h = b.h.get(tile.m * rank);
  shrink_terms(shape, tile, x, terms, count, 0, rank, h, rank, b);
  expand_terms(shape, tile, terms, count, h, rank, 0, column, n, b);
}

// The same over several threads: ranks are dealt out, then columns. Bit for
// bit the same, since each rank's and each column's sum is its own.
void run_tile_split(Context &context, int threads, const Shape &shape, const Tile &tile,
                    const Term *terms, int64_t count, const float *const *x, int64_t column,
                    int64_t n, Buffers &b) {
  int64_t rank = total_rank(terms, count);
  if (rank == 0) return no_terms(shape, tile, column, n, b);
  float *h = b.h.get(tile.m * rank);
  int64_t rank_step = std::max<int64_t>((rank + 4 * threads - 1) / (4 * threads), 4);
  context.threads.run((rank + rank_step - 1) / rank_step, threads, [&](int64_t task) {
    int64_t from = task * rank_step;
    shrink_terms(shape, tile, x, terms, count, from, std::min(from + rank_step, rank), h, rank,
                 buffers());
  });
  int64_t step = std::max<int64_t>(n / (4 * threads) / 64 * 64, 256);
  context.threads.run((n + step - 1) / step, threads, [&](int64_t task) {
    int64_t at = task * step;
    expand_terms(shape, tile, terms, count, h, rank, at, column + at, std::min(step, n - at),
                 buffers());
  });
}

// Deals tiles to threads: whole tiles where there are enough, else each tile's
// inside. visit(tile_index, run) must call run(tile, terms, count, column, n)
// for every slice of the tile.
template <class Visit>
void run_tiles(Context &context, const Shape &shape, int64_t tiles, int64_t bytes, Visit &&visit) {
  int threads = context.threads_for(bytes);
  bool split = threads > 1 && tiles < 2 * threads && tiles > 0 && bytes / tiles >= kSplitBytes;
  auto whole = [&](int64_t index) {
    Buffers &b = buffers();
    visit(index,
          [&](const Tile &tile, const float *const *x, const Term *terms, int64_t count,
              int64_t column, int64_t n) { run_tile(shape, tile, terms, count, x, column, n, b); });
  };
  if (!split) {
    context.threads.run(tiles, threads, whole);
    return;
  }
  for (int64_t index = 0; index < tiles; ++index) {
    // Held by reference across jobs in which this thread's buffers are reused,
    // so h and the inputs live in buffers of their own.
    static thread_local Buffers held;
    visit(index, [&](const Tile &tile, const float *const *x, const Term *terms, int64_t count,
                     int64_t column, int64_t n) {
      run_tile_split(context, threads, shape, tile, terms, count, x, column, n, held);
    });
  }
}

Term slice_term(const AdapterPool &pool, const SliceView &view, int s, float scale,
                bool transposed) {
  int64_t size = dtype_size(pool.dtype());
  int64_t a_stride = pool.in_features() * size, bt_stride = pool.slice_out(s) * size;
  if (transposed) return {view.bt, view.a, bt_stride, a_stride, view.rank, scale};
  return {view.a, view.bt, a_stride, bt_stride, view.rank, scale};
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

}  // namespace

// ---- op 1 -----------------------------------------------------------------------

namespace {

struct PackMemory {
  Scratch<float> words;
  Scratch<uint16_t> halves;
};

template <class T>
void pack(const Rows &m, T *to) {
  const T *from = reinterpret_cast<const T *>(m.data);
  constexpr int64_t kBlock = 64;  // columns at a time: a transpose reads each line once
  for (int64_t j0 = 0; j0 < m.width; j0 += kBlock) {
    int64_t j1 = std::min(j0 + kBlock, m.width);
    for (int64_t i = 0; i < m.n; ++i)
      for (int64_t j = j0; j < j1; ++j)
        to[i * m.width + j] = from[i * m.row_stride + j * m.col_stride];
  }
}

// The rows of a matrix, made contiguous where they are not (a transpose's rows
// are its matrix's columns).
const char *packed_rows(const Rows &m, PackMemory &memory, int64_t *stride) {
  int64_t size = dtype_size(m.dtype);
  if (m.contiguous_rows()) {
    *stride = m.row_stride * size;
    return m.data;
  }
  *stride = m.width * size;
  if (m.dtype == LE_FLOAT32) {
    float *to = memory.words.get(m.n * m.width);
    pack(m, to);
    return reinterpret_cast<const char *>(to);
  }
  uint16_t *to = memory.halves.get(m.n * m.width);
  pack(m, to);
  return reinterpret_cast<const char *>(to);
}

}  // namespace

void lora_delta(Context &context, const le_array *x, const le_array *A, const le_array *B,
                float scaling, bool accumulate, const le_array *y) {
  const char *op = "lora_delta";
  Rows a = float_matrix(op, "A", A, -1, -1, "[r, in]");
  Rows b = float_matrix(op, "B", B, -1, a.n, "[out, r]");
  check_dtype(op, "B", b.dtype, a.dtype, ", the dtype of A");
  check_finite(op, "scaling", scaling);
  Shape shape = checked_shape(op, x, a.width, "[n, in]", y, b.n, "[n, out]", a.dtype, accumulate);
  check_overlap(op, "out", shape.y, "A", a);
  check_overlap(op, "out", shape.y, "B", b);
  if (shape.x.n == 0 || b.n == 0) return;

  static thread_local PackMemory a_memory, b_memory;
  static thread_local Scratch<int64_t> row_memory;
  Rows bt = b;
  std::swap(bt.n, bt.width);
  std::swap(bt.row_stride, bt.col_stride);
  int64_t a_stride, bt_stride;
  const char *down = packed_rows(a, a_memory, &a_stride);
  const char *up = packed_rows(bt, b_memory, &bt_stride);
  Term term{down, up, a_stride, bt_stride, a.n, scaling};
  const int64_t *rows = row_numbers(shape.x.n, row_memory);
  int64_t tiles = (shape.x.n + kTileRows - 1) / kTileRows;
  int64_t bytes = shape.x.n * a.n * (a.width + b.n) * dtype_size(a.dtype);
  run_tiles(context, shape, tiles, bytes, [&](int64_t index, auto &&run) {
    Tile tile{rows + index * kTileRows, std::min(kTileRows, shape.x.n - index * kTileRows)};
    run(tile, tile_inputs(shape, tile, buffers()), &term, 1, 0, shape.y.width);
  });
}

// ---- op 2 -----------------------------------------------------------------------

void pool_forward_slot(AdapterPool &pool, int32_t id, const le_array *x, bool transposed,
                       bool accumulate, const le_array *y) {
  const char *op = "batched_lora_delta";
  int64_t in = pool.in_features(), out = pool.out_features();
  if (transposed && pool.num_slices() > 1)
    fail(LE_ERROR_UNSUPPORTED, "%s: transposed: expected a pool of one slice, got %d", op,
         pool.num_slices());
  Shape shape =
      transposed
          ? checked_shape(op, x, out, "[n, out]", y, in, "[n, in]", pool.dtype(), accumulate)
          : checked_shape(op, x, in, "[n, in]", y, out, "[n, out]", pool.dtype(), accumulate);
  SharedSlots held(op, pool, &id, 1);
  if (shape.x.n == 0) return;
  const Block &block = *pool.slot(id).current;
  static thread_local Scratch<int64_t> row_memory;
  const int64_t *rows = row_numbers(shape.x.n, row_memory);
  int64_t tiles = (shape.x.n + kTileRows - 1) / kTileRows;
  int64_t bytes = shape.x.n * pool.elements(block) * dtype_size(pool.dtype());
  run_tiles(pool.context(), shape, tiles, bytes, [&](int64_t index, auto &&run) {
    Tile tile{rows + index * kTileRows, std::min(kTileRows, shape.x.n - index * kTileRows)};
    const float *const *all = tile_inputs(shape, tile, buffers());
    int64_t column = 0;
    for (int s = 0; s < pool.num_slices(); ++s) {
      Term term = slice_term(pool, pool.slice(block, s), s, block.scaling, transposed);
      int64_t n = transposed ? in : pool.slice_out(s);
      run(tile, all, &term, 1, column, n);
      column += n;
    }
  });
}

namespace {

// A tile's rows all name the same single adapter, or it is one row's mixture.
struct PairTile {
  int64_t first, pairs;  // into Batch::pairs
  int64_t m;             // rows
};

// Cuts sorted pairs into tiles of one adapter.
int64_t cut_by_slot(const Batch &batch, PairTile *tiles) {
  int64_t count = 0;
  for (int64_t p = 0; p < batch.count;) {
    int64_t end = p + 1;
    while (end < batch.count && end - p < kTileRows && batch.pairs[end].slot == batch.pairs[p].slot)
      ++end;
    tiles[count++] = {p, end - p, end - p};
    p = end;
  }
  return count;
}

// Cuts pairs in row order into tiles of one row.
int64_t cut_by_row(const Batch &batch, PairTile *tiles) {
  int64_t count = 0;
  for (int64_t p = 0; p < batch.count;) {
    int64_t end = p + 1;
    while (end < batch.count && batch.pairs[end].row == batch.pairs[p].row) ++end;
    tiles[count++] = {p, end - p, 1};
    p = end;
  }
  return count;
}

}  // namespace

void pool_forward(AdapterPool &pool, const le_array *x, const le_array *ids,
                  const le_array *weights, bool accumulate, const le_array *y) {
  const char *op = "batched_lora_delta";
  Shape shape = checked_shape(op, x, pool.in_features(), "[n, in]", y, pool.out_features(),
                              "[n, out]", pool.dtype(), accumulate);
  static thread_local Batch batch;
  static thread_local Scratch<PairTile> tile_memory;
  static thread_local Scratch<int64_t> row_memory;
  static thread_local Scratch<float> weight_memory;
  read_batch(op, pool, ids, weights, shape.x.n, Order::kMixturesByRow, &batch);
  SharedSlots held(op, pool, batch.slots, batch.slot_count);

  PairTile *tiles = tile_memory.get(batch.count);
  int64_t count = batch.mixtures ? cut_by_row(batch, tiles) : cut_by_slot(batch, tiles);
  int64_t *rows = row_memory.get(batch.count);
  float *row_weights = weight_memory.get(batch.count);
  int64_t elements = 0;
  for (int64_t p = 0; p < batch.count; ++p) {
    rows[p] = batch.pairs[p].row;
    row_weights[p] = batch.pairs[p].weight;
    elements += pool.elements(*pool.slot(batch.pairs[p].slot).current);
  }
  if (!accumulate) {
    // Rows without an adapter; the others are overwritten by their tile.
    static thread_local Scratch<uint8_t> seen_memory;
    uint8_t *seen = seen_memory.get(shape.x.n);
    std::fill(seen, seen + shape.x.n, uint8_t(0));
    for (int64_t p = 0; p < batch.count; ++p) seen[rows[p]] = 1;
    for (int64_t i = 0; i < shape.x.n; ++i)
      if (!seen[i]) no_terms(shape, {&i, 1}, 0, shape.y.width, buffers());
  }
  const Pair *pairs = batch.pairs;
  bool mixtures = batch.mixtures;

  run_tiles(pool.context(), shape, count, elements * dtype_size(pool.dtype()),
            [&](int64_t index, auto &&run) {
              const PairTile &cut = tiles[index];
              Tile tile{rows + cut.first, cut.m, mixtures ? nullptr : row_weights + cut.first};
              const float *const *all = tile_inputs(shape, tile, buffers());
              int64_t adapters = mixtures ? cut.pairs : 1;
              Term *terms = buffers().terms.get(adapters);
              int64_t column = 0;
              for (int s = 0; s < pool.num_slices(); ++s) {
                for (int64_t a = 0; a < adapters; ++a) {
                  const Pair &pair = pairs[cut.first + a];
                  const Block &block = *pool.slot(pair.slot).current;
                  float scale = mixtures ? pair.weight * block.scaling : block.scaling;
                  terms[a] = slice_term(pool, pool.slice(block, s), s, scale, false);
                }
                run(tile, all, terms, adapters, column, pool.slice_out(s));
                column += pool.slice_out(s);
              }
            });
}

void pool_shrink(AdapterPool &pool, int32_t id, const le_array *x, const le_array *h) {
  const char *op = "AdapterPool.shrink";
  Rows rows = float_matrix(op, "x", x, -1, pool.in_features(), "[n, in]");
  SharedSlots held(op, pool, &id, 1);
  const Block &block = *pool.slot(id).current;
  int64_t rank = 0;
  for (int s = 0; s < pool.num_slices(); ++s) rank += block.ranks[s];
  Rows out = matrix(op, "h", h, rows.n, rank, "[n, sum of ranks]");
  check_dtype(op, "h", out.dtype, LE_FLOAT32, "");
  check_output(op, "h", h, out);
  check_overlap(op, "h", out, "x", rows);
  Shape shape{&kernels(), rows, out, pool.dtype(), false};
  Buffers &b = buffers();
  Scratch<float> row;
  for (int64_t i = 0; i < rows.n; ++i) {
    Tile tile{&i, 1};
    const float **inputs = tile_inputs(shape, tile, b);
    float *to = row.get(rank);
    int64_t at = 0;
    for (int s = 0; s < pool.num_slices(); ++s) {
      Term term = slice_term(pool, pool.slice(block, s), s, 1.0f, false);
      shrink_terms(shape, tile, inputs, &term, 1, 0, term.rank, to + at, rank, b);
      at += term.rank;
    }
    store_row(*shape.kernels, out, i, 0, rank, to, false);
  }
}

}  // namespace le
