/* Exact nearest rows by inner product.
 *
 * A score is a dot product kept in one vector: lane l adds up the products at l, l + VL, ... in ascending order, then the
 * lanes are folded onto each other. Every path does it in this order, so a score's bits depend on its query and its row
 * alone. A tile of scores is QUERY_TILE queries by 4 rows, all in registers; nothing is transposed, and rows are read where they lie
 * unless they must be widened.
 *
 * The best k of each query are kept in heaps, one for each thread: best.c. */

/* Queries in a tile of registers: QUERY_TILE sums for each of 4 rows, QUERY_TILE queries, one row. */
#define QUERY_TILE (N_REGISTERS == 32 ? 6 : 3)
enum {
    MAX_TILE = 64,      /* rows of the bank that all queries meet while they are in L1 */
    AHEAD_BYTES = 16384 /* how far ahead of a few queries the bank is fetched */
};

INLINE void offer_one(struct found here, const uint8_t *valid_m, struct found *heap_k, ptrdiff_t k) {
    if (!isnan(here.score) && !(valid_m && !valid_m[here.index])) offer(heap_k, k, here);
}

/* Rows j0.. of the bank with scores_j (rows), NaN up to a whole vector, go into the heap if they are good enough. Nearly
 * all are turned away by one comparison a vector. */
static void offer_scores(const real *scores_j, ptrdiff_t rows, ptrdiff_t j0, const uint8_t *valid_m, struct found *heap_k, ptrdiff_t k) {
    real worst = worst_of(heap_k);
    for (ptrdiff_t j = 0; j < rows; j += VL) {
        if (!any_lane(load(scores_j + j) >= worst)) continue;
        for (ptrdiff_t lane = 0; lane < VL; lane++)
            if (scores_j[j + lane] >= worst) offer_one((struct found){scores_j[j + lane], j0 + j + lane}, valid_m, heap_k, k);
        worst = worst_of(heap_k);
    }
}

INLINE ptrdiff_t element_bytes(const int kind) { return kind == MT_ROWS_REAL ? (ptrdiff_t)sizeof(real) : kind == MT_ROWS_HALF ? 2 : 1; }

/* A vector of reals from VL elements of a row, at any address. */
INLINE vec load_elements(const int kind, const char *p) {
    typedef real vec_of_bytes __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));
    if (kind == MT_ROWS_REAL) return *(const vec_of_bytes *)p;
#if !REAL_IS_DOUBLE
#if ISA_AVX512
    if (kind == MT_ROWS_HALF) return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif ISA_AVX2
    if (kind == MT_ROWS_HALF) return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    if (kind == MT_ROWS_INT8) {
        vec x;
        for (ptrdiff_t i = 0; i < VL; i++) x[i] = ((const int8_t *)p)[i];
        return x;
    }
#if defined(__aarch64__)
    __fp16 halves[VL];
    memcpy(halves, p, sizeof halves);
    vec x;
    for (ptrdiff_t i = 0; i < VL; i++) x[i] = halves[i];
    return x;
#else
    /* Exponent and fraction moved to their places, then times 2^(127 - 15): exact, denormals too. Exponent 31 is inf or NaN. */
    uint16_t halves[VL];
    memcpy(halves, p, sizeof halves);
    ivec bits = {0};
    for (ptrdiff_t i = 0; i < VL; i++) bits[i] = halves[i];
    ivec magnitude = (bits & 0x7FFF) << 13, sign = (bits & 0x8000) << 16;
    ivec x = (ivec)((vec)magnitude * 0x1p112f);
    x |= (magnitude >= 0x7C00 << 13) & 0x7F800000;
    return (vec)(x | sign);
#endif
#endif
#else
    return all(0);
#endif
}

/* One row, its elements `stride` bytes apart, as reals: to_d (d up to a whole vector), filled up with zeros. */
INLINE void widen_row(const int kind, const char *from, ptrdiff_t stride, ptrdiff_t d, real *to_d) {
    const ptrdiff_t size = element_bytes(kind);
    for (ptrdiff_t p = 0; p < d; p += VL) {
        if (stride == size && p + VL <= d) {
            store(to_d + p, load_elements(kind, from + p * size));
            continue;
        }
        char elements[VECTOR_BYTES] = {0};
        for (ptrdiff_t i = 0; i < VL && p + i < d; i++) memcpy(elements + i * size, from + (p + i) * stride, size);
        store(to_d + p, load_elements(kind, elements));
    }
}

static void widen(int kind, const char *from, ptrdiff_t stride, ptrdiff_t d, real *to_d) {
    if (kind == MT_ROWS_REAL) widen_row(MT_ROWS_REAL, from, stride, d, to_d);
    else if (kind == MT_ROWS_HALF) widen_row(MT_ROWS_HALF, from, stride, d, to_d);
    else widen_row(MT_ROWS_INT8, from, stride, d, to_d);
}

