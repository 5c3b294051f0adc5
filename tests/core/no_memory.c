/* Allocations of the kernels that fail when a test asks for it: loaded before everything else, on glibc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_memalign(size_t, size_t);

static long asked, failing = -1; /* what the kernels asked for since `fail_at`, and which of it fails */

long n_asked(void) { return asked; }

void fail_at(long number) {
    asked = 0;
    failing = number;
}

static int fails(const void *caller) {
    Dl_info where;
    if (!dladdr(caller, &where) || !where.dli_fname || !strstr(where.dli_fname, "_core/kernels.")) return 0;
    if (asked++ != failing) return 0;
    errno = ENOMEM;
    return 1;
}

#define CALLER __builtin_return_address(0)
void *malloc(size_t size) { return fails(CALLER) ? NULL : __libc_malloc(size); }
void *calloc(size_t n, size_t size) { return fails(CALLER) ? NULL : __libc_calloc(n, size); }
void *aligned_alloc(size_t alignment, size_t size) { return fails(CALLER) ? NULL : __libc_memalign(alignment, size); }
