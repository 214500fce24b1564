#include "common.h"

#include <cstdio>

namespace le {

const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case LE_FLOAT32: return "float32";
    case LE_BFLOAT16: return "bfloat16";
    case LE_FLOAT16: return "float16";
    case LE_INT32: return "int32";
    case LE_UINT8: return "uint8";
    case LE_FLOAT64: return "float64";
    default: return "unknown dtype";
  }
}

void fail(le_status status, const char *format, ...) {
  Error error;
  error.status = status;
  va_list args;
  va_start(args, format);
  std::vsnprintf(error.text, sizeof error.text, format, args);
  va_end(args);
  throw error;
}

}  // namespace le
