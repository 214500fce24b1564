// Op 1: the delta of one adapter that lies in two arrays.
#include "forward.h"
#include "tiles.h"
#include "transpose.h"

namespace le {
namespace {

struct PackMemory {
  Scratch<uint32_t> words;
  Scratch<uint16_t> halves;
};

// Of columns that lie one behind another, N elements each: a stride that the compiler knows is
// a shuffle of vectors.
template <int N, class T>
void pack_columns(const T *from, int64_t width, T *to, int64_t stride) {
  for (int64_t j = 0; j < width; ++j)
    for (int i = 0; i < N; ++i) to[i * stride + j] = from[j * N + i];
}

template <class T>
void pack(const Rows &m, T *to, int64_t stride) {
  const T *from = reinterpret_cast<const T *>(m.data);
  if (m.row_stride == 1 && m.col_stride == m.n) {
    if (m.n == 2) return pack_columns<2>(from, m.width, to, stride);
    if (m.n == 4) return pack_columns<4>(from, m.width, to, stride);
  }
  constexpr int64_t kColumns = 64;  // at a time: a transpose reads each line once
  constexpr int N = Square<T>::N;
  for (int64_t j0 = 0; j0 < m.width; j0 += kColumns) {
    int64_t j1 = std::min(j0 + kColumns, m.width), i = 0;
    if (m.row_stride == 1 && j1 - j0 == kColumns)
      for (; i + N <= m.n; i += N)
        for (int64_t j = j0; j < j1; j += N)
          Square<T>::transpose(from + i + j * m.col_stride, m.col_stride, to + i * stride + j,
                               stride);
    for (; i < m.n; ++i)
      for (int64_t j = j0; j < j1; ++j)
        to[i * stride + j] = from[i * m.row_stride + j * m.col_stride];
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
  // Rows a power of two apart would evict each other from the cache.
  int64_t step = m.width + 64 / size;
  *stride = step * size;
  if (m.dtype == LE_FLOAT32) {
    uint32_t *to = memory.words.get(m.n * step);
    pack(m, to, step);
    return reinterpret_cast<const char *>(to);
  }
  uint16_t *to = memory.halves.get(m.n * step);
  pack(m, to, step);
  return reinterpret_cast<const char *>(to);
}

// Rank 2 and few rows: B is read as it lies, [out, 2], where packing it would take longer than
// the rest.
constexpr int64_t kFewRows = 2;
bool as_pairs(const Shape &shape, const Rows &b) {
  return b.width == 2 && b.col_stride == 1 && b.row_stride == 2 && shape.x.n <= kFewRows &&
         shape.y.contiguous_rows();
}

void run_pairs(const Shape &shape, const Tile &tile, const Rows &b, const Term &term) {
  float h[2 * kFewRows];
  Buffers &memory = buffers();
  shrink_terms(shape, tile, tile_inputs(shape, tile, memory), &term, 1, 0, 2, h, 2, memory);
  for (int64_t i = 0; i < tile.m; ++i)
    shape.kernels->expand_pairs[shape.dtype][shape.y.dtype](
        h + 2 * i, b.data, b.n, shape.y.row(tile.rows[i]), shape.accumulate);
}

// One tile, with B as it lies: turned over a block of columns at a time, which stays in the cache,
// where the whole of it would be written and read again.
constexpr int64_t kPackedBytes = 16 * 1024;
void run_blocks(Context &context, int threads, const Shape &shape, const Tile &tile, const Rows &bt,
                const Term &term) {
  LE_PER_THREAD(Buffers, held);  // the caller's, while its own are used by the tasks
  float *h = held.h.get(tile.m * term.rank);
  shrink_split(context, threads, shape, tile, &term, 1, tile_inputs(shape, tile, held), h);
  int64_t step = kPackedBytes / (term.rank * dtype_size(bt.dtype)) / 64 * 64;
  step = std::max<int64_t>(step, 64);
  context.threads.run((bt.width + step - 1) / step, threads, [&](int64_t task) {
    LE_PER_THREAD(PackMemory, memory);
    Rows block = bt;
    block.data = bt.at(0, task * step);
    block.width = std::min(step, bt.width - task * step);
    Term part = term;
    part.up = packed_rows(block, memory, &part.up_stride);
    expand_terms(shape, tile, &part, 1, h, term.rank, 0, task * step, block.width, buffers());
  });
}

}  // namespace

void lora_delta(Context &context, const le_array *x, const le_array *A, const le_array *B,
                float scaling, bool accumulate, const le_array *y) {
  const char *op = "lora_delta";
  Rows a = float_matrix(op, "A", A, -1, -1, "[r, in]");
  check_rank(op, a.n);
  Rows b = float_matrix(op, "B", B, -1, a.n, "[out, r]");
  check_dtype(op, "B", b.dtype, a.dtype, ", the dtype of A");
  check_finite(op, "scaling", scaling);
  Shape shape = checked_shape(op, x, a.width, "[n, in]", y, b.n, "[n, out]", a.dtype, accumulate);
  check_overlap(op, "out", shape.y, "A", a);
  check_overlap(op, "out", shape.y, "B", b);
  if (shape.x.n == 0 || b.n == 0) return;

  LE_PER_THREAD(PackMemory, a_memory);
  LE_PER_THREAD(PackMemory, b_memory);
  LE_PER_THREAD(Scratch<int64_t>, row_memory);
  const int64_t *rows = row_numbers(shape.x.n, row_memory);
  int64_t a_stride;
  const char *down = packed_rows(a, a_memory, &a_stride);
  if (as_pairs(shape, b))
    return run_pairs(shape, {rows, shape.x.n}, b, {down, nullptr, a_stride, 0, 2, scaling});
  Rows bt = transposed(b);
  int64_t step = context.tile_rows(), tiles = (shape.x.n + step - 1) / step;
  int64_t bytes = shape.x.n * a.n * (a.width + b.n) * dtype_size(a.dtype);
  Term term{down, nullptr, a_stride, 0, a.n, scaling};
  if (tiles == 1 && a.n && !bt.contiguous_rows()) {
    int threads = bytes < kSplitBytes ? 1 : context.threads_for(bytes);
    return run_blocks(context, threads, shape, {rows, shape.x.n}, bt, term);
  }
  term.up = packed_rows(bt, b_memory, &term.up_stride);
  run_tiles(context, shape, tiles, bytes, [&](int64_t index, auto &&run) {
    Tile tile{rows + index * step, std::min(step, shape.x.n - index * step)};
    run(tile, tile_inputs(shape, tile, buffers()), &term, 1, 0, shape.y.width);
  });
}

}  // namespace le
