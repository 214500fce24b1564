// The delta of rows, from arrays or from a pool.
#pragma once

#include "adapter_pool.h"

namespace le {

void lora_delta(Context &context, const le_array *x, const le_array *A, const le_array *B,
                float scaling, bool accumulate, const le_array *y);

void pool_forward(AdapterPool &pool, const le_array *x, const le_array *ids,
                  const le_array *weights, bool accumulate, const le_array *y);

void pool_forward_slot(AdapterPool &pool, int32_t slot, const le_array *x, bool transposed,
                       bool accumulate, const le_array *y);

void pool_shrink(AdapterPool &pool, int32_t slot, const le_array *x, const le_array *h);

// The (row, place) pairs of a batch that name an adapter: what forward and
// adapt iterate over.
struct Pair {
  int64_t row;
  int32_t slot;
  int32_t place;  // among the row's ids
  float weight;
};
struct Batch {
  Scratch<Pair> pair_memory;
  Scratch<int32_t> slot_memory;
  Pair *pairs = nullptr;
  int64_t count = 0;
  int32_t *slots = nullptr;  // ascending, each once
  int64_t slot_count = 0;
  bool mixtures = false;  // some row names more than one adapter
};
// Checks ids and weights against the pool and n rows. The pairs stay in row
// order where rows are mixtures and may stay so; else they are sorted by slot.
enum class Order { kBySlot, kMixturesByRow };
void read_batch(const char *op, const AdapterPool &pool, const le_array *ids,
                const le_array *weights, int64_t n, Order order, Batch *batch);

}  // namespace le
