/* NF4: encoded, decoded and multiplied. */
#include "check.h"

enum { rows = 7, cols = 40, blocksize = 64, blocks = (rows * cols + blocksize - 1) / blocksize };

/* QLoRA (Dettmers et al. 2023), appendix E. */
static const double codes[16] = {-1,
                                 -0.6961928009986877,
                                 -0.5250730514526367,
                                 -0.39491748809814453,
                                 -0.28444138169288635,
                                 -0.18477343022823334,
                                 -0.09105003625154495,
                                 0,
                                 0.07958029955625534,
                                 0.16093020141124725,
                                 0.24611230194568634,
                                 0.33791524171829224,
                                 0.44070982933044434,
                                 0.5626170039176941,
                                 0.7229568362236023,
                                 1};

static double decoded(const uint8_t *packed, const double *absmax, int64_t e) {
  uint8_t byte = packed[e / 2];
  return (float)codes[e % 2 ? byte & 15 : byte >> 4] * absmax[e / blocksize];
}

static void round_trip(le_context *ctx, int nested) {
  Array W = drawn(LE_FLOAT32, rows, cols, -4, 4), back = array(LE_FLOAT32, rows, cols);
  uint8_t packed[(rows * cols + 1) / 2], scales[blocks];
  float absmax[blocks], nested_absmax[1] = {0.5f}, map[256];
  double scale[blocks] = {0};
  CHECK(le_nf4_encode(ctx, &W.c, blocksize, packed, absmax) == LE_OK);
  for (int e = 0; e < rows * cols; ++e)
    scale[e / blocksize] = fmax(scale[e / blocksize], fabs(at(&W, e / cols, e % cols)));
  for (int b = 0; b < blocks; ++b) CHECK(absmax[b] == scale[b]);
  for (int e = 0; e < rows * cols; ++e) { /* no code is nearer */
    double v = at(&W, e / cols, e % cols) / scale[e / blocksize], best = 9;
    for (int c = 0; c < 16; ++c) best = fmin(best, fabs(codes[c] - v));
    CHECK(fabs(decoded(packed, scale, e) / scale[e / blocksize] - v) <= best + 1e-6);
  }
  le_nf4 w = {packed, rows, cols, blocksize, absmax, NULL, NULL, NULL, 0, 0};
  if (nested) {
    for (int i = 0; i < 256; ++i) map[i] = (float)i / 64;
    for (int b = 0; b < blocks; ++b) {
      scales[b] = (uint8_t)(60 * b + 3);
      scale[b] = (double)map[scales[b]] * 0.5 + 1.25;
    }
    w.absmax = NULL, w.absmax_codes = scales, w.nested_absmax = nested_absmax, w.nested_map = map;
    w.nested_blocksize = 256, w.nested_offset = 1.25f;
  }
  CHECK(le_nf4_decode(ctx, &w, &back.c) == LE_OK);
  for (int e = 0; e < rows * cols; ++e)
    CHECK(at(&back, e / cols, e % cols) == (float)decoded(packed, scale, e));

  /* y = x W^T + bias + the adapter's delta; dx = grad W. */
  const int64_t outs[] = {rows};
  le_pool *pool = new_pool(ctx, cols, 1, outs, LE_FLOAT32, 0);
  Array A, B, x = drawn(LE_FLOAT32, 3, cols, -1, 1), y = array(LE_FLOAT32, 3, rows);
  Array bias = drawn(LE_FLOAT32, 0, rows, -1, 1), ids = array(LE_INT32, 0, 3),
        dx = array(LE_FLOAT32, 3, cols);
  set(&ids, 0, 0, add_drawn(pool, cols, rows, 2, 0.5f, &A, &B)), set(&ids, 0, 1, -1),
      set(&ids, 0, 2, 0);
  CHECK(le_nf4_linear(ctx, &x.c, &w, &bias.c, pool, &ids.c, NULL, LE_FLOAT32, &y.c) == LE_OK);
  CHECK(le_nf4_linear_backward(ctx, &y.c, &w, &dx.c) == LE_OK);
  for (int i = 0; i < 3; ++i) {
    double row[cols], want[rows] = {0}, size[rows] = {0};
    row_of(&x, i, row);
    for (int o = 0; o < rows; ++o) {
      want[o] = at(&bias, 0, o);
      for (int k = 0; k < cols; ++k) {
        double term = row[k] * at(&back, o, k);
        want[o] += term, size[o] += fabs(term);
      }
    }
    if (i != 1) add_delta(&A, &B, 0.5, row, want, size);
    for (int o = 0; o < rows; ++o) CHECK(near(LE_FLOAT32, at(&y, i, o), want[o], size[o]));
    for (int k = 0; k < cols; ++k) {
      double sum = 0, sum_size = 0;
      for (int o = 0; o < rows; ++o) {
        double term = at(&y, i, o) * at(&back, o, k);
        sum += term, sum_size += fabs(term);
      }
      CHECK(near(LE_FLOAT32, at(&dx, i, k), sum, sum_size));
    }
  }
  array_free(&W), array_free(&back), array_free(&A), array_free(&B), array_free(&x), array_free(&y);
  array_free(&bias), array_free(&ids), array_free(&dx);
  le_pool_destroy(pool);
}

void test_nf4(void) {
  le_context *ctx = new_context(2);
  round_trip(ctx, 0);
  round_trip(ctx, 1);
  le_context_destroy(ctx);
}
