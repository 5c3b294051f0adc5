/* What the ways through attention share: a head, a tile of its keys and values, the scores of a row, their exponentials.
 *
 * The keys of a block are cut into tiles of KEYS at multiples of KEYS, whatever the queries are. What a tile gives one query,
 *
 *     m = ceil(max_j s_j)    p_j = 2^(s_j - m)    l = sum_j p_j    o = sum_j p_j v_j
 *
 * depends on that query and the tile alone, and the tiles of all blocks are merged in their order: m is a whole number, so the
 * factors that bring tiles under one m are powers of two and round nothing. Every chain of additions
 * is in ascending order of d or of keys, and a hidden key adds an exact zero. So it does not matter to the bits of a query
 * which path computes a tile, which queries it is computed with, or which thread does it.
 *
 * Scores are in units of the binary logarithm: 1 / ln 2 is part of the scale that queries are multiplied with. */

/* Keys of a tile; queries whose scores against it stay near: whole strips and whole vectors. The wider a tile, the rarer a merge,
 * and 256 keys are 1 to 5 % faster than 128. Rows of scores lie SCORES_LD apart: at a power of two the first halves of all rows would
 * share a half of L1. */
enum { KEYS = 256, SCORES_LD = KEYS + NR, ROWS = VL == 16 ? 48 : 24, ROWS_AHEAD = 4 };
_Static_assert(ROWS % MR == 0 && ROWS % VL == 0 && KEYS % (4 * VL) == 0, "ROWS and KEYS are cut into strips and vectors");

#define LOG2_E 1.44269504088896340736
#define LN_2 0.69314718055994530942

/* One head of one batch row reading one block. */
struct head {
    const struct mt_block *block;
    const real *k_sd, *v_sd; /* (S, D), rows k_ld and v_ld apart, unless they are to be gathered */
    const int64_t *owners_s; /* (S,) or NULL */
    const uint8_t *valid_s;  /* (S,) or NULL */
    const int64_t *index_tk; /* (T, K) or NULL */
    const real *bias;        /* of query 0 and key 0, or NULL; strides in block->bias_stride */
    double cap;              /* of scores, in units of log 2, or 0 */
    ptrdiff_t end;           /* rows from here on are hidden: S or the row's length */
    ptrdiff_t k_ld, v_ld, b, kv, d;
};

static struct head head_of(const struct mt_block *block, const struct mt_attention_sizes *sizes, ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t kv = h / (sizes->heads / block->kv_heads);
    return (struct head){
        .block = block,
        .k_sd = head_rows(&block->k, b, kv),
        .v_sd = head_rows(&block->v, b, kv),
        .k_ld = block->k.stride[2],
        .v_ld = block->v.stride[2],
        .owners_s = block->owners ? block->owners + b * block->owners_ld : NULL,
        .valid_s = block->valid ? block->valid + b * block->source : NULL,
        .index_tk = block->index ? block->index + (b * sizes->heads + h) * sizes->length * block->width : NULL,
        .bias = block->bias ? (const real *)block->bias + b * block->bias_stride[0] + h * block->bias_stride[1] : NULL,
        .cap = sizes->cap * LOG2_E,
        .end = block->lengths ? block->lengths[b] : block->source,
        .b = b,
        .kv = kv,
        .d = sizes->d,
    };
}

/* Query i sees rows [first, last) at most. Both ends grow with i. */
INLINE ptrdiff_t first_seen(const struct head *head, ptrdiff_t i) {
    return head->block->window ? max_size(0, i + head->block->offset - head->block->window + 1) : 0;
}

INLINE ptrdiff_t last_seen(const struct head *head, ptrdiff_t i) {
    const struct mt_block *block = head->block;
    if (block->causal) return min_size(head->end, max_size(block->prefix, i + block->offset + 1));
    return block->window ? min_size(head->end, i + block->offset + block->window) : head->end;
}

/* Bytes of a number that is kept in an mt_kept. */
INLINE ptrdiff_t kept_bytes(const int kept) {
    return kept == MT_KEPT_INT8 ? 1 : kept == MT_KEPT_BFLOAT16 ? (ptrdiff_t)sizeof(uint16_t) : (ptrdiff_t)sizeof(real);
}

