// What every function of the C ABI goes through: its handles are checked, and what
// the core throws becomes a status and the calling thread's last error.
#pragma once

#include <memory>
#include <new>
#include <stdexcept>

#include "ewc.h"

// A handle. Its memory is never given back, only reissued (c_handles.cpp), so that one
// that was destroyed can be told from one in use.
struct le_context {
  uint32_t tag;
  std::shared_ptr<le::Context> core;
  le_context *next;  // of those that were destroyed
};
struct le_pool {
  uint32_t tag;
  std::shared_ptr<le::AdapterPool> core;  // keeps its context
  le_pool *next;
};
struct le_ewc {
  uint32_t tag;
  std::shared_ptr<le::Ewc> core;  // keeps its pool
  le_ewc *next;
};

namespace le {
// The weights of a slot that a caller looks into; keeps the pool.
struct View {
  std::shared_ptr<AdapterPool> pool;
  Block *block = nullptr;
  ~View() {
    if (block) pool->unview(block);
  }
};
}  // namespace le
struct le_view {
  uint32_t tag;
  std::shared_ptr<le::View> core;
  le_view *next;
};

namespace le {

constexpr uint32_t tag_of(const le_context *) { return 0x7865746e; }
constexpr uint32_t tag_of(const le_pool *) { return 0x6c6f6f70; }
constexpr uint32_t tag_of(const le_ewc *) { return 0x6e637765; }
constexpr uint32_t tag_of(const le_view *) { return 0x77656976; }

inline const Context *context_of(const Context &context) { return &context; }
inline const Context *context_of(const AdapterPool &pool) { return &pool.context(); }
inline const Context *context_of(const Ewc &ewc) { return &ewc.pool().context(); }

// A handle of that core; throws std::bad_alloc.
le_context *issue(std::shared_ptr<Context> core);
le_pool *issue(std::shared_ptr<AdapterPool> core);
le_ewc *issue(std::shared_ptr<Ewc> core);
le_view *issue(std::shared_ptr<View> core);
// Nothing for a handle that is not in use.
void retire(le_context *handle) noexcept;
void retire(le_pool *handle) noexcept;
void retire(le_ewc *handle) noexcept;
void retire(le_view *handle) noexcept;

// Keeps the words for le_last_error and gives them to the context's log.
le_status report(const Context *context, le_status status, const char *text) noexcept;

inline void require(const char *op, const char *arg, const void *pointer) {
  if (!pointer) fail(LE_ERROR_VALUE, "%s: %s: expected a pointer, got NULL", op, arg);
}

template <class Handle>
auto &core_of(const char *op, const char *arg, const Handle *handle) {
  require(op, arg, handle);
  if (handle->tag != tag_of(handle))
    fail(LE_ERROR_VALUE, "%s: %s: expected a handle in use, got one that was destroyed", op, arg);
  return *handle->core;
}

template <class Fn>
le_status guarded(const Context *context, Fn &&fn) noexcept {
  try {
    fn();
    return LE_OK;
  } catch (const Error &e) {
    return report(context, e.status, e.text);
  } catch (const std::bad_alloc &) {
    return report(context, LE_ERROR_MEMORY, "out of memory");
  } catch (const std::length_error &) {
    return report(context, LE_ERROR_MEMORY, "out of memory");
  } catch (const std::exception &e) {
    return report(context, LE_ERROR_INTERNAL, e.what());
  } catch (...) {
    return report(context, LE_ERROR_INTERNAL, "unknown exception");
  }
}

// Runs fn(core) of a handle.
template <class Handle, class Fn>
le_status with(const char *op, const char *arg, Handle *handle, Fn &&fn) noexcept {
  bool usable = handle && handle->tag == tag_of(handle);
  return guarded(usable ? context_of(*handle->core) : nullptr,
                 [&] { fn(core_of(op, arg, handle)); });
}

}  // namespace le
