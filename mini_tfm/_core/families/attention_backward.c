/* Attention backward (arXiv 2205.14135, algorithm 4): the weights are computed again tile by tile from lse.
 *
 *     P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta), delta = rowsum(dO O)
 *     dV += P^T dO   dK += scale dS^T Q   dQ += scale dS K   dbias += dS
 *
 * With dropout, P in dV and dP in dS are those of the kept weights over 1 - dropout, drawn again.
 *
 * Every gradient element is one chain over queries (dK, dV) or keys (dQ) in ascending order; so it does not matter which of
 * the ways below the work is cut, and the fastest is taken. */

enum { BACKWARD_QUERIES = 96 }; /* in a block of queries at most; a multiple of MR */

struct backward {
    const struct mt_rows *dout, *q, *dq;
    const double *lse_bht;
    const real *delta_bht;
    const struct mt_block *blocks;
    const struct mt_attention_sizes *sizes;
    ptrdiff_t queries; /* in a block of queries: a multiple of MR */
    int *stop;         /* of mt_stopped() */
};

/* Workspace of a piece; d_panels is D rounded up to NR. */
struct backward_room {
    real *k_t, *v_t, *k;          /* a tile: (KEYS / NR, D, NR) twice, (d_panels / NR, KEYS, NR) */
    real *dk_jd, *dv_jd;          /* (KEYS + MR, d_panels) */
    real *q_di, *dout_di;         /* (queries / MR, D, MR) and a vector more */
    real *q_ic, *dout_ic;         /* (d_panels / NR, queries, NR) */
    real *p_ij, *ds_ij;           /* (queries, SCORES_LD) */
    real *corner;                 /* (MR, NR) */
    lane *shown_j;                /* (KEYS,) */
    struct few_room *few;
    real *few_d;                  /* (d_room,) */
};

/* In reals, a multiple of a cache line. room NULL: only counted. */
static size_t backward_room_at(real *work, ptrdiff_t queries, ptrdiff_t d, struct backward_room *room) {
    ptrdiff_t d_panels = round_up(d, NR);
    ptrdiff_t sizes[] = {KEYS * d, KEYS * d, KEYS * d_panels, (KEYS + MR) * d_panels, (KEYS + MR) * d_panels, queries * d + VL, queries * d + VL,
                         queries * d_panels, queries * d_panels, (queries + MR) * SCORES_LD, (queries + MR) * SCORES_LD, MR * NR, KEYS, FEW_ROOM, d_panels};
    real *at[sizeof sizes / sizeof sizes[0]];
    size_t total = share_out(work, sizes, sizeof sizes / sizeof sizes[0], at);
    if (room)
        *room = (struct backward_room){at[0], at[1], at[2],  at[3],  at[4],          at[5],                        at[6], at[7],
                                       at[8], at[9], at[10], at[11], (lane *)at[12], (struct few_room *)at[13], at[14]};
    return total;
}

/* c (rows <= MR, ld) += a b for columns [at, at + NR) of which `d` are there in all. Where a panel is not whole, through a corner. */
INLINE void add_panel(ptrdiff_t rows, ptrdiff_t k, const real *a, const ptrdiff_t a_row, const ptrdiff_t a_col, const real *b, real *c,
                      ptrdiff_t ld, ptrdiff_t columns, real *corner) {
#define ADD2(rows_) panel_to(rows_, 2, k, a, a_row, a_col, b, to, to_ld, 1)
#define ADD1(rows_) panel_to(rows_, 1, k, a, a_row, a_col, b, to, to_ld, 1)
    int vectors = columns > VL ? 2 : 1, whole = columns >= vectors * VL && rows % STRIP_STEP == 0;
    real *to = whole ? c : corner;
    ptrdiff_t to_ld = whole ? ld : NR;
    if (!whole)
        for (ptrdiff_t i = 0; i < rows; i++) memcpy(corner + i * NR, c + i * ld, min_size(columns, NR) * sizeof(real));
    if (vectors == 2)
        FOR_STRIP(rows, ADD2);
    else
        FOR_STRIP(rows, ADD1);
    if (!whole)
        for (ptrdiff_t i = 0; i < rows; i++) memcpy(c + i * ld, corner + i * NR, min_size(columns, NR) * sizeof(real));
#undef ADD2
#undef ADD1
}

