// Adapters as safetensors bytes: the header read as hostile, and written.
#pragma once

#include <string>
#include <vector>

#include "common.h"

namespace le {

// A tensor of a file; data points into its bytes.
struct Tensor {
  std::string name;
  std::string dtype;  // as safetensors names it
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // in the bytes behind the header
  const char *data = nullptr;
};

// The tensors of a whole file. Fails with LE_ERROR_VALUE naming the tensor: a header of at
// most 16 MiB, no name twice, known dtypes, sizes that agree, data without holes.
std::vector<Tensor> read_safetensors(const char *op, const void *bytes, size_t size);

// A file's length and header for tensors without data, begin and end being set here.
std::string safetensors_header(std::vector<Tensor> *tensors);

// Whether a name can stand in a file: UTF-8.
bool is_utf8(const char *text, size_t size);

}  // namespace le
