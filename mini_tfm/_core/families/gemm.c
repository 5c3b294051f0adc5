/* Matrix product, and the micro-kernel that attention and search share.
 *
 * Every element of a product is one chain of multiply-adds over k in ascending order, whatever tile it falls into and
 * whichever path computes it. So its bits depend on its row of A and its column of B alone: not on the number of threads,
 * on the other rows of the batch, or on where a tile begins. That is what a BLAS does not promise (a product of one row
 * goes another way there), and why this is not a call of sgemm. */

/* A tile of C is MR rows by NR columns: 12 vector registers of sums, two of B and one of A fill the 16 that SSE and AVX have. */
#define MR 6
#define NR (2 * VL)

/* c_ij (rows, panels * NR) (+)= a_ik b_kj. a element (i, k) is a[i * a_row + k * a_col]; b rows lie ldb apart, c rows ldc.
 * `rows` and `panels` are constants wherever this is inlined, so the sums stay in registers. add: the chain goes on from
 * what c holds. skip_zeros: a zero of A takes no part, for 0 * NaN of something hidden is not to get in. */
INLINE void micro_tile(const int rows, const int panels, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                       ptrdiff_t ldb, real *c, ptrdiff_t ldc, const int add, const int skip_zeros) {
    vec sum[MR][MR * 2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2 * panels; j++) sum[i][j] = add ? load(c + i * ldc + j * VL) : all(0);
    for (ptrdiff_t p = 0; p < k; p++, a += a_col, b += ldb) {
        vec b_j[MR * 2];
        for (int j = 0; j < 2 * panels; j++) b_j[j] = load(b + j * VL);
        for (int i = 0; i < rows; i++) {
            real x = a[i * a_row];
            if (skip_zeros && x == 0) continue;
            for (int j = 0; j < 2 * panels; j++) sum[i][j] += x * b_j[j];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2 * panels; j++) store(c + i * ldc + j * VL, sum[i][j]);
}

/* Few rows take several panels at once: a chain waits for its own last step, so there must be enough of them. */
INLINE void micro_columns(const int rows, const int panels, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row,
                          ptrdiff_t a_col, const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc, const int add) {
    ptrdiff_t j = 0;
    for (; panels > 1 && j + panels * NR <= columns; j += panels * NR)
        micro_tile(rows, panels, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add, 0);
    for (; j < columns; j += NR) micro_tile(rows, 1, k, a, a_row, a_col, b + j, ldb, c + j, ldc, add, 0);
}

INLINE void micro_switch(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col,
                         const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc, const int add) {
    switch (rows) {
    case 1: micro_columns(1, 4, columns, k, a, a_row, a_col, b, ldb, c, ldc, add); break;
    case 2: micro_columns(2, 2, columns, k, a, a_row, a_col, b, ldb, c, ldc, add); break;
    case 3: micro_columns(3, 2, columns, k, a, a_row, a_col, b, ldb, c, ldc, add); break;
    case 4: micro_columns(4, 1, columns, k, a, a_row, a_col, b, ldb, c, ldc, add); break;
    case 5: micro_columns(5, 1, columns, k, a, a_row, a_col, b, ldb, c, ldc, add); break;
    default: micro_columns(6, 1, columns, k, a, a_row, a_col, b, ldb, c, ldc, add);
    }
}

/* c (rows, columns) = a b, and += a b, for any rows <= MR; b and c are read and written in columns up to a multiple of NR. */
static void micro_set(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                      ptrdiff_t ldb, real *c, ptrdiff_t ldc) {
    micro_switch(rows, columns, k, a, a_row, a_col, b, ldb, c, ldc, 0);
}

static void micro_add(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                      ptrdiff_t ldb, real *c, ptrdiff_t ldc) {
    micro_switch(rows, columns, k, a, a_row, a_col, b, ldb, c, ldc, 1);
}

/* Slow and rarely needed: one row at a time, with a test at every step. */
static __attribute__((noinline)) void micro_add_skipping_zeros(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t k, const real *a,
                                                               ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb, real *c,
                                                               ptrdiff_t ldc) {
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t j = 0; j < columns; j += NR)
            micro_tile(1, 1, k, a + i * a_row, a_row, a_col, b + j, ldb, c + i * ldc + j, ldc, 1, 1);
}

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
#else
    for (ptrdiff_t i = 0; i < VL; i++)
        for (ptrdiff_t j = 0; j < VL; j++) to[j * ld_to + i] = from[i * ld + j];
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

