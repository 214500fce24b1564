// The C ABI: every function checks its handles and calls the core.
#include "c_call.h"

#include <memory>

#include "adapt.h"
#include "consolidate.h"
#include "counters.h"
#include "dispatch.h"
#include "fisher.h"
#include "nf4_linear.h"

struct le_view {
  std::shared_ptr<le::AdapterPool> pool;
  le::Block *block;
};

using le::core_of;
using le::guarded;
using le::require;
using le::with;

namespace {

template <class Fn>
le_status with_context(const char *op, le_context *ctx, Fn &&fn) noexcept {
  return with(op, "ctx", ctx, std::forward<Fn>(fn));
}

void check_threads(const char *op, int32_t n, int32_t least) {
  if (n < least || n > 4096)
    le::fail(LE_ERROR_VALUE, "%s: num_threads: expected %d to 4096, got %d", op, least, n);
}

void check_at_most(const char *op, const char *name, int64_t value, int64_t most) {
  if (value < 0 || value > most)
    le::fail(LE_ERROR_VALUE, "%s: %s: expected 0 to %lld, got %lld", op, name,
             static_cast<long long>(most), static_cast<long long>(value));
}

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

}  // namespace

extern "C" {

uint32_t le_version(void) {
  return (LE_VERSION_MAJOR << 16) | (LE_VERSION_MINOR << 8) | LE_VERSION_PATCH;
}

int32_t le_abi_version(void) { return LE_ABI_VERSION; }

const char *le_status_string(int32_t status) {
  switch (status) {
    case LE_OK: return "ok";
    case LE_ERROR_VALUE: return "wrong value";
    case LE_ERROR_TYPE: return "wrong type";
    case LE_ERROR_INDEX: return "no such slot";
    case LE_ERROR_MEMORY: return "out of memory";
    case LE_ERROR_UNSUPPORTED: return "unsupported";
    case LE_ERROR_INTERNAL: return "internal error";
  }
  return "unknown status";
}

const char *le_isa(void) {
  const char *name = nullptr;
  guarded(nullptr, [&] { name = le::kernels().name; });
  return name;
}

const char *le_isa_built(int32_t i, int32_t *supported) {
  for (int32_t j = 0; le::isa_table[j].kernels; ++j) {
    if (j != i) continue;
    if (supported) *supported = le::isa_table[j].supported();
    return le::isa_table[j].kernels->name;
  }
  return nullptr;
}

le_status le_context_create(const le_context_options *options, le_context **out) {
  const char *op = "le_context_create";
  return guarded(nullptr, [&] {
    require(op, "out", out);
    le_context_options o = LE_CONTEXT_OPTIONS;
    if (options && options->abi_version != LE_ABI_VERSION)
      le::fail(LE_ERROR_UNSUPPORTED, "%s: abi_version: expected %d, that of the library, got %d",
               op, LE_ABI_VERSION, options->abi_version);
    if (options) o = *options;
    check_threads(op, o.num_threads, 0);
    *out = le::issue(std::make_shared<le::Context>(o));
  });
}

void le_context_destroy(le_context *ctx) { le::retire(ctx); }

le_status le_set_num_threads(le_context *ctx, int32_t num_threads) {
  return with_context("set_num_threads", ctx, [&](le::Context &c) {
    check_threads("set_num_threads", num_threads, 1);
    c.threads.set_num_threads(num_threads);
  });
}

int32_t le_get_num_threads(const le_context *ctx) {
  return ctx && ctx->tag == le::tag_of(ctx) ? ctx->core->threads.num_threads() : 0;
}

le_status le_get_counters(le_context *ctx, le_counters *out) {
  const char *op = "counters";
  return with_context(op, ctx, [&](le::Context &c) {
    require(op, "out", out);
    *out = {};
    le::add_up(out);
    out->resident = c.resident();
  });
}

le_status le_set_tuning(le_context *ctx, int64_t bytes_per_thread, int64_t tile_rows) {
  return with_context("set_tuning", ctx, [&](le::Context &c) {
    check_at_most("set_tuning", "bytes_per_thread", bytes_per_thread, int64_t(1) << 40);
    check_at_most("set_tuning", "tile_rows", tile_rows, 4096);
    c.set_tuning(bytes_per_thread, tile_rows);
  });
}

int32_t le_limit_threads(int32_t num_threads) { return le::set_thread_limit(num_threads); }

le_status le_lora_delta(le_context *ctx, const le_array *x, const le_array *A, const le_array *B,
                        float scaling, int32_t accumulate, const le_array *y) {
  return with_context("lora_delta", ctx, [&](le::Context &c) {
    le::lora_delta(c, x, A, B, scaling, accumulate != 0, y);
  });
}

le_status le_ewc_step(le_context *ctx, const le_array *theta, const le_array *grad,
                      const le_array *fisher, const le_array *anchor, float lr, float ewc_lambda,
                      uint64_t seed, uint64_t version) {
  return with_context("ewc_step", ctx, [&](le::Context &) {
    le::ewc_step(theta, grad, fisher, anchor, lr, ewc_lambda, seed, version);
  });
}

le_status le_nf4_encode(le_context *ctx, const le_array *W, int32_t blocksize, uint8_t *packed,
                        float *absmax) {
  return with_context("nf4_quantize", ctx,
                      [&](le::Context &c) { le::nf4_encode(c, W, blocksize, packed, absmax); });
}

le_status le_nf4_decode(le_context *ctx, const le_nf4 *w, const le_array *W) {
  return with_context("nf4_dequantize", ctx, [&](le::Context &c) { le::nf4_decode(c, w, W); });
}

le_status le_nf4_linear(le_context *ctx, const le_array *x, const le_nf4 *w, const le_array *bias,
                        le_pool *pool, const le_array *ids, const le_array *weights,
                        int32_t compute, const le_array *y) {
  return with_context("nf4_linear", ctx, [&](le::Context &c) {
    le::nf4_linear(c, {x, w, bias, pool ? &core_of("nf4_linear", "pool", pool) : nullptr, ids,
                       weights, compute, y});
  });
}

le_status le_nf4_linear_backward(le_context *ctx, const le_array *grad, const le_nf4 *w,
                                 const le_array *dx) {
  return with_context("nf4_linear_backward", ctx,
                      [&](le::Context &c) { le::nf4_linear_backward(c, grad, w, dx); });
}

le_status le_fisher_accumulate(le_context *ctx, const le_array *F, const le_array *g, float gamma,
                               float scale) {
  return with_context("fisher_accumulate", ctx,
                      [&](le::Context &c) { le::fisher_accumulate(c, F, g, gamma, scale); });
}

le_status le_lora_fisher(le_context *ctx, const le_array *x, const le_array *grad,
                         const le_array *A, const le_array *B, float scaling,
                         const le_array *segments, int32_t accumulate, const le_array *F_A,
                         const le_array *F_B) {
  return with_context("lora_fisher", ctx, [&](le::Context &c) {
    le::lora_fisher(c, x, grad, A, B, scaling, segments, accumulate != 0, F_A, F_B);
  });
}

le_status le_lora_fisher_factors(le_context *ctx, const le_array *x, const le_array *grad,
                                 int32_t accumulate, const le_array *u, const le_array *v) {
  return with_context("lora_fisher_factors", ctx, [&](le::Context &c) {
    le::lora_fisher_factors(c, x, grad, accumulate != 0, u, v);
  });
}

le_status le_pool_create(le_context *ctx, const le_pool_options *options, le_pool **out) {
  return with_context("AdapterPool", ctx, [&](le::Context &c) {
    require("AdapterPool", "options", options);
    require("AdapterPool", "out", out);
    std::shared_ptr<le::Context> kept = ctx->core;
    *out = le::issue(std::shared_ptr<le::AdapterPool>(new le::AdapterPool(c, *options),
                                                      [kept](le::AdapterPool *p) { delete p; }));
  });
}

void le_pool_destroy(le_pool *pool) { le::retire(pool); }

le_status le_pool_add(le_pool *pool, const le_array *A, const le_array *B, float scaling,
                      int32_t *slot) {
  const char *op = "AdapterPool.add";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "A", A);
    require(op, "B", B);
    require(op, "slot", slot);
    *slot = p.add(A, B, scaling);
  });
}

