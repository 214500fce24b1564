/* Pools: slots, weights, versions, forward. */
#include "check.h"

enum { in = 24, out = 13, n = 5 };

static void slots(le_context *ctx, int32_t dtype) {
  const int64_t outs[] = {out};
  le_pool *pool = new_pool(ctx, in, 1, outs, dtype, 1);
  Array A, B, other, A2 = array_with_gap(LE_FLOAT32, 2, in, 3), B2 = array(LE_FLOAT32, out, 2);
  int32_t slot = add_drawn(pool, in, out, 2, 0.75f, &A, &B), ranks = -1;
  uint64_t version = 0, later = 0;
  float scaling = 0;
  CHECK(slot == 0);
  CHECK(le_pool_ranks(pool, slot, &ranks) == LE_OK && ranks == 2);
  CHECK(le_pool_version(pool, slot, &version) == LE_OK && version == 1);
  CHECK(le_pool_get(pool, slot, &A2.c, &B2.c, &scaling) == LE_OK && scaling == 0.75f);
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < in; ++k) CHECK(at(&A2, r, k) == at(&A, r, k));
  for (int o = 0; o < out; ++o)
    for (int r = 0; r < 2; ++r) CHECK(at(&B2, o, r) == at(&B, o, r));

  /* set, then back again, once. */
  other = drawn(LE_FLOAT32, 2, in, -1, 1);
  CHECK(le_pool_set(pool, slot, &other.c, &B.c, 2) == LE_OK);
  CHECK(le_pool_get(pool, slot, &A2.c, &B2.c, &scaling) == LE_OK && scaling == 2);
  CHECK(at(&A2, 1, 5) == at(&other, 1, 5));
  CHECK(le_pool_rollback(pool, slot) == LE_OK);
  CHECK(le_pool_get(pool, slot, &A2.c, &B2.c, &scaling) == LE_OK && scaling == 0.75f);
  CHECK(at(&A2, 1, 5) == at(&A, 1, 5));
  CHECK(le_pool_version(pool, slot, &later) == LE_OK && later == version + 2);
  REFUSED(ctx, LE_ERROR_VALUE, "got none kept for slot 0", le_pool_rollback(pool, slot));

  /* Freed slots are reissued oldest first; bytes go back to what they were. */
  le_pool_info before, after;
  Array A3, B3;
  CHECK(le_pool_get_info(pool, &before) == LE_OK && before.live == 1 && before.issued == 1);
  for (int32_t i = 1; i < 4; ++i) {
    CHECK(add_drawn(pool, in, out, i, 1, &A3, &B3) == i);
    array_free(&A3), array_free(&B3);
  }
  CHECK(le_pool_remove(pool, 2) == LE_OK && le_pool_remove(pool, 1) == LE_OK);
  REFUSED(ctx, LE_ERROR_INDEX, "which was removed", le_pool_version(pool, 1, &version));
  CHECK(add_drawn(pool, in, out, 1, 1, &A3, &B3) == 2);
  array_free(&A3), array_free(&B3);
  CHECK(le_pool_remove(pool, 2) == LE_OK && le_pool_remove(pool, 3) == LE_OK);
  CHECK(le_pool_get_info(pool, &after) == LE_OK && after.live == 1 && after.issued == 4);
  CHECK(after.bytes == before.bytes && before.bytes > 0);
  array_free(&A), array_free(&B), array_free(&A2), array_free(&B2), array_free(&other);
  le_pool_destroy(pool);
}