/* The same where something hidden is not finite: an element of a that is zero takes no part. b's rows lie NR apart. */
static __attribute__((noinline)) void add_panel_careful(ptrdiff_t rows, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col,
                                                        const real *b, real *c, ptrdiff_t ld, ptrdiff_t columns) {
    for (ptrdiff_t i = 0; i < rows; i++)
        for (ptrdiff_t l = 0; l < min_size(columns, NR); l++)
            for (ptrdiff_t p = 0; p < k; p++)
                if (a[i * a_row + p * a_col] != 0) c[i * ld + l] += a[i * a_row + p * a_col] * b[p * NR + l];
}

/* dq_id (rows, ld) += ds k, each strip of queries over its span. */
static void add_dq(ptrdiff_t rows, ptrdiff_t d, const struct span *spans, const real *ds_ij, const real *k_jc, real *dq_id, ptrdiff_t ld,
                   int careful, real *corner) {
    for (ptrdiff_t c = 0; c < d; c += NR)
        for (ptrdiff_t i = 0; i < rows; i += MR) {
            struct span span = spans[i / MR];
            const real *a = ds_ij + i * SCORES_LD + span.lo, *b = k_jc + c * KEYS + span.lo * NR;
            ptrdiff_t m = min_size(MR, rows - i);
            if (!span.hi) continue;
            if (careful)
                add_panel_careful(m, span.hi - span.lo, a, SCORES_LD, 1, b, dq_id + i * ld + c, ld, d - c);
            else
                add_panel(m, span.hi - span.lo, a, SCORES_LD, 1, b, dq_id + i * ld + c, ld, d - c, corner);
        }
}

/* dk_jd (n, ld) += ds^T q, or dv += p^T dout: a_ij (rows, SCORES_LD), b_ic (d_panels / NR, queries, NR). A strip of keys takes in the
 * strips of queries that see any of it; what those do not see is zero in a_ij. */
static void add_dkv(ptrdiff_t rows, ptrdiff_t n, ptrdiff_t d, const struct span *spans, const real *a_ij, const real *b_ic, ptrdiff_t queries,
                    real *c_jd, ptrdiff_t ld, int careful) {
    for (ptrdiff_t j = 0; j < n; j += MR) {
        ptrdiff_t from = 0, to = div_up(rows, MR), m = min_size(MR, n - j);
        while (from < to && spans[from].hi <= j) from++;
        while (from < to && spans[to - 1].lo >= j + m) to--;
        from *= MR;
        ptrdiff_t k = min_size(to * MR, rows) - from;
        if (k <= 0) continue;
        for (ptrdiff_t c = 0; c < d; c += NR) {
            const real *a = a_ij + from * SCORES_LD + j, *b = b_ic + c * queries + from * NR;
            real *to_jc = c_jd + j * ld + c;
#define ADD(rows_)                                               \
    do {                                                         \
        if (d - c > VL)                                          \
            panel_to(rows_, 2, k, a, 1, SCORES_LD, b, to_jc, ld, 1);  \
        else                                                     \
            panel_to(rows_, 1, k, a, 1, SCORES_LD, b, to_jc, ld, 1);  \
    } while (0)
            if (careful)
                add_panel_careful(m, k, a, 1, SCORES_LD, b, to_jc, ld, ld - c);
            else
                FOR_STRIP(m, ADD);
#undef ADD
        }
    }
}

/* Row constants of the backward. */
struct row_backward {
    struct two_parts lse;   /* in units of log 2 */
    real delta, keep_scale; /* keep_scale: 1 / (1 - dropout) */
    const lane *kept_j;          /* or NULL: no dropout */
};

