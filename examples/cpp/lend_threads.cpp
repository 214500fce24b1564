// A host that lends the engine its own threads, and starts none of the engine's. lend_threads
// ADAPTER
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "stream.hpp"

// A queue of jobs and some threads that take from it.
class HostPool {
 public:
  explicit HostPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~HostPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread &thread : threads_) thread.join();
  }

  // What le_host_threads asks for: task(arg, i) once for each i, this thread taking part.
  static void run(void *user, int64_t count, void (*task)(void *, int64_t), void *arg) {
    auto &pool = *static_cast<HostPool *>(user);
    ++pool.runs;
    std::atomic<int64_t> next{0};
    std::atomic<int> inside{0};
    auto share = [&] {
      for (int64_t i; (i = next++) < count;) task(arg, i);
    };
    for (size_t i = 1; i < pool.threads_.size() + 1 && static_cast<int64_t>(i) < count; ++i) {
      ++inside;
      pool.push([&] {
        share();
        --inside;
      });
    }
    share();
    while (inside) std::this_thread::yield();
  }

  std::atomic<long> runs{0};

 private:
  void push(std::function<void()> job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    wake_.notify_one();
  }
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::vector<std::thread> threads_;
  bool stop_ = false;
};

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  try {
    HostPool pool(2);
    const le_host_threads threads{&pool, 3, HostPool::run};
    le_context_options options = LE_CONTEXT_OPTIONS;
    options.threads = &threads;
    lora_engine::Context context(options);
    lora_engine::check(
        le_set_tuning(context.get(), 1024, 1));  // so small a stream is worth it, too
    std::printf("digest %08x\n", serve_and_teach(context, argv[1]));
    std::fprintf(stderr, "runs on lent threads: %ld\n", pool.runs.load());
    return pool.runs ? 0 : 1;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
