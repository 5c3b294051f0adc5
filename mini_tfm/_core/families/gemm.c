/* Matrix product of two arrays as they come. */

/* Blocks. A sum is taken over DEEP of k at once, straight into C: the tile's time is then all multiplications. The strips of A (MC x
 * DEEP, 384 KB with vectors of 512 bits, which come with an L2 of 1 MB or more; half of that without) stay in L2, where panels of B
 * (DEEP x NR) pass by them, PANELS together; each stays near while all strips pass over it. Shorter panels that stay in L1 were 3 to 5 %
 * slower, for sums had to be put down and taken up more often. A is read where it lies: MR rows of it are as good to the tile as a packed
 * strip, and nothing has to be copied. It is packed only where it is transposed, when its elements lie rows apart, or in pairs: once for
 * every group of panels, so the groups are wider then (PANELS_T). Either way the part of A that comes next is fetched into L2 meanwhile:
 * 2 to 6 % of the time.
 * Few rows of A take shorter panels, which stay in L1 between packing and their only use. Rows of B are fetched AHEAD of
 * their packing. */
enum { DEEP = (N_REGISTERS == 32 ? 4096 : 2048) / sizeof(real), MC = 96, PANELS = 8, PANELS_T = 32, KC_FEW = 128, GROUP = 4 };
enum { AHEAD = 8 };

/* Columns of B that are packed together, of n. */
INLINE ptrdiff_t group_width(ptrdiff_t n, int packs_a) { return min_size((packs_a ? PANELS_T : PANELS) * NR, round_up(n, NR)); }

/* Steps of k that are taken at once: DEEP at most, cut evenly. */
INLINE ptrdiff_t depth(ptrdiff_t k) { return div_up(k, max_size(div_up(k, DEEP), 1)); }

/* What gemm_piece and gemm_few need for n columns of a product over k (of pairs: over half of it), in reals: no more than is used, for
 * what is fresh from the system comes page by page. A strip is stored in whole vectors and may write past its last row; rows of pairs
 * lie a line further apart than they are long. */
static size_t gemm_room(ptrdiff_t n, ptrdiff_t k, int packs_a) {
    size_t deep = depth(k);
    return max_size(group_width(n, packs_a) * deep + MC * NR + packs_a * (MC + MR) * (round_up(deep, VL) + LINE), (KC_FEW + MR) * GROUP * NR) + 64;
}

/* Rows of memory that will be read next. */
struct rows {
    const real *at;
    ptrdiff_t ld, count, columns;
};

/* Brings the first `count` of them, as far as there are any, into L2. */
INLINE void fetch_rows(struct rows *rows, ptrdiff_t count) {
    for (; count && rows->count; count--, rows->count--, rows->at += rows->ld)
        for (ptrdiff_t j = 0; j < rows->columns; j += LINE) __builtin_prefetch(rows->at + j, 0, 2);
}

/* to (m, NR; ld_to) = a panel's product, or from (m, NR; ld_from) plus it, in strips of even height: a thin last one would
 * wait for its own chains. With a_col 0 the strips are packed one after the other, MR apart over k. With each of them go
 * `each` of the rows that are read `next`, and what is `ahead`. */
INLINE void micro_strips(const int pairs, ptrdiff_t m, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *panel,
                         const real *from, ptrdiff_t ld_from, real *to, ptrdiff_t ld_to, struct rows *next, ptrdiff_t each,
                         struct ahead ahead) {
    ptrdiff_t strips = div_up(m, MR), rows = m / strips, taller = m % strips;
    for (ptrdiff_t strip = 0, i = 0; strip < strips; strip++) {
        ptrdiff_t here = rows + (strip < taller);
        if (ld_to != NR && i + 2 * here <= m) /* the lines of C that the next strip will write */
            for (ptrdiff_t r = here; r < 2 * here; r++) __builtin_prefetch(to + (i + r) * ld_to, 1);
        fetch_rows(next, each);
        const real *strip_a = a_col ? a + i * a_row : a + strip * k * MR;
        ptrdiff_t row = a_col ? a_row : 1, col = a_col ? a_col : MR;
        if (from && pairs)
            micro_add_pairs(here, NR, k, strip_a, row, col, panel, NR, from + i * ld_from, ld_from, to + i * ld_to, ld_to, ahead);
        else if (pairs)
            micro_set_pairs(here, NR, k, strip_a, row, col, panel, NR, to + i * ld_to, ld_to, ahead);
        else if (from)
            micro_add(here, NR, k, strip_a, row, col, panel, NR, from + i * ld_from, ld_from, to + i * ld_to, ld_to, ahead);
        else
            micro_set(here, NR, k, strip_a, row, col, panel, NR, to + i * ld_to, ld_to, ahead);
        ahead.at += k * ahead.step;
        i += here;
    }
}