/* p_j [lo, hi) holds scores, ds_j holds dP: they become P (of the kept weights) and dS. masked: hidden scores are there. */
INLINE void row_gradients(real *p_j, real *ds_j, ptrdiff_t lo, ptrdiff_t hi, const struct row_backward *row, const int masked, const int drops) {
#pragma GCC unroll 2
    for (ptrdiff_t j = lo; j < hi; j += VL) {
        vec s = load(p_j + j), dp = load(ds_j + j);
        vec p = exp2_below(s - row->lse.whole - row->lse.rest, all(-BIAS), all(MAGIC)), weight = p;
        if (drops) {
            ivec kept;
            memcpy(&kept, row->kept_j + j, sizeof kept);
            weight = (vec)((ivec)(p * row->keep_scale) & kept);
            dp = (vec)((ivec)(dp * row->keep_scale) & kept);
        }
        vec ds = p * (dp - row->delta);
        if (masked) {
            ivec hidden = s == -INFINITY; /* dP may be NaN there */
            weight = (vec)((ivec)weight & ~hidden);
            ds = (vec)((ivec)ds & ~hidden);
        }
        store(p_j + j, weight);
        store(ds_j + j, ds);
    }
}

/* dbias_j [lo, hi) += ds_j. */
static void add_dbias(const real *ds_j, ptrdiff_t lo, ptrdiff_t hi, real *dbias_j, ptrdiff_t stride) {
    ptrdiff_t j = lo;
    if (stride == 1)
        for (; j + VL <= hi; j += VL) store(dbias_j + j, load(dbias_j + j) + load(ds_j + j));
    for (; j < hi; j++) dbias_j[j * stride] += ds_j[j];
}

/* Query i of the head: scores and dP [lo, hi) become P and dS, dbias_j (of the tile's first key, or NULL) is added to. Returns whether
 * a score was hidden. */
static int finish_gradients(const struct backward *of, const struct head *head, const struct tile *tile, ptrdiff_t at_block, ptrdiff_t i,
                            ptrdiff_t row, ptrdiff_t lo, ptrdiff_t hi, real *p_j, real *ds_j, real *dbias_j) {
    struct row_view view = view_of_row(head, tile, i);
    const struct mt_attention_sizes *sizes = of->sizes;
    int plain = sees_whole_tile(&view, tile) && !view.bias_j, masked = !plain;
    real slope_j[KEYS];
    if (head->cap != 0) cap_scores(p_j, lo, hi, (real)head->cap, slope_j);
    if (masked) row_scores(p_j, lo, hi, view.bias_j, view.bias_stride, view.first, view.last, tile->shown_j);
    double lse = of->lse_bht[row];
    struct row_backward constants = {.lse = in_two_parts(lse * LOG2_E), .delta = of->delta_bht[row]};
    if (lse == -INFINITY) { /* the query sees nothing at all */
        memset(p_j + lo, 0, (hi - lo) * sizeof(real));
        memset(ds_j + lo, 0, (hi - lo) * sizeof(real));
        return 1;
    }
    if (sizes->dropout > 0) {
        lane kept_j[KEYS];
        row_kept(draw_of_row(sizes, at_block, row), tile->at, lo, round_up(hi, VL), kept_j);
        constants.kept_j = kept_j;
        constants.keep_scale = (real)(1 / (1 - sizes->dropout));
        row_gradients(p_j, ds_j, lo, hi, &constants, 1, 1);
    } else if (masked) {
        row_gradients(p_j, ds_j, lo, hi, &constants, 1, 0);
    } else {
        row_gradients(p_j, ds_j, lo, hi, &constants, 0, 0);
    }
    if (dbias_j && head->block->dbias_stride[3] == 1 && head->block->dbias_stride[2] >= KEYS)
        fetch_row(dbias_j + ROWS_AHEAD * head->block->dbias_stride[2], 1);
    if (dbias_j) add_dbias(ds_j, lo, hi, dbias_j, head->block->dbias_stride[3]);
    for (ptrdiff_t j = lo; j < hi && head->cap != 0; j += VL) { /* through the cap, which comes before the bias; a hidden score may be NaN */
        vec ds = load(ds_j + j);
        store(ds_j + j, choose(ds == 0, ds, ds * load(slope_j + j)));
    }
    return masked;
}

