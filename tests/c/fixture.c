#include "fixture.h"

void fixture(Fixture *f) {
  memset(f, 0, sizeof *f);
  f->ctx = new_context(1);
  f->outs[0] = out;
  f->pool = new_pool(f->ctx, in, 1, f->outs, LE_FLOAT32, 1);
  CHECK(add_drawn(f->pool, in, out, rank, 1, &f->A, &f->B) == 0);
  CHECK(le_pool_add(f->pool, &f->A.c, &f->B.c, 1, &f->slot) == LE_OK);
  CHECK(le_ewc_create(f->pool, LE_EWC_FACTOR, 1, &f->ewc) == LE_OK);
  f->x = drawn(LE_FLOAT32, n, in, -1, 1), f->y = array(LE_FLOAT32, n, out);
  f->grad = drawn(LE_FLOAT32, n, out, -1, 1), f->ids = drawn(LE_INT32, 0, n, 0, 0);
  f->F = drawn(LE_FLOAT32, n, in, 0, 1), f->h = array(LE_FLOAT32, n, rank);
  f->gradient = drawn(LE_FLOAT32, 0, rank * (in + out), 0, 0);
  f->segments = array(LE_INT32, 0, 2);
  set(&f->segments, 0, 0, 0), set(&f->segments, 0, 1, n);
  f->u = array(LE_FLOAT32, 0, out), f->v = array(LE_FLOAT32, 0, in);
  f->F_A = drawn(LE_FLOAT32, rank, in, 0, 1), f->F_B = drawn(LE_FLOAT32, out, rank, 0, 1);
  f->star_A = drawn(LE_FLOAT32, rank, in, 0, 1), f->star_B = drawn(LE_FLOAT32, out, rank, 0, 1);
  f->W = drawn(LE_FLOAT32, out, in, -1, 1);
  CHECK(le_nf4_encode(f->ctx, &f->W.c, 64, f->packed, f->absmax) == LE_OK);
  f->w = (le_nf4){f->packed, out, in, 64, f->absmax, NULL, NULL, NULL, 0, 0};
  f->step = (le_step){0.1f, 1, 0, 0, 1, NULL};
  f->slots = drawn(LE_INT32, 0, 1, 16, 16), f->weights = drawn(LE_FLOAT32, 0, 2, 1, 1);
  set(&f->slots, 0, 0, 1);
  f->to_A = array(LE_FLOAT32, rank, in), f->to_B = array(LE_FLOAT32, out, rank);
  f->modules[0] = "m";
  f->options.in_features = in, f->options.out_features = f->outs, f->options.num_slices = 1;
}

uint64_t fixture_state(Fixture *f) {
  Array A = array(LE_FLOAT32, rank, in), B = array(LE_FLOAT32, out, rank);
  const Array *all[] = {&A,      &B,      &f->y, &f->F,    &f->h,    &f->gradient, &f->u,     &f->v,
                        &f->F_A, &f->F_B, &f->W, &f->to_A, &f->to_B, &f->star_A,   &f->star_B};
  uint64_t sum = 0;
  float scaling = 0;
  for (int32_t slot = 0; slot < 2; ++slot) {
    uint64_t version = 0;
    CHECK(le_pool_get(f->pool, slot, &A.c, &B.c, &scaling) == LE_OK);
    CHECK(le_pool_version(f->pool, slot, &version) == LE_OK);
    sum = digest(digest(sum, &version, sizeof version), A.bytes, A.size);
    sum = digest(sum, B.bytes, B.size);
  }
  for (size_t i = 2; i < sizeof all / sizeof *all; ++i)
    sum = digest(sum, all[i]->bytes, all[i]->size);
  sum = digest(sum, f->packed, sizeof f->packed);
  sum = digest(sum, f->outcomes, sizeof f->outcomes);
  sum = digest(sum, f->buffer, sizeof f->buffer);
  le_pool_info info;
  CHECK(le_pool_get_info(f->pool, &info) == LE_OK);
  array_free(&A), array_free(&B);
  return digest(sum, &info.live, sizeof info.live);
}

void fixture_done(Fixture *f) {
  Array *all[] = {&f->A,       &f->B,    &f->x,        &f->y,        &f->grad, &f->ids,
                  &f->F,       &f->h,    &f->gradient, &f->segments, &f->u,    &f->v,
                  &f->F_A,     &f->F_B,  &f->star_A,   &f->star_B,   &f->W,    &f->slots,
                  &f->weights, &f->to_A, &f->to_B};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) array_free(all[i]);
  le_ewc_destroy(f->ewc), le_pool_destroy(f->pool), le_context_destroy(f->ctx);
}
