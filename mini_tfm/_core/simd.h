/* Vectors of reals for one instruction set: GCC's vector extensions, which clang has too, so that the same text serves every
 * width; intrinsics only where those fall short. Reductions are spelled out lane by lane, never left to the compiler:
 * their order is then the same for every address and every row, which the promise of equal bits rests on. */
#ifndef MINI_TFM_SIMD_H
#define MINI_TFM_SIMD_H

#include "instances/before.h"

#if REAL_IS_DOUBLE
typedef double real;
typedef int64_t lane;
#else
typedef float real;
typedef int32_t lane;
#endif

/* Vector registers that a tile of a product may fill. */
#if ISA_AVX512 || defined(__aarch64__)
#define N_REGISTERS 32
#else
#define N_REGISTERS 16
#endif

#define VL ((ptrdiff_t)(VECTOR_BYTES / sizeof(real))) /* reals in a vector */
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef lane ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef real vec_anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

static inline ptrdiff_t min_size(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t max_size(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static inline ptrdiff_t div_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
static inline ptrdiff_t round_up(ptrdiff_t a, ptrdiff_t b) { return div_up(a, b) * b; }

/* Workspace on a cache line of its own; NULL when it cannot be had. Freed by free(). */
static inline void *new_reals(size_t count) { return aligned_alloc(64, (count * sizeof(real) + 64) / 64 * 64); }

INLINE vec load(const real *p) { return *(const vec_anywhere *)p; }
INLINE void store(real *p, vec x) { *(vec_anywhere *)p = x; }
INLINE vec all(real x) { return x - (vec){0}; }
INLINE ivec all_lanes(lane x) { return x - (ivec){0}; }

/* The first n < VL reals, the rest filled with `fill`. */
INLINE vec load_some(const real *p, ptrdiff_t n, real fill) {
    real buffer[VL];
    for (ptrdiff_t i = 0; i < VL; i++) buffer[i] = i < n ? p[i] : fill;
    return load(buffer);
}

INLINE void store_some(real *p, vec x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) p[i] = x[i];
}

/* Lanes of a where the mask is all ones, of b where it is zero. */
INLINE vec choose(ivec mask, vec a, vec b) {
#if ISA_AVX2 && REAL_IS_DOUBLE
    return (vec)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)mask);
#elif ISA_AVX2
    return (vec)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
#else
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
#endif
}

/* a > b ? a : b and a < b ? a : b: where either is NaN, b. So a running maximum goes second to pass over NaN, and a bound
 * goes first to keep it. */
INLINE vec max_vec(vec a, vec b) {
#if ISA_AVX2 && REAL_IS_DOUBLE
    return (vec)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif ISA_AVX2
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE vec min_vec(vec a, vec b) {
#if ISA_AVX2 && REAL_IS_DOUBLE
    return (vec)_mm256_min_pd((__m256d)a, (__m256d)b);
#elif ISA_AVX2
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return choose(a < b, a, b);
#endif
}

/* Halves onto each other: lane i with lane i + VL/2, and so on down to one. In registers where it matters, for attention
 * does it twice in every 64 scores; the array says the same. */
#if ISA_AVX2 && REAL_IS_DOUBLE
#define FOLD(name, op128, opscalar, plain)                                                                      \
    INLINE real name(vec x) {                                                                                   \
        __m128d half = op128(_mm256_castpd256_pd128((__m256d)x), _mm256_extractf128_pd((__m256d)x, 1));         \
        return _mm_cvtsd_f64(opscalar(half, _mm_unpackhi_pd(half, half)));                                      \
    }
FOLD(sum_lanes, _mm_add_pd, _mm_add_sd, )
FOLD(max_lanes, _mm_max_pd, _mm_max_sd, )
#elif ISA_AVX2
#define FOLD(name, op128, opscalar, plain)                                                                      \
    INLINE real name(vec x) {                                                                                   \
        __m128 half = op128(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));            \
        half = op128(half, _mm_movehl_ps(half, half));                                                          \
        return _mm_cvtss_f32(opscalar(half, _mm_shuffle_ps(half, half, 1)));                                    \
    }
FOLD(sum_lanes, _mm_add_ps, _mm_add_ss, )
FOLD(max_lanes, _mm_max_ps, _mm_max_ss, )
#else
#define FOLD(name, op128, opscalar, plain)                                                                      \
    INLINE real name(vec x) {                                                                                   \
        real lanes[VL];                                                                                         \
        store(lanes, x);                                                                                        \
        for (ptrdiff_t half = VL / 2; half; half /= 2)                                                          \
            for (ptrdiff_t i = 0; i < half; i++) {                                                              \
                real a = lanes[i], b = lanes[i + half];                                                         \
                lanes[i] = plain;                                                                               \
            }                                                                                                   \
        return lanes[0];                                                                                        \
    }
