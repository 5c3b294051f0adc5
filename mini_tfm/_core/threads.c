#if defined(__linux__) && defined(_OPENMP)
#define _GNU_SOURCE
#include <sched.h>
#endif

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "threads.h"

/* In units of 0.1 ns: 20 us, of which a second thread saves 10. Measured on 2 cores (Zen 3, Linux 6.18) as the median time of
 * an empty region of two threads: a fork and join takes 0.6 us while the other thread still spins for the next region, 6 us
 * once it sleeps, 20 us after a millisecond of sleep. */
static const double WORTH_A_FORK = 2e5;

static int n_threads = 1, within_limit = 1, forked = 0, startable = 1 << 30; /* startable: as far as is known */

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

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
    startable = 1 << 30;
}

int mt_get_threads(void) {
    int n = n_threads;
#ifdef _OPENMP
    if (within_limit && omp_get_max_threads() < n) n = omp_get_max_threads();
    if (omp_get_thread_limit() < n) n = omp_get_thread_limit(); /* OMP_THREAD_LIMIT, which no team can exceed */
    if (startable < n) n = startable;
    return forked ? 1 : n;
#else
    (void)forked;
    return 1;
#endif
}

void mt_after_fork(void) { forked = 1; }

static int (*run_handlers)(void);
static unsigned long main_thread;

void mt_watch_signals(int (*check)(void), unsigned long thread) {
    run_handlers = check;
    main_thread = thread;
}

int mt_stopped(int *flag) {
    enum { EVERY_MS = 50, CALLS = 16 }; /* the clock takes as long as some rows of a loss: it is asked in one call of so many */
    static double asked = 0; /* the main thread's alone, as is calls */
    static unsigned calls = 0;
    if (__atomic_load_n(flag, __ATOMIC_RELAXED)) return 1;
    if (mt_thread_id() || !run_handlers || (unsigned long)pthread_self() != main_thread || ++calls % CALLS) return 0;
    double now = seconds();
    if (now - asked < EVERY_MS * 1e-3) return 0;
    asked = now;
    if (!run_handlers()) return 0;
    __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
    return 1;
}

#ifdef _OPENMP
static void *wait_and_end(void *lock) {
    pthread_mutex_lock(lock);
    pthread_mutex_unlock(lock);
    return NULL;
}

/* How many of n more threads can be started, by starting them: libgomp ends the process when one of its own cannot be. */
static int threads_to_have(int n) {
    pthread_t *threads = malloc(n * sizeof *threads);
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    int made = 0;
    pthread_mutex_lock(&lock); /* they are to be there together */
    while (threads && made < n && !pthread_create(&threads[made], NULL, wait_and_end, &lock)) made++;
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < made; i++) pthread_join(threads[i], NULL);
    free(threads);
    return made;
}

/* A team of n, or of fewer where not all can be had: half of those then, for work needs room, too. This thread's pool is tried before it
 * grows, and again when that was long ago, and it grows at once, before anything else takes the room. */
static int team_to_have(int n) {
    static _Thread_local int alive = 1, tried = 1;
    static _Thread_local double tried_at = 0;
    if (n > alive && (n > tried || seconds() - tried_at > 1)) {
        int wanted = n - alive, more = threads_to_have(wanted);
        if (more < wanted) startable = n = alive + more / 2;
        tried = n;
        tried_at = seconds();
#pragma omp parallel num_threads(n)
        __asm__ volatile("" ::: "memory"); /* so that it is not left out */
    }
    return alive = n;
}
#else
static int team_to_have(int n) { return n; }
#endif

#if defined(__linux__) && defined(_OPENMP)
/* Keeps the workers of this thread's pool off the processor that it runs on itself. Under KVM (Linux 6.18) a processor at
 * rest looks taken to the scheduler, so a worker that is woken stays where its caller runs, and the two take turns: 60
 * calls of attention took 28 to 44 ms, with this 14, on one thread 18. It costs a region of its own whenever the caller
 * has changed its processor or has more workers than before. Threads that OMP_PROC_BIND or a narrow set of processors
 * has placed are left alone. */
static void keep_apart(int n) {
    static _Thread_local int seen_processor = -1, seen_team = 0;
    int processor = sched_getcpu(), known = processor == seen_processor && n <= seen_team;
    seen_team = n; /* libgomp ends the threads beyond a team, and starts new ones where the caller may run */
    if (known || processor < 0 || processor >= CPU_SETSIZE || omp_get_proc_bind() != omp_proc_bind_false) return;
    cpu_set_t processors;
    if (sched_getaffinity(0, sizeof processors, &processors) || CPU_COUNT(&processors) < n) return;
    CPU_CLR(processor, &processors);
#pragma omp parallel num_threads(n)
    if (omp_get_thread_num()) sched_setaffinity(0, sizeof processors, &processors);
    seen_processor = processor;
}
#else
static void keep_apart(int n) { (void)n; }
#endif

int mt_team(ptrdiff_t pieces, double work) {
    if (pieces < 2 || work < WORTH_A_FORK) return 1;
    int n = mt_get_threads();
    if (pieces < n) n = (int)pieces;
    if (n > 1) n = team_to_have(n);
    if (n > 1) keep_apart(n);
    return n;
}
