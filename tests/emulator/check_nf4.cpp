// The NF4 groups: a naive decoder of the format, and products with what it decodes.
#include "check.h"

namespace check {
namespace {

// QLoRA (Dettmers et al. 2023), appendix E.
constexpr float kCodes[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};
constexpr int32_t kBlocks[] = {32, 64, 256};

// Drawn codes and scales, and W, what they mean.
struct Nf4 {
  std::vector<uint8_t> packed, absmax_codes;
  std::vector<float> absmax, nested_absmax, nested_map, W;
  le_nf4 c{};

  Nf4(int64_t rows, int64_t cols, int32_t blocksize, bool double_quant) {
    int64_t size = rows * cols, blocks = (size + blocksize - 1) / blocksize;
    for (int64_t i = 0; i < (size + 1) / 2; ++i) packed.push_back(draw(0, 255));
    for (int64_t i = 0; i < blocks; ++i) {
      absmax.push_back(static_cast<float>(uniform(0.5, 2)));
      absmax_codes.push_back(draw(0, 255));
    }
    constexpr int32_t kNested = 256;
    for (int64_t i = 0; i < (blocks + kNested - 1) / kNested; ++i)
      nested_absmax.push_back(static_cast<float>(uniform(0.1, 0.5)));
    for (int i = 0; i < 256; ++i) nested_map.push_back(static_cast<float>(uniform(-1, 1)));
    c.packed = packed.data();
    c.rows = rows;
    c.cols = cols;
    c.blocksize = blocksize;
    if (double_quant) {
      c.absmax_codes = absmax_codes.data();
      c.nested_absmax = nested_absmax.data();
      c.nested_map = nested_map.data();
      c.nested_blocksize = kNested;
      c.nested_offset = 1;
    } else {
      c.absmax = absmax.data();
    }
    for (int64_t i = 0; i < size; ++i) {
      int64_t block = i / blocksize;
      float scale = absmax[block];
      if (double_quant) {
        scale = nested_map[absmax_codes[block]] * nested_absmax[block / kNested];
        scale = scale + c.nested_offset;
      }
      W.push_back(kCodes[packed[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale);
    }
  }
};

// Of more than a task's columns, of less than a tile, and of a row longer than the part
// of x that stays in the cache.
constexpr int64_t kShapes[][2] = {{70, 64}, {33, 93}, {65, 128}, {129, 192}, {9, 1234}, {6, 4352}};

void linear_case(Group &g, int64_t n, Nf4 &w, Pool &pool, int32_t dtype, int32_t compute) {
  int64_t in = w.c.cols, out = w.c.rows;
  bool with_bias = draw(0, 1), with_pool = draw(0, 1);
  Array x(dtype, n, in), y(dtype, n, out), bias = Array::vector(dtype, out);
  Array ids = pool.drawn_ids(n, 1);
  std::vector<double> rows = x.fill().values();
  bias.fill();
  std::vector<Sum> want(n * out);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t o = 0; o < out; ++o) {
      Sum &s = want[i * out + o];
      for (int64_t k = 0; k < in; ++k) s.add(rows[i * in + k], double{w.W[o * in + k]});
      if (with_bias) s.add(1, bias.at(0, o));
    }
    if (with_pool && ids.at(i, 0) >= 0)
      pool.adapters[static_cast<size_t>(ids.at(i, 0))].add_to(&want[i * out], &rows[i * in], 1,
                                                              false);
  }
  const le_array *b = with_bias ? bias.c() : nullptr;
  g.call(le_nf4_linear(g.ctx, x.c(), &w.c, b, with_pool ? pool.pool : nullptr,
                       with_pool ? ids.c() : nullptr, nullptr, compute, y.c()));
  bool narrow = compute == LE_BFLOAT16 || (compute == -1 && dtype == LE_BFLOAT16);
  g.close(y, want, std::max(tolerance(dtype), tolerance(narrow ? LE_BFLOAT16 : dtype)));
  if (!with_pool) return;
  Array plain(dtype, n, out);
  g.call(le_nf4_linear(g.ctx, x.c(), &w.c, b, nullptr, nullptr, nullptr, compute, plain.c()));
  for (int64_t i = 0; i < n; ++i)
    if (ids.at(i, 0) < 0)
      g.require(y.same_row(plain, i),
                "a row without an adapter has other bits than without a pool");
}

}  // namespace

void nf4_encode(Group &g) {
  for (auto [rows, cols] : kShapes)
    for (int32_t blocksize : kBlocks)
      for (int32_t dtype : kDtypes) {
        Array W(dtype, rows, cols);
        std::vector<double> all = W.fill().values();
        int64_t size = rows * cols, blocks = (size + blocksize - 1) / blocksize;
        std::vector<uint8_t> packed((size + 1) / 2, 0), want((size + 1) / 2, 0);
        std::vector<float> absmax(blocks, NAN), largest(blocks, 0);
        for (int64_t i = 0; i < size; ++i) {
          float &top = largest[i / blocksize];
          top = std::max(top, std::fabs(static_cast<float>(all[i])));
        }
        for (int64_t i = 0; i < (size + 1) / 2 * 2; ++i) {
          float v = i < size ? static_cast<float>(all[i]) / largest[i / blocksize] : 0;
          int code = 0;
          while (code < 15 && v > (kCodes[code] + kCodes[code + 1]) / 2) ++code;
          want[i / 2] |= code << (i % 2 ? 0 : 4);
        }
        g.call(le_nf4_encode(g.ctx, W.c(), blocksize, packed.data(), absmax.data()));
        g.require(packed == want, "codes differ");
        g.require(absmax == largest, "absmax differs");
      }
}

void nf4_decode(Group &g) {
  for (auto [rows, cols] : kShapes)
    for (int32_t blocksize : kBlocks)
      for (bool double_quant : {false, true})
        for (int32_t dtype : kDtypes) {
          Nf4 w(rows, cols, blocksize, double_quant);
          Array W(dtype, rows, cols), want = W;
          for (int64_t i = 0; i < rows * cols; ++i) want.set(i / cols, i % cols, w.W[i]);
          g.call(le_nf4_decode(g.ctx, &w.c, W.c()));
          for (int64_t i = 0; i < rows; ++i) g.require(W.same_row(want, i), "bits differ");
          g.require(W.intact(), "something was written outside of an output");
        }
}

void nf4_linear(Group &g) {
  for (auto [rows, cols] : kShapes)
    for (int32_t pool_dtype : kDtypes) {
      Pool pool(g, pool_dtype, cols, rows);
      for (int64_t n : {1, 2, 3, 4, 16, 17, 19})
        for (int32_t dtype : kDtypes)
          for (int32_t compute : {-1, int32_t{LE_FLOAT32}, int32_t{LE_BFLOAT16}}) {
            if (pool_dtype != kDtypes[(n + dtype + compute + 1) % 3]) continue;
            Nf4 w(rows, cols, kBlocks[draw(0, 2)], draw(0, 1));
            linear_case(g, n, w, pool, dtype, compute);
          }
    }
}

void nf4_linear_backward(Group &g) {
  for (auto [rows, cols] : kShapes)
    for (int64_t n : {1, 2, 3, 4, 8, 17, 40})
      for (int32_t dtype : kDtypes) {
        Nf4 w(rows, cols, kBlocks[draw(0, 2)], draw(0, 1));
        Array grad(dtype, n, rows), dx(dtype, n, cols);
        std::vector<double> up = grad.fill().values();
        std::vector<Sum> want(n * cols);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t o = 0; o < rows; ++o)
            for (int64_t k = 0; k < cols; ++k)
              want[i * cols + k].add(up[i * rows + o], double{w.W[o * cols + k]});
        g.call(le_nf4_linear_backward(g.ctx, grad.c(), &w.c, dx.c()));
        g.close(dx, want, tolerance(dtype));
      }
}

}  // namespace check
