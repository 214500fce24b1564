// The part of the C ABI that takes and gives what others made: DLPack's tensors, adapters as
// safetensors bytes under PEFT's keys.
#include <algorithm>
#include <cstring>

#include "c_call.h"
#include "dispatch.h"
#include "dlpack.h"
#include "safetensors.h"

namespace le {
namespace {

void from_dltensor(const char *op, const DLTensor &t, le_array *out) {
  if (t.device_type != kDLCpu && t.device_type != kDLCudaHost && t.device_type != kDLRocmHost)
    fail(LE_ERROR_UNSUPPORTED, "%s: dltensor: expected memory of the CPU, got device type %d", op,
         t.device_type);
  if (t.ndim < 0 || t.ndim > LE_MAX_DIMS || (t.ndim && !t.shape))
    fail(LE_ERROR_VALUE, "%s: dltensor: expected 0 to %d dimensions and a shape, got %d", op,
         LE_MAX_DIMS, t.ndim);
  le_array a{};
  a.dtype = dtype_of(t);
  if (a.dtype < 0)
    fail(LE_ERROR_TYPE,
         "%s: dltensor: expected a dtype of le_dtype, got code %d of %d bits, %d lanes", op, t.code,
         t.bits, t.lanes);
  a.ndim = t.ndim;
  a.data = t.data ? static_cast<char *>(t.data) + t.byte_offset : nullptr;
  int64_t compact = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] < 0 ||
        __builtin_mul_overflow(compact, std::max<int64_t>(t.shape[d], 1), &compact))
      fail(LE_ERROR_VALUE, "%s: dltensor: expected sizes from 0 that fit in memory, got %lld", op,
           static_cast<long long>(t.shape[d]));
    a.shape[d] = t.shape[d];
    a.strides[d] = t.strides ? t.strides[d] : compact / std::max<int64_t>(t.shape[d], 1);
  }
  *out = a;
}

// ---- PEFT's keys --------------------------------------------------------------

constexpr char kPrefix[] = "base_model.model.";
constexpr const char *kFactors[] = {".lora_A.weight", ".lora_B.weight"};
constexpr size_t kMaxName = 4096;

std::string key_of(const std::string &module, int factor) {
  return kPrefix + module + kFactors[factor];
}

const char *file_dtype(int32_t dtype) {
  return dtype == LE_FLOAT32 ? "F32" : dtype == LE_BFLOAT16 ? "BF16" : "F16";
}

// The names of the slices that are there, checked; the others are empty.
std::vector<std::string> checked_modules(const char *op, const char *const *modules, int slices,
                                         const int32_t *ranks) {
  require(op, "modules", modules);
  std::vector<std::string> names(static_cast<size_t>(slices)), sorted;
  for (int s = 0; s < slices; ++s) {
    if (ranks && !ranks[s]) continue;
    require(op, "modules", modules[s]);
    size_t length = strnlen(modules[s], kMaxName + 1);
    if (!length || length > kMaxName || !is_utf8(modules[s], length))
      fail(LE_ERROR_VALUE, "%s: modules: expected names of 1 to %zu bytes of UTF-8", op, kMaxName);
    names[static_cast<size_t>(s)].assign(modules[s], length);
    sorted.push_back(names[static_cast<size_t>(s)]);
  }
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
    fail(LE_ERROR_VALUE, "%s: modules: expected each name once", op);
  return names;
}

// ---- export ---------------------------------------------------------------------

void export_slot(AdapterPool &pool, int32_t slot, const char *const *modules, char *buffer,
                 size_t capacity, size_t *size) {
  const char *op = "AdapterPool.export";
  SharedSlots held(op, pool, &slot, 1);
  const Block &block = *pool.slot(slot).current;
  std::vector<std::string> names = checked_modules(op, modules, pool.num_slices(), block.ranks);
  std::vector<Tensor> tensors;
  for (int s = 0; s < pool.num_slices(); ++s)
    for (int factor = 0; factor < 2 && block.ranks[s]; ++factor) {
      Tensor t;
      t.name = key_of(names[static_cast<size_t>(s)], factor);
      t.dtype = file_dtype(pool.dtype());
      t.shape = factor ? std::vector<int64_t>{pool.slice_out(s), block.ranks[s]}
                       : std::vector<int64_t>{block.ranks[s], pool.in_features()};
      tensors.push_back(t);
    }
  std::string header = safetensors_header(&tensors);
  *size = header.size() + static_cast<size_t>(tensors.empty() ? 0 : tensors.back().end);
  if (!buffer) return;
  if (capacity < *size)
    fail(LE_ERROR_VALUE, "%s: capacity: expected at least %zu bytes, got %zu", op, *size, capacity);
  std::memcpy(buffer, header.data(), header.size());
  char *to = buffer + header.size();
  int64_t element = dtype_size(pool.dtype());
  for (int s = 0; s < pool.num_slices(); ++s) {
    SliceView view = pool.slice(block, s);
    int64_t a_bytes = view.rank * pool.in_features() * element, out = pool.slice_out(s);
    std::memcpy(to, view.a, static_cast<size_t>(a_bytes));
    to += a_bytes;
    for (int64_t o = 0; o < out; ++o)
      for (int32_t j = 0; j < view.rank; ++j, to += element)
        std::memcpy(to, view.bt + (j * out + o) * element, static_cast<size_t>(element));
  }
}

// ---- import ---------------------------------------------------------------------

