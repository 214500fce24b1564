#include "py_arrays.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

#include <cstring>
#include <string>

#include "dlpack.h"

namespace le_py {
namespace {

using le::DLTensor, le::kDLCpu;

// The part of DLPack's exchange that torch has.
struct DLExchange {
  uint32_t major, minor;
  DLExchange *previous;
  void *allocator, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void *object, DLTensor *out);
  void *current_stream;
};

[[noreturn]] void raise(PyObject *type, const std::string &text) {
  PyErr_SetString(type, text.c_str());
  throw nb::python_error();
}

std::string where(const char *op, const char *arg) {
  return std::string(op) + ": " + arg + ": expected ";
}

std::string text_of(nb::handle h) { return nb::str(h).c_str(); }

[[noreturn]] void raise_dtype(const char *op, const char *arg, nb::handle dtype) {
  std::string name = arg, expected = "float32, bfloat16 or float16";
  if (name == "ids" || name == "segments") expected = "int32";
  if (name == "weights") expected = "float32";
  if (name == "F_A" || name == "F_B" || name == "u" || name == "v") expected = "float64 or float32";
  raise(PyExc_TypeError, where(op, arg) + expected + ", got " + text_of(dtype));
}

void check_ndim(const char *op, const char *arg, int ndim) {
  if (ndim > LE_MAX_DIMS)
    raise(PyExc_ValueError, where(op, arg) + "at most " + std::to_string(LE_MAX_DIMS) +
                                " dimensions, got " + std::to_string(ndim));
}

// An empty array may have no memory, which the core would take for "none"; one
// that is not empty (a fake tensor, a freed storage) must not get as far.
void set_data(le_array &v, void *p, const char *op, const char *arg) {
  static char nothing[64];
  bool empty = false;
  for (int i = 0; i < v.ndim; ++i) empty = empty || v.shape[i] == 0;
  if (!p && !empty)
    raise(PyExc_ValueError, where(op, arg) + "an array with memory, got one without");
  v.data = p ? p : nothing;
}

nb::object checked(PyObject *made) {
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

Array from_numpy(PyArrayObject *a, const char *op, const char *arg) {
  if (!PyArray_CheckExact(a) && nb::hasattr(reinterpret_cast<PyObject *>(a), "mask"))
    raise(PyExc_TypeError, where(op, arg) + "a plain array, got a masked one");
  Array out;
  le_array &v = out.view;
  int ndim = PyArray_NDIM(a);
  check_ndim(op, arg, ndim);
  int shift = 2;  // log2 of an element's bytes: it spares a division an axis
  switch (PyArray_TYPE(a)) {
    case NPY_FLOAT32: v.dtype = LE_FLOAT32; break;
    case NPY_FLOAT16:
      v.dtype = LE_FLOAT16;
      shift = 1;
      break;
    case NPY_INT32: v.dtype = LE_INT32; break;
    case NPY_UINT8:
      v.dtype = LE_UINT8;
      shift = 0;
      break;
    case NPY_FLOAT64:
      v.dtype = LE_FLOAT64;
      shift = 3;
      break;
    default: raise_dtype(op, arg, nb::handle(reinterpret_cast<PyObject *>(PyArray_DESCR(a))));
  }
  bool usable = PyArray_ISALIGNED(a) && PyArray_ISNOTSWAPPED(a);
  for (int i = 0; i < ndim; ++i) {
    v.shape[i] = PyArray_DIM(a, i);
    int64_t bytes = PyArray_STRIDE(a, i);
    usable = usable && (bytes & ((int64_t{1} << shift) - 1)) == 0;
    v.strides[i] = bytes >> shift;
  }
  if (!usable) raise(PyExc_ValueError, where(op, arg) + "an aligned array of native byte order");
  v.ndim = ndim;
  set_data(v, PyArray_DATA(a), op, arg);
  v.flags = PyArray_ISWRITEABLE(a) ? 0u : LE_ARRAY_READONLY;
  return out;
}

// Looked up when the first tensor comes: torch is then imported.
struct Torch {
  PyTypeObject *tensor = nullptr;  // torch.Tensor
  PyObject *is_grad_enabled = nullptr, *get_num_threads = nullptr;
  // Attribute names.
  PyObject *requires_grad = nullptr, *is_neg = nullptr, *new_empty = nullptr;
  DLExchange *exchange = nullptr;
};
Torch &torch() {
  static Torch t;
  return t;
}

bool find_torch() {
  Torch &t = torch();
  if (t.tensor) return true;
  nb::object modules = nb::module_::import_("sys").attr("modules");
  if (!nb::cast<bool>(modules.attr("__contains__")("torch"))) return false;
  nb::object module = modules["torch"];
  if (!nb::hasattr(module, "Tensor") || !nb::hasattr(module, "get_num_threads")) return false;
  nb::object type = module.attr("Tensor");
  if (nb::hasattr(type, "__dlpack_c_exchange_api__")) {
    nb::object capsule = type.attr("__dlpack_c_exchange_api__");
    void *p = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!p) PyErr_Clear();
    auto *exchange = static_cast<DLExchange *>(p);
    if (exchange && exchange->major == 1) t.exchange = exchange;
  }
  t.is_grad_enabled = nb::object(module.attr("is_grad_enabled")).release().ptr();
  t.get_num_threads = nb::object(module.attr("get_num_threads")).release().ptr();
  t.requires_grad = PyUnicode_InternFromString("requires_grad");
  t.is_neg = PyUnicode_InternFromString("is_neg");
  t.new_empty = PyUnicode_InternFromString("new_empty");
  t.tensor = reinterpret_cast<PyTypeObject *>(type.release().ptr());
  return true;
}

bool is_tensor(nb::handle object) {
  PyTypeObject *type = Py_TYPE(object.ptr());
  if (torch().tensor || find_torch())
    return type == torch().tensor || PyType_IsSubtype(type, torch().tensor);
  return false;
}

void refuse_autograd(nb::handle object, const char *op, const char *arg) {
  nb::object needs = nb::steal(PyObject_GetAttr(object.ptr(), torch().requires_grad));
  if (!needs.is_valid()) throw nb::python_error();
  if (needs.ptr() != Py_True) return;
  nb::object on = nb::steal(PyObject_CallNoArgs(torch().is_grad_enabled));
  if (!on.is_valid()) throw nb::python_error();
  if (on.ptr() == Py_True)
    raise(PyExc_ValueError, where(op, arg) +
                                "a tensor outside autograd, got one that requires grad: "
                                "wrap the call in torch.no_grad() or pass tensor.detach()");
}

// A view whose memory holds the negated values: torch.imag of a conjugate is one.
// Such views skip over the real parts, so contiguous rows need no question.
void refuse_negated(nb::handle object, const Array &a, const char *op, const char *arg) {
  int last = a.view.ndim - 1;
  if (last >= 0 && a.view.strides[last] == 1 && a.view.shape[last] > 1) return;
  nb::object negated = nb::steal(PyObject_CallMethodNoArgs(object.ptr(), torch().is_neg));
  if (!negated.is_valid()) throw nb::python_error();
  if (negated.ptr() == Py_True)
    raise(PyExc_ValueError, where(op, arg) +
                                "plain memory, got a tensor with the negative bit set:"
                                " pass tensor.resolve_neg()");
}

[[noreturn]] void raise_device(nb::handle object, const char *op, const char *arg) {
  raise(PyExc_ValueError,
        where(op, arg) + "a tensor on the cpu, got one on " + text_of(object.attr("device")));
}

// For a torch without the exchange functions.
Array from_attributes(nb::handle object, const char *op, const char *arg) {
  Array out;
  le_array &v = out.view;
  if (text_of(object.attr("device").attr("type")) != "cpu") raise_device(object, op, arg);
  std::string dtype = text_of(object.attr("dtype"));
  struct Known {
    const char *name;
    int32_t dtype;
  };
  constexpr Known known[] = {{"torch.float32", LE_FLOAT32}, {"torch.bfloat16", LE_BFLOAT16},
                             {"torch.float16", LE_FLOAT16}, {"torch.float64", LE_FLOAT64},
                             {"torch.int32", LE_INT32},     {"torch.uint8", LE_UINT8}};
  v.dtype = -1;
  for (const Known &one : known)
    if (dtype == one.name) v.dtype = one.dtype;
  if (v.dtype < 0) raise_dtype(op, arg, object.attr("dtype"));
  nb::object shape = object.attr("shape"), strides = object.attr("stride")();
  v.ndim = static_cast<int32_t>(nb::len(shape));
  check_ndim(op, arg, v.ndim);
  for (int i = 0; i < v.ndim; ++i) {
    v.shape[i] = nb::cast<int64_t>(shape[i]);
    v.strides[i] = nb::cast<int64_t>(strides[i]);
  }
  set_data(v, reinterpret_cast<void *>(nb::cast<uintptr_t>(object.attr("data_ptr")())), op, arg);
  return out;
}

Array from_exchange(nb::handle object, const char *op, const char *arg) {
  DLTensor t{};
  if (torch().exchange->tensor_from_object(object.ptr(), &t) != 0) {
    nb::python_error error;  // takes what torch raised
    if (text_of(object.attr("device").attr("type")) != "cpu") raise_device(object, op, arg);
    raise(PyExc_TypeError, where(op, arg) + "a dense tensor of float32, bfloat16 or float16, got " +
                               text_of(object.attr("dtype")) + ", " +
                               text_of(object.attr("layout")));
  }
  if (t.device_type != kDLCpu) raise_device(object, op, arg);
  Array out;
  le_array &v = out.view;
  check_ndim(op, arg, t.ndim);
  v.dtype = le::dtype_of(t);
  if (v.dtype < 0) raise_dtype(op, arg, object.attr("dtype"));
  v.ndim = t.ndim;
  for (int i = 0; i < t.ndim; ++i) {
    v.shape[i] = t.shape[i];
    v.strides[i] = t.strides[i];
  }
  set_data(v, t.data ? static_cast<char *>(t.data) + t.byte_offset : nullptr, op, arg);
  return out;
}

}  // namespace