le_status le_pool_set(le_pool *pool, int32_t slot, const le_array *A, const le_array *B,
                      float scaling) {
  const char *op = "AdapterPool.set";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "A", A);
    require(op, "B", B);
    p.set(slot, A, B, scaling);
  });
}

le_status le_pool_get(le_pool *pool, int32_t slot, const le_array *A, const le_array *B,
                      float *scaling) {
  const char *op = "AdapterPool.get";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "A", A);
    require(op, "B", B);
    require(op, "scaling", scaling);
    p.get(slot, A, B, scaling);
  });
}

le_status le_pool_remove(le_pool *pool, int32_t slot) {
  return with("AdapterPool.remove", "pool", pool, [&](le::AdapterPool &p) { p.remove(slot); });
}

le_status le_pool_remove_all(le_pool *pool, const le_array *slots) {
  const char *op = "AdapterPool.remove";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "slots", slots);
    p.remove_all(slots);
  });
}

le_status le_pool_ranks(le_pool *pool, int32_t slot, int32_t *ranks) {
  const char *op = "AdapterPool.rank";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "ranks", ranks);
    p.ranks(slot, ranks);
  });
}

le_status le_pool_version(le_pool *pool, int32_t slot, uint64_t *version) {
  const char *op = "AdapterPool.version";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "version", version);
    *version = p.version(slot);
  });
}

