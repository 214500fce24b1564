/* What the counters cost a call: forward and adapt of one row at 4096, r = 2, float32, of two
 * builds of the library, one with -DLORA_ENGINE_COUNTERS=OFF, in turns in one process.
 *
 *   for c in ON OFF; do
 *     cmake -S . -B build/counters-$c -DCMAKE_BUILD_TYPE=Release -DLORA_ENGINE_PYTHON=OFF \
 *       -DLORA_ENGINE_COUNTERS=$c && cmake --build build/counters-$c; done
 *   cc -O2 -Icsrc/include bench/counters.c -ldl -o build/counters
 *   build/counters build/counters-ON/liblora_engine.so build/counters-OFF/liblora_engine.so
 *
 * A ratio is the median over pairs of blocks of 200 calls, every other pair the other way round. */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "lora_engine.h"

enum { FEATURES = 4096, RANK = 2, BLOCK = 200, PAIRS = 2001 };

static float x[FEATURES], y[FEATURES], grad[FEATURES], A[RANK * FEATURES], B[FEATURES * RANK];

static void check(int fine, const char *what) {
  if (fine) return;
  fprintf(stderr, "%s\n", what);
  exit(1);
}

static le_array row(float *data) {
  le_array a = {data, {FEATURES}, {1}, 1, LE_FLOAT32, 0};
  return a;
}

typedef struct {
  le_pool *pool;
  int32_t slot;
  __typeof__(&le_pool_forward_slot) forward;
  __typeof__(&le_pool_adapt_slot) adapt;
} library;

static void *symbol(void *handle, const char *name) {
  void *found = dlsym(handle, name);
  check(found != NULL, name);
  return found;
}

static library load(const char *path) {
  library l;
  void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  check(handle != NULL, path);
  l.forward = symbol(handle, "le_pool_forward_slot");
  l.adapt = symbol(handle, "le_pool_adapt_slot");
  __typeof__(&le_context_create) context_create = symbol(handle, "le_context_create");
  __typeof__(&le_pool_create) pool_create = symbol(handle, "le_pool_create");
  __typeof__(&le_pool_add) add = symbol(handle, "le_pool_add");
  le_context *context;
  int64_t outs[] = {FEATURES};
  le_pool_options options = {0};
  options.in_features = FEATURES;
  options.out_features = outs;
  options.num_slices = 1;
  le_array a = {A, {RANK, FEATURES}, {FEATURES, 1}, 2, LE_FLOAT32, 0};
  le_array b = {B, {FEATURES, RANK}, {RANK, 1}, 2, LE_FLOAT32, 0};
  check(context_create(NULL, &context) == LE_OK, "le_context_create");
  check(pool_create(context, &options, &l.pool) == LE_OK, "le_pool_create");
  check(add(l.pool, &a, &b, 1, &l.slot) == LE_OK, "le_pool_add");
  return l;
}

static double block(const library *l, int adapt) {
  struct timespec from, to;
  le_array of_x = row(x), of_y = row(y), of_grad = row(grad);
  const le_step step = {1e-6f, 1, 0, 0, 1, NULL};
  clock_gettime(CLOCK_MONOTONIC, &from);
  for (int i = 0; i < BLOCK; ++i) {
    uint8_t outcome;
    double norm;
    le_status status = adapt ? l->adapt(l->pool, l->slot, &of_x, &of_grad, &step, &outcome, &norm)
                             : l->forward(l->pool, l->slot, &of_x, 0, 0, &of_y);
    check(status == LE_OK, adapt ? "le_pool_adapt_slot" : "le_pool_forward_slot");
  }
  clock_gettime(CLOCK_MONOTONIC, &to);
  return 1e6 * (double)(to.tv_sec - from.tv_sec) + 1e-3 * (double)(to.tv_nsec - from.tv_nsec);
}

static int ascending(const void *a, const void *b) {
  double left = *(const double *)a, right = *(const double *)b;
  return (left > right) - (left < right);
}

int main(int argc, char **argv) {
  static double ratios[PAIRS];
  check(argc == 3, "usage: counters WITH.so WITHOUT.so");
  for (int i = 0; i < RANK * FEATURES; ++i) A[i] = B[i] = 0.01f * (float)(i % 7 - 3);
  for (int i = 0; i < FEATURES; ++i) x[i] = (float)(i % 5 - 2), grad[i] = 1e-6f * (float)(i % 3);
  library with = load(argv[1]), without = load(argv[2]);
  for (int adapt = 0; adapt < 2; ++adapt) {
    for (int i = 0; i < PAIRS; ++i) {
      double first = block(i % 2 ? &without : &with, adapt);
      double second = block(i % 2 ? &with : &without, adapt);
      ratios[i] = i % 2 ? second / first : first / second;
    }
    qsort(ratios, PAIRS, sizeof *ratios, ascending);
    printf("%s: with counters over without: %.4f [p10 %.3f, p90 %.3f], %d pairs\n",
           adapt ? "adapt" : "forward", ratios[PAIRS / 2], ratios[PAIRS / 10],
           ratios[9 * PAIRS / 10], PAIRS);
  }
  return 0;
}
