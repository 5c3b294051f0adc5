/* Products with a weight packed once, and what follows them: bias, activation, gate, residual; or the best k of a row.
 *
 * A weight lies in panels of NR columns, d_in rows each, one after the other as a tile reads them; of a gated pair every panel
 * is followed by its gate's. A block of rows goes over a few panels at a time, its sums in a small array that stays in cache;
 * there they are finished while they are warm. A sum is one chain over k whatever the block, so a row has the same bits in any
 * company. x is read where it lies, unless it is rounded or quantised first. */

enum { FETCHED = 8192 };  /* bytes: how far ahead of few rows panels are fetched; int8 has a distance of its own */
enum { PART = 512 };      /* columns of linear_top_k that share a maximum and a sum above it */
enum { WIDENED = 256 };   /* rows of a bfloat16 panel that are made float32 at a time, where it is multiplied so */
enum { STAYS = 1 << 22 }; /* bytes of weight that go over all rows before the next: they stay in L3 */

/* What lies where in a packed weight. Scales and sums of columns are of int8 alone: (panels, groups, NR) each. */
struct packed_layout {
    ptrdiff_t panels, groups;
    size_t panel, scales, column_sums, bytes; /* a panel's bytes; where the rest begins; all */
};

static struct packed_layout packed_layout(const struct mt_packed *w) {
    struct packed_layout at;
    at.panels = div_up(w->d_out, NR) * (w->gated ? 2 : 1);
    at.groups = w->kind == MT_INT8 && w->d_in ? div_up(w->d_in, w->group) : 0;
    size_t element = w->kind == MT_REAL ? sizeof(real) : w->kind == MT_BFLOAT16 ? 2 : 1;
    at.panel = round_up(round_up(w->d_in, 4) * NR * element, 64);
    size_t rest = (size_t)at.panels * at.groups * NR * 4;
    at.scales = at.panels * at.panel;
    at.column_sums = at.scales + (rest + 63) / 64 * 64;
    at.bytes = at.column_sums + (rest + 63) / 64 * 64;
    return at;
}

/* In the units of mt_team: few rows wait for the weight rather than for arithmetic. 1 MB of it is worth two threads: 10 us become
 * 6; where they slept it is 33 for 15, but that is the first of many kernels. */
static double packed_work(const struct mt_packed *w, const struct packed_layout *at, ptrdiff_t n) {
    return fmax(2.0 * n * w->d_in * w->d_out * (w->gated ? 2 : 1) / VL, 0.2 * at->scales);
}

static size_t packed_bytes(const struct mt_packed *w) { return packed_layout(w).bytes; }

#if ISA_BF16 && !REAL_IS_DOUBLE
enum { PAIRED = 1 };
#else
enum { PAIRED = 0 };
#endif

#if !REAL_IS_DOUBLE
/* Where column j of row p is in a bfloat16 panel. PAIRED: a lane of 4 bytes holds rows p and p + 1 of a column, as the instruction
 * takes them. Else it holds column i below and column i + VL above, so that two vectors come out of one by a shift and a mask. */
INLINE ptrdiff_t bfloat16_at(ptrdiff_t p, ptrdiff_t j) {
    return PAIRED ? (p / 2 * NR + j) * 2 + p % 2 : p * NR + j % VL * 2 + j / VL;
}

/* And in an int8 one. */
INLINE ptrdiff_t int8_at(ptrdiff_t p, ptrdiff_t j) { return (p / STEP * NR + j) * STEP + p % STEP; }
#endif

/* One panel of a weight, from its rows as pack_panels leaves them, (d_in, NR) with zeros past the last column. */
#if !REAL_IS_DOUBLE
static void pack_bfloat16(const struct mt_packed *w, const real *from, uint16_t *to) {
    for (ptrdiff_t p = 0; p < w->d_in; p++)
        for (ptrdiff_t j = 0; j < NR; j++) to[bfloat16_at(p, j)] = (uint16_t)to_bfloat16(from[p * NR + j]);
}

/* scales, column_sums (groups, NR) of this panel */
static void pack_int8(const struct mt_packed *w, ptrdiff_t groups, const real *from, int8_t *to, real *scales, int32_t *column_sums) {
    for (ptrdiff_t g = 0; g < groups; g++) {
        ptrdiff_t end = min_size(w->d_in, (g + 1) * w->group);
        real *scale = scales + g * NR;
        int32_t *sum = column_sums + g * NR;
        for (ptrdiff_t p = g * w->group; p < end; p++)
            for (ptrdiff_t j = 0; j < NR; j++) scale[j] = fabsf(from[p * NR + j]) > scale[j] ? fabsf(from[p * NR + j]) : scale[j];
        for (ptrdiff_t j = 0; j < NR; j++) scale[j] /= 127;
        for (ptrdiff_t p = g * w->group; p < end; p++)
            for (ptrdiff_t j = 0; j < NR; j += VL) {
                vec scale_j = load(scale + j);
                ivec q = rounded(load(from + p * NR + j) / choose(scale_j > 0, scale_j, all(1)));
                q &= ~(ivec)(scale_j == 0);
                for (ptrdiff_t lane = 0; lane < VL; lane++) { /* a denormal scale may be too small by its own rounding */
                    int32_t n = q[lane] > 127 ? 127 : q[lane] < -127 ? -127 : q[lane];
                    to[int8_at(p, j + lane)] = (int8_t)n;
                    sum[j + lane] += n;
                }
            }
    }
}
#endif

