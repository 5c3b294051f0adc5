/* Rows that cannot be among the best, told by small integers: a product of those costs a fraction of one of floats, and to
 * read them a fourth.
 *
 * A query q becomes codes of -31 to 31 times a step, a row r codes of a byte times another; e_q and e_r are what that leaves
 * out. Since <q, r> = <q - e_q, r - e_r> + <e_q, r> + <q - e_q, e_r>, the score is at most
 *
 *     steps * <codes, codes> + |e_q| |r| + |q - e_q| |e_r|
 *
 * and a row whose bound, with a margin for every rounding, is below the worst of a full heap is passed over. The others get
 * their score from the very function that scores without this, so nothing of a result depends on it.
 *
 * The codes of rows are made here, a tile at a time, which many queries are worth; or they come with the bank, made once by
 * reference/search.py, and pay for one query. A row of theirs is n_codes bytes and a `struct code_tail`. While queries are so
 * few that reading is what takes the time, what a query's codes leave out is coded a second time: a closer bound. */

struct coded_query {
    real step, low_step;         /* of its codes, and of those of what these leave out */
    real margin, length;         /* margin of |r|: |e_q| and the roundings; length: a bound of |q - e_q|; NaN: not coded */
    int32_t offset, low_offset;  /* 128 * the sum of codes, as a row's codes are stored plus 128 */
};

struct coded_search { /* of all queries */
    ptrdiff_t n_codes, tile; /* codes a row; rows a tile, 0: not worth it */
    int twice;               /* whether queries are coded twice */
    const uint8_t *given;    /* the rows' codes that came with the bank; NULL: they are made here */
    int8_t *codes_nd;        /* (queries, 1 + twice, n_codes) */
    struct coded_query *coded_n;
};

struct code_tail {
    float step, length, error, unused; /* |r| and |e_r|: bounds from above; error NaN: not coded */
};

#if !REAL_IS_DOUBLE && (ISA_AVX2 || (ISA_AVX512 && defined(__AVX512BW__)))
#if ISA_AVX512
typedef __m512i codes;
#define OF_CODES(name) _mm512_##name
#define LOAD_CODES(p) _mm512_loadu_si512((const void *)(p))
#else
typedef __m256i codes;
#define OF_CODES(name) _mm256_##name
#define LOAD_CODES(p) _mm256_loadu_si256((const __m256i *)(p))
#endif

enum {
    CODE_STEP = 64,     /* codes are filled up with zeros to a multiple of this, for every instruction set */
    TWICE_UP_TO = 2,  /* queries */
    GIVEN_BELOW = 24  /* queries: more of them ask for so many rows, which are in no cache, that to code every row is quicker */
};

/* Lengths of vectors whose elements lie outside are not to be trusted: squares underflow or scores overflow. */
#define SMALLEST_CODED 1e-10f
#define LARGEST_CODED 1e15f

struct coded_rows { /* of a tile */
    real step[MAX_TILE], length[MAX_TILE], error[MAX_TILE]; /* |r| and |e_r|, bounds */
};

INLINE real largest_of(const real *x_d, ptrdiff_t d) {
    vec top = all(0);
    for (ptrdiff_t p = 0; p < d; p += VL) {
        vec x = load(x_d + p);
        top = max_vec(max_vec(x, -x), top);
    }
    return max_lanes(top);
}

/* A bound of a length from a sum of squares: 1.001 is more than the roundings of d <= MAX_CODED additions. */
INLINE real length_of(vec squares) { return sqrtf(sum_lanes(squares)) * 1.001f; }

enum { MAX_CODED = 8192 };

/* VL codes of x, which is made what they leave out; their sum. */
INLINE int32_t take_codes(vec *x, real step, real inverse, int8_t *codes_p) {
    const real magic = 0x1.8p23f;
    vec shifted = *x * inverse + magic;
    ivec whole = (ivec)shifted - (ivec)all(magic); /* by its bits, for a NaN is no integer */
    int32_t total = 0;
    for (ptrdiff_t i = 0; i < VL; i++) total += codes_p[i] = (int8_t)whole[i];
    *x -= (shifted - magic) * step;
    return total;
}

