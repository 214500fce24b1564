#include "ewc.h"

#include <cstring>

#include "dispatch.h"
#include "rng.h"

namespace le {
namespace {

void check_lambda(const char *op, float lambda) {
  check_finite(op, "ewc_lambda", lambda);
  if (lambda < 0) fail(LE_ERROR_VALUE, "%s: ewc_lambda: expected 0 or more, got %g", op, lambda);
}

// Copies F of one factor to `to`, refusing what is no Fisher information.
void read_fisher(const char *op, const char *arg, const Kernels &k, const Rows &from, float *to) {
  for (int64_t j = 0; j < from.n; ++j) {
    float *row = to + j * from.width;
    load_row(k, from, j, 0, from.width, row);
    for (int64_t i = 0; i < from.width; ++i)
      if (!(row[i] >= 0.0f && row[i] <= 3.4e38f))
        fail(LE_ERROR_VALUE, "%s: %s: expected finite values of 0 or more, got %g", op, arg,
             row[i]);
  }
}

}  // namespace

Ewc::Ewc(AdapterPool &pool, int32_t form, float lambda) : pool_(pool), lambda_(lambda) {
  check_lambda("EWC", lambda);
  if (form == LE_EWC_DELTA)
    fail(LE_ERROR_UNSUPPORTED, "EWC: form: expected factor, got delta, which this version lacks");
  if (form != LE_EWC_FACTOR) fail(LE_ERROR_VALUE, "EWC: form: expected factor, got %d", form);
}

std::unique_ptr<EwcRecord> &Ewc::entry(int32_t id) {
  if (id >= entries_.load(std::memory_order_acquire)) {
    std::lock_guard<std::mutex> guard(mutex_);
    if (id >= entries_.load(std::memory_order_relaxed)) {
      records_.grow_to(int64_t(id) + 1);
      entries_.store(int64_t(id) + 1, std::memory_order_release);
    }
  }
  return records_[id];
}

const EwcRecord *Ewc::find(int32_t id, const Slot &slot) const {
  if (id >= entries_.load(std::memory_order_acquire)) return nullptr;
  const EwcRecord *record = records_[id].get();
  return record && record->epoch == slot.current->epoch ? record : nullptr;
}

void Ewc::set(int32_t id, const le_array *fisher_A, const le_array *fisher_B) {
  const char *op = "EWC.set";
  pool_.check_issued(op, id);
  std::unique_ptr<EwcRecord> &to = entry(id);
  ExclusiveSlot held(op, pool_, id);
  const Block &block = *held.slot.current;
  const Kernels &k = kernels();
  auto record = std::make_unique<EwcRecord>();
  record->epoch = block.epoch;
  record->fisher.resize(static_cast<size_t>(pool_.elements(block)));
  record->anchor.resize(record->fisher.size());
  int64_t in = pool_.in_features();
  for (int s = 0; s < pool_.num_slices(); ++s) {
    SliceView view = pool_.slice(block, s);
    int64_t out = pool_.slice_out(s);
    if (!view.rank) continue;
    Rows a = matrix(op, "fisher_A", &fisher_A[s], view.rank, in, "[r, in]");
    Rows bt = matrix(op, "fisher_B", &fisher_B[s], out, view.rank, "[out, r]");
    check_dtype(op, "fisher_A", a.dtype, LE_FLOAT32, "");
    check_dtype(op, "fisher_B", bt.dtype, LE_FLOAT32, "");
    std::swap(bt.n, bt.width);
    std::swap(bt.row_stride, bt.col_stride);
    float *fisher = record->fisher.data() + view.element;
    float *anchor = record->anchor.data() + view.element;
    read_fisher(op, "fisher_A", k, a, fisher);
    read_fisher(op, "fisher_B", k, bt, fisher + view.rank * in);
    Rows weights_a{view.a, view.rank, in, in, 1, pool_.dtype()};
    Rows weights_bt{view.bt, view.rank, out, out, 1, pool_.dtype()};
    for (int32_t j = 0; j < view.rank; ++j) {
      load_row(k, weights_a, j, 0, in, anchor + j * in);
      load_row(k, weights_bt, j, 0, out, anchor + view.rank * in + j * out);
    }
  }
  to = std::move(record);
}

void Ewc::remove(int32_t id) {
  const char *op = "EWC.remove";
  pool_.check_issued(op, id);
  std::unique_ptr<EwcRecord> &record = entry(id);
  ExclusiveSlot held(op, pool_, id);
  record.reset();
}

double Ewc::penalty() {
  const Kernels &k = kernels();
  std::vector<float> theta;
  double total = 0;
  int64_t count = std::min<int64_t>(entries_.load(std::memory_order_acquire), pool_.issued());
  for (int32_t id = 0; id < count; ++id) {
    Slot &slot = pool_.slot(id);
    slot.lock.lock_shared();
    const EwcRecord *record = slot.live.load() ? find(id, slot) : nullptr;
    if (record) {
      theta.resize(record->fisher.size());
      int64_t n = static_cast<int64_t>(theta.size());
      Rows weights{pool_.slice(*slot.current, 0).a, 1, n, n, 1, pool_.dtype()};
      load_row(k, weights, 0, 0, n, theta.data());
      for (size_t i = 0; i < theta.size(); ++i) {
        double d = double(theta[i]) - double(record->anchor[i]);
        total += double(record->fisher[i]) * d * d;
      }
    }
    slot.lock.unlock_shared();
  }
  return double(lambda_) * total;
}

void ewc_step(const le_array *theta, const le_array *grad, const le_array *fisher,
              const le_array *anchor, float lr, float lambda, uint64_t seed, uint64_t version) {
  const char *op = "ewc_step";
  Rows t = float_matrix(op, "theta", theta, -1, -1, "[n, m]");
  Rows g = float_matrix(op, "grad", grad, t.n, t.width, "like theta");
  Rows f = matrix(op, "fisher", fisher, t.n, t.width, "like theta");
  Rows a = matrix(op, "anchor", anchor, t.n, t.width, "like theta");
  check_dtype(op, "fisher", f.dtype, LE_FLOAT32, "");
  check_dtype(op, "anchor", a.dtype, LE_FLOAT32, "");
  check_output(op, "theta", theta, t);
  check_overlap(op, "theta", t, "grad", g);
  check_overlap(op, "theta", t, "fisher", f);
  check_overlap(op, "theta", t, "anchor", a);
  check_finite(op, "lr", lr);
  if (lr < 0) fail(LE_ERROR_VALUE, "%s: lr: expected 0 or more, got %g", op, lr);
  check_lambda(op, lambda);

  const Kernels &k = kernels();
  uint64_t key = rounding_key(seed, 0, version);
  static thread_local Scratch<float> grad_copy, fisher_copy, anchor_copy;
  static thread_local Scratch<char> theta_copy;
  for (int64_t i = 0; i < t.n; ++i) {
    Update u{};
    u.n = t.width;
    u.vec = float_row(k, g, i, grad_copy.get(t.width));
    u.fisher = float_row(k, f, i, fisher_copy.get(t.width));
    u.anchor = float_row(k, a, i, anchor_copy.get(t.width));
    u.decay = 1.0f;
    u.coef = lr;
    u.penalty = 2.0f * lambda * lr;
    u.key_lo = static_cast<uint32_t>(key);
    u.key_hi = static_cast<uint32_t>(key >> 32);
    u.element = static_cast<uint32_t>(i * t.width);
    if (t.contiguous_rows()) {
      u.src = u.dst = t.row(i);
      k.update[t.dtype](u);
      continue;
    }
    int64_t size = dtype_size(t.dtype);
    char *copy = theta_copy.get(t.width * size);
    for (int64_t j = 0; j < t.width; ++j)
      std::memcpy(copy + j * size, t.at(i, j), static_cast<size_t>(size));
    u.src = u.dst = copy;
    k.update[t.dtype](u);
    for (int64_t j = 0; j < t.width; ++j)
      std::memcpy(t.at(i, j), copy + j * size, static_cast<size_t>(size));
  }
}

}  // namespace le