le_status le_pool_rollback(le_pool *pool, int32_t slot) {
  return with("AdapterPool.rollback", "pool", pool, [&](le::AdapterPool &p) { p.rollback(slot); });
}

le_status le_pool_view(le_pool *pool, int32_t slot, le_array *A, le_array *B_transposed,
                       le_view **out) {
  const char *op = "AdapterPool.view";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "A", A);
    require(op, "B_transposed", B_transposed);
    require(op, "out", out);
    std::unique_ptr<le_view> view(new le_view{pool->core, nullptr});
    view->block = p.view(slot, A, B_transposed);
    *out = view.release();
  });
}

void le_view_release(le_view *view) {
  if (!view) return;
  view->pool->unview(view->block);
  delete view;
}

le_status le_pool_get_info(le_pool *pool, le_pool_info *info) {
  const char *op = "AdapterPool.info";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "info", info);
    *info = p.info();
  });
}

le_status le_pool_forward(le_pool *pool, const le_array *x, const le_array *ids,
                          const le_array *weights, int32_t transposed, int32_t accumulate,
                          const le_array *y) {
  return with("batched_lora_delta", "pool", pool, [&](le::AdapterPool &p) {
    le::ForwardCall counted;
    le::pool_forward(p, x, ids, weights, transposed != 0, accumulate != 0, y);
  });
}

le_status le_pool_forward_slot(le_pool *pool, int32_t slot, const le_array *x, int32_t transposed,
                               int32_t accumulate, const le_array *y) {
  return with("batched_lora_delta", "pool", pool, [&](le::AdapterPool &p) {
    le::ForwardCall counted;
    le::pool_forward_slot(p, slot, x, transposed != 0, accumulate != 0, y);
  });
}

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
    require(op, "step", step);
    require(op, "outcome", outcome);
    require(op, "grad_norm", grad_norm);
    le::AdaptCall counted;
    le::pool_adapt_slot(p, slot, x, grad, *step, ewc_of(op, *step), {}, outcome, grad_norm);
    le::count_skipped(outcome, 1);
  });
}

le_status le_pool_adapt_slot_observed(le_pool *pool, int32_t slot, const le_array *x,
                                      const le_array *grad, const le_step *step, const le_array *u,
                                      const le_array *v, uint8_t *outcome, double *grad_norm) {
  const char *op = "batched_adapt";
  return with(op, "pool", pool, [&](le::AdapterPool &p) {
    require(op, "step", step);
    require(op, "u", u);
    require(op, "v", v);
    require(op, "outcome", outcome);
    require(op, "grad_norm", grad_norm);
    le::AdaptCall counted;
    le::pool_adapt_slot(p, slot, x, grad, *step, ewc_of(op, *step), {u, v}, outcome, grad_norm);
    le::count_skipped(outcome, 1);
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
