/* Memory that runs out: every allocation of every call fails once, in turn. An error code each
 * time, the adapters and the outputs of checked calls as before, and nothing is kept. Then a
 * million adds and removes, after which the process has not grown. */
#include <pthread.h>
#include <unistd.h>

#include "counted_malloc.h"
#include "fixture.h"

static long injected, survived;

/* The calls: each on a fixture of its own. */
static le_status create(Fixture *f) {
  le_context *ctx = NULL;
  (void)f;
  le_status status = le_context_create(NULL, &ctx);
  le_context_destroy(ctx);
  return status;
}
static le_status create_pool(Fixture *f) {
  le_pool *pool = NULL;
  le_status status = le_pool_create(f->ctx, &f->options, &pool);
  le_pool_destroy(pool);
  return status;
}
static le_status create_ewc(Fixture *f) {
  le_ewc *ewc = NULL;
  le_status status = le_ewc_create(f->pool, LE_EWC_DELTA, 1, &ewc);
  le_ewc_destroy(ewc);
  return status;
}
static le_status delta(Fixture *f) {
  return le_lora_delta(f->ctx, &f->x.c, &f->A.c, &f->B.c, 1, 0, &f->y.c);
}
static le_status ewc_step(Fixture *f) {
  return le_ewc_step(f->ctx, &f->F_A.c, &f->A.c, &f->star_A.c, &f->A.c, 0.1f, 1, 1, 1);
}
static le_status fisher(Fixture *f) {
  return le_lora_fisher(f->ctx, &f->x.c, &f->grad.c, &f->A.c, &f->B.c, 1, &f->segments.c, 0,
                        &f->F_A.c, &f->F_B.c);
}
static le_status factors(Fixture *f) {
  return le_lora_fisher_factors(f->ctx, &f->x.c, &f->grad.c, 0, &f->u.c, &f->v.c);
}
static le_status accumulate(Fixture *f) {
  return le_fisher_accumulate(f->ctx, &f->F.c, &f->x.c, 0.5f, 0.5f);
}
static le_status encode(Fixture *f) {
  return le_nf4_encode(f->ctx, &f->W.c, 64, f->packed, f->absmax);
}
static le_status decode(Fixture *f) { return le_nf4_decode(f->ctx, &f->w, &f->W.c); }
static le_status linear(Fixture *f) {
  return le_nf4_linear(f->ctx, &f->x.c, &f->w, NULL, f->pool, &f->ids.c, NULL, LE_BFLOAT16,
                       &f->y.c);
}
static le_status linear_backward(Fixture *f) {
  return le_nf4_linear_backward(f->ctx, &f->grad.c, &f->w, &f->F.c);
}
static le_status add(Fixture *f) { return le_pool_add(f->pool, &f->A.c, &f->B.c, 1, &f->slot); }
static le_status set_weights(Fixture *f) {
  return le_pool_set(f->pool, 0, &f->F_A.c, &f->F_B.c, 1);
}
static le_status get(Fixture *f) {
  return le_pool_get(f->pool, 0, &f->F_A.c, &f->F_B.c, &f->scaling);
}
static le_status removed(Fixture *f) { return le_pool_remove(f->pool, 1); }
static le_status removed_together(Fixture *f) { return le_pool_remove_all(f->pool, &f->slots.c); }
static le_status view(Fixture *f) {
  le_array a, bt;
  le_view *seen = NULL;
  le_status status = le_pool_view(f->pool, 0, &a, &bt, &seen);
  le_view_release(seen);
  return status;
}
static le_status forward(Fixture *f) {
  return le_pool_forward(f->pool, &f->x.c, &f->ids.c, NULL, 0, 0, &f->y.c);
}
static le_status forward_slot(Fixture *f) {
  return le_pool_forward_slot(f->pool, 0, &f->x.c, 0, 0, &f->y.c);
}
static le_status adapt(Fixture *f) {
  return le_pool_adapt(f->pool, &f->x.c, &f->grad.c, &f->ids.c, NULL, &f->step, f->outcomes);
}
static le_status adapt_slot(Fixture *f) {
  return le_pool_adapt_slot(f->pool, 0, &f->x.c, &f->grad.c, &f->step, &f->outcome, &f->number);
}
static le_status adapt_observed(Fixture *f) {
  return le_pool_adapt_slot_observed(f->pool, 0, &f->x.c, &f->grad.c, &f->step, &f->u.c, &f->v.c,
                                     &f->outcome, &f->number);
}
static le_status gradient(Fixture *f) {
  return le_pool_gradient(f->pool, 0, &f->x.c, &f->grad.c, NULL, &f->gradient.c, &f->outcome,
                          &f->number);
}
static le_status apply(Fixture *f) {
  return le_pool_apply(f->pool, 0, &f->gradient.c, 1, &f->step, &f->outcome, &f->number);
}
static le_status shrink(Fixture *f) { return le_pool_shrink(f->pool, 0, &f->x.c, &f->h.c); }
static le_status ewc_set(Fixture *f) { return le_ewc_set(f->ewc, 0, &f->F_A.c, &f->F_B.c); }
static le_status ewc_restore(Fixture *f) {
  return le_ewc_restore(f->ewc, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, &f->star_B.c);
}
static le_status ewc_get(Fixture *f) {
  le_status status = ewc_set(f);
  return status ? status : le_ewc_get(f->ewc, 0, &f->F_A.c, &f->F_B.c, &f->star_A.c, &f->star_B.c);
}
static le_status ewc_remove(Fixture *f) { return le_ewc_remove(f->ewc, 0); }
static le_status penalty(Fixture *f) {
  le_status status = ewc_set(f);
  return status ? status : le_ewc_penalty(f->ewc, &f->number);
}
static le_status held_back(Fixture *f) {
  le_status status = ewc_set(f);
  le_step step = f->step;
  step.ewc = f->ewc;
  return status
             ? status
             : le_pool_adapt_slot(f->pool, 0, &f->x.c, &f->grad.c, &step, &f->outcome, &f->number);
}
static le_status consolidate(Fixture *f) {
  f->merge = (le_merge){&f->slots.c, &f->weights.c, NULL, NULL, NULL, rank, 1, 3, 1e-3f, 1};
  return le_consolidate(f->pool, 0, &f->merge, &f->to_A.c, &f->to_B.c, f->versions, &f->info);
}
static le_status export_import(Fixture *f) {
  le_status status = le_pool_export(f->pool, 0, f->modules, f->buffer, sizeof f->buffer, &f->bytes);
  if (status == LE_OK)
    status = le_pool_import(f->pool, f->buffer, f->bytes, f->modules, 1, &f->slot);
  memset(f->buffer, 0, sizeof f->buffer);
  return status;
}
static le_status refused(Fixture *f) { /* an error that cannot be put in words either */
  le_array bad = f->x.c;
  bad.shape[1] = 3;
  le_status status = le_pool_forward(f->pool, &bad, &f->ids.c, NULL, 0, 0, &f->y.c);
  return status == LE_ERROR_VALUE ? LE_OK : status;
}