/* weight, gate (d_in, d_out), transposed (d_out, d_in), read; w->memory (packed_bytes) written. -1: no workspace. */
static int pack(const struct mt_packed *w, const void *weight, const void *gate, int transposed) {
    struct packed_layout at = packed_layout(w);
    size_t room = w->kind == MT_REAL ? 0 : (size_t)round_up(w->d_in * NR, 16);
    int team = mt_team(at.panels, 20.0 * w->d_in * w->d_out);
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
    memset(w->memory, 0, at.bytes);
#pragma omp parallel for num_threads(team) schedule(static)
    for (ptrdiff_t panel = 0; panel < at.panels; panel++) {
        const real *from = w->gated && panel % 2 ? gate : weight;
        ptrdiff_t first = panel / (w->gated + 1) * NR, ld = transposed ? w->d_in : w->d_out;
        char *to = (char *)w->memory + panel * at.panel;
        real *rows = w->kind == MT_REAL ? (real *)to : workspace + room * mt_thread_id();
        pack_panels(from + first * (transposed ? ld : 1), ld, transposed, min_size(NR, w->d_out - first), w->d_in, rows);
#if !REAL_IS_DOUBLE
        if (w->kind == MT_BFLOAT16) pack_bfloat16(w, rows, (uint16_t *)to);
        if (w->kind == MT_INT8)
            pack_int8(w, at.groups, rows, (int8_t *)to, (real *)((char *)w->memory + at.scales) + panel * at.groups * NR,
                      (int32_t *)((char *)w->memory + at.column_sums) + panel * at.groups * NR);
#endif
    }
    free(workspace);
    return 0;
}

/* weight, and gate if w has one, (d_in, d_out) written: what products are made with. */
static void unpack(const struct mt_packed *w, void *weight, void *gate) {
    struct packed_layout at = packed_layout(w);
    for (ptrdiff_t panel = 0; panel < at.panels; panel++) {
        const char *from = (const char *)w->memory + panel * at.panel;
        real *to = w->gated && panel % 2 ? gate : weight;
        ptrdiff_t first = panel / (w->gated + 1) * NR;
        for (ptrdiff_t p = 0; p < w->d_in; p++)
            for (ptrdiff_t j = 0; first + j < w->d_out && j < NR; j++) {
                real x = 0;
                if (w->kind == MT_REAL) x = ((const real *)from)[p * NR + j];
#if !REAL_IS_DOUBLE
                else if (w->kind == MT_BFLOAT16)
                    x = from_bfloat16(((const uint16_t *)from)[bfloat16_at(p, j)]);
                else
                    x = ((const int8_t *)from)[int8_at(p, j)] *
                        ((const real *)((const char *)w->memory + at.scales))[(panel * at.groups + p / w->group) * NR + j];
#endif
                to[p * w->d_out + first + j] = x;
            }
    }
}

/* One panel from the numbers of its columns as `unpack_kept` gives them, (columns, d_in) and scales (columns, groups). */
#if !REAL_IS_DOUBLE
static void repack_bfloat16(const struct mt_packed *w, const uint16_t *from, ptrdiff_t columns, uint16_t *to) {
    for (ptrdiff_t p = 0; p < w->d_in; p++)
        for (ptrdiff_t j = 0; j < columns; j++) to[bfloat16_at(p, j)] = from[j * w->d_in + p];
}

static void repack_int8(const struct mt_packed *w, ptrdiff_t groups, const int8_t *from, const real *scales_from, ptrdiff_t columns,
                        int8_t *to, real *scales, int32_t *column_sums) {
    const ptrdiff_t whole = w->d_in / STEP * STEP;
    for (ptrdiff_t p = 0; p < whole; p += STEP)
        for (ptrdiff_t j = 0; j < columns; j++) memcpy(to + int8_at(p, j), from + j * w->d_in + p, STEP);
    for (ptrdiff_t j = 0; j < columns; j++) {
        for (ptrdiff_t p = whole; p < w->d_in; p++) to[int8_at(p, j)] = from[j * w->d_in + p];
        for (ptrdiff_t g = 0; g < groups; g++) {
            int32_t sum = 0;
            for (ptrdiff_t p = g * w->group; p < min_size(w->d_in, (g + 1) * w->group); p++) sum += from[j * w->d_in + p];
            column_sums[g * NR + j] = sum;
            scales[g * NR + j] = scales_from[j * groups + g];
        }
    }
}
#endif

/* values, gate (d_out, d_in) of the weight's kind, of int8 with scales, gate_scales (d_out, groups), read; w->memory written, with the
 * bits that `pack` leaves there. -1: no workspace. */
