#include "py_call.h"

#include <cxxabi.h>

#include <chrono>
#include <thread>

namespace le_py {

le_context *context() {
  static le_context *ctx = [] {
    le_context *made = nullptr;
    le_context_create(nullptr, &made);
    return made;
  }();
  return ctx;
}

void check(le_status status) {
  if (status == LE_OK) return;
  PyObject *type = PyExc_RuntimeError;
  switch (status) {
    case LE_ERROR_VALUE: type = PyExc_ValueError; break;
    case LE_ERROR_TYPE: type = PyExc_TypeError; break;
    case LE_ERROR_INDEX: type = PyExc_IndexError; break;
    case LE_ERROR_MEMORY: type = PyExc_MemoryError; break;
    case LE_ERROR_UNSUPPORTED: type = PyExc_NotImplementedError; break;
    default: break;
  }
  PyErr_SetString(type, le_last_error(context()));
  throw nb::python_error();
}

// Takes the GIL again. Where the interpreter is shutting down, Python ends this
// thread from within, and that unwinding must not reach nanobind's frames, which
// may not throw: the thread waits here for the process to end.
void take_gil(PyThreadState *state) {
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind &) {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

}  // namespace le_py
