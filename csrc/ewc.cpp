#include "ewc.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <shared_mutex>

#include "dispatch.h"
#include "ewc_delta.h"
#include "rng.h"

namespace le {
namespace {

void check_lambda(const char *op, float lambda) {
  check_finite(op, "ewc_lambda", lambda);
  if (lambda < 0) fail(LE_ERROR_VALUE, "%s: ewc_lambda: expected 0 or more, got %g", op, lambda);
}

double factor_penalty(const EwcRecord &record, const std::vector<float> &theta) {
  double total = 0;
  for (size_t i = 0; i < theta.size(); ++i) {
    double d = double(theta[i]) - double(record.anchor[i]);
    total += double(record.fisher[i]) * d * d;
  }
  return total;
}

// What one of four arrays of a slice is called, and where it lies in a record.
struct Part {
  const char *name, *symbols;
  Rows rows;
  float least;
};

// first, second, anchor_A and anchor_B, in the shapes that a caller sees.
std::array<Part, 4> parts(const AdapterPool &pool, int32_t form, const EwcRecord &record,
                          const Block &block, int s) {
  SliceView view = pool.slice(block, s);
  int64_t in = pool.in_features(), out = pool.slice_out(s), rank = view.rank;
  auto at = [](const Floats &v, int64_t element) {
    return const_cast<char *>(reinterpret_cast<const char *>(v.data() + element));
  };
  auto factor_a = [&](char *to) { return Rows{to, rank, in, in, 1}; };
  auto factor_b = [&](char *to) { return Rows{to, out, rank, 1, out}; };  // lies transposed
  constexpr float kAny = -3.4e38f;
  Part anchor_a{"anchor_A", "[r, in]", factor_a(at(record.anchor, view.element)), kAny};
  Part anchor_b{"anchor_B", "[out, r]", factor_b(at(record.anchor, view.element + rank * in)),
                kAny};
  if (form == LE_EWC_FACTOR)
    return {Part{"fisher_A", "[r, in]", factor_a(at(record.fisher, view.element)), 0},
            Part{"fisher_B", "[out, r]", factor_b(at(record.fisher, view.element + rank * in)), 0},
            anchor_a, anchor_b};
  int64_t first = factors_before(pool, block, s);
  return {Part{"u", "[out]", {at(record.fisher, first), 1, out, out, 1}, 0},
          Part{"v", "[in]", {at(record.fisher, first + out), 1, in, in, 1}, 0}, anchor_a, anchor_b};
}

// Both as rows that are contiguous in the record.
void along_the_record(Rows *in_record, Rows *given) {
  if (in_record->col_stride == 1) return;
  for (Rows *rows : {in_record, given}) *rows = transposed(*rows);
}

void read_part(const char *op, const Kernels &k, const Part &part, const le_array &array) {
  Rows to = part.rows;
  Rows from = matrix(op, part.name, &array, to.n, to.width, part.symbols);
  check_dtype(op, part.name, from.dtype, LE_FLOAT32, "");
  along_the_record(&to, &from);
  for (int64_t j = 0; j < to.n; ++j) {
    float *row = reinterpret_cast<float *>(to.row(j));
    load_row(k, from, j, 0, to.width, row);
    for (int64_t i = 0; i < to.width; ++i)
      if (!(row[i] >= part.least && row[i] <= 3.4e38f))
        fail(LE_ERROR_VALUE, "%s: %s: expected finite values%s, got %g", op, part.name,
             part.least == 0 ? " of 0 or more" : "", row[i]);
  }
}

void write_part(const Kernels &k, const Part &part, Rows to) {
  Rows from = part.rows;
  along_the_record(&from, &to);
  for (int64_t j = 0; j < from.n; ++j)
    store_row(k, to, j, 0, from.width, reinterpret_cast<const float *>(from.row(j)), false);
}

// The weights of a slot as float32, in their order.
void read_weights(const Kernels &k, const AdapterPool &pool, const Block &block, float *to) {
  k.widen[pool.dtype()](pool.slice(block, 0).a, pool.elements(block), to);
}

}  // namespace

int64_t factors_before(const AdapterPool &pool, const Block &block, int s) {
  int64_t count = 0;
  for (int i = 0; i < s; ++i) count += block.ranks[i] ? pool.in_features() + pool.slice_out(i) : 0;
  return count;
}

Ewc::Ewc(AdapterPool &pool, int32_t form, float lambda)
    : pool_(pool), form_(form), lambda_(lambda), records_(pool.context().memory) {
  check_lambda("EWC", lambda);
  if (form != LE_EWC_FACTOR && form != LE_EWC_DELTA)
    fail(LE_ERROR_VALUE, "EWC: form: expected factor or delta, got %d", form);
}

std::unique_ptr<EwcRecord> &Ewc::entry(int32_t id) {
  if (id >= entries_.load(std::memory_order_acquire)) {
    std::lock_guard<std::mutex> guard(pool_.growing());
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

void Ewc::set(int32_t id, const le_array *first, const le_array *second) {
  record("EWC.set", id, {first, second});
}

void Ewc::restore(int32_t id, const le_array *first, const le_array *second,
                  const le_array *anchor_A, const le_array *anchor_B) {
  record("EWC.restore", id, {first, second, anchor_A, anchor_B});
}

void Ewc::record(const char *op, int32_t id, std::initializer_list<const le_array *> given) {
  const Kernels &k = kernels();
  pool_.check_issued(op, id);
  std::unique_ptr<EwcRecord> &to = entry(id);
  ExclusiveSlot held(op, pool_, id);
  const Block &block = *held.slot.current;
  auto made = std::make_unique<EwcRecord>(pool_.context().memory);
  int slices = pool_.num_slices();
  int64_t elements = pool_.elements(block);
  made->epoch = block.epoch;
  made->anchor.resize(static_cast<size_t>(elements));
  made->fisher.resize(
      static_cast<size_t>(form_ == LE_EWC_DELTA ? factors_before(pool_, block, slices) : elements));
  if (given.size() == 2) read_weights(k, pool_, block, made->anchor.data());
  for (int s = 0; s < slices; ++s) {
    if (!block.ranks[s]) continue;
    std::array<Part, 4> of_slice = parts(pool_, form_, *made, block, s);
    const Part *part = of_slice.data();
    for (const le_array *arrays : given) read_part(op, k, *part++, arrays[s]);
  }
  if (form_ == LE_EWC_DELTA) note_slices(block, made.get());
  to = std::move(made);
}

void Ewc::note_slices(const Block &block, EwcRecord *record) const {
  const float *at = record->fisher.data();
  auto some = [](const float *v, int64_t n) {
    return std::any_of(v, v + n, [](float value) { return value != 0; });
  };
  for (int s = 0; s < pool_.num_slices(); ++s) {
    for (int64_t n : {pool_.slice_out(s), pool_.in_features()}) {
      if (!block.ranks[s]) n = 0;
      record->largest.push_back(n ? *std::max_element(at, at + n) : 0.0f);
      at += n;
    }
    SliceView view = pool_.slice(block, s);
    int64_t of_a = view.rank * pool_.in_features();
    const float *a = record->anchor.data() + view.element;
    record->pulls.push_back(some(a, of_a) && some(a + of_a, view.rank * pool_.slice_out(s)));
  }
}

void Ewc::get(int32_t id, const le_array *first, const le_array *second, const le_array *anchor_A,
              const le_array *anchor_B) {
  const char *op = "EWC.get";
  const le_array *const given[] = {first, second, anchor_A, anchor_B};
  SharedSlots held(op, pool_, &id, 1);
  const Slot &slot = pool_.slot(id);
  const EwcRecord *record = find(id, slot);
  if (!record)
    fail(LE_ERROR_VALUE, "%s: slot: expected one with a record, got slot %d, which has none", op,
         id);
  std::vector<std::pair<Part, Rows>> copies;  // all checked before any is made
  for (int s = 0; s < pool_.num_slices(); ++s) {
    if (!slot.current->ranks[s]) continue;
    std::array<Part, 4> of_slice = parts(pool_, form_, *record, *slot.current, s);
    for (size_t i = 0; i < 4; ++i) {
      const Part &part = of_slice[i];
      const le_array *array = &given[i][s];
      if (!present(array)) continue;
      Rows to = matrix(op, part.name, array, part.rows.n, part.rows.width, part.symbols);
      check_dtype(op, part.name, to.dtype, LE_FLOAT32, "");
      check_output(op, part.name, array, to);
      for (const auto &[other, rows] : copies) check_overlap(op, part.name, to, other.name, rows);
      copies.emplace_back(part, to);
    }
  }
  for (const auto &[part, to] : copies) write_part(kernels(), part, to);
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
    std::shared_lock<SlotLock> held(slot.lock);
    const EwcRecord *record = slot.live.load() ? find(id, slot) : nullptr;
    if (!record) continue;
    theta.resize(record->anchor.size());
    read_weights(k, pool_, *slot.current, theta.data());
    total += form_ == LE_EWC_DELTA ? delta_penalty(k, pool_, *slot.current, *record, theta.data())
                                   : factor_penalty(*record, theta);
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
  LE_PER_THREAD(Scratch<float>, grad_copy);
  LE_PER_THREAD(Scratch<float>, fisher_copy);
  LE_PER_THREAD(Scratch<float>, anchor_copy);
  LE_PER_THREAD(Scratch<char>, theta_copy);
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
