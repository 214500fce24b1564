/* Versions, contexts and what a host lends them: threads, memory, a log. */
#include "check.h"

typedef struct Host {
  long runs, tasks, bytes, live;
  char said[512];
  int32_t level;
} Host;

static void run(void *user, int64_t count, void (*task)(void *arg, int64_t i), void *arg) {
  Host *host = user;
  ++host->runs;
  for (int64_t i = count - 1; i >= 0; --i, ++host->tasks) task(arg, i); /* in turn, backwards */
}
static void *allocate(void *user, size_t bytes) {
  Host *host = user;
  host->bytes += (long)bytes, ++host->live;
  return malloc(bytes);
}
static void release(void *user, void *memory, size_t bytes) {
  Host *host = user;
  host->bytes -= (long)bytes, --host->live;
  free(memory);
}
static void write(void *user, int32_t level, const char *text) {
  Host *host = user;
  host->level = level;
  snprintf(host->said, sizeof host->said, "%s", text);
}

static void versions(void) {
  int32_t supported = -1, i = 0;
  CHECK(le_abi_version() == LE_ABI_VERSION);
  CHECK(le_version() == (LE_VERSION_MAJOR << 16 | LE_VERSION_MINOR << 8 | LE_VERSION_PATCH));
  CHECK(le_isa() != NULL);
  CHECK(strcmp(le_isa_built(0, &supported), "generic") == 0 && supported == 1);
  while (le_isa_built(i, NULL)) ++i;
  CHECK(i >= 1 && le_isa_built(i + 7, &supported) == NULL && le_isa_built(-1, NULL) == NULL);
  for (int s = LE_OK; s <= LE_ERROR_INTERNAL; ++s)
    CHECK(strcmp(le_status_string(s), "unknown status") != 0);
  CHECK(strcmp(le_status_string(77), "unknown status") == 0);
}

static void options(void) {
  le_context *ctx = (le_context *)&ctx;
  le_context_options newer = LE_CONTEXT_OPTIONS;
  newer.abi_version = LE_ABI_VERSION + 1;
  REFUSED(NULL, LE_ERROR_UNSUPPORTED, "expected 1, that of the library, got 2",
          le_context_create(&newer, &ctx));
  newer.abi_version = LE_ABI_VERSION, newer.num_threads = -1;
  REFUSED(NULL, LE_ERROR_VALUE, "num_threads: expected 0 to 4096, got -1",
          le_context_create(&newer, &ctx));
  le_context_options lends = LE_CONTEXT_OPTIONS;
  le_host_threads threads = {NULL, 0, run};
  le_allocator allocator = {NULL, allocate, NULL};
  le_log log = {NULL, NULL};
  lends.threads = &threads;
  REFUSED(NULL, LE_ERROR_VALUE, "num_threads: expected 1 to 4096, got 0",
          le_context_create(&lends, &ctx));
  threads.num_threads = 4, threads.run = NULL;
  REFUSED(NULL, LE_ERROR_VALUE, "threads.run: expected a pointer", le_context_create(&lends, &ctx));
  lends.threads = NULL, lends.allocator = &allocator;
  REFUSED(NULL, LE_ERROR_VALUE, "allocator.release", le_context_create(&lends, &ctx));
  allocator.allocate = NULL, allocator.release = release;
  REFUSED(NULL, LE_ERROR_VALUE, "allocator.allocate", le_context_create(&lends, &ctx));
  lends.allocator = NULL, lends.log = &log;
  REFUSED(NULL, LE_ERROR_VALUE, "log.write", le_context_create(&lends, &ctx));
  CHECK(ctx == (le_context *)&ctx);
  REFUSED(NULL, LE_ERROR_VALUE, "out: expected a pointer, got NULL", le_context_create(NULL, NULL));
  CHECK(le_context_create(NULL, &ctx) == LE_OK && le_get_num_threads(ctx) >= 1);
  CHECK(le_set_num_threads(ctx, 3) == LE_OK && le_get_num_threads(ctx) == 3);
  REFUSED(ctx, LE_ERROR_VALUE, "expected 1 to 4096, got 0", le_set_num_threads(ctx, 0));
  CHECK(le_set_tuning(ctx, 4096, 8) == LE_OK && le_set_tuning(ctx, 0, 0) == LE_OK);
  REFUSED(ctx, LE_ERROR_VALUE, "tile_rows", le_set_tuning(ctx, 0, 5000));
  int32_t before = le_limit_threads(2);
  CHECK(before == 0 && le_limit_threads(before) == 2);
  CHECK(le_get_num_threads(NULL) == 0);
  le_context_destroy(ctx);
  le_context_destroy(NULL);
}