/* q_d (d, whole vectors) read, codes_d (1 + twice, n_codes) written. */
static struct coded_query code_query(const real *q_d, ptrdiff_t d, int twice, int8_t *codes_d, ptrdiff_t n_codes) {
    const real top = largest_of(q_d, d), step = top / 31, low_step = step / 62; /* half a step at most is left out */
    memset(codes_d, 0, (size_t)(1 + twice) * n_codes);
    if (!(top > SMALLEST_CODED && top < LARGEST_CODED)) return (struct coded_query){NAN, NAN, NAN, NAN, 0, 0};
    vec squares = all(0), errors = all(0);
    int32_t total = 0, low_total = 0;
    for (ptrdiff_t p = 0; p < d; p += VL) {
        vec x = load(q_d + p);
        squares += x * x;
        total += take_codes(&x, step, 31 / top, codes_d + p);
        if (twice) low_total += take_codes(&x, low_step, 62 * 31 / top, codes_d + n_codes + p);
        errors += x * x;
    }
    real length = length_of(squares) + length_of(errors);
    return (struct coded_query){step,   low_step,    length_of(errors) + (d + 32) * 0x1p-23f * length,
                                length, 128 * total, 128 * low_total};
}

/* `rows` rows that come with their codes. */
static void read_tails(const uint8_t *codes, ptrdiff_t stride, ptrdiff_t n_codes, ptrdiff_t rows, struct coded_rows *coded) {
    for (ptrdiff_t r = 0; r < rows; r++) {
        struct code_tail tail;
        memcpy(&tail, codes + r * stride + n_codes, sizeof tail);
        coded->step[r] = tail.step;
        coded->length[r] = tail.length;
        coded->error[r] = tail.error;
    }
}

/* One row, where it lies, into codes_d and place r of `rows`; d is whole vectors, codes past it mean nothing. */
INLINE void code_reals(const int kind, const char *from, ptrdiff_t d, uint8_t *codes_d, struct coded_rows *rows, ptrdiff_t r) {
    const real magic = 0x1.8p23f + 128;
    vec tops = all(0), squares = all(0), errors = all(0);
    for (ptrdiff_t p = 0; p < d; p += VL) {
        vec x = load_elements(kind, from + p * element_bytes(kind));
        tops = max_vec(max_vec(x, -x), tops);
    }
    const real top = max_lanes(tops), step = top / 127, inverse = 127 / top;
    for (ptrdiff_t p = 0; p < d; p += VL) {
        vec x = load_elements(kind, from + p * element_bytes(kind)), shifted = x * inverse + magic, error = x - (shifted - magic) * step;
        squares += x * x;
        errors += error * error;
        /* The code is the lowest byte of each lane. */
#if ISA_AVX512
        _mm_storeu_si128((__m128i *)(codes_d + p), _mm512_cvtepi32_epi8((__m512i)shifted));
#else
        const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        __m256i bytes = _mm256_shuffle_epi8((__m256i)shifted, lowest);
        _mm_storel_epi64((__m128i *)(codes_d + p), _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#endif
    }
    rows->step[r] = step;
    rows->length[r] = length_of(squares);
    rows->error[r] = top > SMALLEST_CODED && top < LARGEST_CODED ? length_of(errors) : NAN;
}

/* The same for a row of int8 and its scale: it is its own codes. */
static void code_int8(const char *from, ptrdiff_t d, real scale, uint8_t *codes_d, struct coded_rows *rows, ptrdiff_t r) {
    __m256i squares = _mm256_setzero_si256();
    for (ptrdiff_t p = 0; p < d; p += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)(from + p));
        __m256i wide = _mm256_cvtepi8_epi16(x);
        squares = _mm256_add_epi32(squares, _mm256_madd_epi16(wide, wide));
        _mm_storeu_si128((__m128i *)(codes_d + p), _mm_xor_si128(x, _mm_set1_epi8(-128)));
    }
    int32_t parts[8], total = 0; /* at most 2^14 each of MAX_CODED */
    _mm256_storeu_si256((__m256i *)parts, squares);
    for (int i = 0; i < 8; i++) total += parts[i];
    rows->step[r] = scale;
    rows->length[r] = sqrtf((real)total) * 1.001f * fabsf(scale);
    rows->error[r] = 0;
}