static int repack(const struct mt_packed *w, const void *values, const void *scales, const void *gate, const void *gate_scales) {
    if (w->kind == MT_REAL) return pack(w, values, gate, 1);
#if !REAL_IS_DOUBLE
    struct packed_layout at = packed_layout(w);
    memset(w->memory, 0, at.bytes);
#pragma omp parallel for num_threads(mt_team(at.panels, 4.0 * w->d_in * w->d_out)) schedule(static)
    for (ptrdiff_t panel = 0; panel < at.panels; panel++) {
        const int of_gate = w->gated && panel % 2;
        ptrdiff_t first = panel / (w->gated + 1) * NR, columns = min_size(NR, w->d_out - first), place = panel * at.groups * NR;
        char *to = (char *)w->memory + panel * at.panel;
        const void *from = of_gate ? gate : values;
        if (w->kind == MT_BFLOAT16)
            repack_bfloat16(w, (const uint16_t *)from + first * w->d_in, columns, (uint16_t *)to);
        else
            repack_int8(w, at.groups, (const int8_t *)from + first * w->d_in, (const real *)(of_gate ? gate_scales : scales) + first * at.groups,
                        columns, (int8_t *)to, (real *)((char *)w->memory + at.scales) + place,
                        (int32_t *)((char *)w->memory + at.column_sums) + place);
    }
#endif
    (void)scales, (void)gate_scales;
    return 0;
}

/* What `repack` takes, written: not for reals, which `unpack` gives. */
static void unpack_kept(const struct mt_packed *w, void *values, void *scales, void *gate, void *gate_scales) {
#if !REAL_IS_DOUBLE
    struct packed_layout at = packed_layout(w);
    for (ptrdiff_t panel = 0; panel < at.panels; panel++) {
        const int of_gate = w->gated && panel % 2;
        ptrdiff_t first = panel / (w->gated + 1) * NR, columns = min_size(NR, w->d_out - first);
        const char *from = (const char *)w->memory + panel * at.panel;
        const real *scale = (const real *)((const char *)w->memory + at.scales) + panel * at.groups * NR;
        void *to = of_gate ? gate : values;
        real *scales_to = of_gate ? gate_scales : scales;
        for (ptrdiff_t j = 0; j < columns; j++) {
            for (ptrdiff_t p = 0, place = (first + j) * w->d_in; p < w->d_in; p++, place++) {
                if (w->kind == MT_BFLOAT16)
                    ((uint16_t *)to)[place] = ((const uint16_t *)from)[bfloat16_at(p, j)];
                else
                    ((int8_t *)to)[place] = ((const int8_t *)from)[int8_at(p, j)];
            }
            for (ptrdiff_t g = 0; g < at.groups; g++) scales_to[(first + j) * at.groups + g] = scale[g * NR + j];
        }
    }
#endif
    (void)w, (void)values, (void)scales, (void)gate, (void)gate_scales;
}

/* Two vectors of a panel's row, or of two rows where they are paired, and the bytes of one. */
INLINE ptrdiff_t row_bytes(const int kind) { return (kind == MT_BFLOAT16 && !PAIRED ? 1 : 2) * VECTOR_BYTES; }

INLINE void load_panel(const int kind, const char *b, vec *b_2) {
#if !REAL_IS_DOUBLE
    if (kind == MT_BFLOAT16 && !PAIRED) {
        ivec both = *(const ivec_anywhere *)b;
        b_2[0] = (vec)(both << 16);
        b_2[1] = (vec)(both & all_lanes((lane)0xFFFF0000u));
        return;
    }
#endif
    (void)kind;
    b_2[0] = load((const real *)b);
    b_2[1] = load((const real *)b + VL);
}

/* micro_tile for panels b_panel bytes apart, sums (panels, rows, NR), that begin with start (panels, NR) or 0 at NULL; k counts pairs
 * where x and b are of pairs. */
INLINE void packed_tile(const int rows, const int panels, const int kind, ptrdiff_t k, const real *x, ptrdiff_t x_row, const char *b,
                        ptrdiff_t b_panel, const real *start, real *sums) {
    vec sum[2 * MR], b_j[8];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2 * panels; j++) sum[i * 2 * panels + j] = start ? load(start + j * VL) : all(0);
    const real *x_3[(MR + 2) / 3];
    for (int i = 0; i < rows; i += 3) x_3[i / 3] = x + i * x_row;
    const int pairs = kind == MT_BFLOAT16 && PAIRED;
    ptrdiff_t ahead = FETCHED;
    const ptrdiff_t turn = max_size(k - FETCHED / row_bytes(kind), 0);
    for (ptrdiff_t p = 0; p < k; p++, b += row_bytes(kind)) {
        if (p == turn) ahead += (panels - 1) * b_panel; /* past a panel's end lies the next of these, which is read now */
        for (int j = 0; j < panels; j++) {
            for (int line = 0; rows > 1 && line < row_bytes(kind); line += 64)
                __builtin_prefetch(b + j * b_panel + ahead + line, 0, rows > 4 || kind == MT_BFLOAT16 ? 2 : 3); /* one row comes as quickly without */
            load_panel(kind, b + j * b_panel, b_j + 2 * j);
        }
        for (int i = 0; i < rows; i++) {
            const real *factor = x_3[i / 3] + i % 3 * x_row;
            ivec pair = pairs ? all_lanes(*(const lane_anywhere *)factor) : (ivec){0};
            for (int j = 0; j < 2 * panels; j++) {
                vec *to = sum + i * 2 * panels + j;
                *to = pairs ? add_pairs(*to, pair, (ivec)b_j[j]) : *to + *factor * b_j[j];
            }
        }
        for (int i = 0; i < rows; i += 3) x_3[i / 3]++;
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2 * panels; j++) store(sums + (j / 2 * rows + i) * NR + j % 2 * VL, sum[i * 2 * panels + j]);
}