/* Mixtures of two, rows without an adapter, both directions. */
static void forward(le_context *ctx, int transposed, int accumulate, int weighted) {
  const int64_t outs[] = {out};
  le_pool *pool = new_pool(ctx, in, 1, outs, LE_FLOAT32, 0);
  Array A[3], B[3];
  const double scaling[] = {0.5, 1, 2};
  for (int s = 0; s < 3; ++s)
    CHECK(add_drawn(pool, in, out, s + 1, (float)scaling[s], &A[s], &B[s]) == s);
  int64_t from = transposed ? out : in, to = transposed ? in : out;
  Array x = drawn(LE_FLOAT32, n, from, -1, 1), y = drawn(LE_FLOAT32, n, to, -1, 1);
  Array ids = array(LE_INT32, n, 2), weights = drawn(LE_FLOAT32, n, 2, -1, 1), before = copy_of(&y);
  for (int i = 0; i < n; ++i) set(&ids, i, 0, i % 3), set(&ids, i, 1, i == 1 ? -1 : (i + 1) % 3);
  set(&ids, 3, 0, -1), set(&ids, 3, 1, -1);
  CHECK(le_pool_forward(pool, &x.c, &ids.c, weighted ? &weights.c : NULL, transposed, accumulate,
                        &y.c) == LE_OK);
  for (int i = 0; i < n; ++i) {
    double row[in], want[in] = {0}, size[in] = {0};
    for (int64_t j = 0; accumulate && j < to; ++j) want[j] = at(&before, i, j);
    row_of(&x, i, row);
    for (int k = 0; k < 2; ++k) {
      int id = (int)at(&ids, i, k);
      double factor = id < 0 ? 0 : scaling[id] * (weighted ? at(&weights, i, k) : 1);
      if (id >= 0 && !transposed) add_delta(&A[id], &B[id], factor, row, want, size);
      for (int64_t r = 0; id >= 0 && transposed && r < A[id].rows; ++r) {
        double g = 0;
        for (int o = 0; o < out; ++o) g += at(&B[id], o, r) * row[o];
        for (int j = 0; j < in; ++j) want[j] += factor * at(&A[id], r, j) * g, size[j] += 20;
      }
    }
    for (int64_t j = 0; j < to; ++j) {
      CHECK(near(LE_FLOAT32, at(&y, i, j), want[j], size[j]));
      if (i == 3) CHECK(at(&y, i, j) == (accumulate ? at(&before, i, j) : 0));
    }
  }
  /* One slot for all rows: the bits of a batch that names it. */
  Array one = array(LE_FLOAT32, n, to), batch = array(LE_FLOAT32, n, to);
  for (int i = 0; i < n; ++i) set(&ids, i, 0, 1), set(&ids, i, 1, -1);
  CHECK(le_pool_forward_slot(pool, 1, &x.c, transposed, 0, &one.c) == LE_OK);
  CHECK(le_pool_forward(pool, &x.c, &ids.c, NULL, transposed, 0, &batch.c) == LE_OK);
  CHECK(same(&one, &batch));
  for (int s = 0; s < 3; ++s) array_free(&A[s]), array_free(&B[s]);
  array_free(&x), array_free(&y), array_free(&ids), array_free(&weights), array_free(&before);
  array_free(&one), array_free(&batch);
  le_pool_destroy(pool);
}

/* Three slices, the middle one missing: y is their concatenation, h that of their shrinks. */
static void sliced(le_context *ctx) {
  const int64_t outs[] = {6, 4, 5};
  le_pool *pool = new_pool(ctx, in, 3, outs, LE_FLOAT32, 0);
  Array A0 = drawn(LE_FLOAT32, 2, in, -1, 1), B0 = drawn(LE_FLOAT32, 6, 2, -1, 1);
  Array A2 = drawn(LE_FLOAT32, 1, in, -1, 1), B2 = drawn(LE_FLOAT32, 5, 1, -1, 1);
  le_array A[3] = {A0.c, {0}, A2.c}, B[3] = {B0.c, {0}, B2.c};
  int32_t slot, ranks[3];
  CHECK(le_pool_add(pool, A, B, 0.5f, &slot) == LE_OK);
  CHECK(le_pool_ranks(pool, slot, ranks) == LE_OK);
  CHECK(ranks[0] == 2 && ranks[1] == 0 && ranks[2] == 1);
  Array x = drawn(LE_FLOAT32, 2, in, -1, 1), y = array(LE_FLOAT32, 2, 15),
        h = array(LE_FLOAT32, 2, 3);
  CHECK(le_pool_forward_slot(pool, slot, &x.c, 0, 0, &y.c) == LE_OK);
  CHECK(le_pool_shrink(pool, slot, &x.c, &h.c) == LE_OK);
  for (int i = 0; i < 2; ++i) {
    double row[in], want[15] = {0}, size[15] = {0};
    row_of(&x, i, row);
    add_delta(&A0, &B0, 0.5, row, want, size);
    add_delta(&A2, &B2, 0.5, row, want + 10, size + 10);
    for (int o = 0; o < 15; ++o) CHECK(near(LE_FLOAT32, at(&y, i, o), want[o], size[o]));
    for (int r = 0; r < 3; ++r) {
      double dot = 0;
      for (int k = 0; k < in; ++k) dot += row[k] * (r < 2 ? at(&A0, r, k) : at(&A2, 0, k));
      CHECK(near(LE_FLOAT32, at(&h, i, r), dot, in));
    }
  }
  array_free(&A0), array_free(&B0), array_free(&A2), array_free(&B2);
  array_free(&x), array_free(&y), array_free(&h);
  le_pool_destroy(pool);
}

