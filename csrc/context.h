// What every call needs: the thread pool, the memory, the log, and the list of pools for fork.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "kept_memory.h"
#include "memory.h"
#include "thread_pool.h"

namespace le {

class AdapterPool;

// A worker costs about a microsecond to bring in when it spins and some ten
// when it sleeps; a core reads this many bytes in the meantime.
constexpr int64_t kBytesPerThread = 192 * 1024;
constexpr int64_t kTileRows = 16;  // rows that share one pass over an adapter's weights

class Context {
 public:
  explicit Context(const le_context_options &options);
  ~Context();
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;

  ThreadPool threads;
  Memory memory;
  KeptMemory kept;

  uint64_t id() const { return id_; }  // no other context's, ever
  void log(le_log_level level, const char *text) const noexcept {
    if (log_.write) log_.write(log_.user, level, text);
  }

  // How many threads work of this many bytes is worth.
  int threads_for(int64_t bytes) const;

  // How work is dealt out; no result depends on it. 0: as above.
  void set_tuning(int64_t bytes_per_thread, int64_t tile_rows);
  int64_t tile_rows() const { return tile_rows_.load(std::memory_order_relaxed); }

  void add_pool(AdapterPool *pool);
  void remove_pool(AdapterPool *pool);

  int64_t resident();  // adapters in its pools

  void hold_for_fork();
  void release_after_fork(bool in_child);

 private:
  const uint64_t id_;
  const le_log log_;
  std::mutex mutex_;
  std::vector<AdapterPool *> pools_;
  std::atomic<int64_t> bytes_per_thread_{kBytesPerThread}, tile_rows_{kTileRows};
};

}  // namespace le
