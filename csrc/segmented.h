// A table that grows without moving what is in it, so that readers need no lock.
#pragma once

#include <atomic>
#include <cstdint>

#include "memory.h"

namespace le {

// Segment k holds 64 << k entries, all bits zero at first (T must allow that): the
// pages of entries that are not used yet cost nothing. grow_to is called by one
// thread at a time.
template <class T>
class Segmented {
 public:
  explicit Segmented(Memory &memory) : memory_(memory) {}
  Segmented(const Segmented &) = delete;
  Segmented &operator=(const Segmented &) = delete;
  ~Segmented() {
    for (int k = 0; k < kSegments; ++k) {
      T *entries = segments_[k].load();
      for (int64_t i = 0; entries && i < kFirst << k; ++i) entries[i].~T();
      memory_.release(entries, bytes_of(k));
    }
  }

  // i must lie below what grow_to was called with.
  T &operator[](int64_t i) const {
    int k = segment_of(i);
    return segments_[k].load(std::memory_order_acquire)[i - start_of(k)];
  }

  // Bytes that were allocated for it.
  int64_t grow_to(int64_t count) {
    int64_t bytes = 0;
    for (int k = 0; k < kSegments && start_of(k) < count; ++k) {
      if (segments_[k].load(std::memory_order_relaxed)) continue;
      void *zeros = memory_.allocate_zeros(bytes_of(k));
      segments_[k].store(static_cast<T *>(zeros), std::memory_order_release);
      bytes += static_cast<int64_t>(bytes_of(k));
    }
    return bytes;
  }

  static constexpr int64_t max_entries() { return start_of(kSegments); }

 private:
  static constexpr int kSegments = 25;
  static constexpr int64_t kFirst = 64;

  static constexpr int64_t start_of(int k) { return (kFirst << k) - kFirst; }
  static constexpr size_t bytes_of(int k) { return static_cast<size_t>(kFirst << k) * sizeof(T); }
  static int segment_of(int64_t i) {
    return 63 - __builtin_clzll(static_cast<uint64_t>(i / kFirst + 1));
  }

  Memory &memory_;
  std::atomic<T *> segments_[kSegments] = {};
};

}  // namespace le
