#include "threads.h"

/* In units of 0.1 ns: 100 us. A fork and join takes some 50 us, as libgomp's threads sleep in between (see __init__.py). */
static const double WORTH_A_FORK = 1e6;

static int n_threads = 1, within_limit = 1, forked = 0;

int mt_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

void mt_set_threads(int n, int honour_limit) {
    n_threads = n;
    within_limit = honour_limit;
}

int mt_get_threads(void) {
    int n = n_threads;
#ifdef _OPENMP
    if (within_limit && omp_get_max_threads() < n) n = omp_get_max_threads();
    return forked ? 1 : n;
#else
    (void)forked;
    return 1;
#endif
}

void mt_after_fork(void) { forked = 1; }

int mt_team(ptrdiff_t pieces, double work) {
    if (pieces < 2 || work < WORTH_A_FORK) return 1;
    int n = mt_get_threads();
    return pieces < n ? (int)pieces : n;
}