void init_arrays() {
  if (_import_array() < 0) throw nb::python_error();
}

Array as_array(nb::handle object, const char *op, const char *arg) {
  if (PyArray_Check(object.ptr()))
    return from_numpy(reinterpret_cast<PyArrayObject *>(object.ptr()), op, arg);
  if (!is_tensor(object))
    raise(
        PyExc_TypeError,
        where(op, arg) + "a NumPy array or a torch tensor, got " +
            text_of(
                nb::handle(reinterpret_cast<PyObject *>(Py_TYPE(object.ptr()))).attr("__name__")));
  refuse_autograd(object, op, arg);
  Array out = torch().exchange ? from_exchange(object, op, arg) : from_attributes(object, op, arg);
  refuse_negated(object, out, op, arg);
  out.torch = true;
  return out;
}

Array as_optional_array(nb::handle object, const char *op, const char *arg) {
  return object.is_none() ? Array{} : as_array(object, op, arg);
}

nb::object new_output(nb::handle like, const Array &like_view, int64_t width) {
  bool vector = like_view.view.ndim == 1;
  if (like_view.torch) {
    // Sizes one by one: torch takes 0.6 us more to read them from a tuple.
    nb::object n = nb::int_(like_view.rows()), m = nb::int_(width);
    PyObject *sized[] = {like.ptr(), vector ? m.ptr() : n.ptr(), m.ptr()};
    return checked(PyObject_VectorcallMethod(torch().new_empty, sized, vector ? 2 : 3, nullptr));
  }
  npy_intp dims[2] = {like_view.rows(), width};
  int type = like_view.view.dtype == LE_FLOAT16 ? NPY_FLOAT16 : NPY_FLOAT32;
  return checked(vector ? PyArray_SimpleNew(1, dims + 1, type) : PyArray_SimpleNew(2, dims, type));
}

nb::object new_float32(int64_t n, int64_t width) {
  npy_intp dims[2] = {n, width};
  return checked(PyArray_SimpleNew(2, dims, NPY_FLOAT32));
}

nb::object new_float32(int64_t n) {
  npy_intp dim = n;
  return checked(PyArray_SimpleNew(1, &dim, NPY_FLOAT32));
}

nb::object new_sums(nb::handle like, const Array &like_view, nb::object shape) {
  if (!like_view.torch) return nb::module_::import_("numpy").attr("empty")(shape, "f4");
  nb::object float32 = nb::module_::import_("torch").attr("float32");
  return like.attr("new_empty")(shape, nb::arg("dtype") = float32);
}

nb::object new_uint8(int64_t n, uint8_t **data) {
  npy_intp dim = n;
  nb::object made = checked(PyArray_SimpleNew(1, &dim, NPY_UINT8));
  *data = static_cast<uint8_t *>(PyArray_DATA(reinterpret_cast<PyArrayObject *>(made.ptr())));
  return made;
}

int torch_num_threads() {
  nb::object n = nb::steal(PyObject_CallNoArgs(torch().get_num_threads));
  if (!n.is_valid()) throw nb::python_error();
  return nb::cast<int>(n);
}

}  // namespace le_py
