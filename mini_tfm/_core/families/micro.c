/* The micro-kernel that matrix products, attention and search share: a tile of a product kept in registers.
 *
 * Every element of a product is one chain of multiply-adds over k in ascending order, whatever tile it falls into and
 * whichever path computes it. So its bits depend on its row of A and its column of B alone: not on the number of threads,
 * on the other rows of the batch, or on where a tile begins. That is what a BLAS does not promise (a product of one row
 * goes another way there), and why this is not a call of sgemm. */

/* A tile of C is MR rows by NR columns. Where there are 16 vector registers, 12 hold sums, two B and one A; where there are
 * 32 (AVX-512, NEON), 24 hold sums. */
#if N_REGISTERS == 32
#define MR 12
#else
#define MR 6
#endif
#define NR (2 * VL)

/* What is fetched into L2 with each step of k: `at`, then `step` bytes further. Evenly, for a burst of fetches fills the buffers of lines
 * that are on their way, and what is computed meanwhile waits behind it. */
struct ahead {
    const char *at;
    ptrdiff_t step; /* 0: nothing */
};

/* c_ij (rows, panels * NR) (+)= a_ik b_kj. a element (i, k) is a[i * a_row + k * a_col]; b rows lie ldb apart, c rows ldc.
 * `rows` and `panels` are constants wherever this is inlined, so the sums stay in registers. add: the chain goes on from
 * `from`, whose rows lie ld_from apart, 0 for a single one. pairs: an element of a and b is a pair of bfloat16, their product
 * the sum of two. */
INLINE void micro_tile(const int fetches, const int pairs, const int rows, const int panels, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                       ptrdiff_t ldb, const real *from, ptrdiff_t ld_from, real *c, ptrdiff_t ldc, const int add, struct ahead next) {
    vec sum[2 * MR], b_j[8]; /* rows * panels <= MR and panels <= 4 */
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2 * panels; j++) sum[i * 2 * panels + j] = add ? load(from + i * ld_from + j * VL) : all(0);
    /* A pointer to every third row: a row's address is then a pointer plus 0, 1 or 2 times a_row, and few registers do. */
    const real *a_3[(MR + 2) / 3];
    for (int i = 0; i < rows; i += 3) a_3[i / 3] = a + i * a_row;
    for (ptrdiff_t p = 0; p < k; p++, b += ldb, next.at += next.step) {
        if (fetches) __builtin_prefetch(next.at, 0, 2);
        for (int j = 0; j < 2 * panels; j++) b_j[j] = load(b + j * VL);
        for (int i = 0; i < rows; i++) {
            const real *x = a_3[i / 3] + i % 3 * a_row;
            ivec x_pair = pairs ? all_lanes(*(const lane_anywhere *)x) : (ivec){0};
            for (int j = 0; j < 2 * panels; j++) {
                vec *to = &sum[i * 2 * panels + j];
                *to = pairs ? add_pairs(*to, x_pair, (ivec)b_j[j]) : *to + *x * b_j[j];
            }
        }
        for (int i = 0; i < rows; i += 3) a_3[i / 3] += a_col;
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2 * panels; j++) store(c + i * ldc + j * VL, sum[i * 2 * panels + j]);
}

/* Few rows take several panels at once: a chain waits for its own last step, so there must be enough of them. */
INLINE void micro_columns(const int fetches, const int pairs, const int rows, const int panels, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row,
                          ptrdiff_t a_col, const real *b, ptrdiff_t ldb, const real *from, ptrdiff_t ld_from, real *c, ptrdiff_t ldc,
                          const int add, struct ahead next) {
    ptrdiff_t j = 0;
    for (; panels > 1 && j + panels * NR <= columns; j += panels * NR)
        micro_tile(fetches, pairs, rows, panels, k, a, a_row, a_col, b + j, ldb, from + j, ld_from, c + j, ldc, add, next);
    for (; j < columns; j += NR) micro_tile(fetches, pairs, rows, 1, k, a, a_row, a_col, b + j, ldb, from + j, ld_from, c + j, ldc, add, next);
}

INLINE void micro_switch(const int fetches, const int pairs, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col,
                         const real *b, ptrdiff_t ldb, const real *from, ptrdiff_t ld_from, real *c, ptrdiff_t ldc, const int add,
                         struct ahead next) {
#define MICRO_CASE(n, panels) \
    case n: micro_columns(fetches, pairs, n, panels, columns, k, a, a_row, a_col, b, ldb, from, ld_from, c, ldc, add, next); break;
    switch (rows) {
        MICRO_CASE(1, 4)
        MICRO_CASE(2, 2)
        MICRO_CASE(3, 2)
        MICRO_CASE(4, 1)
        MICRO_CASE(5, 1)
        MICRO_CASE(6, 1)
#if MR == 12
        MICRO_CASE(7, 1)
        MICRO_CASE(8, 1)
        MICRO_CASE(9, 1)
        MICRO_CASE(10, 1)
        MICRO_CASE(11, 1)
        MICRO_CASE(12, 1)
#endif
    }
}

