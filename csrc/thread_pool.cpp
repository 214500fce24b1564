#include "thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace le {
namespace {

constexpr auto kSpin = std::chrono::microseconds(40);  // workers park after this

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

thread_local int limit_of_thread = 0;
}  // namespace

int thread_limit() { return limit_of_thread; }
int set_thread_limit(int limit) {
  int before = limit_of_thread;
  limit_of_thread = std::max(limit, 0);
  return before;
}

int available_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

// One job at a time. `door` holds how many workers are inside, and whether the
// job is open to more: the caller closes it and leaves as soon as those inside
// are out, so a worker that wakes late costs nothing.
struct ThreadPool::State {
  static constexpr int64_t kOpen = int64_t(1) << 32;

  alignas(64) std::atomic<uint64_t> generation{0};
  alignas(64) std::atomic<int64_t> door{0};
  alignas(64) std::atomic<int64_t> next{0};
  int64_t tasks = 0;
  std::atomic<int64_t> places{0};  // workers the job takes; read before entering
  TaskFn fn = nullptr;
  void *body = nullptr;
  std::atomic<bool> out_of_memory{false};

  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> workers;
  bool told = false;  // that there are fewer than wanted

  void work() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        fn(body, task);
      } catch (...) {
        out_of_memory.store(true, std::memory_order_relaxed);
      }
    }
  }

  bool enter() {
    int64_t seen = door.load(std::memory_order_acquire);
    while ((seen & kOpen) && (seen & (kOpen - 1)) < places.load(std::memory_order_relaxed))
      if (door.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return true;
    return false;
  }

  // Returns the new generation, or sleeps until there is one.
  uint64_t await(uint64_t seen) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    for (int i = 1;; ++i) {
      uint64_t now = generation.load(std::memory_order_acquire);
      if (now != seen || stop.load(std::memory_order_relaxed)) return now;
      pause();
      if (i % 64 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleep);
    sleepers.fetch_add(1);
    wake.wait(lock, [&] { return stop.load() || generation.load() != seen; });
    sleepers.fetch_sub(1);
    return generation.load(std::memory_order_acquire);
  }

  void worker(uint64_t seen) {
    while (!stop.load(std::memory_order_relaxed)) {
      seen = await(seen);
      if (enter()) {
        work();
        door.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  // A thread that cannot be started is done without.
  void ensure_workers(int count) {
    try {
      while (static_cast<int>(workers.size()) < count) {
        uint64_t seen = generation.load();
        workers.emplace_back([this, seen] { worker(seen); });
      }
    } catch (const std::exception &) {  // std::system_error, std::bad_alloc
    }
  }

  void stop_workers() {
    {
      std::lock_guard<std::mutex> lock(sleep);
      stop.store(true);
    }
    wake.notify_all();
    for (std::thread &t : workers) t.join();
    workers.clear();
    stop.store(false);
  }
};

ThreadPool::ThreadPool(int num_threads, const le_host_threads *host, const le_log &log)
    : host_(host ? *host : le_host_threads{}), log_(log), state_(new State) {
  num_threads_ = num_threads ? num_threads : host ? host->num_threads : available_cpus();
}

ThreadPool::~ThreadPool() {
  state_->stop_workers();
  delete state_;
}

void ThreadPool::set_num_threads(int n) {
  std::lock_guard<std::mutex> lock(job_);
  if (n < num_threads()) state_->stop_workers();
  state_->told = false;
  num_threads_.store(n);
}

// As many tasks of the host's as threads may take part; each takes ours until there are none.
void ThreadPool::run_on_host(int64_t tasks, int threads, TaskFn fn, void *body) const {
  struct Job {
    TaskFn fn;
    void *body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
  } job{fn, body, tasks, {}, {}};
  auto share = [](void *arg, int64_t) {
    Job &j = *static_cast<Job *>(arg);
    for (int64_t task; (task = j.next.fetch_add(1, std::memory_order_relaxed)) < j.tasks;) {
      try {
        j.fn(j.body, task);
      } catch (...) {
        j.out_of_memory.store(true, std::memory_order_relaxed);
      }
    }
  };
  int64_t shares = std::min<int64_t>(tasks, std::min(threads, num_threads()));
  host_.run(host_.user, shares, share, &job);
  if (job.out_of_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

// Once, until the number of threads is set again.
void ThreadPool::note_missing(int wanted) {
  int there = static_cast<int>(state_->workers.size());
  if (there >= wanted || state_->told) return;
  state_->told = true;
  char text[96];
  std::snprintf(text, sizeof text, "expected to start %d threads, could start %d", wanted, there);
  if (log_.write) log_.write(log_.user, LE_LOG_WARNING, text);
}

bool ThreadPool::try_run(int64_t tasks, int threads, TaskFn fn, void *body) {
  if (host_.run) {
    run_on_host(tasks, threads, fn, body);
    return true;
  }
  std::unique_lock<std::mutex> lock(job_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  State &s = *state_;
  int helpers = static_cast<int>(std::min<int64_t>(tasks, std::min(threads, num_threads()))) - 1;
  if (helpers < 1) return false;
  s.ensure_workers(helpers);
  note_missing(helpers);
  s.fn = fn;
  s.body = body;
  s.tasks = tasks;
  s.places.store(helpers, std::memory_order_relaxed);
  s.out_of_memory.store(false, std::memory_order_relaxed);
  s.next.store(0, std::memory_order_relaxed);
  s.door.store(State::kOpen, std::memory_order_release);
  s.generation.fetch_add(1);
  if (s.sleepers.load() > 0) {
    {
      std::lock_guard<std::mutex> asleep(s.sleep);
    }
    s.wake.notify_all();
  }
  s.work();
  s.door.fetch_and(~State::kOpen, std::memory_order_acq_rel);
  for (int i = 0; s.door.load(std::memory_order_acquire) != 0; ++i) {
    if (i < 4096)
      pause();
    else
      std::this_thread::yield();
  }
  if (s.out_of_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
  return true;
}

void ThreadPool::hold() { job_.lock(); }
void ThreadPool::release() { job_.unlock(); }

// The workers did not come along; what they shared may be in any state, so it
// is left behind for good.
void ThreadPool::after_fork_in_child() {
  state_ = new State;
  job_.unlock();
}

}  // namespace le
