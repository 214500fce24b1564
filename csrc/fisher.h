// Fisher information: sums of squared gradients.
#pragma once

#include "arrays.h"
#include "context.h"

namespace le {

void fisher_accumulate(Context &context, const le_array *F, const le_array *g, float gamma,
                       float scale);

void lora_fisher(Context &context, const le_array *x, const le_array *grad, const le_array *A,
                 const le_array *B, float scaling, const le_array *segments, bool accumulate,
                 const le_array *F_A, const le_array *F_B);

void lora_fisher_factors(Context &context, const le_array *x, const le_array *grad, bool accumulate,
                         const le_array *u, const le_array *v);

}  // namespace le
