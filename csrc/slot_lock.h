// A reader-writer lock of four bytes, one to a slot.
//
// A writer that waits keeps new readers out, so it cannot starve. That is safe
// because a thread that takes several takes them in ascending order of slot
// and each once (see AdapterPool::lock_shared), and no thread holds a writer's
// lock while it waits for another.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace le {

class SlotLock {
 public:
  void lock_shared() {
    for (int spins = 0;; ++spins) {
      uint32_t seen = word_.load(std::memory_order_relaxed);
      if (!(seen & (kWriter | kWaiting)) &&
          word_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire))
        return;
      back_off(spins);
    }
  }
  void unlock_shared() { word_.fetch_sub(1, std::memory_order_release); }

  void lock() {
    for (int spins = 0;; ++spins) {
      uint32_t seen = word_.load(std::memory_order_relaxed);
      if ((seen & ~kWaiting) == 0) {
        if (word_.compare_exchange_weak(seen, kWriter, std::memory_order_acquire)) return;
      } else if (!(seen & kWaiting)) {
        word_.compare_exchange_weak(seen, seen | kWaiting, std::memory_order_relaxed);
      }
      back_off(spins);
    }
  }
  void unlock() { word_.fetch_and(~kWriter, std::memory_order_release); }

  // In a forked child, where the threads that held or awaited it are gone.
  void reset() { word_.store(0, std::memory_order_relaxed); }

 private:
  static constexpr uint32_t kWriter = 1u << 31, kWaiting = 1u << 30;

  static void back_off(int spins) {
    if (spins < 64) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else if (spins < 256) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  std::atomic<uint32_t> word_{0};
};

}  // namespace le