/* The strips of a transposed A, each (k, MR): what micro_strips reads with a_col 0. Row by row of A, which lie far apart; whole
 * vectors: what is read past the last column is the next row, what is stored past a strip is written over by it. So the last row is
 * cut to size, and rows shorter than a vector. pairs: k counts pairs of rows, and `rows` rows are there. */
INLINE void pack_strips(const int pairs, const real *a, ptrdiff_t a_col, ptrdiff_t m, ptrdiff_t k, ptrdiff_t rows, real *to) {
    ptrdiff_t strips = div_up(m, MR), height = m / strips, taller = m % strips, apart = k * MR, step = (1 + pairs) * a_col;
    for (ptrdiff_t p = 0; p < k; p++, a += step, to += MR) {
        for (ptrdiff_t i = 0; i < m; i += LINE)
            for (int row = 0; row <= pairs; row++) __builtin_prefetch(a + AHEAD * step + row * a_col + i);
        const real *from = a, *below = a + a_col;
        const int cut = p + 1 == k || a_col < VL;
        real *strip_to = to;
        for (ptrdiff_t strip = 0; strip < strips; strip++, strip_to += apart) {
            ptrdiff_t here = height + (strip < taller);
            for (ptrdiff_t r = 0; r < MR && !cut; r += VL)
                store(strip_to + r, pairs ? to_pairs(load(from + r), load(below + r)) : load(from + r));
            for (ptrdiff_t r = 0; r < here && cut; r += VL) {
                ptrdiff_t left = min_size(here - r, VL);
                real line[VL] = {0}, line_below[VL] = {0};
                memcpy(line, from + r, left * sizeof(real));
                if (pairs && 2 * p + 1 < rows) memcpy(line_below, below + r, left * sizeof(real));
                if (pairs) store(line, to_pairs(load(line), load(line_below)));
                memcpy(strip_to + r, line, left * sizeof(real));
            }
            from += here;
            below += here;
        }
    }
}

/* to: panels (columns / NR, kc, NR) of B, whose element (0, 0) is at `from`; zeros past `columns`. */
static void pack_panels(const real *from, ptrdiff_t ldb, int trans_b, ptrdiff_t columns, ptrdiff_t kc, real *to) {
    ptrdiff_t whole = trans_b ? 0 : columns / NR;
    for (ptrdiff_t p = 0; p < kc && whole; p++)
        for (ptrdiff_t j = 0; j < whole; j++) {
            const real *row = from + p * ldb + j * NR;
            __builtin_prefetch(row + AHEAD * ldb); /* the processor does not see across pages */
            store(to + (j * kc + p) * NR, load(row));
            store(to + (j * kc + p) * NR + VL, load(row + VL));
        }
    for (ptrdiff_t j = whole * NR; j < columns; j += NR) {
        if (trans_b)
            pack_transposed(from + j * ldb, ldb, min_size(NR, columns - j), kc, to + j * kc, NR, NR);
        else
            pack_plain(from + j, ldb, kc, columns - j, to + j * kc, NR);
    }
}

