#include "nf4_linear.h"

#include <algorithm>
#include <optional>

#include "dispatch.h"
#include "tiles.h"

namespace le {
namespace {

constexpr int64_t kColumns = 64;            // of y in one task
constexpr int64_t kTaskFloats = 64 * 1024;  // of y in one task, at most
constexpr int64_t kFewRows = 16;            // up to here codes stay in registers
constexpr int64_t kFewOffsets = 4;          // that rows of weights begin at
constexpr int64_t kLaneRows = 4;            // rows of x that share a decoded register
constexpr int64_t kSpanBytes = 32 * 1024;   // of several rows of x that stay in the cache meanwhile
constexpr int64_t kTileSpan = 1024;         // columns of a decoded tile
constexpr int64_t kBlockRows = 64;          // rows of x that meet a decoded tile

struct Nf4Buffers {
  Nf4Matrix::Buffers decode;
  Scratch<uint8_t> packed;
  Scratch<float> y, acc, tile;
  Scratch<const void *> x_rows;
  Scratch<void *> out_rows;
};
Nf4Buffers &nf4_buffers() {
  LE_PER_THREAD(Nf4Buffers, b);
  return b;
}

// What a call computes on, made once and read by all threads.
struct Product {
  const Kernels *k;
  const Nf4Compute *compute;
  const Nf4Matrix *w;
  int64_t n;
  const char *x;      // rows in `compute`'s dtype, or in its lanes, once for each offset
  int64_t x_stride;   // bytes
  const float *bias;  // or null
};

// How many places within a chunk rows of weights begin at: few rows of x are laid out
// for each of them.
int64_t offsets(const Nf4Matrix &w) { return kNf4Chunk / w.offset_step(); }

// Few rows: the codes of a row of weights meet up to four rows of x in registers.
void few_rows(const Product &p, int64_t column, int64_t count, float *y) {
  Nf4Buffers &b = nf4_buffers();
  const Nf4Matrix &w = *p.w;
  int64_t chunks = w.longest_run(), lanes = p.k->nf4.lanes, step = w.offset_step();
  int64_t row_stride = offsets(w) * p.x_stride;
  for (int64_t i = 0; i < p.n; i += kLaneRows) {
    int64_t m = std::min(kLaneRows, p.n - i);
    // One row of x is worth no second visit to a row of weights: those then stream. A
    // span is an even number of chunks, since bfloat16 lanes take two at a time.
    int64_t part_of_x = std::max<int64_t>(kSpanBytes / m / p.compute->lane_bytes / 2 * 2, 2);
    int64_t span = m == 1 ? chunks : part_of_x;
    float *acc = b.acc.get_aligned(count * m * lanes);
    for (int64_t c = 0; c < chunks; c += span) {
      for (int64_t j = 0; j < count; ++j) {
        Nf4Matrix::Run run = w.run(column + j);
        int64_t first = run.first + c, part = std::min(span, run.count - c);
        if (part <= 0) continue;
        const char *at = p.x + run.offset / step * p.x_stride + c * p.compute->lane_bytes;
        const void *x[kLaneRows];
        for (int64_t r = 0; r < m; ++r) x[r] = at + (i + r) * row_stride;
        p.compute->row_dots(m, x, w.chunks(first, part, b.packed), part,
                            w.scales(first, part, b.decode.scales), acc + j * m * lanes, c == 0);
      }
    }
    float sums[kColumns * kLaneRows];
    p.k->nf4.sums(count * m, acc, sums);
    for (int64_t r = 0; r < m; ++r)
      for (int64_t j = 0; j < count; ++j) y[(i + r) * count + j] = sums[j * m + r];
  }
}

// Many rows: a tile of weights is decoded into the L1, then multiplied with each.
template <class T>
void many_rows(const Product &p, int64_t column, int64_t count, float *y) {
  Nf4Buffers &b = nf4_buffers();
  const Nf4Matrix &w = *p.w;
  int64_t lanes = p.k->nf4.lanes, cols = w.cols(), room = Nf4Matrix::room(kTileSpan);
  T *memory = reinterpret_cast<T *>(b.tile.get_aligned(kNf4TileRows * room));
  const void **x = b.x_rows.get(kBlockRows);
  float *acc = b.acc.get_aligned(kBlockRows * kNf4TileRows * lanes);
  for (int64_t i = 0; i < p.n; i += kBlockRows) {
    int64_t m = std::min(kBlockRows, p.n - i);
    for (int64_t j = 0; j < count; j += kNf4TileRows) {
      int64_t there = std::min(kNf4TileRows, count - j);
      for (int64_t at = 0; at < cols; at += kTileSpan) {
        int64_t part = std::min(kTileSpan, cols - at);
        const void *tile[kNf4TileRows];
        for (int64_t r = 0; r < kNf4TileRows; ++r) {
          int64_t first = (column + j + std::min(r, there - 1)) * cols + at;
          tile[r] = r < there ? w.decode(p.compute->decode, first, first + part, memory + r * room,
                                         b.decode)
                              : tile[r - 1];
        }
        for (int64_t r = 0; r < m; ++r)
          x[r] = p.x + (i + r) * p.x_stride + at * static_cast<int64_t>(sizeof(T));
        p.compute->dots(m, x, tile, part, acc, at == 0);
      }
      float sums[kBlockRows * kNf4TileRows];
      p.k->nf4.sums(m * kNf4TileRows, acc, sums);
      for (int64_t r = 0; r < m; ++r)
        for (int64_t e = 0; e < there; ++e) y[(i + r) * count + j + e] = sums[r * kNf4TileRows + e];
    }
  }
}

int32_t chosen_compute(const char *op, int32_t compute, int32_t x) {
  if (compute == -1) return x == LE_BFLOAT16 ? LE_BFLOAT16 : LE_FLOAT32;
  if (compute != LE_FLOAT32 && compute != LE_BFLOAT16)
    fail(LE_ERROR_VALUE, "%s: compute: expected float32 or bfloat16, got %s (%d)", op,
         dtype_name(compute), compute);
  return compute;
}

// The rows of x, rounded to what is computed in: as they are where they lie so, else
// in one of these.
struct Inputs {
  Scratch<float> wide, lanes;
  Scratch<Bf16> narrow;
  void trim() {
    wide.trim();
    lanes.trim();
    narrow.trim();
  }
};
Inputs &inputs() {
  LE_PER_THREAD(Inputs, memory);
  return memory;
}

void round_to_bfloat(const Kernels &k, float *row, int64_t n) {
  LE_PER_THREAD(Scratch<Bf16>, memory);
  Bf16 *narrow = memory.get(n);
  k.round[LE_BFLOAT16](row, n, narrow);
  k.widen[LE_BFLOAT16](narrow, n, row);
}

// Few rows: each in lanes, behind zeros, once for each offset of a row of weights.
void read_lanes(const Rows &x, bool rounds, Product *p, Context &context) {
  const Kernels &k = *p->k;
  int64_t chunks = p->w->longest_run(), step = p->w->offset_step(), copies = offsets(*p->w);
  p->x_stride = (chunks + 1) / 2 * 2 * p->compute->lane_bytes;
  char *to = reinterpret_cast<char *>(inputs().lanes.get_aligned(x.n * copies * p->x_stride / 4));
  p->x = to;
  context.threads.run(x.n, context.threads_for(8 * x.n * x.width), [&](int64_t i) {
    LE_PER_THREAD(Scratch<float>, row_memory);
    int64_t size = chunks * kNf4Chunk;
    float *row = row_memory.get(size);
    for (int64_t copy = 0; copy < copies; ++copy) {
      float *at = row + copy * step;
      std::fill(row, at, 0.0f);
      load_row(k, x, i, 0, x.width, at);
      std::fill(at + x.width, row + size, 0.0f);
      if (rounds) round_to_bfloat(k, at, x.width);
      p->compute->to_lanes(row, chunks, to + (i * copies + copy) * p->x_stride);
    }
  });
}

// Many rows: contiguous, in the dtype that tiles are decoded to.
void read_rows(const Rows &x, bool rounds, Product *p, Context &context) {
  const Kernels &k = *p->k;
  bool to_bfloat = p->compute->dtype == LE_BFLOAT16;
  if (!rounds && x.dtype == p->compute->dtype && x.contiguous_rows()) {
    p->x = x.data;
    p->x_stride = x.row_stride * dtype_size(x.dtype);
    return;
  }
  int64_t width = x.width;
  p->x_stride = dtype_size(p->compute->dtype) * width;
  char *to = to_bfloat ? reinterpret_cast<char *>(inputs().narrow.get(x.n * width))
                       : reinterpret_cast<char *>(inputs().wide.get(x.n * width));
  p->x = to;
  context.threads.run(x.n, context.threads_for(8 * x.n * width), [&](int64_t i) {
    LE_PER_THREAD(Scratch<float>, wide_memory);
    char *row = to + i * p->x_stride;
    float *wide = to_bfloat ? wide_memory.get(width) : reinterpret_cast<float *>(row);
    load_row(k, x, i, 0, width, wide);
    if (to_bfloat) return k.round[LE_BFLOAT16](wide, width, row);
    if (rounds) round_to_bfloat(k, wide, width);
  });
}

const float *read_bias(const char *op, const Kernels &k, const le_array *bias, int64_t rows,
                       const Rows &y) {
  if (!present(bias)) return nullptr;
  LE_PER_THREAD(Scratch<float>, memory);
  Rows b = float_matrix(op, "bias", bias, 1, rows, "[out]");
  check_overlap(op, "out", y, "bias", b);
  float *copy = memory.get(rows);
  load_row(k, b, 0, 0, rows, copy);
  return copy;
}

}  // namespace

void nf4_linear(Context &context, const Nf4Linear &call) {
  const char *op = "nf4_linear";
  Nf4Matrix w(op, call.w);
  int64_t rows = w.rows();
  Shape shape = checked_shape(op, call.x, w.cols(), "[n, in]", call.y, rows, "[n, out]",
                              call.pool ? call.pool->dtype() : LE_FLOAT32, false);
  w.check_apart(op, "out", shape.y);
  int32_t compute = chosen_compute(op, call.compute, shape.x.dtype);
  const Kernels &k = *shape.kernels;
  Product p{&k, &k.nf4.compute[compute], &w, shape.x.n, nullptr, 0, nullptr};
  p.bias = read_bias(op, k, call.bias, rows, shape.y);
  std::optional<BatchedDelta> delta;
  if (!call.pool && (present(call.ids) || present(call.weights)))
    fail(LE_ERROR_VALUE, "%s: pool: expected one where ids or weights are given, got NULL", op);
  if (call.pool) {
    if (call.pool->in_features() != w.cols() || call.pool->out_features() != rows)
      fail(LE_ERROR_VALUE, "%s: pool: expected one of [in, out] = [%lld, %lld], got [%lld, %lld]",
           op, static_cast<long long>(w.cols()), static_cast<long long>(rows),
           static_cast<long long>(call.pool->in_features()),
           static_cast<long long>(call.pool->out_features()));
    delta.emplace(op, *call.pool, p.n, call.ids, call.weights);
  }
  if (p.n == 0) return;
  if (delta) delta->shrink(shape);
  bool few = p.n <= kFewRows && offsets(w) <= kFewOffsets;
  bool rounds = compute == LE_BFLOAT16 && shape.x.dtype != LE_BFLOAT16;
  if (few)
    read_lanes(shape.x, rounds, &p, context);
  else
    read_rows(shape.x, rounds, &p, context);

  int64_t columns =
      std::clamp(kTaskFloats / p.n / kNf4TileRows * kNf4TileRows, kNf4TileRows, kColumns);
  int threads = context.threads_for(w.packed_bytes() * std::max<int64_t>(p.n / 8, 1));
  context.threads.run((rows + columns - 1) / columns, threads, [&](int64_t task) {
    int64_t column = task * columns, count = std::min(columns, rows - column);
    float *y = nf4_buffers().y.get_aligned(p.n * count);
    if (few)
      few_rows(p, column, count, y);
    else if (p.compute->dtype == LE_BFLOAT16)
      many_rows<Bf16>(p, column, count, y);
    else
      many_rows<float>(p, column, count, y);
    if (p.bias)
      for (int64_t i = 0; i < p.n; ++i)
        for (int64_t j = 0; j < count; ++j) y[i * count + j] += p.bias[column + j];
    if (delta) delta->expand(k, column, count, y, count);
    for (int64_t i = 0; i < p.n; ++i) store_row(k, shape.y, i, column, count, y + i * count, false);
  });
}

// Each task owns columns of dx: it decodes those of some rows of W and adds them up,
// weighted by grad, row by row of W.
void nf4_linear_backward(Context &context, const le_array *grad, const le_nf4 *w,
                         const le_array *dx) {
  const char *op = "nf4_linear_backward";
  constexpr int64_t kSpan = 512, kRows = 8;  // of W, decoded: half of an L1
  Nf4Matrix matrix(op, w);
  Shape shape = checked_shape(op, grad, matrix.rows(), "[n, out]", dx, matrix.cols(), "[n, in]",
                              LE_FLOAT32, false);
  matrix.check_apart(op, "out", shape.y);
  const Kernels &k = *shape.kernels;
  int64_t n = shape.x.n, rows = matrix.rows(), cols = matrix.cols();
  if (n == 0) return;
  LE_PER_THREAD(Scratch<float>, grad_memory);
  float *up = grad_memory.get(n * rows);
  context.threads.run(n, context.threads_for(8 * n * rows),
                      [&](int64_t i) { load_row(k, shape.x, i, 0, rows, up + i * rows); });
  int threads = context.threads_for(matrix.packed_bytes() * std::max<int64_t>(n / 8, 1));
  context.threads.run((cols + kSpan - 1) / kSpan, threads, [&](int64_t task) {
    Nf4Buffers &b = nf4_buffers();
    int64_t column = task * kSpan, count = std::min(kSpan, cols - column);
    int64_t room = Nf4Matrix::room(kSpan);
    float *sums = b.y.get_aligned(n * count), *tile = b.tile.get_aligned(kRows * room);
    void **out = b.out_rows.get(n);
    for (int64_t i = 0; i < n; ++i) out[i] = sums + i * count;
    for (int64_t row = 0; row < rows; row += kRows) {
      int64_t terms = std::min(kRows, rows - row);
      const void *decoded[kRows];
      for (int64_t t = 0; t < terms; ++t) {
        int64_t first = (row + t) * cols + column;
        decoded[t] = matrix.decode(k.nf4.decode, first, first + count, tile + t * room, b.decode);
      }
      k.expand[LE_FLOAT32][LE_FLOAT32](n, terms, up + row, rows, decoded, count, out, row > 0);
    }
    for (int64_t i = 0; i < n; ++i)
      store_row(k, shape.y, i, column, count, sums + i * count, false);
  });
  grad_memory.trim();
}

}  // namespace le
