// The adapters of a merge as they were at one moment, laid out for sums over all of them.
#pragma once

#include "adapter_pool.h"
#include "small_matrix.h"

namespace le {

constexpr int64_t kMergeTile = 1024;  // columns

// One side of every adapter, A [r, in] or the transpose of s B [r, out]. A tile of columns holds
// first a row of Fisher factors an adapter (none without Fisher), then all factors' rows, one
// adapter after another: one pass over the memory in order reads everything.
struct MergeSide {
  int64_t n = 0, rows = 0;
  KeptMemory::Buffer data;

  void allocate(KeptMemory &from, int64_t columns, int64_t rows_a_tile);
  int64_t tiles() const { return (n + kMergeTile - 1) / kMergeTile; }
  int64_t width(int64_t tile) const { return std::min(kMergeTile, n - tile * kMergeTile); }
  float *tile(int64_t t) const { return data.floats() + t * rows * kMergeTile; }
  void write(int64_t row, const float *values, double scale);
};

// Adapter 0 is the base. With Fisher factors, the rows sqrt(w_k) u_k and sqrt(w_k) v_k, and one
// more pair for a constant pull toward the base: see reference_consolidation.py.
struct MergeTerms {
  int64_t adapters = 0, fishers = 0, factors = 0, base_rank = 0;
  std::vector<int32_t> owner;   // of each factor row
  std::vector<double> weights;  // of each adapter, as given
  std::vector<uint64_t> versions;
  MergeSide b, a;
};

// Reads the slots, each under its lock and no longer: a merge keeps no writer waiting.
MergeTerms read_terms(AdapterPool &pool, int32_t base, const le_merge &merge);

}  // namespace le