/* Row j of a head's keys or values, of `size` bytes a number. */
INLINE const void *row_of(const struct head *head, const struct mt_rows *x, ptrdiff_t j, ptrdiff_t size) {
    ptrdiff_t b = head->owners_s ? head->owners_s[j] : head->b;
    return (const char *)x->at + (b * x->stride[0] + head->kv * x->stride[1] + j * x->stride[2]) * size;
}

/* to (d,) = from (d,) int8, without their scale. */
INLINE void widen_int8(const int8_t *from, ptrdiff_t d, real *to) {
    ptrdiff_t p = 0;
    for (; p + VL <= d; p += VL) store(to + p, load_elements(MT_ROWS_INT8, (const char *)from + p));
    for (; p < d; p++) to[p] = from[p];
}

/* to (n, D) = rows [at, at + n) of a head's keys or values as reals, from wherever they lie; of int8 without their scales. */
static void gather_rows(const struct head *head, const struct mt_rows *x, ptrdiff_t at, ptrdiff_t n, ptrdiff_t d, real *to) {
    const int kept = head->block->kept;
    for (ptrdiff_t j = at; j < at + n; j++, to += d) {
        const void *row = row_of(head, x, j, kept_bytes(kept));
        if (kept == MT_KEPT_INT8)
            widen_int8(row, d, to);
        else if (kept == MT_KEPT_BFLOAT16)
            widen_bfloat16(row, d, to);
        else
            memcpy(to, row, d * sizeof(real));
    }
}

/* The scales of those rows in scale_j (KEYS,), those behind them up to a whole vector that of the last; NULL where they have none. */
static const real *gather_scales(const struct head *head, const struct mt_rows *x, ptrdiff_t at, ptrdiff_t n, real *scale_j) {
    if (head->block->kept != MT_KEPT_INT8) return NULL;
    for (ptrdiff_t j = 0; j < round_up(n, VL); j++) {
        float scale;
        memcpy(&scale, (const char *)row_of(head, x, at + min_size(j, n - 1), 1) + head->d, sizeof scale);
        scale_j[j] = scale;
    }
    return scale_j;
}

/* Scores that exist, at most; for judging the work. */
static double attention_scores(const struct mt_block *blocks, const struct mt_attention_sizes *sizes) {
    double scores = 0;
    for (ptrdiff_t at = 0; at < sizes->n_blocks; at++) scores += (double)blocks[at].width;
    return scores * sizes->batch * sizes->heads * sizes->length;
}

/* Cuts workspace into parts of these sizes, each on cache lines of its own. Returns the reals it takes; work may be NULL then. */
static size_t share_out(real *work, const ptrdiff_t *sizes, size_t n, real **at) {
    size_t total = 0;
    for (size_t i = 0; i < n; i++) {
        at[i] = work ? work + total : NULL;
        total += round_up(sizes[i], 16);
    }
    return total;
}

/* ---- the micro-kernel of tiles ---- */

/* sum_ij += a_ik b_kj: rows x vectors, constants wherever this is inlined. Element (i, p) of a is a[i * a_row + p * a_col]; b is
 * a panel, its rows NR apart. */
INLINE void panel_product(const int rows, const int vectors, ptrdiff_t k, const real *a, const ptrdiff_t a_row, const ptrdiff_t a_col,
                          const real *b, vec sum[MR][2]) {
#pragma GCC unroll 4
    for (ptrdiff_t p = 0; p < k; p++) {
        vec b_j[2];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) b_j[j] = load(b + p * NR + j * VL);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int j = 0; j < vectors; j++) sum[i][j] += a[i * a_row + p * a_col] * b_j[j];
    }
}

/* c (rows, vectors * VL; ldc) = a b, or goes on from what c holds. */
INLINE void panel_to(const int rows, const int vectors, ptrdiff_t k, const real *a, const ptrdiff_t a_row, const ptrdiff_t a_col,
                     const real *b, real *c, ptrdiff_t ldc, const int add) {
    vec sum[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? load(c + i * ldc + j * VL) : all(0);
    panel_product(rows, vectors, k, a, a_row, a_col, b, sum);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) store(c + i * ldc + j * VL, sum[i][j]);
}

/* Strips come in three heights, with rows of whatever is in memory up to the next. */
#define STRIP_STEP (MR / 3)
#define FOR_STRIP(rows, call)                  \
    do {                                       \
        if ((rows) > 2 * STRIP_STEP)           \
            call(MR);                          \
        else if ((rows) > STRIP_STEP)          \
            call(2 * STRIP_STEP);              \
        else                                   \
            call(STRIP_STEP);                  \
    } while (0)