/* sums (panels, rows, NR) for at most MR rows, read once over all of k. */
INLINE void packed_strip(const int kind, ptrdiff_t rows, ptrdiff_t panels, ptrdiff_t k, const real *x, ptrdiff_t x_row, const char *b,
                         ptrdiff_t b_panel, const real *start, real *sums) {
    const ptrdiff_t s_panel = rows * NR;
    const int two = kind == MT_BFLOAT16 && PAIRED ? 2 : 1; /* the instruction takes so long that one panel has too few sums */
#define PACKED_STRIP(n, at_once)                                                                                             \
    case n:                                                                                                                  \
        for (; at_once > 1 && panels >= at_once; panels -= at_once, b += at_once * b_panel, sums += at_once * s_panel) {     \
            packed_tile(n, at_once, kind, k, x, x_row, b, b_panel, start, sums);                                             \
            if (start) start += at_once * NR;                                                                                \
        }                                                                                                                    \
        for (; panels; panels--, b += b_panel, sums += s_panel) {                                                            \
            packed_tile(n, 1, kind, k, x, x_row, b, 0, start, sums);                                                         \
            if (start) start += NR;                                                                                          \
        }                                                                                                                    \
        break;
    switch (rows) {
        PACKED_STRIP(1, 4) PACKED_STRIP(2, 2) PACKED_STRIP(3, 2) PACKED_STRIP(4, two) PACKED_STRIP(5, two) PACKED_STRIP(6, two)
#if MR == 12
        PACKED_STRIP(7, 1) PACKED_STRIP(8, 1) PACKED_STRIP(9, 1) PACKED_STRIP(10, 1) PACKED_STRIP(11, 1) PACKED_STRIP(12, 1)
#endif
    }
}

/* The same for at most two strips: the second finds the panel in L2. */
static void packed_few(int kind, ptrdiff_t rows, ptrdiff_t panels, ptrdiff_t k, const real *x, ptrdiff_t x_row, const char *b,
                       ptrdiff_t b_panel, const real *start, real *sums) {
    ptrdiff_t first = rows > MR ? (rows + 1) / 2 : rows, at_once = rows > MR ? 1 : panels;
    for (ptrdiff_t j = 0; j < panels; j += at_once, b += at_once * b_panel, sums += rows * NR)
        for (ptrdiff_t i = 0; i < rows; i += first) {
            ptrdiff_t here = min_size(first, rows - i);
#if !REAL_IS_DOUBLE
            if (kind == MT_BFLOAT16) {
                packed_strip(MT_BFLOAT16, here, at_once, k, x + i * x_row, x_row, b, b_panel, NULL, sums + i * NR);
                continue;
            }
#endif
            packed_strip(MT_REAL, here, at_once, k, x + i * x_row, x_row, b, b_panel, start ? start + j * NR : NULL, sums + i * NR);
        }
    (void)kind;
}

/* The rows of one call: as they came, rounded to bfloat16, or quantised. */
struct packed_rows {
    const real *given;   /* (N, d_in) */
    void *memory;        /* of what is made of them, or NULL */
    real *rounded;       /* (N, row) */
    const real *x;       /* (N, row): given or rounded */
    ptrdiff_t row, k;    /* k of a row count: d_in, or half of it in pairs */
    int32_t *q;          /* (N, steps), or (N, steps, 2) as halve_row leaves it */
    real *scale;         /* (N, groups) */
    int32_t *zero;       /* (N, groups) */
    ptrdiff_t steps, halves;
};

/* What packed_sums works in, in bytes: sums, and a chunk of a panel as the tile wants it with its integer sums. */
enum { SUMS_ROOM = PANELS * MC * NR * sizeof(real), CHUNK_ROOM = 2 * WIDENED * NR * sizeof(real), PACKED_ROOM = SUMS_ROOM + CHUNK_ROOM };

#if !REAL_IS_DOUBLE
/* c (m, NR) = x (m, steps) . a panel's part, for more rows than int8_few takes: one chunk of it after the other, each for all strips,
 * which meanwhile fetch what lies behind it. chunk: room for one that is widened. */
static void int8_strips(ptrdiff_t m, ptrdiff_t steps, const int32_t *x, ptrdiff_t x_row, const char *b, int32_t *c, char *chunk) {
    const ptrdiff_t strips = div_up(m, MR), height = m / strips, taller = m % strips;
    for (ptrdiff_t s = 0; s < steps; s += STEPS, b += STEPS * NR * STEP) {
        const ptrdiff_t some = min_size(STEPS, steps - s);
        struct ahead next = {b + some * NR * STEP, div_up(NR * STEP, strips)};
        for (ptrdiff_t v = 0; WIDENS && v < 2 * some; v++)
            *(ivec_anywhere *)(chunk + v * VECTOR_BYTES) = widened((const int8_t *)b + v * VL * STEP);
        for (ptrdiff_t strip = 0, i = 0; strip < strips; strip++, next.at += some * next.step) {
            const ptrdiff_t here = height + (strip < taller);
            int8_strip(here, some, x + i * x_row + s, x_row, WIDENS ? chunk : b, next, c + i * NR, s > 0);
            i += here;
        }
    }
}