/* The lanes of four vectors folded, halves onto each other: lane i with lane i + VL/2, and so on down to one. */
INLINE void fold4(const vec *sum_r, real *out_r) {
#if ISA_AVX2 && REAL_IS_DOUBLE && !ISA_AVX512
    __m256d a = (__m256d)sum_r[0], b = (__m256d)sum_r[1], c = (__m256d)sum_r[2], e = (__m256d)sum_r[3];
    __m256d ab = _mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31));
    __m256d ce = _mm256_add_pd(_mm256_permute2f128_pd(c, e, 0x20), _mm256_permute2f128_pd(c, e, 0x31));
    __m256d acbe = _mm256_add_pd(_mm256_unpacklo_pd(ab, ce), _mm256_unpackhi_pd(ab, ce));
    _mm256_storeu_pd(out_r, _mm256_permute4x64_pd(acbe, 0xD8));
#elif (ISA_AVX2 || ISA_AVX512) && !REAL_IS_DOUBLE
    __m256 s[4];
    for (int r = 0; r < 4; r++)
#if ISA_AVX512
        s[r] = _mm256_add_ps(_mm512_castps512_ps256((__m512)sum_r[r]),
                             _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)sum_r[r]), 1)));
#else
        s[r] = (__m256)sum_r[r];
#endif
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(s[0], s[1], 0x20), _mm256_permute2f128_ps(s[0], s[1], 0x31));
    __m256 ce = _mm256_add_ps(_mm256_permute2f128_ps(s[2], s[3], 0x20), _mm256_permute2f128_ps(s[2], s[3], 0x31));
    __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ab, ce, 0x44), _mm256_shuffle_ps(ab, ce, 0xEE));
    __m256 acbe = _mm256_add_ps(_mm256_shuffle_ps(pairs, pairs, 0x88), _mm256_shuffle_ps(pairs, pairs, 0xDD));
    _mm_storeu_ps(out_r, _mm_unpacklo_ps(_mm256_castps256_ps128(acbe), _mm256_extractf128_ps(acbe, 1)));
#else
    for (int r = 0; r < 4; r++) out_r[r] = sum_lanes(sum_r[r]);
#endif
}

/* scores (n, 4; ld) = the products of n <= QUERY_TILE queries (n, d; ldq) and the four rows at row_r; d is whole vectors. A few
 * queries wait for memory alone, so as many bytes are fetched from `ahead` in step with them; NULL: none. */
INLINE void dots(const int n, const int kind, const int fetch, ptrdiff_t d, const real *q, ptrdiff_t ldq, const char *const *row_r,
                 const char *ahead, real *scores, ptrdiff_t ld) {
    const ptrdiff_t step_bytes = 4 * VL * element_bytes(kind);
    vec sum[QUERY_TILE][4];
    for (int i = 0; i < n; i++)
        for (int r = 0; r < 4; r++) sum[i][r] = all(0);
    for (ptrdiff_t p = 0; p < d; p += VL) {
        vec q_i[QUERY_TILE];
        for (ptrdiff_t line = 0; fetch && line < step_bytes; line += 64) __builtin_prefetch(ahead + p / VL * step_bytes + line);
        for (int i = 0; i < n; i++) q_i[i] = load(q + i * ldq + p);
        for (int r = 0; r < 4; r++) {
            vec x = load_elements(kind, row_r[r] + p * element_bytes(kind));
            for (int i = 0; i < n; i++) sum[i][r] += q_i[i] * x;
        }
    }
    for (int i = 0; i < n; i++) fold4(sum[i], scores + i * ld);
}

static void dots_of(ptrdiff_t n, int kind, ptrdiff_t d, const real *q, ptrdiff_t ldq, const char *const *row_r, const char *ahead,
                    real *scores, ptrdiff_t ld) {
#define DOTS(n)                                                                       \
    case n:                                                                           \
        if (ahead) dots(n, MT_ROWS_REAL, 1, d, q, ldq, row_r, ahead, scores, ld);     \
        else dots(n, MT_ROWS_REAL, 0, d, q, ldq, row_r, NULL, scores, ld);            \
        break;
#define ONE_DOT(kind) (ahead ? dots(1, kind, 1, d, q, ldq, row_r, ahead, scores, ld) : dots(1, kind, 0, d, q, ldq, row_r, NULL, scores, ld))
    if (kind == MT_ROWS_HALF) return ONE_DOT(MT_ROWS_HALF);
    if (kind == MT_ROWS_INT8) return ONE_DOT(MT_ROWS_INT8);
    switch (n) {
        DOTS(1)
        DOTS(2)
        DOTS(3)
#if N_REGISTERS == 32
        DOTS(4)
        DOTS(5)
        DOTS(6)
#endif
    }
}