/* c (rows, columns) = a b, and from + a b, for any rows <= MR; b, from and c are read and written in columns up to a multiple of NR. */
static void micro_set(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                      ptrdiff_t ldb, real *c, ptrdiff_t ldc, struct ahead next) {
    if (next.step)
        micro_switch(1, 0, rows, columns, k, a, a_row, a_col, b, ldb, c, ldc, c, ldc, 0, next);
    else
        micro_switch(0, 0, rows, columns, k, a, a_row, a_col, b, ldb, c, ldc, c, ldc, 0, next);
}

static void micro_add(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                      ptrdiff_t ldb, const real *from, ptrdiff_t ld_from, real *c, ptrdiff_t ldc, struct ahead next) {
    if (next.step)
        micro_switch(1, 0, rows, columns, k, a, a_row, a_col, b, ldb, from, ld_from, c, ldc, 1, next);
    else
        micro_switch(0, 0, rows, columns, k, a, a_row, a_col, b, ldb, from, ld_from, c, ldc, 1, next);
}

#if !REAL_IS_DOUBLE
/* The same of pairs. */
static void micro_set_pairs(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                            ptrdiff_t ldb, real *c, ptrdiff_t ldc, struct ahead next) {
    if (next.step)
        micro_switch(1, 1, rows, columns, k, a, a_row, a_col, b, ldb, c, ldc, c, ldc, 0, next);
    else
        micro_switch(0, 1, rows, columns, k, a, a_row, a_col, b, ldb, c, ldc, c, ldc, 0, next);
}

static void micro_add_pairs(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                            ptrdiff_t ldb, const real *from, ptrdiff_t ld_from, real *c, ptrdiff_t ldc, struct ahead next) {
    if (next.step)
        micro_switch(1, 1, rows, columns, k, a, a_row, a_col, b, ldb, from, ld_from, c, ldc, 1, next);
    else
        micro_switch(0, 1, rows, columns, k, a, a_row, a_col, b, ldb, from, ld_from, c, ldc, 1, next);
}
#else
#define micro_set_pairs micro_set
#define micro_add_pairs micro_add
#endif

/* VL rows of `from`, ld apart, become VL columns of `to`, ld_to apart. */
INLINE void transpose_square(const real *from, ptrdiff_t ld, real *to, ptrdiff_t ld_to) {
#if ISA_AVX2 && REAL_IS_DOUBLE
    __m256d r0 = _mm256_loadu_pd(from), r1 = _mm256_loadu_pd(from + ld), r2 = _mm256_loadu_pd(from + 2 * ld), r3 = _mm256_loadu_pd(from + 3 * ld);
    __m256d t0 = _mm256_unpacklo_pd(r0, r1), t1 = _mm256_unpackhi_pd(r0, r1), t2 = _mm256_unpacklo_pd(r2, r3), t3 = _mm256_unpackhi_pd(r2, r3);
    _mm256_storeu_pd(to, _mm256_permute2f128_pd(t0, t2, 0x20));
    _mm256_storeu_pd(to + ld_to, _mm256_permute2f128_pd(t1, t3, 0x20));
    _mm256_storeu_pd(to + 2 * ld_to, _mm256_permute2f128_pd(t0, t2, 0x31));
    _mm256_storeu_pd(to + 3 * ld_to, _mm256_permute2f128_pd(t1, t3, 0x31));
#elif ISA_AVX2
    /* Halves of rows i and i + 4 are loaded into one register: that leaves only shuffles within 128 bits. */
    __m256 r[4], s[4];
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++)
            r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * ld + 4 * half)), _mm_loadu_ps(from + (i + 4) * ld + 4 * half), 1);
        s[0] = _mm256_unpacklo_ps(r[0], r[1]);
        s[1] = _mm256_unpackhi_ps(r[0], r[1]);
        s[2] = _mm256_unpacklo_ps(r[2], r[3]);
        s[3] = _mm256_unpackhi_ps(r[2], r[3]);
        real *column = to + 4 * half * ld_to;
        _mm256_storeu_ps(column, _mm256_shuffle_ps(s[0], s[2], 0x44));
        _mm256_storeu_ps(column + ld_to, _mm256_shuffle_ps(s[0], s[2], 0xEE));
        _mm256_storeu_ps(column + 2 * ld_to, _mm256_shuffle_ps(s[1], s[3], 0x44));
        _mm256_storeu_ps(column + 3 * ld_to, _mm256_shuffle_ps(s[1], s[3], 0xEE));
    }
