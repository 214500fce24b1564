// Handles and last errors.
#include <pthread.h>

#include <cstdio>
#include <mutex>

#include "c_call.h"

namespace le {
namespace {

// Handles that were destroyed. So many wait before one is issued again, that a host that
// still holds one is told so and does not reach another's.
constexpr int kWaiting = 64;

template <class Handle>
struct Retired {
  std::mutex mutex;
  Handle *oldest = nullptr, *youngest = nullptr;
  int count = 0;
};
template <class Handle>
Retired<Handle> &retired() {
  static auto *r = new Retired<Handle>;  // never destroyed: a handle may live until exit
  return *r;
}

template <class Each>
void each_retired(Each &&each) {
  each(retired<le_context>().mutex);
  each(retired<le_pool>().mutex);
  each(retired<le_ewc>().mutex);
  each(retired<le_view>().mutex);
}
// A child may go on issuing handles.
void hold_over_forks() {
  static std::once_flag once;
  std::call_once(once, [] {
    auto release = [] { each_retired([](std::mutex &m) { m.unlock(); }); };
    pthread_atfork([] { each_retired([](std::mutex &m) { m.lock(); }); }, release, release);
  });
}

template <class Handle, class Core>
Handle *issue_handle(std::shared_ptr<Core> core) {
  hold_over_forks();
  Retired<Handle> &from = retired<Handle>();
  std::lock_guard<std::mutex> guard(from.mutex);
  Handle *handle;
  if (from.count > kWaiting) {
    handle = from.oldest;
    from.oldest = handle->next;
    --from.count;
  } else {
    handle = new Handle{};
  }
  handle->core = std::move(core);
  handle->tag = tag_of(handle);
  return handle;
}

template <class Handle>
void retire_handle(Handle *handle) noexcept {
  if (!handle || handle->tag != tag_of(handle)) return;
  handle->tag = 0;
  handle->core.reset();
  Retired<Handle> &to = retired<Handle>();
  std::lock_guard<std::mutex> guard(to.mutex);
  handle->next = nullptr;
  (to.count++ ? to.youngest->next : to.oldest) = handle;
  to.youngest = handle;
}

// The words of the contexts that failed last, the calling thread's.
struct LastError {
  uint64_t context = 0;  // its id; 0: of none
  uint64_t time = 0;     // 0: nothing yet
  char text[512] = "";
};
constexpr int kErrors = 4;
thread_local LastError errors[kErrors];
thread_local uint64_t now = 0;

}  // namespace

le_context *issue(std::shared_ptr<Context> core) {
  return issue_handle<le_context>(std::move(core));
}
le_pool *issue(std::shared_ptr<AdapterPool> core) { return issue_handle<le_pool>(std::move(core)); }
le_ewc *issue(std::shared_ptr<Ewc> core) { return issue_handle<le_ewc>(std::move(core)); }
le_view *issue(std::shared_ptr<View> core) { return issue_handle<le_view>(std::move(core)); }
void retire(le_context *handle) noexcept { retire_handle(handle); }
void retire(le_pool *handle) noexcept { retire_handle(handle); }
void retire(le_ewc *handle) noexcept { retire_handle(handle); }
void retire(le_view *handle) noexcept { retire_handle(handle); }

le_status report(const Context *context, le_status status, const char *text) noexcept {
  uint64_t id = context ? context->id() : 0;
  LastError *to = errors;
  for (LastError &e : errors) {
    if (e.time && e.context == id) {
      to = &e;
      break;
    }
    if (e.time < to->time) to = &e;
  }
  to->context = id;
  to->time = ++now;
  std::snprintf(to->text, sizeof to->text, "%s", text);
  if (context) context->log(LE_LOG_ERROR, to->text);
  return status;
}

}  // namespace le

extern "C" const char *le_last_error(const le_context *ctx) {
  bool any = !ctx || ctx->tag != le::tag_of(ctx);
  uint64_t id = any ? 0 : ctx->core->id();
  const le::LastError *last = nullptr;
  for (const le::LastError &e : le::errors)
    if (e.time && (any || e.context == id || e.context == 0) && (!last || e.time > last->time))
      last = &e;
  return last ? last->text : "";
}
