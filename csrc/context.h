// What every call needs: the thread pool, and the list of pools for fork.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "thread_pool.h"

namespace le {

class AdapterPool;

// A worker costs about a microsecond to bring in when it spins and some ten
// when it sleeps; a core reads this many bytes in the meantime.
constexpr int64_t kBytesPerThread = 192 * 1024;
constexpr int64_t kTileRows = 16;  // rows that share one pass over an adapter's weights

class Context {
 public:
  explicit Context(int num_threads);
  ~Context();
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;

  ThreadPool threads;

  // How many threads work of this many bytes is worth.
  int threads_for(int64_t bytes) const;

  // How work is dealt out; no result depends on it. 0: as above.
  void set_tuning(int64_t bytes_per_thread, int64_t tile_rows);
  int64_t tile_rows() const { return tile_rows_.load(std::memory_order_relaxed); }

  void add_pool(AdapterPool *pool);
  void remove_pool(AdapterPool *pool);

  void hold_for_fork();
  void release_after_fork(bool in_child);

 private:
  std::mutex mutex_;
  std::vector<AdapterPool *> pools_;
  std::atomic<int64_t> bytes_per_thread_{kBytesPerThread}, tile_rows_{kTileRows};
};

}  // namespace le
