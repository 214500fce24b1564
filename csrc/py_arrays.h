// Python arrays as le_array, without a copy and without Python code on the way:
// NumPy through its C structs, torch through its DLPack exchange functions.
#pragma once

#include <nanobind/nanobind.h>

#include "include/lora_engine.h"

namespace le_py {

namespace nb = nanobind;

struct Array {
  le_array view{};
  bool torch = false;
  const le_array *ptr() const { return &view; }
  int64_t rows() const { return view.ndim >= 2 ? view.shape[0] : 1; }
  int64_t width() const { return view.ndim ? view.shape[view.ndim - 1] : 0; }
};

// Loads NumPy's C interface; called once, when the module is made.
void init_arrays();

// A NumPy array or CPU torch tensor of a dtype the core knows. Throws TypeError
// or ValueError naming op and argument.
Array as_array(nb::handle object, const char *op, const char *arg);
// None gives an absent array.
Array as_optional_array(nb::handle object, const char *op, const char *arg);

// A new uninitialised array of the kind and dtype of `like`, [n, width], or
// [width] where `like` is a vector.
nb::object new_output(nb::handle like, const Array &like_view, int64_t width);
nb::object new_float32(int64_t n, int64_t width);
nb::object new_float32(int64_t n);
// A new uninitialised float32 array of the kind of `like`.
nb::object new_sums(nb::handle like, const Array &like_view, nb::object shape);
nb::object new_uint8(int64_t n, uint8_t **data);

// torch.get_num_threads().
int torch_num_threads();

}  // namespace le_py
