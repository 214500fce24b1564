/* One op of the C ABI, called so many times: what bench/instructions.py counts under callgrind.
 *
 *   instructions OP CALLS      runs it        instructions        lists the ops
 *
 * One thread, sizes and data that never change: the same library gives the same count. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lora_engine.h"

enum { IN = 1024, RANK = 2, WIDE_RANK = 16, USERS = 16, ROWS = 8 };

static void must(le_status status, const le_context *ctx) {
  if (status == LE_OK) return;
  fprintf(stderr, "%s: %s\n", le_status_string(status), le_last_error(ctx));
  exit(1);
}

static float *numbers(size_t n, uint32_t seed) {
  float *values = malloc(n * sizeof *values);
  if (!values) exit(1);
  for (size_t i = 0; i < n; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) * (1.0f / 8388608.0f) - 1.0f;
  }
  return values;
}

static le_array matrix(void *data, int64_t rows, int64_t cols, int32_t dtype) {
  le_array a = {
      .data = data, .shape = {rows, cols}, .strides = {cols, 1}, .ndim = 2, .dtype = dtype};
  return a;
}
static le_array vector(void *data, int64_t n, int32_t dtype) {
  le_array a = {.data = data, .shape = {n}, .strides = {1}, .ndim = 1, .dtype = dtype};
  return a;
}

/* Everything that the ops are given. */
static struct {
  le_context *ctx;
  le_pool *micro, *wide; /* USERS adapters of RANK and of WIDE_RANK */
  le_ewc *factor, *delta;
  le_array x, row, grad, y, y_row, A, B, ids, F, u, v, slots, weights;
  le_nf4 w;
} d;

static le_pool *pool(int32_t rank) {
  int64_t out = IN;
  le_pool_options options = {
      .in_features = IN, .out_features = &out, .num_slices = 1, .dtype = LE_FLOAT32};
  le_pool *made;
  must(le_pool_create(d.ctx, &options, &made), d.ctx);
  for (int i = 0; i < USERS; ++i) {
    le_array A = matrix(numbers((size_t)rank * IN, 10 + i), rank, IN, LE_FLOAT32);
    le_array B = matrix(numbers((size_t)IN * rank, 40 + i), IN, rank, LE_FLOAT32);
    int32_t slot;
    must(le_pool_add(made, &A, &B, 2.0f, &slot), d.ctx);
  }
  return made;
}

static le_ewc *penalty(int32_t form) {
  le_ewc *made;
  must(le_ewc_create(d.micro, form, 1.0f, &made), d.ctx);
  float *values = numbers((size_t)RANK * IN, 5);
  for (int i = 0; i < RANK * IN; ++i) values[i] *= values[i];
  int delta = form == LE_EWC_DELTA;
  le_array first = delta ? vector(values, IN, LE_FLOAT32) : matrix(values, RANK, IN, LE_FLOAT32);
  le_array second = delta ? first : matrix(values, IN, RANK, LE_FLOAT32);
  for (int slot = 0; slot < USERS; ++slot) must(le_ewc_set(made, slot, &first, &second), d.ctx);
  return made;
}

static void prepare(void) {
  le_context_options options = LE_CONTEXT_OPTIONS;
  options.num_threads = 1;
  must(le_context_create(&options, &d.ctx), NULL);
  static int32_t ids[USERS];
  static float ones[USERS + 1];
  for (int i = 0; i < USERS; ++i) ids[i] = i;
  for (int i = 0; i <= USERS; ++i) ones[i] = 1.0f;
  d.x = matrix(numbers((size_t)USERS * IN, 1), USERS, IN, LE_FLOAT32);
  d.grad = matrix(numbers((size_t)USERS * IN, 2), USERS, IN, LE_FLOAT32);
  d.y = matrix(numbers((size_t)USERS * IN, 3), USERS, IN, LE_FLOAT32);
  d.row = matrix(d.x.data, 1, IN, LE_FLOAT32);
  d.y_row = matrix(d.y.data, 1, IN, LE_FLOAT32);
  d.A = matrix(numbers((size_t)RANK * IN, 4), RANK, IN, LE_FLOAT32);
  d.B = matrix(numbers((size_t)IN * RANK, 5), IN, RANK, LE_FLOAT32);
  d.F = vector(numbers((size_t)USERS * IN, 6), USERS * IN, LE_FLOAT32);
  d.u = vector(numbers(IN, 7), IN, LE_FLOAT32);
  d.v = vector(numbers(IN, 8), IN, LE_FLOAT32);
  d.ids = vector(ids, USERS, LE_INT32);
  d.slots = vector(ids + 1, USERS - 1, LE_INT32);
  d.weights = vector(ones, USERS, LE_FLOAT32);
  d.micro = pool(RANK);
  d.wide = pool(WIDE_RANK);
  d.factor = penalty(LE_EWC_FACTOR);
  d.delta = penalty(LE_EWC_DELTA);
  le_array W = matrix(numbers((size_t)IN * IN, 9), IN, IN, LE_FLOAT32);
  uint8_t *packed = malloc((size_t)IN * IN / 2);
  float *absmax = malloc((size_t)IN * IN / 64 * sizeof *absmax);
  must(le_nf4_encode(d.ctx, &W, 64, packed, absmax), d.ctx);
  le_nf4 w = {.packed = packed, .rows = IN, .cols = IN, .blocksize = 64, .absmax = absmax};
  d.w = w;
  free(W.data);
}

