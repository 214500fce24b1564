// y = x W^T with W in NF4, the deltas of a batch added in the same pass, and the
// gradient with respect to x.
#pragma once

#include "forward.h"
#include "nf4.h"

namespace le {

struct Nf4Linear {
  const le_array *x;
  const le_nf4 *w;
  const le_array *bias;
  AdapterPool *pool;  // or null
  const le_array *ids, *weights;
  int32_t compute;
  const le_array *y;
};
void nf4_linear(Context &context, const Nf4Linear &call);

void nf4_linear_backward(Context &context, const le_array *grad, const le_nf4 *w,
                         const le_array *dx);

}  // namespace le