/* packed_sums of int8, panel after panel, so that weights are read in the order of memory and integer sums stay near; by tiles all panels
 * at once, for they have to be set up. chunk: CHUNK_ROOM bytes, then room for integer sums. */
static void int8_sums(const struct mt_packed *w, const struct packed_layout *at, const struct packed_rows *rows, ptrdiff_t r0, ptrdiff_t m,
                      ptrdiff_t first, ptrdiff_t panels, real *sums, char *chunk) {
    const int tiled = m >= FEWEST_TILED && w->group % (TILE * STEP) == 0 && w->d_in % (TILE * STEP) == 0;
    const ptrdiff_t few = m <= 2 * MR ? div_up(m, div_up(m, MR)) : 0, row = rows->steps * rows->halves, at_once = tiled ? panels : 1;
    int32_t *c = (int32_t *)(chunk + CHUNK_ROOM);
    for (ptrdiff_t j0 = 0; j0 < panels; j0 += at_once)
        for (ptrdiff_t g = 0; g < at->groups; g++) {
            const ptrdiff_t s0 = g * w->group / STEP, steps = div_up(min_size(w->d_in, (g + 1) * w->group), STEP) - s0;
            const char *b = (const char *)w->memory + (first + j0) * at->panel + s0 * NR * STEP;
            const int32_t *q = rows->q + r0 * row + s0 * rows->halves;
            if (tiled)
                int8_tiled(m, panels, steps, q, row, b, at->panel, c);
            else if (!few)
                int8_strips(m, steps, q, row, b, c, chunk);
            for (ptrdiff_t i = 0; few && !tiled && i < m; i += few)
                (rows->halves == 2 ? int8_fewest : int8_few)(min_size(few, m - i), steps, q + i * row, row, b, c + i * NR);
            for (ptrdiff_t j = j0; j < j0 + at_once; j++) {
                const ptrdiff_t place = ((first + j) * at->groups + g) * NR;
                dequantise(c + (j - j0) * m * NR, m, rows->scale + r0 * at->groups + g, rows->zero + r0 * at->groups + g, at->groups,
                           (const real *)((const char *)w->memory + at->scales) + place,
                           (const int32_t *)((const char *)w->memory + at->column_sums) + place, sums + j * m * NR, g > 0);
            }
        }
}
#endif

/* sums (panels, m, NR) of rows [r0, r0 + m) with panels from `first` on; m <= MC, panels <= PANELS. start: (panels, NR) what sums of
 * reals begin with, or NULL: 0. chunk: CHUNK_ROOM bytes, then room for integer sums in what is left. */
static void packed_sums(const struct mt_packed *w, const struct packed_layout *at, const struct packed_rows *rows, ptrdiff_t r0,
                        ptrdiff_t m, ptrdiff_t first, ptrdiff_t panels, const real *start, real *sums, char *chunk) {
    const char *b = (const char *)w->memory + first * at->panel;
    const real *x = rows->x + r0 * rows->row;
    if (!w->d_in) {
        for (ptrdiff_t i = 0; i < panels * m; i++)
            for (ptrdiff_t c = 0; c < NR; c++) sums[i * NR + c] = start ? start[i / m * NR + c] : 0;
        return;
    }
#if !REAL_IS_DOUBLE
    if (w->kind == MT_INT8) {
        int8_sums(w, at, rows, r0, m, first, panels, sums, chunk);
        return;
    }
#endif
    if (m <= 2 * MR) {
        packed_few(w->kind, m, panels, rows->k, x, rows->row, b, at->panel, start, sums);
        return;
    }
    const int widens = w->kind == MT_BFLOAT16 && !PAIRED;
    const ptrdiff_t row = row_bytes(w->kind), deep = widens ? WIDENED : depth(rows->k);
    for (ptrdiff_t k0 = 0; k0 < rows->k; k0 += deep)
        for (ptrdiff_t j = 0; j < panels; j++) {
            ptrdiff_t kc = min_size(deep, rows->k - k0);
            const char *from = b + j * at->panel;
            const real *panel = (const real *)(from + k0 * row);
            if (widens) {
                for (ptrdiff_t p = 0; p < kc; p++) {
                    vec b_2[2];
                    load_panel(MT_BFLOAT16, from + (k0 + p) * row, b_2);
                    store((real *)chunk + p * NR, b_2[0]);
                    store((real *)chunk + p * NR + VL, b_2[1]);
                }
                panel = (const real *)chunk;
            }
            /* The next chunk comes from L3 or beyond: the next panel's, or the first's further down, or the next group's. */
            ptrdiff_t down = k0 + deep < rows->k ? k0 + deep : 0;
            const char *next = j + 1 < panels ? from + at->panel + k0 * row : (down ? b : b + panels * at->panel) + down * row;
            struct ahead ahead = {next, div_up(row, div_up(m, MR))};
            real *to = sums + j * m * NR;
            const real *before = k0 ? to : start ? start + j * NR : NULL;
            if (PAIRED && w->kind == MT_BFLOAT16)
                micro_strips(1, m, kc, x + k0, rows->row, 1, panel, before, k0 ? NR : 0, to, NR, NULL, 0, ahead);
            else
                micro_strips(0, m, kc, x + k0, rows->row, 1, panel, before, k0 ? NR : 0, to, NR, NULL, 0, ahead);
        }
}

