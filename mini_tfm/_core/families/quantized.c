/* Products with int8 weights: sums of integers, exact, so that their order does not matter and every instruction set finds the
 * same ones. reference/packed.py defines the quantisation of weights (symmetric, a scale for each column and group of rows) and
 * of activations (0 to 255 with a zero point, for each row and group).
 *
 * A step is what one instruction multiplies into a lane: STEP consecutive k of a column, against 4 bytes of x that are the same
 * for all columns. A panel holds, step by step, STEP weights of each of NR columns. Where the instruction takes 16-bit factors
 * (AVX2: the one that takes bytes saturates) weights are widened on the way, once for all strips of a block. */
#if !REAL_IS_DOUBLE

#if ISA_VNNI
enum { STEP = 4, WIDENS = 0, SHIFT = 0 };
typedef uint8_t factor; /* of x */
#elif ISA_AVX512 || ISA_AVX2
enum { STEP = 2, WIDENS = 1, SHIFT = 0 };
typedef int16_t factor;
#elif ISA_NEON && defined(__ARM_FEATURE_DOTPROD)
enum { STEP = 4, WIDENS = 0, SHIFT = 128 }; /* the instruction is of signed bytes: x and its zero point are shifted down */
typedef int8_t factor;
#else
enum { STEP = 1, WIDENS = 1, SHIFT = 0 };
typedef int32_t factor;
#endif

enum { FETCHED_FAR = 16384, FETCHED_NEAR = 4096 }; /* bytes: how far ahead of few rows, and of one, panels are fetched */
enum { MAX_GROUP = 65536 }; /* 255 * 127 times that stays within 32 bits */
enum { STEPS = 256 };       /* in a chunk: of widened panel, 16 KB, with its strips in L1 */

typedef factor factors __attribute__((vector_size(VL * sizeof(factor)), aligned(1), may_alias));
typedef ivec ivec_anywhere __attribute__((aligned(4), may_alias));
typedef int8_t few_bytes __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias)); /* one for each lane */

/* The four that differ: VL columns of one step as the factors that dot takes, and sum + x . w in every lane. */
INLINE ivec widened(const int8_t *w) {
#if ISA_VNNI || (ISA_NEON && defined(__ARM_FEATURE_DOTPROD))
    return *(const ivec_anywhere *)w;
#elif ISA_AVX512
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
#elif ISA_AVX2
    return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
#else
    return __builtin_convertvector(*(const few_bytes *)w, ivec);
#endif
}

INLINE ivec dot(ivec sum, ivec x, ivec w) {
#if ISA_VNNI
    return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif ISA_AVX512
    return sum + (ivec)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif ISA_AVX2
    return sum + (ivec)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif ISA_NEON && defined(__ARM_FEATURE_DOTPROD)
    return (ivec)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
#else
    return sum + x * w;
#endif
}

/* To the nearest integer, ties to even, never contracted with the product before it. */
INLINE ivec rounded(vec x) {
#if ISA_AVX512
    return (ivec)_mm512_cvtps_epi32((__m512)x);
#elif ISA_AVX2
    return (ivec)_mm256_cvtps_epi32((__m256)x);
#elif defined(__aarch64__)
    return (ivec)vcvtnq_s32_f32((float32x4_t)x);
#else
    ivec n;
    for (ptrdiff_t i = 0; i < VL; i++) n[i] = (int32_t)nearbyintf(x[i]);
    return n;
#endif
}

INLINE vec as_reals(ivec x) { return __builtin_convertvector(x, vec); }

/* x (d,) read; q (d padded to steps), and for each group its scale and zero point, written: x = scale * (q - zero). A group
 * that is not all finite, or whose range is not, has the scale NaN. */
