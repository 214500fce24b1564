// What dlpack.h (version 1.3) has, whose layout is fixed.
#pragma once

#include <cstdint>

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

}  // namespace le
