// A pool of worker threads that run numbered tasks of one job at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <type_traits>

#include "include/lora_engine.h"

namespace le {

class ThreadPool {
 public:
  // num_threads 0: the CPUs that there are, or as many as the host lends. host: whose threads
  // run the jobs; NULL: workers of its own. log: is told where they cannot be started.
  ThreadPool(int num_threads, const le_host_threads *host, const le_log &log);
  ~ThreadPool();
  ThreadPool(const ThreadPool &) = delete;
  ThreadPool &operator=(const ThreadPool &) = delete;

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }
  void set_num_threads(int n);

  // Runs fn(task) for each task in [0, tasks), the caller taking part, on at
  // most `threads` threads. Runs in the caller alone where its own workers are busy
  // with another caller's job. Throws std::bad_alloc if a task did.
  template <class Fn>
  void run(int64_t tasks, int threads, Fn &&fn) {
    using Body = std::remove_reference_t<Fn>;
    if (threads <= 1 || tasks <= 1 || !try_run(tasks, threads, &call<Body>, &fn))
      for (int64_t task = 0; task < tasks; ++task) fn(task);
  }

  // Fork support: hold() waits for the running job and keeps new ones out.
  void hold();
  void release();
  void after_fork_in_child();

  struct State;

 private:
  using TaskFn = void (*)(void *, int64_t);
  template <class Body>
  static void call(void *body, int64_t task) {
    (*static_cast<Body *>(body))(task);
  }
  void run_on_host(int64_t tasks, int threads, TaskFn fn, void *body) const;
  void note_missing(int wanted);
  bool try_run(int64_t tasks, int threads, TaskFn fn, void *body);

  const le_host_threads host_;
  const le_log log_;
  std::atomic<int> num_threads_;
  std::mutex job_;  // held by the caller whose job runs
  State *state_;    // shared with the workers; remade in a forked child
};

// The caller's cap on threads, set by le_limit_threads (0: none).
int thread_limit();
int set_thread_limit(int limit);

// CPUs this process may run on.
int available_cpus();

}  // namespace le
