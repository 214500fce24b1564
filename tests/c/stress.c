/* Threads that forward, adapt, set, add, remove, roll back and export the same slots at once: no
 * read is half written. stress SECONDS
 *
 * An adapter's A and B are a throughout, a power of two, and every step keeps that: for x of
 * ones and grad of g, A' = A - lr (N B g) and B' likewise, which halves or doubles a. A row of x
 * that is one-hot then gives y = a^2 in every column: a row that saw some old weights and some new
 * gives another number, an odd power of two where A is of one step and B of another. */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "check.h"

enum { N = 128, ROWS = 6, SLOTS = 4, THREADS = 8 };

static le_context *ctx;
static le_pool *pools[2]; /* with history, and changed in place */
static atomic_int stop;
static pthread_mutex_t tally = PTHREAD_MUTEX_INITIALIZER;
static long forwards, rows_checked, changes, removals, exports, gone, torn;

typedef struct Local {
  uint32_t random;
  long forwards, rows, changes, removals, exports, gone, torn;
} Local;

static uint32_t next(Local *l) {
  l->random ^= l->random << 13;
  l->random ^= l->random >> 17;
  return l->random ^= l->random << 5;
}
static le_array view(void *data, int64_t rows, int64_t cols) {
  le_array a = {data, {rows, cols}, {cols, 1}, 2, LE_FLOAT32, 0};
  return a;
}
static int even_power(float y) {
  int exponent;
  return frexpf(y, &exponent) == 0.5f && exponent % 2 != 0;
}

static void forward(Local *l, le_pool *pool, int32_t slot) {
  static const int32_t some[] = {0, 1, 2, 3};
  float x[ROWS * N] = {0}, y[ROWS * N];
  int32_t ids[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    x[i * N + next(l) % N] = 1;
    ids[i] = slot;
  }
  if (next(l) % 2) ids[0] = some[next(l) % SLOTS];
  le_array of_x = view(x, ROWS, N), of_y = view(y, ROWS, N);
  le_array of_ids = {ids, {ROWS}, {1}, 1, LE_INT32, 0};
  le_status status = le_pool_forward(pool, &of_x, &of_ids, NULL, 0, 0, &of_y);
  ++l->forwards;
  if (status == LE_ERROR_INDEX) {
    ++l->gone;
    return;
  }
  l->torn += status != LE_OK;
  for (int i = 0; i < ROWS; ++i) {
    const float *row = y + i * N, expected = ids[i] == slot ? y[(ROWS - 1) * N] : row[0];
    int whole = even_power(expected);
    for (int j = 0; j < N; ++j) whole &= row[j] == expected;
    l->torn += !whole;
    ++l->rows;
  }
}

static le_status fill(le_pool *pool, int32_t *slot, float a, int add) {
  float weights[N];
  for (int i = 0; i < N; ++i) weights[i] = a;
  le_array A = view(weights, 1, N), B = view(weights, N, 1);
  return add ? le_pool_add(pool, &A, &B, 1, slot) : le_pool_set(pool, *slot, &A, &B, 1);
}

static void adapt(Local *l, le_pool *pool, int32_t slot) {
  float x[N], grad[N], y[N] = {0}, one_hot[N] = {1};
  le_array of_x = view(x, 1, N), of_grad = view(grad, 1, N), of_y = view(y, 1, N),
           of_one = view(one_hot, 1, N);
  if (le_pool_forward_slot(pool, slot, &of_one, 0, 0, &of_y) != LE_OK) return;
  float g = y[0] > 1 || (y[0] > 1e-3f && next(l) % 2) ? 0.5f : -1; /* halve, double */
  for (int i = 0; i < N; ++i) x[i] = 1, grad[i] = g;
  const le_step step = {1.0f / N, 1, 0, 0, 1, NULL};
  uint8_t outcome;
  le_array of_ids = {&slot, {1}, {1}, 1, LE_INT32, 0};
  le_status status = le_pool_adapt(pool, &of_x, &of_grad, &of_ids, NULL, &step, &outcome);
  l->torn += status != LE_OK && status != LE_ERROR_INDEX;
  ++l->changes;
}

static void export(Local *l, le_pool *pool, int32_t slot) {
  const char *modules[] = {"m"};
  char bytes[4096];
  size_t size;
  if (le_pool_export(pool, slot, modules, bytes, sizeof bytes, &size) != LE_OK) return;
  size_t element = pool == pools[0] ? 4 : 2, all = 2 * N * element;
  for (size_t i = 0; i < all; ++i)
    l->torn += bytes[size - all + i] != bytes[size - all + i % element];
  ++l->exports;
}

static void *work(void *arg) {
  Local l = {0};
  l.random = 7u + 1000003u * (uint32_t)(size_t)arg;
  while (!stop) {
    le_pool *pool = pools[next(&l) % 2];
    int32_t slot = (int32_t)(next(&l) % SLOTS);
    uint32_t what = next(&l) % 16;
    if (what < 8) {
      forward(&l, pool, slot);
    } else if (what < 12) {
      adapt(&l, pool, slot);
    } else if (what == 12) {
      l.torn += fill(pool, &slot, next(&l) % 2 ? 1 : 0.25f, 0) > LE_ERROR_INDEX;
      ++l.changes;
    } else if (what == 13) {
      le_pool_rollback(pool, slot);
      ++l.changes;
    } else if (what == 14) {
      export(&l, pool, slot);
    } else if (le_pool_remove(pool, slot) == LE_OK) {
      l.torn += fill(pool, &slot, 1, 1) != LE_OK; /* the oldest freed: one of these */
      ++l.removals;
    }
  }
  pthread_mutex_lock(&tally);
  forwards += l.forwards, rows_checked += l.rows, changes += l.changes, removals += l.removals;
  exports += l.exports, gone += l.gone, torn += l.torn;
  pthread_mutex_unlock(&tally);
  return NULL;
}

int main(int argc, char **argv) {
  const struct timespec some = {argc > 1 ? atoi(argv[1]) : 2, 0};
  const int64_t outs[] = {N};
  pthread_t threads[THREADS];
  ctx = new_context(2);
  le_set_tuning(ctx, 1024, 2); /* the engine's own workers take part */
  for (int p = 0; p < 2; ++p) {
    pools[p] = new_pool(ctx, N, 1, outs, p ? LE_BFLOAT16 : LE_FLOAT32, p == 0);
    for (int32_t s = 0, slot; s < SLOTS; ++s)
      CHECK(fill(pools[p], &slot, 1, 1) == LE_OK && slot == s);
  }
  for (size_t t = 0; t < THREADS; ++t) pthread_create(&threads[t], NULL, work, (void *)(t + 1));
  nanosleep(&some, NULL);
  stop = 1;
  for (int t = 0; t < THREADS; ++t) pthread_join(threads[t], NULL);
  for (int p = 0; p < 2; ++p) {
    le_pool_info info;
    CHECK(le_pool_get_info(pools[p], &info) == LE_OK && info.live == SLOTS && info.issued == SLOTS);
    le_pool_destroy(pools[p]);
  }
  le_context_destroy(ctx);
  printf(
      "%d threads: %ld forwards, %ld rows, %ld of removed slots; %ld changes, %ld removals, %ld "
      "exports\n",
      THREADS, forwards, rows_checked, gone, changes, removals, exports);
  printf("%ld torn\n", torn);
  return torn || failures || !rows_checked || !changes || !removals || !exports;
}