static le_status (*const calls[])(Fixture *) = {
    create,  create_pool,  create_ewc,  delta,         ewc_step,         fisher,
    factors, accumulate,   encode,      decode,        linear,           linear_backward,
    add,     set_weights,  get,         removed,       removed_together, view,
    forward, forward_slot, adapt,       adapt_slot,    adapt_observed,   gradient,
    apply,   shrink,       ewc_set,     ewc_restore,   ewc_get,          ewc_remove,
    penalty, held_back,    consolidate, export_import, refused};
enum { CALLS = sizeof calls / sizeof *calls };

/* On a thread that knows nothing of the engine yet, and takes its work buffers along. */
typedef struct Case {
  int call;
  long nth;
  int failed;
} Case;
static void *run_case(void *arg) {
  Case *c = arg;
  Fixture f;
  fixture(&f);
  uint64_t before = fixture_state(&f);
  malloc_fail_at(c->nth);
  le_status status = calls[c->call](&f);
  c->failed = malloc_failed();
  if (c->failed) {
    ++injected;
    survived += status == LE_OK;
    CHECK(status == LE_OK || status == LE_ERROR_MEMORY);
    CHECK(status == LE_OK || fixture_state(&f) == before);
    if (status != LE_OK) CHECK(*le_last_error(f.ctx));
    if (status != LE_OK) status = calls[c->call](&f); /* as if nothing had been */
  }
  CHECK(status == LE_OK);
  if (status != LE_OK) printf("call %d, %ld: %s\n", c->call, c->nth, le_last_error(f.ctx));
  fixture_done(&f);
  return NULL;
}
static int on_a_thread(int call, long nth) {
  pthread_t thread;
  Case c = {call, nth, 0};
  pthread_create(&thread, NULL, run_case, &c);
  pthread_join(thread, NULL);
  return c.failed;
}