/* Queries [i0, i1), at most of->queries, against one tile of the bank. dbias: of query 0 and the tile's first key, or NULL. */
static void backward_tile(const struct backward *of, const struct head *head, const struct tile *tile, int k_is_finite, ptrdiff_t at_block,
                          ptrdiff_t h, ptrdiff_t i0, ptrdiff_t i1, int want_dq, int want_dkv, real *dbias, struct backward_room *room) {
    const struct mt_attention_sizes *sizes = of->sizes;
    ptrdiff_t d = sizes->d, d_panels = round_up(d, NR), rows = i1 - i0, row0 = (head->b * sizes->heads + h) * sizes->length;
    ptrdiff_t q_ld = of->q->stride[2], dout_ld = of->dout->stride[2], dq_ld = of->dq->stride[2];
    const real *q_id = head_rows(of->q, head->b, h) + i0 * q_ld, *dout_id = head_rows(of->dout, head->b, h) + i0 * dout_ld;
    struct span spans[BACKWARD_QUERIES / MR];
    for (ptrdiff_t i = 0; i < rows; i += MR) spans[i / MR] = strip_span(head, tile, i0 + i, i0 + min_size(rows, i + MR));
    /* 1: scores and dP */
    pack_queries(q_id, q_ld, rows, d, (real)(sizes->scale * LOG2_E), room->q_di);
    pack_queries(dout_id, dout_ld, rows, d, 1, room->dout_di);
    rows_scores(rows, spans, d, room->q_di, room->k_t, room->p_ij);
    rows_scores(rows, spans, d, room->dout_di, room->v_t, room->ds_ij);
    /* 2: P and dS, zero outside of a strip's span */
    int some_hidden = 0;
    for (ptrdiff_t r = 0; r < rows; r++) {
        struct span span = spans[r / MR];
        real *p_j = room->p_ij + r * SCORES_LD, *ds_j = room->ds_ij + r * SCORES_LD;
        if (span.hi)
            some_hidden |= finish_gradients(of, head, tile, at_block, i0 + r, row0 + i0 + r, span.lo, span.hi, p_j, ds_j,
                                            dbias ? dbias + (i0 + r) * head->block->dbias_stride[2] : NULL);
        if (!want_dkv) continue;
        memset(p_j, 0, span.lo * sizeof(real));
        memset(ds_j, 0, span.lo * sizeof(real));
        memset(p_j + span.hi, 0, (tile->n - span.hi) * sizeof(real));
        memset(ds_j + span.hi, 0, (tile->n - span.hi) * sizeof(real));
    }
    /* 3: dQ, dK, dV; their scale is brought in at the end */
    if (want_dq)
        add_dq(rows, d, spans, room->ds_ij, room->k, head_rows(of->dq, head->b, h) + i0 * dq_ld, dq_ld, some_hidden && !k_is_finite,
               room->corner);
    if (!want_dkv) return;
    int q_is_finite = pack_values(q_id, q_ld, rows, d, room->q_ic, of->queries);
    int dout_is_finite = pack_values(dout_id, dout_ld, rows, d, room->dout_ic, of->queries);
    int careful = some_hidden && !(q_is_finite && dout_is_finite);
    add_dkv(rows, tile->n, d, spans, room->p_ij, room->dout_ic, of->queries, room->dv_jd, d_panels, careful);
    add_dkv(rows, tile->n, d, spans, room->ds_ij, room->q_ic, of->queries, room->dk_jd, d_panels, careful);
}

/* The same where each query has keys of its own: row by row, gradients go to the rows that it picked, in order. dk_sd, dv_sd: the bank's,
 * or NULL. */
