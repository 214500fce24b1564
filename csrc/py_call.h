// How the Python module calls the C ABI: one context, statuses as exceptions,
// long work without the GIL.
#pragma once

#include "py_arrays.h"

namespace le_py {

// The context that all of Python shares.
le_context *context();

// Raises the exception that a status stands for, with the core's words.
void check(le_status status);

// Takes the GIL again; parks the thread where the interpreter is shutting down.
void take_gil(PyThreadState *state);

// Runs a call of the core; where the work is long enough to pay for it, without
// the GIL, and on the torch path with torch's thread count. elements: how many
// are read and written, about.
template <class Call>
le_status run(const Array &x, int64_t elements, Call &&call) {
  constexpr int64_t kLong = 64 * 1024;  // some 20 us
  if (elements < kLong) return call();
  int32_t before = x.torch ? le_limit_threads(torch_num_threads()) : -1;
  PyThreadState *state = PyEval_SaveThread();
  le_status status = call();
  if (before >= 0) le_limit_threads(before);
  take_gil(state);
  return status;
}

// The parts of the module, one a file.
void bind_pool(nb::module_ &m);
void bind_ops(nb::module_ &m);
void bind_nf4(nb::module_ &m);
void bind_torch(nb::module_ &m);
void bind_consolidate(nb::module_ &m);

// Of a Pool; NULL for None.
le_pool *pool_handle(nb::handle pool);

}  // namespace le_py