static void out_of_memory(void) {
  for (int i = 0; i < 70 * CALLS; ++i) on_a_thread(i % CALLS, 1L << 40); /* handles are reissued */
  for (int call = 0; call < CALLS; ++call) {
    long before = malloc_live(), nth = 1;
    while (on_a_thread(call, nth)) ++nth;
    CHECK(malloc_live() == before);
    if (malloc_live() != before) printf("call %d keeps %ld\n", call, malloc_live() - before);
  }
}

/* In steady state nothing is allocated where a host serves and teaches. */
static void steady(void) {
  static le_status (*const served[])(Fixture *) = {
      delta,      forward,        forward_slot, shrink, linear,   linear_backward, decode, adapt,
      adapt_slot, adapt_observed, gradient,     apply,  ewc_step, accumulate,      encode, factors};
  Fixture f;
  fixture(&f);
  for (size_t i = 0; i < sizeof served / sizeof *served; ++i) {
    long before = 0;
    for (int call = 0; call < 20; ++call) {
      if (call == 4) before = malloc_total(); /* the history's two blocks are there */
      CHECK(served[i](&f) == LE_OK);
    }
    CHECK(malloc_total() == before);
    if (malloc_total() != before) printf("call %d allocates\n", (int)i);
  }
  fixture_done(&f);
}

static long resident(void) {
  long pages = 0, here = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (!file || fscanf(file, "%ld %ld", &pages, &here) != 2) here = -1;
  if (file) fclose(file);
  return here * sysconf(_SC_PAGESIZE);
}

/* Twenty slots come and go, of ranks 1 to 5. */
static void turn_over(le_pool *pool, Array *A, Array *B, long times) {
  int32_t slots[20], slot;
  for (long i = 0; i < times; ++i) {
    le_array a = A->c, b = B->c;
    a.shape[0] = b.shape[1] = 1 + i % 5;
    CHECK(i < 20 || le_pool_remove(pool, slots[i % 20]) == LE_OK);
    CHECK(le_pool_add(pool, &a, &b, 1, &slot) == LE_OK && slot < 20);
    slots[i % 20] = slot;
  }
  for (int i = 0; i < 20; ++i) CHECK(le_pool_remove(pool, slots[i]) == LE_OK);
}
static void does_not_grow(long times) {
  const int64_t outs[] = {out};
  le_context *ctx = new_context(1);
  le_pool *pool = new_pool(ctx, in, 1, outs, LE_FLOAT32, 1);
  Array A = drawn(LE_FLOAT32, 5, in, -1, 1), B = drawn(LE_FLOAT32, out, 5, -1, 1);
  turn_over(pool, &A, &B, 2000);
  long bytes = resident(), live = malloc_live();
  turn_over(pool, &A, &B, times);
  CHECK(malloc_live() <= live + 1); /* the queue of freed slots has blocks */
  CHECK(resident() - bytes <= 256 * 1024);
  printf("%ld adds and removes: %ld bytes more in memory, %ld allocations\n", times,
         resident() - bytes, malloc_live() - live);
  array_free(&A), array_free(&B);
  le_pool_destroy(pool), le_context_destroy(ctx);
}

int main(int argc, char **argv) {
  out_of_memory();
  printf("%d calls: %ld allocations failed, %ld of them did without\n", CALLS, injected, survived);
  steady();
  does_not_grow(argc > 1 ? atol(argv[1]) : 1000000);
  printf("%ld checks, %ld failed\n", checks, failures);
  return failures != 0 || injected < 100;
}
