// AdapterPool: owns the weights of many adapters, in slots.
#pragma once

#include <atomic>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "arrays.h"
#include "context.h"
#include "segmented.h"
#include "slot_lock.h"

namespace le {

// One adapter's weights, in one allocation: this header, the ranks, then from the
// next address that 64 divides, for each slice A [r, in] and the transpose of B [r, out], rows
// contiguous. Both are then read along their rows by forward, its transpose and the update.
struct Block {
  float scaling;
  uint32_t epoch;    // of the adapter this is a state of: see Ewc
  int32_t ranks[1];  // one per slice
};

// A and the transpose of B of one slice of one adapter.
struct SliceView {
  char *a, *bt;
  int32_t rank;
  int64_t element;  // index of a's first element in the slot; bt's follows a's last
};

struct Slot {
  SlotLock lock;
  std::atomic<uint32_t> live{0};
  uint32_t owner = 0;   // grows with add: whose slot it is
  uint32_t epochs = 0;  // adapters that were added or set here so far
  uint64_t version = 0;
  Block *current = nullptr;
  Block *previous = nullptr;  // history: the weights before the last change
};

class AdapterPool {
 public:
  AdapterPool(Context &context, const le_pool_options &options);
  ~AdapterPool();
  AdapterPool(const AdapterPool &) = delete;
  AdapterPool &operator=(const AdapterPool &) = delete;

  Context &context() const { return context_; }
  int64_t in_features() const { return in_; }
  int64_t out_features() const { return out_total_; }
  int num_slices() const { return static_cast<int>(outs_.size()); }
  int64_t slice_out(int s) const { return outs_[static_cast<size_t>(s)]; }
  int32_t dtype() const { return dtype_; }
  uint64_t seed() const { return seed_; }
  bool history() const { return history_; }

  int32_t add(const le_array *A, const le_array *B, float scaling);
  void set(int32_t slot, const le_array *A, const le_array *B, float scaling);
  void get(int32_t slot, const le_array *A, const le_array *B, float *scaling);
  void remove(int32_t slot);
  void remove_all(const le_array *slots);
  void ranks(int32_t slot, int32_t *ranks);
  uint64_t version(int32_t slot);
  void rollback(int32_t slot);
  le_pool_info info();

  // A slot's weights as arrays of every slice, and the block that is kept for them until unview.
  Block *view(int32_t slot, le_array *A, le_array *bt);
  void unview(Block *block);

  // Slots are found without a lock; they never move.
  int32_t issued() const { return issued_.load(std::memory_order_acquire); }
  Slot &slot(int32_t id) const { return slots_[id]; }
  // Throws LE_ERROR_INDEX unless id was issued. Whether it is live is known
  // only under its lock: see SharedSlots and ExclusiveSlot.
  void check_issued(const char *op, int64_t id) const;

  // Of a block of this pool.
  SliceView slice(const Block &block, int s) const;
  int64_t elements(const Block &block) const;
  // Uninitialised weights with the ranks of `like`.
  Block *clone_shape(const Block &like);
  void release(Block *block);  // zeroes and frees

  // Of tables with an entry a slot: taken before any slot's lock, and held around a fork.
  std::mutex &growing() { return mutex_; }

  // Around a fork: every slot's lock, ascending.
  void hold_all();
  void release_all(bool in_child);

 private:
  int64_t block_bytes(const int32_t *ranks) const;
  char *weights(const Block &block) const;
  Block *allocate(const int32_t *ranks);
  void check_adapter(const char *op, const le_array *A, const le_array *B, float scaling,
                     std::vector<Rows> *a, std::vector<Rows> *b) const;
  Block *make_block(const std::vector<Rows> &a, const std::vector<Rows> &b, float scaling);
  int32_t next_slot();
  void remove_held(const char *op, int32_t slot);  // with the mutex

  Context &context_;
  const int64_t in_;
  const std::vector<int64_t> outs_;
  int64_t out_total_ = 0;
  const int32_t dtype_;
  const int64_t capacity_;
  const int32_t max_rank_;
  const bool history_;
  const uint64_t seed_;

  std::mutex mutex_;           // of add, remove and what follows
  std::deque<int32_t> freed_;  // oldest first
  std::atomic<int64_t> live_{0};
  std::atomic<int64_t> bytes_{0};
  std::atomic<int32_t> issued_{0};
  Segmented<Slot> slots_;

  // Blocks that callers look into, and those of them that no slot has any more.
  struct Views {
    int64_t count = 0;
    bool released = false;
  };
  std::mutex views_mutex_;
  std::unordered_map<Block *, Views> views_;
};

// Holds the readers' locks of a set of slots: taken in ascending order, each
// once, and only if all are live.
class SharedSlots {
 public:
  SharedSlots(const char *op, AdapterPool &pool, const int32_t *ascending, int64_t count);
  ~SharedSlots() { unlock(); }
  SharedSlots(const SharedSlots &) = delete;
  SharedSlots &operator=(const SharedSlots &) = delete;

 private:
  void unlock();
  AdapterPool &pool_;
  const int32_t *slots_;
  int64_t held_ = 0;
};

// Holds the writer's lock of one live slot.
class ExclusiveSlot {
 public:
  ExclusiveSlot(const char *op, AdapterPool &pool, int32_t id);
  ~ExclusiveSlot() { slot.lock.unlock(); }
  ExclusiveSlot(const ExclusiveSlot &) = delete;
  ExclusiveSlot &operator=(const ExclusiveSlot &) = delete;
  Slot &slot;
};

}  // namespace le
