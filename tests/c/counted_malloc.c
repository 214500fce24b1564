/* The C library's allocator, counted, and made to fail at a chosen call . In front of
 * glibc's own: a program that is linked with this has all its allocations, the engine's too, go
 * through here. */
#include "counted_malloc.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long live, total;
static atomic_long left; /* until the one that fails; 0: none */

static int fails(void) {
  atomic_fetch_add(&total, 1);
  long before = atomic_load(&left);
  while (before > 0)
    if (atomic_compare_exchange_weak(&left, &before, before - 1)) return before == 1;
  return 0;
}
static void *counted(void *p) {
  if (p) atomic_fetch_add(&live, 1);
  return p;
}

void *malloc(size_t size) { return fails() ? NULL : counted(__libc_malloc(size)); }
void *calloc(size_t n, size_t size) { return fails() ? NULL : counted(__libc_calloc(n, size)); }
void *realloc(void *p, size_t size) {
  if (fails()) return NULL;
  void *q = __libc_realloc(p, size);
  if (q && !p) atomic_fetch_add(&live, 1);
  return q;
}
void *memalign(size_t alignment, size_t size) {
  return fails() ? NULL : counted(__libc_memalign(alignment, size));
}
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void **to, size_t alignment, size_t size) {
  void *p = memalign(alignment, size);
  if (p) *to = p;
  return p ? 0 : ENOMEM;
}
void free(void *p) {
  if (p) atomic_fetch_sub(&live, 1);
  __libc_free(p);
}

long malloc_live(void) { return atomic_load(&live); }
long malloc_total(void) { return atomic_load(&total); }
void malloc_fail_at(long nth) { atomic_store(&left, nth); }
int malloc_failed(void) { return atomic_exchange(&left, 0) == 0; }
