// Where a context's memory comes from: malloc, or the host's allocator.
#pragma once

#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "include/lora_engine.h"

namespace le {

class Memory {
 public:
  explicit Memory(const le_allocator *host) : host_(host ? *host : le_allocator{}) {}

  // Aligned as by malloc; throws std::bad_alloc.
  void *allocate(size_t bytes) {
    void *p = host_.allocate ? host_.allocate(host_.user, bytes) : std::malloc(bytes);
    if (!p) throw std::bad_alloc();
    return p;
  }
  // Zeros; of malloc's, pages that are not used cost nothing.
  void *allocate_zeros(size_t bytes) {
    if (host_.allocate) return std::memset(allocate(bytes), 0, bytes);
    void *p = std::calloc(bytes, 1);
    if (!p) throw std::bad_alloc();
    return p;
  }
  void release(void *p, size_t bytes) noexcept {
    if (!p) return;
    if (host_.allocate)
      host_.release(host_.user, p, bytes);
    else
      std::free(p);
  }

 private:
  le_allocator host_;
};

// The same for containers.
template <class T>
struct Allocator {
  using value_type = T;
  Memory *memory;

  explicit Allocator(Memory &m) : memory(&m) {}
  template <class U>
  Allocator(const Allocator<U> &other) : memory(other.memory) {}
  T *allocate(size_t n) {
    if (n > std::numeric_limits<ptrdiff_t>::max() / sizeof(T)) throw std::bad_alloc();
    return static_cast<T *>(memory->allocate(n * sizeof(T)));
  }
  void deallocate(T *p, size_t n) noexcept { memory->release(p, n * sizeof(T)); }
  bool operator==(const Allocator &other) const { return memory == other.memory; }
  bool operator!=(const Allocator &other) const { return memory != other.memory; }
};

}  // namespace le
