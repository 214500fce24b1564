/* Records of EWC, and a step that they hold back. */
#include "check.h"

enum { in = 10, out = 6, rank = 2 };

static double value_of_factor(const Array *F_A, const Array *F_B, const Array *A, const Array *B,
                              const Array *A0, const Array *B0) {
  double sum = 0;
  for (int e = 0; e < rank * in; ++e) {
    double d = at(A, e / in, e % in) - at(A0, e / in, e % in);
    sum += at(F_A, e / in, e % in) * d * d;
  }
  for (int e = 0; e < out * rank; ++e) {
    double d = at(B, e / rank, e % rank) - at(B0, e / rank, e % rank);
    sum += at(F_B, e / rank, e % rank) * d * d;
  }
  return sum;
}

static double value_of_delta(const Array *u, const Array *v, const Array *A, const Array *B,
                             const Array *A0, const Array *B0, double scaling) {
  double sum = 0;
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; ++k) {
      double d = 0;
      for (int r = 0; r < rank; ++r) d += at(B, o, r) * at(A, r, k) - at(B0, o, r) * at(A0, r, k);
      sum += scaling * scaling * at(u, 0, o) * at(v, 0, k) * d * d;
    }
  return sum;
}

static void records(int32_t form) {
  le_context *ctx = new_context(1);
  const int64_t outs[] = {out};
  le_pool *pool = new_pool(ctx, in, 1, outs, LE_FLOAT32, 0);
  int delta = form == LE_EWC_DELTA;
  Array A, B, A0 = drawn(LE_FLOAT32, rank, in, -1, 1), B0 = drawn(LE_FLOAT32, out, rank, -1, 1);
  Array first = delta ? drawn(LE_FLOAT32, 0, out, 0, 2) : drawn(LE_FLOAT32, rank, in, 0, 2);
  Array second = delta ? drawn(LE_FLOAT32, 0, in, 0, 2) : drawn(LE_FLOAT32, out, rank, 0, 2);
  int32_t slot = add_drawn(pool, in, out, rank, 0.5f, &A, &B);
  le_ewc *ewc = NULL;
  double penalty = -1;
  REFUSED(ctx, LE_ERROR_VALUE, "form", le_ewc_create(pool, 5, 3, &ewc));
  CHECK(le_ewc_create(pool, form, 3, &ewc) == LE_OK);
  CHECK(le_ewc_penalty(ewc, &penalty) == LE_OK && penalty == 0);
  CHECK(le_ewc_set(ewc, slot, &first.c, &second.c) == LE_OK);
  CHECK(le_ewc_penalty(ewc, &penalty) == LE_OK && penalty == 0); /* the anchor is what it is now */
  CHECK(le_ewc_restore(ewc, slot, &first.c, &second.c, &A0.c, &B0.c) == LE_OK);
  CHECK(le_ewc_penalty(ewc, &penalty) == LE_OK);
  double want = 3 * (delta ? value_of_delta(&first, &second, &A, &B, &A0, &B0, 0.5)
                           : value_of_factor(&first, &second, &A, &B, &A0, &B0));
  CHECK(fabs(penalty - want) < 1e-5 * want);

  Array got[4] = {copy_of(&first), copy_of(&second), array(LE_FLOAT32, rank, in),
                  array(LE_FLOAT32, out, rank)};
  memset(got[0].bytes, 0xff, got[0].size), memset(got[1].bytes, 0xff, got[1].size);
  CHECK(le_ewc_get(ewc, slot, &got[0].c, &got[1].c, &got[2].c, &got[3].c) == LE_OK);
  for (int64_t j = 0; j < first.cols; ++j) CHECK(at(&got[0], 0, j) == at(&first, 0, j));
  for (int64_t j = 0; j < second.cols; ++j) CHECK(at(&got[1], 0, j) == at(&second, 0, j));
  CHECK(at(&got[2], 1, 3) == at(&A0, 1, 3) && at(&got[3], 4, 1) == at(&B0, 4, 1));

  /* Without a gradient a step goes toward the anchor: the penalty falls. */
  Array x = drawn(LE_FLOAT32, 1, in, -1, 1), grad = drawn(LE_FLOAT32, 1, out, 0, 0);
  const le_step step = {0.25f, 1, 0, 0, 1, ewc};
  uint8_t outcome;
  double norm, after;
  CHECK(le_pool_adapt_slot(pool, slot, &x.c, &grad.c, &step, &outcome, &norm) == LE_OK);
  CHECK(outcome == LE_APPLIED && norm == 0);
  CHECK(le_ewc_penalty(ewc, &after) == LE_OK && after < penalty);
  if (!delta) { /* theta <- (theta + t anchor) / (1 + t), t = 2 lambda lr F */
    CHECK(le_pool_get(pool, slot, &got[2].c, &got[3].c, &(float){0}) == LE_OK);
    double t = 2 * 3 * 0.25 * at(&first, 1, 3);
    CHECK(near(LE_FLOAT32, at(&got[2], 1, 3), (at(&A, 1, 3) + t * at(&A0, 1, 3)) / (1 + t), 1));
  }
  CHECK(le_ewc_remove(ewc, slot) == LE_OK);
  CHECK(le_ewc_penalty(ewc, &penalty) == LE_OK && penalty == 0);
  REFUSED(ctx, LE_ERROR_VALUE, "which has none",
          le_ewc_get(ewc, slot, &got[0].c, &got[1].c, &got[2].c, &got[3].c));

  /* Destroyed in any order; a step with a record that is gone is refused. */
  le_ewc_destroy(ewc);
  REFUSED(ctx, LE_ERROR_VALUE, "ewc: expected a handle in use",
          le_pool_adapt_slot(pool, slot, &x.c, &grad.c, &step, &outcome, &norm));
  array_free(&A), array_free(&B), array_free(&A0), array_free(&B0), array_free(&first);
  array_free(&second), array_free(&x), array_free(&grad);
  for (int i = 0; i < 4; ++i) array_free(&got[i]);
  le_pool_destroy(pool);
  le_context_destroy(ctx);
}

void test_ewc(void) {
  records(LE_EWC_FACTOR);
  records(LE_EWC_DELTA);
}