// The one module of the file: PEFT's keys, and no other.
std::string only_module(const char *op, const std::vector<Tensor> &tensors) {
  std::string module;
  for (const Tensor &t : tensors) {
    size_t prefix = sizeof kPrefix - 1, suffix = std::strlen(kFactors[0]);
    bool ours = t.name.size() > prefix + suffix && t.name.compare(0, prefix, kPrefix) == 0;
    std::string tail = ours ? t.name.substr(t.name.size() - suffix) : "";
    if (tail != kFactors[0] && tail != kFactors[1])
      fail(LE_ERROR_VALUE, "%s: bytes: expected keys like %s<module>%s, got %.200s", op, kPrefix,
           kFactors[0], t.name.c_str());
    std::string found = t.name.substr(prefix, t.name.size() - prefix - suffix);
    if (!module.empty() && found != module)
      fail(LE_ERROR_VALUE, "%s: modules: expected names for bytes of several modules, got NULL",
           op);
    module = found;
  }
  return module;
}

void check_finite_values(const char *op, const Kernels &k, const Tensor &t, const le_array &a) {
  Rows rows{static_cast<char *>(a.data), a.shape[0], a.shape[1], a.shape[1], 1, a.dtype};
  std::vector<float> row(static_cast<size_t>(rows.width));
  for (int64_t i = 0; i < rows.n; ++i) {
    load_row(k, rows, i, 0, rows.width, row.data());
    for (float v : row)
      if (!(v - v == 0))
        fail(LE_ERROR_VALUE, "%s: bytes: %.200s: expected finite numbers, got NaN or Inf", op,
             t.name.c_str());
  }
}

// One factor as an array that borrows the file; of data that are not aligned, a copy.
le_array factor_array(const char *op, const Kernels &k, const Tensor &t, std::vector<float> *copy) {
  int32_t dtype = t.dtype == "F32"    ? LE_FLOAT32
                  : t.dtype == "BF16" ? LE_BFLOAT16
                  : t.dtype == "F16"  ? LE_FLOAT16
                                      : -1;
  bool empty = t.begin == t.end;
  if (dtype < 0 || t.shape.size() != 2 || empty)
    fail(LE_ERROR_VALUE, "%s: bytes: %.200s: expected a matrix of F32, BF16 or F16, got %.20s", op,
         t.name.c_str(), t.dtype.c_str());
  le_array a{const_cast<char *>(t.data), {t.shape[0], t.shape[1]}, {t.shape[1], 1}, 2, dtype,
             LE_ARRAY_READONLY};
  if (reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(dtype_size(dtype))) {
    size_t bytes = static_cast<size_t>(t.end - t.begin);
    copy->resize((bytes + 3) / 4);
    std::memcpy(copy->data(), t.data, bytes);
    a.data = copy->data();
  }
  check_finite_values(op, k, t, a);
  return a;
}

int32_t import_adapter(AdapterPool &pool, const void *bytes, size_t size,
                       const char *const *modules, float scaling) {
  const char *op = "AdapterPool.import";
  int slices = pool.num_slices();
  std::vector<std::string> names;
  if (modules) names = checked_modules(op, modules, slices, nullptr);
  if (!modules && slices != 1)
    fail(LE_ERROR_VALUE, "%s: modules: expected %d names, one a slice, got NULL", op, slices);
  std::vector<Tensor> tensors = read_safetensors(op, bytes, size);
  if (!modules) names.push_back(only_module(op, tensors));
  std::vector<le_array> factors[2];
  std::vector<std::vector<float>> copies(static_cast<size_t>(2 * slices));
  bool any = false;
  for (int s = 0; s < slices; ++s) {
    const Tensor *found[2] = {};
    for (int f = 0; f < 2; ++f) {
      std::string key = key_of(names[static_cast<size_t>(s)], f);
      for (const Tensor &t : tensors)
        if (t.name == key) found[f] = &t;
    }
    if (!found[0] != !found[1])
      fail(LE_ERROR_VALUE, "%s: bytes: %.200s: missing", op,
           key_of(names[static_cast<size_t>(s)], found[0] ? 1 : 0).c_str());
    any = any || found[0];
    for (int f = 0; f < 2; ++f)
      factors[f].push_back(
          found[f] ? factor_array(op, kernels(), *found[f], &copies[static_cast<size_t>(2 * s + f)])
                   : le_array{});
  }
  if (!any) fail(LE_ERROR_VALUE, "%s: bytes: %.200s: missing", op, key_of(names[0], 0).c_str());
  return pool.add(factors[0].data(), factors[1].data(), scaling);
}

}  // namespace
}  // namespace le

extern "C" {

le_status le_array_from_dltensor(const void *dltensor, le_array *out) {
  const char *op = "le_array_from_dltensor";
  return le::guarded(nullptr, [&] {
    le::require(op, "dltensor", dltensor);
    le::require(op, "out", out);
    le::from_dltensor(op, *static_cast<const le::DLTensor *>(dltensor), out);
  });
}

le_status le_pool_export(le_pool *pool, int32_t slot, const char *const *modules, void *buffer,
                         size_t capacity, size_t *size) {
  const char *op = "AdapterPool.export";
  return le::with(op, "pool", pool, [&](le::AdapterPool &p) {
    le::require(op, "size", size);
    le::export_slot(p, slot, modules, static_cast<char *>(buffer), capacity, size);
  });
}

le_status le_pool_import(le_pool *pool, const void *bytes, size_t size, const char *const *modules,
                         float scaling, int32_t *slot) {
  const char *op = "AdapterPool.import";
  return le::with(op, "pool", pool, [&](le::AdapterPool &p) {
    if (size) le::require(op, "bytes", bytes);
    le::require(op, "slot", slot);
    *slot = le::import_adapter(p, bytes, size, modules, scaling);
  });
}

}  // extern "C"
