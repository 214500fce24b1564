// Elastic weight consolidation: Fisher information and anchors, one record a
// slot. A record is read and written under its slot's lock.
#pragma once

#include <initializer_list>
#include <memory>
#include <vector>

#include "adapter_pool.h"

namespace le {

using Floats = std::vector<float, Allocator<float>>;

struct EwcRecord {
  explicit EwcRecord(Memory &memory)
      : fisher(Allocator<float>(memory)), anchor(fisher), largest(fisher) {}
  uint32_t epoch;  // of the adapter it was made for; for another it does not count
  // The anchor is laid out like the slot's weights, and so is fisher in factor form; in delta
  // form it holds u [out] and v [in] of each slice that is there.
  Floats fisher, anchor;
  Floats largest;           // delta form: of u and of v, slice by slice
  std::vector<char> pulls;  // delta form: slice by slice, whether the anchored delta is not 0
};

// In delta form, where u of a slice begins.
int64_t factors_before(const AdapterPool &pool, const Block &block, int s);

class Ewc {
 public:
  Ewc(AdapterPool &pool, int32_t form, float lambda);

  AdapterPool &pool() const { return pool_; }
  float lambda() const { return lambda_; }

  int32_t form() const { return form_; }

  void set(int32_t slot, const le_array *first, const le_array *second);
  void restore(int32_t slot, const le_array *first, const le_array *second,
               const le_array *anchor_A, const le_array *anchor_B);
  void get(int32_t slot, const le_array *first, const le_array *second, const le_array *anchor_A,
           const le_array *anchor_B);
  void remove(int32_t slot);
  double penalty();

  // The record of the adapter that is in the slot now, or null.
  const EwcRecord *find(int32_t id, const Slot &slot) const;

 private:
  std::unique_ptr<EwcRecord> &entry(int32_t id);
  // given: first and second, then both anchors, or none for the weights as they are now.
  void record(const char *op, int32_t id, std::initializer_list<const le_array *> given);
  void note_slices(const Block &block, EwcRecord *record) const;

  AdapterPool &pool_;
  const int32_t form_;
  const float lambda_;
  std::atomic<int64_t> entries_{0};  // grows under pool_.growing()
  Segmented<std::unique_ptr<EwcRecord>> records_;
};

void ewc_step(const le_array *theta, const le_array *grad, const le_array *fisher,
              const le_array *anchor, float lr, float lambda, uint64_t seed, uint64_t version);

}  // namespace le
