// Types and small helpers that every part of the core shares.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "include/lora_engine.h"

namespace le {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// What x, out and weights may be.
inline bool is_float(int32_t dtype) {
  return dtype == LE_FLOAT32 || dtype == LE_BFLOAT16 || dtype == LE_FLOAT16;
}

inline int64_t dtype_size(int32_t dtype) {
  if (dtype == LE_UINT8) return 1;
  if (dtype == LE_FLOAT64) return 8;
  return dtype == LE_FLOAT32 || dtype == LE_INT32 ? 4 : 2;
}
const char *dtype_name(int32_t dtype);

// Thrown inside the core only; c_call.h turns it into a status.
struct Error {
  le_status status;
  char text[512];
};

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(le_status status, const char *format,
                                                             ...);

// A buffer that is reused from call to call, so that steady state allocates
// nothing. What it held before is lost by a call of get.
template <class T>
class Scratch {
 public:
  T *get(int64_t count) {
    if (size_ < count) {
      data_.reset();  // first: the old and the new need not be there together
      size_ = 0;
      data_.reset(new T[static_cast<size_t>(count)]);
      size_ = count;
    }
    return data_.get();
  }
  // The same from an address that 64 divides: whole vectors then cross no cache line.
  T *get_aligned(int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    T *p = get(count + kLine);
    uintptr_t past = reinterpret_cast<uintptr_t>(p) % 64;
    return past ? p + (64 - past) / sizeof(T) : p;
  }
  // Gives a large buffer back: allocating it again costs little beside its use.
  void trim() {
    constexpr int64_t kKept = 4 << 20;  // bytes
    if (size_ * static_cast<int64_t>(sizeof(T)) <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t size_ = 0;
};

}  // namespace le