INLINE vec load_columns(const real *p, ptrdiff_t n) { return n >= VL ? load(p) : load_some(p, max_size(n, 0), 0); }

/* Sums of reals begin with the bias, as those of `gemm` do, so that both have the same bits: start (panels, NR) written from panel
 * `first` on, and returned; NULL where there is no bias, or it is added to sums of another kind. */
static const real *start_of(const struct mt_packed *w, const real *bias, const real *gate_bias, ptrdiff_t first, ptrdiff_t panels, real *start) {
    if (w->kind != MT_REAL || !(bias || gate_bias)) return NULL;
    for (ptrdiff_t panel = 0; panel < panels; panel++) {
        const real *from = w->gated && (first + panel) % 2 ? gate_bias : bias;
        const ptrdiff_t column = (first + panel) / (w->gated + 1) * NR;
        for (ptrdiff_t j = 0; j < NR; j += VL)
            store(start + panel * NR + j, from ? load_columns(from + column + j, w->d_out - column - j) : all(0));
    }
    return start;
}

/* out (m, columns; ld) = activation(y + bias) + residual, or activation(gate + gate_bias) * (y + bias) + residual, of sums
 * (panels, m, NR), where gates lie between. Row by row, for rows of `out` lie on pages of their own. */
INLINE void finish_kind(const int kind, const int gated, const real *sums, ptrdiff_t m, ptrdiff_t columns, const real *bias,
                        const real *gate_bias, const real *residual, real *out, ptrdiff_t ld) {
    for (ptrdiff_t i = 0; i < m; i++) {
        if (i + 4 < m)
            for (ptrdiff_t j = 0; j < columns; j += LINE) __builtin_prefetch(out + (i + 4) * ld + j, 1);
        for (ptrdiff_t j = 0; j < columns; j += VL) {
            ptrdiff_t n = min_size(VL, columns - j);
            const real *at = sums + (j / NR * (1 + gated) * m + i) * NR + j % NR;
            vec y = load(at);
            if (bias) y += load_columns(bias + j, n);
            if (gated) {
                vec gate = load(at + m * NR);
                if (gate_bias) gate += load_columns(gate_bias + j, n);
                y *= kind < 0 ? gate : activate_one(gate, kind);
            } else if (kind >= 0) {
                y = activate_one(y, kind);
            }
            if (residual) y += load_columns(residual + i * ld + j, n);
            if (n == VL)
                store(out + i * ld + j, y);
            else
                store_some(out + i * ld + j, y, n);
        }
    }
}

static void finish(int kind, int gated, const real *sums, ptrdiff_t m, ptrdiff_t columns, const real *bias, const real *gate_bias,
                   const real *residual, real *out, ptrdiff_t ld) {
#define FINISH(kind)                                                                               \
    if (gated) finish_kind(kind, 1, sums, m, columns, bias, gate_bias, residual, out, ld);         \
    else finish_kind(kind, 0, sums, m, columns, bias, gate_bias, residual, out, ld);               \
    break;
    switch (kind) {
    case MT_RELU: FINISH(MT_RELU)
    case MT_GELU: FINISH(MT_GELU)
    case MT_GELU_TANH: FINISH(MT_GELU_TANH)
    case MT_SILU: FINISH(MT_SILU)
    default: FINISH(-1)
    }
}

/* The place for rows that are rounded or quantised: 0, or -1 without memory. */
static int packed_rows(struct packed_rows *rows, const real *x, ptrdiff_t n, const struct mt_packed *w, const struct packed_layout *at) {
    *rows = (struct packed_rows){.given = x, .x = x, .row = w->d_in, .k = w->d_in, .halves = 1};
#if !REAL_IS_DOUBLE
    if (w->kind == MT_BFLOAT16) {
        rows->k = PAIRED ? div_up(w->d_in, 2) : w->d_in;
        rows->row = round_up(rows->k, VL);
        rows->memory = new_reals((size_t)n * rows->row);
        if (!rows->memory) return -1;
        rows->x = rows->rounded = rows->memory;
    } else if (w->kind == MT_INT8) {
        rows->steps = round_up(div_up(w->d_in, STEP), 16);
        rows->halves = n <= HALVED ? 2 : 1;
        rows->memory = aligned_alloc(64, ((size_t)n * (rows->steps * rows->halves + 2 * at->groups) * 4 + 64) / 64 * 64);
        if (!rows->memory) return -1;
        rows->q = rows->memory;
        rows->scale = (real *)(rows->q + (size_t)n * rows->steps * rows->halves);
        rows->zero = (int32_t *)(rows->scale + (size_t)n * at->groups);
    }
#endif
    (void)n, (void)at;
    return 0;
}

INLINE void packed_row(const struct packed_rows *rows, ptrdiff_t row, const struct mt_packed *w, const struct packed_layout *at) {
#if !REAL_IS_DOUBLE
    const real *x = rows->given + row * w->d_in;
    if (w->kind == MT_BFLOAT16) {
        real *to = rows->rounded + row * rows->row;
        if (PAIRED) pair_row(x, w->d_in, rows->k, to);
        else round_row(x, w->d_in, to);
        return;
    }
    int32_t *q = rows->q + row * rows->steps * rows->halves;
    quantise_row(x, w->d_in, w->group, (factor *)q, rows->scale + row * at->groups, rows->zero + row * at->groups);
    if (rows->halves == 2) halve_row(div_up(w->d_in, STEP), q);
#endif
    (void)rows, (void)row, (void)w, (void)at;
}

