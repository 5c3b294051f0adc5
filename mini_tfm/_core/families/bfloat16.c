/* bfloat16: the upper half of a float32. And pairs of them, the factors of products whose factors are rounded to it: a lane of 4
 * bytes holds two consecutive k, the first one below. */
#if !REAL_IS_DOUBLE

/* To the nearest, ties to even; NaN stays one. */
INLINE uint32_t to_bfloat16(real x) {
    union {
        real x;
        uint32_t bits;
    } u = {x};
    if (x != x) return (u.bits >> 16) | 64;
    return (u.bits + 0x7FFF + ((u.bits >> 16) & 1)) >> 16;
}

INLINE real from_bfloat16(uint32_t bits) {
    union {
        uint32_t bits;
        real x;
    } u = {bits << 16};
    return u.x;
}

typedef uint16_t half_vec __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

/* VL of them as reals. */
INLINE vec load_bfloat16(const uint16_t *from) {
#if ISA_AVX512 && !MINI_TFM_EMULATE
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif ISA_AVX2
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#else
    return (vec)(__builtin_convertvector(*(const half_vec *)from, uvec) << 16);
#endif
}

/* to (d,) = from (d,) bfloat16. */
INLINE void widen_bfloat16(const uint16_t *from, ptrdiff_t d, real *to) {
    ptrdiff_t p = 0;
    for (; p + VL <= d; p += VL) store(to + p, load_bfloat16(from + p));
    for (; p < d; p++) to[p] = from_bfloat16(from[p]);
}

/* to (d up to a whole vector) = from (d,) in bfloat16, as reals. */
INLINE void round_row(const real *from, ptrdiff_t d, real *to) {
    for (ptrdiff_t p = 0; p < d; p += VL) {
        vec x = d - p >= VL ? load(from + p) : load_some(from + p, d - p, 0);
        uvec bits = (uvec)x;
        store(to + p, choose(x == x, (vec)((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000), x));
    }
}

/* Lane by lane: `first` below, `second` above. */
INLINE vec to_pairs(vec first, vec second) {
#if ISA_BF16
    static const int16_t BETWEEN[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i one_after_the_other = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vec)_mm512_permutexvar_epi16(_mm512_loadu_si512(BETWEEN), one_after_the_other);
#else
    uvec low = (uvec)first, high = (uvec)second;
    low = (uvec)choose(first != first, (vec)(low | 1 << 22), (vec)(low + 0x7FFF + (low >> 16 & 1)));
    high = (uvec)choose(second != second, (vec)(high | 1 << 22), (vec)(high + 0x7FFF + (high >> 16 & 1)));
    return (vec)(low >> 16 | (high & 0xFFFF0000));
#endif
}

/* to (steps rounded up to VL) = the pairs of a row of k <= 2 steps reals, with zeros behind. */
INLINE void pair_row(const real *from, ptrdiff_t k, ptrdiff_t steps, real *to) {
    for (ptrdiff_t p = 0; p < steps; p += VL) {
        ptrdiff_t left = k - 2 * p;
#if ISA_BF16
        vec first = left >= VL ? load(from + 2 * p) : load_some(from + 2 * p, left, 0);
        vec second = left >= 2 * VL ? load(from + 2 * p + VL) : left > VL ? load_some(from + 2 * p + VL, left - VL, 0) : all(0);
        store(to + p, (vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
        uint32_t lanes[VL];
        for (ptrdiff_t i = 0; i < VL; i++) {
            uint32_t low = 2 * i < left ? to_bfloat16(from[2 * (p + i)]) : 0;
            lanes[i] = low | (2 * i + 1 < left ? to_bfloat16(from[2 * (p + i) + 1]) << 16 : 0);
        }
        memcpy(to + p, lanes, sizeof lanes);
#endif
    }
}

/* sum + the product of the pairs' second ones + that of their first ones, added in float32. The instruction takes numbers below
 * the normal ones for zero. */
INLINE vec add_pairs(vec sum, ivec x, ivec b) {
#if ISA_BF16
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)b);
#else
    sum += (vec)(x & (lane)0xFFFF0000) * (vec)(b & (lane)0xFFFF0000);
    return sum + (vec)((uvec)x << 16) * (vec)((uvec)b << 16);
#endif
}

#else
/* Kernels in double have no such products; what is never called is there to be compiled. */
INLINE real from_bfloat16(uint32_t bits) { return bits; }
INLINE vec load_bfloat16(const uint16_t *from) { return (void)from, all(0); }
INLINE void widen_bfloat16(const uint16_t *from, ptrdiff_t d, real *to) { (void)from, (void)d, (void)to; }
INLINE vec to_pairs(vec first, vec second) { return first + second; }
INLINE void pair_row(const real *from, ptrdiff_t k, ptrdiff_t steps, real *to) { (void)from, (void)k, (void)steps, (void)to; }
INLINE vec add_pairs(vec sum, ivec x, ivec b) { return (void)x, (void)b, sum; }
#endif