static void quantise_row(const real *x, ptrdiff_t d, ptrdiff_t group, factor *q, real *scale, int32_t *zero) {
    for (ptrdiff_t g = 0; g * group < d; g++) {
        ptrdiff_t at = g * group, n = min_size(group, d - at), whole = n / VL * VL;
        vec low = {0}, high = {0}, bad = {0};
        for (ptrdiff_t i = 0; i < whole; i += VL) {
            vec v = load(x + at + i);
            low = min_vec(v, low);
            high = max_vec(v, high);
            bad += v * 0;
        }
        if (whole < n) {
            vec v = load_some(x + at + whole, n - whole, 0);
            low = min_vec(v, low);
            high = max_vec(v, high);
            bad += v * 0;
        }
        real lowest = -max_lanes(-low), range = max_lanes(high) - lowest;
        if (range <= 1e-30f || !(range < INFINITY) || sum_lanes(bad) != 0) { /* sum_lanes is 0 or NaN */
            scale[g] = sum_lanes(bad) + (range < INFINITY ? 0 : NAN);
            zero[g] = -SHIFT;
            for (ptrdiff_t i = 0; i < round_up(n, STEP); i++) q[at + i] = (factor)-SHIFT;
            continue;
        }
        scale[g] = range / 255;
        real inverse = 255 / range;
        ivec origin = rounded(all(-lowest) * inverse);
        zero[g] = origin[0] - SHIFT;
        for (ptrdiff_t i = 0; i < n; i += VL) {
            vec v = i < whole ? load(x + at + i) : load_some(x + at + i, n - i, 0);
            ivec k = rounded(v * inverse) + origin;
            k &= ~(k < 0);
            k = (((k > 255) & 255) | (~(k > 255) & k)) - SHIFT; /* rounding may go one too far */
            if (i < whole)
                *(factors *)(q + at + i) = __builtin_convertvector(k, factors);
            else
                for (ptrdiff_t lane = 0; lane < n - i; lane++) q[at + i + lane] = (factor)k[lane];
        }
        for (ptrdiff_t i = n; i < round_up(n, STEP); i++) q[at + i] = 0; /* meets weights that are 0 */
    }
}

/* sum_ij (rows, NR) = or += x (rows, steps) . panel. What is `far` bytes further is fetched meanwhile; 0: what is `next`. Where no weight
 * is widened, work is so fast that it needs more lines on their way than L1 keeps track of: those go to L2. apart: sums of so many steps
 * in a row are kept apart, for a chain waits for its own last step, and few rows have few. */
INLINE void int8_tile(const int rows, const int apart, const int widens, const ptrdiff_t far, struct ahead next, ptrdiff_t steps,
                      const int32_t *x, ptrdiff_t x_row, const char *b, int32_t *c, const int add) {
    ivec sum[4][2 * MR]; /* rows * apart <= MR */
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) sum[0][2 * i + j] = add ? (ivec)*(ivec_anywhere *)(c + i * NR + j * VL) : (ivec){0};
    for (int i = 0; i < 2 * rows; i++)
        for (int u = 1; u < apart; u++) sum[u][i] = (ivec){0};
    const ptrdiff_t b_vector = widens ? VL * STEP : VECTOR_BYTES;
    const int32_t *x_3[(MR + 2) / 3];
    for (int i = 0; i < rows; i += 3) x_3[i / 3] = x + i * x_row;
    for (ptrdiff_t p = 0; p < steps;) {
        const int some = apart > 1 && p + apart <= steps ? apart : 1;
#pragma GCC unroll 4
        for (int u = 0; u < some; u++, p++, b += 2 * b_vector, next.at += next.step) {
            if (!far) __builtin_prefetch(next.at, 0, 2);
            ivec b_j[2];
            for (int j = 0; j < 2; j++) {
                const char *at = b + j * b_vector;
                if (far && (b_vector == 64 || j == 0)) __builtin_prefetch(at + far, 0, WIDENS ? 3 : 2); /* every line */
                b_j[j] = widens ? widened((const int8_t *)at) : (ivec)*(const ivec_anywhere *)at;
            }
            for (int i = 0; i < rows; i++) {
                ivec factors = all_lanes(x_3[i / 3][i % 3 * x_row]);
                for (int j = 0; j < 2; j++) sum[u][2 * i + j] = dot(sum[u][2 * i + j], factors, b_j[j]);
            }
            for (int i = 0; i < rows; i += 3) x_3[i / 3]++;
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) {
            ivec all_of_it = sum[0][2 * i + j];
            for (int u = 1; u < apart; u++) all_of_it += sum[u][2 * i + j];
            *(ivec_anywhere *)(c + i * NR + j * VL) = all_of_it;
        }
}

/* One strip of one panel whose factors are as dot takes them. */
static void int8_strip(ptrdiff_t rows, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, struct ahead next, int32_t *c,
                       int add) {
#define INT8_CASE(n)                                                       \
    case n:                                                                \
        if (add) int8_tile(n, 1, 0, 0, next, steps, x, x_row, b, c, 1);    \
        else int8_tile(n, 1, 0, 0, next, steps, x, x_row, b, c, 0);        \
        break;
    switch (rows) {
        INT8_CASE(1) INT8_CASE(2) INT8_CASE(3) INT8_CASE(4) INT8_CASE(5) INT8_CASE(6)
#if MR == 12
        INT8_CASE(7) INT8_CASE(8) INT8_CASE(9) INT8_CASE(10) INT8_CASE(11) INT8_CASE(12)
#endif
    }
}

