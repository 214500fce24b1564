// The C ABI: what changes adapters by gradients, holds them back, and merges them.
#include "adapt.h"
#include "c_call.h"
#include "consolidate.h"
#include "counters.h"

using le::core_of;
using le::require;
using le::with;

namespace {

void require_record(const char *op, const le_array *first, const le_array *second,
                    const le_array *anchor_A, const le_array *anchor_B) {
  require(op, "first", first);
  require(op, "second", second);
  require(op, "anchor_A", anchor_A);
  require(op, "anchor_B", anchor_B);
}

le::Ewc *ewc_of(const char *op, const le_step &step) {
  return step.ewc ? &core_of(op, "ewc", step.ewc) : nullptr;
}

// Of one slot; sums: where its samples' Fisher factors are added up, or nowhere.
void adapt_slot(const char *op, le::AdapterPool &pool, int32_t slot, const le_array *x,
                const le_array *grad, const le_step *step, const le::FactorSums &sums,
                uint8_t *outcome, double *grad_norm) {
  require(op, "step", step);
  require(op, "outcome", outcome);
  require(op, "grad_norm", grad_norm);
  le::AdaptCall counted;
  le::pool_adapt_slot(pool, slot, x, grad, *step, ewc_of(op, *step), sums, outcome, grad_norm);
  le::count_skipped(outcome, 1);
}

}  // namespace

extern "C" {

le_status le_pool_adapt(le_pool *pool, const le_array *x, const le_array *grad, const le_array *ids,
                        const le_array *weights, const le_step *step, uint8_t *outcomes) {
  const char *op = "batched_adapt";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "step", step);
    require(op, "outcomes", outcomes);
    le::AdaptCall counted;
    le::pool_adapt(p, x, grad, ids, weights, *step, ewc_of(op, *step), outcomes);
    le::count_skipped(outcomes, ids->shape[0]);
  });
}

le_status le_pool_adapt_slot(le_pool *pool, int32_t slot, const le_array *x, const le_array *grad,
                             const le_step *step, uint8_t *outcome, double *grad_norm) {
  const char *op = "batched_adapt";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    adapt_slot(op, p, slot, x, grad, step, {}, outcome, grad_norm);
  });
}

le_status le_pool_adapt_slot_observed(le_pool *pool, int32_t slot, const le_array *x,
                                      const le_array *grad, const le_step *step, const le_array *u,
                                      const le_array *v, uint8_t *outcome, double *grad_norm) {
  const char *op = "batched_adapt";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "u", u);
    require(op, "v", v);
    adapt_slot(op, p, slot, x, grad, step, {u, v}, outcome, grad_norm);
  });
}

le_status le_pool_gradient_size(le_pool *pool, int32_t slot, int64_t *size) {
  const char *op = "AdapterPool.gradient_size";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "size", size);
    *size = le::pool_gradient_size(p, slot);
  });
}

le_status le_pool_gradient(le_pool *pool, int32_t slot, const le_array *x, const le_array *grad,
                           const le_array *h, const le_array *gradient, uint8_t *outcome,
                           double *grad_norm) {
  const char *op = "AdapterPool.gradient";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "outcome", outcome);
    require(op, "grad_norm", grad_norm);
    le::pool_gradient(p, slot, x, grad, h, gradient, outcome, grad_norm);
  });
}

le_status le_pool_apply(le_pool *pool, int32_t slot, const le_array *gradient, float scale,
                        const le_step *step, uint8_t *outcome, double *grad_norm) {
  const char *op = "AdapterPool.apply";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "step", step);
    require(op, "outcome", outcome);
    require(op, "grad_norm", grad_norm);
    le::pool_apply(p, slot, gradient, scale, *step, ewc_of(op, *step), outcome, grad_norm);
  });
}

le_status le_pool_shrink(le_pool *pool, int32_t slot, const le_array *x, const le_array *h) {
  return with("AdapterPool.shrink", "pool", pool,
              [&](le::AdapterPool &p) { le::pool_shrink(p, slot, x, h); });
}

le_status le_ewc_create(le_pool *pool, int32_t form, float ewc_lambda, le_ewc **out) {
  return with("EWC", "pool", pool, [&](le::AdapterPool &p) {
    require("EWC", "out", out);
    std::shared_ptr<le::AdapterPool> kept = pool->core;
    *out = le::issue(std::shared_ptr<le::Ewc>(new le::Ewc(p, form, ewc_lambda),
                                              [kept](le::Ewc *e) { delete e; }));
  });
}

void le_ewc_destroy(le_ewc *ewc) { le::retire(ewc); }

le_status le_ewc_set(le_ewc *ewc, int32_t slot, const le_array *first, const le_array *second) {
  return with("EWC.set", "ewc", ewc, [&](le::Ewc &e) {
    require("EWC.set", "first", first);
    require("EWC.set", "second", second);
    e.set(slot, first, second);
  });
}

le_status le_ewc_get(le_ewc *ewc, int32_t slot, const le_array *first, const le_array *second,
                     const le_array *anchor_A, const le_array *anchor_B) {
  return with("EWC.get", "ewc", ewc, [&](le::Ewc &e) {
    require_record("EWC.get", first, second, anchor_A, anchor_B);
    e.get(slot, first, second, anchor_A, anchor_B);
  });
}

le_status le_ewc_restore(le_ewc *ewc, int32_t slot, const le_array *first, const le_array *second,
                         const le_array *anchor_A, const le_array *anchor_B) {
  return with("EWC.restore", "ewc", ewc, [&](le::Ewc &e) {
    require_record("EWC.restore", first, second, anchor_A, anchor_B);
    e.restore(slot, first, second, anchor_A, anchor_B);
  });
}

le_status le_ewc_remove(le_ewc *ewc, int32_t slot) {
  return with("EWC.remove", "ewc", ewc, [&](le::Ewc &e) { e.remove(slot); });
}

le_status le_ewc_penalty(le_ewc *ewc, double *penalty) {
  return with("EWC.penalty", "ewc", ewc, [&](le::Ewc &e) {
    require("EWC.penalty", "penalty", penalty);
    *penalty = e.penalty();
  });
}

le_status le_consolidate(le_pool *pool, int32_t base, const le_merge *merge, const le_array *A,
                         const le_array *B, uint64_t *versions, le_merge_info *info) {
  const char *op = "consolidate";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "merge", merge);
    require(op, "versions", versions);
    require(op, "info", info);
    le::consolidate(p, base, *merge, A, B, versions, info);
  });
}

}  // extern "C"