/* s_ij (rows, SCORES_LD) = q k^T for one panel of keys, strip after strip; q_di (strips, D, MR). */
static void scores_panel(ptrdiff_t rows, int vectors, ptrdiff_t d, const real *q_di, const real *k_dj, real *s_ij) {
#define SCORES(rows_)                                                      \
    do {                                                                   \
        if (vectors == 2)                                                  \
            panel_to(rows_, 2, d, q_di, 1, MR, k_dj, s_ij, SCORES_LD, 0);       \
        else                                                               \
            panel_to(rows_, 1, d, q_di, 1, MR, k_dj, s_ij, SCORES_LD, 0);       \
    } while (0)
    for (; rows >= MR && vectors == 2; rows -= MR, q_di += MR * d, s_ij += MR * SCORES_LD) panel_to(MR, 2, d, q_di, 1, MR, k_dj, s_ij, SCORES_LD, 0);
    for (; rows > 0; rows -= MR, q_di += MR * d, s_ij += MR * SCORES_LD) FOR_STRIP(rows, SCORES);
#undef SCORES
}

/* What a row has so far, and what a tile adds to it; shrink and grow are powers of two, so nothing is rounded by them. */
INLINE vec merged(vec so_far, vec shrink, vec of_tile, vec grow) { return so_far * shrink + of_tile * grow; }

/* ---- tiles ---- */

/* Up to KEYS keys and values, packed for the micro-kernel. */
struct tile {
    ptrdiff_t at, n;     /* keys [at, at + n) */
    const real *k_t;     /* (KEYS / NR, D, NR) */
    const real *v;       /* (d_room / NR, KEYS, NR), zeros beyond D; rows from n on are not read */
    const lane *shown_j; /* (KEYS,) all ones or zero, or NULL: all shown */
    const real *k_scale_j, *v_scale_j; /* (KEYS,), by which its keys and values are to be multiplied, or NULL */
    int v_is_finite;
};

/* to (panels, D, NR) = from (n, D; ld) transposed; keys from n up to a multiple of NR are zeros. */
static void pack_keys(const real *from, ptrdiff_t ld, ptrdiff_t n, ptrdiff_t d, real *to) {
    for (ptrdiff_t j = 0; j < n; j += NR) pack_transposed(from + j * ld, ld, min_size(NR, n - j), d, to + j * d, NR, NR);
}

/* to (panels, rows_room, NR) = from (n, D; ld), zeros beyond D. Are all of them finite? x - x is NaN where not. */
static int pack_values(const real *from, ptrdiff_t ld, ptrdiff_t n, ptrdiff_t d, real *to, ptrdiff_t rows_room) {
    vec bad0 = all(0), bad1 = all(0);
    for (ptrdiff_t j = 0; j < n; j++, from += ld) { /* in the order of memory */
        ptrdiff_t c = 0;
        for (; c + NR <= d; c += NR) {
            vec x0 = load(from + c), x1 = load(from + c + VL);
            store(to + c * rows_room + j * NR, x0);
            store(to + c * rows_room + j * NR + VL, x1);
            bad0 += x0 - x0;
            bad1 += x1 - x1;
        }
        for (ptrdiff_t l = 0; l < NR && c < d; l++) {
            real x = c + l < d ? from[c + l] : 0;
            to[c * rows_room + j * NR + l] = x;
            bad0[0] += x - x;
        }
    }
    bad0 += bad1;
    return !any_lane(bad0 != bad0);
}

