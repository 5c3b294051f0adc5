/* Vectors of reals for one instruction set: GCC's vector extensions, which clang has too, so that the same text serves every
 * width; intrinsics only where those fall short. Reductions are spelled out lane by lane, never left to the compiler:
 * their order is then the same for every address and every row, which the promise of equal bits rests on. */
#ifndef MINI_TFM_SIMD_H
#define MINI_TFM_SIMD_H

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if ISA_AVX2 || ISA_AVX512
#include <immintrin.h>
#endif
#if ISA_NEON
#include <arm_neon.h>
#endif

#include "core.h"
#include "threads.h"
#if ISA_AVX512 && MINI_TFM_EMULATE
#include "instances/emulated.h"
#endif

#if REAL_IS_DOUBLE
typedef double real;
typedef int64_t lane;
typedef uint64_t ulane;
#else
typedef float real;
typedef int32_t lane;
typedef uint32_t ulane;
#endif

/* Vector registers that a tile of a product may fill. */
#if ISA_AVX512 || ISA_NEON
#define N_REGISTERS 32
#else
#define N_REGISTERS 16
#endif

#define VL ((ptrdiff_t)(VECTOR_BYTES / sizeof(real))) /* reals in a vector */
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef lane ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef ulane uvec __attribute__((vector_size(VECTOR_BYTES)));
typedef lane lane_anywhere __attribute__((may_alias));
typedef real vec_anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
#if ISA_AVX512 && REAL_IS_DOUBLE
typedef __m512d vec_of_real; /* what intrinsics take */
#elif ISA_AVX512
typedef __m512 vec_of_real;
#elif ISA_AVX2 && REAL_IS_DOUBLE
typedef __m256d vec_of_real;
#elif ISA_AVX2
typedef __m256 vec_of_real;
#endif

enum { LINE = 64 / sizeof(real) }; /* of a cache */