/* The same in pairs, of `rows` rows of B: kc is div_up(rows, 2). */
static void pack_panel_pairs(const real *from, ptrdiff_t ldb, int trans_b, ptrdiff_t columns, ptrdiff_t kc, ptrdiff_t rows, real *to) {
    const ptrdiff_t whole = columns / VL * VL;
    for (ptrdiff_t p = 0; p < kc && !trans_b; p++) {
        const real *first = from + 2 * p * ldb, *second = first + ldb;
        const int single = 2 * p + 1 >= rows;
        for (ptrdiff_t j = 0; j < whole; j += VL) {
            __builtin_prefetch(first + AHEAD * 2 * ldb + j);
            __builtin_prefetch(second + AHEAD * 2 * ldb + j);
            store(to + (j / NR * kc + p) * NR + j % NR, to_pairs(load(first + j), single ? all(0) : load(second + j)));
        }
        for (ptrdiff_t j = whole; j < round_up(columns, NR); j += VL) {
            ptrdiff_t left = max_size(columns - j, 0);
            vec below = single ? all(0) : load_some(second + j, left, 0);
            store(to + (j / NR * kc + p) * NR + j % NR, to_pairs(load_some(first + j, left, 0), below));
        }
    }
    for (ptrdiff_t j = 0; j < round_up(columns, NR) && trans_b; j += VL)
        for (ptrdiff_t p = 0; p < kc; p += VL) {
            real square[VL * VL] = {0}, turned[VL * VL];
            for (ptrdiff_t i = 0; i < min_size(VL, columns - j); i++) {
                const real *row = from + (j + i) * ldb + 2 * p;
                __builtin_prefetch(row + VL * ldb);
                __builtin_prefetch(row + VL * ldb + LINE);
                pair_row(row, min_size(2 * VL, rows - 2 * p), VL, square + i * VL);
            }
            real *panel = to + (j / NR * kc + p) * NR + j % NR;
            if (p + VL <= kc) {
                transpose_square(square, VL, panel, NR);
                continue;
            }
            transpose_square(square, VL, turned, VL);
            for (ptrdiff_t i = 0; p + i < kc; i++) store(panel + i * NR, load(turned + i * VL));
        }
}

/* c (rows, columns; ldc) = or += the product of a strip and a panel of `width` readable columns. Where fewer are meant, it
 * goes through a tile of full width, whose chain starts from c all the same. */
static void micro_edge(ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t width, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col,
                       const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc, int add, real *corner) {
    int whole = columns == width;
    if (add && !whole) pack_plain(c, ldc, rows, columns, corner, width);
    real *to = whole ? c : corner;
    ptrdiff_t ld = whole ? ldc : width;
    const struct ahead nothing = {0};
    if (add)
        micro_add(rows, width, k, a, a_row, a_col, b, ldb, to, ld, to, ld, nothing);
    else
        micro_set(rows, width, k, a, a_row, a_col, b, ldb, to, ld, nothing);
    for (ptrdiff_t r = 0; r < rows && !whole; r++) memcpy(c + r * ldc, corner + r * width, columns * sizeof(real));
}

/* c_mn = or += the product (plus bias_n, if it is not NULL), the part of C at rows [m0, m1) and columns [n0, n1). work: gemm_room()
 * reals. pairs: of factors rounded to bfloat16; a step of the chain is two of k then, and A is packed, too. */