/* What all pieces of a search share. */
struct search {
    const struct mt_bank *bank; /* (B, M, d) */
    ptrdiff_t m, d, ldq;        /* ldq: d up to a whole vector, a query's stride */
    ptrdiff_t tile, k;          /* rows of a tile; size of a heap */
    int in_place;               /* are rows read where they lie? */
    int *stop;                  /* of mt_stopped() */
};

/* A piece: some queries against some rows. */
struct search_piece {
    ptrdiff_t n, b, first, last; /* n queries against rows [first, last) of bank b */
    const real *q_nd;            /* (n, ldq) */
    struct found *heaps_nk;      /* (n, k), which the rows are offered to */
    real *widened;               /* room for tile * ldq reals */
    real *scores;                /* room for n * MAX_TILE reals, twice as many for codes that come twice */
};

static void search_piece(const struct search *of, const struct search_piece *piece, ptrdiff_t first, ptrdiff_t last) {
    const struct mt_bank *bank = of->bank;
    const ptrdiff_t m = of->m, d = of->d, ldq = of->ldq, tile = of->tile, k = of->k, n = piece->n, b = piece->b;
    const int in_place = of->in_place;
    const real *q_nd = piece->q_nd;
    struct found *heaps_nk = piece->heaps_nk;
    real *widened = piece->widened, *scores = piece->scores;
    const char *rows_md = (const char *)bank->rows + b * bank->stride[0];
    const uint8_t *valid_m = bank->valid ? bank->valid + b * m : NULL;
    ptrdiff_t row_bytes = d * element_bytes(bank->kind), stride = in_place ? bank->stride[1] : ldq * (ptrdiff_t)sizeof(real);
    const int kind = in_place ? bank->kind : MT_ROWS_REAL, in_step = in_place && n <= QUERY_TILE;
    for (ptrdiff_t j0 = first; j0 < last && !mt_stopped(of->stop); j0 += tile) {
        ptrdiff_t rows = min_size(tile, last - j0), whole = round_up(rows, VL);
        const char *from = rows_md + j0 * bank->stride[1], *at = from, *ahead = from + tile * bank->stride[1];
        /* 1: rows that cannot be read where they lie */
        if (!in_place) {
            for (ptrdiff_t r = 0; r < rows; r++) widen(bank->kind, from + r * bank->stride[1], bank->stride[2], d, widened + r * ldq);
            at = (const char *)widened;
        }
        /* 2: the scores; the next tile is fetched meanwhile, a few lines for every QUERY_TILE queries */
        ptrdiff_t fetched = 0, steps = div_up(n, QUERY_TILE);
        for (ptrdiff_t i = 0; i < n; i += QUERY_TILE) {
            ptrdiff_t until = tile * row_bytes * (i / QUERY_TILE + 1) / steps;
            for (; !in_step && fetched < until; fetched += 64)
                __builtin_prefetch(ahead + fetched / row_bytes * bank->stride[1] + fetched % row_bytes);
            for (ptrdiff_t r = 0; r < rows; r += 4) {
                const char *row_r[4];
                for (int s = 0; s < 4; s++) row_r[s] = at + min_size(r + s, rows - 1) * stride;
                dots_of(min_size(QUERY_TILE, n - i), kind, ldq, q_nd + i * ldq, ldq, row_r, in_step ? row_r[0] + AHEAD_BYTES : NULL,
                        scores + i * MAX_TILE + r, MAX_TILE);
            }
        }
        /* 3: into the heaps */
        real scale_j[MAX_TILE] = {0};
        if (bank->scales)
            for (ptrdiff_t r = 0; r < rows; r++) scale_j[r] = bank->scales[b * m + j0 + r];
        for (ptrdiff_t i = 0; i < n; i++) {
            real *scores_j = scores + i * MAX_TILE;
            if (bank->scales)
                for (ptrdiff_t j = 0; j < rows; j += VL) store(scores_j + j, load(scores_j + j) * load(scale_j + j));
            for (ptrdiff_t j = rows; j < whole; j++) scores_j[j] = NAN;
            offer_scores(scores_j, rows, j0, valid_m, heaps_nk + i * k, k);
        }
    }
}

#include "families/search_codes.c"

