/* AVX-512 for processors without it, so that its instances can be tested anywhere: each intrinsic that the kernels use, as
 * plain C that says what the instruction is documented to do. The compiler does the rest, for it splits 64-byte vectors.
 * Slow, and only in a build with MINI_TFM_EMULATE=1. A new intrinsic in the kernels needs its line here. */
#ifndef MINI_TFM_EMULATED_H
#define MINI_TFM_EMULATED_H

#define EMULATED(type, name, ...) static inline __attribute__((always_inline)) type emulated_##name(__VA_ARGS__)
#define EACH(lanes) for (int i = 0; i < lanes; i++)

/* Where either is NaN, and where both are zero, the second. */
EMULATED(__m512, max_ps, __m512 a, __m512 b) { EACH(16) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
EMULATED(__m512d, max_pd, __m512d a, __m512d b) { EACH(8) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
EMULATED(__m512, min_ps, __m512 a, __m512 b) { EACH(16) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }
EMULATED(__m512d, min_pd, __m512d a, __m512d b) { EACH(8) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }

/* Lanes whose bit is not set are those of `rest`, and memory is not touched there. */
EMULATED(__m512, mask_loadu_ps, __m512 rest, __mmask16 k, const void *p) { EACH(16) if (k >> i & 1) rest[i] = ((const float *)p)[i]; return rest; }
EMULATED(__m512d, mask_loadu_pd, __m512d rest, __mmask8 k, const void *p) { EACH(8) if (k >> i & 1) rest[i] = ((const double *)p)[i]; return rest; }
EMULATED(void, mask_storeu_ps, void *p, __mmask16 k, __m512 x) { EACH(16) if (k >> i & 1) ((float *)p)[i] = x[i]; }
EMULATED(void, mask_storeu_pd, void *p, __mmask8 k, __m512d x) { EACH(8) if (k >> i & 1) ((double *)p)[i] = x[i]; }

/* A bit a lane: is a & b other than zero there? */
EMULATED(__mmask16, test_epi32_mask, __m512i a, __m512i b) {
    unsigned k = 0;
    EACH(8) k |= ((a[i] & b[i] & 0xFFFFFFFF) != 0) << 2 * i | ((a[i] & b[i]) >> 32 != 0) << (2 * i + 1);
    return (__mmask16)k;
}

/* A part, and the whole with another part in its place. */
EMULATED(__m256, castps512_ps256, __m512 x) { __m256 y; memcpy(&y, &x, sizeof y); return y; }
EMULATED(__m256d, castpd512_pd256, __m512d x) { __m256d y; memcpy(&y, &x, sizeof y); return y; }
EMULATED(__m512, castps128_ps512, __m128 x) { __m512 y = {x[0], x[1], x[2], x[3]}; return y; }
EMULATED(__m512d, castpd128_pd512, __m128d x) { __m512d y = {x[0], x[1]}; return y; }
EMULATED(__m256, extractf32x8_ps, __m512 x, int at) { __m256 y; memcpy(&y, (const char *)&x + 32 * at, sizeof y); return y; }
EMULATED(__m256d, extractf64x4_pd, __m512d x, int at) { __m256d y; memcpy(&y, (const char *)&x + 32 * at, sizeof y); return y; }
EMULATED(__m512, insertf32x4, __m512 x, __m128 part, int at) { memcpy((char *)&x + 16 * at, &part, sizeof part); return x; }
EMULATED(__m512d, insertf64x2, __m512d x, __m128d part, int at) { memcpy((char *)&x + 16 * at, &part, sizeof part); return x; }

/* a times 2 to the floor of b, rounded once; infinities of b first, for ldexp takes an int. */
static inline double emulated_scalef(double a, double b, double (*ldexp_of)(double, int)) {
    if (isnan(a) || isnan(b)) return a + b;
    if (isinf(b)) return b > 0 ? a * INFINITY : isinf(a) ? NAN : a * 0;
    return ldexp_of(a, (int)fmax(-5000, fmin(5000, floor(b))));
}

static double emulated_ldexp_single(double a, int n) { return ldexpf((float)a, n); }

EMULATED(__m512, scalef_ps, __m512 a, __m512 b) { EACH(16) a[i] = (float)emulated_scalef(a[i], b[i], emulated_ldexp_single); return a; }
EMULATED(__m512d, scalef_pd, __m512d a, __m512d b) { EACH(8) a[i] = emulated_scalef(a[i], b[i], ldexp); return a; }

/* Pairs of 16-bit products, quadruples of an unsigned byte times a signed one: summed in 32 bits without saturation. */
EMULATED(__m512i, madd_epi16, __m512i a, __m512i b) {
    int16_t x[32], y[32];
    int32_t sum[16];
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
    EACH(16) sum[i] = (int32_t)((uint32_t)(x[2 * i] * y[2 * i]) + (uint32_t)(x[2 * i + 1] * y[2 * i + 1]));
    memcpy(&a, sum, sizeof a);
    return a;
}

EMULATED(__m512i, dpbusd_epi32, __m512i sums, __m512i a, __m512i b) {
    uint8_t x[64];
    int8_t y[64];
    int32_t sum[16];
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y), memcpy(sum, &sums, sizeof sum);
    EACH(16) sum[i] = (int32_t)((uint32_t)sum[i] + (uint32_t)(x[4 * i] * y[4 * i] + x[4 * i + 1] * y[4 * i + 1] +
                                                              x[4 * i + 2] * y[4 * i + 2] + x[4 * i + 3] * y[4 * i + 3]));
    memcpy(&sums, sum, sizeof sums);
    return sums;
}

/* Halves, bytes and whole numbers as floats, by the instructions of half the width; a store past the caches is a store. */
EMULATED(__m512, cvtph_ps, __m256i a) {
    __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(a)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
    __m512 x;
    memcpy(&x, &low, sizeof low), memcpy((char *)&x + sizeof low, &high, sizeof high);
    return x;
}

EMULATED(__m512i, cvtepi8_epi32, __m128i a) {
    int8_t x[16];
    int32_t y[16];
    __m512i wide;
    memcpy(x, &a, sizeof x);
    EACH(16) y[i] = x[i];
    memcpy(&wide, y, sizeof wide);
    return wide;
}

EMULATED(__m512, cvtepi32_ps, __m512i a) {
    int32_t n[16];
    __m512 x;
    memcpy(n, &a, sizeof n);
    EACH(16) x[i] = (float)n[i];
    return x;
}

EMULATED(__m512d, castps_pd, __m512 x) { return (__m512d)x; }
EMULATED(void, stream_si512, void *p, __m512i x) { memcpy(p, &x, sizeof x); }

/* Signed bytes to 16 bits; to the nearest integer, ties to even, the least one where there is none. */
EMULATED(__m512i, cvtepi8_epi16, __m256i a) {
    int8_t x[32];
    int16_t y[32];
    __m512i wide;
    memcpy(x, &a, sizeof x);
    EACH(32) y[i] = x[i];
    memcpy(&wide, y, sizeof wide);
    return wide;
}

EMULATED(__m512i, cvtps_epi32, __m512 a) {
    int32_t n[16];
    __m512i whole;
    EACH(16) n[i] = a[i] >= -0x1p31f && a[i] < 0x1p31f ? (int32_t)nearbyintf(a[i]) : INT32_MIN;
    memcpy(&whole, n, sizeof whole);
    return whole;
}

/* Two vectors to the nearest bfloat16, the second one's below; 16 bits by number; products of pairs added to a float. Numbers below
 * the normal ones count as zero on the way in and out, NaN stays one. */
static inline uint32_t emulated_normal(uint32_t bits) { return bits & 0x7F800000 ? bits : bits & 0x80000000; }

EMULATED(__m512i, cvtne2ps_pbh, __m512 a, __m512 b) {
    uint32_t x[32];
    uint16_t y[32];
    __m512i both;
    memcpy(x, &b, sizeof b), memcpy(x + 16, &a, sizeof a);
    EACH(32) {
        uint32_t bits = emulated_normal(x[i]), nan = (bits & 0x7FFFFFFF) > 0x7F800000;
        y[i] = (uint16_t)((nan ? bits | 1 << 22 : bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
    memcpy(&both, y, sizeof both);
    return both;
}

EMULATED(__m512i, permutexvar_epi16, __m512i at, __m512i a) {
    uint16_t n[32], x[32], y[32];
    memcpy(n, &at, sizeof n), memcpy(x, &a, sizeof x);
    EACH(32) y[i] = x[n[i] & 31];
    memcpy(&a, y, sizeof a);
    return a;
}

EMULATED(__m512, dpbf16_ps, __m512 sum, __m512i a, __m512i b) {
    uint32_t x[16], y[16];
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
    EACH(16) {
        for (int upper = 1; upper >= 0; upper--) {
            uint32_t bits[2] = {upper ? x[i] & 0xFFFF0000 : x[i] << 16, upper ? y[i] & 0xFFFF0000 : y[i] << 16};
            float factor[2], total;
            EACH(2) bits[i] = emulated_normal(bits[i]);
            memcpy(factor, bits, sizeof factor);
            total = fmaf(factor[0], factor[1], sum[i]);
            memcpy(bits, &total, sizeof total);
            bits[0] = emulated_normal(bits[0]);
            memcpy(&total, bits, sizeof total);
            sum[i] = total;
        }
    }
    return sum;
}

/* Tiles of at most 16 rows of 64 bytes, of each thread; sums of quadruples as above. */
static __thread struct {
    uint8_t rows[8];
    uint16_t bytes[8];
    char data[8][16][64];
} emulated_tiles;

EMULATED(void, tile_loadconfig, const void *p) {
    memset(&emulated_tiles, 0, sizeof emulated_tiles);
    memcpy(emulated_tiles.bytes, (const char *)p + 16, sizeof emulated_tiles.bytes);
    memcpy(emulated_tiles.rows, (const char *)p + 48, sizeof emulated_tiles.rows);
}

EMULATED(void, tile_zero, int tile) { memset(emulated_tiles.data[tile], 0, sizeof emulated_tiles.data[tile]); }

EMULATED(void, tile_loadd, int tile, const void *p, ptrdiff_t stride) {
    EACH(emulated_tiles.rows[tile]) memcpy(emulated_tiles.data[tile][i], (const char *)p + i * stride, emulated_tiles.bytes[tile]);
}

EMULATED(void, tile_stored, int tile, void *p, ptrdiff_t stride) {
    EACH(emulated_tiles.rows[tile]) memcpy((char *)p + i * stride, emulated_tiles.data[tile][i], emulated_tiles.bytes[tile]);
}

EMULATED(void, tile_dpbusd, int to, int from, int with) {
    EACH(emulated_tiles.rows[to]) for (int k = 0; k < emulated_tiles.bytes[from] / 4; k++) {
        __m512i sums, x, w;
        memcpy(&sums, emulated_tiles.data[to][i], sizeof sums), memcpy(&w, emulated_tiles.data[with][k], sizeof w);
        for (int lane = 0; lane < 16; lane++) memcpy((char *)&x + 4 * lane, emulated_tiles.data[from][i] + 4 * k, 4);
        sums = emulated_dpbusd_epi32(sums, x, w);
        memcpy(emulated_tiles.data[to][i], &sums, sizeof sums);
    }
}

EMULATED(void, tile_release, void) {}

EMULATED(__m512i, loadu_si512, const void *p) { __m512i x; memcpy(&x, p, sizeof x); return x; }

#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_release
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_zero emulated_tile_zero
#define _tile_loadd emulated_tile_loadd
#define _tile_stored emulated_tile_stored
#define _tile_dpbusd emulated_tile_dpbusd
#define _tile_release emulated_tile_release
#define __m512bh __m512i
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_max_ps emulated_max_ps
#define _mm512_max_pd emulated_max_pd
#define _mm512_min_ps emulated_min_ps
#define _mm512_min_pd emulated_min_pd
#define _mm512_mask_loadu_ps emulated_mask_loadu_ps
#define _mm512_mask_loadu_pd emulated_mask_loadu_pd
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_mask_storeu_pd emulated_mask_storeu_pd
#define _mm512_test_epi32_mask emulated_test_epi32_mask
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_castpd512_pd256 emulated_castpd512_pd256
#define _mm512_castps128_ps512 emulated_castps128_ps512
#define _mm512_castpd128_pd512 emulated_castpd128_pd512
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#undef _mm512_extractf64x4_pd
#define _mm512_extractf64x4_pd emulated_extractf64x4_pd
#undef _mm512_insertf32x4
#define _mm512_insertf32x4 emulated_insertf32x4
#undef _mm512_insertf64x2
#define _mm512_insertf64x2 emulated_insertf64x2
#define _mm512_scalef_ps emulated_scalef_ps
#define _mm512_scalef_pd emulated_scalef_pd
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_cvtepi8_epi16 emulated_cvtepi8_epi16
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_castps_pd emulated_castps_pd
#define _mm512_stream_si512 emulated_stream_si512

#endif