#if ISA_AVX2
/* Of so few rows, x is taken in halves of 4 bits: sums of 8 steps of bytes fit 16 bits then, and no weight is widened. With more
 * rows, products of bytes are too slow for twice as many of them to pay. */
enum { HALVED = 2, HALVED_STEPS = 8 };

/* q (steps) becomes (steps, 2): 4 bytes that are the upper halves of one step twice, then the lower ones. */
INLINE void halve_row(ptrdiff_t steps, int32_t *q) {
    for (ptrdiff_t s = steps - 1; s >= 0; s--) {
        int32_t bytes = (q[s] & 0xFF) | q[s] >> 8, upper = bytes >> 4 & 0x0F0F, lower = bytes & 0x0F0F;
        q[2 * s] = upper | upper << 16;
        q[2 * s + 1] = lower | lower << 16;
    }
}

/* sum_ij (rows, NR) = x (rows, steps, 2) . panel. */
INLINE void int8_halves(const int rows, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, int32_t *c) {
    __m256i total[2 * HALVED] = {0};
    for (ptrdiff_t p = 0; p < steps; p += HALVED_STEPS) {
        __m256i upper[HALVED] = {0}, lower[HALVED] = {0};
        for (ptrdiff_t s = p, end = min_size(steps, p + HALVED_STEPS); s < end; s++) {
            const char *at = b + s * VECTOR_BYTES;
            if (s % 2 == 0) __builtin_prefetch(at + FETCHED_FAR);
            __m256i w = _mm256_load_si256((const __m256i *)at);
            for (int i = 0; i < rows; i++) {
                const int32_t *x_s = x + i * x_row + 2 * s;
                upper[i] = _mm256_add_epi16(upper[i], _mm256_maddubs_epi16(_mm256_set1_epi32(x_s[0]), w));
                lower[i] = _mm256_add_epi16(lower[i], _mm256_maddubs_epi16(_mm256_set1_epi32(x_s[1]), w));
            }
        }
        const __m256i weigh = _mm256_set1_epi32(1 << 16 | 16); /* 16 upper + 1 lower */
        for (int i = 0; i < rows; i++) {
            total[2 * i] = _mm256_add_epi32(total[2 * i], _mm256_madd_epi16(_mm256_unpacklo_epi16(upper[i], lower[i]), weigh));
            total[2 * i + 1] = _mm256_add_epi32(total[2 * i + 1], _mm256_madd_epi16(_mm256_unpackhi_epi16(upper[i], lower[i]), weigh));
        }
    }
    for (int i = 0; i < rows; i++) {
        _mm256_storeu_si256((__m256i *)(c + i * NR), _mm256_permute2x128_si256(total[2 * i], total[2 * i + 1], 0x20));
        _mm256_storeu_si256((__m256i *)(c + i * NR + VL), _mm256_permute2x128_si256(total[2 * i], total[2 * i + 1], 0x31));
    }
}
#else
enum { HALVED = 0 };
INLINE void halve_row(ptrdiff_t steps, int32_t *q) { (void)steps, (void)q; }
INLINE void int8_halves(const int rows, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, int32_t *c) {
    (void)rows, (void)steps, (void)x, (void)x_row, (void)b, (void)c;
}
#endif

/* c (rows, NR) for at most HALVED rows, x as halve_row leaves it. */
static void int8_fewest(ptrdiff_t rows, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, int32_t *c) {
    if (rows == 1)
        int8_halves(1, steps, x, x_row, b, c);
    else
        int8_halves(2, steps, x, x_row, b, c);
}

/* c (rows, NR) = x (rows, steps) . a panel that is read once, widened on the way. */
static void int8_few(ptrdiff_t rows, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, int32_t *c) {
    const struct ahead near = {b, 0};
#define INT8_FEW(n, apart) \
    case n: int8_tile(n, apart, WIDENS, n == 1 ? FETCHED_NEAR : FETCHED_FAR, near, steps, x, x_row, b, c, 0); break;
    switch (rows) {
        INT8_FEW(1, 4) INT8_FEW(2, 2) INT8_FEW(3, 2) INT8_FEW(4, 1) INT8_FEW(5, 1) INT8_FEW(6, 1)
#if MR == 12
        INT8_FEW(7, 1) INT8_FEW(8, 1) INT8_FEW(9, 1) INT8_FEW(10, 1) INT8_FEW(11, 1) INT8_FEW(12, 1)
#endif
    }
}