FOLD(sum_lanes, , , a + b)
FOLD(max_lanes, , , a > b ? a : b)
#endif

INLINE int any_lane(ivec mask) {
#if ISA_AVX2
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    lane some = 0;
    for (ptrdiff_t i = 0; i < VL; i++) some |= mask[i];
    return some != 0;
#endif
}

#if REAL_IS_DOUBLE
enum { MANTISSA = 52, BIAS = 1023 };
#define EXP_LOWEST (-760.0)         /* exp is 0 below */
#define EXP_LOWEST_NORMAL (-708.0)  /* exp is a normal number above */
#define EXP_HIGHEST 720.0           /* exp is inf above */
#else
enum { MANTISSA = 23, BIAS = 127 };
#define EXP_LOWEST (-105.0f)
#define EXP_LOWEST_NORMAL (-87.0f)
#define EXP_HIGHEST 89.0f
#endif

/* x = n ln 2 + r with |r| <= ln(2)/2; returns exp(r) and n. Adding 1.5 * 2^MANTISSA rounds x / ln 2 to the integer n and
 * leaves it in the low bits; ln 2 is split so that n * ln2_high is exact. About 1.5 units in the last place. */
INLINE vec exp_reduced(vec x, ivec *n_whole) {
#if REAL_IS_DOUBLE
    const real magic = 0x1.8p52, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
#else
    const real magic = 0x1.8p23f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#endif
    vec shifted = x * (real)1.44269504088896340736 + magic;
    vec n = shifted - magic;
    vec r = (x - n * ln2_high) - n * ln2_low;
#if REAL_IS_DOUBLE
    /* Taylor to r^13: the remainder is 4e-18. */
    vec p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
#else
    /* Least maximum error over the interval, 1.05e-7 relative. */
    vec p = r * 0.008312520571f + 0.041890155524f;
    p = p * r + 0.166671141982f;
    p = p * r + 0.499992311001f;
#endif
    *n_whole = (ivec)shifted - (ivec)all(magic);
    return (p * r) * r + r + 1;
}

/* exp over its whole range: exp(-inf) = 0, exp(+inf) = inf, NaN stays NaN, denormal results are right. 2^n is applied in
 * two halves, for it alone may be out of range. */
INLINE vec exp_vec(vec x) {
    ivec n, half;
    vec p = exp_reduced(min_vec(all(EXP_HIGHEST), max_vec(all(EXP_LOWEST), x)), &n); /* bounds first: NaN passes */
    half = n >> 1;
    return p * (vec)((half + BIAS) << MANTISSA) * (vec)((n - half + BIAS) << MANTISSA);
}

/* exp for the weights of a softmax, x at most a rounding above 0: the same but for results below the normal numbers, which
 * are 0. Cheaper, and no denormal slows down what follows. */
INLINE vec exp_weight(vec x) {
    ivec n;
    vec p = exp_reduced(max_vec(all(EXP_LOWEST_NORMAL), x), &n);
    p = (vec)((ivec)p + (n << MANTISSA)); /* times 2^n: p is in [0.7, 1.5], the product is normal */
    return (vec)((ivec)p & ~(x < EXP_LOWEST_NORMAL));
}

INLINE real exp_real(real x) { return exp_vec(all(x))[0]; }

/* erf, NaN stays NaN. In float, odd polynomial below 1 and 1 - exp(-polynomial) above, fitted to 1e-9 relative; the
 * double one, which only tests use at length, is libm's. */
INLINE vec erf_vec(vec x) {
#if REAL_IS_DOUBLE
    for (ptrdiff_t i = 0; i < VL; i++) x[i] = erf(x[i]);
    return x;
#else
    ivec sign = (ivec)x & all_lanes(INT32_MIN);
    vec t = (vec)((ivec)x & all_lanes(INT32_MAX));
    vec s = x * x;
    vec small = s * 7.853860734e-05f - 0.0008010193705558777f;
    small = small * s + 0.005188327748328447f;
    small = small * s - 0.026853812858462334f;
    small = small * s + 0.1128358542919159f;
    small = small * s - 0.3761262595653534f;
    small = small * s + 0.12837916612625122f;
    small = small * x + x;
    t = min_vec(all(4.0f), t); /* erf(4) rounds to 1 */
    vec large = t * 2.1697629563277587e-05f - 0.0004414728609845042f;
    large = large * t + 0.0042052860371768475f;
    large = large * t - 0.025210343301296234f;
    large = large * t + 0.10842210799455643f;
    large = large * t + 0.633216381072998f;
    large = large * t + 1.1295802593231201f;
    large = large * t - 0.00018846863531507552f;
    large = (vec)((ivec)(1.0f - exp_vec(-large)) | sign);
    return choose(t < 1.0f, small, large);
#endif
}

#endif
