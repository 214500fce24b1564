// Borrowed arrays, checked: what the ops compute on.
#pragma once

#include <utility>

#include "common.h"
#include "isa/kernels.h"
#include "per_thread.h"

namespace le {

// n rows of `width` elements; strides in elements.
struct Rows {
  char *data = nullptr;
  int64_t n = 0, width = 0;
  int64_t row_stride = 0, col_stride = 1;
  int32_t dtype = LE_FLOAT32;

  char *row(int64_t i) const { return data + i * row_stride * dtype_size(dtype); }
  char *at(int64_t i, int64_t j) const {
    return data + (i * row_stride + j * col_stride) * dtype_size(dtype);
  }
  bool contiguous_rows() const { return col_stride == 1 || width <= 1; }
};

inline Rows transposed(Rows m) {
  std::swap(m.n, m.width);
  std::swap(m.row_stride, m.col_stride);
  return m;
}

// No data and no dimensions mean "none".
inline bool present(const le_array *a) { return a && (a->data || a->ndim != 0); }

// x [n, width] (or [width]: one row); width < 0 takes any. rows < 0 takes any.
// `symbols` spells the shape in the message, as in "[n, in]".
Rows matrix(const char *op, const char *arg, const le_array *a, int64_t rows, int64_t width,
            const char *symbols);
// The same for a floating dtype, which is checked.
Rows float_matrix(const char *op, const char *arg, const le_array *a, int64_t rows, int64_t width,
                  const char *symbols);

void check_dtype(const char *op, const char *arg, int32_t got, int32_t expected,
                 const char *expected_by);
// Raises where `out` is read-only, repeats elements, or shares memory with `in`.
void check_output(const char *op, const char *arg, const le_array *out, const Rows &rows);
void check_overlap(const char *op, const char *out_arg, const Rows &out, const char *in_arg,
                   const Rows &in);
void check_finite(const char *op, const char *arg, double value);
void check_rank(const char *op, int64_t rank, int64_t most = LE_MAX_RANK);

// dst[0..n) as float32 from one row of `rows`, columns [first, first + n).
void load_row(const Kernels &k, const Rows &rows, int64_t i, int64_t first, int64_t n, float *dst);
// The row itself where it is contiguous float32, else a copy in `copy`.
const float *float_row(const Kernels &k, const Rows &rows, int64_t i, float *copy);
// Writes n float32 to columns [first, first + n) of row i; adds with accumulate.
void store_row(const Kernels &k, const Rows &rows, int64_t i, int64_t first, int64_t n,
               const float *src, bool accumulate);

}  // namespace le
