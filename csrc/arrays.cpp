#include "arrays.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace le {
namespace {

constexpr int64_t kPart = 256;  // elements converted at a time

std::string shape_text(const le_array *a) {
  std::string text = "[";
  for (int i = 0; i < a->ndim; ++i) text += (i ? ", " : "") + std::to_string(a->shape[i]);
  return text + "]";
}

// Whether that many elements, that far apart, can lie in memory: sums of these fit int64.
bool in_memory(const Rows &r) {
  constexpr int64_t kMost = int64_t(1) << 48;
  int64_t count, row, col;
  if (__builtin_mul_overflow(r.n, r.width, &count) || count > kMost) return false;
  if (count == 0) return true;
  if (__builtin_mul_overflow(r.n - 1, r.row_stride, &row)) return false;
  if (__builtin_mul_overflow(r.width - 1, r.col_stride, &col)) return false;
  return row <= kMost && row >= -kMost && col <= kMost && col >= -kMost;
}

void check_memory(const char *op, const char *arg, const le_array *a, const Rows &r) {
  if (!in_memory(r))
    fail(LE_ERROR_VALUE,
         "%s: %s: expected a shape and strides that fit in memory, got %s of strides %lld, %lld",
         op, arg, shape_text(a).c_str(), static_cast<long long>(r.row_stride),
         static_cast<long long>(r.col_stride));
  if (!r.n || !r.width) return;
  if (!r.data)
    fail(LE_ERROR_VALUE, "%s: %s: expected memory behind shape %s, got NULL", op, arg,
         shape_text(a).c_str());
  if (reinterpret_cast<uintptr_t>(r.data) & static_cast<uintptr_t>(dtype_size(r.dtype) - 1))
    fail(LE_ERROR_VALUE, "%s: %s: expected %s at an address that %lld divides, got %p", op, arg,
         dtype_name(r.dtype), static_cast<long long>(dtype_size(r.dtype)),
         static_cast<const void *>(r.data));
}

// Bytes [low, high) that an array may touch.
void extent(const Rows &r, int64_t *low, int64_t *high) {
  int64_t row = (r.n - 1) * r.row_stride, col = (r.width - 1) * r.col_stride;
  int64_t first = std::min<int64_t>(row, 0) + std::min<int64_t>(col, 0);
  int64_t last = std::max<int64_t>(row, 0) + std::max<int64_t>(col, 0);
  *low = reinterpret_cast<intptr_t>(r.data) + first * dtype_size(r.dtype);
  *high = reinterpret_cast<intptr_t>(r.data) + (last + 1) * dtype_size(r.dtype);
}

// Two column ranges of one wider matrix interleave in memory and share none of it.
bool columns_of_one_matrix(const Rows &a, const Rows &b) {
  int64_t pitch = a.row_stride * dtype_size(a.dtype);
  if (a.n <= 1 || pitch <= 0 || pitch != b.row_stride * dtype_size(b.dtype)) return false;
  if (a.col_stride != 1 || b.col_stride != 1) return false;
  int64_t a_bytes = a.width * dtype_size(a.dtype), b_bytes = b.width * dtype_size(b.dtype);
  int64_t offset = (b.data - a.data) % pitch;
  if (offset < 0) offset += pitch;
  return offset >= a_bytes && offset + b_bytes <= pitch;
}

bool share_memory(const Rows &a, const Rows &b) {
  if (!a.n || !a.width || !b.n || !b.width) return false;
  int64_t a_low, a_high, b_low, b_high;
  extent(a, &a_low, &a_high);
  extent(b, &b_low, &b_high);
  if (a_high <= b_low || b_high <= a_low) return false;
  return !columns_of_one_matrix(a, b);
}

}  // namespace

Rows matrix(const char *op, const char *arg, const le_array *a, int64_t rows, int64_t width,
            const char *symbols) {
  if (!present(a)) fail(LE_ERROR_VALUE, "%s: %s: expected an array %s, got none", op, arg, symbols);
  if (a->ndim < 0 || a->ndim > LE_MAX_DIMS)
    fail(LE_ERROR_VALUE, "%s: %s: expected at most %d dimensions, got %d", op, arg, LE_MAX_DIMS,
         a->ndim);
  bool fits = a->ndim == 1 || a->ndim == 2;
  Rows r;
  if (fits) {
    bool vector = a->ndim == 1;
    r.data = static_cast<char *>(a->data);
    r.n = vector ? 1 : a->shape[0];
    r.width = vector ? a->shape[0] : a->shape[1];
    // The stride of a single one may be anything.
    r.row_stride = r.n == 1 ? r.width : a->strides[0];
    r.col_stride = r.width == 1 ? 1 : vector ? a->strides[0] : a->strides[1];
    r.dtype = a->dtype;
    fits = (rows < 0 || r.n == rows) && (width < 0 || r.width == width) && r.n >= 0 && r.width >= 0;
  }
  if (!fits) {
    std::string expected = symbols;
    if (rows >= 0 || width >= 0) {
      std::string n = rows >= 0 ? std::to_string(rows) : "n";
      std::string w = width >= 0 ? std::to_string(width) : "any";
      expected += " = [" + n + ", " + w + "]";
    }
    fail(LE_ERROR_VALUE, "%s: %s: expected shape %s, got %s", op, arg, expected.c_str(),
         shape_text(a).c_str());
  }
  check_memory(op, arg, a, r);
  return r;
}

