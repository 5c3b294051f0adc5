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

/* Pairwise: lane i with lane i + VL/2, and so on down. */
INLINE real sum_lanes(vec x) {
    real lanes[VL];
    store(lanes, x);
    for (ptrdiff_t half = VL / 2; half; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE real max_lanes(vec x) {
    real top = x[0];
    for (ptrdiff_t i = 1; i < VL; i++) top = x[i] > top ? x[i] : top;
    return top;
}

INLINE int any_lane(ivec mask) {
#if ISA_AVX2
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    lane some = 0;
    for (ptrdiff_t i = 0; i < VL; i++) some |= mask[i];
    return some != 0;
#endif
}

/* exp to about 1.5 units in the last place: exp(-inf) = 0, exp(+inf) = inf, NaN stays NaN, denormal results are right.
 * x = n ln 2 + r with |r| <= ln(2)/2: adding 1.5 * 2^(mantissa bits) rounds x / ln 2 to the integer n and leaves it in the
 * low bits; ln 2 is split so that n * ln2_high is exact. 2^n is applied in two halves, for it alone may be out of range. */
INLINE vec exp_vec(vec x) {
#if REAL_IS_DOUBLE
    enum { MANTISSA = 52, BIAS = 1023 };
    const real magic = 0x1.8p52, lowest = -760.0, highest = 720.0;
    const real ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
#else
    enum { MANTISSA = 23, BIAS = 127 };
    const real magic = 0x1.8p23f, lowest = -105.0f, highest = 89.0f;
    const real ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
#endif
    x = min_vec(all(highest), max_vec(all(lowest), x)); /* bounds first: NaN passes */
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
    p = (p * r) * r + r + 1;
    ivec whole = (ivec)shifted - (ivec)all(magic);
    ivec half = whole >> 1;
    vec scale_a = (vec)((half + BIAS) << MANTISSA);
    vec scale_b = (vec)((whole - half + BIAS) << MANTISSA);
    return p * scale_a * scale_b;
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
