#include "merge_terms.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <limits>

#include "dispatch.h"
#include "per_thread.h"

namespace le {
namespace {

const char *const kOp = "consolidate";
constexpr double kBasePull = 1e-9;  // of the mean weight of an element of the delta

// float32 of the values by their bits, which compilers vectorise as they stand.
bool all_finite(const float *values, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !bad;
}

// The mean of finite values of 0 or more; -1 for others.
double checked_mean(const float *values, int64_t n) {
  double sums[8] = {};
  uint32_t negative = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) {
      sums[j] += double(values[i + j]);
      negative |= values[i + j] < 0;
    }
  for (; i < n; ++i) {
    sums[i % 8] += double(values[i]);
    negative |= values[i] < 0;
  }
  if (negative || !all_finite(values, n)) return -1;
  double total = 0;
  for (double sum : sums) total += sum;
  return total / double(n);
}

std::vector<int32_t> read_slots(AdapterPool &pool, int32_t base, const le_array *slots) {
  Rows s = matrix(kOp, "slots", slots, 1, -1, "[K]");
  check_dtype(kOp, "slots", s.dtype, LE_INT32, "");
  if (!s.width) fail(LE_ERROR_VALUE, "%s: slots: expected at least one slot, got none", kOp);
  std::vector<int32_t> ids{base};
  for (int64_t i = 0; i < s.width; ++i) {
    int32_t id;
    std::memcpy(&id, s.at(0, i), sizeof id);
    ids.push_back(id);
  }
  std::vector<int32_t> sorted = ids;
  std::sort(sorted.begin(), sorted.end());
  for (int32_t id : sorted) pool.check_issued(kOp, id);
  auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end())
    fail(LE_ERROR_VALUE, "%s: slots: expected each slot once, and not the base, got %d again", kOp,
         *twice);
  return ids;
}

// A number of each adapter.
std::vector<double> read_numbers(const char *arg, const le_array *from, int64_t adapters,
                                 float least, const char *expected) {
  Rows numbers = matrix(kOp, arg, from, 1, adapters, "[K + 1]");
  check_dtype(kOp, arg, numbers.dtype, LE_FLOAT32, "");
  std::vector<double> values;
  for (int64_t i = 0; i < adapters; ++i) {
    float value;
    std::memcpy(&value, numbers.at(0, i), sizeof value);
    if (!(value >= least && value <= 3.4e38f))
      fail(LE_ERROR_VALUE, "%s: %s: expected finite values %s, got %g", kOp, arg, expected, value);
    values.push_back(value);
  }
  return values;
}

// visit(number of the adapter, room for a row) for each adapter, on several threads. What the
// first of them throws is thrown here.
class EachAdapter {
 public:
  EachAdapter(Context &context, int threads, size_t adapters, int64_t longest_row)
      : context_(context), threads_(threads), failed_(adapters), longest_(longest_row) {}

  template <class Visit>
  void operator()(Visit &&visit) {
    context_.threads.run(static_cast<int64_t>(failed_.size()), threads_, [&](int64_t i) {
      try {
        LE_PER_THREAD(Scratch<float>, copy);
        visit(static_cast<size_t>(i), copy.get(longest_));
      } catch (...) {
        failed_[i] = std::current_exception();
      }
    });
    for (const std::exception_ptr &failure : failed_)
      if (failure) std::rethrow_exception(failure);
  }

 private:
  Context &context_;
  const int threads_;
  std::vector<std::exception_ptr> failed_;
  const int64_t longest_;
};

// The Fisher factors of one side, a row a slot, what each row is multiplied by (sqrt(weight) over
// the samples that it is a sum of), and the mean of the product.
struct FisherSide {
  const char *arg;
  Rows rows;
  std::vector<double> factors, means;
  double scale = 1;  // brings the largest mean to 1: no product of the two sides underflows
};

FisherSide read_fisher(const Kernels &k, EachAdapter &each, const char *arg, const le_array *from,
                       int64_t n, const std::vector<int32_t> &ids,
                       const std::vector<double> &factors) {
  FisherSide side{arg, matrix(kOp, arg, from, -1, n, "[slots, n]"), factors,
                  std::vector<double>(ids.size())};
  check_dtype(kOp, arg, side.rows.dtype, LE_FLOAT32, "");
  each([&](size_t i, float *copy) {
    if (ids[i] >= side.rows.n)
      fail(LE_ERROR_VALUE, "%s: %s: expected a row for each slot, up to %d, got %lld rows", kOp,
           arg, ids[i], static_cast<long long>(side.rows.n));
    double mean = checked_mean(float_row(k, side.rows, ids[i], copy), n);
    if (mean < 0)
      fail(LE_ERROR_VALUE, "%s: %s: expected finite values of 0 or more, got others for slot %d",
           kOp, arg, ids[i]);
    side.means[i] = factors[i] * mean;
  });
  double largest = *std::max_element(side.means.begin(), side.means.end());
  if (largest > 0) side.scale = 1 / largest;
  return side;
}