/* The same bits on lent threads; all memory through the allocator, and back. */
static void lent(void) {
  enum { in = 512, out = 300, n = 40 };
  Host host = {0};
  const le_host_threads threads = {&host, 4, run};
  const le_allocator allocator = {&host, allocate, release};
  const le_log log = {&host, write};
  const le_context_options o = {LE_ABI_VERSION, 0, &threads, &allocator, &log};
  const int64_t outs[] = {out};
  le_context *contexts[2] = {NULL, new_context(1)};
  CHECK(le_context_create(&o, &contexts[0]) == LE_OK && le_get_num_threads(contexts[0]) == 4);
  Array x = drawn(LE_FLOAT32, n, in, -1, 1), grad = drawn(LE_FLOAT32, n, out, -1, 1);
  Array ids = array(LE_INT32, 0, n), A = drawn(LE_FLOAT32, 4, in, -1, 1),
        B = drawn(LE_FLOAT32, out, 4, -1, 1);
  Array y[2] = {array(LE_FLOAT32, n, out), array(LE_FLOAT32, n, out)};
  for (int i = 0; i < n; ++i) set(&ids, 0, i, i % 7 - 1);
  for (int c = 0; c < 2; ++c) {
    le_pool *pool = new_pool(contexts[c], in, 1, outs, LE_FLOAT32, 1);
    le_ewc *ewc = NULL;
    le_pool_info info;
    for (int32_t s = 0, slot; s < 6; ++s)
      CHECK(le_pool_add(pool, &A.c, &B.c, 0.5f, &slot) == LE_OK);
    CHECK(le_set_tuning(contexts[c], 1024, 0) == LE_OK);
    CHECK(le_ewc_create(pool, LE_EWC_FACTOR, 0.01f, &ewc) == LE_OK);
    CHECK(le_ewc_set(ewc, 2, &A.c, &B.c) == LE_ERROR_VALUE); /* Fisher information below 0 */
    const le_step step = {1e-3f, 1, 0, 0, 1, ewc};
    uint8_t outcomes[n];
    CHECK(le_pool_adapt(pool, &x.c, &grad.c, &ids.c, NULL, &step, outcomes) == LE_OK);
    CHECK(le_pool_forward(pool, &x.c, &ids.c, NULL, 0, 0, &y[c].c) == LE_OK);
    CHECK(le_pool_get_info(pool, &info) == LE_OK);
    if (c == 0) CHECK(host.bytes >= info.bytes && info.bytes > 12 * 4 * (in + out) * 4);
    /* In this order, as a garbage collector might. */
    le_context_destroy(contexts[c]);
    le_pool_destroy(pool);
    CHECK(le_ewc_penalty(ewc, &(double){0}) == LE_OK);
    if (c == 0) CHECK(host.live > 0);
    le_ewc_destroy(ewc);
  }
  CHECK(same(&y[0], &y[1]));
  CHECK(host.runs >= 2 && host.tasks > host.runs && host.live == 0 && host.bytes == 0);
  CHECK(host.level == LE_LOG_ERROR &&
        strstr(host.said, "EWC.set: fisher_A: expected finite values"));
  array_free(&x), array_free(&grad), array_free(&ids), array_free(&A), array_free(&B);
  array_free(&y[0]), array_free(&y[1]);
}

/* Each context's words are its own; what was destroyed is refused. */
static void errors(void) {
  le_context *a = new_context(1), *b = new_context(1);
  char said[512];
  CHECK(strcmp(le_last_error(b), le_last_error(a)) == 0); /* of no context, if anything */
  CHECK(le_set_num_threads(a, -5) == LE_ERROR_VALUE);
  CHECK(le_set_num_threads(b, -6) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(a), "-5") && strstr(le_last_error(b), "-6"));
  CHECK(strstr(le_last_error(NULL), "-6"));
  snprintf(said, sizeof said, "%s", le_last_error(a));
  le_context_destroy(b);
  CHECK(le_set_num_threads(b, 2) == LE_ERROR_VALUE);
  CHECK(strstr(le_last_error(NULL), "ctx: expected a handle in use, got one that was destroyed"));
  le_context_destroy(b); /* again: nothing */
  CHECK(le_get_num_threads(b) == 0 && le_get_num_threads(a) == 1);
  for (int i = 0; i < 1000; ++i) le_context_destroy(new_context(1));
  le_context_destroy(a);
}

/* What was called and refused is counted; the timed ones are in a bucket each. */
static void counted(void) {
  const int64_t outs[] = {4};
  le_context *ctx = new_context(1);
  le_pool *pool = new_pool(ctx, 4, 1, outs, LE_FLOAT32, 0);
  Array A, B, x = drawn(LE_FLOAT32, 1, 4, -1, 1), y = array(LE_FLOAT32, 1, 4);
  int32_t slot = add_drawn(pool, 4, 4, 1, 1, &A, &B);
  le_counters before, after;
  uint64_t timed = 0;
  CHECK(le_get_counters(ctx, NULL) == LE_ERROR_VALUE &&
        le_get_counters(NULL, &before) == LE_ERROR_VALUE);
  CHECK(le_get_counters(ctx, &before) == LE_OK && before.resident == 1);
  for (int i = 0; i < 300 * LE_TIMED_EVERY; ++i)
    CHECK(le_pool_forward_slot(pool, slot + i % 2, &x.c, 0, 0, &y.c) ==
          (i % 2 ? LE_ERROR_INDEX : LE_OK));
  CHECK(le_get_counters(ctx, &after) == LE_OK);
  if (after.forward.calls != 0) { /* or a build without */
    CHECK(after.forward.calls == before.forward.calls + 300 * LE_TIMED_EVERY);
    CHECK(after.forward.timed > before.forward.timed + 240 &&
          after.forward.timed < before.forward.timed + 360);
    for (int b = 0; b <= LE_DURATION_BUCKETS; ++b) timed += after.forward.buckets[b];
    CHECK(timed == after.forward.timed && after.forward.seconds > 0);
  }
  array_free(&A), array_free(&B), array_free(&x), array_free(&y);
  le_pool_destroy(pool);
  CHECK(le_get_counters(ctx, &after) == LE_OK && after.resident == 0);
  le_context_destroy(ctx);
}

void test_context(void) {
  versions();
  options();
  lent();
  errors();
  counted();
}
