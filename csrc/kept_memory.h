// Large buffers that outlive the call that filled them: their pages are there for the next one.
#pragma once

#include <cstddef>
#include <mutex>

namespace le {

class KeptMemory {
 public:
  // A buffer of at least so many bytes, aligned to huge pages; it goes back when it is destroyed.
  class Buffer {
   public:
    Buffer() = default;
    Buffer(KeptMemory *from, void *data, size_t bytes) : from_(from), data_(data), bytes_(bytes) {}
    Buffer(Buffer &&other) noexcept { *this = static_cast<Buffer &&>(other); }
    Buffer &operator=(Buffer &&other) noexcept;
    ~Buffer();
    float *floats() const { return static_cast<float *>(data_); }

   private:
    KeptMemory *from_ = nullptr;
    void *data_ = nullptr;
    size_t bytes_ = 0;
  };

  KeptMemory() = default;
  KeptMemory(const KeptMemory &) = delete;
  KeptMemory &operator=(const KeptMemory &) = delete;
  ~KeptMemory();

  // Throws std::bad_alloc.
  Buffer take(size_t bytes);

 private:
  static constexpr int kBuffers = 2;                                            // at most are kept
  static constexpr size_t kLeast = size_t(8) << 20, kMost = size_t(128) << 20;  // bytes of each
  struct Kept {
    void *data = nullptr;
    size_t bytes = 0;
  };

  void give(void *data, size_t bytes) noexcept;

  std::mutex mutex_;  // only ever tried: whoever does not get it at once goes without
  Kept kept_[kBuffers];
};

}  // namespace le
