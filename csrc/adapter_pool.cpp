#include "adapter_pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "dispatch.h"

namespace le {
namespace {

std::vector<int64_t> checked_outs(const le_pool_options &o) {
  if (o.num_slices < 1 || !o.out_features)
    fail(LE_ERROR_VALUE, "AdapterPool: out_features: expected at least one slice, got %d",
         o.num_slices);
  std::vector<int64_t> outs(o.out_features, o.out_features + o.num_slices);
  for (int64_t out : outs)
    if (out < 1 || out > INT32_MAX)
      fail(LE_ERROR_VALUE, "AdapterPool: out_features: expected 1 to 2^31 - 1, got %lld",
           static_cast<long long>(out));
  return outs;
}

}  // namespace

AdapterPool::AdapterPool(Context &context, const le_pool_options &o)
    : context_(context),
      in_(o.in_features),
      outs_(checked_outs(o)),
      dtype_(o.dtype),
      capacity_(o.capacity),
      max_rank_(o.max_rank > 0 ? o.max_rank : LE_MAX_RANK),
      history_(o.history != 0),
      seed_(o.seed),
      slots_(context.memory) {
  if (in_ < 1 || in_ > INT32_MAX)
    fail(LE_ERROR_VALUE, "AdapterPool: in_features: expected 1 to 2^31 - 1, got %lld",
         static_cast<long long>(in_));
  if (!is_float(dtype_))
    fail(LE_ERROR_TYPE, "AdapterPool: dtype: expected float32, bfloat16 or float16, got %s",
         dtype_name(dtype_));
  if (o.capacity < 0 || o.max_rank < 0 || o.max_rank > LE_MAX_RANK)
    fail(LE_ERROR_VALUE,
         "AdapterPool: capacity, max_rank: expected 0 (no limit) or more, rank at "
         "most %d, got %lld and %d",
         LE_MAX_RANK, static_cast<long long>(o.capacity), o.max_rank);
  for (int64_t out : outs_) out_total_ += out;
  context_.add_pool(this);
}

AdapterPool::~AdapterPool() {
  context_.remove_pool(this);
  for (int32_t id = 0; id < issued(); ++id) {
    release(slot(id).current);
    release(slot(id).previous);
  }
}

// ---- blocks -------------------------------------------------------------------

// malloc with room to align costs 64 bytes an adapter; aligned_alloc costs 192.
namespace {
constexpr uintptr_t kAlign = 64, kMallocAlign = 16;
}  // namespace

char *AdapterPool::weights(const Block &block) const {
  uintptr_t end = reinterpret_cast<uintptr_t>(block.ranks + num_slices());
  return reinterpret_cast<char *>((end + kAlign - 1) / kAlign * kAlign);
}

int64_t AdapterPool::block_bytes(const int32_t *ranks) const {
  int64_t count = 0;
  for (int s = 0; s < num_slices(); ++s) {
    count += ranks[s] * (in_ + slice_out(s));
    // Elements are numbered in 32 bits by the stochastic rounding.
    if (count > int64_t(UINT32_MAX))
      fail(LE_ERROR_VALUE, "AdapterPool: A, B: expected at most 2^32 - 1 weights, got more");
  }
  int64_t header = 8 + 4 * num_slices();
  header = (header + 7) / 8 * 8 + static_cast<int64_t>(kAlign - kMallocAlign / 2);
  return header + count * dtype_size(dtype_);
}

Block *AdapterPool::allocate(const int32_t *ranks) {
  int64_t bytes = block_bytes(ranks);
  Block *block = static_cast<Block *>(context_.memory.allocate(static_cast<size_t>(bytes)));
  std::memcpy(block->ranks, ranks, sizeof(int32_t) * static_cast<size_t>(num_slices()));
  bytes_.fetch_add(bytes, std::memory_order_relaxed);
  return block;
}

Block *AdapterPool::clone_shape(const Block &like) {
  Block *block = allocate(like.ranks);
  block->scaling = like.scaling;
  block->epoch = like.epoch;
  return block;
}

void AdapterPool::release(Block *block) {
  if (!block) return;
  int64_t bytes = block_bytes(block->ranks);
  // One user's weights must not be readable in another's; a plain memset before
  // free may be dropped by the compiler.
  {
    std::lock_guard<std::mutex> guard(views_mutex_);
    auto viewed = views_.find(block);
    if (viewed != views_.end()) {
      std::memset(weights(*block), 0, static_cast<size_t>(elements(*block) * dtype_size(dtype_)));
      viewed->second.released = true;
      return;
    }
  }
  std::memset(block, 0, static_cast<size_t>(bytes));
  asm volatile("" : : "r"(block) : "memory");
  context_.memory.release(block, static_cast<size_t>(bytes));
  bytes_.fetch_sub(bytes, std::memory_order_relaxed);
}

Block *AdapterPool::view(int32_t id, le_array *A, le_array *bt) {
  SharedSlots held("AdapterPool.view", *this, &id, 1);
  Block *block = slot(id).current;
  {
    std::lock_guard<std::mutex> guard(views_mutex_);
    ++views_[block].count;
  }
  for (int s = 0; s < num_slices(); ++s) {
    SliceView found = slice(*block, s);
    A[s] = bt[s] = le_array{};
    if (found.rank == 0) continue;
    A[s] = {found.a, {found.rank, in_}, {in_, 1}, 2, dtype_, 0};
    bt[s] = {found.bt, {found.rank, slice_out(s)}, {slice_out(s), 1}, 2, dtype_, 0};
  }
  return block;
}

void AdapterPool::unview(Block *block) {
  {
    std::lock_guard<std::mutex> guard(views_mutex_);
    auto viewed = views_.find(block);
    if (--viewed->second.count > 0) return;
    bool released = viewed->second.released;
    views_.erase(viewed);
    if (!released) return;
  }
  release(block);
}

SliceView AdapterPool::slice(const Block &block, int s) const {
  int64_t element = 0;
  for (int i = 0; i < s; ++i) element += block.ranks[i] * (in_ + slice_out(i));
  char *a = weights(block) + element * dtype_size(dtype_);
  return {a, a + block.ranks[s] * in_ * dtype_size(dtype_), block.ranks[s], element};
}

int64_t AdapterPool::elements(const Block &block) const {
  int64_t count = 0;
  for (int s = 0; s < num_slices(); ++s) count += block.ranks[s] * (in_ + slice_out(s));
  return count;
}

// ---- adding and reading ---------------------------------------------------------

void AdapterPool::check_adapter(const char *op, const le_array *A, const le_array *B, float scaling,
                                std::vector<Rows> *a, std::vector<Rows> *b) const {
  check_finite(op, "scaling", scaling);
  bool any = false;
  for (int s = 0; s < num_slices(); ++s) {
    a->emplace_back();
    b->emplace_back();
    if (present(&A[s]) != present(&B[s]))
      fail(LE_ERROR_VALUE, "%s: A, B: expected both or neither of slice %d, got one", op, s);
    if (!present(&A[s])) continue;
    any = true;
    a->back() = float_matrix(op, "A", &A[s], -1, in_, "[r, in]");
    check_rank(op, a->back().n, max_rank_);
    b->back() = float_matrix(op, "B", &B[s], slice_out(s), a->back().n, "[out, r]");
  }
  if (!any) fail(LE_ERROR_VALUE, "%s: A, B: expected at least one slice, got none", op);
}

Block *AdapterPool::make_block(const std::vector<Rows> &a, const std::vector<Rows> &b,
                               float scaling) {
  std::vector<int32_t> ranks;
  for (const Rows &rows : a) ranks.push_back(static_cast<int32_t>(rows.n));
  int64_t longest = in_;
  for (int64_t out : outs_) longest = std::max(longest, out);
  std::vector<float> row(static_cast<size_t>(longest));
  Block *block = allocate(ranks.data());
  block->scaling = scaling;
  const Kernels &k = kernels();
  for (int s = 0; s < num_slices(); ++s) {
    SliceView view = slice(*block, s);
    Rows to_a{view.a, view.rank, in_, in_, 1, dtype_};
    Rows to_bt{view.bt, view.rank, slice_out(s), slice_out(s), 1, dtype_};
    Rows from_bt = transposed(b[static_cast<size_t>(s)]);
    for (int32_t j = 0; j < view.rank; ++j) {
      load_row(k, a[static_cast<size_t>(s)], j, 0, in_, row.data());
      store_row(k, to_a, j, 0, in_, row.data(), false);
      load_row(k, from_bt, j, 0, slice_out(s), row.data());
      store_row(k, to_bt, j, 0, slice_out(s), row.data(), false);
    }
  }
  return block;
}

int32_t AdapterPool::next_slot() {
  if (!freed_.empty()) {
    int32_t id = freed_.front();
    freed_.pop_front();
    return id;
  }
  int32_t id = issued();
  if (id >= Segmented<Slot>::max_entries()) throw std::bad_alloc();
  bytes_.fetch_add(slots_.grow_to(id + 1), std::memory_order_relaxed);
  return id;
}

int32_t AdapterPool::add(const le_array *A, const le_array *B, float scaling) {
  const char *op = "AdapterPool.add";
  std::vector<Rows> a, b;
  check_adapter(op, A, B, scaling, &a, &b);
  Block *block = make_block(a, b, scaling);
  std::lock_guard<std::mutex> guard(mutex_);
  if (capacity_ > 0 && live_.load() >= capacity_) {
    release(block);
    fail(LE_ERROR_VALUE,
         "%s: pool: expected room for an adapter, got a pool at its capacity of %lld", op,
         static_cast<long long>(capacity_));
  }
  int32_t id;
  try {
    id = next_slot();
  } catch (...) {
    release(block);
    throw;
  }
  Slot &to = slot(id);
  to.lock.lock();
  to.current = block;
  block->epoch = ++to.epochs;
  ++to.version;
  ++to.owner;
  to.live.store(1, std::memory_order_release);
  to.lock.unlock();
  if (id == issued()) issued_.store(id + 1, std::memory_order_release);
  live_.fetch_add(1);
  return id;
}

void AdapterPool::set(int32_t id, const le_array *A, const le_array *B, float scaling) {
  const char *op = "AdapterPool.set";
  std::vector<Rows> a, b;
  check_adapter(op, A, B, scaling, &a, &b);
  check_issued(op, id);
  Block *block = make_block(a, b, scaling);
  Block *old = block;
  try {
    ExclusiveSlot held(op, *this, id);
    old = history_ ? held.slot.previous : held.slot.current;
    if (history_) held.slot.previous = held.slot.current;
    held.slot.current = block;
    block->epoch = ++held.slot.epochs;
    ++held.slot.version;
  } catch (...) {
    release(block);
    throw;
  }
  release(old);
}

void AdapterPool::get(int32_t id, const le_array *A, const le_array *B, float *scaling) {
  const char *op = "AdapterPool.get";
  SharedSlots held(op, *this, &id, 1);
  const Block &block = *slot(id).current;
  const Kernels &k = kernels();
  struct Copy {
    const char *name;
    Rows from, to;
    bool across;  // from lies transposed
  };
  std::vector<Copy> copies;  // all checked before any is made
  int64_t longest = 0;
  auto note = [&](const le_array &array, const Copy &copy) {
    check_output(op, copy.name, &array, copy.to);
    for (const Copy &other : copies) check_overlap(op, copy.name, copy.to, other.name, other.to);
    copies.push_back(copy);
    longest = std::max(longest, copy.from.width);
  };
  for (int s = 0; s < num_slices(); ++s) {
    SliceView view = slice(block, s);
    int64_t out = slice_out(s);
    if (present(&A[s]))
      note(A[s], {"A",
                  {view.a, view.rank, in_, in_, 1, dtype_},
                  float_matrix(op, "A", &A[s], view.rank, in_, "[r, in]"),
                  false});
    if (present(&B[s]))
      note(B[s], {"B",
                  {view.bt, view.rank, out, out, 1, dtype_},
                  float_matrix(op, "B", &B[s], out, view.rank, "[out, r]"),
                  true});
  }
  std::vector<float> row(static_cast<size_t>(longest));
  for (const Copy &copy : copies) {
    Rows to = copy.across ? transposed(copy.to) : copy.to;
    for (int64_t j = 0; j < to.n; ++j)
      store_row(k, to, j, 0, to.width, float_row(k, copy.from, j, row.data()), false);
  }
  *scaling = block.scaling;
}

void AdapterPool::remove(int32_t id) {
  std::lock_guard<std::mutex> guard(mutex_);
  remove_held("AdapterPool.remove", id);
}

void AdapterPool::remove_all(const le_array *slots) {
  const char *op = "AdapterPool.remove";
  Rows rows = matrix(op, "slots", slots, 1, -1, "[K]");
  check_dtype(op, "slots", rows.dtype, LE_INT32, "");
  std::vector<int32_t> ids(static_cast<size_t>(rows.width));
  for (int64_t i = 0; i < rows.width; ++i) std::memcpy(&ids[i], rows.at(0, i), sizeof(int32_t));
  std::sort(ids.begin(), ids.end());
  auto twice = std::adjacent_find(ids.begin(), ids.end());
  if (twice != ids.end())
    fail(LE_ERROR_VALUE, "%s: slots: expected each slot once, got %d again", op, *twice);
  std::lock_guard<std::mutex> guard(mutex_);  // none is removed by others between check and end
  {
    SharedSlots live(op, *this, ids.data(), rows.width);
  }
  for (int32_t id : ids) remove_held(op, id);
}

void AdapterPool::remove_held(const char *op, int32_t id) {
  Block *current, *previous;
  freed_.push_back(id);  // may throw; before anything changes
  try {
    ExclusiveSlot held(op, *this, id);
    current = held.slot.current;
    previous = held.slot.previous;
    held.slot.current = held.slot.previous = nullptr;
    held.slot.live.store(0, std::memory_order_release);
  } catch (...) {
    freed_.pop_back();
    throw;
  }
  live_.fetch_sub(1);
  release(current);
  release(previous);
}

void AdapterPool::ranks(int32_t id, int32_t *out) {
  SharedSlots held("AdapterPool.rank", *this, &id, 1);
  for (int s = 0; s < num_slices(); ++s) out[s] = slot(id).current->ranks[s];
}

uint64_t AdapterPool::version(int32_t id) {
  SharedSlots held("AdapterPool.version", *this, &id, 1);
  return slot(id).version;
}

void AdapterPool::rollback(int32_t id) {
  const char *op = "AdapterPool.rollback";
  ExclusiveSlot held(op, *this, id);
  if (!history_)
    fail(LE_ERROR_VALUE, "%s: pool: expected history=1, got a pool made with history=0", op);
  if (!held.slot.previous)
    fail(LE_ERROR_VALUE,
         "%s: slot: expected weights before the last change, got none kept for slot %d", op, id);
  release(held.slot.current);
  held.slot.current = held.slot.previous;
  held.slot.previous = nullptr;
  ++held.slot.version;
}

le_pool_info AdapterPool::info() { return {live_.load(), issued(), bytes_.load()}; }

// ---- slots ------------------------------------------------------------------------

void AdapterPool::check_issued(const char *op, int64_t id) const {
  if (id < 0 || id >= issued())
    fail(LE_ERROR_INDEX, "%s: slot: expected one of the pool's %d slots, got %lld", op, issued(),
         static_cast<long long>(id));
}

namespace {
[[noreturn]] void fail_removed(const char *op, int32_t id) {
  fail(LE_ERROR_INDEX, "%s: slot: expected a slot in use, got %d, which was removed", op, id);
}
}  // namespace

SharedSlots::SharedSlots(const char *op, AdapterPool &pool, const int32_t *ascending, int64_t count)
    : pool_(pool), slots_(ascending) {
  for (int64_t i = 0; i < count; ++i) pool.check_issued(op, ascending[i]);
  for (; held_ < count; ++held_) {
    Slot &slot = pool.slot(ascending[held_]);
    slot.lock.lock_shared();
    if (!slot.live.load(std::memory_order_acquire)) {
      ++held_;
      unlock();
      fail_removed(op, ascending[held_ - 1]);
    }
  }
}

void SharedSlots::unlock() {
  for (int64_t i = 0; i < held_; ++i) pool_.slot(slots_[i]).lock.unlock_shared();
}

namespace {
Slot &issued_slot(const char *op, AdapterPool &pool, int32_t id) {
  pool.check_issued(op, id);
  return pool.slot(id);
}
}  // namespace

ExclusiveSlot::ExclusiveSlot(const char *op, AdapterPool &pool, int32_t id)
    : slot(issued_slot(op, pool, id)) {
  slot.lock.lock();
  if (!slot.live.load(std::memory_order_acquire)) {
    slot.lock.unlock();
    fail_removed(op, id);
  }
}

void AdapterPool::hold_all() {
  mutex_.lock();
  for (int32_t id = 0; id < issued(); ++id) slot(id).lock.lock();
  views_mutex_.lock();  // last: a block is released while its slot is held
}

void AdapterPool::release_all(bool in_child) {
  views_mutex_.unlock();
  for (int32_t id = 0; id < issued(); ++id) {
    if (in_child)
      slot(id).lock.reset();
    else
      slot(id).lock.unlock();
  }
  mutex_.unlock();
}

}  // namespace le
