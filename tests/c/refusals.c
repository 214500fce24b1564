/* Every pointer of every function NULL in turn, handles that were destroyed, and shapes, dtypes and
 * slots that are wrong: a status and words, and nothing is written. */
#include "fixture.h"

/* The call with one argument NULL; argument 0 is the handle. */
static void nulls(Fixture *f) {
  uint64_t before = fixture_state(f);
  f->merge = (le_merge){&f->slots.c, &f->weights.c, NULL, NULL, NULL, rank, 1, 3, 1e-3f, 1};
  CHECK(le_lora_delta(NULL, &f->x.c, &f->A.c, &f->B.c, 1, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_lora_delta(f->ctx, NULL, &f->A.c, &f->B.c, 1, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_lora_delta(f->ctx, &f->x.c, NULL, &f->B.c, 1, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_lora_delta(f->ctx, &f->x.c, &f->A.c, NULL, 1, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_lora_delta(f->ctx, &f->x.c, &f->A.c, &f->B.c, 1, 0, NULL) == LE_ERROR_VALUE);
  CHECK(le_ewc_step(NULL, &f->F.c, &f->x.c, &f->F.c, &f->x.c, 0.1f, 1, 1, 1) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_ewc_step(f->ctx, NULL, &f->x.c, &f->F.c, &f->x.c, 0.1f, 1, 1, 1) == LE_ERROR_VALUE);
  CHECK(le_ewc_step(f->ctx, &f->F.c, NULL, &f->F.c, &f->x.c, 0.1f, 1, 1, 1) == LE_ERROR_VALUE);
  CHECK(le_ewc_step(f->ctx, &f->F.c, &f->x.c, NULL, &f->x.c, 0.1f, 1, 1, 1) == LE_ERROR_VALUE);
  CHECK(le_ewc_step(f->ctx, &f->F.c, &f->x.c, &f->F.c, NULL, 0.1f, 1, 1, 1) == LE_ERROR_VALUE);
  CHECK(le_fisher_accumulate(NULL, &f->F.c, &f->x.c, 0.5f, 0.5f) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_fisher_accumulate(f->ctx, NULL, &f->x.c, 0.5f, 0.5f) == LE_ERROR_VALUE);
  CHECK(le_fisher_accumulate(f->ctx, &f->F.c, NULL, 0.5f, 0.5f) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher(NULL, &f->x.c, &f->grad.c, &f->A.c, &f->B.c, 1, &f->segments.c, 0, &f->F_A.c,
                       &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_lora_fisher(f->ctx, NULL, &f->grad.c, &f->A.c, &f->B.c, 1, &f->segments.c, 0, &f->F_A.c,
                       &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher(f->ctx, &f->x.c, NULL, &f->A.c, &f->B.c, 1, &f->segments.c, 0, &f->F_A.c,
                       &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher(f->ctx, &f->x.c, &f->grad.c, NULL, &f->B.c, 1, &f->segments.c, 0, &f->F_A.c,
                       &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher(f->ctx, &f->x.c, &f->grad.c, &f->A.c, NULL, 1, &f->segments.c, 0, &f->F_A.c,
                       &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher(f->ctx, &f->x.c, &f->grad.c, &f->A.c, &f->B.c, 1, &f->segments.c, 0, NULL,
                       &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher(f->ctx, &f->x.c, &f->grad.c, &f->A.c, &f->B.c, 1, &f->segments.c, 0,
                       &f->F_A.c, NULL) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher_factors(NULL, &f->x.c, &f->grad.c, 0, &f->u.c, &f->v.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_lora_fisher_factors(f->ctx, NULL, &f->grad.c, 0, &f->u.c, &f->v.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher_factors(f->ctx, &f->x.c, NULL, 0, &f->u.c, &f->v.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher_factors(f->ctx, &f->x.c, &f->grad.c, 0, NULL, &f->v.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher_factors(f->ctx, &f->x.c, &f->grad.c, 0, &f->u.c, NULL) == LE_ERROR_VALUE);
  CHECK(le_nf4_encode(NULL, &f->W.c, 64, f->packed, f->absmax) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_nf4_encode(f->ctx, NULL, 64, f->packed, f->absmax) == LE_ERROR_VALUE);
  CHECK(le_nf4_encode(f->ctx, &f->W.c, 64, NULL, f->absmax) == LE_ERROR_VALUE);
  CHECK(le_nf4_encode(f->ctx, &f->W.c, 64, f->packed, NULL) == LE_ERROR_VALUE);
  CHECK(le_nf4_decode(NULL, &f->w, &f->W.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_nf4_decode(f->ctx, NULL, &f->W.c) == LE_ERROR_VALUE);
  CHECK(le_nf4_decode(f->ctx, &f->w, NULL) == LE_ERROR_VALUE);
  CHECK(le_nf4_linear(NULL, &f->x.c, &f->w, NULL, f->pool, &f->ids.c, NULL, -1, &f->y.c) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_nf4_linear(f->ctx, NULL, &f->w, NULL, f->pool, &f->ids.c, NULL, -1, &f->y.c) ==
        LE_ERROR_VALUE);
  CHECK(le_nf4_linear(f->ctx, &f->x.c, NULL, NULL, f->pool, &f->ids.c, NULL, -1, &f->y.c) ==
        LE_ERROR_VALUE);
  CHECK(le_nf4_linear(f->ctx, &f->x.c, &f->w, NULL, f->pool, NULL, NULL, -1, &f->y.c) ==
        LE_ERROR_VALUE);
  CHECK(le_nf4_linear(f->ctx, &f->x.c, &f->w, NULL, f->pool, &f->ids.c, NULL, -1, NULL) ==
        LE_ERROR_VALUE);
  CHECK(le_nf4_linear_backward(NULL, &f->grad.c, &f->w, &f->F.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_nf4_linear_backward(f->ctx, NULL, &f->w, &f->F.c) == LE_ERROR_VALUE);
  CHECK(le_nf4_linear_backward(f->ctx, &f->grad.c, NULL, &f->F.c) == LE_ERROR_VALUE);
  CHECK(le_nf4_linear_backward(f->ctx, &f->grad.c, &f->w, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_create(NULL, &f->options, (&(le_pool *){0})) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_create(f->ctx, NULL, (&(le_pool *){0})) == LE_ERROR_VALUE);
  CHECK(le_pool_create(f->ctx, &f->options, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_add(NULL, &f->A.c, &f->B.c, 1, &f->slot) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_add(f->pool, NULL, &f->B.c, 1, &f->slot) == LE_ERROR_VALUE);
  CHECK(le_pool_add(f->pool, &f->A.c, NULL, 1, &f->slot) == LE_ERROR_VALUE);
  CHECK(le_pool_add(f->pool, &f->A.c, &f->B.c, 1, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_set(NULL, 0, &f->A.c, &f->B.c, 1) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_set(f->pool, 0, NULL, &f->B.c, 1) == LE_ERROR_VALUE);
  CHECK(le_pool_set(f->pool, 0, &f->A.c, NULL, 1) == LE_ERROR_VALUE);
  CHECK(le_pool_get(NULL, 0, &f->F_A.c, &f->F_B.c, &f->scaling) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_get(f->pool, 0, NULL, &f->F_B.c, &f->scaling) == LE_ERROR_VALUE);
  CHECK(le_pool_get(f->pool, 0, &f->F_A.c, NULL, &f->scaling) == LE_ERROR_VALUE);
  CHECK(le_pool_get(f->pool, 0, &f->F_A.c, &f->F_B.c, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_remove(NULL, 0) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_ranks(NULL, 0, &f->ranks) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_ranks(f->pool, 0, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_version(NULL, 0, &f->version) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_version(f->pool, 0, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_rollback(NULL, 0) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_export(NULL, 0, f->modules, f->buffer, sizeof(f->buffer), &f->bytes) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_export(f->pool, 0, NULL, f->buffer, sizeof(f->buffer), &f->bytes) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_export(f->pool, 0, f->modules, f->buffer, sizeof(f->buffer), NULL) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_import(NULL, f->buffer, sizeof(f->buffer), f->modules, 1, &f->slot) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_import(f->pool, NULL, sizeof(f->buffer), f->modules, 1, &f->slot) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_import(f->pool, f->buffer, sizeof(f->buffer), f->modules, 1, NULL) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_get_info(NULL, &f->of_pool) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_get_info(f->pool, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_forward(NULL, &f->x.c, &f->ids.c, NULL, 0, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_forward(f->pool, NULL, &f->ids.c, NULL, 0, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_pool_forward(f->pool, &f->x.c, NULL, NULL, 0, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_pool_forward(f->pool, &f->x.c, &f->ids.c, NULL, 0, 0, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_forward_slot(NULL, 0, &f->x.c, 0, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_forward_slot(f->pool, 0, NULL, 0, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_pool_forward_slot(f->pool, 0, &f->x.c, 0, 0, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_adapt(NULL, &f->x.c, &f->grad.c, &f->ids.c, NULL, &f->step, f->outcomes) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_adapt(f->pool, NULL, &f->grad.c, &f->ids.c, NULL, &f->step, f->outcomes) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt(f->pool, &f->x.c, NULL, &f->ids.c, NULL, &f->step, f->outcomes) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt(f->pool, &f->x.c, &f->grad.c, NULL, NULL, &f->step, f->outcomes) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt(f->pool, &f->x.c, &f->grad.c, &f->ids.c, NULL, NULL, f->outcomes) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt(f->pool, &f->x.c, &f->grad.c, &f->ids.c, NULL, &f->step, NULL) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt_slot(NULL, 0, &f->x.c, &f->grad.c, &f->step, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_adapt_slot(f->pool, 0, NULL, &f->grad.c, &f->step, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt_slot(f->pool, 0, &f->x.c, NULL, &f->step, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt_slot(f->pool, 0, &f->x.c, &f->grad.c, NULL, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt_slot(f->pool, 0, &f->x.c, &f->grad.c, &f->step, NULL, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt_slot(f->pool, 0, &f->x.c, &f->grad.c, &f->step, &f->outcome, NULL) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_gradient_size(NULL, 0, &f->size) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_gradient_size(f->pool, 0, NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_gradient(NULL, 0, &f->x.c, &f->grad.c, NULL, &f->gradient.c, &f->outcome,
                         &f->number) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_gradient(f->pool, 0, NULL, &f->grad.c, NULL, &f->gradient.c, &f->outcome,
                         &f->number) == LE_ERROR_VALUE);
  CHECK(le_pool_gradient(f->pool, 0, &f->x.c, NULL, NULL, &f->gradient.c, &f->outcome,
                         &f->number) == LE_ERROR_VALUE);
  CHECK(le_pool_gradient(f->pool, 0, &f->x.c, &f->grad.c, NULL, NULL, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_gradient(f->pool, 0, &f->x.c, &f->grad.c, NULL, &f->gradient.c, NULL, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_gradient(f->pool, 0, &f->x.c, &f->grad.c, NULL, &f->gradient.c, &f->outcome,
                         NULL) == LE_ERROR_VALUE);
  CHECK(le_pool_apply(NULL, 0, &f->gradient.c, 1, &f->step, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_apply(f->pool, 0, NULL, 1, &f->step, &f->outcome, &f->number) == LE_ERROR_VALUE);
  CHECK(le_pool_apply(f->pool, 0, &f->gradient.c, 1, NULL, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_apply(f->pool, 0, &f->gradient.c, 1, &f->step, NULL, &f->number) == LE_ERROR_VALUE);
  CHECK(le_pool_apply(f->pool, 0, &f->gradient.c, 1, &f->step, &f->outcome, NULL) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_shrink(NULL, 0, &f->x.c, &f->h.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_pool_shrink(f->pool, 0, NULL, &f->h.c) == LE_ERROR_VALUE);
  CHECK(le_pool_shrink(f->pool, 0, &f->x.c, NULL) == LE_ERROR_VALUE);
  CHECK(le_ewc_create(NULL, 0, 1, (&(le_ewc *){0})) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_ewc_create(f->pool, 0, 1, NULL) == LE_ERROR_VALUE);
  CHECK(le_ewc_set(NULL, 0, &f->F_A.c, &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_ewc_set(f->ewc, 0, NULL, &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_set(f->ewc, 0, &f->F_A.c, NULL) == LE_ERROR_VALUE);
  CHECK(le_ewc_restore(NULL, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, &f->star_B.c) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_ewc_restore(f->ewc, 0, NULL, &f->F_B.c, &f->star_A.c, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_restore(f->ewc, 0, &f->F_A.c, NULL, &f->star_A.c, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_restore(f->ewc, 0, &f->F_A.c, &f->F_B.c, NULL, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_restore(f->ewc, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, NULL) == LE_ERROR_VALUE);
  CHECK(le_ewc_get(NULL, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_ewc_get(f->ewc, 0, NULL, &f->F_B.c, &f->star_A.c, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_get(f->ewc, 0, &f->F_A.c, NULL, &f->star_A.c, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_get(f->ewc, 0, &f->F_A.c, &f->F_B.c, NULL, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_get(f->ewc, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, NULL) == LE_ERROR_VALUE);
  CHECK(le_ewc_remove(NULL, 0) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_ewc_penalty(NULL, &f->number) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_ewc_penalty(f->ewc, NULL) == LE_ERROR_VALUE);
  CHECK(le_consolidate(NULL, 0, &f->merge, &f->to_A.c, &f->to_B.c, f->versions, &f->info) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(f->ctx), "expected a pointer, got NULL"));
  CHECK(le_consolidate(f->pool, 0, NULL, &f->to_A.c, &f->to_B.c, f->versions, &f->info) ==
        LE_ERROR_VALUE);
  CHECK(le_consolidate(f->pool, 0, &f->merge, NULL, &f->to_B.c, f->versions, &f->info) ==
        LE_ERROR_VALUE);
  CHECK(le_consolidate(f->pool, 0, &f->merge, &f->to_A.c, NULL, f->versions, &f->info) ==
        LE_ERROR_VALUE);
  CHECK(le_consolidate(f->pool, 0, &f->merge, &f->to_A.c, &f->to_B.c, NULL, &f->info) ==
        LE_ERROR_VALUE);
  CHECK(le_consolidate(f->pool, 0, &f->merge, &f->to_A.c, &f->to_B.c, f->versions, NULL) ==
        LE_ERROR_VALUE);
  CHECK(fixture_state(f) == before);
}

static void destroyed(Fixture *f) {
  uint64_t before = fixture_state(f);
  Fixture gone, *d = &gone;
  fixture(d);
  le_ewc *ewc = d->ewc;
  le_pool *pool = d->pool;
  le_context *ctx = d->ctx;
  fixture_done(d);
  CHECK(le_lora_delta(ctx, &f->x.c, &f->A.c, &f->B.c, 1, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_step(ctx, &f->F.c, &f->x.c, &f->F.c, &f->x.c, 0.1f, 1, 1, 1) == LE_ERROR_VALUE);
  CHECK(le_fisher_accumulate(ctx, &f->F.c, &f->x.c, 0.5f, 0.5f) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher(ctx, &f->x.c, &f->grad.c, &f->A.c, &f->B.c, 1, &f->segments.c, 0, &f->F_A.c,
                       &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_lora_fisher_factors(ctx, &f->x.c, &f->grad.c, 0, &f->u.c, &f->v.c) == LE_ERROR_VALUE);
  CHECK(le_nf4_encode(ctx, &f->W.c, 64, f->packed, f->absmax) == LE_ERROR_VALUE);
  CHECK(le_nf4_decode(ctx, &f->w, &f->W.c) == LE_ERROR_VALUE);
  CHECK(le_nf4_linear(ctx, &f->x.c, &f->w, NULL, f->pool, &f->ids.c, NULL, -1, &f->y.c) ==
        LE_ERROR_VALUE);
  CHECK(le_nf4_linear_backward(ctx, &f->grad.c, &f->w, &f->F.c) == LE_ERROR_VALUE);
  CHECK(le_pool_create(ctx, &f->options, (&(le_pool *){0})) == LE_ERROR_VALUE);
  CHECK(le_pool_add(pool, &f->A.c, &f->B.c, 1, &f->slot) == LE_ERROR_VALUE);
  CHECK(le_pool_set(pool, 0, &f->A.c, &f->B.c, 1) == LE_ERROR_VALUE);
  CHECK(le_pool_get(pool, 0, &f->F_A.c, &f->F_B.c, &f->scaling) == LE_ERROR_VALUE);
  CHECK(le_pool_remove(pool, 0) == LE_ERROR_VALUE);
  CHECK(le_pool_ranks(pool, 0, &f->ranks) == LE_ERROR_VALUE);
  CHECK(le_pool_version(pool, 0, &f->version) == LE_ERROR_VALUE);
  CHECK(le_pool_rollback(pool, 0) == LE_ERROR_VALUE);
  CHECK(le_pool_export(pool, 0, f->modules, f->buffer, sizeof(f->buffer), &f->bytes) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_import(pool, f->buffer, sizeof(f->buffer), f->modules, 1, &f->slot) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_get_info(pool, &f->of_pool) == LE_ERROR_VALUE);
  CHECK(le_pool_forward(pool, &f->x.c, &f->ids.c, NULL, 0, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_pool_forward_slot(pool, 0, &f->x.c, 0, 0, &f->y.c) == LE_ERROR_VALUE);
  CHECK(le_pool_adapt(pool, &f->x.c, &f->grad.c, &f->ids.c, NULL, &f->step, f->outcomes) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_adapt_slot(pool, 0, &f->x.c, &f->grad.c, &f->step, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_gradient_size(pool, 0, &f->size) == LE_ERROR_VALUE);
  CHECK(le_pool_gradient(pool, 0, &f->x.c, &f->grad.c, NULL, &f->gradient.c, &f->outcome,
                         &f->number) == LE_ERROR_VALUE);
  CHECK(le_pool_apply(pool, 0, &f->gradient.c, 1, &f->step, &f->outcome, &f->number) ==
        LE_ERROR_VALUE);
  CHECK(le_pool_shrink(pool, 0, &f->x.c, &f->h.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_create(pool, 0, 1, (&(le_ewc *){0})) == LE_ERROR_VALUE);
  CHECK(le_ewc_set(ewc, 0, &f->F_A.c, &f->F_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_restore(ewc, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_get(ewc, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, &f->star_B.c) == LE_ERROR_VALUE);
  CHECK(le_ewc_remove(ewc, 0) == LE_ERROR_VALUE);
  CHECK(le_ewc_penalty(ewc, &f->number) == LE_ERROR_VALUE);
  CHECK(le_consolidate(pool, 0, &f->merge, &f->to_A.c, &f->to_B.c, f->versions, &f->info) ==
        LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(NULL), "expected a handle in use, got one that was destroyed"));
  CHECK(le_nf4_linear(f->ctx, &f->x.c, &f->w, NULL, pool, &f->ids.c, NULL, -1, &f->y.c) ==
        LE_ERROR_VALUE);
  f->step.ewc = ewc;
  CHECK(le_pool_adapt(f->pool, &f->x.c, &f->grad.c, &f->ids.c, NULL, &f->step, f->outcomes) ==
        LE_ERROR_VALUE);
  f->step.ewc = NULL;
  CHECK(fixture_state(f) == before);
}

/* A shape, a dtype, a slot, an overlap, a number: named, with what was expected. */
static void wrong(Fixture *f) {
  uint64_t before = fixture_state(f);
  le_array bad = f->x.c, none = {0};
  bad.shape[1] = in - 1;
  REFUSED(f->ctx, LE_ERROR_VALUE,
          "batched_lora_delta: x: expected shape [n, in] = [n, 8], got [3, 7]",
          le_pool_forward(f->pool, &bad, &f->ids.c, NULL, 0, 0, &f->y.c));
  bad = f->x.c, bad.dtype = 99;
  REFUSED(f->ctx, LE_ERROR_TYPE, "x: expected float32",
          le_pool_forward_slot(f->pool, 0, &bad, 0, 0, &f->y.c));
  bad = f->B.c, bad.dtype = LE_INT32;
  REFUSED(f->ctx, LE_ERROR_TYPE, "got int32",
          le_lora_delta(f->ctx, &f->x.c, &f->A.c, &bad, 1, 0, &f->y.c));
  bad = f->x.c, bad.ndim = 7;
  REFUSED(f->ctx, LE_ERROR_VALUE, "at most 4 dimensions, got 7",
          le_pool_shrink(f->pool, 0, &bad, &f->h.c));
  bad = f->x.c, bad.ndim = -1;
  REFUSED(f->ctx, LE_ERROR_VALUE, "got -1", le_pool_shrink(f->pool, 0, &bad, &f->h.c));
  bad = f->y.c, bad.flags = LE_ARRAY_READONLY;
  REFUSED(f->ctx, LE_ERROR_VALUE, "read-only",
          le_pool_forward_slot(f->pool, 0, &f->x.c, 0, 0, &bad));
  bad = f->y.c, bad.strides[0] = 1;
  REFUSED(f->ctx, LE_ERROR_VALUE, "own address",
          le_pool_forward_slot(f->pool, 0, &f->x.c, 0, 0, &bad));
  bad = f->y.c, bad.data = f->x.c.data;
  REFUSED(f->ctx, LE_ERROR_VALUE, "memory shared with x",
          le_pool_forward_slot(f->pool, 0, &f->x.c, 0, 0, &bad));
  bad = f->y.c, bad.data = NULL;
  REFUSED(f->ctx, LE_ERROR_VALUE, "expected memory behind shape",
          le_pool_forward_slot(f->pool, 0, &f->x.c, 0, 0, &bad));
  REFUSED(f->ctx, LE_ERROR_VALUE, "got none",
          le_pool_forward_slot(f->pool, 0, &none, 0, 0, &f->y.c));
  for (int32_t slot = -2; slot < 3; slot = slot < 0 ? 2 : 3) {
    REFUSED(f->ctx, LE_ERROR_INDEX, "slot: expected one of the pool's 2 slots",
            le_pool_forward_slot(f->pool, slot, &f->x.c, 0, 0, &f->y.c));
    CHECK(le_pool_set(f->pool, slot, &f->A.c, &f->B.c, 1) == LE_ERROR_INDEX);
    CHECK(le_pool_get(f->pool, slot, &f->F_A.c, &f->F_B.c, &f->scaling) == LE_ERROR_INDEX);
    CHECK(le_pool_remove(f->pool, slot) == LE_ERROR_INDEX);
    CHECK(le_pool_rollback(f->pool, slot) == LE_ERROR_INDEX);
    CHECK(le_pool_export(f->pool, slot, f->modules, NULL, 0, &f->bytes) == LE_ERROR_INDEX);
    CHECK(le_ewc_set(f->ewc, slot, &f->F_A.c, &f->F_B.c) == LE_ERROR_INDEX);
    CHECK(le_ewc_remove(f->ewc, slot) == LE_ERROR_INDEX);
    CHECK(le_consolidate(f->pool, slot, &f->merge, &f->to_A.c, &f->to_B.c, f->versions, &f->info) ==
          LE_ERROR_INDEX);
    set(&f->ids, 0, n - 1, slot);
    REFUSED(f->ctx, LE_ERROR_INDEX, "at row 2",
            le_pool_adapt(f->pool, &f->x.c, &f->grad.c, &f->ids.c, NULL, &f->step, f->outcomes));
    set(&f->ids, 0, n - 1, 0);
  }
  f->step.lr = -1;
  REFUSED(f->ctx, LE_ERROR_VALUE, "lr: expected a number from 0",
          le_pool_adapt_slot(f->pool, 0, &f->x.c, &f->grad.c, &f->step, &f->outcome, &f->number));
  f->step.lr = NAN;
  REFUSED(f->ctx, LE_ERROR_VALUE, "lr: expected a finite number",
          le_pool_apply(f->pool, 0, &f->gradient.c, 1, &f->step, &f->outcome, &f->number));
  f->step.lr = 0.1f;
  REFUSED(f->ctx, LE_ERROR_VALUE, "scaling: expected a finite number",
          le_pool_set(f->pool, 0, &f->A.c, &f->B.c, INFINITY));
  f->w.blocksize = 48;
  REFUSED(f->ctx, LE_ERROR_VALUE, "power of two", le_nf4_decode(f->ctx, &f->w, &f->W.c));
  f->w.blocksize = 64, f->w.absmax = NULL;
  REFUSED(f->ctx, LE_ERROR_VALUE, "expected codes and scales",
          le_nf4_decode(f->ctx, &f->w, &f->W.c));
  CHECK(fixture_state(f) == before);
}

/* Memory that cannot be: addresses, strides and shapes that no array has, outputs that overlap. */
static void memory(Fixture *f) {
  uint64_t before = fixture_state(f);
  int32_t dtypes[] = {LE_FLOAT32, LE_BFLOAT16, LE_FLOAT16};
  const int64_t most = INT64_MAX, least = INT64_MIN;
  le_array bad, rows = f->y.c, none = {0};
  for (int i = 0; i < 3; ++i) {
    bad = f->x.c, bad.data = (char *)bad.data + 1, bad.dtype = dtypes[i];
    REFUSED(f->ctx, LE_ERROR_VALUE, i ? "address that 2 divides" : "address that 4 divides",
            le_pool_forward_slot(f->pool, 0, &bad, 0, 0, &f->y.c));
  }
  bad = f->ids.c, bad.data = (char *)bad.data + 2;
  REFUSED(f->ctx, LE_ERROR_VALUE, "ids: expected int32 at an address",
          le_pool_forward(f->pool, &f->x.c, &bad, NULL, 0, 0, &f->y.c));
  bad = f->F_A.c, bad.data = (char *)bad.data + 4, bad.dtype = LE_FLOAT64;
  if ((uintptr_t)bad.data % 8 == 4)
    REFUSED(f->ctx, LE_ERROR_VALUE, "F_A: expected float64 at an address that 8 divides",
            le_lora_fisher(f->ctx, &f->x.c, &f->grad.c, &f->A.c, &f->B.c, 1, &none, 0, &bad,
                           &f->F_B.c));
  const int64_t strides[] = {most, least, most / 4, INT64_C(1) << 48};
  for (int i = 0; i < 4; ++i) {
    bad = f->x.c, bad.strides[i % 2] = strides[i];
    REFUSED(f->ctx, LE_ERROR_VALUE, "that fit in memory",
            le_pool_forward_slot(f->pool, 0, &bad, 0, 0, &f->y.c));
  }
  bad = f->x.c, bad.strides[0] = 0, bad.shape[0] = rows.shape[0] = INT64_C(1) << 60;
  REFUSED(f->ctx, LE_ERROR_VALUE, "that fit in memory",
          le_pool_forward_slot(f->pool, 0, &bad, 0, 0, &rows));
  le_array A = f->A.c, B = f->B.c;
  A.strides[0] = B.strides[1] = 0;
  for (int e = 17; e < 63; e += 5) { /* ranks, of rows that lie one on another */
    const char *words = e < 45 ? "rank of at most 65536" : "that fit in memory";
    int32_t slot;
    A.shape[0] = B.shape[1] = INT64_C(1) << e;
    REFUSED(f->ctx, LE_ERROR_VALUE, words, le_lora_delta(f->ctx, &f->x.c, &A, &B, 1, 0, &f->y.c));
    REFUSED(f->ctx, LE_ERROR_VALUE, words, le_pool_add(f->pool, &A, &B, 1, &slot));
    REFUSED(f->ctx, LE_ERROR_VALUE, words,
            le_lora_fisher(f->ctx, &f->x.c, &f->grad.c, &A, &B, 1, &none, 0, &f->F_A.c, &f->F_B.c));
  }
  /* A single row or column may have any stride. */
  bad = f->x.c, rows = f->y.c, bad.shape[0] = rows.shape[0] = 1, bad.strides[0] = least;
  Array one = copy_of(&f->y);
  rows.data = one.c.data;
  CHECK(le_pool_forward_slot(f->pool, 0, &bad, 0, 0, &rows) == LE_OK);
  array_free(&one);

  Array wide = array(LE_FLOAT32, rank + out, in);
  le_array a = {wide.c.data, {rank, in}, {in, 1}, 2, LE_FLOAT32, 0};
  le_array b = {(float *)wide.c.data + in, {out, rank}, {rank, 1}, 2, LE_FLOAT32, 0};
  Array kept = copy_of(&wide);
  REFUSED(f->ctx, LE_ERROR_VALUE, "B: expected memory of its own, got memory shared with A",
          le_pool_get(f->pool, 0, &a, &b, &f->scaling));
  CHECK(same(&wide, &kept));
  CHECK(le_ewc_set(f->ewc, 0, &f->F_A.c, &f->F_B.c) == LE_OK);
  REFUSED(f->ctx, LE_ERROR_VALUE, "memory shared with fisher_A",
          le_ewc_get(f->ewc, 0, &a, &b, &none, &none));
  REFUSED(f->ctx, LE_ERROR_VALUE, "memory shared with fisher_B",
          le_ewc_get(f->ewc, 0, &none, &b, &a, &none));
  CHECK(same(&wide, &kept));
  array_free(&wide), array_free(&kept);
  bad = f->h.c, bad.data = f->gradient.c.data;
  REFUSED(f->ctx, LE_ERROR_VALUE, "memory shared with h",
          le_pool_gradient(f->pool, 0, &f->x.c, &f->grad.c, &bad, &f->gradient.c, &f->outcome,
                           &f->number));
  REFUSED(f->ctx, LE_ERROR_VALUE, "packed: expected memory of its own, got memory shared with W",
          le_nf4_encode(f->ctx, &f->W.c, 64, f->W.c.data, f->absmax));
  REFUSED(f->ctx, LE_ERROR_VALUE, "absmax: expected memory of its own, got memory shared with W",
          le_nf4_encode(f->ctx, &f->W.c, 64, f->packed, f->W.c.data));
  REFUSED(f->ctx, LE_ERROR_VALUE, "shared with packed",
          le_nf4_encode(f->ctx, &f->W.c, 64, (uint8_t *)f->absmax, f->absmax));
  REFUSED(f->ctx, LE_ERROR_VALUE, "absmax: expected scales at addresses that 4 divides",
          le_nf4_encode(f->ctx, &f->W.c, 64, f->packed, (float *)(void *)((char *)f->absmax + 1)));
  CHECK(fixture_state(f) == before);
}

void test_refusals(void) {
  Fixture f;
  fixture(&f);
  nulls(&f);
  wrong(&f);
  memory(&f);
  destroyed(&f);
  fixture_done(&f);
}
