// The delta of rows, from arrays or from a pool.
#pragma once

#include <optional>

#include "adapter_pool.h"

namespace le {

void lora_delta(Context &context, const le_array *x, const le_array *A, const le_array *B,
                float scaling, bool accumulate, const le_array *y);

// transposed: x is [n, out], y [n, in], and scaling A^T (B^T x) is added to it.
void pool_forward(AdapterPool &pool, const le_array *x, const le_array *ids,
                  const le_array *weights, bool transposed, bool accumulate, const le_array *y);

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

// A tile's rows all name the same single adapter, or it is one row's mixture.
struct PairTile {
  int64_t first, pairs;  // into Batch::pairs
  int64_t rows;
};

struct Shape;
struct Term;
struct Tile;

// The deltas of a batch: whole (run), or in halves for an op that adds them to its
// own columns while those are in the cache (shrink, then expand from any thread).
// Holds the slots' readers' locks. One at a time on a thread.
class BatchedDelta {
 public:
  // ids and weights for n rows.
  BatchedDelta(const char *op, AdapterPool &pool, int64_t n, const le_array *ids,
               const le_array *weights);

  void run(const Shape &shape) const;
  void run_transposed(const Shape &shape) const;

  // h = scale * A x of every tile.
  void shrink(const Shape &shape);
  // y[i * stride + 0..n) += columns [column, column + n) of row i's delta.
  void expand(const Kernels &k, int64_t column, int64_t n, float *y, int64_t stride) const;

 private:
  struct Memory;
  static Memory &memory();
  Tile tile(const PairTile &cut) const;
  // The terms of a tile in slice s; returns how many.
  int64_t terms(const PairTile &cut, int s, bool transposed, Term *to) const;

  AdapterPool &pool_;
  Memory &memory_;
  Batch &batch_;
  std::optional<SharedSlots> held_;
  PairTile *tiles_ = nullptr;
  int64_t count_ = 0;
  int64_t *rows_ = nullptr;  // of the pairs
  float *weights_ = nullptr;
  int64_t *starts_ = nullptr;  // of each tile's and slice's h
  float *h_ = nullptr;
  int64_t bytes_ = 0;  // of weights, each time they are named
};

}  // namespace le
