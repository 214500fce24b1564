/* A pool with two adapters, an le_ewc of it and an argument of each kind, for tests of calls one by
 * one. */
#ifndef FIXTURE_H
#define FIXTURE_H

#include "check.h"

enum { in = 8, out = 4, rank = 2, n = 3 };

typedef struct Fixture {
  le_context *ctx;
  le_pool *pool;
  le_ewc *ewc;
  Array A, B, x, y, grad, ids, F, h, gradient, segments, u, v, F_A, F_B, star_A, star_B, W;
  le_nf4 w;
  uint8_t packed[in * out / 2], outcomes[n], outcome;
  float absmax[1], scaling;
  le_step step;
  le_merge merge;
  le_merge_info info;
  le_pool_info of_pool;
  Array slots, weights, to_A, to_B;
  uint64_t versions[2], version;
  int64_t size, outs[1];
  size_t bytes;
  char buffer[1024];
  const char *modules[1];
  le_pool_options options;
  int32_t slot, ranks;
  double number;
} Fixture;

void fixture(Fixture *f);
/* A digest of the adapters and of all that a call may write. */
uint64_t fixture_state(Fixture *f);
void fixture_done(Fixture *f);

#endif
