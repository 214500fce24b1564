/* Ops on arrays. */
#include "check.h"

static void lora_delta(le_context *ctx, int32_t dtype, int32_t weights, int64_t n, int accumulate) {
  enum { in = 37, rank = 3, out = 21 };
  Array x = drawn(dtype, n, in, -1, 1), A = drawn(weights, rank, in, -1, 1);
  Array B = drawn(weights, out, rank, -1, 1), y = array_with_gap(dtype, n ? n : 1, out, 2);
  for (int64_t i = 0; accumulate && i < y.rows; ++i)
    for (int64_t o = 0; o < out; ++o) set(&y, i, o, (double)(o % 5) / 4);
  CHECK(le_lora_delta(ctx, &x.c, &A.c, &B.c, 0.5f, accumulate, &y.c) == LE_OK);
  for (int64_t i = 0; i < y.rows; ++i) {
    double row[in], want[out] = {0}, size[out] = {0};
    for (int o = 0; o < out; ++o) want[o] = size[o] = accumulate ? (o % 5) / 4.0 : 0;
    row_of(&x, i, row);
    add_delta(&A, &B, 0.5, row, want, size);
    for (int64_t o = 0; o < out; ++o) CHECK(near(dtype, at(&y, i, o), want[o], size[o]));
    for (int64_t gap = 0; i + 1 < y.rows && gap < 2; ++gap) CHECK(at(&y, i, out + gap) != 0);
  }
  array_free(&x), array_free(&A), array_free(&B), array_free(&y);
}

/* Strides: x read backwards, every second column; A given transposed. */
static void strided(le_context *ctx) {
  enum { in = 8, out = 3 };
  Array x = drawn(LE_FLOAT32, 2, 2 * in, -1, 1), At = drawn(LE_FLOAT32, in, 2, -1, 1);
  Array B = drawn(LE_FLOAT32, out, 2, -1, 1), y = array(LE_FLOAT32, 2, out);
  le_array back = x.c, A = At.c;
  back.data = (float *)x.c.data + 2 * in - 1;
  back.shape[1] = in;
  back.strides[1] = -2;
  A.shape[0] = 2, A.shape[1] = in, A.strides[0] = 1, A.strides[1] = 2;
  CHECK(le_lora_delta(ctx, &back, &A, &B.c, 2, 0, &y.c) == LE_OK);
  for (int i = 0; i < 2; ++i)
    for (int o = 0; o < out; ++o) {
      double want = 0, size = 0;
      for (int r = 0; r < 2; ++r)
        for (int k = 0; k < in; ++k) {
          double term = 2 * at(&B, o, r) * at(&At, k, r) * at(&x, i, 2 * in - 1 - 2 * k);
          want += term, size += fabs(term);
        }
      CHECK(near(LE_FLOAT32, at(&y, i, o), want, size));
    }
  array_free(&x), array_free(&At), array_free(&B), array_free(&y);
}

static void ewc_step(le_context *ctx) {
  enum { n = 3, m = 19 };
  Array theta = drawn(LE_FLOAT32, n, m, -1, 1), grad = drawn(LE_FLOAT32, n, m, -1, 1);
  Array F = drawn(LE_FLOAT32, n, m, 0, 4), star = drawn(LE_FLOAT32, n, m, -1, 1);
  Array before = copy_of(&theta);
  CHECK(le_ewc_step(ctx, &theta.c, &grad.c, &F.c, &star.c, 0.125f, 2, 1, 2) == LE_OK);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < m; ++j) {
      double pull = 0.125 * 4 * at(&F, i, j);
      double want =
          (at(&before, i, j) - 0.125 * at(&grad, i, j) + pull * at(&star, i, j)) / (1 + pull);
      CHECK(near(LE_FLOAT32, at(&theta, i, j), want, 2));
    }
  array_free(&theta), array_free(&grad), array_free(&F), array_free(&star), array_free(&before);
}

