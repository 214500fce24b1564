/* Forks while other threads adapt, roll back, look into and replace a slot: no lock that a fork
 * takes waits for one that waits for it, and a child goes on serving, adapting and making pools.
 * forks [COUNT] */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fixture.h"

/* AddressSanitizer's allocator takes no part in a fork: no thread may be in malloc then. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PARKED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define PARKED 1
#elif !defined(PARKED)
#define PARKED 0
#endif

static atomic_int stop, paused, parked;
static Fixture f;

static void *work(void *arg) {
  double norm;
  uint8_t outcome;
  le_array a, bt;
  le_view *view;
  int32_t slot = (int32_t)((size_t)arg % 2);
  while (!stop) {
    if (paused) {
      ++parked;
      while (paused) sched_yield();
      --parked;
    }
    CHECK(le_pool_adapt_slot(f.pool, slot, &f.x.c, &f.grad.c, &f.step, &outcome, &norm) == LE_OK);
    le_pool_rollback(f.pool, slot);
    CHECK(le_pool_view(f.pool, slot, &a, &bt, &view) == LE_OK);
    le_view_release(view);
    CHECK(le_ewc_set(f.ewc, slot, &f.F_A.c, &f.F_B.c) == LE_OK);
  }
  return NULL;
}

/* In the child: what may be called there; its exit status. */
static int child(void) {
  Fixture own;
  double norm;
  uint8_t outcome;
  failures = 0;
  alarm(20); /* a lock that nobody gives back */
  CHECK(le_pool_forward(f.pool, &f.x.c, &f.ids.c, NULL, 0, 0, &f.y.c) == LE_OK);
  CHECK(le_pool_adapt_slot(f.pool, 0, &f.x.c, &f.grad.c, &f.step, &outcome, &norm) == LE_OK);
  CHECK(le_ewc_set(f.ewc, 0, &f.F_A.c, &f.F_B.c) == LE_OK);
  fixture(&own);
  fixture_done(&own);
  return failures != 0;
}

int main(int argc, char **argv) {
  enum { THREADS = 3 };
  pthread_t threads[THREADS];
  int count = argc > 1 ? atoi(argv[1]) : 200;
  alarm(120);
  fixture(&f);
  f.step.lr = 1e-6f;
  for (size_t t = 0; t < THREADS; ++t) pthread_create(&threads[t], NULL, work, (void *)t);
  for (int i = 0; i < count; ++i) {
    int status = -1;
    if (PARKED) paused = 1;
    while (PARKED && parked < THREADS) sched_yield();
    pid_t pid = fork();
    if (pid == 0) _exit(child());
    paused = 0;
    while (parked) sched_yield();
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
  }
  stop = 1;
  for (size_t t = 0; t < THREADS; ++t) pthread_join(threads[t], NULL);
  fixture_done(&f);
  printf("%d forks, %ld failed\n", count, failures);
  return failures != 0;
}
