// torch.ops.lora_engine.lora_delta on the CPU, as kernels that torch's dispatcher calls in C++:
// written in Python they cost a call some 5 us more.
//
// By torch's C shim (torch/csrc/inductor/aoti_torch/c/shim.h), whose functions keep their
// meaning from release to release, and a few symbols of libtorch by their C++ names, for what
// the shim does not tell. All are looked up at run time, as there is no torch where this is
// built; where one is missing, nothing is registered, and torch_library.py registers what is in
// Python. Whatever is not plain (tracing, autograd, another dtype or device, an argument the core
// refuses) goes to the functions in Python, so that there is one answer to it.
#include <cxxabi.h>
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "py_call.h"

using namespace nanobind::literals;

namespace le_py {
namespace {

using Handle = void *;   // AtenTensorHandle: an at::Tensor *
using Value = uint64_t;  // StableIValue
using Kernel = void (*)(Value *stack, uint64_t num_args, uint64_t num_outputs);
constexpr int32_t kCpu = 0, kFailed = 1;

struct SourceLocation {  // c10::SourceLocation
  const char *function, *file;
  uint32_t line;
};

struct Shim {
  int32_t (*get_data_ptr)(Handle, void **);
  int32_t (*get_dim)(Handle, int64_t *);
  int32_t (*get_sizes)(Handle, int64_t **);
  int32_t (*get_strides)(Handle, int64_t **);
  int32_t (*get_dtype)(Handle, int32_t *);
  int32_t (*get_device_type)(Handle, int32_t *);
  int32_t (*empty_strided)(int64_t, const int64_t *, const int64_t *, int32_t dtype,
                           int32_t device_type, int32_t device_index, Handle *);
  int32_t (*delete_tensor)(Handle);
  bool (*grad_mode_is_enabled)();
  int32_t (*get_num_threads)(uint32_t *);
  int32_t (*library_init)(const char *name, const char *key, const char *file, uint32_t line,
                          Handle *);
  int32_t (*library_impl)(Handle library, const char *name, Kernel);
  int32_t (*dtype_float32)(), (*dtype_bfloat16)(), (*dtype_float16)();
  // Of libtorch in C++.
  bool (*requires_grad)(const void *tensor_impl);  // c10::TensorImpl::requires_grad() const
  // c10::TensorImpl::_fw_grad(level, of) const: gives a tensor, or the undefined one
  void *const *(*tangent)(const void *tensor_impl, uint64_t level, Handle of);
  const void *undefined;                                    // c10::UndefinedTensorImpl::_singleton
  bool (*tensor_has_dispatch)(Handle);                      // at::impl::tensor_has_dispatch
  bool (*any_modes_set)(bool skip_infra);                   // c10::impl::TorchDispatchModeTLS
  void (*make_error)(void *, SourceLocation, std::string);  // c10::Error's constructor
  void *type_error_table;                                   // c10::TypeError's functions
  std::type_info *type_error;
} shim;

struct Name {
  void *to;
  const char *symbol;
};

bool find_symbols(const char *torch_module) {
  void *library = dlopen(torch_module, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  const Name names[] = {
      {&shim.get_data_ptr, "aoti_torch_get_data_ptr"},
      {&shim.get_dim, "aoti_torch_get_dim"},
      {&shim.get_sizes, "aoti_torch_get_sizes"},
      {&shim.get_strides, "aoti_torch_get_strides"},
      {&shim.get_dtype, "aoti_torch_get_dtype"},
      {&shim.get_device_type, "aoti_torch_get_device_type"},
      {&shim.empty_strided, "aoti_torch_empty_strided"},
      {&shim.delete_tensor, "aoti_torch_delete_tensor_object"},
      {&shim.grad_mode_is_enabled, "aoti_torch_grad_mode_is_enabled"},
      {&shim.get_num_threads, "torch_get_num_threads"},
      {&shim.library_init, "aoti_torch_library_init_impl"},
      {&shim.library_impl, "aoti_torch_library_impl"},
      {&shim.dtype_float32, "aoti_torch_dtype_float32"},
      {&shim.dtype_bfloat16, "aoti_torch_dtype_bfloat16"},
      {&shim.dtype_float16, "aoti_torch_dtype_float16"},
      {&shim.requires_grad, "_ZNK3c1010TensorImpl13requires_gradEv"},
      {&shim.tangent, "_ZNK3c1010TensorImpl8_fw_gradEmRKN2at10TensorBaseE"},
      {&shim.undefined, "_ZN3c1019UndefinedTensorImpl10_singletonE"},
      {&shim.tensor_has_dispatch, "_ZN2at4impl19tensor_has_dispatchERKNS_6TensorE"},
      {&shim.any_modes_set, "_ZN3c104impl20TorchDispatchModeTLS13any_modes_setEb"},
      {&shim.make_error,
       "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"},
      {&shim.type_error_table, "_ZTVN3c109TypeErrorE"},
      {&shim.type_error, "_ZTIN3c109TypeErrorE"},
  };
  for (const Name &name : names) {
    void *found = dlsym(library, name.symbol);
    if (!found) return false;
    std::memcpy(name.to, &found, sizeof found);
  }
  return true;
}

// ---- Python's functions ----

struct Functions {
  PyObject *compute = nullptr, *under_autograd = nullptr;
  PyObject *to_python = nullptr, *from_python = nullptr;  // a tensor of a handle, and back
} functions;

enum class Kind { None, Value, Type, Index, Memory, Other };

Kind kind_of(const nb::python_error &error) {
  if (error.matches(PyExc_ValueError)) return Kind::Value;
  if (error.matches(PyExc_TypeError)) return Kind::Type;
  if (error.matches(PyExc_IndexError)) return Kind::Index;
  return error.matches(PyExc_MemoryError) ? Kind::Memory : Kind::Other;
}

// What torch turns into Python's TypeError, as no exception of the standard library: made as its
// inherited constructor makes it, which not every release exports.
[[noreturn]] void throw_type_error(const std::string &text) {
  constexpr size_t kRoom = 4096;  // of a c10::TypeError, some 200 bytes
  void **error = static_cast<void **>(abi::__cxa_allocate_exception(kRoom));
  shim.make_error(error, {"lora_delta", __FILE__, __LINE__}, text);
  *error = static_cast<void **>(shim.type_error_table) + 2;  // behind offset and type
  abi::__cxa_throw(error, shim.type_error, [](void *thrown) {
    (**static_cast<void (***)(void *)>(thrown))(thrown);  // its destructor, the first of them
  });
}

[[noreturn]] void raise(Kind kind, const std::string &text) {
  switch (kind) {
    case Kind::Value: throw std::invalid_argument(text);
    case Kind::Type: throw_type_error(text);
    case Kind::Index: throw std::out_of_range(text);
    case Kind::Memory: throw std::bad_alloc();
    default: throw std::runtime_error(text);
  }
}

nb::object tensor_of(Value handle) {
  nb::object capsule = nb::steal(PyCapsule_New(reinterpret_cast<void *>(handle), nullptr, nullptr));
  if (!capsule.is_valid()) throw nb::python_error();
  return nb::handle(functions.to_python)(capsule);
}

Value call_python(PyObject *function, const Value *stack) {
  nb::object x = tensor_of(stack[0]), A = tensor_of(stack[1]), B = tensor_of(stack[2]);
  double scaling;
  std::memcpy(&scaling, &stack[3], sizeof scaling);
  nb::object y = nb::handle(function)(x, A, B, scaling);
  nb::object made = nb::handle(functions.from_python)(y);
  void *handle = PyCapsule_GetPointer(made.ptr(), nullptr);
  if (!handle) throw nb::python_error();
  return reinterpret_cast<Value>(handle);
}

// Ends a call: the arguments are its own.
void delete_arguments(const Value *stack) {
  for (int i = 0; i < 3; ++i) shim.delete_tensor(reinterpret_cast<Handle>(stack[i]));
}

// The call by a function in Python; its errors as torch's.
void in_python(PyObject *function, Value *stack) {
  Kind kind = Kind::None;
  std::string text;
  Value y = 0;
  {
    nb::gil_scoped_acquire gil;
    try {
      y = call_python(function, stack);
    } catch (nb::python_error &error) {
      kind = kind_of(error);
      std::string name = nb::str(error.type().attr("__name__")).c_str();
      text = (kind == Kind::Other ? name + ": " : "") + nb::str(error.value()).c_str();
    }
  }
  delete_arguments(stack);
  if (kind != Kind::None) raise(kind, text);
  stack[0] = y;
}

// ---- the fast path ----

// Whether torch's negative bit cannot be set: such views skip over imaginary parts everywhere.
bool steps_by_one(int64_t ndim, const int64_t *sizes, const int64_t *strides) {
  for (int64_t i = 0; i < ndim; ++i)
    if (strides[i] == 1 && sizes[i] > 1) return true;
  return false;
}

// Of a plain tensor in memory.
bool view_of(Handle tensor, le_array &view) {
  static const int32_t types[] = {shim.dtype_float32(), shim.dtype_bfloat16(),
                                  shim.dtype_float16()};
  constexpr int32_t kTypes[] = {LE_FLOAT32, LE_BFLOAT16, LE_FLOAT16};
  int32_t type = 0, device = -1;
  int64_t ndim = 0, *sizes = nullptr, *strides = nullptr;
  // A tensor that is not strided has no data_ptr to give.
  if (shim.get_device_type(tensor, &device) || device != kCpu || shim.get_dtype(tensor, &type) ||
      shim.get_dim(tensor, &ndim) || ndim < 1 || ndim > LE_MAX_DIMS ||
      shim.get_sizes(tensor, &sizes) || shim.get_strides(tensor, &strides) ||
      !steps_by_one(ndim, sizes, strides) || shim.get_data_ptr(tensor, &view.data) || !view.data)
    return false;
  view.ndim = static_cast<int32_t>(ndim);
  std::memcpy(view.shape, sizes, ndim * sizeof *sizes);
  std::memcpy(view.strides, strides, ndim * sizeof *strides);
  for (int i = 0; i < 3; ++i)
    if (type == types[i]) {
      view.dtype = kTypes[i];
      return true;
    }
  return false;
}

// A new tensor [*x.shape[:-1], width] in x's dtype.
bool new_tensor(Handle x, const le_array &like, int64_t width, Handle *made, le_array &view) {
  int32_t type = 0;
  int64_t stride = 1;
  view = like;
  view.shape[view.ndim - 1] = width;
  for (int i = view.ndim - 1; i >= 0; stride *= view.shape[i--]) view.strides[i] = stride;
  if (stride == 0 || shim.get_dtype(x, &type) ||
      shim.empty_strided(view.ndim, view.shape, view.strides, type, kCpu, 0, made))
    return false;
  return shim.get_data_ptr(*made, &view.data) == 0;
}

le_status run_core(const le_array &x, const le_array &A, const le_array &B, float scaling,
                   const le_array &y) {
  constexpr int64_t kLong = 64 * 1024;
  auto call = [&] { return le_lora_delta(context(), &x, &A, &B, scaling, 0, &y); };
  int64_t rows = x.ndim >= 2 ? x.shape[0] : 1;
  if (rows * (x.shape[x.ndim - 1] + B.shape[0]) < kLong) return call();
  uint32_t threads = 0;
  if (shim.get_num_threads(&threads)) return LE_ERROR_INTERNAL;
  int32_t before = le_limit_threads(static_cast<int32_t>(threads));
  le_status status = call();
  le_limit_threads(before);
  return status;
}

std::atomic<bool> core_is_chosen{false};

bool compute(Value *stack) {
  Handle x = reinterpret_cast<Handle>(stack[0]), y = nullptr;
  le_array xa{}, aa{}, ba{}, ya{};
  if (!core_is_chosen.load(std::memory_order_relaxed) || !view_of(x, xa) ||
      !view_of(reinterpret_cast<Handle>(stack[1]), aa) ||
      !view_of(reinterpret_cast<Handle>(stack[2]), ba) || ba.ndim != 2)
    return false;
  double scaling;
  std::memcpy(&scaling, &stack[3], sizeof scaling);
  bool done = new_tensor(x, xa, ba.shape[0], &y, ya) &&
              run_core(xa, aa, ba, static_cast<float>(scaling), ya) == LE_OK;
  if (!done) {
    if (y) shim.delete_tensor(y);
    return false;
  }
  delete_arguments(stack);
  stack[0] = reinterpret_cast<Value>(y);
  return true;
}

// Of a tensor: its intrusive_ptr.
const void *impl_of(Handle tensor) { return *static_cast<void **>(tensor); }

// Whether forward-mode AD carries a tangent with it; levels above 0 are not made.
bool has_tangent(Handle tensor) {
  return *shim.tangent(impl_of(tensor), 0, tensor) != shim.undefined;
}

// Whether autograd, a tracer or a mode has a part in the call.
bool observed(const Value *stack) {
  if (shim.any_modes_set(false)) return true;
  bool grad = shim.grad_mode_is_enabled();
  for (int i = 0; i < 3; ++i) {
    Handle tensor = reinterpret_cast<Handle>(stack[i]);
    if (shim.tensor_has_dispatch(tensor) || (grad && shim.requires_grad(impl_of(tensor))) ||
        has_tangent(tensor))
      return true;
  }
  return false;
}

void on_cpu(Value *stack, uint64_t, uint64_t) {
  if (!compute(stack)) in_python(functions.compute, stack);
}

void on_autograd_cpu(Value *stack, uint64_t, uint64_t) {
  if (observed(stack) || !compute(stack)) in_python(functions.under_autograd, stack);
}

bool register_kernel(const char *key, Kernel kernel) {
  Handle library = nullptr;  // kept for good: without it the dispatcher forgets the kernel
  return shim.library_init("lora_engine", key, __FILE__, __LINE__, &library) != kFailed &&
         shim.library_impl(library, "lora_delta", kernel) != kFailed;
}

bool register_lora_delta(const char *torch_module, nb::object aoti, nb::object compute,
                         nb::object under_autograd) {
  const char *to_python = "alloc_tensor_by_stealing_from_void_ptr";
  const char *from_python = "unsafe_alloc_void_ptr_from_tensor";
  if (!find_symbols(torch_module) || !nb::hasattr(aoti, to_python) ||
      !nb::hasattr(aoti, from_python))
    return false;
  functions.to_python = nb::object(aoti.attr(to_python)).release().ptr();
  functions.from_python = nb::object(aoti.attr(from_python)).release().ptr();
  functions.compute = compute.release().ptr();
  functions.under_autograd = under_autograd.release().ptr();
  return register_kernel("CPU", on_cpu) && register_kernel("AutogradCPU", on_autograd_cpu);
}

}  // namespace

void bind_torch(nb::module_ &m) {
  m.def("register_lora_delta", &register_lora_delta, "torch_module"_a, "aoti"_a, "compute"_a,
        "under_autograd"_a);
  m.def("core_is_chosen", [](bool chosen) { core_is_chosen.store(chosen); }, "chosen"_a);
}

}  // namespace le_py
