// Learning: one gradient step for the adapters that a batch names.
#pragma once

#include "ewc.h"
#include "forward.h"

namespace le {

void pool_adapt(AdapterPool &pool, const le_array *x, const le_array *grad, const le_array *ids,
                const le_array *weights, const le_step &step, Ewc *ewc, uint8_t *outcomes);

// Sums of Fisher factors, a row a slot, that a step's samples are added to; null: none.
struct FactorSums {
  const le_array *u, *v;
};

void pool_adapt_slot(AdapterPool &pool, int32_t slot, const le_array *x, const le_array *grad,
                     const le_step &step, Ewc *ewc, FactorSums sums, uint8_t *outcome,
                     double *grad_norm);

int64_t pool_gradient_size(AdapterPool &pool, int32_t slot);

void pool_gradient(AdapterPool &pool, int32_t slot, const le_array *x, const le_array *grad,
                   const le_array *h, const le_array *gradient, uint8_t *outcome,
                   double *grad_norm);

void pool_apply(AdapterPool &pool, int32_t slot, const le_array *gradient, float scale,
                const le_step &step, Ewc *ewc, uint8_t *outcome, double *grad_norm);

}  // namespace le
