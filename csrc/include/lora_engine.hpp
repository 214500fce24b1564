// lora_engine for C++17: handles that destroy themselves and exceptions, over lora_engine.h.
//
//   lora_engine::Context context;
//   lora_engine::Pool pool(context, 4096, {4096});
//   int32_t slot = pool.import_bytes(bytes.data(), bytes.size(), nullptr, 2.0f);
//   pool.forward(lora_engine::matrix(x, n, 4096), lora_engine::vector(ids, n),
//                lora_engine::matrix(y, n, 4096));
//
// What each function does, its shapes and its threads are said in lora_engine.h.
#ifndef LORA_ENGINE_HPP
#define LORA_ENGINE_HPP

#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "lora_engine.h"

namespace lora_engine {

// A call that failed; what() is its le_last_error.
class Error : public std::runtime_error {
 public:
  Error(le_status status, const char *text) : std::runtime_error(text), status_(status) {}
  le_status status() const { return status_; }

 private:
  le_status status_;
};

inline void check(le_status status) {
  if (status != LE_OK) throw Error(status, le_last_error(nullptr));
}

// ---- arrays: float, double, int32_t, uint8_t; 16-bit floats as an le_dtype ----------------

template <class T>
constexpr int32_t dtype_of() {
  using Plain = std::remove_const_t<T>;
  static_assert(std::is_same_v<Plain, float> || std::is_same_v<Plain, double> ||
                    std::is_same_v<Plain, int32_t> || std::is_same_v<Plain, uint8_t>,
                "give the le_dtype of other elements");
  return std::is_same_v<Plain, float>     ? LE_FLOAT32
         : std::is_same_v<Plain, double>  ? LE_FLOAT64
         : std::is_same_v<Plain, int32_t> ? LE_INT32
                                          : LE_UINT8;
}

// n elements, one behind the other.
inline le_array vector(const void *data, int64_t n, int32_t dtype) {
  return {const_cast<void *>(data), {n}, {1}, 1, dtype, 0};
}
template <class T>
le_array vector(T *data, int64_t n) {
  le_array a = vector(data, n, dtype_of<T>());
  a.flags = std::is_const_v<T> ? LE_ARRAY_READONLY : 0;
  return a;
}
// Rows that are `stride` elements apart; 0: contiguous.
inline le_array matrix(const void *data, int64_t rows, int64_t cols, int32_t dtype,
                       int64_t stride = 0) {
  return {const_cast<void *>(data), {rows, cols}, {stride ? stride : cols, 1}, 2, dtype, 0};
}
template <class T>
le_array matrix(T *data, int64_t rows, int64_t cols, int64_t stride = 0) {
  le_array a = matrix(data, rows, cols, dtype_of<T>(), stride);
  a.flags = std::is_const_v<T> ? LE_ARRAY_READONLY : 0;
  return a;
}

// ---- handles: movable, not copyable ---------------------------------------------------------

class Context {
 public:
  explicit Context(le_context_options options = LE_CONTEXT_OPTIONS) {
    le_context *made = nullptr;
    check(le_context_create(&options, &made));
    handle_.reset(made);
  }
  le_context *get() const { return handle_.get(); }

  void set_num_threads(int32_t n) { check(le_set_num_threads(get(), n)); }
  int32_t num_threads() const { return le_get_num_threads(get()); }

 private:
  struct Destroy {
    void operator()(le_context *handle) const { le_context_destroy(handle); }
  };
  std::unique_ptr<le_context, Destroy> handle_;
};

struct Adapted {
  le_outcome outcome;
  double grad_norm;
};

class Pool {
 public:
  Pool(const Context &context, const le_pool_options &options) : num_slices_(options.num_slices) {
    le_pool *made = nullptr;
    check(le_pool_create(context.get(), &options, &made));
    handle_.reset(made);
  }
  Pool(const Context &context, int64_t in_features, std::initializer_list<int64_t> out_features,
       int32_t dtype = LE_FLOAT32, int32_t history = 0)
      : Pool(context, options(in_features, out_features, dtype, history)) {}
  le_pool *get() const { return handle_.get(); }