/* Several removed at once, or none. */
static void removed_together(le_context *ctx) {
  const int64_t outs[] = {out};
  le_pool *pool = new_pool(ctx, in, 1, outs, LE_FLOAT32, 0);
  Array A, B, slots = array(LE_INT32, 0, 2);
  le_pool_info info;
  for (int s = 0; s < 3; ++s) {
    CHECK(add_drawn(pool, in, out, 1, 1, &A, &B) == s);
    array_free(&A), array_free(&B);
  }
  set(&slots, 0, 0, 2), set(&slots, 0, 1, 7);
  REFUSED(ctx, LE_ERROR_INDEX, "got 7", le_pool_remove_all(pool, &slots.c));
  CHECK(le_pool_remove_all(pool, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_get_info(pool, &info) == LE_OK && info.live == 3);
  set(&slots, 0, 1, 0);
  CHECK(le_pool_remove_all(pool, &slots.c) == LE_OK);
  CHECK(le_pool_get_info(pool, &info) == LE_OK && info.live == 1);
  CHECK(add_drawn(pool, in, out, 1, 1, &A, &B) != 1);
  array_free(&A), array_free(&B), array_free(&slots);
  le_pool_destroy(pool);
}

/* The weights where they lie: stepped in place, zeroed with the slot, there until the view goes. */
static void viewed(le_context *ctx) {
  const int64_t outs[] = {out};
  le_pool *pool = new_pool(ctx, in, 1, outs, LE_FLOAT32, 0);
  Array A, B, A2 = array(LE_FLOAT32, 2, in), B2 = array(LE_FLOAT32, out, 2);
  int32_t slot = add_drawn(pool, in, out, 2, 1, &A, &B);
  le_array a, bt;
  le_view *view = NULL, *second = NULL;
  float scaling;
  CHECK(le_pool_view(pool, slot, &a, &bt, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_view(pool, slot, NULL, &bt, &view) == LE_ERROR_VALUE && view == NULL);
  CHECK(le_pool_view(pool, 5, &a, &bt, &view) == LE_ERROR_INDEX);
  CHECK(le_pool_view(pool, slot, &a, &bt, &view) == LE_OK);
  CHECK(le_pool_view(pool, slot, &a, &bt, &second) == LE_OK);
  CHECK(a.shape[0] == 2 && a.shape[1] == in && bt.shape[0] == 2 && bt.shape[1] == out);
  for (int r = 0; r < 2; ++r) {
    for (int k = 0; k < in; ++k) CHECK(((float *)a.data)[r * a.strides[0] + k] == at(&A, r, k));
    for (int o = 0; o < out; ++o) CHECK(((float *)bt.data)[r * bt.strides[0] + o] == at(&B, o, r));
  }
  le_array none = {0};
  CHECK(le_pool_get(pool, slot, &A2.c, &none, &scaling) == LE_OK);
  CHECK(le_pool_get(pool, slot, &none, &B2.c, &scaling) == LE_OK); /* each alone */
  CHECK(same(&A, &A2) && same(&B, &B2));
  ((float *)a.data)[3] = 42;
  CHECK(le_pool_get(pool, slot, &A2.c, &B2.c, &scaling) == LE_OK && at(&A2, 0, 3) == 42);
  CHECK(le_pool_remove(pool, slot) == LE_OK && ((float *)a.data)[3] == 0);
  le_view_release(second);
  le_view_release(second); /* again: nothing */
  le_pool_destroy(pool);
  CHECK(((float *)a.data)[3] == 0); /* still there */
  le_view_release(view);
  le_view_release(view);
  le_view_release(NULL);
  array_free(&A), array_free(&B), array_free(&A2), array_free(&B2);
}

void test_pool(void) {
  le_context *ctx = new_context(2);
  for (int32_t dtype = LE_FLOAT32; dtype <= LE_FLOAT16; ++dtype) slots(ctx, dtype);
  for (int bits = 0; bits < 8; ++bits) forward(ctx, bits & 1, bits >> 1 & 1, bits >> 2);
  sliced(ctx);
  removed_together(ctx);
  viewed(ctx);
  le_context_destroy(ctx);
}