INLINE void gemm_piece(const int pairs, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb, int trans_b, real *c,
                       ptrdiff_t ldc, ptrdiff_t m0, ptrdiff_t m1, ptrdiff_t n0, ptrdiff_t n1, ptrdiff_t k, int accumulate,
                       const real *bias_n, real *work, int *stop) {
    const int per = 1 + pairs, packs_a = pairs || a_col != 1;
    const ptrdiff_t steps = div_up(k, per), wide = group_width(n1 - n0, packs_a), deep = depth(steps);
    real *packed_b = work, *corner = packed_b + wide * deep, *packed_a = corner + MC * NR;
    const struct ahead nothing = {0};
    for (ptrdiff_t group = n0; group < n1; group += wide)
        for (ptrdiff_t s0 = 0; s0 < steps; s0 += deep) {
            const ptrdiff_t columns = min_size(wide, n1 - group), kc = min_size(deep, steps - s0), k0 = s0 * per, k_here = min_size(kc * per, k - k0);
            /* 1: a group of panels of B */
            const real *from_b = trans_b ? b + group * ldb + k0 : b + k0 * ldb + group;
            if (pairs)
                pack_panel_pairs(from_b, ldb, trans_b, columns, kc, k_here, packed_b);
            else
                pack_panels(from_b, ldb, trans_b, columns, kc, packed_b);
            for (ptrdiff_t i0 = m0; i0 < m1; i0 += MC) {
                const ptrdiff_t m = min_size(MC, m1 - i0);
                if (mt_stopped(stop)) return;
                real *to = c + i0 * ldc + group;
                /* 2: strips of A, if they do not lie well */
                const real *from = a + i0 * a_row + k0 * a_col;
                ptrdiff_t row = a_row;
                if (a_col != 1) {
                    pack_strips(pairs, from, a_col, m, kc, k_here, packed_a);
                    from = packed_a;
                } else if (pairs) {
                    row = round_up(kc, VL) + LINE; /* so that rows share no set of L1 */
                    for (ptrdiff_t i = 0; i < m; i++) pair_row(from + i * a_row, k_here, kc, packed_a + i * row);
                    from = packed_a;
                }
                /* 3: every strip with every panel, while the next part of A comes near */
                const int last = i0 + m == m1;
                const ptrdiff_t i1 = last ? m0 : i0 + m, k1 = last ? k0 + k_here : k0;
                const ptrdiff_t m_next = min_size(MC, m1 - i1), k_next = min_size(deep * per, k - k1);
                const real *at = a + i1 * a_row + k1 * a_col;
                struct rows next = a_col == 1 ? (struct rows){at, a_row, m_next, k_next} : (struct rows){at, a_col, k_next, m_next};
                const ptrdiff_t each = div_up(next.count, div_up(columns, NR) * div_up(m, MR));
                for (ptrdiff_t j = 0; j < columns; j += NR) {
                    /* What the chains start from. A panel that is not whole goes through the corner. */
                    const real *first = accumulate || s0 ? to + j : bias_n ? bias_n + group + j : NULL;
                    const ptrdiff_t width = min_size(NR, columns - j), ld_first = accumulate || s0 ? ldc : 0;
                    if (width == NR) {
                        micro_strips(pairs, m, kc, from, row, a_col == 1, packed_b + j * kc, first, ld_first, to + j, ldc, &next, each, nothing);
                        continue;
                    }
                    if (first) pack_plain(first, ld_first, m, width, corner, NR);
                    micro_strips(pairs, m, kc, from, row, a_col == 1, packed_b + j * kc, first ? corner : NULL, NR, corner, NR, &next, each,
                                 nothing);
                    for (ptrdiff_t r = 0; r < m; r++) memcpy(to + r * ldc + j, corner + r * NR, width * sizeof(real));
                }
            }
        }
}

