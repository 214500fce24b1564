/* What the C tests share: a count of what failed, arrays in poisoned memory, drawn numbers. */
#ifndef CHECK_H
#define CHECK_H

#include <lora_engine.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern long checks, failures;
void check_failed(const char *file, int line, const char *what);

#define CHECK(holds)                                        \
  do {                                                      \
    ++checks;                                               \
    if (!(holds)) check_failed(__FILE__, __LINE__, #holds); \
  } while (0)

/* That a call failed so, and what it said of its arguments. */
#define REFUSED(ctx, status, words, call)                                                \
  do {                                                                                   \
    CHECK((call) == (status));                                                           \
    CHECK(strstr(le_last_error(ctx), (words)));                                          \
    if (!strstr(le_last_error(ctx), (words))) printf("  got: %s\n", le_last_error(ctx)); \
  } while (0)

typedef struct Array {
  le_array c; /* what the engine is given */
  int64_t rows, cols;
  unsigned char *bytes;
  size_t size;
} Array;

/* A matrix whose rows are `gap` elements further apart than they are long, in memory whose bits
 * are all ones: a NaN. rows 0: a vector of cols elements. */
Array array_with_gap(int32_t dtype, int64_t rows, int64_t cols, int64_t gap);
Array array(int32_t dtype, int64_t rows, int64_t cols);
/* Multiples of 1/16 from low to high: every dtype holds them, and sums of many are exact. */
Array drawn(int32_t dtype, int64_t rows, int64_t cols, double low, double high);
void array_free(Array *a);
double at(const Array *a, int64_t i, int64_t j);
void set(Array *a, int64_t i, int64_t j, double v);
/* A copy of all its memory, to compare with later. */
Array copy_of(const Array *a);
int same(const Array *a, const Array *b);

int64_t draw(int64_t low, int64_t high);
uint64_t digest(uint64_t seed, const void *bytes, size_t size);

/* |got - want| within the engine's promise for an output of that dtype, of the magnitude of what
 * was summed. */
int near(int32_t dtype, double got, double want, double size);

/* y += weight scaling B (A x) for a row x [in], y and its magnitudes [out]. */
void add_delta(const Array *A, const Array *B, double factor, const double *x, double *y,
               double *size);
/* gA [r, in] and gB [out, r] += factor times the gradients of one row. */
void add_gradients(const Array *A, const Array *B, double factor, const double *x,
                   const double *grad, double *gA, double *gB);
void row_of(const Array *a, int64_t i, double *to);

le_context *new_context(int32_t threads);
/* A pool of slices of out_features out[0..slices). */
le_pool *new_pool(le_context *ctx, int64_t in, int32_t slices, const int64_t *out, int32_t dtype,
                  int32_t history);
/* Adds A [r, in] and B [out, r], drawn; *A and *B are the caller's. */
int32_t add_drawn(le_pool *pool, int64_t in, int64_t out, int64_t rank, float scaling, Array *A,
                  Array *B);

/* The groups of tests, a file each. */
void test_context(void);
void test_ops(void);
void test_pool(void);
void test_learning(void);
void test_ewc(void);
void test_nf4(void);
void test_exchange(void);
void test_refusals(void);

#endif