  // A and B: one array a slice.
  int32_t add(const le_array *A, const le_array *B, float scaling) {
    int32_t slot = -1;
    check(le_pool_add(get(), A, B, scaling, &slot));
    return slot;
  }
  int32_t add(const le_array &A, const le_array &B, float scaling) { return add(&A, &B, scaling); }
  void set(int32_t slot, const le_array *A, const le_array *B, float scaling) {
    check(le_pool_set(get(), slot, A, B, scaling));
  }
  float get_weights(int32_t slot, const le_array *A, const le_array *B) const {
    float scaling = 0;
    check(le_pool_get(get(), slot, A, B, &scaling));
    return scaling;
  }
  void remove(int32_t slot) { check(le_pool_remove(get(), slot)); }
  void rollback(int32_t slot) { check(le_pool_rollback(get(), slot)); }
  uint64_t version(int32_t slot) const {
    uint64_t version = 0;
    check(le_pool_version(get(), slot, &version));
    return version;
  }
  std::vector<int32_t> ranks(int32_t slot) const {
    std::vector<int32_t> ranks(static_cast<size_t>(num_slices_));
    check(le_pool_ranks(get(), slot, ranks.data()));
    return ranks;
  }
  le_pool_info info() const {
    le_pool_info info;
    check(le_pool_get_info(get(), &info));
    return info;
  }

  // modules: one a slice.
  std::vector<char> export_bytes(int32_t slot, const char *const *modules) const {
    std::vector<char> bytes;
    for (;;) {  // again where the slot was given another rank in between
      size_t size = 0;
      check(le_pool_export(get(), slot, modules, nullptr, 0, &size));
      bytes.resize(size);
      le_status status = le_pool_export(get(), slot, modules, bytes.data(), bytes.size(), &size);
      if (status == LE_ERROR_VALUE && size > bytes.size()) continue;
      check(status);
      bytes.resize(size);
      return bytes;
    }
  }
  // modules null: a pool of one slice, bytes of one module.
  int32_t import_bytes(const void *bytes, size_t size, const char *const *modules, float scaling) {
    int32_t slot = -1;
    check(le_pool_import(get(), bytes, size, modules, scaling, &slot));
    return slot;
  }

  void forward(const le_array &x, const le_array &ids, const le_array &y, bool accumulate = false,
               const le_array *weights = nullptr) const {
    check(le_pool_forward(get(), &x, &ids, weights, 0, accumulate, &y));
  }
  void forward(int32_t slot, const le_array &x, const le_array &y, bool accumulate = false) const {
    check(le_pool_forward_slot(get(), slot, &x, 0, accumulate, &y));
  }
  std::vector<uint8_t> adapt(const le_array &x, const le_array &grad, const le_array &ids,
                             const le_step &step, const le_array *weights = nullptr) {
    std::vector<uint8_t> outcomes(static_cast<size_t>(x.ndim == 1 ? 1 : x.shape[0]));
    check(le_pool_adapt(get(), &x, &grad, &ids, weights, &step, outcomes.data()));
    return outcomes;
  }
  Adapted adapt(int32_t slot, const le_array &x, const le_array &grad, const le_step &step) {
    uint8_t outcome = LE_NO_ADAPTER;
    double norm = 0;
    check(le_pool_adapt_slot(get(), slot, &x, &grad, &step, &outcome, &norm));
    return {static_cast<le_outcome>(outcome), norm};
  }

 private:
  static le_pool_options options(int64_t in_features, std::initializer_list<int64_t> out_features,
                                 int32_t dtype, int32_t history) {
    le_pool_options o{};
    o.in_features = in_features;
    o.out_features = out_features.begin();
    o.num_slices = static_cast<int32_t>(out_features.size());
    o.dtype = dtype;
    o.history = history;
    return o;
  }
  struct Destroy {
    void operator()(le_pool *handle) const { le_pool_destroy(handle); }
  };
  std::unique_ptr<le_pool, Destroy> handle_;
  int32_t num_slices_;
};

class Ewc {
 public:
  Ewc(const Pool &pool, le_ewc_form form, float ewc_lambda) {
    le_ewc *made = nullptr;
    check(le_ewc_create(pool.get(), form, ewc_lambda, &made));
    handle_.reset(made);
  }
  le_ewc *get() const { return handle_.get(); }  // for le_step::ewc

  void set(int32_t slot, const le_array *first, const le_array *second) {
    check(le_ewc_set(get(), slot, first, second));
  }
  void remove(int32_t slot) { check(le_ewc_remove(get(), slot)); }
  double penalty() const {
    double value = 0;
    check(le_ewc_penalty(get(), &value));
    return value;
  }

 private:
  struct Destroy {
    void operator()(le_ewc *handle) const { le_ewc_destroy(handle); }
  };
  std::unique_ptr<le_ewc, Destroy> handle_;
};

}  // namespace lora_engine

#endif  // LORA_ENGINE_HPP
