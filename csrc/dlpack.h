// What dlpack.h (version 1.3) has, whose layout is fixed.
#pragma once

#include <cstdint>

#include "include/lora_engine.h"

namespace le {

struct DLTensor {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape;
  int64_t *strides;  // in elements; NULL: compact, the last dimension runs fastest
  uint64_t byte_offset;
};
static_assert(sizeof(void *) != 8 || sizeof(DLTensor) == 48, "as in dlpack.h");

// DLDeviceType and DLDataTypeCode.
constexpr int32_t kDLCpu = 1, kDLCudaHost = 3, kDLRocmHost = 11;
constexpr uint8_t kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4;

// The le_dtype of a tensor's elements; -1 for others.
inline int32_t dtype_of(const DLTensor &t) {
  if (t.lanes != 1) return -1;
  if (t.code == kDLFloat && t.bits == 32) return LE_FLOAT32;
  if (t.code == kDLFloat && t.bits == 16) return LE_FLOAT16;
  if (t.code == kDLFloat && t.bits == 64) return LE_FLOAT64;
  if (t.code == kDLBfloat && t.bits == 16) return LE_BFLOAT16;
  if (t.code == kDLInt && t.bits == 32) return LE_INT32;
  if (t.code == kDLUInt && t.bits == 8) return LE_UINT8;
  return -1;
}

}  // namespace le
