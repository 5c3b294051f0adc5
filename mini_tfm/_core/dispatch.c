/* Which instances exist, which of them this processor runs, and the one in use. setup.py says by HAS_... what it compiled
 * (instances/flags.toml); a new one is a line there, some here, and a file for each real in instances/. */
#include "core.h"

#include <string.h>

#if HAS_NEONDOT && defined(__linux__)
#include <sys/auxv.h>
#endif
#if HAS_AVX512 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* The compiler's own checks, for they know what the operating system must do too: save the larger registers. What is emulated
 * is made of AVX2. */
#if HAS_AVX2
static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if HAS_AVX512
static int has_avx512(void) {
    return has_avx2() && (MINI_TFM_EMULATE || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")));
}

static int has_avx512vnni(void) { return has_avx512() && (MINI_TFM_EMULATE || __builtin_cpu_supports("avx512vnni")); }

static int has_avx512bf16(void) { return has_avx512vnni() && (MINI_TFM_EMULATE || __builtin_cpu_supports("avx512bf16")); }

/* Tiles are a process's for the asking. The compiler does not know them yet. */
static int has_avx512amx(void) {
#if MINI_TFM_EMULATE
    return has_avx512bf16();
#elif defined(__linux__) && defined(__x86_64__)
    enum { TILES_AND_INT8 = 3 << 24, ASK = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES_AND_INT8) != TILES_AND_INT8) return 0;
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

#if HAS_NEONDOT
static int has_neondot(void) {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP, which old headers do not name */
#else
    return 1; /* every Apple processor of 64 bits that runs Python 3.11 */
#endif
}
#endif

static int always(void) { return 1; }

#define KERNELS(isa) {&mt_kernels_##isa##_f32, &mt_kernels_##isa##_f64}
#define DECLARE(isa) extern const struct mt_kernels mt_kernels_##isa##_f32, mt_kernels_##isa##_f64
#if HAS_AVX512
DECLARE(avx512);
void mt_refine_avx512vnni(struct mt_kernels *kernels);
void mt_refine_avx512bf16(struct mt_kernels *kernels);
void mt_refine_avx512amx(struct mt_kernels *kernels);
#define AVX512 {"avx512amx", KERNELS(avx512), mt_refine_avx512amx, has_avx512amx}, \
    {"avx512bf16", KERNELS(avx512), mt_refine_avx512bf16, has_avx512bf16}, \
    {"avx512vnni", KERNELS(avx512), mt_refine_avx512vnni, has_avx512vnni}, {"avx512", KERNELS(avx512), NULL, has_avx512},
#else
#define AVX512
#endif
#if HAS_AVX2
DECLARE(avx2);
#endif
#if HAS_NEON
DECLARE(neon);
void mt_refine_neondot(struct mt_kernels *kernels);
#endif
#if HAS_BASELINE
DECLARE(baseline);
#endif

/* Best first. What is emulated is never the best. */
static const struct {
    const char *name;
    const struct mt_kernels *kernels[2]; /* float, double */
    void (*refine)(struct mt_kernels *); /* puts better ones for float in their place, or NULL */
    int (*runs_here)(void);
} INSTANCES[] = {
#if !MINI_TFM_EMULATE
    AVX512
#endif
#if HAS_AVX2
    {"avx2", KERNELS(avx2), NULL, has_avx2},
#endif
#if HAS_NEON
    {"neondot", KERNELS(neon), mt_refine_neondot, has_neondot},
    {"neon", KERNELS(neon), NULL, always},
#endif
#if HAS_BASELINE
    {"baseline", KERNELS(baseline), NULL, always},
#endif
#if MINI_TFM_EMULATE
    AVX512
#endif
};
enum { N_INSTANCES = sizeof INSTANCES / sizeof INSTANCES[0] };

static struct mt_kernels in_use[2]; /* float, double */

int mt_choose_isa(const char *name) {
    for (int i = 0; i < N_INSTANCES; i++)
        if ((!name || !strcmp(name, INSTANCES[i].name)) && INSTANCES[i].runs_here()) {
            for (int real = 0; real < 2; real++) {
                in_use[real] = *INSTANCES[i].kernels[real];
                in_use[real].isa = INSTANCES[i].name;
            }
            if (INSTANCES[i].refine) INSTANCES[i].refine(&in_use[0]);
            return 0;
        }
    return -1;
}

const char *mt_isa_name(int i, int built) {
    for (int instance = 0; instance < N_INSTANCES; instance++)
        if ((built || INSTANCES[instance].runs_here()) && i-- == 0) return INSTANCES[instance].name;
    return NULL;
}

int mt_is_emulated(const char *name) { return MINI_TFM_EMULATE && !strncmp(name, "avx512", 6); }

const struct mt_kernels *mt_kernels(int is_double) { return &in_use[is_double != 0]; }
