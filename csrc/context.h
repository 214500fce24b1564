// What every call needs: the thread pool, and the list of pools for fork.
#pragma once

#include <mutex>
#include <vector>

#include "thread_pool.h"

namespace le {

class AdapterPool;

class Context {
 public:
  explicit Context(int num_threads);
  ~Context();
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;

  ThreadPool threads;

  // How many threads work of this many bytes is worth.
  int threads_for(int64_t bytes) const;

  void add_pool(AdapterPool *pool);
  void remove_pool(AdapterPool *pool);

  void hold_for_fork();
  void release_after_fork(bool in_child);

 private:
  std::mutex mutex_;
  std::vector<AdapterPool *> pools_;
};

}  // namespace le
