/* Which instances exist, and which of them this processor can run. setup.py says by HAS_... which ones were compiled; a new
 * one is a line there, two here and two files in instances/. */
#include "core.h"

#include <string.h>

static int always(void) { return 1; }

#if HAS_AVX2
/* The compiler's own check, for it knows what an operating system must do too: save the registers of another size. */
static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

#if HAS_AVX512 && MINI_TFM_EMULATE
#define has_avx512 has_avx2
#elif HAS_AVX512
static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define KERNELS(isa) {&mt_kernels_##isa##_f32, &mt_kernels_##isa##_f64}
#define DECLARE(isa) extern const struct mt_kernels mt_kernels_##isa##_f32, mt_kernels_##isa##_f64
#if HAS_AVX512
DECLARE(avx512);
#endif
#if HAS_AVX2
DECLARE(avx2);
#endif
#if HAS_NEON
DECLARE(neon);
#endif
#if HAS_BASELINE
DECLARE(baseline);
#endif

/* Best first; what is emulated is never the best. */
static const struct {
    const struct mt_kernels *kernels[2]; /* float, double */
    int (*runs_here)(void);
} INSTANCES[] = {
#if HAS_AVX512 && !MINI_TFM_EMULATE
    {KERNELS(avx512), has_avx512},
#endif
#if HAS_AVX2
    {KERNELS(avx2), has_avx2},
#endif
#if HAS_NEON
    {KERNELS(neon), always},
#endif
#if HAS_BASELINE
    {KERNELS(baseline), always},
#endif
#if HAS_AVX512 && MINI_TFM_EMULATE
    {KERNELS(avx512), has_avx512},
#endif
};
enum { N_INSTANCES = sizeof INSTANCES / sizeof INSTANCES[0] };

static int chosen = 0;

int mt_choose_isa(const char *name) {
    for (int i = 0; i < N_INSTANCES; i++)
        if (INSTANCES[i].runs_here() && (!name || !strcmp(name, INSTANCES[i].kernels[0]->isa))) {
            chosen = i;
            return 0;
        }
    return -1;
}

const char *mt_isa_name(int i, int built) {
    for (int instance = 0; instance < N_INSTANCES; instance++)
        if ((built || INSTANCES[instance].runs_here()) && i-- == 0) return INSTANCES[instance].kernels[0]->isa;
    return NULL;
}

int mt_is_emulated(const char *name) { return MINI_TFM_EMULATE && !strncmp(name, "avx512", 6); }

const struct mt_kernels *mt_kernels(int is_double) { return INSTANCES[chosen].kernels[is_double != 0]; }