#elif ISA_AVX512 && REAL_IS_DOUBLE
    /* Quarters of rows i, i + 2, i + 4, i + 6 are loaded into one register, for the same reason. */
    for (int quarter = 0; quarter < 4; quarter++) {
        vec r[2];
        for (int i = 0; i < 2; i++) {
            const real *row = from + i * ld + 2 * quarter;
            __m512d x = _mm512_castpd128_pd512(_mm_loadu_pd(row));
            x = _mm512_insertf64x2(x, _mm_loadu_pd(row + 2 * ld), 1);
            x = _mm512_insertf64x2(x, _mm_loadu_pd(row + 4 * ld), 2);
            r[i] = (vec)_mm512_insertf64x2(x, _mm_loadu_pd(row + 6 * ld), 3);
        }
        store(to + 2 * quarter * ld_to, SHUFFLE(r[0], r[1], 0, 8, 2, 10, 4, 12, 6, 14));
        store(to + (2 * quarter + 1) * ld_to, SHUFFLE(r[0], r[1], 1, 9, 3, 11, 5, 13, 7, 15));
    }
#elif ISA_AVX512
    for (int quarter = 0; quarter < 4; quarter++) {
        vec r[4], s[4];
        for (int i = 0; i < 4; i++) {
            const real *row = from + i * ld + 4 * quarter;
            __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(row));
            x = _mm512_insertf32x4(x, _mm_loadu_ps(row + 4 * ld), 1);
            x = _mm512_insertf32x4(x, _mm_loadu_ps(row + 8 * ld), 2);
            r[i] = (vec)_mm512_insertf32x4(x, _mm_loadu_ps(row + 12 * ld), 3);
        }
        s[0] = SHUFFLE(r[0], r[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        s[1] = SHUFFLE(r[0], r[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        s[2] = SHUFFLE(r[2], r[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        s[3] = SHUFFLE(r[2], r[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
        real *column = to + 4 * quarter * ld_to;
        store(column, SHUFFLE(s[0], s[2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29));
        store(column + ld_to, SHUFFLE(s[0], s[2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
        store(column + 2 * ld_to, SHUFFLE(s[1], s[3], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29));
        store(column + 3 * ld_to, SHUFFLE(s[1], s[3], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    }
#elif REAL_IS_DOUBLE
    vec r0 = load(from), r1 = load(from + ld);
    store(to, SHUFFLE(r0, r1, 0, 2));
    store(to + ld_to, SHUFFLE(r0, r1, 1, 3));
#else
    vec r0 = load(from), r1 = load(from + ld), r2 = load(from + 2 * ld), r3 = load(from + 3 * ld);
    vec t0 = SHUFFLE(r0, r1, 0, 4, 1, 5), t1 = SHUFFLE(r0, r1, 2, 6, 3, 7), t2 = SHUFFLE(r2, r3, 0, 4, 1, 5), t3 = SHUFFLE(r2, r3, 2, 6, 3, 7);
    store(to, SHUFFLE(t0, t2, 0, 1, 4, 5));
    store(to + ld_to, SHUFFLE(t0, t2, 2, 3, 6, 7));
    store(to + 2 * ld_to, SHUFFLE(t1, t3, 0, 1, 4, 5));
    store(to + 3 * ld_to, SHUFFLE(t1, t3, 2, 3, 6, 7));
#endif
}

/* to (columns, ld_to) = from (rows, ld) transposed, with zeros in to's columns from `rows` up to `width` <= ld_to. */
static void pack_transposed(const real *from, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t columns, real *to, ptrdiff_t ld_to, ptrdiff_t width) {
    ptrdiff_t i = 0;
    for (; i + VL <= rows; i += VL) {
        ptrdiff_t j = 0;
        for (; j + VL <= columns; j += VL) {
            if (j * sizeof(real) % 64 == 0) /* the next rows' lines: the processor follows a row, not a column of rows */
                for (ptrdiff_t r = VL; r < 2 * VL; r++) __builtin_prefetch(from + (i + r) * ld + j);
            transpose_square(from + i * ld + j, ld, to + j * ld_to + i, ld_to);
        }
        for (; j < columns; j++)
            for (ptrdiff_t r = 0; r < VL; r++) to[j * ld_to + i + r] = from[(i + r) * ld + j];
    }
    for (ptrdiff_t j = 0; i < width && j < columns; j++)
        for (ptrdiff_t r = i; r < width; r++) to[j * ld_to + r] = r < rows ? from[r * ld + j] : 0;
}

/* to (rows, ld_to) = from (rows, ld), with zeros in the columns from `columns` up to ld_to. */
static void pack_plain(const real *from, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t columns, real *to, ptrdiff_t ld_to) {
    for (ptrdiff_t i = 0; i < rows; i++) {
        ptrdiff_t j = 0;
        for (; j + VL <= columns; j += VL) store(to + i * ld_to + j, load(from + i * ld + j));
        for (; j < columns; j++) to[i * ld_to + j] = from[i * ld + j];
        for (; j < ld_to; j++) to[i * ld_to + j] = 0;
    }
}
