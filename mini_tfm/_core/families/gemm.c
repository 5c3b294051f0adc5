/* Matrix product of two arrays as they come. */

/* Blocks, sized for caches of 32 KB and 512 KB: a panel of B (KC x NR floats, 16 KB) stays in L1; a block of A (MC rows x
 * KC, 256 KB with its padding) and a group of panels (64 KB) in L2. Panels are packed GROUP at a time: a row of B gives GROUP * NR neighbours
 * then, not one or two cache lines from each of KC pages. A strip of A is packed STRIP wide, of which MR are used: that is
 * whole vectors. Few rows of A take shorter panels, which stay in L1 between packing and their only use. Rows of B are
 * fetched AHEAD of their packing. */
enum { MC = 192, KC = 256, KC_FEW = 128, GROUP = 4, STRIP = MR == 12 ? 16 : 8, AHEAD = 8 };

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
