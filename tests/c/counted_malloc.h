/* What counted_malloc.c adds to malloc. */
#ifndef TESTS_MALLOC_H
#define TESTS_MALLOC_H

#include <stddef.h>

long malloc_live(void);        /* allocated and not freed */
long malloc_total(void);       /* allocations so far */
void malloc_fail_at(long nth); /* the nth from now on fails, and no other */
int malloc_failed(void);       /* whether it came to that; nothing fails any more */

#endif