static void fisher(le_context *ctx) {
  enum { n = 5, in = 11, rank = 2, out = 7 };
  Array F = drawn(LE_FLOAT32, n, in, 0, 2), x = drawn(LE_FLOAT32, n, in, -1, 1);
  Array grad = drawn(LE_FLOAT32, n, out, -1, 1), A = drawn(LE_FLOAT32, rank, in, -1, 1);
  Array B = drawn(LE_FLOAT32, out, rank, -1, 1), before = copy_of(&F);
  CHECK(le_fisher_accumulate(ctx, &F.c, &x.c, 0.5f, 0.25f) == LE_OK);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < in; ++j) {
      double want = 0.5 * at(&before, i, j) + 0.25 * at(&x, i, j) * at(&x, i, j);
      CHECK(near(LE_FLOAT32, at(&F, i, j), want, 1));
    }

  /* Samples: rows 0 and 1 together, none, then 2 to 4. */
  Array segments = array(LE_INT32, 0, 4), F_A = array(LE_FLOAT64, rank, in);
  Array F_B = array(LE_FLOAT32, out, rank);
  set(&segments, 0, 0, 0), set(&segments, 0, 1, 2), set(&segments, 0, 2, 2),
      set(&segments, 0, 3, n);
  CHECK(le_lora_fisher(ctx, &x.c, &grad.c, &A.c, &B.c, 0.5f, &segments.c, 0, &F_A.c, &F_B.c) ==
        LE_OK);
  double want_A[rank * in] = {0}, want_B[out * rank] = {0}, u[out] = {0}, v[in] = {0};
  for (int first = 0; first < n; first = first ? n : 2) {
    double gA[rank * in] = {0}, gB[out * rank] = {0}, row[in], up[out];
    for (int i = first; i < (first ? n : 2); ++i) {
      row_of(&x, i, row), row_of(&grad, i, up);
      add_gradients(&A, &B, 0.5, row, up, gA, gB);
      for (int o = 0; o < out; ++o) u[o] += up[o] * up[o];
      for (int k = 0; k < in; ++k) v[k] += row[k] * row[k];
    }
    for (int e = 0; e < rank * in; ++e) want_A[e] += gA[e] * gA[e];
    for (int e = 0; e < out * rank; ++e) want_B[e] += gB[e] * gB[e];
  }
  for (int e = 0; e < rank * in; ++e)
    CHECK(near(LE_FLOAT32, at(&F_A, e / in, e % in), want_A[e], 20));
  for (int e = 0; e < out * rank; ++e)
    CHECK(near(LE_FLOAT32, at(&F_B, e / rank, e % rank), want_B[e], 20));

  Array of_u = drawn(LE_FLOAT32, 0, out, 1, 1), of_v = drawn(LE_FLOAT32, 0, in, 1, 1);
  CHECK(le_lora_fisher_factors(ctx, &x.c, &grad.c, 1, &of_u.c, &of_v.c) == LE_OK);
  for (int o = 0; o < out; ++o) CHECK(near(LE_FLOAT32, at(&of_u, 0, o), 1 + u[o], 1));
  for (int k = 0; k < in; ++k) CHECK(near(LE_FLOAT32, at(&of_v, 0, k), 1 + v[k], 1));
  array_free(&F), array_free(&x), array_free(&grad), array_free(&A), array_free(&B);
  array_free(&before), array_free(&segments), array_free(&F_A), array_free(&F_B);
  array_free(&of_u), array_free(&of_v);
}

void test_ops(void) {
  le_context *ctx = new_context(2);
  for (int32_t dtype = LE_FLOAT32; dtype <= LE_FLOAT16; ++dtype)
    for (int32_t weights = LE_FLOAT32; weights <= LE_FLOAT16; ++weights)
      for (int accumulate = 0; accumulate < 2; ++accumulate) {
        lora_delta(ctx, dtype, weights, 0, accumulate); /* a vector */
        lora_delta(ctx, dtype, weights, 4, accumulate);
      }
  strided(ctx);
  ewc_step(ctx);
  fisher(ctx);
  le_context_destroy(ctx);
}