static void backward_index(const struct backward *of, const struct head *head, ptrdiff_t at_block, ptrdiff_t h, ptrdiff_t i0, ptrdiff_t i1,
                           int want_dq, real *dk_sd, real *dv_sd, real *dbias, struct backward_room *room) {
    ptrdiff_t dk_ld = head->block->dk.stride[2], dv_ld = head->block->dv.stride[2];
    const struct mt_attention_sizes *sizes = of->sizes;
    ptrdiff_t d = sizes->d, width = head->block->width;
    const ptrdiff_t *stride = head->block->dbias_stride;
    real *p_j = room->p_ij, *ds_j = room->ds_ij;
    for (ptrdiff_t i = i0; i < i1 && !mt_stopped(of->stop); i++)
        for (ptrdiff_t at = 0; at < width; at += KEYS) {
            ptrdiff_t n = min_size(KEYS, width - at), row = (head->b * sizes->heads + h) * sizes->length + i;
            struct tile tile = few_tile(head, i, at, n, room->few);
            const real *q_d = head_rows(of->q, head->b, h) + i * of->q->stride[2];
            const real *dout_d = head_rows(of->dout, head->b, h) + i * of->dout->stride[2];
            if (!tile.n) continue;
            for (ptrdiff_t c = 0; c < d; c++) room->few_d[c] = q_d[c] * (real)(sizes->scale * LOG2_E);
            few_scores(1, 4, 0, room->few->k_j, room->few->v_j, n, d, room->few_d, p_j);
            few_scores(1, 4, 0, room->few->v_j, room->few->k_j, n, d, dout_d, ds_j);
            finish_gradients(of, head, &tile, at_block, i, row, 0, n, p_j, ds_j, dbias ? dbias + i * stride[2] + at * stride[3] : NULL);
            real *dq_d = head_rows(of->dq, head->b, h) + i * of->dq->stride[2];
            const int64_t *rows_k = head->index_tk + i * width + at;
            for (ptrdiff_t j = 0; j < n; j++) {
                real p = p_j[j], ds = ds_j[j];
                if (!tile.shown_j[j] || (p == 0 && ds == 0)) continue; /* hidden, by a bias of -inf too: no NaN gets in */
                if (want_dq)
                    for (ptrdiff_t c = 0; c < d; c++) dq_d[c] += ds * number_of(0, room->few->k_j[j], c);
                if (!dk_sd) continue;
                real *dk_d = dk_sd + rows_k[j] * dk_ld, *dv_d = dv_sd + rows_k[j] * dv_ld;
                for (ptrdiff_t c = 0; c < d; c++) {
                    dv_d[c] += p * dout_d[c];
                    dk_d[c] += ds * q_d[c];
                }
            }
        }
}

/* Heads [h0, h1) of batch row b: keys in [part, part + 1) / parts of each block's tiles, queries [i0, i1). Asked for are dQ,
 * with dbias, or dK and dV, or all. Index blocks give dK and dV in part 0. */