/* The VL vectors of a square become its columns. */
INLINE void transpose_vectors(vec x[VL]) {
#if ISA_AVX2 && !REAL_IS_DOUBLE
    vec y[8];
    for (int i = 0; i < 4; i++) {
        y[2 * i] = (vec)_mm256_unpacklo_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
        y[2 * i + 1] = (vec)_mm256_unpackhi_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        x[4 * i] = (vec)_mm256_shuffle_ps((__m256)y[4 * i], (__m256)y[4 * i + 2], 0x44);
        x[4 * i + 1] = (vec)_mm256_shuffle_ps((__m256)y[4 * i], (__m256)y[4 * i + 2], 0xEE);
        x[4 * i + 2] = (vec)_mm256_shuffle_ps((__m256)y[4 * i + 1], (__m256)y[4 * i + 3], 0x44);
        x[4 * i + 3] = (vec)_mm256_shuffle_ps((__m256)y[4 * i + 1], (__m256)y[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = (vec)_mm256_permute2f128_ps((__m256)x[i], (__m256)x[i + 4], 0x20);
        y[i + 4] = (vec)_mm256_permute2f128_ps((__m256)x[i], (__m256)x[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) x[i] = y[i];
#elif ISA_AVX512 && !REAL_IS_DOUBLE
    /* Quarters first, so that those of one number are together, row i, i + 4, i + 8, i + 12; then within them. */
    vec r[4][4];
    for (int i = 0; i < 4; i++) {
        vec a = x[i], b = x[i + 4], c = x[i + 8], d = x[i + 12];
        vec low = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        vec high = SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        vec low_too = SHUFFLE(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        vec high_too = SHUFFLE(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        r[0][i] = SHUFFLE(low, low_too, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        r[1][i] = SHUFFLE(low, low_too, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        r[2][i] = SHUFFLE(high, high_too, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        r[3][i] = SHUFFLE(high, high_too, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int quarter = 0; quarter < 4; quarter++) {
        vec s[4];
        for (int pair = 0; pair < 2; pair++) {
            vec a = r[quarter][2 * pair], b = r[quarter][2 * pair + 1];
            s[2 * pair] = SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
            s[2 * pair + 1] = SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        }
        x[4 * quarter] = SHUFFLE(s[0], s[2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[4 * quarter + 1] = SHUFFLE(s[0], s[2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        x[4 * quarter + 2] = SHUFFLE(s[1], s[3], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        x[4 * quarter + 3] = SHUFFLE(s[1], s[3], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#else
    real rows[VL * VL], columns[VL * VL];
    for (ptrdiff_t i = 0; i < VL; i++) store(rows + i * VL, x[i]);
    transpose_square(rows, VL, columns, VL);
    for (ptrdiff_t i = 0; i < VL; i++) x[i] = load(columns + i * VL);
#endif
}

/* to (strips, D, MR) = factor * from (rows, D; ld) in strips of MR rows; rows past the last are zeros. A column is written as whole
 * vectors: what they spill over it is written again with the next one, after the last there must be room for it. */
static void pack_queries(const real *from, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t d, real factor, real *to) {
    enum { SQUARES = (MR * sizeof(real) + VECTOR_BYTES - 1) / VECTOR_BYTES };
    for (ptrdiff_t i = 0; i < rows; i += MR, from += MR * ld, to += MR * d) {
        ptrdiff_t n = min_size(MR, rows - i), p = 0;
        for (; p + VL <= d; p += VL) {
            vec x[SQUARES][VL];
            for (ptrdiff_t g = 0; g < SQUARES; g++) {
                for (ptrdiff_t r = 0; r < VL; r++) x[g][r] = g * VL + r < n ? load(from + (g * VL + r) * ld + p) * factor : all(0);
                transpose_vectors(x[g]);
            }
            for (ptrdiff_t l = 0; l < VL; l++)
                for (ptrdiff_t g = 0; g < SQUARES; g++) store(to + (p + l) * MR + g * VL, x[g][l]);
        }
        for (; p < d; p++)
            for (ptrdiff_t r = 0; r < MR; r++) to[p * MR + r] = r < n ? from[r * ld + p] * factor : 0;
    }
}

/* shown_j (KEYS,) of rows [at, at + n) of the head's bank. */
static const lane *fill_shown(const struct head *head, ptrdiff_t at, ptrdiff_t n, lane *shown_j) {
    if (!head->valid_s) return NULL;
    for (ptrdiff_t j = 0; j < round_up(n, 4 * VL); j++) shown_j[j] = j < n && head->valid_s[at + j] ? -1 : 0;
    return shown_j;
}

/* Which columns of a tile a strip of rows reads: [lo, hi), lo the beginning of a panel. */
struct span {
    ptrdiff_t lo, hi;
};

static struct span strip_span(const struct head *head, const struct tile *tile, ptrdiff_t i0, ptrdiff_t i1) {
    ptrdiff_t lo = max_size(0, first_seen(head, i0) - tile->at), hi = min_size(tile->n, last_seen(head, i1 - 1) - tile->at);
    return lo < hi ? (struct span){lo / NR * NR, hi} : (struct span){0, 0};
}

/* s_ij (rows, SCORES_LD) = q k^T, each strip of queries over its span. */
static void rows_scores(ptrdiff_t rows, const struct span *spans, ptrdiff_t d, const real *q_di, const real *k_t, real *s_ij) {
    ptrdiff_t lo = KEYS, hi = 0, strips = div_up(rows, MR);
    for (ptrdiff_t strip = 0; strip < strips; strip++) {
        if (spans[strip].lo == spans[strip].hi) continue;
        lo = min_size(lo, spans[strip].lo);
        hi = max_size(hi, spans[strip].hi);
    }
    for (ptrdiff_t j = lo; j < hi; j += NR) { /* a panel of keys stays in L1 while the strips of queries go by */
        ptrdiff_t from = 0, to = strips;
        while (from < to && spans[from].hi <= j) from++;
        while (from < to && spans[to - 1].lo > j) to--;
        scores_panel(min_size(to * MR, rows) - from * MR, hi - j > VL ? 2 : 1, d, q_di + from * MR * d, k_t + j * d, s_ij + from * MR * SCORES_LD + j);
    }
}

/* ---- rows of scores ---- */

/* A score and its bias, in units of log 2. A bias of -inf hides the key whatever the score: NaN + -inf would be NaN. */
INLINE vec biased(vec s, vec bias) { return choose(bias == all(-INFINITY), bias, s + bias * (real)LOG2_E); }

/* Scores [lo, hi) of one row, lo and the room after hi whole vectors: the bias is added, and -inf stands where a key is not in
 * [first, last) or not shown. Returns the maximum, NaN passed over. */
static real row_scores(real *s_j, ptrdiff_t lo, ptrdiff_t hi, const real *bias_j, ptrdiff_t bias_stride, ptrdiff_t first, ptrdiff_t last,
                       const lane *shown_j) {
    ivec lanes = lane_numbers();
    vec top = all(-INFINITY);
    for (ptrdiff_t j = lo; j < hi; j += VL) {
        vec s = load(s_j + j);
        if (bias_j && bias_stride == 1 && j + VL <= hi) {
            s = biased(s, load(bias_j + j));
        } else if (bias_j) {
            real bias[VL];
            for (ptrdiff_t l = 0; l < VL; l++) bias[l] = j + l < hi ? bias_j[(j + l) * bias_stride] : 0;
            s = biased(s, load(bias));
        }
        if (j < first || j + VL > last) {
            ivec key = lanes + (lane)j;
            s = choose((key >= (lane)first) & (key < (lane)last), s, all(-INFINITY));
        }
        if (shown_j) {
            ivec shown;
            memcpy(&shown, shown_j + j, sizeof shown);
            s = choose(shown, s, all(-INFINITY));
        }
        top = max_vec(s, top);
        store(s_j + j, s);
    }
    return max_lanes(top);
}

/* The same for n scores, pairs of vectors, of which all are seen, bias_j NULL or of stride 1: the loop that the time goes into. */
INLINE real row_scores_plain(real *s_j, ptrdiff_t n, const real *bias_j) {
    vec top[2] = {all(-INFINITY), all(-INFINITY)};
    for (ptrdiff_t j = 0; j < n; j += 2 * VL)
        for (int l = 0; l < 2; l++) {
            vec s = load(s_j + j + l * VL);
            if (bias_j) {
                s = biased(s, load(bias_j + j + l * VL));
                store(s_j + j + l * VL, s);
            }
            top[l] = max_vec(s, top[l]);
        }
    return max_lanes(max_vec(top[0], top[1]));
}

/* Brings KEYS elements of a row that will soon be read, or written, near: rows lie too far apart for the processor to foresee. */
INLINE void fetch_row(const real *row_j, const int written) {
    for (ptrdiff_t j = 0; j < KEYS; j += LINE) __builtin_prefetch(row_j + j, written);
}

/* Which of a tile's keys a query sees, and its bias there. */
struct row_view {
    ptrdiff_t first, last; /* keys [first, last) of the tile, as far as shown_j says */
    const real *bias_j;    /* or NULL */
    ptrdiff_t bias_stride;
};

INLINE struct row_view view_of_row(const struct head *head, const struct tile *tile, ptrdiff_t i) {
    struct row_view view = {.last = tile->n, .bias_stride = head->block->bias_stride[3]};
    if (!head->index_tk) {
        view.first = max_size(0, first_seen(head, i) - tile->at);
        view.last = min_size(view.last, last_seen(head, i) - tile->at);
    }
    if (head->bias) {
        view.bias_j = head->bias + i * head->block->bias_stride[2] + tile->at * view.bias_stride;
        if (view.bias_stride == 1 && head->block->bias_stride[2] >= KEYS) fetch_row(view.bias_j + ROWS_AHEAD * head->block->bias_stride[2], 0);
    }
    return view;
}

INLINE int sees_whole_tile(const struct row_view *view, const struct tile *tile) {
    return view->first <= 0 && view->last == tile->n && tile->n % (2 * VL) == 0 && !tile->shown_j;
}

INLINE vec tanh_vec(vec x) {
#if REAL_IS_DOUBLE
    for (ptrdiff_t i = 0; i < VL; i++) x[i] = tanh(x[i]);
    return x;
#else
    vec size = choose(x < 0, -x, x), e = exp_vec(-2 * size), far = (1 - e) / (1 + e), s = x * x;
    vec near = size * ((((s * (62 / 2835.0f) - 17 / 315.0f) * s + 2 / 15.0f) * s - 1 / 3.0f) * s + 1); /* where 1 - e would cancel */
    vec t = choose(size < 0.25f, near, far);
    return choose(x < 0, -t, t);
#endif
}

/* s_j [lo, hi) become cap tanh(s / cap); slope_j, if not NULL, its slope there. */
static void cap_scores(real *s_j, ptrdiff_t lo, ptrdiff_t hi, real cap, real *slope_j) {
    for (ptrdiff_t j = lo; j < hi; j += VL) {
        vec t = tanh_vec(load(s_j + j) / cap);
        store(s_j + j, t * cap);
        if (slope_j) store(slope_j + j, (1 - t) * (1 + t));
    }
}

/* Query i's scores [lo, hi) against the tile, s_j as they come from the product: scaled, capped, masked, biased. Returns their
 * maximum. */
static real finish_scores(const struct head *head, const struct tile *tile, ptrdiff_t i, ptrdiff_t lo, ptrdiff_t hi, real *s_j) {
    if (tile->k_scale_j)
        for (ptrdiff_t j = lo; j < hi; j += VL) store(s_j + j, load(s_j + j) * load(tile->k_scale_j + j));
    if (head->cap != 0) cap_scores(s_j, lo, hi, (real)head->cap, NULL);
    struct row_view view = view_of_row(head, tile, i);
    if (!sees_whole_tile(&view, tile) || (view.bias_j && view.bias_stride != 1))
        return row_scores(s_j, lo, hi, view.bias_j, view.bias_stride, view.first, view.last, tile->shown_j);
    return view.bias_j ? row_scores_plain(s_j, hi, view.bias_j) : row_scores_plain(s_j, hi, NULL);
}

#if REAL_IS_DOUBLE
#define MAGIC (0x1.8p52 + BIAS)
#define MOST_EXACT 0x1p40
#else
#define MAGIC (0x1.8p23f + BIAS)
#define MOST_EXACT 0x1p20f
#endif

/* 2^(s - shift) for s <= shift, a whole number of at most MOST_EXACT. Adding MAGIC - shift = 1.5 * 2^MANTISSA + BIAS - shift rounds
 * s to the whole number n and leaves n - shift + BIAS in the low bits, which moved up are 2^(n - shift); from BIAS powers below
 * the shift on that is 0, so that 2^-inf is an exact 0 and no denormal slows down what follows. NaN stays NaN. The polynomial is
 * 2^(s - n) within 9.4e-8 relative. */
INLINE vec exp2_below(vec s, vec lowest, vec magic) {
    s = max_vec(lowest, s);
    vec shifted = s + magic;
    vec r = s - (shifted - magic);
    vec power = (vec)((ivec)shifted << MANTISSA);
#if REAL_IS_DOUBLE
    r *= LN_2; /* Taylor to r^13, as in simd.h */
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
    p = p * r + 1.0;
#else
    vec p = r * 0x1.5bdb78p-10f + 0x1.3ce984p-7f;
    p = p * r + 0x1.c6b6d8p-5f;
    p = p * r + 0x1.ebf9c0p-3f;
    p = p * r + 0x1.62e42ap-1f;
#endif
    return (p * r + 1) * power;
}

/* 2^x for whole x <= 0 or -inf: a power of two, or 0. */
INLINE vec power_of_two(vec x) { return (vec)((ivec)(max_vec(all(-BIAS), x) + MAGIC) << MANTISSA); }

/* The shift m of a row from the maximum of its scores: 0 where nothing is seen, for -inf - -inf would be NaN. */
INLINE real row_shift_of(real top) { return top == -INFINITY ? 0 : (real)ceil(top); }

/* s_j [lo, hi) become 2^(s_j - shift); returns their sum. Not inlined: every path is to run the same instructions. */
static __attribute__((noinline)) real row_weights(real *s_j, ptrdiff_t lo, ptrdiff_t hi, real shift) {
    if (!(shift <= MOST_EXACT && shift >= -MOST_EXACT)) {
        for (ptrdiff_t j = lo; j < hi; j += VL) store(s_j + j, load(s_j + j) - shift);
        shift = 0;
    }
    vec total = all(0), lowest = all(shift - BIAS), magic = all(MAGIC - shift);
#pragma GCC unroll 4
    for (ptrdiff_t j = lo; j < hi; j += VL) {
        vec p = exp2_below(load(s_j + j), lowest, magic);
        store(s_j + j, p);
        total += p;
    }
    return sum_lanes(total);
}

/* p_j [lo, hi) are multiplied by the scales of the tile's values, if they have any: what sums of weights are not. A weight of zero stays
 * one, beside a scale of NaN, too. */
static void scale_weights(const struct tile *tile, ptrdiff_t lo, ptrdiff_t hi, real *p_j) {
    if (!tile->v_scale_j) return;
    for (ptrdiff_t j = lo; j < hi; j += VL) {
        vec p = load(p_j + j);
        store(p_j + j, choose(p == all(0), p, p * load(tile->v_scale_j + j)));
    }
}

/* out_d and lse, or NULL, in double for both reals, of a row from what all tiles gave. */
static void finish_row(const struct mt_attention_sizes *sizes, real top, real total, const real *o_d, real *out_d, double *lse) {
    real share = total == 0 ? 0 : (real)(1 / (total * (1 - sizes->dropout))); /* 0: the query sees no key */
    ptrdiff_t c = 0;
    for (; c + VL <= sizes->d; c += VL) store(out_d + c, load(o_d + c) * share);
    for (; c < sizes->d; c++) out_d[c] = o_d[c] * share;
    if (lse) *lse = total == 0 ? -INFINITY : top * LN_2 + log(total);
}

/* ---- dropout ---- */

/* Is weight j of a row kept? A hash of (seed, block, row, j): the backward draws it again. A row has two 32-bit keys. */
struct draw {
    uint32_t low, high, threshold;
};

INLINE struct draw draw_of_row(const struct mt_attention_sizes *sizes, ptrdiff_t at_block, ptrdiff_t row) {
    uint64_t key = mix64(mix64(sizes->seed + (uint64_t)at_block * 0x9E3779B97F4A7C15u) + (uint64_t)row * 0xD1B54A32D192ED03u);
    return (struct draw){(uint32_t)key, (uint32_t)(key >> 32), (uint32_t)(sizes->dropout * 4294967296.0)};
}

/* kept_j [lo, hi): all ones or zero, of the row's elements at + j. */
static void row_kept(struct draw draw, ptrdiff_t at, ptrdiff_t lo, ptrdiff_t hi, lane *restrict kept_j) {
    for (ptrdiff_t j = lo; j < hi; j++) kept_j[j] = drawn((uint32_t)(at + j), draw.low, draw.high) >= draw.threshold ? -1 : 0;
}

/* p_j [lo, hi): zero where not kept. The rest is scaled by 1 / (1 - dropout) later, once a row. */
static void row_drop(struct draw draw, ptrdiff_t at, ptrdiff_t lo, ptrdiff_t hi, real *p_j) {
    lane kept_j[KEYS];
    row_kept(draw, at, lo, round_up(hi, VL), kept_j);
    for (ptrdiff_t j = lo; j < hi; j += VL) {
        ivec kept;
        memcpy(&kept, kept_j + j, sizeof kept);
        store(p_j + j, (vec)((ivec)load(p_j + j) & kept));
    }
}
