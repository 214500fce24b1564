/* Gradient steps, gradients, consolidation. */
#include "check.h"

enum { in = 18, out = 9, n = 6, rank = 2 };

typedef struct Learner {
  le_context *ctx;
  le_pool *pool;
  Array A, B, x, grad, ids;
  double gA[rank * in], gB[out * rank], norm; /* the mean over rows 0, 2 and 5 */
} Learner;

static Learner learner(int32_t history) {
  Learner l = {0};
  const int64_t outs[] = {out};
  l.ctx = new_context(1);
  l.pool = new_pool(l.ctx, in, 1, outs, LE_FLOAT32, history);
  CHECK(add_drawn(l.pool, in, out, rank, 0.5f, &l.A, &l.B) == 0);
  l.x = drawn(LE_FLOAT32, n, in, -1, 1);
  l.grad = drawn(LE_FLOAT32, n, out, -1, 1);
  l.ids = array(LE_INT32, 0, n);
  for (int i = 0; i < n; ++i) set(&l.ids, 0, i, i == 0 || i == 2 || i == 5 ? 0 : -1);
  for (int i = 0; i < n; ++i) {
    double row[in], up[out];
    row_of(&l.x, i, row), row_of(&l.grad, i, up);
    if (at(&l.ids, 0, i) == 0) add_gradients(&l.A, &l.B, 0.5 / 3, row, up, l.gA, l.gB);
  }
  for (int e = 0; e < rank * in; ++e) l.norm += l.gA[e] * l.gA[e];
  for (int e = 0; e < out * rank; ++e) l.norm += l.gB[e] * l.gB[e];
  l.norm = sqrt(l.norm);
  return l;
}
static void done(Learner *l) {
  array_free(&l->A), array_free(&l->B), array_free(&l->x), array_free(&l->grad),
      array_free(&l->ids);
  le_pool_destroy(l->pool);
  le_context_destroy(l->ctx);
}

/* The weights are A - lr (clip gA + decay A), and B likewise at lr_B. */
static void moved(Learner *l, double lr, double lr_B, double clip, double decay) {
  Array A = array(LE_FLOAT32, rank, in), B = array(LE_FLOAT32, out, rank);
  float scaling;
  CHECK(le_pool_get(l->pool, 0, &A.c, &B.c, &scaling) == LE_OK);
  for (int e = 0; e < rank * in; ++e) {
    double was = at(&l->A, e / in, e % in), want = was - lr * (clip * l->gA[e] + decay * was);
    CHECK(near(LE_FLOAT32, at(&A, e / in, e % in), want, 4));
  }
  for (int e = 0; e < out * rank; ++e) {
    double was = at(&l->B, e / rank, e % rank), want = was - lr_B * (clip * l->gB[e] + decay * was);
    CHECK(near(LE_FLOAT32, at(&B, e / rank, e % rank), want, 4));
  }
  array_free(&A), array_free(&B);
}

static void batched(void) {
  uint8_t outcomes[n];
  const le_step steps[] = {
      {0.125f, 1, 0, 0, 1, NULL}, {0.125f, 4, 0.5f, 0.25f, 1, NULL}, {0.125f, 1, 0, 0, 0, NULL}};
  for (int s = 0; s < 3; ++s) {
    Learner l = learner(s == 1);
    memset(outcomes, 99, n);
    CHECK(le_pool_adapt(l.pool, &l.x.c, &l.grad.c, &l.ids.c, NULL, &steps[s], outcomes) == LE_OK);
    for (int i = 0; i < n; ++i)
      CHECK(outcomes[i] == (at(&l.ids, 0, i) == 0 ? LE_APPLIED : LE_NO_ADAPTER));
    double clip = s == 1 ? 0.5 / l.norm : 1;
    CHECK(l.norm > 0.5);
    moved(&l, steps[s].train_A ? 0.125 : 0, 0.125 * steps[s].lr_ratio, clip, steps[s].weight_decay);
    if (s == 1) {
      CHECK(le_pool_rollback(l.pool, 0) == LE_OK);
      moved(&l, 0, 0, 1, 0);
    }
    done(&l);
  }
}