/* out_r (4): the sums of four vectors of integers. */
INLINE void add_up4(const codes *sum_r, real *out_r) {
    __m256i s[4];
    for (int r = 0; r < 4; r++)
#if ISA_AVX512
        s[r] = _mm256_add_epi32(_mm512_castsi512_si256(sum_r[r]), _mm512_extracti64x4_epi64(sum_r[r], 1));
#else
        s[r] = sum_r[r];
#endif
    __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
    _mm_storeu_si128((__m128i *)out_r, _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

/* The products of two rows of codes of queries and of four rows', as integers in the place of reals: out0_r, out1_r (4). Two
 * products of 255 * 31 twice fit into 16 bits. */
static void code_dots(ptrdiff_t n_codes, const int8_t *q0, const int8_t *q1, const uint8_t *const *row_r, real *out0_r, real *out1_r) {
    const codes one = OF_CODES(set1_epi16)(1);
    codes sum[2][4];
    for (int r = 0; r < 4; r++) sum[0][r] = sum[1][r] = OF_CODES(set1_epi32)(0);
    ptrdiff_t p = 0;
    for (; p + 2 * VECTOR_BYTES <= n_codes; p += 2 * VECTOR_BYTES) {
        codes q[2][2] = {{LOAD_CODES(q0 + p), LOAD_CODES(q0 + p + VECTOR_BYTES)},
                         {LOAD_CODES(q1 + p), LOAD_CODES(q1 + p + VECTOR_BYTES)}};
        for (int r = 0; r < 4; r++) {
            codes low = LOAD_CODES(row_r[r] + p), high = LOAD_CODES(row_r[r] + p + VECTOR_BYTES);
            for (int i = 0; i < 2; i++) {
                codes both = OF_CODES(add_epi16)(OF_CODES(maddubs_epi16)(low, q[i][0]), OF_CODES(maddubs_epi16)(high, q[i][1]));
                sum[i][r] = OF_CODES(add_epi32)(sum[i][r], OF_CODES(madd_epi16)(both, one));
            }
        }
    }
    if (p < n_codes) /* one vector is left, of 64 bytes */
        for (int r = 0; r < 4; r++) {
            codes last = LOAD_CODES(row_r[r] + p);
            sum[0][r] = OF_CODES(add_epi32)(sum[0][r], OF_CODES(madd_epi16)(OF_CODES(maddubs_epi16)(last, LOAD_CODES(q0 + p)), one));
            sum[1][r] = OF_CODES(add_epi32)(sum[1][r], OF_CODES(madd_epi16)(OF_CODES(maddubs_epi16)(last, LOAD_CODES(q1 + p)), one));
        }
    add_up4(sum[0], out0_r);
    add_up4(sum[1], out1_r);
}

/* Bounds of the scores of a query and VL rows of a tile from place j on; products_j: their codes' products, integers; low_j:
 * those of the query's second codes, or NULL. */
INLINE vec score_bounds(const struct coded_query *q, const struct coded_rows *rows, const real *products_j, const real *low_j, ptrdiff_t j) {
    vec product = __builtin_convertvector((ivec)load(products_j + j) - q->offset, vec) * q->step;
    if (low_j) product += __builtin_convertvector((ivec)load(low_j + j) - q->low_offset, vec) * q->low_step;
    /* 1e-37 is more than the roundings of numbers so small that they are no longer relative */
    return load(rows->step + j) * product + (load(rows->length + j) * q->margin + load(rows->error + j) * q->length + 1e-37f);
}

/* Whether so many queries are worth it, and their codes: without codes the rows' own must be made first. -1: no workspace. */
static int code_queries(struct coded_search *search, const struct mt_bank *bank, const real *q_nd, ptrdiff_t ldq, ptrdiff_t rows,
                        ptrdiff_t n, ptrdiff_t d) {
    static const int WORTH[] = {[MT_ROWS_REAL] = 16, [MT_ROWS_HALF] = 16, [MT_ROWS_INT8] = 2};
    enum { TILE_BYTES = 1 << 14 };
    *search = (struct coded_search){0};
    const uint8_t *given = n < GIVEN_BELOW ? bank->codes : NULL;
    if ((!given && n < WORTH[bank->kind]) || d < 32 || d > MAX_CODED || d % 16 || bank->stride[2] != element_bytes(bank->kind)) return 0;
    const ptrdiff_t n_codes = round_up(d, CODE_STEP), twice = given && n <= TWICE_UP_TO;
    search->codes_nd = malloc((size_t)rows * (1 + twice) * n_codes);
    search->coded_n = malloc((size_t)rows * sizeof *search->coded_n);
    if (!search->codes_nd || !search->coded_n) return -1;
    search->n_codes = n_codes;
    search->twice = (int)twice;
    search->given = given;
    search->tile = min_size(max_size(TILE_BYTES / n_codes / 4 * 4, 4), MAX_TILE);
#pragma omp parallel for num_threads(mt_team(rows, 10.0 * rows * d)) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++)
        search->coded_n[row] = code_query(q_nd + row * ldq, d, twice, search->codes_nd + row * (1 + twice) * n_codes, n_codes);
    return 0;
}

/* The codes of `rows` rows of a bank from j0 on, made of rows where they lie. codes: rows * n_codes bytes. */
static void code_tile(const struct mt_bank *bank, const char *from, const float *scales, ptrdiff_t rows, ptrdiff_t d, uint8_t *codes,
                      ptrdiff_t n_codes, struct coded_rows *coded) {
    for (ptrdiff_t r = 0; r < rows; r++) {
        const char *row = from + r * bank->stride[1];
        uint8_t *to = codes + r * n_codes;
        if (bank->kind == MT_ROWS_REAL) code_reals(MT_ROWS_REAL, row, d, to, coded, r);
        else if (bank->kind == MT_ROWS_HALF) code_reals(MT_ROWS_HALF, row, d, to, coded, r);
        else code_int8(row, d, scales[r], to, coded, r);
    }
}

/* search_piece with codes: queries from row q0 on. Where codes do not tell enough, because heaps are not yet full or the
 * numbers are not made for it, some rows are searched without. row_codes: room for tile * n_codes bytes. */
static void search_coded_piece(const struct coded_search *search, const struct search *of, const struct search_piece *piece,
                               ptrdiff_t q0, uint8_t *row_codes) {
    const struct mt_bank *bank = of->bank;
    const ptrdiff_t m = of->m, d = of->d, ldq = of->ldq, k = of->k, n = piece->n, b = piece->b, last = piece->last;
    const real *q_nd = piece->q_nd;
    struct found *heaps_nk = piece->heaps_nk;
    real *scores = piece->scores;
    enum { ALLOWED = 16, WITHOUT = 8 }; /* one row in so many may be in question; else so many tiles without */
    const ptrdiff_t n_codes = search->n_codes, row_bytes = d * element_bytes(bank->kind), twice = search->twice;
    const int8_t *codes_nd = search->codes_nd + q0 * (1 + twice) * n_codes;
    const struct coded_query *coded_n = search->coded_n + q0;
    const char *rows_md = (const char *)bank->rows + b * bank->stride[0];
    const uint8_t *valid_m = bank->valid ? bank->valid + b * m : NULL;
    /* What is read once, row by row: codes that came with the bank, or the rows to make them of. */
    const char *read_m = search->given ? (const char *)search->given + b * bank->code_stride[0] : rows_md;
    const ptrdiff_t read_stride = search->given ? bank->code_stride[1] : bank->stride[1];
    const ptrdiff_t read_bytes = search->given ? n_codes + (ptrdiff_t)sizeof(struct code_tail) : row_bytes;
    for (ptrdiff_t j0 = piece->first; j0 < last && !mt_stopped(of->stop);) {
        ptrdiff_t rows = min_size(search->tile, last - j0), in_question = 0, full = 1;
        const char *from = rows_md + j0 * bank->stride[1], *read = read_m + j0 * read_stride;
        for (ptrdiff_t i = 0; i < n; i++) full &= heaps_nk[i * k].index >= 0;
        if (full) {
            /* 1: the rows' codes */
            struct coded_rows coded = {{0}, {0}, {0}};
            const uint8_t *codes_r = search->given ? (const uint8_t *)read : row_codes;
            const ptrdiff_t ld = search->given ? read_stride : n_codes;
            if (!search->given)
                code_tile(bank, from, bank->scales ? bank->scales + b * m + j0 : NULL, rows, d, row_codes, n_codes, &coded);
            /* 2: the products of codes; the next tile is fetched meanwhile, row by row */
            real *low = twice ? scores + n * MAX_TILE : NULL;
            ptrdiff_t fetched = 0, done = 0, steps = div_up(n, 2 - twice) * div_up(rows, 4);
            for (ptrdiff_t i = 0; i < n; i += 2 - twice) {
                const ptrdiff_t second = twice ? 2 * i + 1 : min_size(i + 1, n - 1);
                real *first_out = scores + i * MAX_TILE, *second_out = twice ? low + i * MAX_TILE : scores + second * MAX_TILE;
                for (ptrdiff_t r = 0; r < rows; r += 4) {
                    const uint8_t *row_r[4];
                    for (int s = 0; s < 4; s++) row_r[s] = codes_r + min_size(r + s, rows - 1) * ld;
                    for (done++; fetched * steps < rows * done; fetched++)
                        for (ptrdiff_t line = 0; line < read_bytes; line += 64)
                            __builtin_prefetch(read + (search->tile + fetched) * read_stride + line);
                    code_dots(n_codes, codes_nd + i * (1 + twice) * n_codes, codes_nd + second * n_codes, row_r, first_out + r,
                              second_out + r);
                }
            }
            if (search->given) read_tails(codes_r, ld, n_codes, rows, &coded);
            /* 3: the rows in question, four at a time */
            for (ptrdiff_t i = 0; i < n; i++) {
                struct found *heap_k = heaps_nk + i * k;
                ptrdiff_t asked[MAX_TILE], n_asked = 0;
                real worst = worst_of(heap_k);
                for (ptrdiff_t j = 0; j < rows; j += VL) {
                    vec bounds = score_bounds(coded_n + i, &coded, scores + i * MAX_TILE, twice ? low + i * MAX_TILE : NULL, j);
                    ivec below = bounds < worst; /* not so: NaN too */
                    if (any_lane(~below))
                        for (ptrdiff_t lane = 0; lane < VL && j + lane < rows; lane++)
                            if (!below[lane]) asked[n_asked++] = j + lane;
                }
                in_question += n_asked;
                for (ptrdiff_t at = 0; at < n_asked; at += 4) {
                    const char *row_r[4];
                    real score_r[4];
                    for (int r = 0; r < 4; r++) row_r[r] = from + asked[min_size(at + r, n_asked - 1)] * bank->stride[1];
                    dots_of(1, bank->kind, ldq, q_nd + i * ldq, ldq, row_r, NULL, score_r, 4);
                    for (ptrdiff_t r = 0; r < 4 && at + r < n_asked; r++) {
                        ptrdiff_t j = j0 + asked[at + r];
                        real scale = bank->scales ? bank->scales[b * m + j] : 1;
                        offer_one((struct found){score_r[r] * scale, j}, valid_m, heap_k, k);
                    }
                }
            }
            j0 += rows;
        }
        if (!full || in_question * ALLOWED > rows * n) {
            ptrdiff_t until = min_size(last, j0 + WITHOUT * search->tile);
            search_piece(of, piece, j0, until);
            j0 = until;
        }
    }
}
#else
static int code_queries(struct coded_search *search, const struct mt_bank *bank, const real *q_nd, ptrdiff_t ldq, ptrdiff_t rows,
                        ptrdiff_t n, ptrdiff_t d) {
    (void)bank, (void)q_nd, (void)ldq, (void)rows, (void)n, (void)d;
    *search = (struct coded_search){0};
    return 0;
}

static void search_coded_piece(const struct coded_search *search, const struct search *of, const struct search_piece *piece,
                               ptrdiff_t q0, uint8_t *row_codes) {
    (void)search, (void)q0, (void)row_codes;
    search_piece(of, piece, piece->first, piece->last);
}
#endif
