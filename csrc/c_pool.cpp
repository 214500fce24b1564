// The C ABI: adapter pools.
#include "c_call.h"
#include "counters.h"
#include "forward.h"

using le::require;
using le::with;

extern "C" {

le_status le_pool_create(le_context *ctx, const le_pool_options *options, le_pool **out) {
  return with("AdapterPool", "ctx", ctx, [&](le::Context &c) {
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
    auto view = std::make_shared<le::View>();
    view->pool = pool->core;
    view->block = p.view(slot, A, B_transposed);
    *out = le::issue(std::move(view));
  });
}

void le_view_release(le_view *view) { le::retire(view); }

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

}  // extern "C"
