/* The one place that knows OpenMP. A build without it is the same source: there is one thread then.
 *
 * Kernels cut their work into pieces whose results do not depend on the number of threads, and ask mt_team() how many
 * threads the pieces are worth:
 *
 *     #pragma omp parallel for num_threads(mt_team(pieces, work)) schedule(static) */
#ifndef MINI_TFM_THREADS_H
#define MINI_TFM_THREADS_H

#include <stddef.h>

#ifdef _OPENMP
#include <omp.h>
static inline int mt_thread_id(void) { return omp_get_thread_num(); }
#else
static inline int mt_thread_id(void) { return 0; }
#endif

int mt_has_openmp(void);

/* n >= 1. With honour_limit the team is also kept within omp_get_max_threads(), which threadpoolctl sets: that is for the
 * default count; a count asked for by name is taken as it is. */
void mt_set_threads(int n, int honour_limit);
int mt_get_threads(void);

/* From now on one thread. In a child after fork libgomp's pool is gone, and the next parallel region would hang. */
void mt_after_fork(void);

/* What a kernel that was stopped returns: what it was to write is undefined, and nothing else is touched. */
enum { MT_STOPPED = -2 };

/* Whether a kernel is to stop: each thread of a team asks between tiles, all with the flag of that call, 0 at first. The thread that
 * was called from Python runs its signal handlers now and then, if it is the main one, and sets the flag when one has raised. */
int mt_stopped(int *flag);

/* check: runs the handlers, nonzero when one has raised; thread: the main one, as Python's threading.get_ident() has it. */
void mt_watch_signals(int (*check)(void), unsigned long thread);

/* Threads for `pieces` independent pieces of `work` altogether, in units of about 0.1 ns: 1 when it is not worth a fork
 * and join. */
int mt_team(ptrdiff_t pieces, double work);

#endif
