#include "kept_memory.h"

#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace le {

KeptMemory::Buffer &KeptMemory::Buffer::operator=(Buffer &&other) noexcept {
  std::swap(from_, other.from_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

KeptMemory::Buffer::~Buffer() {
  if (data_) from_->give(data_, bytes_);
}

KeptMemory::~KeptMemory() {
  for (Kept &kept : kept_) std::free(kept.data);
}

KeptMemory::Buffer KeptMemory::take(size_t bytes) {
  constexpr size_t kPage = size_t(2) << 20;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  if (std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock.owns_lock()) {
    Kept *best = nullptr;
    for (Kept &kept : kept_)
      if (kept.bytes >= bytes && (!best || kept.bytes < best->bytes)) best = &kept;
    if (best) {
      Kept taken = std::exchange(*best, Kept{});
      return {this, taken.data, taken.bytes};
    }
  }
  void *data = std::aligned_alloc(kPage, bytes);
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {this, data, bytes};
}

void KeptMemory::give(void *data, size_t bytes) noexcept {
  if (bytes >= kLeast && bytes <= kMost) {
    if (std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      Kept *least = &kept_[0];
      for (Kept &kept : kept_)
        if (kept.bytes < least->bytes) least = &kept;
      if (least->bytes < bytes) {
        std::swap(least->data, data);
        least->bytes = bytes;
      }
    }
  }
  std::free(data);
}

}  // namespace le