Rows float_matrix(const char *op, const char *arg, const le_array *a, int64_t rows, int64_t width,
                  const char *symbols) {
  Rows r = matrix(op, arg, a, rows, width, symbols);
  if (!is_float(r.dtype))
    fail(LE_ERROR_TYPE, "%s: %s: expected float32, bfloat16 or float16, got %s", op, arg,
         dtype_name(r.dtype));
  return r;
}

void check_dtype(const char *op, const char *arg, int32_t got, int32_t expected,
                 const char *expected_by) {
  if (got != expected)
    fail(LE_ERROR_TYPE, "%s: %s: expected %s%s, got %s", op, arg, dtype_name(expected), expected_by,
         dtype_name(got));
}

void check_output(const char *op, const char *arg, const le_array *out, const Rows &rows) {
  if (out->flags & LE_ARRAY_READONLY)
    fail(LE_ERROR_VALUE, "%s: %s: expected a writable array, got a read-only one", op, arg);
  if (!rows.n || !rows.width) return;
  int64_t col = std::abs(rows.col_stride), row = std::abs(rows.row_stride);
  bool repeats = (rows.width > 1 && col == 0) || (rows.n > 1 && row == 0);
  // Rows that begin inside one another.
  if (rows.n > 1 && rows.width > 1)
    repeats =
        repeats || (row >= col ? row < (rows.width - 1) * col + 1 : col < (rows.n - 1) * row + 1);
  if (repeats)
    fail(LE_ERROR_VALUE,
         "%s: %s: expected each element at its own address, got strides [%lld, %lld]", op, arg,
         static_cast<long long>(rows.row_stride), static_cast<long long>(rows.col_stride));
}

void check_overlap(const char *op, const char *out_arg, const Rows &out, const char *in_arg,
                   const Rows &in) {
  if (share_memory(out, in))
    fail(LE_ERROR_VALUE, "%s: %s: expected memory of its own, got memory shared with %s", op,
         out_arg, in_arg);
}

void check_finite(const char *op, const char *arg, double value) {
  if (!std::isfinite(value))
    fail(LE_ERROR_VALUE, "%s: %s: expected a finite number, got %g", op, arg, value);
}

void check_rank(const char *op, int64_t rank, int64_t most) {
  if (rank > most)
    fail(LE_ERROR_VALUE, "%s: A: expected a rank of at most %lld, got %lld", op,
         static_cast<long long>(most), static_cast<long long>(rank));
}

void load_row(const Kernels &k, const Rows &rows, int64_t i, int64_t first, int64_t n, float *dst) {
  const char *p = rows.at(i, first);
  if (rows.col_stride == 1) {
    k.widen[rows.dtype](p, n, dst);
    return;
  }
  int64_t step = rows.col_stride * dtype_size(rows.dtype);
  if (rows.dtype == LE_FLOAT32) {
    for (int64_t j = 0; j < n; ++j, p += step) std::memcpy(dst + j, p, sizeof(float));
    return;
  }
  uint16_t part[kPart];
  for (int64_t j = 0; j < n; j += kPart) {
    int64_t count = std::min(kPart, n - j);
    for (int64_t e = 0; e < count; ++e, p += step) std::memcpy(part + e, p, sizeof(uint16_t));
    k.widen[rows.dtype](part, count, dst + j);
  }
}

const float *float_row(const Kernels &k, const Rows &rows, int64_t i, float *copy) {
  if (rows.dtype == LE_FLOAT32 && rows.contiguous_rows())
    return reinterpret_cast<const float *>(rows.row(i));
  load_row(k, rows, i, 0, rows.width, copy);
  return copy;
}

void store_row(const Kernels &k, const Rows &rows, int64_t i, int64_t first, int64_t n,
               const float *src, bool accumulate) {
  if (rows.col_stride == 1 && !accumulate) {
    k.round[rows.dtype](src, n, rows.at(i, first));
    return;
  }
  float part[kPart];
  uint16_t rounded[kPart];
  for (int64_t j = 0; j < n; j += kPart) {
    int64_t count = std::min(kPart, n - j);
    std::memcpy(part, src + j, static_cast<size_t>(count) * sizeof(float));
    if (accumulate) {
      float before[kPart];
      load_row(k, rows, i, first + j, count, before);
      for (int64_t e = 0; e < count; ++e) part[e] = before[e] + part[e];
    }
    bool narrow = rows.dtype != LE_FLOAT32;
    if (narrow) k.round[rows.dtype](part, count, rounded);
    for (int64_t e = 0; e < count; ++e) {
      char *p = rows.at(i, first + j + e);
      if (narrow)
        std::memcpy(p, &rounded[e], sizeof(uint16_t));
      else
        std::memcpy(p, &part[e], sizeof(float));
    }
  }
}

}  // namespace le
