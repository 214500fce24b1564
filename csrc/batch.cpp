#include <algorithm>

#include "forward.h"

namespace le {

void read_batch(const char *op, const AdapterPool &pool, const le_array *ids,
                const le_array *weights, int64_t n, Order order, Batch *batch) {
  if (!present(ids)) fail(LE_ERROR_VALUE, "%s: ids: expected int32 [n] or [n, k], got none", op);
  if ((ids->ndim == 1 || ids->ndim == 2) && ids->shape[0] != n)
    fail(LE_ERROR_VALUE, "%s: ids: expected one a row of x, %lld, got %lld", op,
         static_cast<long long>(n), static_cast<long long>(ids->shape[0]));
  // One id a row is a column, not a row.
  auto as_column = [](const le_array *a, le_array *column) {
    *column = *a;
    if (a->ndim == 1) {
      column->ndim = 2;
      column->shape[1] = column->strides[1] = 1;
    }
    return column;
  };
  check_dtype(op, "ids", ids->dtype, LE_INT32, "");
  le_array id_column, weight_column;
  Rows id_rows = matrix(op, "ids", as_column(ids, &id_column), n, -1, "[n] or [n, k]");
  Rows weight_rows;
  if (present(weights)) {
    check_dtype(op, "weights", weights->dtype, LE_FLOAT32, "");
    weight_rows =
        matrix(op, "weights", as_column(weights, &weight_column), n, id_rows.width, "like ids");
  }
  int64_t k = id_rows.width;
  if (n > 0 && k > INT32_MAX / n)
    fail(LE_ERROR_VALUE, "%s: ids: expected at most 2^31 - 1 of them, got %lld rows of %lld", op,
         static_cast<long long>(n), static_cast<long long>(k));
  batch->pairs = batch->pair_memory.get(n * k);
  batch->slots = batch->slot_memory.get(n * k);
  batch->count = 0;
  batch->mixtures = false;
  bool sorted = true;
  for (int64_t i = 0; i < n; ++i) {
    int64_t before = batch->count;
    for (int64_t j = 0; j < k; ++j) {
      int32_t id = *reinterpret_cast<const int32_t *>(id_rows.at(i, j));
      if (id == -1) continue;
      if (id < 0 || id >= pool.issued())
        fail(LE_ERROR_INDEX,
             "%s: ids: expected -1 or one of the pool's %d slots, got %d at row %lld", op,
             pool.issued(), id, static_cast<long long>(i));
      float w = present(weights) ? *reinterpret_cast<const float *>(weight_rows.at(i, j)) : 1.0f;
      if (batch->count > 0 && batch->pairs[batch->count - 1].slot > id) sorted = false;
      batch->pairs[batch->count++] = {i, id, static_cast<int32_t>(j), w};
    }
    if (batch->count - before > 1) batch->mixtures = true;
  }
  if (!sorted && (order == Order::kBySlot || !batch->mixtures)) {
    std::sort(batch->pairs, batch->pairs + batch->count, [](const Pair &a, const Pair &b) {
      if (a.slot != b.slot) return a.slot < b.slot;
      return a.row != b.row ? a.row < b.row : a.place < b.place;
    });
    sorted = true;
  }
  for (int64_t p = 0; p < batch->count; ++p) batch->slots[p] = batch->pairs[p].slot;
  if (!sorted) std::sort(batch->slots, batch->slots + batch->count);
  batch->slot_count = std::unique(batch->slots, batch->slots + batch->count) - batch->slots;
}

}  // namespace le