/* Without a step: gradients add up in the caller's buffer, then are applied at once. */
static void gradients(void) {
  Learner l = learner(0);
  const le_step step = {0.125f, 1, 0, 0, 1, NULL};
  int64_t size = -1;
  uint8_t outcome = 99;
  double norm = -1;
  CHECK(le_pool_gradient_size(l.pool, 0, &size) == LE_OK && size == rank * in + out * rank);
  Array sum = drawn(LE_FLOAT32, 0, size, 0, 0), h = array(LE_FLOAT32, 1, rank);
  const int rows[] = {0, 2, 5};
  for (int i = 0; i < 3; ++i) {
    le_array x = l.x.c, grad = l.grad.c;
    x.data = (float *)x.data + rows[i] * in, x.shape[0] = 1;
    grad.data = (float *)grad.data + rows[i] * out, grad.shape[0] = 1;
    CHECK(le_pool_shrink(l.pool, 0, &x, &h.c) == LE_OK);
    CHECK(le_pool_gradient(l.pool, 0, &x, &grad, i ? &h.c : NULL, &sum.c, &outcome, &norm) ==
          LE_OK);
    CHECK(outcome == LE_APPLIED && norm > 0);
  }
  for (int e = 0; e < rank * in; ++e) CHECK(near(LE_FLOAT32, at(&sum, 0, e), 3 * l.gA[e], 9));
  for (int r = 0; r < rank; ++r)
    for (int o = 0; o < out; ++o)
      CHECK(near(LE_FLOAT32, at(&sum, 0, rank * in + r * out + o), 3 * l.gB[o * rank + r], 9));
  CHECK(le_pool_apply(l.pool, 0, &sum.c, 1.0f / 3, &step, &outcome, &norm) == LE_OK);
  CHECK(outcome == LE_APPLIED && near(LE_FLOAT32, norm, l.norm, 9));
  moved(&l, 0.125, 0.125, 1, 0);
  array_free(&sum), array_free(&h);
  done(&l);
}

static void one_slot(void) {
  Learner l = learner(0);
  const le_step step = {0.125f, 1, 0, 0, 1, NULL};
  uint8_t outcome = 99;
  double norm = -1;
  float last = ((float *)l.grad.c.data)[n * out - 1];
  /* NaN: untouched, and said. */
  ((float *)l.grad.c.data)[n * out - 1] = NAN;
  CHECK(le_pool_adapt_slot(l.pool, 0, &l.x.c, &l.grad.c, &step, &outcome, &norm) == LE_OK);
  CHECK(outcome == LE_NOT_FINITE && norm != norm);
  moved(&l, 0, 0, 1, 0);
  ((float *)l.grad.c.data)[n * out - 1] = last;
  memset(l.gA, 0, sizeof l.gA), memset(l.gB, 0, sizeof l.gB);
  for (int i = 0; i < n; ++i) {
    double row[in], up[out];
    row_of(&l.x, i, row), row_of(&l.grad, i, up);
    add_gradients(&l.A, &l.B, 0.5 / n, row, up, l.gA, l.gB);
  }
  CHECK(le_pool_adapt_slot(l.pool, 0, &l.x.c, &l.grad.c, &step, &outcome, &norm) == LE_OK);
  CHECK(outcome == LE_APPLIED);
  moved(&l, 0.125, 0.125, 1, 0);
  done(&l);
}

