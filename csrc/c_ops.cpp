// The C ABI: the ops on arrays and on NF4 matrices.
#include "c_call.h"
#include "fisher.h"
#include "nf4_linear.h"

using le::core_of;
using le::with;

extern "C" {

le_status le_lora_delta(le_context *ctx, const le_array *x, const le_array *A, const le_array *B,
                        float scaling, int32_t accumulate, const le_array *y) {
  return with("lora_delta", "ctx", ctx,
              [&](le::Context &c) { le::lora_delta(c, x, A, B, scaling, accumulate != 0, y); });
}

le_status le_ewc_step(le_context *ctx, const le_array *theta, const le_array *grad,
                      const le_array *fisher, const le_array *anchor, float lr, float ewc_lambda,
                      uint64_t seed, uint64_t version) {
  return with("ewc_step", "ctx", ctx, [&](le::Context &) {
    le::ewc_step(theta, grad, fisher, anchor, lr, ewc_lambda, seed, version);
  });
}

le_status le_fisher_accumulate(le_context *ctx, const le_array *F, const le_array *g, float gamma,
                               float scale) {
  return with("fisher_accumulate", "ctx", ctx,
              [&](le::Context &c) { le::fisher_accumulate(c, F, g, gamma, scale); });
}

le_status le_lora_fisher(le_context *ctx, const le_array *x, const le_array *grad,
                         const le_array *A, const le_array *B, float scaling,
                         const le_array *segments, int32_t accumulate, const le_array *F_A,
                         const le_array *F_B) {
  return with("lora_fisher", "ctx", ctx, [&](le::Context &c) {
    le::lora_fisher(c, x, grad, A, B, scaling, segments, accumulate != 0, F_A, F_B);
  });
}

le_status le_lora_fisher_factors(le_context *ctx, const le_array *x, const le_array *grad,
                                 int32_t accumulate, const le_array *u, const le_array *v) {
  return with("lora_fisher_factors", "ctx", ctx,
              [&](le::Context &c) { le::lora_fisher_factors(c, x, grad, accumulate != 0, u, v); });
}

le_status le_nf4_encode(le_context *ctx, const le_array *W, int32_t blocksize, uint8_t *packed,
                        float *absmax) {
  return with("nf4_quantize", "ctx", ctx,
              [&](le::Context &c) { le::nf4_encode(c, W, blocksize, packed, absmax); });
}

le_status le_nf4_decode(le_context *ctx, const le_nf4 *w, const le_array *W) {
  return with("nf4_dequantize", "ctx", ctx, [&](le::Context &c) { le::nf4_decode(c, w, W); });
}

le_status le_nf4_linear(le_context *ctx, const le_array *x, const le_nf4 *w, const le_array *bias,
                        le_pool *pool, const le_array *ids, const le_array *weights,
                        int32_t compute, const le_array *y) {
  return with("nf4_linear", "ctx", ctx, [&](le::Context &c) {
    le::nf4_linear(c, {x, w, bias, pool ? &core_of("nf4_linear", "pool", pool) : nullptr, ids,
                       weights, compute, y});
  });
}

le_status le_nf4_linear_backward(le_context *ctx, const le_array *grad, const le_nf4 *w,
                                 const le_array *dx) {
  return with("nf4_linear_backward", "ctx", ctx,
              [&](le::Context &c) { le::nf4_linear_backward(c, grad, w, dx); });
}

}  // extern "C"
