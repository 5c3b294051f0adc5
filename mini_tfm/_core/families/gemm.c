/* Matrix product, and the micro-kernel that attention and search share.
 *
 * Every element of a product is one chain of multiply-adds over k in ascending order, whatever tile it falls into and
 * whichever path computes it. So its bits depend on its row of A and its column of B alone: not on the number of threads,
 * on the other rows of the batch, or on where a tile begins. That is what a BLAS does not promise (a product of one row
 * goes another way there), and why this is not a call of sgemm. */

/* A tile of C is MR rows by NR columns: 12 vector registers of sums, two of B and one of A fill the 16 that SSE and AVX have. */
#define MR 6
#define NR (2 * VL)

/* c_ij (rows, NR) (+)= a_ik b_kj. a element (i, k) is a[i * a_row + k * a_col]; b rows lie ldb apart, c rows ldc.
 * `rows` is a constant wherever this is inlined, so the sums stay in registers. add: the chain goes on from what c holds.
 * skip_zeros: a zero of A takes no part, for 0 * NaN of something hidden is not to get in. */
INLINE void micro_rows(const int rows, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb,
                       real *c, ptrdiff_t ldc, const int add, const int skip_zeros) {
    vec sum[MR][2];
    for (int i = 0; i < rows; i++) {
        sum[i][0] = add ? load(c + i * ldc) : all(0);
        sum[i][1] = add ? load(c + i * ldc + VL) : all(0);
    }
    for (ptrdiff_t p = 0; p < k; p++, a += a_col, b += ldb) {
        vec b0 = load(b), b1 = load(b + VL);
        for (int i = 0; i < rows; i++) {
            real x = a[i * a_row];
            if (skip_zeros && x == 0) continue;
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
    }
    for (int i = 0; i < rows; i++) {
        store(c + i * ldc, sum[i][0]);
        store(c + i * ldc + VL, sum[i][1]);
    }
}

INLINE void micro_switch(ptrdiff_t rows, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb,
                         real *c, ptrdiff_t ldc, const int add, const int skip_zeros) {
    switch (rows) {
    case 1: micro_rows(1, k, a, a_row, a_col, b, ldb, c, ldc, add, skip_zeros); break;
    case 2: micro_rows(2, k, a, a_row, a_col, b, ldb, c, ldc, add, skip_zeros); break;
    case 3: micro_rows(3, k, a, a_row, a_col, b, ldb, c, ldc, add, skip_zeros); break;
    case 4: micro_rows(4, k, a, a_row, a_col, b, ldb, c, ldc, add, skip_zeros); break;
    case 5: micro_rows(5, k, a, a_row, a_col, b, ldb, c, ldc, add, skip_zeros); break;
    default: micro_rows(6, k, a, a_row, a_col, b, ldb, c, ldc, add, skip_zeros);
    }
}

/* The same for any rows <= MR: one copy for each way of ending. */
static void micro_set(ptrdiff_t rows, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb,
                      real *c, ptrdiff_t ldc) {
    micro_switch(rows, k, a, a_row, a_col, b, ldb, c, ldc, 0, 0);
}

static void micro_add(ptrdiff_t rows, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb,
                      real *c, ptrdiff_t ldc) {
    micro_switch(rows, k, a, a_row, a_col, b, ldb, c, ldc, 1, 0);
}

/* Slow and rarely needed: rolled loops, one row at a time. */
static __attribute__((noinline)) void micro_add_skipping_zeros(ptrdiff_t rows, ptrdiff_t k, const real *a, ptrdiff_t a_row,
                                                               ptrdiff_t a_col, const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc) {
    for (ptrdiff_t i = 0; i < rows; i++) micro_rows(1, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, 1, 1);
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

/* to (columns, ld_to) = from (rows, ld) transposed, with zeros in to's columns from `rows` up to ld_to. */
static void pack_transposed(const real *from, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t columns, real *to, ptrdiff_t ld_to) {
    ptrdiff_t i = 0;
    for (; i + VL <= rows; i += VL) {
        ptrdiff_t j = 0;
        for (; j + VL <= columns; j += VL) transpose_square(from + i * ld + j, ld, to + j * ld_to + i, ld_to);
        for (; j < columns; j++)
            for (ptrdiff_t r = 0; r < VL; r++) to[j * ld_to + i + r] = from[(i + r) * ld + j];
    }
    for (; i < ld_to; i++)
        for (ptrdiff_t j = 0; j < columns; j++) to[j * ld_to + i] = i < rows ? from[i * ld + j] : 0;
}

/* to (rows, ld_to) = from (rows, ld), with zeros in the columns from `columns` up to ld_to. */
static void pack_plain(const real *from, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t columns, real *to, ptrdiff_t ld_to) {
    for (ptrdiff_t i = 0; i < rows; i++) {
        memcpy(to + i * ld_to, from + i * ld, columns * sizeof(real));
        for (ptrdiff_t j = columns; j < ld_to; j++) to[i * ld_to + j] = 0;
    }
}

/* Blocks, measured on Zen 3: a panel of B (KC x NR floats, 16 KB) stays in L1, a block of A (MC x KC, 192 KB) in L2. */
enum { MC = 192, KC = 256 };

/* c_mn, the part of C at rows [m0, m1) and columns [n0, n1); room for MC * KC + KC * NR + MR * NR reals in `work`. */
static void gemm_piece(const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb, int trans_b, real *c, ptrdiff_t ldc,
                       ptrdiff_t m0, ptrdiff_t m1, ptrdiff_t n0, ptrdiff_t n1, ptrdiff_t k, int accumulate, real *work) {
    real *packed_a = work, *packed_b = work + MC * KC, *corner = packed_b + KC * NR;
    ptrdiff_t m = m1 - m0;
    /* One strip of rows that lie along memory is read where it lies. */
    int direct_a = m <= MR && a_col == 1;
    for (ptrdiff_t k0 = 0; k0 < k; k0 += KC) {
        ptrdiff_t kc = min_size(KC, k - k0);
        int add = accumulate || k0 > 0;
        if (!direct_a) /* strips of MR rows, k outer: the micro-kernel then reads A in a row */
            for (ptrdiff_t i = 0; i < m; i += MR) {
                ptrdiff_t rows = min_size(MR, m - i);
                const real *from = a + (m0 + i) * a_row + k0 * a_col;
                real *to = packed_a + i * KC;
                for (ptrdiff_t p = 0; p < kc; p++)
                    for (ptrdiff_t r = 0; r < rows; r++) to[p * MR + r] = from[r * a_row + p * a_col];
            }
        for (ptrdiff_t j = n0; j < n1; j += NR) {
            ptrdiff_t columns = min_size(NR, n1 - j);
            const real *panel = packed_b;
            ptrdiff_t panel_ld = NR;
            if (trans_b)
                pack_transposed(b + j * ldb + k0, ldb, columns, kc, packed_b, NR);
            else if (m > 2 * MR || columns < NR)
                pack_plain(b + k0 * ldb + j, ldb, kc, columns, packed_b, NR);
            else { /* few rows: B is used once or twice, a copy would cost as much */
                panel = b + k0 * ldb + j;
                panel_ld = ldb;
            }
            for (ptrdiff_t i = 0; i < m; i += MR) {
                ptrdiff_t rows = min_size(MR, m - i);
                const real *strip = direct_a ? a + m0 * a_row + k0 : packed_a + i * KC;
                ptrdiff_t strip_row = direct_a ? a_row : 1, strip_col = direct_a ? 1 : MR;
                real *tile = c + (m0 + i) * ldc + j;
                if (columns == NR) {
                    if (add)
                        micro_add(rows, kc, strip, strip_row, strip_col, panel, panel_ld, tile, ldc);
                    else
                        micro_set(rows, kc, strip, strip_row, strip_col, panel, panel_ld, tile, ldc);
                    continue;
                }
                /* The last columns go through a tile of full width, whose chain starts from C all the same. */
                if (add) pack_plain(tile, ldc, rows, columns, corner, NR);
                else memset(corner, 0, MR * NR * sizeof(real));
                micro_add(rows, kc, strip, strip_row, strip_col, panel, panel_ld, corner, NR);
                for (ptrdiff_t r = 0; r < rows; r++) memcpy(tile + r * ldc, corner + r * NR, columns * sizeof(real));
            }
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
    ptrdiff_t piece_n = max_size(round_up(div_up(n, wanted), NR), 4 * NR), column_pieces = div_up(n, piece_n);
    ptrdiff_t piece_m = round_up(div_up(m, row_pieces), MR); /* even pieces: no thin last one */
    ptrdiff_t pieces = row_pieces * column_pieces;
    int team = mt_team(pieces, work), one_row = m == 1 && a_col == 1 && !trans_b && n >= 8 * NR;
    size_t room = one_row ? 0 : MC * KC + KC * NR + MR * NR;
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t m0 = piece % row_pieces * piece_m, n0 = piece / row_pieces * piece_n;
        ptrdiff_t m1 = min_size(m, m0 + piece_m), n1 = min_size(n, n0 + piece_n);
        real *mine = workspace + room * mt_thread_id();
        if (m0 >= m1) continue;
        ptrdiff_t streamed = one_row ? n0 + (n1 - n0) / VL * VL : n0;
        if (one_row) gemv_piece(a, b, ldb, c, n0, streamed, k, accumulate);
        if (streamed == n1) continue;
        if (one_row) { /* fewer than VL columns are left over */
            for (ptrdiff_t j = streamed; j < n1; j++) {
                real sum = accumulate ? c[j] : 0;
                for (ptrdiff_t p = 0; p < k; p++) sum += a[p] * b[p * ldb + j];
                c[j] = sum;
            }
            continue;
        }
        gemm_piece(a, a_row, a_col, b, ldb, trans_b, c, n, m0, m1, streamed, n1, k, accumulate, mine);
    }
    free(workspace);
    return 0;
}