/* x (N, d_in), w read; out (N, d_out) written. -1: no workspace. */
static int packed_linear(const void *x, const struct mt_packed *w, const struct mt_epilogue *then, void *out_, ptrdiff_t n) {
    real *out = out_;
    if (!n || !w->d_out) return 0;
    struct packed_layout at = packed_layout(w);
    const int per = w->gated ? 2 : 1;
    ptrdiff_t blocks = div_up(n, MC), m = div_up(n, blocks), columns = at.panels / per;
    double work = packed_work(w, &at, n);
    /* Few rows are bound by memory: one stretch of it for each thread. More are cut for balance. */
    ptrdiff_t team = mt_team(max_size(columns, blocks), work), wanted = team == 1 ? 1 : n <= 2 * MR ? team : 4 * team;
    ptrdiff_t cuts = max_size(div_up(wanted, blocks), blocks > 1 ? (ptrdiff_t)(at.scales / STAYS) : 1);
    ptrdiff_t width = div_up(columns, min_size(columns, max_size(cuts, 1))), pieces = div_up(columns, width) * blocks;
    team = min_size(team, pieces);
    struct packed_rows rows;
    size_t room = PACKED_ROOM + (w->kind == MT_INT8 ? SUMS_ROOM : 0);
    char *workspace = aligned_alloc(64, room * team);
    if (!workspace || packed_rows(&rows, x, n, w, &at)) {
        free(workspace);
        return -1;
    }
    int stop = 0;
#pragma omp parallel num_threads((int)team)
    {
#pragma omp for schedule(static)
        for (ptrdiff_t row = 0; row < (w->kind == MT_REAL ? 0 : n); row++) packed_row(&rows, row, w, &at);
#pragma omp for schedule(dynamic)
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            ptrdiff_t r0 = piece % blocks * m, here = min_size(m, n - r0), end = min_size(columns, (piece / blocks + 1) * width);
            real *sums = (real *)(workspace + room * mt_thread_id());
            if (here <= 0) continue;
            for (ptrdiff_t c = piece / blocks * width; c < end && !mt_stopped(&stop); c += PANELS / per) {
                ptrdiff_t some = min_size(PANELS / per, end - c);
                ptrdiff_t column = c * NR, corner = r0 * w->d_out + column;
                const real *bias = then->bias, *gate_bias = then->gate_bias, *residual = then->residual;
                real room_for_start[PANELS * NR];
                const real *start = start_of(w, bias, gate_bias, c * per, some * per, room_for_start);
                if (start) bias = gate_bias = NULL;
                packed_sums(w, &at, &rows, r0, here, c * per, some * per, start, sums, (char *)sums + SUMS_ROOM);
                finish(then->activation, w->gated, sums, here, min_size(some * NR, w->d_out - column), bias ? bias + column : NULL,
                       gate_bias ? gate_bias + column : NULL, residual ? residual + corner : NULL, out + corner, w->d_out);
            }
        }
    }
    free(rows.memory);
    free(workspace);
    return stop ? MT_STOPPED : 0;
}

/* Some panels of sums, of which linear_top_k takes a row's best and its sum of exponentials. */
struct top_panels {
    ptrdiff_t column, d_out;  /* the first panel's first column; how many the weight has */
    ptrdiff_t rows, panels;   /* sums are (panels, rows, NR) */
    ptrdiff_t kept;           /* size of a heap */
    const real *bias;         /* (d_out,) or NULL */
    int sums_exp;             /* is the sum wanted? */
};

/* sums: those of one row, a panel's NR `rows` * NR apart. heap_k (kept,) and peak (2,), maximum and sum above it, brought on. */
static void top_of_panels(const struct top_panels *of, const real *sums, struct found *heap_k, real *peak) {
    const ptrdiff_t vectors = 2 * of->panels, kept = of->kept;
    vec largest = all(-INFINITY), y_j[2 * PANELS];
    /* 1: bias; past the last column -inf, which changes neither maximum nor sum */
    for (ptrdiff_t j = 0; j < vectors; j++) {
        ptrdiff_t column = of->column + j * VL, left = of->d_out - column;
        vec y = load(sums + j / 2 * of->rows * NR + j % 2 * VL);
        if (of->bias && left > 0) y += load_columns(of->bias + column, left);
        for (ptrdiff_t lane = max_size(left, 0); lane < VL; lane++) y[lane] = -INFINITY;
        y_j[j] = y;
        largest = max_vec(y, largest);
    }
    /* 2: the best. One comparison turns nearly every vector away. NaN fails it. */
    for (ptrdiff_t j = 0; j < vectors && kept; j++) {
        real worst = worst_of(heap_k);
        if (!any_lane(y_j[j] >= worst)) continue;
        ptrdiff_t column = of->column + j * VL;
        for (ptrdiff_t lane = 0; lane < VL && column + lane < of->d_out; lane++)
            if (y_j[j][lane] >= worst) offer(heap_k, kept, (struct found){y_j[j][lane], column + lane});
    }
    if (!of->sums_exp) return;
    /* 3: the sum, brought to the new maximum */
    real top = max_lanes(largest), old = peak[0];
    top = top > old ? top : old;
    real base = top > -INFINITY ? top : 0; /* inf - inf would be NaN where all is hidden */
    vec sum = {0};
    for (ptrdiff_t j = 0; j < vectors; j++) sum += exp_vec(y_j[j] - base);
    peak[1] = (old > -INFINITY ? peak[1] * exp_real(old - base) : peak[1]) + sum_lanes(sum);
    peak[0] = top;
}

