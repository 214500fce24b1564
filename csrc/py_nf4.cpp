// NF4 matrices and their ops of lora_engine._C.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "py_call.h"

using namespace nanobind::literals;

namespace le_py {
namespace {

[[noreturn]] void raise(PyObject *type, const std::string &text) {
  PyErr_SetString(type, text.c_str());
  throw nb::python_error();
}

// The memory of a contiguous array of `size` elements (below 0: any number).
const void *memory(nb::handle object, const char *arg, int32_t dtype, int64_t size) {
  const char *op = "Nf4";
  Array a = as_array(object, op, arg);
  int64_t count = 1;
  bool contiguous = true;
  for (int i = a.view.ndim - 1; i >= 0; --i) {
    contiguous = contiguous && (a.view.shape[i] == 1 || a.view.strides[i] == count);
    count *= a.view.shape[i];
  }
  std::string where = std::string(op) + ": " + arg + ": expected ";
  if (a.view.dtype != dtype)
    raise(PyExc_TypeError, where + (dtype == LE_UINT8 ? "uint8" : "float32"));
  if (!contiguous) raise(PyExc_ValueError, where + "contiguous memory");
  if (size >= 0 && count != size)
    raise(PyExc_ValueError,
          where + std::to_string(size) + " elements, got " + std::to_string(count));
  return a.view.data;
}

int64_t parts(int64_t n, int64_t size) { return n / size + (n % size != 0); }

// le_nf4 over Python's arrays, which it keeps alive.
class Nf4 {
 public:
  Nf4(nb::object packed, int64_t rows, int64_t cols, int32_t blocksize, nb::object absmax,
      nb::object nested_absmax, nb::object nested_map, int32_t nested_blocksize,
      float nested_offset)
      : packed_(packed), absmax_(absmax), nested_absmax_(nested_absmax), nested_map_(nested_map) {
    if (rows < 1 || cols < 1 || rows > (int64_t(1) << 48) / cols)
      raise(PyExc_ValueError, "Nf4: shape: expected rows and cols from 1, got [" +
                                  std::to_string(rows) + ", " + std::to_string(cols) + "]");
    if (blocksize < 1 || (!nested_map.is_none() && nested_blocksize < 1))
      raise(PyExc_ValueError, "Nf4: blocksize: expected 1 or more");
    int64_t total = rows * cols, blocks = parts(total, blocksize);
    w_.rows = rows;
    w_.cols = cols;
    w_.blocksize = blocksize;
    w_.packed = bytes(packed, "packed", parts(total, 2));
    if (nested_map.is_none()) {
      w_.absmax = floats(absmax, "absmax", blocks);
      return;
    }
    w_.absmax_codes = bytes(absmax, "absmax", blocks);
    w_.nested_absmax = floats(nested_absmax, "nested_absmax", parts(blocks, nested_blocksize));
    w_.nested_map = floats(nested_map, "nested_map", 256);
    w_.nested_blocksize = nested_blocksize;
    w_.nested_offset = nested_offset;
  }

  const le_nf4 *get() const { return &w_; }
  // What an op with n rows reads, in elements.
  int64_t work(int64_t n) const { return w_.rows * w_.cols / 8 * (n + 1); }

 private:
  static const uint8_t *bytes(nb::handle object, const char *arg, int64_t size) {
    return static_cast<const uint8_t *>(memory(object, arg, LE_UINT8, size));
  }
  static const float *floats(nb::handle object, const char *arg, int64_t size) {
    return static_cast<const float *>(memory(object, arg, LE_FLOAT32, size));
  }

  nb::object packed_, absmax_, nested_absmax_, nested_map_;
  le_nf4 w_{};
};

// (packed [(rows * cols + 1) // 2] uint8, absmax [blocks] float32).
nb::tuple nf4_encode(nb::handle W, int32_t blocksize) {
  Array w = as_array(W, "nf4_quantize", "W");
  int64_t total = w.rows() * w.width();
  uint8_t *packed = nullptr;
  nb::object packed_array = new_uint8(parts(total, 2), &packed);
  nb::object absmax = new_float32(1, parts(total, blocksize > 0 ? blocksize : 1));
  nb::object flat = absmax.attr("reshape")(-1);
  Array scales = as_array(flat, "nf4_quantize", "absmax");
  check(run(w, total, [&] {
    return le_nf4_encode(context(), w.ptr(), blocksize, packed,
                         static_cast<float *>(scales.view.data));
  }));
  return nb::make_tuple(packed_array, flat);
}

void nf4_decode(const Nf4 &w, nb::handle out) {
  Array to = as_array(out, "nf4_dequantize", "out");
  check(run(to, w.work(8), [&] { return le_nf4_decode(context(), w.get(), to.ptr()); }));
}

int32_t compute_code(const std::optional<std::string> &compute) {
  if (!compute) return -1;
  if (*compute == "float32") return LE_FLOAT32;
  if (*compute == "bfloat16") return LE_BFLOAT16;
  raise(PyExc_ValueError,
        "nf4_linear: compute: expected float32, bfloat16 or None, got " + *compute);
}

nb::object nf4_linear(nb::handle x, const Nf4 &w, nb::handle bias, nb::handle pool, nb::handle ids,
                      nb::handle weights, nb::object out,
                      const std::optional<std::string> &compute) {
  const char *op = "nf4_linear";
  int32_t code = compute_code(compute);
  Array xa = as_array(x, op, "x"), ba = as_optional_array(bias, op, "bias");
  Array ia = as_optional_array(ids, op, "ids"), wa = as_optional_array(weights, op, "weights");
  if (out.is_none()) out = new_output(x, xa, w.get()->rows);
  Array ya = as_array(out, op, "out");
  check(run(xa, w.work(xa.rows()), [&] {
    return le_nf4_linear(context(), xa.ptr(), w.get(), ba.ptr(), pool_handle(pool), ia.ptr(),
                         wa.ptr(), code, ya.ptr());
  }));
  return out;
}

nb::object nf4_linear_backward(nb::handle grad, const Nf4 &w, nb::object out) {
  const char *op = "nf4_linear_backward";
  Array ga = as_array(grad, op, "grad");
  if (out.is_none()) out = new_output(grad, ga, w.get()->cols);
  Array da = as_array(out, op, "out");
  check(run(ga, w.work(ga.rows()),
            [&] { return le_nf4_linear_backward(context(), ga.ptr(), w.get(), da.ptr()); }));
  return out;
}

}  // namespace

void bind_nf4(nb::module_ &m) {
  nb::class_<Nf4>(m, "Nf4", "A matrix in NF4: le_nf4 of lora_engine.h.")
      .def(nb::init<nb::object, int64_t, int64_t, int32_t, nb::object, nb::object, nb::object,
                    int32_t, float>(),
           "packed"_a, "rows"_a, "cols"_a, "blocksize"_a, "absmax"_a,
           "nested_absmax"_a.none() = nb::none(), "nested_map"_a.none() = nb::none(),
           "nested_blocksize"_a = 0, "nested_offset"_a = 0.0f);
  m.def("nf4_encode", &nf4_encode, "W"_a.none(), "blocksize"_a);
  m.def("nf4_decode", &nf4_decode, "w"_a, "out"_a.none());
  m.def("nf4_linear", &nf4_linear, "x"_a.none(), "w"_a, "bias"_a.none(), "pool"_a.none(),
        "ids"_a.none(), "weights"_a.none(), "out"_a.none(), "compute"_a.none());
  m.def("nf4_linear_backward", &nf4_linear_backward, "grad"_a.none(), "w"_a, "out"_a.none());
}

}  // namespace le_py