static void backward_piece(const struct backward *of, ptrdiff_t b, ptrdiff_t h0, ptrdiff_t h1, ptrdiff_t i0, ptrdiff_t i1, ptrdiff_t part,
                           ptrdiff_t parts, int want_dq, int want_dkv, struct backward_room *room) {
    const struct mt_attention_sizes *sizes = of->sizes;
    ptrdiff_t d = sizes->d, d_panels = round_up(d, NR);
    for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++) {
        const struct mt_block *block = &of->blocks[at_block];
        int block_dkv = want_dkv && block->dk.at;
        ptrdiff_t dk_ld = block->dk.stride[2], dv_ld = block->dv.stride[2];
        if (!want_dq && !block_dkv) continue;
        ptrdiff_t group = sizes->heads / block->kv_heads;
        for (ptrdiff_t kv_h0 = h0; kv_h0 < h1; kv_h0 += group) {
            struct head head = head_of(block, sizes, b, kv_h0);
            real *dk_sd = block_dkv ? head_rows(&block->dk, b, head.kv) : NULL, *dv_sd = block_dkv ? head_rows(&block->dv, b, head.kv) : NULL;
            ptrdiff_t tiles = div_up(head.index_tk ? 0 : head.end, KEYS);
            for (ptrdiff_t at_tile = tiles * part / parts; at_tile < tiles * (part + 1) / parts; at_tile++) {
                ptrdiff_t at = at_tile * KEYS, n = min_size(KEYS, head.end - at);
                struct tile tile = {.at = at, .n = n, .shown_j = fill_shown(&head, at, n, room->shown_j)};
                pack_keys(head.k_sd + at * head.k_ld, head.k_ld, n, d, room->k_t);
                pack_keys(head.v_sd + at * head.v_ld, head.v_ld, n, d, room->v_t);
                int k_is_finite = want_dq ? pack_values(head.k_sd + at * head.k_ld, head.k_ld, n, d, room->k, KEYS) : 1;
                if (block_dkv) {
                    memset(room->dk_jd, 0, n * d_panels * sizeof(real));
                    memset(room->dv_jd, 0, n * d_panels * sizeof(real));
                }
                for (ptrdiff_t h = kv_h0; h < kv_h0 + group; h++) {
                    head = head_of(block, sizes, b, h);
                    real *dbias = NULL;
                    if (want_dq && block->dbias)
                        dbias = (real *)block->dbias + b * block->dbias_stride[0] + h * block->dbias_stride[1] + at * block->dbias_stride[3];
                    for (ptrdiff_t i = i0; i < i1 && !mt_stopped(of->stop); i += of->queries) {
                        /* Of these queries, those that see the tile: both ends of what they see grow with i. */
                        ptrdiff_t from = i, to = min_size(i1, i + of->queries);
                        while (from < to && last_seen(&head, from) <= at) from++;
                        while (from < to && first_seen(&head, to - 1) >= at + n) to--;
                        if (from < to)
                            backward_tile(of, &head, &tile, k_is_finite, at_block, h, from, to, want_dq, block_dkv, dbias, room);
                    }
                }
                for (ptrdiff_t j = 0; j < n && block_dkv; j++)
                    for (ptrdiff_t c = 0; c < d; c++) {
                        dk_sd[(at + j) * dk_ld + c] = room->dk_jd[j * d_panels + c] * (real)sizes->scale;
                        dv_sd[(at + j) * dv_ld + c] = room->dv_jd[j * d_panels + c];
                    }
            }
            if (!head.index_tk || (!want_dq && part > 0)) continue;
            for (ptrdiff_t h = kv_h0; h < kv_h0 + group; h++) {
                head = head_of(block, sizes, b, h);
                real *dbias = NULL;
                if (want_dq && block->dbias) dbias = (real *)block->dbias + b * block->dbias_stride[0] + h * block->dbias_stride[1];
                backward_index(of, &head, at_block, h, i0, i1, want_dq, dk_sd, dv_sd, dbias, room);
            }
            if (dk_sd)
                for (ptrdiff_t j = 0; j < block->source; j++)
                    for (ptrdiff_t c = 0; c < d; c++) dk_sd[j * dk_ld + c] *= (real)sizes->scale;
        }
    }
    if (!want_dq) return;
    for (ptrdiff_t h = h0; h < h1; h++) {
        real *dq_td = head_rows(of->dq, b, h);
        for (ptrdiff_t i = i0; i < i1; i++)
            for (ptrdiff_t c = 0; c < d; c++) dq_td[i * of->dq->stride[2] + c] *= (real)sizes->scale;
    }
}
static ptrdiff_t common_divisor(ptrdiff_t a, ptrdiff_t b) { return b ? common_divisor(b, a % b) : a; }

/* Do the heads' parts of dbias lie apart in memory? Then heads can be worked on at once. */
static int heads_lie_apart(const struct mt_block *block, const struct mt_attention_sizes *sizes) {
    ptrdiff_t n[4] = {sizes->batch, sizes->heads, sizes->length, block->width}, reach = 1;
    for (int axis = 0; axis < 4; axis++) {
        if (!n[axis]) return 1;
        ptrdiff_t stride = block->dbias_stride[axis];
        if (axis != 1) reach += (stride < 0 ? -stride : stride) * (n[axis] - 1);
    }
    ptrdiff_t apart = block->dbias_stride[1] < 0 ? -block->dbias_stride[1] : block->dbias_stride[1];
    return apart >= reach;
}

/* x (batch, heads, n, d) = 0 */
static void zero_rows(const struct mt_rows *x, ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t n, ptrdiff_t d) {
#pragma omp parallel for num_threads(mt_team(batch * heads, (double)batch * heads * n * d / VL)) schedule(static)
    for (ptrdiff_t at = 0; at < batch * heads; at++) {
        real *x_nd = head_rows(x, at / heads, at % heads);
        for (ptrdiff_t i = 0; i < n; i++) memset(x_nd + i * x->stride[2], 0, d * sizeof(real));
    }
}

/* dout, out, q (B, H, T, D), lse (B, H, T) and blocks read; dq (B, H, T, D) and the blocks' dk, dv written, dbias accumulated.
 * -1: no workspace. */
