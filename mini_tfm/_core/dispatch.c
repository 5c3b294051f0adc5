/* Which instances exist, and which of them this processor can run. A new one is a line here and two files in instances/. */
#include "core.h"

#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#define ON_X86 1
#else
#define ON_X86 0
#endif

extern const struct mt_kernels mt_kernels_baseline_f32, mt_kernels_baseline_f64;

static int always(void) { return 1; }

#if ON_X86
extern const struct mt_kernels mt_kernels_avx2_f32, mt_kernels_avx2_f64;

static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

/* Best first. */
static const struct {
    const struct mt_kernels *kernels[2]; /* float, double */
    int (*runs_here)(void);
} INSTANCES[] = {
#if ON_X86
    {{&mt_kernels_avx2_f32, &mt_kernels_avx2_f64}, has_avx2},
#endif
    {{&mt_kernels_baseline_f32, &mt_kernels_baseline_f64}, always},
};
enum { N_INSTANCES = sizeof INSTANCES / sizeof INSTANCES[0] };

static int chosen = N_INSTANCES - 1;

int mt_choose_isa(const char *name) {
    for (int i = 0; i < N_INSTANCES; i++)
        if (INSTANCES[i].runs_here() && (!name || !strcmp(name, INSTANCES[i].kernels[0]->isa))) {
            chosen = i;
            return 0;
        }
    return -1;
}

const char *mt_isa_name(int i) {
    for (int instance = 0; instance < N_INSTANCES; instance++)
        if (INSTANCES[instance].runs_here() && i-- == 0) return INSTANCES[instance].kernels[0]->isa;
    return NULL;
}

const struct mt_kernels *mt_kernels(int is_double) { return INSTANCES[chosen].kernels[is_double != 0]; }