/* Blocks, sized for caches of 32 KB and 512 KB: a panel of B (KC x NR floats, 16 KB) stays in L1; a block of A (MC rows x
 * KC, 256 KB with its padding) and a group of panels (64 KB) in L2. Panels are packed GROUP at a time: a row of B gives GROUP * NR neighbours
 * then, not one or two cache lines from each of KC pages. A strip of A is packed STRIP wide, of which MR are used: that is
 * whole vectors. Few rows of A take shorter panels, which stay in L1 between packing and their only use. Rows of B are
 * fetched AHEAD of their packing. */
enum { MC = 192, KC = 256, KC_FEW = 128, GROUP = 4, STRIP = 8, AHEAD = 8 };

/* What gemm_piece and gemm_few need for `rows` rows, in reals. */
static size_t gemm_room(ptrdiff_t rows) {
    return div_up(rows, MR) * STRIP * KC + KC * GROUP * NR + MR * GROUP * NR;
}

/* c (rows, columns; ldc) = or += the product of a strip and a panel of `width` readable columns. Where fewer are meant, it
 * goes through a tile of full width, whose chain starts from c all the same. */
static void micro_edge(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t width, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col,
                       const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc, int add, real *corner) {
    int whole = columns == width;
    if (add && !whole) pack_plain(c, ldc, rows, columns, corner, width);
    (add ? micro_add : micro_set)(rows, width, k, a, a_row, a_col, b, ldb, whole ? c : corner, whole ? ldc : width);
    for (ptrdiff_t r = 0; r < rows && !whole; r++) memcpy(c + r * ldc, corner + r * width, columns * sizeof(real));
}

/* c_mn, the part of C at rows [m0, m1) and columns [n0, n1). work: gemm_room(m1 - m0) reals. */
static void gemm_piece(const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb, int trans_b, real *c, ptrdiff_t ldc,
                       ptrdiff_t m0, ptrdiff_t m1, ptrdiff_t n0, ptrdiff_t n1, ptrdiff_t k, int accumulate, real *work) {
    ptrdiff_t m = m1 - m0;
    real *packed_a = work, *packed_b = packed_a + div_up(m, MR) * STRIP * KC, *corner = packed_b + KC * GROUP * NR;
    for (ptrdiff_t k0 = 0; k0 < k; k0 += KC) {
        ptrdiff_t kc = min_size(KC, k - k0);
        /* 1: A in strips, k outermost within one */
        for (ptrdiff_t i = 0; i < m; i += MR) {
            ptrdiff_t rows = min_size(STRIP, m - i); /* the two past MR belong to the next strip and are not used in this */
            const real *from = a + (m0 + i) * a_row + k0 * a_col;
            real *to = packed_a + i / MR * STRIP * kc;
            if (a_col == 1)
                pack_transposed(from, a_row, rows, kc, to, STRIP, STRIP);
            else
                pack_plain(from, a_col, kc, rows, to, STRIP);
        }
        for (ptrdiff_t group = n0; group < n1; group += GROUP * NR) {
            ptrdiff_t group_n = min_size(GROUP * NR, n1 - group);
            const real *from = trans_b ? b + group * ldb + k0 : b + k0 * ldb + group;
            /* 2: a group of panels of B */
            if (!trans_b && group_n == GROUP * NR) {
                for (ptrdiff_t p = 0; p < kc; p++, from += ldb)
                    for (ptrdiff_t j = 0; j < GROUP; j++) {
                        __builtin_prefetch(from + AHEAD * ldb + j * NR); /* the processor does not see across pages */
                        store(packed_b + (j * kc + p) * NR, load(from + j * NR));
                        store(packed_b + (j * kc + p) * NR + VL, load(from + j * NR + VL));
                    }
            } else {
                for (ptrdiff_t j = 0; j < group_n; j += NR) {
                    ptrdiff_t columns = min_size(NR, group_n - j);
                    if (trans_b)
                        pack_transposed(from + j * ldb, ldb, columns, kc, packed_b + j * kc, NR, NR);
                    else
                        pack_plain(from + j, ldb, kc, columns, packed_b + j * kc, NR);
                }
            }
            /* 3: every strip with every panel */
            for (ptrdiff_t j = 0; j < group_n; j += NR)
                for (ptrdiff_t i = 0; i < m; i += MR)
                    micro_edge(min_size(MR, m - i), min_size(NR, group_n - j), NR, kc, packed_a + i / MR * STRIP * kc, 1, STRIP,
                               packed_b + j * kc, NR, c + (m0 + i) * ldc + group + j, ldc, accumulate || k0 > 0, corner);
        }
    }
}

