#include "context.h"

#include <pthread.h>

#include <algorithm>

#include "adapter_pool.h"
#include "counters.h"

namespace le {
namespace {

// Contexts there are, so that a fork can wait for their work. Never destroyed:
// the handlers outlive every static.
struct Registry {
  std::mutex mutex;
  std::vector<Context *> contexts;
};
Registry &registry() {
  static Registry *r = new Registry;
  return *r;
}

void before_fork() {
  registry().mutex.lock();
  for (Context *c : registry().contexts) c->hold_for_fork();
  hold_counters();
}
void after_fork(bool in_child) {
  release_counters();
  for (Context *c : registry().contexts) c->release_after_fork(in_child);
  registry().mutex.unlock();
}

uint64_t next_id() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace

Context::Context(const le_context_options &options)
    : threads(options.num_threads, options.threads, options.log ? *options.log : le_log{}),
      memory(options.allocator),
      id_(next_id()),
      log_(options.log ? *options.log : le_log{}) {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(before_fork, [] { after_fork(false); }, [] { after_fork(true); });
  });
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().contexts.push_back(this);
}

Context::~Context() {
  std::lock_guard<std::mutex> lock(registry().mutex);
  auto &all = registry().contexts;
  all.erase(std::remove(all.begin(), all.end(), this), all.end());
}

int Context::threads_for(int64_t bytes) const {
  int most = threads.num_threads();
  if (thread_limit() > 0) most = std::min(most, thread_limit());
  return static_cast<int>(
      std::clamp<int64_t>(bytes / bytes_per_thread_.load(std::memory_order_relaxed), 1, most));
}

void Context::set_tuning(int64_t bytes_per_thread, int64_t tile_rows) {
  bytes_per_thread_.store(bytes_per_thread ? bytes_per_thread : kBytesPerThread);
  tile_rows_.store(tile_rows ? tile_rows : kTileRows);
}

void Context::add_pool(AdapterPool *pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  pools_.push_back(pool);
}
void Context::remove_pool(AdapterPool *pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  pools_.erase(std::remove(pools_.begin(), pools_.end(), pool), pools_.end());
}

int64_t Context::resident() {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t live = 0;
  for (AdapterPool *p : pools_) live += p->info().live;
  return live;
}

// The job first: its tasks take slot locks, so it could not end were they held.
void Context::hold_for_fork() {
  threads.hold();
  mutex_.lock();
  for (AdapterPool *p : pools_) p->hold_all();
}
void Context::release_after_fork(bool in_child) {
  for (AdapterPool *p : pools_) p->release_all(in_child);
  mutex_.unlock();
  if (in_child)
    threads.after_fork_in_child();
  else
    threads.release();
}

}  // namespace le
