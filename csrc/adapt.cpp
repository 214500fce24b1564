#include "adapt.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.h"
#include "ewc_delta.h"
#include "rng.h"

namespace le {
namespace {

GradientBuffers &buffers() {
  LE_PER_THREAD(GradientBuffers, b);
  return b;
}

// What a weight can take and stay within its dtype's range.
double largest_step(int32_t dtype) { return dtype == LE_FLOAT16 ? 3e4 : 1e38; }

struct Outcome {
  le_outcome what = LE_NO_ADAPTER;
  double grad_norm = 0;
  double x_norm2 = -1, grad_norm2 = -1;  // of the samples, where the step needed them
};

Block *history_target(AdapterPool &pool, Slot &slot) {
  size_t bytes = sizeof(int32_t) * static_cast<size_t>(pool.num_slices());
  if (slot.previous && std::memcmp(slot.previous->ranks, slot.current->ranks, bytes) == 0) {
    slot.previous->scaling = slot.current->scaling;
    slot.previous->epoch = slot.current->epoch;
    return slot.previous;
  }
  Block *target = pool.clone_shape(*slot.current);
  pool.release(slot.previous);
  slot.previous = target;
  return target;
}

// One factor of a slice: theta - lr clip g, decay and EWC in factor form in one pass.
void update_rows(const Kernels &k, int32_t dtype, const FactorStep &f, const EwcRecord *record,
                 float lambda, Update u) {
  u.n = f.n;
  u.decay = f.decay;
  u.penalty = f.lr * 2.0f * lambda;
  for (int32_t j = 0; j < f.rank; ++j) {
    int64_t at = j * f.n;
    u.src = f.src + at * dtype_size(dtype);
    u.dst = f.dst + at * dtype_size(dtype);
    u.element = static_cast<uint32_t>(f.element + at);
    u.vec = f.rows[j].vec;
    u.coef = f.coef(j);
    u.fisher = record ? record->fisher.data() + f.element + at : nullptr;
    u.anchor = record ? record->anchor.data() + f.element + at : nullptr;
    k.update[dtype](u);
  }
}

// Both factors of a slice: B, then A, or its copy where it does not learn.
void update_slice(const Kernels &k, const AdapterPool &pool, int s, const FactorStep &a,
                  const FactorStep &b, bool train_A, const Block &block, const EwcRecord *record,
                  const Ewc *ewc, Update u) {
  int32_t dtype = pool.dtype();
  float lambda = ewc ? ewc->lambda() : 0.0f;
  double strength = 0;
  DeltaFactor of_a{}, of_b{};
  if (record && ewc->form() == LE_EWC_DELTA) {
    const float *fisher = record->fisher.data() + factors_before(pool, block, s);
    const float *largest = record->largest.data() + 2 * s;
    bool pulls = record->pulls[static_cast<size_t>(s)];
    const float *anchor = record->anchor.data();
    of_a = {pulls ? anchor + a.element : nullptr, fisher + b.n, largest[1], a.n};
    of_b = {pulls ? anchor + b.element : nullptr, fisher, largest[0], b.n};
    strength = 2.0 * double(lambda) * double(block.scaling) * double(block.scaling);
    record = nullptr;
  }
  if (strength * b.lr > 0)
    delta_step(k, dtype, b, of_b, of_a, a.src, strength, u);
  else
    update_rows(k, dtype, b, record, lambda, u);
  if (!train_A) {
    if (a.src != a.dst)
      std::memcpy(a.dst, a.src, static_cast<size_t>(a.rank * a.n * dtype_size(dtype)));
  } else if (strength * a.lr > 0) {
    delta_step(k, dtype, a, of_a, of_b, b.dst, strength, u);
  } else {
    update_rows(k, dtype, a, record, lambda, u);
  }
}

// The step itself, under the slot's lock.
void update_weights(const Kernels &k, AdapterPool &pool, int32_t id, Slot &slot,
                    const GradientRow *rows, const le_step &step, const Ewc *ewc, double norm) {
  const Block &from = *slot.current;
  const Block *to = pool.history() ? history_target(pool, slot) : &from;
  float clip = step.max_norm > 0 && norm > step.max_norm
                   ? static_cast<float>(double(step.max_norm) / norm)
                   : 1.0f;
  const EwcRecord *record = ewc ? ewc->find(id, slot) : nullptr;
  uint64_t key = rounding_key(pool.seed(), id, slot.version);
  Update u{};
  u.key_lo = static_cast<uint32_t>(key);
  u.key_hi = static_cast<uint32_t>(key >> 32);
  float lr_B = step.lr * step.lr_ratio;
  for (int s = 0; s < pool.num_slices(); ++s) {
    SliceView src = pool.slice(from, s), dst = pool.slice(*to, s);
    int64_t in = pool.in_features(), out = pool.slice_out(s);
    if (!src.rank) continue;
    FactorStep a{rows,        src.rank, in,
                 src.element, src.a,    dst.a,
                 step.lr,     clip,     1.0f - step.lr * step.weight_decay};
    FactorStep b{rows + src.rank, src.rank, out,  src.element + src.rank * in,    src.bt,
                 dst.bt,          lr_B,     clip, 1.0f - lr_B * step.weight_decay};
    update_slice(k, pool, s, a, b, step.train_A != 0, from, record, ewc, u);
    rows += 2 * src.rank;
  }
  if (pool.history()) std::swap(slot.current, slot.previous);
  ++slot.version;
}

Outcome step_slot(const Kernels &k, AdapterPool &pool, int32_t id, Slot &slot,
                  const GradientRow *rows, const le_step &step, const Ewc *ewc) {
  Outcome result;
  if (pool.elements(*slot.current) == 0) return result;  // rank 0: nothing that could learn
  result.grad_norm = gradient_norm(pool, *slot.current, rows, step.train_A != 0);
  double norm = result.grad_norm, lr = std::max(1.0, double(step.lr_ratio)) * step.lr;
  if (step.max_norm > 0) norm = std::min(norm, double(step.max_norm));
  bool fits = std::isfinite(result.grad_norm) && lr * norm < largest_step(pool.dtype());
  result.what = fits ? LE_APPLIED : LE_NOT_FINITE;
  if (result.what == LE_APPLIED)
    update_weights(k, pool, id, slot, rows, step, ewc, result.grad_norm);
  return result;
}

// The gradient of the samples, then the step; under the slot's lock.
Outcome adapt_slot(const Kernels &k, AdapterPool &pool, int32_t id, Slot &slot,
                   const Samples &samples, const le_step &step, const Ewc *ewc) {
  GradientBuffers &b = buffers();
  const Block &block = *slot.current;
  const GradientRow *rows;
  double x_norm2 = -1, grad_norm2 = -1;
  if (samples.count == 1) {
    rows = one_sample(k, pool, block, samples, b);
    if (pool.num_slices() == 1 && block.ranks[0]) {
      x_norm2 = rows[0].norm2;
      grad_norm2 = rows[block.ranks[0]].norm2;
    }
  } else {
    int64_t elements = pool.elements(block);
    float *gradient = b.gradient.get(elements);
    std::memset(gradient, 0, sizeof(float) * static_cast<size_t>(elements));
    add_gradient(k, pool, block, samples, gradient, b);
    rows = buffered(k, pool, block, gradient, 1.0f / static_cast<float>(samples.rows), b);
  }
  Outcome result = step_slot(k, pool, id, slot, rows, step, ewc);
  result.x_norm2 = x_norm2;
  result.grad_norm2 = grad_norm2;
  return result;
}

void check_step(const char *op, const AdapterPool &pool, const le_step &step, const Ewc *ewc) {
  auto check = [&](const char *arg, float value) {
    check_finite(op, arg, value);
    if (value < 0) fail(LE_ERROR_VALUE, "%s: %s: expected a number from 0, got %g", op, arg, value);
  };
  check("lr", step.lr);
  check("lr_ratio", step.lr_ratio);
  check("max_norm", step.max_norm);
  check("weight_decay", step.weight_decay);
  check("lr * lr_ratio", step.lr * step.lr_ratio);
  check("lr * weight_decay", step.lr * std::max(1.0f, step.lr_ratio) * step.weight_decay);
  if (ewc && &ewc->pool() != &pool)
    fail(LE_ERROR_VALUE, "%s: ewc: expected one made for this pool, got one of another", op);
}

Samples checked_samples(const char *op, const AdapterPool &pool, const le_array *x,
                        const le_array *grad) {
  Samples samples{};
  samples.x = float_matrix(op, "x", x, -1, pool.in_features(), "[n, in]");
  samples.grad = float_matrix(op, "grad", grad, samples.x.n, pool.out_features(), "[n, out]");
  check_dtype(op, "grad", samples.grad.dtype, samples.x.dtype, ", the dtype of x");
  return samples;
}

// All rows, of one slot.
void all_rows(Samples *samples) {
  samples->count = samples->rows = samples->x.n;
  Pair *pairs = buffers().pairs.get(samples->count);
  for (int64_t i = 0; i < samples->count; ++i) pairs[i] = {i, 0, 0, 1.0f};
  samples->pairs = pairs;
}

Rows checked_gradient(const char *op, const AdapterPool &pool, const Block &block,
                      const le_array *gradient) {
  Rows rows = matrix(op, "gradient", gradient, 1, pool.elements(block), "[size]");
  check_dtype(op, "gradient", rows.dtype, LE_FLOAT32, "");
  if (!rows.contiguous_rows())
    fail(LE_ERROR_VALUE, "%s: gradient: expected a contiguous array, got stride %lld", op,
         static_cast<long long>(rows.col_stride));
  return rows;
}

// Sums by slot that can take the samples' squares.
Rows checked_sums(const char *op, const char *arg, const le_array *array, const Rows &samples,
                  int32_t id, const char *symbols) {
  Rows rows = matrix(op, arg, array, -1, samples.width, symbols);
  check_dtype(op, arg, rows.dtype, LE_FLOAT32, "");
  if (id >= rows.n || !rows.contiguous_rows())
    fail(LE_ERROR_VALUE, "%s: %s: expected a contiguous row for slot %d, got %lld rows", op, arg,
         id, static_cast<long long>(rows.n));
  check_output(op, arg, array, rows);
  check_overlap(op, arg, rows, "x, grad", samples);
  return rows;
}

// Whether float32 sums of very many such samples are finite. squares: their sum, or -1 where it
// is yet to be made.
bool can_be_summed(const Kernels &k, const Rows &samples, double squares, Scratch<float> &copy) {
  constexpr double kLargest = 1e30;
  if (squares >= 0) return squares <= kLargest;
  float *row = copy.get(samples.width);
  squares = 0;
  for (int64_t i = 0; i < samples.n; ++i)
    squares += norm_squared(k, float_row(k, samples, i, row), samples.width);
  return squares <= kLargest;
}

void add_squares(const Kernels &k, const Rows &samples, char *sums, Scratch<float> &copy) {
  float *row = copy.get(samples.width);
  for (int64_t i = 0; i < samples.n; ++i)
    k.accumulate_squares[LE_FLOAT32][LE_FLOAT32](samples.width, 1.0f, 1.0f,
                                                 float_row(k, samples, i, row), sums);
}

}  // namespace

void pool_adapt(AdapterPool &pool, const le_array *x, const le_array *grad, const le_array *ids,
                const le_array *weights, const le_step &step, Ewc *ewc, uint8_t *outcomes) {
  const char *op = "batched_adapt";
  Samples all = checked_samples(op, pool, x, grad);
  check_step(op, pool, step, ewc);
  LE_PER_THREAD(Batch, batch_memory);
  LE_PER_THREAD(Scratch<int64_t>, start_memory);
  LE_PER_THREAD(Scratch<uint8_t>, outcome_memory);
  LE_PER_THREAD(Scratch<uint32_t>, owner_memory);
  Batch &batch = batch_memory;
  read_batch(op, pool, ids, weights, all.x.n, Order::kBySlot, &batch);
  int64_t *starts = start_memory.get(batch.slot_count + 1);
  uint8_t *by_slot = outcome_memory.get(batch.slot_count);
  uint32_t *owners = owner_memory.get(batch.slot_count);
  int64_t elements = 0;
  {
    SharedSlots live(op, pool, batch.slots, batch.slot_count);  // or nothing is touched
    for (int64_t s = 0, p = 0; s < batch.slot_count; ++s) {
      starts[s] = p;
      owners[s] = pool.slot(batch.slots[s]).owner;
      elements += pool.elements(*pool.slot(batch.slots[s]).current);
      while (p < batch.count && batch.pairs[p].slot == batch.slots[s]) ++p;
      starts[s + 1] = p;
    }
  }
  const Kernels &k = kernels();
  int64_t bytes =
      elements * dtype_size(pool.dtype()) * 2 + batch.count * (all.x.width + all.grad.width);
  pool.context().threads.run(batch.slot_count, pool.context().threads_for(bytes), [&](int64_t s) {
    int32_t id = batch.slots[s];
    Samples samples = all;
    samples.pairs = batch.pairs + starts[s];
    samples.count = starts[s + 1] - starts[s];
    samples.rows = 1;
    for (int64_t p = 1; p < samples.count; ++p)
      samples.rows += samples.pairs[p].row != samples.pairs[p - 1].row;
    Slot &slot = pool.slot(id);
    std::lock_guard<SlotLock> held(slot.lock);
    // Removed since the check above, and maybe another user's by now: not to be taught.
    bool same = slot.live.load() && slot.owner == owners[s];
    by_slot[s] = same ? adapt_slot(k, pool, id, slot, samples, step, ewc).what : LE_NO_ADAPTER;
  });
  std::memset(outcomes, LE_NO_ADAPTER, static_cast<size_t>(all.x.n));
  for (int64_t s = 0; s < batch.slot_count; ++s)
    for (int64_t p = starts[s]; p < starts[s + 1]; ++p) {
      uint8_t &row = outcomes[batch.pairs[p].row];
      row = std::max(row, by_slot[s]);
    }
}

void pool_adapt_slot(AdapterPool &pool, int32_t id, const le_array *x, const le_array *grad,
                     const le_step &step, Ewc *ewc, FactorSums sums, uint8_t *outcome,
                     double *grad_norm) {
  const char *op = "batched_adapt";
  Samples samples = checked_samples(op, pool, x, grad);
  check_step(op, pool, step, ewc);
  Rows u = sums.u ? checked_sums(op, "u", sums.u, samples.grad, id, "[slots, out]") : Rows{};
  Rows v = sums.v ? checked_sums(op, "v", sums.v, samples.x, id, "[slots, in]") : Rows{};
  if (sums.u) check_overlap(op, "u", u, "v", v);
  all_rows(&samples);
  ExclusiveSlot held(op, pool, id);
  Outcome result;
  if (samples.count) result = adapt_slot(kernels(), pool, id, held.slot, samples, step, ewc);
  if (result.what == LE_APPLIED && sums.u) {
    const Kernels &k = kernels();
    if (can_be_summed(k, samples.grad, result.grad_norm2, buffers().grad) &&
        can_be_summed(k, samples.x, result.x_norm2, buffers().x)) {
      add_squares(k, samples.grad, u.row(id), buffers().grad);
      add_squares(k, samples.x, v.row(id), buffers().x);
    } else {
      result.what = LE_NOT_OBSERVED;
    }
  }
  *outcome = static_cast<uint8_t>(result.what);
  *grad_norm = result.grad_norm;
}

int64_t pool_gradient_size(AdapterPool &pool, int32_t id) {
  SharedSlots held("AdapterPool.gradient_size", pool, &id, 1);
  return pool.elements(*pool.slot(id).current);
}

void pool_gradient(AdapterPool &pool, int32_t id, const le_array *x, const le_array *grad,
                   const le_array *h, const le_array *gradient, uint8_t *outcome,
                   double *grad_norm) {
  const char *op = "AdapterPool.gradient";
  Samples samples = checked_samples(op, pool, x, grad);
  all_rows(&samples);
  SharedSlots held(op, pool, &id, 1);
  const Block &block = *pool.slot(id).current;
  Rows to = checked_gradient(op, pool, block, gradient);
  check_output(op, "gradient", gradient, to);
  check_overlap(op, "gradient", to, "x", samples.x);
  check_overlap(op, "gradient", to, "grad", samples.grad);
  Rows h_rows;
  if (present(h)) {
    int64_t rank = 0;
    for (int s = 0; s < pool.num_slices(); ++s) rank += block.ranks[s];
    h_rows = matrix(op, "h", h, samples.x.n, rank, "[n, sum of ranks]");
    check_dtype(op, "h", h_rows.dtype, LE_FLOAT32, "");
    check_overlap(op, "gradient", to, "h", h_rows);
    samples.h = &h_rows;
  }
  GradientBuffers &b = buffers();
  const Kernels &k = kernels();
  int64_t elements = pool.elements(block);
  float *sum = b.gradient.get(elements);
  std::memset(sum, 0, sizeof(float) * static_cast<size_t>(elements));
  add_gradient(k, pool, block, samples, sum, b);
  const GradientRow *rows = buffered(k, pool, block, sum, 1.0f, b);
  *grad_norm = gradient_norm(pool, block, rows, true);
  *outcome = !samples.count              ? LE_NO_ADAPTER
             : std::isfinite(*grad_norm) ? LE_APPLIED
                                         : LE_NOT_FINITE;
  if (*outcome != LE_APPLIED) return;
  float *total = reinterpret_cast<float *>(to.data);
  for (int64_t i = 0; i < elements; ++i) total[i] += sum[i];
}

void pool_apply(AdapterPool &pool, int32_t id, const le_array *gradient, float scale,
                const le_step &step, Ewc *ewc, uint8_t *outcome, double *grad_norm) {
  const char *op = "AdapterPool.apply";
  check_step(op, pool, step, ewc);
  check_finite(op, "scale", scale);
  ExclusiveSlot held(op, pool, id);
  Rows from = checked_gradient(op, pool, *held.slot.current, gradient);
  const Kernels &k = kernels();
  const GradientRow *rows = buffered(k, pool, *held.slot.current,
                                     reinterpret_cast<const float *>(from.data), scale, buffers());
  Outcome result = step_slot(k, pool, id, held.slot, rows, step, ewc);
  *outcome = static_cast<uint8_t>(result.what);
  *grad_norm = result.grad_norm;
}

}  // namespace le
