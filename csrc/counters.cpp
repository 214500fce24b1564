#include "counters.h"

#ifndef LE_NO_COUNTERS

#include <algorithm>
#include <mutex>
#include <new>

#include "per_thread.h"

namespace le {
namespace {

struct Membership;

// The threads' numbers, in a list through them. Never destroyed: threads end after every static.
struct Registry {
  std::mutex mutex;
  Membership *living = nullptr;
  ThreadCounters ended;  // sums of the threads that are gone
};
Registry &registry() {
  static Registry *r = new Registry;
  return *r;
}

void add(OpCounters &to, const OpCounters &from) {
  bump(to.calls, from.calls.load(std::memory_order_relaxed));
  bump(to.timed, from.timed.load(std::memory_order_relaxed));
  bump(to.nanoseconds, from.nanoseconds.load(std::memory_order_relaxed));
  for (int i = 0; i <= LE_DURATION_BUCKETS; ++i)
    bump(to.buckets[i], from.buckets[i].load(std::memory_order_relaxed));
}

void add(ThreadCounters &to, const ThreadCounters &from) {
  add(to.forward, from.forward);
  add(to.adapt, from.adapt);
  bump(to.skipped, from.skipped.load(std::memory_order_relaxed));
}

// Registers a thread's numbers, and keeps their sums when it ends.
struct Membership {
  ThreadCounters own;
  Membership *next, *previous = nullptr;

  Membership() {
    std::lock_guard<std::mutex> lock(registry().mutex);
    next = registry().living;
    if (next) next->previous = this;
    registry().living = this;
  }
  ~Membership() {
    std::lock_guard<std::mutex> lock(registry().mutex);
    (previous ? previous->next : registry().living) = next;
    if (next) next->previous = previous;
    add(registry().ended, own);
  }
};

void copy(le_op_counters &to, const OpCounters &from) {
  to.calls = from.calls.load(std::memory_order_relaxed);
  to.timed = from.timed.load(std::memory_order_relaxed);
  to.seconds = 1e-9 * static_cast<double>(from.nanoseconds.load(std::memory_order_relaxed));
  for (int i = 0; i <= LE_DURATION_BUCKETS; ++i)
    to.buckets[i] = from.buckets[i].load(std::memory_order_relaxed);
}

}  // namespace

ThreadCounters &counters() {
  try {
    LE_PER_THREAD(Membership, membership);
    return membership.own;
  } catch (const std::bad_alloc &) {
    static ThreadCounters uncounted;  // the call goes on, and nobody adds these up
    return uncounted;
  }
}

void OpCounters::end(int64_t ns) {
  bump(timed);
  bump(nanoseconds, static_cast<uint64_t>(ns));
  int i = 0;
  for (int64_t most = 1000; i < LE_DURATION_BUCKETS && ns > most; most *= 2) ++i;
  bump(buckets[i]);
}

void count_skipped(const uint8_t *outcomes, int64_t n) {
  int64_t skipped = std::count(outcomes, outcomes + n, static_cast<uint8_t>(LE_NOT_FINITE));
  if (skipped) bump(counters().skipped, static_cast<uint64_t>(skipped));
}

void hold_counters() { registry().mutex.lock(); }
void release_counters() { registry().mutex.unlock(); }

void add_up(le_counters *out) {
  ThreadCounters total;
  {
    std::lock_guard<std::mutex> lock(registry().mutex);
    add(total, registry().ended);
    for (const Membership *m = registry().living; m; m = m->next) add(total, m->own);
  }
  copy(out->forward, total.forward);
  copy(out->adapt, total.adapt);
  out->skipped = total.skipped.load(std::memory_order_relaxed);
}

}  // namespace le

#endif