static le_status adapt(le_pool *p, le_ewc *ewc) {
  uint8_t outcomes[USERS];
  le_step step = {.lr = 1e-9f, .lr_ratio = 1.0f, .train_A = 1, .ewc = ewc};
  return le_pool_adapt(p, &d.x, &d.grad, &d.ids, NULL, &step, outcomes);
}
static le_status linear(int64_t rows) {
  le_array x = matrix(d.x.data, rows, IN, LE_FLOAT32), y = matrix(d.y.data, rows, IN, LE_FLOAT32);
  return le_nf4_linear(d.ctx, &x, &d.w, NULL, NULL, NULL, NULL, -1, &y);
}

static le_status lora_delta(void) {
  return le_lora_delta(d.ctx, &d.row, &d.A, &d.B, 2.0f, 0, &d.y_row);
}
static le_status forward_slot(void) {
  return le_pool_forward_slot(d.micro, 0, &d.row, 0, 0, &d.y_row);
}
static le_status forward_micro(void) {
  return le_pool_forward(d.micro, &d.x, &d.ids, NULL, 0, 0, &d.y);
}
static le_status forward_wide(void) {
  return le_pool_forward(d.wide, &d.x, &d.ids, NULL, 0, 0, &d.y);
}
static le_status forward_rows(void) { /* all of one adapter */
  return le_pool_forward_slot(d.wide, 0, &d.x, 0, 0, &d.y);
}
static le_status adapt_micro(void) { return adapt(d.micro, NULL); }
static le_status adapt_wide(void) { return adapt(d.wide, NULL); }
static le_status adapt_factor(void) { return adapt(d.micro, d.factor); }
static le_status adapt_delta(void) { return adapt(d.micro, d.delta); }
static le_status linear_1(void) { return linear(1); }
static le_status linear_8(void) { return linear(ROWS); }
static le_status linear_backward(void) {
  return le_nf4_linear_backward(d.ctx, &d.grad, &d.w, &d.y);
}
static le_status fisher_accumulate(void) {
  le_array g = vector(d.x.data, USERS * IN, LE_FLOAT32);
  return le_fisher_accumulate(d.ctx, &d.F, &g, 0.9f, 0.1f);
}
static le_status lora_fisher(void) {
  static float first[RANK * IN], second[RANK * IN];
  le_array F_A = matrix(first, RANK, IN, LE_FLOAT32), F_B = matrix(second, IN, RANK, LE_FLOAT32);
  return le_lora_fisher(d.ctx, &d.x, &d.grad, &d.A, &d.B, 2.0f, NULL, 0, &F_A, &F_B);
}
static le_status fisher_factors(void) {
  return le_lora_fisher_factors(d.ctx, &d.x, &d.grad, 0, &d.u, &d.v);
}
static le_status consolidate(void) {
  static float first[RANK * IN], second[RANK * IN];
  static uint64_t versions[USERS];
  le_array A = matrix(first, RANK, IN, LE_FLOAT32), B = matrix(second, IN, RANK, LE_FLOAT32);
  le_merge merge = {.slots = &d.slots,
                    .weights = &d.weights,
                    .rank = RANK,
                    .scaling = 2.0f,
                    .max_sweeps = 4,
                    .tolerance = 0.0f,
                    .num_threads = 1};
  le_merge_info info;
  return le_consolidate(d.micro, 0, &merge, &A, &B, versions, &info);
}

static const struct {
  const char *name;
  le_status (*call)(void);
} ops[] = {
    {"lora_delta, r=2, 1 row", lora_delta},
    {"pool_forward_slot, r=2, 1 row", forward_slot},
    {"pool_forward, r=2, 16 rows", forward_micro},
    {"pool_forward, r=16, 16 rows", forward_wide},
    {"pool_forward_slot, r=16, 16 rows", forward_rows},
    {"pool_adapt, r=2, 16 rows", adapt_micro},
    {"pool_adapt, r=16, 16 rows", adapt_wide},
    {"pool_adapt with ewc factor, r=2, 16 rows", adapt_factor},
    {"pool_adapt with ewc delta, r=2, 16 rows", adapt_delta},
    {"nf4_linear, 1 row", linear_1},
    {"nf4_linear, 8 rows", linear_8},
    {"nf4_linear_backward, 16 rows", linear_backward},
    {"fisher_accumulate, 16384", fisher_accumulate},
    {"lora_fisher, r=2, 16 samples", lora_fisher},
    {"lora_fisher_factors, 16 samples", fisher_factors},
    {"consolidate, average of 15", consolidate},
};

int main(int argc, char **argv) {
  size_t count = sizeof ops / sizeof *ops;
  if (argc < 3) {
    for (size_t i = 0; i < count; ++i) puts(ops[i].name);
    return 0;
  }
  prepare();
  for (size_t i = 0; i < count; ++i)
    if (!strcmp(argv[1], ops[i].name)) {
      for (int call = atoi(argv[2]); call > 0; --call) must(ops[i].call(), d.ctx);
      return 0;
    }
  fprintf(stderr, "no op %s\n", argv[1]);
  return 2;
}