/* The same, the samples' Fisher factors added up with it; not where nothing was applied. */
static void observed(void) {
  Learner l = learner(0);
  le_step step = {0.125f, 1, 0, 0, 1, NULL};
  uint8_t outcome = 99;
  double norm = -1;
  Array u = drawn(LE_FLOAT32, 2, out, 1, 1), v = drawn(LE_FLOAT32, 2, in, 1, 1);
  le_array x = l.x.c, grad = l.grad.c;
  x.shape[0] = grad.shape[0] = 2;
  CHECK(le_pool_adapt_slot_observed(l.pool, 0, &x, &grad, &step, NULL, &v.c, &outcome, &norm) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt_slot_observed(l.pool, 0, &x, &grad, &step, &u.c, &v.c, &outcome, &norm) ==
        LE_OK);
  CHECK(outcome == LE_APPLIED);
  for (int o = 0; o < out; ++o) {
    double want = 1 + at(&l.grad, 0, o) * at(&l.grad, 0, o) + at(&l.grad, 1, o) * at(&l.grad, 1, o);
    CHECK(near(LE_FLOAT32, at(&u, 0, o), want, 1) && at(&u, 1, o) == 1);
  }
  for (int k = 0; k < in; ++k) {
    double want = 1 + at(&l.x, 0, k) * at(&l.x, 0, k) + at(&l.x, 1, k) * at(&l.x, 1, k);
    CHECK(near(LE_FLOAT32, at(&v, 0, k), want, 1) && at(&v, 1, k) == 1);
  }
  memset(l.gA, 0, sizeof l.gA), memset(l.gB, 0, sizeof l.gB);
  for (int i = 0; i < 2; ++i) {
    double row[in], up[out];
    row_of(&l.x, i, row), row_of(&l.grad, i, up);
    add_gradients(&l.A, &l.B, 0.25, row, up, l.gA, l.gB);
  }
  moved(&l, 0.125, 0.125, 1, 0);
  ((float *)grad.data)[0] = NAN;
  Array before = copy_of(&u);
  CHECK(le_pool_adapt_slot_observed(l.pool, 0, &x, &grad, &step, &u.c, &v.c, &outcome, &norm) ==
        LE_OK);
  CHECK(outcome == LE_NOT_FINITE && same(&u, &before));
  ((float *)grad.data)[0] = 2e15f;
  step.lr = 0;
  CHECK(le_pool_adapt_slot_observed(l.pool, 0, &x, &grad, &step, &u.c, &v.c, &outcome, &norm) ==
        LE_OK);
  CHECK(outcome == LE_NOT_OBSERVED && same(&u, &before));
  array_free(&u), array_free(&v), array_free(&before);
  done(&l);
}

/* D_0 + 1/4 D_1 + 3/4 D_2, exactly within the rank. */
static void consolidate(void) {
  le_context *ctx = new_context(2);
  const int64_t outs[] = {out};
  le_pool *pool = new_pool(ctx, in, 1, outs, LE_FLOAT32, 0);
  Array A[3], B[3], slots = array(LE_INT32, 0, 2), weights = array(LE_FLOAT32, 0, 3);
  const double parts[] = {1, 0.25, 0.75};
  for (int s = 0; s < 3; ++s) CHECK(add_drawn(pool, in, out, rank, 0.5f, &A[s], &B[s]) == s);
  set(&slots, 0, 0, 1), set(&slots, 0, 1, 2);
  set(&weights, 0, 0, 0), set(&weights, 0, 1, 0.25), set(&weights, 0, 2, 0.75);
  le_merge merge = {&slots.c, &weights.c, NULL, NULL, NULL, 3 * rank, 2, 20, 1e-6f, 1};
  Array to_A = array(LE_FLOAT32, 3 * rank, in), to_B = array(LE_FLOAT32, out, 3 * rank);
  uint64_t versions[3] = {0};
  le_merge_info info = {0, 0};
  CHECK(le_consolidate(pool, 0, &merge, &to_A.c, &to_B.c, versions, &info) == LE_OK);
  for (int o = 0; o < out; ++o)
    for (int k = 0; k < in; ++k) {
      double want = 0, got = 0;
      for (int s = 0; s < 3; ++s)
        for (int r = 0; r < rank; ++r) want += parts[s] * 0.5 * at(&B[s], o, r) * at(&A[s], r, k);
      for (int r = 0; r < 3 * rank; ++r) got += 2 * at(&to_B, o, r) * at(&to_A, r, k);
      CHECK(fabs(got - want) < 1e-4);
    }
  CHECK(versions[0] == 1 && versions[1] == 1 && versions[2] == 1 && info.subspace_sweeps >= 1);
  for (int s = 0; s < 3; ++s) array_free(&A[s]), array_free(&B[s]);
  array_free(&slots), array_free(&weights), array_free(&to_A), array_free(&to_B);
  le_pool_destroy(pool);
  le_context_destroy(ctx);
}

void test_learning(void) {
  batched();
  gradients();
  one_slot();
  observed();
  consolidate();
}