#if ISA_AMX
enum { TILE = 16, FEWEST_TILED = 5 }; /* rows, and steps, of a tile; rows of x from which they pay */

/* What is in the tiles: sums of `upper` rows and VL columns in 0, of the next VL in 1, of `lower` rows in 2 and 3, x in 4 and 5,
 * weights in 6 and 7. */
static void use_tiles(ptrdiff_t upper, ptrdiff_t lower) {
    struct {
        uint8_t palette, start, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    const ptrdiff_t rows[8] = {upper, upper, lower, lower, upper, lower, TILE, TILE};
    for (int i = 0; i < 8; i++) tiles.rows[i] = (uint8_t)rows[i], tiles.bytes[i] = rows[i] ? 64 : 0;
    _tile_loadconfig(&tiles);
}

/* sums (upper + lower, NR) of one panel; ahead: as in int8_tile. */
INLINE void int8_square(const int has_lower, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, ptrdiff_t ahead, int32_t *c) {
    const ptrdiff_t line = NR * STEP;
    _tile_zero(0);
    _tile_zero(1);
    if (has_lower) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (ptrdiff_t s = 0; s < steps; s += TILE, x += TILE, b += TILE * line) {
        for (ptrdiff_t at = 0; ahead && at < TILE * line; at += 64) __builtin_prefetch(b + ahead + at);
        _tile_loadd(6, b, line);
        _tile_loadd(4, x, x_row * 4);
        _tile_dpbusd(0, 4, 6);
        _tile_loadd(7, b + 64, line);
        _tile_dpbusd(1, 4, 7);
        if (has_lower) {
            _tile_loadd(5, x + TILE * x_row, x_row * 4);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, c, NR * 4);
    _tile_stored(1, c + VL, NR * 4);
    if (has_lower) {
        _tile_stored(2, c + TILE * NR, NR * 4);
        _tile_stored(3, c + TILE * NR + VL, NR * 4);
    }
}

/* c (panels, m, NR) = x (m, steps) . panels, steps a multiple of TILE. The panel that follows is fetched meanwhile. */
static void int8_tiled(ptrdiff_t m, ptrdiff_t panels, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, ptrdiff_t b_panel,
                       int32_t *c) {
    const ptrdiff_t whole = m / (2 * TILE) * (2 * TILE), rest = m - whole, upper = min_size(rest, TILE), lower = rest - upper;
    if (whole) use_tiles(TILE, TILE);
    for (ptrdiff_t j = 0; whole && j < panels; j++)
        for (ptrdiff_t i = 0; i < whole; i += 2 * TILE)
            int8_square(1, steps, x + i * x_row, x_row, b + j * b_panel, i == 0 && j + 1 < panels ? b_panel : 0, c + (j * m + i) * NR);
    if (rest) use_tiles(upper, lower);
    for (ptrdiff_t j = 0; rest && j < panels; j++) {
        const ptrdiff_t ahead = !whole && j + 1 < panels ? b_panel : 0;
        if (lower)
            int8_square(1, steps, x + whole * x_row, x_row, b + j * b_panel, ahead, c + (j * m + whole) * NR);
        else
            int8_square(0, steps, x + whole * x_row, x_row, b + j * b_panel, ahead, c + (j * m + whole) * NR);
    }
    _tile_release();
}
#else
enum { TILE = 1, FEWEST_TILED = MAX_GROUP }; /* none */
INLINE void int8_tiled(ptrdiff_t m, ptrdiff_t panels, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, ptrdiff_t b_panel,
                       int32_t *c) {
    (void)m, (void)panels, (void)steps, (void)x, (void)x_row, (void)b, (void)b_panel, (void)c;
}
#endif

/* sums (m, NR) = or += the integers of one group, scaled. */
INLINE void dequantise(const int32_t *c, ptrdiff_t m, const real *x_scale, const int32_t *x_zero, ptrdiff_t groups, const real *scale,
                       const int32_t *column_sums, real *sums, int add) {
    for (ptrdiff_t j = 0; j < NR; j += VL) {
        const vec scale_j = load(scale + j);
        const ivec sum_j = *(const ivec_anywhere *)(column_sums + j);
        for (ptrdiff_t i = 0; i < m; i++) {
            ivec n = *(const ivec_anywhere *)(c + i * NR + j) - x_zero[i * groups] * sum_j;
            vec y = as_reals(n) * (x_scale[i * groups] * scale_j);
            if (add) y += load(sums + i * NR + j);
            store(sums + i * NR + j, y);
        }
    }
}

#endif
