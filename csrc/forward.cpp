#include "forward.h"

#include "dispatch.h"
#include "tiles.h"

namespace le {
namespace {

Term slice_term(const AdapterPool &pool, const SliceView &view, int s, float scale,
                bool transposed) {
  int64_t size = dtype_size(pool.dtype());
  int64_t a_stride = pool.in_features() * size, bt_stride = pool.slice_out(s) * size;
  if (transposed) return {view.bt, view.a, bt_stride, a_stride, view.rank, scale};
  return {view.a, view.bt, a_stride, bt_stride, view.rank, scale};
}

}  // namespace

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
  LE_PER_THREAD(Scratch<int64_t>, row_memory);
  const int64_t *rows = row_numbers(shape.x.n, row_memory);
  int64_t step = pool.context().tile_rows(), tiles = (shape.x.n + step - 1) / step;
  int64_t bytes = shape.x.n * pool.elements(block) * dtype_size(pool.dtype());
  run_tiles(pool.context(), shape, tiles, bytes, [&](int64_t index, auto &&run) {
    Tile tile{rows + index * step, std::min(step, shape.x.n - index * step)};
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

// ---- batches ----------------------------------------------------------------

namespace {

// Cuts sorted pairs into tiles of one adapter, of at most so many rows.
int64_t cut_by_slot(const Batch &batch, int64_t rows, PairTile *tiles) {
  int64_t count = 0;
  for (int64_t p = 0; p < batch.count;) {
    int64_t end = p + 1;
    while (end < batch.count && end - p < rows && batch.pairs[end].slot == batch.pairs[p].slot)
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

struct BatchedDelta::Memory {
  Batch batch;
  Scratch<PairTile> tiles;
  Scratch<int64_t> rows, starts;
  Scratch<float> weights, h;
};

BatchedDelta::Memory &BatchedDelta::memory() {
  LE_PER_THREAD(Memory, m);
  return m;
}

BatchedDelta::BatchedDelta(const char *op, AdapterPool &pool, int64_t n, const le_array *ids,
                           const le_array *weights)
    : pool_(pool), memory_(memory()), batch_(memory_.batch) {
  read_batch(op, pool, ids, weights, n, Order::kMixturesByRow, &batch_);
  held_.emplace(op, pool, batch_.slots, batch_.slot_count);
  tiles_ = memory_.tiles.get(batch_.count);
  count_ = batch_.mixtures ? cut_by_row(batch_, tiles_)
                           : cut_by_slot(batch_, pool.context().tile_rows(), tiles_);
  rows_ = memory_.rows.get(batch_.count);
  weights_ = memory_.weights.get(batch_.count);
  for (int64_t p = 0; p < batch_.count; ++p) {
    rows_[p] = batch_.pairs[p].row;
    weights_[p] = batch_.pairs[p].weight;
    bytes_ += pool.elements(*pool.slot(batch_.pairs[p].slot).current) * dtype_size(pool.dtype());
  }
}

Tile BatchedDelta::tile(const PairTile &cut) const {
  return {rows_ + cut.first, cut.rows, batch_.mixtures ? nullptr : weights_ + cut.first};
}

int64_t BatchedDelta::terms(const PairTile &cut, int s, bool transposed, Term *to) const {
  int64_t adapters = batch_.mixtures ? cut.pairs : 1;
  for (int64_t a = 0; a < adapters; ++a) {
    const Pair &pair = batch_.pairs[cut.first + a];
    const Block &block = *pool_.slot(pair.slot).current;
    float scale = batch_.mixtures ? pair.weight * block.scaling : block.scaling;
    to[a] = slice_term(pool_, pool_.slice(block, s), s, scale, transposed);
  }
  return adapters;
}

void BatchedDelta::run(const Shape &shape) const {
  if (!shape.accumulate) {
    // Rows without an adapter; the others are overwritten by their tile.
    LE_PER_THREAD(Scratch<uint8_t>, seen_memory);
    uint8_t *seen = seen_memory.get(shape.x.n);
    std::fill(seen, seen + shape.x.n, uint8_t(0));
    for (int64_t p = 0; p < batch_.count; ++p) seen[rows_[p]] = 1;
    for (int64_t i = 0; i < shape.x.n; ++i)
      if (!seen[i]) no_terms(shape, {&i, 1}, 0, shape.y.width, buffers());
  }
  run_tiles(pool_.context(), shape, count_, bytes_, [&](int64_t index, auto &&run) {
    const PairTile &cut = tiles_[index];
    Tile rows = tile(cut);
    const float *const *x = tile_inputs(shape, rows, buffers());
    Term *to = buffers().terms.get(cut.pairs);
    int64_t column = 0;
    for (int s = 0; s < pool_.num_slices(); ++s) {
      int64_t adapters = terms(cut, s, false, to);
      run(rows, x, to, adapters, column, pool_.slice_out(s));
      column += pool_.slice_out(s);
    }
  });
}

void BatchedDelta::run_transposed(const Shape &shape) const {
  if (!shape.accumulate)
    for (int64_t i = 0; i < shape.x.n; ++i) no_terms(shape, {&i, 1}, 0, shape.y.width, buffers());
  int64_t column = 0;
  for (int s = 0; s < pool_.num_slices(); ++s) {
    Shape part = shape;
    part.x.data = shape.x.at(0, column);
    part.x.width = pool_.slice_out(s);
    part.accumulate = true;
    run_tiles(pool_.context(), part, count_, bytes_, [&](int64_t index, auto &&run) {
      const PairTile &cut = tiles_[index];
      Tile rows = tile(cut);
      const float *const *x = tile_inputs(part, rows, buffers());
      Term *to = buffers().terms.get(cut.pairs);
      int64_t adapters = terms(cut, s, true, to);
      run(rows, x, to, adapters, 0, shape.y.width);
    });
    column += pool_.slice_out(s);
  }
}

void BatchedDelta::shrink(const Shape &shape) {
  int slices = pool_.num_slices();
  starts_ = memory_.starts.get(count_ * slices);
  int64_t size = 0;
  for (int64_t t = 0; t < count_; ++t) {
    Term *to = buffers().terms.get(tiles_[t].pairs);
    for (int s = 0; s < slices; ++s) {
      starts_[t * slices + s] = size;
      size += tiles_[t].rows * total_rank(to, terms(tiles_[t], s, false, to));
    }
  }
  h_ = memory_.h.get(size);
  int threads = pool_.context().threads_for(bytes_ / 2);
  pool_.context().threads.run(count_, threads, [&](int64_t t) {
    Buffers &b = buffers();
    Tile rows = tile(tiles_[t]);
    const float *const *x = tile_inputs(shape, rows, b);
    Term *to = b.terms.get(tiles_[t].pairs);
    for (int s = 0; s < slices; ++s) {
      int64_t adapters = terms(tiles_[t], s, false, to), rank = total_rank(to, adapters);
      shrink_terms(shape, rows, x, to, adapters, 0, rank, h_ + starts_[t * slices + s], rank, b);
    }
  });
}

void BatchedDelta::expand(const Kernels &k, int64_t column, int64_t n, float *y,
                          int64_t stride) const {
  Shape shape;
  shape.kernels = &k;
  shape.y.data = reinterpret_cast<char *>(y);
  shape.y.row_stride = stride;
  shape.y.width = n;
  shape.dtype = pool_.dtype();
  shape.accumulate = true;
  Buffers &b = buffers();
  int64_t base = 0;  // of the slice
  for (int s = 0; s < pool_.num_slices(); base += pool_.slice_out(s), ++s) {
    int64_t from = std::max(column, base), to = std::min(column + n, base + pool_.slice_out(s));
    if (from >= to) continue;
    for (int64_t t = 0; t < count_; ++t) {
      Term *of = b.terms.get(tiles_[t].pairs);
      int64_t adapters = terms(tiles_[t], s, false, of), rank = total_rank(of, adapters);
      if (rank)
        expand_terms(shape, tile(tiles_[t]), of, adapters, h_ + starts_[t * pool_.num_slices() + s],
                     rank, from - base, from - column, to - from, b);
    }
  }
}

void pool_forward(AdapterPool &pool, const le_array *x, const le_array *ids,
                  const le_array *weights, bool transposed, bool accumulate, const le_array *y) {
  const char *op = "batched_lora_delta";
  int64_t in = pool.in_features(), out = pool.out_features();
  Shape shape =
      transposed
          ? checked_shape(op, x, out, "[n, out]", y, in, "[n, in]", pool.dtype(), accumulate)
          : checked_shape(op, x, in, "[n, in]", y, out, "[n, out]", pool.dtype(), accumulate);
  BatchedDelta delta(op, pool, shape.x.n, ids, weights);
  if (transposed)
    delta.run_transposed(shape);
  else
    delta.run(shape);
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
  LE_PER_THREAD(Scratch<float>, row);
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
