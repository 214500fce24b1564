// The C ABI: versions, instruction sets, contexts.
#include "c_call.h"
#include "counters.h"
#include "dispatch.h"

using le::guarded;
using le::require;
using le::with;

namespace {

void check_threads(const char *op, int32_t n, int32_t least) {
  if (n < least || n > 4096)
    le::fail(LE_ERROR_VALUE, "%s: num_threads: expected %d to 4096, got %d", op, least, n);
}

void check_at_most(const char *op, const char *name, int64_t value, int64_t most) {
  if (value < 0 || value > most)
    le::fail(LE_ERROR_VALUE, "%s: %s: expected 0 to %lld, got %lld", op, name,
             static_cast<long long>(most), static_cast<long long>(value));
}

// What a host lends is whole.
void check_lent(const char *op, const le_context_options &o) {
  if (o.threads) {
    require(op, "threads.run", reinterpret_cast<const void *>(o.threads->run));
    check_threads(op, o.threads->num_threads, 1);
  }
  if (o.allocator) {
    require(op, "allocator.allocate", reinterpret_cast<const void *>(o.allocator->allocate));
    require(op, "allocator.release", reinterpret_cast<const void *>(o.allocator->release));
  }
  if (o.log) require(op, "log.write", reinterpret_cast<const void *>(o.log->write));
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
    check_lent(op, o);
    *out = le::issue(std::make_shared<le::Context>(o));
  });
}

void le_context_destroy(le_context *ctx) { le::retire(ctx); }

le_status le_set_num_threads(le_context *ctx, int32_t num_threads) {
  return with("set_num_threads", "ctx", ctx, [&](le::Context &c) {
    check_threads("set_num_threads", num_threads, 1);
    c.threads.set_num_threads(num_threads);
  });
}

int32_t le_get_num_threads(const le_context *ctx) {
  return ctx && ctx->tag == le::tag_of(ctx) ? ctx->core->threads.num_threads() : 0;
}

int32_t le_limit_threads(int32_t num_threads) { return le::set_thread_limit(num_threads); }

le_status le_get_counters(le_context *ctx, le_counters *out) {
  const char *op = "counters";
  return with(op, "ctx", ctx, [&](le::Context &c) {
    require(op, "out", out);
    *out = {};
    le::add_up(out);
    out->resident = c.resident();
  });
}

le_status le_set_tuning(le_context *ctx, int64_t bytes_per_thread, int64_t tile_rows) {
  return with("set_tuning", "ctx", ctx, [&](le::Context &c) {
    check_at_most("set_tuning", "bytes_per_thread", bytes_per_thread, int64_t(1) << 40);
    check_at_most("set_tuning", "tile_rows", tile_rows, 4096);
    c.set_tuning(bytes_per_thread, tile_rows);
  });
}

}  // extern "C"