/* The same for at most MR rows: A is read where it lies, and so is B unless it is transposed, for it is used but once. */
static void gemm_few(const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b, ptrdiff_t ldb, int trans_b, real *c, ptrdiff_t ldc,
                     ptrdiff_t m, ptrdiff_t n0, ptrdiff_t n1, ptrdiff_t k, int accumulate, const real *bias_n, real *work) {
    const ptrdiff_t width = GROUP * NR;
    for (ptrdiff_t r = 0; r < m && bias_n; r++) memcpy(c + r * ldc + n0, bias_n + n0, (n1 - n0) * sizeof(real));
    accumulate |= bias_n != NULL;
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

/* a_mk, b_kn (transposed in memory if trans_*) and bias_n, or NULL, read; c_mn written, or accumulated. -1: no workspace. */
INLINE int product(const int pairs, const real *a, const real *b, real *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
                   int accumulate, const real *bias_n) {
    if (!m || !n) return 0;
    if (!k) {
        for (ptrdiff_t r = 0; r < m && bias_n; r++) memcpy(c + r * n, bias_n, n * sizeof(real));
        if (!accumulate && !bias_n) memset(c, 0, (size_t)m * n * sizeof(real));
        return 0;
    }
    ptrdiff_t a_row = trans_a ? 1 : k, a_col = trans_a ? m : 1, ldb = trans_b ? k : n;
    double work = fmax(2.0 * m * n * k / VL, 0.1 * n * k * sizeof(real)); /* few rows wait for B, read at 100 GB/s */
    /* Four pieces a thread, for balance: columns, for a piece packs its own of B, and rows only where columns are too few for the
     * threads; the balance that pieces of rows bring is worth less than packing B once. Where A is packed, a piece packs its own of
     * A, too: one piece a thread then, cut so that the least is packed; an element of A takes about twice as long as one of B. */
    const int few = !pairs && m <= MR, packs_a = pairs || a_col != 1;
    const ptrdiff_t threads = mt_team(1 << 20, work), panels = div_up(n, NR);
    ptrdiff_t wanted = threads > 1 && !packs_a ? 4 * threads : threads;
    ptrdiff_t most_columns = few ? div_up(panels, GROUP) : div_up(panels, 4), most_rows = few ? 1 : div_up(m, 4 * MR);
    ptrdiff_t column_pieces = min_size(wanted, most_columns);
    if (column_pieces > threads) column_pieces -= column_pieces % threads; /* or the last pieces would leave threads idle */
    ptrdiff_t row_pieces = column_pieces >= threads ? 1 : min_size(div_up(wanted, column_pieces), most_rows);
    for (ptrdiff_t columns = 1; packs_a && columns < column_pieces; columns++) {
        ptrdiff_t rows = div_up(wanted, columns);
        if (rows <= most_rows && 2 * m * columns + n * rows < 2 * m * column_pieces + n * row_pieces)
            column_pieces = columns, row_pieces = rows;
    }
    ptrdiff_t piece_n = round_up(div_up(n, column_pieces), few ? GROUP * NR : NR), piece_m = div_up(m, row_pieces);
    ptrdiff_t pieces = row_pieces * column_pieces;
    int team = mt_team(pieces, work), one_row = few && m == 1 && a_col == 1 && !trans_b && n >= 8 * NR;
    size_t room = gemm_room(piece_n, div_up(k, 1 + pairs), packs_a);
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
    int stop = 0;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t m0 = piece % row_pieces * piece_m, n0 = piece / row_pieces * piece_n;
        ptrdiff_t m1 = min_size(m, m0 + piece_m), n1 = min_size(n, n0 + piece_n);
        real *mine = workspace + room * mt_thread_id();
        if (m0 >= m1 || n0 >= n1 || mt_stopped(&stop)) continue;
        if (one_row) {
            ptrdiff_t streamed = n0 + (n1 - n0) / VL * VL;
            if (bias_n) memcpy(c + n0, bias_n + n0, (streamed - n0) * sizeof(real));
            gemv_piece(a, b, ldb, c, n0, streamed, k, accumulate || bias_n);
            n0 = streamed;
        }
        if (few)
            gemm_few(a, a_row, a_col, b, ldb, trans_b, c, n, m, n0, n1, k, accumulate, bias_n, mine);
        else
            gemm_piece(pairs, a, a_row, a_col, b, ldb, trans_b, c, n, m0, m1, n0, n1, k, accumulate, bias_n, mine, &stop);
    }
    free(workspace);
    return stop ? MT_STOPPED : 0;
}

static int gemm(const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b, int accumulate,
                const void *bias) {
    return product(0, a, b, c, m, n, k, trans_a, trans_b, accumulate, bias);
}

/* The same of factors rounded to bfloat16; in double there is none. */
static int gemm_bfloat16(const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
                         int accumulate, const void *bias) {
    return product(!REAL_IS_DOUBLE, a, b, c, m, n, k, trans_a, trans_b, accumulate, bias);
}