/* queries_bnd (B, N, d) and the bank (B, M, d) read; scores_bnk, index_bnk (B, N, k) written. -1: no workspace. */
static int search(const void *queries, const struct mt_bank *bank, void *scores, int64_t *index_bnk, ptrdiff_t batch, ptrdiff_t n,
                  ptrdiff_t m, ptrdiff_t d, ptrdiff_t k) {
    /* Bytes of a tile, which stays in L1 beside QUERY_TILE queries; of a group of queries, which stays in L2; of a part of the bank. */
    enum { TILE_BYTES = 1 << 14, GROUP_BYTES = 160 << 10, PART_BYTES = 1 << 20 };
    const real *queries_bnd = queries;
    real *scores_bnk = scores;
    if (!batch || !n || !k) return 0;
    const ptrdiff_t ldq = round_up(d, VL), size = element_bytes(bank->kind), rows = batch * n, kept = min_size(k, max_size(m, 1));
    real *padded_bnd = new_reals((size_t)rows * ldq);
    if (!padded_bnd) return -1;
    pack_plain(queries_bnd, d, rows, d, padded_bnd, ldq);
    struct coded_search coded;
    int failed = code_queries(&coded, bank, padded_bnd, ldq, rows, n, d);
    /* 1: the cut */
    const int in_place = d % VL == 0 && (bank->stride[2] == size || !d) && (bank->kind == MT_ROWS_REAL || n == 1);
    const ptrdiff_t tile_row = max_size(in_place ? ldq * size : ldq * (ptrdiff_t)sizeof(real), 1);
    const ptrdiff_t tile = min_size(max_size(TILE_BYTES / tile_row / 4 * 4, 4), MAX_TILE);
    ptrdiff_t group = max_size(GROUP_BYTES / max_size(ldq * (ptrdiff_t)sizeof(real), 1), 8 * QUERY_TILE);
    const ptrdiff_t groups = div_up(n, group);
    group = round_up(div_up(n, groups), QUERY_TILE);
    const ptrdiff_t read_size = coded.given ? 1 : size;
    const double work = (double)batch * m * d * (0.25 * read_size + 2.0 * n / VL);
    int team = mt_team(1 << 20, work);
    ptrdiff_t part = round_up(max_size(min_size(PART_BYTES / max_size(d * read_size, 1), div_up(m, 4 * team)), 1), tile);
    if (team == 1 || batch * groups >= 8 * team || k > m / 8) part = round_up(max_size(m, 1), tile);
    const ptrdiff_t parts = max_size(div_up(m, part), 1), pieces = batch * parts * groups;
    team = mt_team(pieces, work);
    const ptrdiff_t slots = parts > 1 ? team : 1; /* heaps a query: with one part there is one thread that has it */
    /* a thread's room: scores, rows widened, codes of rows that come without */
    const size_t widened_at = (size_t)group * (1 + coded.twice) * MAX_TILE, codes_at = widened_at + (size_t)(in_place ? 0 : tile * ldq);
    const size_t room = codes_at + (coded.given ? 0 : div_up(coded.tile * coded.n_codes, sizeof(real)));
    real *workspace = new_reals(room * team);
    struct found *heaps = malloc((size_t)slots * rows * kept * sizeof *heaps); /* (slots, B, N, kept) */
    ptrdiff_t *heads = calloc((size_t)rows * slots, sizeof *heads);            /* (B, N, slots): taken so far of each */
    failed = failed || !workspace || !heaps || !heads;
    if (failed) goto done;
    nothing_found(heaps, slots * rows * kept);
    int stop = 0;
    const struct search of = {bank, m, d, ldq, tile, kept, in_place, &stop};
    /* 2: every part of the bank with every group of queries; the groups of one part follow each other, so it is still in L3 */
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t b = piece / (parts * groups), at = piece / groups % parts, i0 = piece % groups * group;
        ptrdiff_t slot = slots > 1 ? mt_thread_id() : 0, row = b * n + i0;
        real *mine = workspace + room * mt_thread_id();
        if (i0 >= n || mt_stopped(&stop)) continue;
        const struct search_piece one = {
            min_size(group, n - i0), b, at * part, min_size(m, (at + 1) * part), padded_bnd + row * ldq,
            heaps + (slot * rows + row) * kept, mine + widened_at, mine,
        };
        if (coded.tile) search_coded_piece(&coded, &of, &one, row, (uint8_t *)(mine + codes_at));
        else search_piece(&of, &one, one.first, one.last);
    }
    /* 3: of all threads' heaps */
#pragma omp parallel for num_threads(mt_team(rows, 20.0 * rows * slots * kept)) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++)
        take_best(heaps + row * kept, slots, rows * kept, kept, heads + row * slots, k, scores_bnk + row * k, index_bnk + row * k);
    failed = stop ? MT_STOPPED : 0;
done:
    free(coded.codes_nd);
    free(coded.coded_n);
    free(workspace);
    free(padded_bnd);
    free(heaps);
    free(heads);
    return failed == MT_STOPPED ? MT_STOPPED : failed ? -1 : 0;
}