void write_fisher(const Kernels &k, EachAdapter &each, const FisherSide &from,
                  const std::vector<int32_t> &ids, double pull, MergeSide *to) {
  each([&](size_t i, float *copy) {
    to->write(static_cast<int64_t>(i), float_row(k, from.rows, ids[i], copy),
              from.factors[i] * from.scale);
  });
  std::vector<float> ones(static_cast<size_t>(to->n), 1.0f);
  to->write(static_cast<int64_t>(ids.size()), ones.data(), std::sqrt(pull));
}

// Rows [row, row + rank) of one side of an adapter, from the pool's storage.
void write_factor(const Kernels &k, int32_t dtype, const char *from, int32_t rank, double scale,
                  int64_t row, int32_t id, MergeSide *to, float *copy) {
  Rows rows{const_cast<char *>(from), rank, to->n, to->n, 1, dtype};
  for (int32_t p = 0; p < rank; ++p) {
    const float *values = float_row(k, rows, p, copy);
    if (!all_finite(values, to->n))
      fail(LE_ERROR_VALUE, "%s: slots: expected finite weights, got NaN or Inf in slot %d", kOp,
           id);
    to->write(row + p, values, scale);
  }
}

// How many factor rows each adapter has; another thread may change that until it is read.
std::vector<int32_t> read_ranks(AdapterPool &pool, const std::vector<int32_t> &ids) {
  std::vector<int32_t> ranks(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) pool.ranks(ids[i], &ranks[i]);
  return ranks;
}

}  // namespace

void MergeSide::allocate(KeptMemory &from, int64_t columns, int64_t rows_a_tile) {
  n = columns;
  rows = rows_a_tile;
  data = from.take(static_cast<size_t>(tiles() * rows * kMergeTile) * sizeof(float));
}

void MergeSide::write(int64_t row, const float *values, double scale) {
  float factor = static_cast<float>(scale);
  for (int64_t t = 0; t < tiles(); ++t) {
    float *to = tile(t) + row * kMergeTile;
    const float *from = values + t * kMergeTile;
    int64_t count = width(t);
    for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
  }
}

MergeTerms read_terms(AdapterPool &pool, int32_t base, const le_merge &input) {
  const Kernels &k = kernels();
  std::vector<int32_t> ids = read_slots(pool, base, input.slots);
  std::vector<int32_t> ranks = read_ranks(pool, ids);
  MergeTerms terms;
  terms.adapters = static_cast<int64_t>(ids.size());
  terms.weights = read_numbers("weights", input.weights, terms.adapters, 0.0f, "of 0 or more");
  if (present(input.u) != present(input.v))
    fail(LE_ERROR_VALUE, "%s: u, v: expected both or neither, got one", kOp);
  bool weighted = present(input.u);
  int64_t in = pool.in_features(), out = pool.slice_out(0);
  EachAdapter each(pool.context(), input.num_threads, ids.size(), std::max(in, out));
  FisherSide u, v;
  double total = 0;
  if (weighted) {
    std::vector<double> factors(ids.size(), 1.0);
    if (present(input.samples))
      factors = read_numbers("samples", input.samples, terms.adapters,
                             std::numeric_limits<float>::min(), "above 0");
    for (size_t i = 0; i < ids.size(); ++i) factors[i] = std::sqrt(terms.weights[i]) / factors[i];
    u = read_fisher(k, each, "u", input.u, out, ids, factors);
    v = read_fisher(k, each, "v", input.v, in, ids, factors);
    for (size_t i = 0; i < ids.size(); ++i) total += u.means[i] * v.means[i] * u.scale * v.scale;
    terms.fishers = terms.adapters + 1;
  }
  std::vector<int64_t> first_rows;
  for (size_t i = 0; i < ids.size(); ++i) {
    first_rows.push_back(terms.fishers + static_cast<int64_t>(terms.owner.size()));
    terms.owner.insert(terms.owner.end(), static_cast<size_t>(ranks[i]), static_cast<int32_t>(i));
  }
  terms.factors = static_cast<int64_t>(terms.owner.size());
  terms.base_rank = ranks[0];
  terms.b.allocate(pool.context().kept, out, terms.fishers + terms.factors);
  terms.a.allocate(pool.context().kept, in, terms.fishers + terms.factors);
  if (weighted) {
    double pull = total > 0 ? kBasePull * total : 1.0;
    write_fisher(k, each, u, ids, pull, &terms.b);
    write_fisher(k, each, v, ids, pull, &terms.a);
  }
  terms.versions.resize(ids.size());
  each([&](size_t i, float *copy) {
    SharedSlots held(kOp, pool, &ids[i], 1);
    const Block &block = *pool.slot(ids[i]).current;
    SliceView view = pool.slice(block, 0);
    if (view.rank != ranks[i])
      fail(LE_ERROR_VALUE, "%s: slots: expected slot %d to keep its rank, got it set meanwhile",
           kOp, ids[i]);
    const int64_t row = first_rows[i];
    double scaling = double(block.scaling);
    write_factor(k, pool.dtype(), view.bt, view.rank, scaling, row, ids[i], &terms.b, copy);
    write_factor(k, pool.dtype(), view.a, view.rank, 1.0, row, ids[i], &terms.a, copy);
    terms.versions[i] = pool.slot(ids[i]).version;
  });
  return terms;
}

}  // namespace le
