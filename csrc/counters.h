// What the engine did, counted for whoever watches it: calls, how long they took, steps that
// were left out. A thread writes its own numbers only; a reader adds them up.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "include/lora_engine.h"

namespace le {

#ifdef LE_NO_COUNTERS

struct ForwardCall {};
struct AdaptCall {};
inline void count_skipped(const uint8_t *, int64_t) {}
inline void hold_counters() {}
inline void release_counters() {}
inline void add_up(le_counters *) {}

#else

// One op's numbers in one thread.
struct OpCounters {
  std::atomic<uint64_t> calls{0}, timed{0}, nanoseconds{0};
  std::atomic<uint64_t> buckets[LE_DURATION_BUCKETS + 1] = {};
  // Of this thread alone: calls until the next that is timed, and what draws them (Knuth's MMIX).
  uint32_t until = 0;
  uint64_t state = 1;

  // 0 to 126 more, LE_TIMED_EVERY - 1 on average: a fixed step would time one call of a pattern.
  void draw() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    until = static_cast<uint32_t>(state >> 33) % (2 * LE_TIMED_EVERY - 1);
  }
  void end(int64_t ns);  // of a call that was timed
};

struct ThreadCounters {
  OpCounters forward, adapt;
  std::atomic<uint64_t> skipped{0};
};

ThreadCounters &counters();  // of this thread

inline void bump(std::atomic<uint64_t> &n, uint64_t by = 1) {
  n.store(n.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

// A call, while it lasts. One in LE_TIMED_EVERY is timed, at random: reading the clock twice would
// be some 3 % of the shortest ones.
class Call {
  using Clock = std::chrono::steady_clock;

 public:
  explicit Call(OpCounters &op) : op_(op) {
    timed_ = op.until == 0;
    bump(op.calls);
    if (!timed_) {
      --op.until;
      return;
    }
    op.draw();
    start_ = Clock::now();
  }
  ~Call() {
    if (timed_) op_.end(std::chrono::nanoseconds(Clock::now() - start_).count());
  }
  Call(const Call &) = delete;
  Call &operator=(const Call &) = delete;

 private:
  OpCounters &op_;
  bool timed_;
  Clock::time_point start_;
};

struct ForwardCall : Call {
  ForwardCall() : Call(counters().forward) {}
};
struct AdaptCall : Call {
  AdaptCall() : Call(counters().adapt) {}
};

// Rows whose adapter stayed as it was, as the step was not finite.
void count_skipped(const uint8_t *outcomes, int64_t n);

void hold_counters();  // around a fork
void release_counters();
void add_up(le_counters *out);

#endif

}  // namespace le