static inline ptrdiff_t min_size(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t max_size(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static inline ptrdiff_t div_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
static inline ptrdiff_t round_up(ptrdiff_t a, ptrdiff_t b) { return div_up(a, b) * b; }

/* Row 0 of head h of batch row b. */
static inline real *head_rows(const struct mt_rows *x, ptrdiff_t b, ptrdiff_t h) { return (real *)x->at + b * x->stride[0] + h * x->stride[1]; }

/* Workspace on a cache line of its own; NULL when it cannot be had. Freed by free(). */
static inline void *new_reals(size_t count) { return aligned_alloc(64, (count * sizeof(real) + 64) / 64 * 64); }

INLINE vec load(const real *p) { return *(const vec_anywhere *)p; }
INLINE void store(real *p, vec x) { *(vec_anywhere *)p = x; }
INLINE vec all(real x) { return x - (vec){0}; }
INLINE ivec all_lanes(lane x) { return x - (ivec){0}; }

#if REAL_IS_DOUBLE
#define OF_REAL(name) name##_pd
#else
#define OF_REAL(name) name##_ps
#endif

INLINE ivec lane_numbers(void) {
    static const lane NUMBERS[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec numbers;
    memcpy(&numbers, NUMBERS, sizeof numbers);
    return numbers;
}

/* Lanes by number, those of b counted on from those of a. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Lanes of a where the mask is all ones, of b where it is zero. (AVX-512: compilers see through the mask that comes from a
 * comparison better than through a blend.) */
INLINE vec choose(ivec mask, vec a, vec b) {
#if ISA_AVX2
    return (vec)OF_REAL(_mm256_blendv)((vec_of_real)b, (vec_of_real)a, (vec_of_real)mask);
#else
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
#endif
}

/* a > b ? a : b and a < b ? a : b: where either is NaN, b. So a running maximum goes second to pass over NaN, and a bound
 * goes first to keep it. */
INLINE vec max_vec(vec a, vec b) {
#if ISA_AVX512
    return (vec)OF_REAL(_mm512_max)((vec_of_real)a, (vec_of_real)b);
#elif ISA_AVX2
    return (vec)OF_REAL(_mm256_max)((vec_of_real)a, (vec_of_real)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE vec min_vec(vec a, vec b) {
#if ISA_AVX512
    return (vec)OF_REAL(_mm512_min)((vec_of_real)a, (vec_of_real)b);
#elif ISA_AVX2
    return (vec)OF_REAL(_mm256_min)((vec_of_real)a, (vec_of_real)b);
#else
    return choose(a < b, a, b);
#endif
}

/* The first n < VL reals, the rest filled with `fill`. What lies behind them is not touched. */
INLINE vec load_some(const real *p, ptrdiff_t n, real fill) {
#if ISA_AVX512
    return (vec)OF_REAL(_mm512_mask_loadu)((vec_of_real)all(fill), (1u << n) - 1, p);
#elif ISA_AVX2
    ivec mask = lane_numbers() < (lane)n;
    return choose(mask, (vec)OF_REAL(_mm256_maskload)(p, (__m256i)mask), all(fill));
#else
    real buffer[VL];
    for (ptrdiff_t i = 0; i < VL; i++) buffer[i] = i < n ? p[i] : fill;
    return load(buffer);
#endif
}

/* The first n < VL lanes. AVX2 has a masked store too, which on Zen 3 takes 2.6 times as long. */
INLINE void store_some(real *p, vec x, ptrdiff_t n) {
#if ISA_AVX512
    OF_REAL(_mm512_mask_storeu)(p, (1u << n) - 1, (vec_of_real)x);
#elif ISA_AVX2 && REAL_IS_DOUBLE
    __m128d part = _mm256_castpd256_pd128((__m256d)x);
    if (n & 2) {
        _mm_storeu_pd(p, part);
        part = _mm256_extractf128_pd((__m256d)x, 1);
        p += 2;
    }
    if (n & 1) _mm_store_sd(p, part);
#elif ISA_AVX2
    __m128 part = _mm256_castps256_ps128((__m256)x);
    if (n & 4) {
        _mm_storeu_ps(p, part);
        part = _mm256_extractf128_ps((__m256)x, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi((__m64 *)p, part);
        part = _mm_movehl_ps(part, part);
        p += 2;
    }
    if (n & 1) _mm_store_ss(p, part);
#else
    for (ptrdiff_t i = 0; i < n; i++) p[i] = x[i];
#endif
}

/* Halves onto each other: lane i with lane i + VL/2, and so on down to one. In registers where it matters, for attention
 * does it twice in every 64 scores; the array says the same. */
#if (ISA_AVX2 || ISA_AVX512) && REAL_IS_DOUBLE
#define FOLD(name, op, plain)                                                                                   \
    INLINE real name(vec x) {                                                                                   \
        __m256d four = FOUR_OF(x, _mm256_##op##_pd);                                                            \
        __m128d two = _mm_##op##_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));              \
        return _mm_cvtsd_f64(_mm_##op##_sd(two, _mm_unpackhi_pd(two, two)));                                    \
    }
#if ISA_AVX512
#define FOUR_OF(x, op) op(_mm512_castpd512_pd256((__m512d)x), _mm512_extractf64x4_pd((__m512d)x, 1))
#else
#define FOUR_OF(x, op) (__m256d) x
#endif
#elif ISA_AVX2 || ISA_AVX512
#define FOLD(name, op, plain)                                                                                   \
    INLINE real name(vec x) {                                                                                   \
        __m256 eight = EIGHT_OF(x, _mm256_##op##_ps);                                                           \
        __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));            \
        four = _mm_##op##_ps(four, _mm_movehl_ps(four, four));                                                  \
        return _mm_cvtss_f32(_mm_##op##_ss(four, _mm_shuffle_ps(four, four, 1)));                               \
    }
#if ISA_AVX512
#define EIGHT_OF(x, op) op(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1))
#else
#define EIGHT_OF(x, op) (__m256) x
#endif
#else
#define FOLD(name, op, plain)                                                                                   \
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
#endif
FOLD(sum_lanes, add, a + b)
FOLD(max_lanes, max, a > b ? a : b)

INLINE int any_lane(ivec mask) {
#if ISA_AVX512
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif ISA_AVX2
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    lane some = 0;
    for (ptrdiff_t i = 0; i < VL; i++) some |= mask[i];
    return some != 0;
#endif
}

#if REAL_IS_DOUBLE
enum { MANTISSA = 52, BIAS = 1023 };
#define ROUND 0x1.8p52
#define EXP_LOWEST (-760.0)             /* exp is 0 below */
#define EXP_HIGHEST 720.0               /* exp is inf above */
#define EXP_LOWEST_WEIGHT (-708.3964)   /* -1022 ln 2 */
#else
enum { MANTISSA = 23, BIAS = 127 };
#define ROUND 0x1.8p23f
#define EXP_LOWEST (-105.0f)
#define EXP_HIGHEST 89.0f
#define EXP_LOWEST_WEIGHT (-87.33654f)  /* -126 ln 2 */
#endif

/* x = n ln 2 + r with |r| <= ln(2)/2; returns exp(r) times `times`. Adding ROUND = 1.5 * 2^MANTISSA rounds x / ln 2 to the
 * integer n and leaves it in the low bits, together with what `ready` adds to it: shifted left by MANTISSA, all else drops
 * out and they are an exponent. `split`: ln 2 in two parts, so that n times the first is exact. */
INLINE vec exp_reduced(vec x, const lane ready, const int split, const real times, vec *rounded) {
#if REAL_IS_DOUBLE
    const real ln2 = 0x1.62e42fefa39efp-1, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
    /* Taylor to r^13: the remainder is 4e-18. */
    static const real TERMS[] = {1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
                                 1 / 5040.0,       1 / 720.0,       1 / 120.0,      1 / 24.0,      1 / 6.0,      1 / 2.0};
#else
    const real ln2 = 0x1.62e43p-1f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    /* Least maximum error over the interval, 1.05e-7 relative. */
    static const real TERMS[] = {0.008312520571f, 0.041890155524f, 0.166671141982f, 0.499992311001f};
#endif
    *rounded = x * (real)1.44269504088896340736 + (ROUND + ready);
    vec n = *rounded - (ROUND + ready);
    vec r = split ? (x - n * ln2_high) - n * ln2_low : x - n * ln2, p = all(TERMS[0] * times);
    for (size_t i = 1; i < sizeof TERMS / sizeof TERMS[0]; i++) p = p * r + TERMS[i] * times;
    p = p * r + times;
    return p * r + times;
}

/* exp over its whole range: exp(-inf) = 0, exp(+inf) = inf, NaN stays NaN, denormal results are right. 2^n is applied in
 * two halves, for it alone may be out of range. About 1.5 units in the last place. */
INLINE vec exp_vec(vec x) {
    vec rounded;
    x = min_vec(all(EXP_HIGHEST), max_vec(all(EXP_LOWEST), x)); /* bounds first: NaN passes */
    vec p = exp_reduced(x, 2 * BIAS, 1, 1, &rounded);
#if ISA_AVX512
    return (vec)OF_REAL(_mm512_scalef)((vec_of_real)p, (vec_of_real)(rounded - (ROUND + 2 * BIAS)));
#else
    uvec whole = (uvec)rounded, half = whole >> 1;
    return p * (vec)(half << MANTISSA) * (vec)((whole - half) << MANTISSA);
#endif
}

/* exp for the weights of a softmax, x at most a rounding above 0. Cheaper, and no denormal slows down what follows: 2 exp(r)
 * is multiplied by 2^(n - 1), whose exponent n - 1 + BIAS is that of zero at the lowest n, so results below 2^(-BIAS + 1.5)
 * are 0. ln 2 is not split: x is a difference, and its own rounding is worth as much. NaN stays NaN. */
INLINE vec exp_weight(vec x) {
    vec rounded, p = exp_reduced(max_vec(all(EXP_LOWEST_WEIGHT), x), BIAS - 1, 0, 2, &rounded);
    return p * (vec)((uvec)rounded << MANTISSA);
}

INLINE real exp_real(real x) { return exp_vec(all(x))[0]; }

/* What rows are compared with, a log-sum-exp or a mean, as two reals: beside a large offset one would round away what rows differ
 * in. Taken off one after the other, the first leaves a difference that is exact for all that lie near. */
struct two_parts {
    real whole, rest;
};

INLINE struct two_parts in_two_parts(double x) {
    real whole = (real)x;
    return (struct two_parts){whole, isfinite(whole) ? (real)(x - whole) : 0};
}

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
