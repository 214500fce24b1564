// Rows that share terms, computed together: what the delta ops are made of.
#pragma once

#include <algorithm>

#include "adapter_pool.h"

namespace le {

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
Buffers &buffers();  // the calling thread's

struct Shape {
  const Kernels *kernels;
  Rows x, y;
  int32_t dtype;  // of the weights
  bool accumulate;
  int64_t in() const { return x.width; }
};

// The tile's rows of x as contiguous float32.
const float **tile_inputs(const Shape &shape, const Tile &tile, Buffers &b);

int64_t total_rank(const Term *terms, int64_t count);

// h [m, R] = scale * (down x) for ranks [from, to) of the terms laid end to end.
void shrink_terms(const Shape &shape, const Tile &tile, const float *const *x, const Term *terms,
                  int64_t count, int64_t from, int64_t to, float *h, int64_t ldh, Buffers &b);

// y columns [column, column + n) from columns [at, at + n) of the terms' `up`.
void expand_terms(const Shape &shape, const Tile &tile, const Term *terms, int64_t count,
                  const float *h, int64_t ldh, int64_t at, int64_t column, int64_t n, Buffers &b);

// Rows that no adapter touches: their bits stay, or become zeros.
void no_terms(const Shape &shape, const Tile &tile, int64_t column, int64_t n, Buffers &b);

// shrink_terms of all ranks, h [m, R], dealt out to threads.
void shrink_split(Context &context, int threads, const Shape &shape, const Tile &tile,
                  const Term *terms, int64_t count, const float *const *x, float *h);

// A tile on one thread: shrink, then expand.
void run_tile(const Shape &shape, const Tile &tile, const Term *terms, int64_t count,
              const float *const *x, int64_t column, int64_t n, Buffers &b);

// The same over several threads: ranks are dealt out, then columns. Bit for
// bit the same, since each rank's and each column's sum is its own.
void run_tile_split(Context &context, int threads, const Shape &shape, const Tile &tile,
                    const Term *terms, int64_t count, const float *const *x, int64_t column,
                    int64_t n, Buffers &b);

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
    LE_PER_THREAD(Buffers, held);
    visit(index, [&](const Tile &tile, const float *const *x, const Term *terms, int64_t count,
                     int64_t column, int64_t n) {
      run_tile_split(context, threads, shape, tile, terms, count, x, column, n, held);
    });
  }
}

// 0, 1, ... n - 1.
const int64_t *row_numbers(int64_t n, Scratch<int64_t> &memory);

// x [n, in] and y [n, out] of an op, checked. dtype: of the weights.
Shape checked_shape(const char *op, const le_array *x, int64_t in, const char *x_symbols,
                    const le_array *y, int64_t out, const char *y_symbols, int32_t dtype,
                    bool accumulate);

}  // namespace le
