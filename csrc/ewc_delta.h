// EWC in delta form: the Fisher information of Delta W taken as u v^T. Op 7 of the
// design, `delta`; lora_engine/reference_ewc.py holds the same formulas.
#pragma once

#include "ewc.h"
#include "gradient.h"

namespace le {

// What a step does to one factor of a slice (A, or B's transpose) without a penalty.
struct FactorStep {
  const GradientRow *rows;  // [rank]
  int32_t rank;
  int64_t n;        // columns
  int64_t element;  // of the first, in the slot
  const char *src;
  char *dst;
  float lr, clip, decay;

  float coef(int64_t j) const { return lr * (clip * rows[j].coef); }
};

// What a record knows of one factor.
struct DeltaFactor {
  const float *anchor;  // [rank, n]; null in both factors: the anchored delta is 0
  const float *fisher;  // of its columns: v of A, u of B's transpose
  float largest;        // of fisher
  int64_t n;
};

// The proximal step of `own` while the other factor is held, as it is stored: first of B with
// the old A, then of A with the new B. strength: 2 lambda scaling^2. u: the key.
void delta_step(const Kernels &k, int32_t dtype, const FactorStep &step, const DeltaFactor &own,
                const DeltaFactor &other, const char *other_weights, double strength, Update u);

// s^2 sum_ij u_i v_j (B A - B* A*)_ij^2 over the slices of an adapter whose weights are theta.
double delta_penalty(const Kernels &k, const AdapterPool &pool, const Block &block,
                     const EwcRecord &record, const float *theta);

}  // namespace le