/* log sum exp of a row from its parts, in order: peak_p (parts, 2) of maxima and of sums above them. */
static double lse_of_parts(const real *peak_p, ptrdiff_t parts) {
    real top = -INFINITY, sum = 0;
    for (ptrdiff_t part = 0; part < parts; part++) top = peak_p[part * 2] > top ? peak_p[part * 2] : top;
    real base = top > -INFINITY ? top : 0;
    for (ptrdiff_t part = 0; part < parts; part++) sum += peak_p[part * 2 + 1] * exp_real(peak_p[part * 2] - base);
    return base + log((double)sum);
}

/* x (N, d_in), w read; scores_nk, ids_nk (N, k) written, best first, and lse (N,) if not NULL: log sum exp over all columns.
 * -1: no workspace. The columns are cut into parts of a fixed width, each with its own maximum and sum, which are merged in order;
 * the best are in heaps, one for each thread and row: so no result depends on threads or rows. */
static int linear_top_k(const void *x, const struct mt_packed *w, const void *bias_, void *scores_, int64_t *ids_nk, void *lse_,
                        ptrdiff_t n, ptrdiff_t k) {
    const real *bias = bias_;
    real *scores_nk = scores_;
    double *lse_n = lse_;
    if (!n) return 0;
    struct packed_layout at = packed_layout(w);
    ptrdiff_t part_panels = max_size(PART / NR, 1), parts = div_up(at.panels, part_panels), kept = min_size(k, w->d_out);
    ptrdiff_t blocks = div_up(n, MC), m = div_up(n, blocks), pieces = blocks * parts;
    /* The heaps of all threads together are no larger than the scores would be. */
    int team = (int)min_size(mt_team(pieces, packed_work(w, &at, n)), max_size(w->d_out / max_size(kept, 1), 1));
    size_t room = PACKED_ROOM + (w->kind == MT_INT8 ? SUMS_ROOM : 0);
    struct packed_rows rows;
    char *workspace = aligned_alloc(64, room * team);
    ptrdiff_t apart = n * kept + 64 / (ptrdiff_t)sizeof(struct found);        /* threads share no cache line */
    struct found *heaps = malloc((size_t)team * apart * sizeof *heaps);       /* (team, N, kept) */
    ptrdiff_t *heads = calloc((size_t)n * team, sizeof *heads);               /* (N, team), see take_best */
    real *peaks = malloc(((size_t)n * parts * 2 + 1) * sizeof *peaks);        /* (N, parts, 2): maximum, sum above it */
    if (!workspace || !heaps || !heads || !peaks || packed_rows(&rows, x, n, w, &at)) {
        free(workspace);
        free(heaps);
        free(heads);
        free(peaks);
        return -1;
    }
    nothing_found(heaps, team * apart);
    int stop = 0;
#pragma omp parallel num_threads(team)
    {
        struct found *mine = heaps + mt_thread_id() * apart;
#pragma omp for schedule(static)
        for (ptrdiff_t row = 0; row < (w->kind == MT_REAL ? 0 : n); row++) packed_row(&rows, row, w, &at);
#pragma omp for schedule(dynamic)
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            ptrdiff_t part = piece / blocks, r0 = piece % blocks * m, here = min_size(m, n - r0);
            ptrdiff_t end = min_size(at.panels, (part + 1) * part_panels);
            real *sums = (real *)(workspace + room * mt_thread_id());
            for (ptrdiff_t row = r0; row < r0 + here; row++) {
                peaks[(row * parts + part) * 2] = -INFINITY;
                peaks[(row * parts + part) * 2 + 1] = 0;
            }
            for (ptrdiff_t panel = part * part_panels; panel < end && here > 0 && !mt_stopped(&stop); panel += PANELS) {
                ptrdiff_t some = min_size(PANELS, end - panel);
                real room_for_start[PANELS * NR];
                const real *start = start_of(w, bias, NULL, panel, some, room_for_start);
                packed_sums(w, &at, &rows, r0, here, panel, some, start, sums, (char *)sums + SUMS_ROOM);
                const struct top_panels of = {panel * NR, w->d_out, here, some, kept, start ? NULL : bias, lse_n != NULL};
                for (ptrdiff_t i = 0; i < here; i++)
                    top_of_panels(&of, sums + i * NR, mine + (r0 + i) * kept, peaks + ((r0 + i) * parts + part) * 2);
            }
        }
        /* All threads' heaps, and the parts, in order. */
#pragma omp for schedule(static)
        for (ptrdiff_t row = 0; row < n; row++) {
            take_best(heaps + row * kept, team, apart, kept, heads + row * team, k, scores_nk + row * k, ids_nk + row * k);
            if (lse_n) lse_n[row] = lse_of_parts(peaks + row * parts * 2, parts);
        }
    }
    free(rows.memory);
    free(heaps);
    free(heads);
    free(peaks);
    free(workspace);
    return stop ? MT_STOPPED : 0;
}