/* The same for at most MR rows: A is read where it lies, and so is B unless it is transposed, for it is used but once. */
static void gemm_few(const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb, int trans_b, real *c, ptrdiff_t ldc,
                     ptrdiff_t m, ptrdiff_t n0, ptrdiff_t n1, ptrdiff_t k, int accumulate, real *work) {
    const ptrdiff_t width = GROUP * NR;
    real *packed_b = work, *corner = work + KC_FEW * width;
    for (ptrdiff_t group = n0; group < n1; group += width) {
        ptrdiff_t columns = min_size(width, n1 - group);
        for (ptrdiff_t k0 = 0; k0 < k; k0 += KC_FEW) {
            ptrdiff_t kc = min_size(KC_FEW, k - k0), panel_ld = width;
            const real *from = trans_b ? b + group * ldb + k0 : b + k0 * ldb + group, *panel = packed_b;
            if (trans_b) {
                pack_transposed(from, ldb, columns, kc, packed_b, width, width);
            } else if (columns < width) {
                pack_plain(from, ldb, kc, columns, packed_b, width);
            } else {
                panel = from;
                panel_ld = ldb;
            }
            micro_edge(m, columns, width, kc, a + k0 * a_col, a_row, a_col, panel, panel_ld, c + group, ldc, accumulate || k0 > 0, corner);
        }
    }
}

/* One row of A against B as it lies: y (n0..n1) (+)= x_k B. B streams by in memory order, four rows at a time so that y is
 * read and written a quarter as often; the chain over k is the one of the micro-kernel. */
static void gemv_piece(const real *x, const real *b, ptrdiff_t ldb, real *y, ptrdiff_t n0, ptrdiff_t n1, ptrdiff_t k, int accumulate) {
    if (!accumulate) memset(y + n0, 0, (n1 - n0) * sizeof(real));
    ptrdiff_t p = 0;
    for (; p + 4 <= k; p += 4) {
        const real *b0 = b + p * ldb, *b1 = b0 + ldb, *b2 = b1 + ldb, *b3 = b2 + ldb;
        for (ptrdiff_t j = n0; j < n1; j += VL) {
            vec sum = load(y + j);
            sum += x[p] * load(b0 + j);
            sum += x[p + 1] * load(b1 + j);
            sum += x[p + 2] * load(b2 + j);
            sum += x[p + 3] * load(b3 + j);
            store(y + j, sum);
        }
    }
    for (; p < k; p++)
        for (ptrdiff_t j = n0; j < n1; j += VL) store(y + j, load(y + j) + x[p] * load(b + p * ldb + j));
}

/* a_mk, b_kn (transposed in memory if trans_*) read; c_mn written, or accumulated. -1: no workspace. */
static int gemm(const void *a_, const void *b_, void *c_, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b, int accumulate) {
    const real *a = a_, *b = b_;
    real *c = c_;
    if (!m || !n) return 0;
    if (!k) {
        if (!accumulate) memset(c, 0, (size_t)m * n * sizeof(real));
        return 0;
    }
    ptrdiff_t a_row = trans_a ? 1 : k, a_col = trans_a ? m : 1, ldb = trans_b ? k : n;
    double work = 2.0 * m * n * k / VL;
    /* About four pieces a thread, for balance, but wide ones: each packs its own block of A. */
    ptrdiff_t row_pieces = div_up(m, MC), wanted = mt_team(1 << 20, work);
    wanted = wanted > 1 ? div_up(4 * wanted, row_pieces) : 1;
    wanted = max_size(wanted, div_up(n, 1024)); /* all rows go over some columns before the next: B is still in L3 then */
    ptrdiff_t piece_n = max_size(round_up(div_up(n, wanted), GROUP * NR), GROUP * NR), column_pieces = div_up(n, piece_n);
    ptrdiff_t piece_m = round_up(div_up(m, row_pieces), MR); /* even pieces: no thin last one */
    ptrdiff_t pieces = row_pieces * column_pieces;
    int team = mt_team(pieces, work), one_row = m == 1 && a_col == 1 && !trans_b && n >= 8 * NR;
    size_t room = gemm_room(piece_m);
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t m0 = piece % row_pieces * piece_m, n0 = piece / row_pieces * piece_n;
        ptrdiff_t m1 = min_size(m, m0 + piece_m), n1 = min_size(n, n0 + piece_n);
        real *mine = workspace + room * mt_thread_id();
        if (m0 >= m1) continue;
        if (one_row) {
            ptrdiff_t streamed = n0 + (n1 - n0) / VL * VL;
            gemv_piece(a, b, ldb, c, n0, streamed, k, accumulate);
            n0 = streamed;
        }
        if (m <= MR)
            gemm_few(a, a_row, a_col, b, ldb, trans_b, c, n, m, n0, n1, k, accumulate, mine);
        else
            gemm_piece(a, a_row, a_col, b, ldb, trans_b, c, n, m0, m1, n0, n1, k, accumulate, mine);
    }
    free(workspace);
    return 0;
}
