// Consolidation: many adapters of a pool merged into one of a given rank.
#pragma once

#include "adapter_pool.h"

namespace le {

void consolidate(AdapterPool &pool, int32_t base, const le_merge &merge, const le_array *A,
                 const le_array *B, uint64_t *versions, le_merge_info *info);

}  // namespace le