static int attention_backward(const struct mt_rows *dout, const struct mt_rows *out, const void *lse, const struct mt_rows *q,
                              const struct mt_block *blocks, const struct mt_attention_sizes *sizes, const struct mt_rows *dq) {
    ptrdiff_t batch = sizes->batch, heads = sizes->heads, length = sizes->length, d = sizes->d, rows = batch * heads * length;
    double scores = attention_scores(blocks, sizes), work = scores * (10.0 * d / VL + 10);
    /* A unit is the least run of heads that shares no kv head of any block with another. With dbias, a unit takes all batch
     * rows, and where the heads' parts of a dbias are one memory, one unit takes everything: the order of adding is fixed. */
    ptrdiff_t unit = 1;
    int has_dbias = 0;
    for (ptrdiff_t at = 0; at < sizes->n_blocks && rows; at++) {
        ptrdiff_t group = heads / blocks[at].kv_heads;
        unit = unit / common_divisor(unit, group) * group;
        if (blocks[at].dbias) has_dbias = 1;
    }
    for (ptrdiff_t at = 0; at < sizes->n_blocks && rows; at++)
        if (blocks[at].dbias && !heads_lie_apart(&blocks[at], sizes)) unit = heads;
    ptrdiff_t units = rows ? heads / unit : 0;
    /* Batch rows and units are pieces of their own. Where there are too few of them for the threads, dQ is cut by queries
     * and dK, dV by keys instead, at the cost of computing P and dS twice. */
    int most = mt_team(1 << 20, work), split = !has_dbias && batch * units < most;
    ptrdiff_t pieces = has_dbias ? units : batch * units, cuts = split ? min_size(div_up(2 * most, max_size(pieces, 1)), 64) : 1;
    int team = mt_team(pieces * cuts, work);
    ptrdiff_t queries = min_size(d <= 64 ? BACKWARD_QUERIES : BACKWARD_QUERIES / 2, round_up(length, MR)); /* workspace stays within L2 */
    size_t room = backward_room_at(NULL, queries, d, NULL);
    real *workspace = new_reals(room * team + max_size(rows, 1));
    if (!workspace) return -1;
    real *delta_bht = workspace + room * team;
    for (ptrdiff_t at = 0; at < sizes->n_blocks; at++)
        if (blocks[at].dk.at) {
            zero_rows(&blocks[at].dk, batch, blocks[at].kv_heads, blocks[at].source, d);
            zero_rows(&blocks[at].dv, batch, blocks[at].kv_heads, blocks[at].source, d);
        }
    zero_rows(dq, batch, heads, length, d);
#pragma omp parallel for num_threads(mt_team(batch * heads, 2.0 * rows * d)) schedule(static)
    for (ptrdiff_t at = 0; at < batch * heads; at++) {
        const real *dout_td = head_rows(dout, at / heads, at % heads), *out_td = head_rows(out, at / heads, at % heads);
        for (ptrdiff_t i = 0; i < length; i++)
            delta_bht[at * length + i] = row_dot(dout_td + i * dout->stride[2], out_td + i * out->stride[2], d);
    }
    int stop = 0;
    struct backward of = {dout, q, dq, lse, delta_bht, blocks, sizes, queries, &stop};
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t at = 0; at < pieces * cuts * (split ? 2 : 1); at++) {
        if (mt_stopped(&stop)) continue;
        struct backward_room mine;
        backward_room_at(workspace + room * mt_thread_id(), queries, d, &mine);
        ptrdiff_t piece = at / cuts % pieces, cut = at % cuts, h0 = piece % units * unit;
        ptrdiff_t b0 = has_dbias ? 0 : piece / units, b1 = has_dbias ? batch : b0 + 1;
        for (ptrdiff_t b = b0; b < b1; b++) {
            if (!split)
                backward_piece(&of, b, h0, h0 + unit, 0, length, 0, 1, 1, 1, &mine);
            else if (at < pieces * cuts)
                backward_piece(&of, b, h0, h0 + unit, length * cut / cuts, length * (cut + 1) / cuts, 0, 1, 1, 0, &mine);
            else
                backward_piece(&of, b, h0, h0 + unit, 0, length, cut, cuts, 0, 1, &mine);
        }
    }
    free(workspace);
    return stop ? MT_STOPPED : 0;
}
