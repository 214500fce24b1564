// Elastic weight consolidation: Fisher information and anchors, one record a
// slot, laid out like the slot's weights. A record is read and written under
// its slot's lock.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "adapter_pool.h"

namespace le {

struct EwcRecord {
  uint32_t epoch;  // of the adapter it was made for; for another it does not count
  std::vector<float> fisher, anchor;
};

class Ewc {
 public:
  Ewc(AdapterPool &pool, int32_t form, float lambda);

  AdapterPool &pool() const { return pool_; }
  float lambda() const { return lambda_; }

  void set(int32_t slot, const le_array *fisher_A, const le_array *fisher_B);
  void remove(int32_t slot);
  double penalty();

  // The record of the adapter that is in the slot now, or null.
  const EwcRecord *find(int32_t id, const Slot &slot) const;

 private:
  std::unique_ptr<EwcRecord> &entry(int32_t id);

  AdapterPool &pool_;
  const float lambda_;
  std::mutex mutex_;  // of growing the table
  std::atomic<int64_t> entries_{0};
  Segmented<std::unique_ptr<EwcRecord>> records_;
};

void ewc_step(const le_array *theta, const le_array *grad, const le_array *fisher,
              const le_array *anchor, float lr, float lambda, uint64_t seed, uint64_t version);

}  // namespace le
