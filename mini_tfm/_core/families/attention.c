/* Attention forward over several key/value blocks in one softmax, without a (T, S) matrix (arXiv 2205.14135), by a softmax whose
 * parts are merged (arXiv 1805.02867). Two ways, with the same bits (attention_tile.c):
 *
 *   many queries   a piece is a run of queries of one head; it goes through the keys tile by tile, each packed once for all of
 *                  its queries, ROWS of them at a time: their scores stay in L1 between the two products.
 *   few queries    a piece is a span of the tiles of one kv head, for all queries that read it; keys are transposed in
 *                  registers and nothing is packed, for nothing is used twice. Its parts are merged at the end. */

enum { ROWS = 24, FEW = 4, FEW_MOST = 24 };

/* ---- few queries ---- */

/* s_ij (nq, KEYS) = q k^T for keys at k_j (n,), pointers to rows of D, readable to a multiple of groups * VL. q_id (nq, D). nq and
 * groups are constants wherever this is inlined, at least 4 chains together: one waits for its own last step. */
INLINE void few_scores(const int nq, const int groups, const real *const *k_j, ptrdiff_t n, ptrdiff_t d, const real *q_id, real *s_ij) {
    for (ptrdiff_t j = 0; j < n; j += groups * VL) {
        vec sum[FEW][4];
        for (int i = 0; i < nq; i++)
            for (int g = 0; g < groups; g++) sum[i][g] = all(0);
        ptrdiff_t p = 0;
        for (; p + VL <= d; p += VL)
            for (int g = 0; g < groups; g++) {
                vec x[VL];
                for (ptrdiff_t l = 0; l < VL; l++) x[l] = load(k_j[j + g * VL + l] + p);
                transpose_vectors(x);
                for (ptrdiff_t l = 0; l < VL; l++)
                    for (int i = 0; i < nq; i++) sum[i][g] += q_id[i * d + p + l] * x[l];
            }
        for (; p < d; p++)
            for (int g = 0; g < groups; g++) {
                real x[VL];
                for (ptrdiff_t l = 0; l < VL; l++) x[l] = k_j[j + g * VL + l][p];
                for (int i = 0; i < nq; i++) sum[i][g] += q_id[i * d + p] * load(x);
            }
        for (int i = 0; i < nq; i++)
            for (int g = 0; g < groups; g++) store(s_ij + i * KEYS + j + g * VL, sum[i][g]);
    }
}

/* o_id (nq, ld) columns [c, c + vectors * VL) = p v for values at v_j (n,). A weight of zero takes no part: 0 * NaN of something
 * hidden is not to get in. */
INLINE void few_values_columns(const int nq, const int vectors, const real *const *v_j, ptrdiff_t n, const real *p_ij, ptrdiff_t c, real *o_id,
                               ptrdiff_t ld) {
    vec sum[FEW][8];
    for (int i = 0; i < nq; i++)
        for (int l = 0; l < vectors; l++) sum[i][l] = all(0);
    for (ptrdiff_t j = 0; j < n; j++)
        for (int i = 0; i < nq; i++) {
            real p = p_ij[i * KEYS + j];
            if (p == 0) continue;
            for (int l = 0; l < vectors; l++) sum[i][l] += p * load(v_j[j] + c + l * VL);
        }
    for (int i = 0; i < nq; i++)
        for (int l = 0; l < vectors; l++) store(o_id + i * ld + c + l * VL, sum[i][l]);
}

INLINE void few_values(const int nq, const real *const *v_j, ptrdiff_t n, ptrdiff_t d, const real *p_ij, real *o_id, ptrdiff_t ld) {
    const int wide = nq == 1 ? 8 : nq == 2 ? 4 : 2;
    ptrdiff_t c = 0;
    for (; c + wide * VL <= d; c += wide * VL) few_values_columns(nq, wide, v_j, n, p_ij, c, o_id, ld);
    for (; c + VL <= d; c += VL) few_values_columns(nq, 1, v_j, n, p_ij, c, o_id, ld);
    for (; c < d; c++)
        for (int i = 0; i < nq; i++) {
            real sum = 0;
            for (ptrdiff_t j = 0; j < n; j++) {
                real p = p_ij[i * KEYS + j];
                if (p != 0) sum += p * v_j[j][c];
            }
            o_id[i * ld + c] = sum;
        }
    for (; c < round_up(d, VL); c++)
        for (int i = 0; i < nq; i++) o_id[i * ld + c] = 0;
}

/* A query, and the head that it asks for. */
struct asking {
    struct head head;
    ptrdiff_t i, row; /* its place in T, and in (B, H, T) */
};

/* What tiles have given so far, of one row: of a tile alone in the way of few queries, merged in the other. */
struct part {
    real top, total; /* m, or -inf where nothing was seen */
    real *o_d;       /* (d_room,) */
};

INLINE void merge_part(struct part *so_far, real top, real total, const real *o_d, ptrdiff_t d) {
    real new_top = top > so_far->top ? top : so_far->top, shift = new_top == -INFINITY ? 0 : new_top;
    vec shrink = power_of_two(all(so_far->top - shift)), grow = power_of_two(all(top - shift));
    so_far->top = new_top;
    so_far->total = merged(all(so_far->total), shrink, all(total), grow)[0];
    for (ptrdiff_t c = 0; c < d; c += VL) store(so_far->o_d + c, merged(load(so_far->o_d + c), shrink, load(o_d + c), grow));
}

/* Workspace for few queries at one tile. */
struct few_room {
    const real *k_j[KEYS], *v_j[KEYS];
    lane shown_j[KEYS];
    real s_ij[FEW * KEYS];
};

/* The rows of keys and values at [at, at + n) of the bank, or those that query i picks there. Where a slot picks none, it stands
 * for another and is not shown; a tile in which nothing is shown has n = 0. */
static struct tile few_tile(const struct head *head, ptrdiff_t i, ptrdiff_t at, ptrdiff_t n, ptrdiff_t d, struct few_room *room) {
    struct tile tile = {.at = at, .n = n};
    if (!head->index_tk) {
        for (ptrdiff_t j = 0; j < round_up(n, 4 * VL); j++) {
            ptrdiff_t row = at + min_size(j, n - 1);
            room->k_j[j] = head->k_sd + row * d;
            room->v_j[j] = head->v_sd + row * d;
        }
        tile.shown_j = fill_shown(head, at, n, room->shown_j);
        return tile;
    }
    const int64_t *rows_j = head->index_tk + i * head->block->width + at;
    int64_t some = -1;
    tile.shown_j = room->shown_j;
    for (ptrdiff_t j = 0; j < KEYS; j++) {
        int64_t row = j < n ? rows_j[j] : -1;
        int shown = row >= 0 && row < head->end && (!head->valid_s || head->valid_s[row]);
        room->shown_j[j] = shown ? -1 : 0;
        if (shown) some = row;
    }
    if (some < 0) return (struct tile){.at = at, .n = 0};
    for (ptrdiff_t j = 0; j < round_up(n, 4 * VL); j++) {
        int64_t row = room->shown_j[j] ? rows_j[j] : some;
        room->k_j[j] = head->k_sd + row * d;
        room->v_j[j] = head->v_sd + row * d;
    }
    return tile;
}

/* The parts that a tile gives to nq <= FEW queries; q_id (nq, D) is scaled, the parts' o_d lie ld apart. */
static void few_parts(const struct mt_attention_sizes *sizes, const struct asking *asking, int nq, ptrdiff_t at_block, const struct tile *tile,
                      const real *q_id, struct few_room *room, struct part *parts, ptrdiff_t ld) {
    ptrdiff_t d = sizes->d, n = tile->n;
    switch (nq) {
    case 1: few_scores(1, 4, room->k_j, n, d, q_id, room->s_ij); break;
    case 2: few_scores(2, 2, room->k_j, n, d, q_id, room->s_ij); break;
    case 3: few_scores(3, 1, room->k_j, n, d, q_id, room->s_ij); break;
    default: few_scores(4, 1, room->k_j, n, d, q_id, room->s_ij);
    }
    for (int i = 0; i < nq; i++) {
        real *s_j = room->s_ij + i * KEYS;
        parts[i].top = finish_scores(&asking[i].head, tile, asking[i].i, 0, n, s_j);
        parts[i].total = row_weights(s_j, 0, n, row_shift_of(parts[i].top));
        parts[i].top = ceil(parts[i].top);
        if (sizes->dropout > 0) row_drop(draw_of_row(sizes, at_block, asking[i].row), tile->at, 0, n, s_j);
    }
    switch (nq) {
    case 1: few_values(1, room->v_j, n, d, room->s_ij, parts[0].o_d, ld); break;
    case 2: few_values(2, room->v_j, n, d, room->s_ij, parts[0].o_d, ld); break;
    case 3: few_values(3, room->v_j, n, d, room->s_ij, parts[0].o_d, ld); break;
    default: few_values(4, room->v_j, n, d, room->s_ij, parts[0].o_d, ld);
    }
}

/* ---- many queries ---- */

/* Workspace of a piece; d_room is D rounded up to a vector, and rows_room is `queries` rounded up to MR. */
struct piece_room {
    real *k_t, *v;     /* a tile */
    real *q_di;        /* (rows_room / MR, D, MR), and a vector more that packing writes over */
    real *s_ij;        /* (ROWS, KEYS) */
    real *o_id;        /* (rows_room, d_room) */
    real *top_i, *total_i; /* (rows_room,) */
    lane *shown_j;     /* (KEYS,) */
    struct few_room *few;
    real *few_q_d, *few_o_d; /* (d_room,) */
};

enum { FEW_ROOM = (sizeof(struct few_room) + sizeof(real) - 1) / sizeof(real) };

/* In reals, a multiple of a cache line. room NULL: only counted. */
static size_t piece_room_at(real *work, ptrdiff_t queries, ptrdiff_t d, struct piece_room *room) {
    ptrdiff_t d_room = round_up(d, VL), d_panels = round_up(d, NR), rows = round_up(queries, ROWS);
    ptrdiff_t sizes[] = {KEYS * d, KEYS * d_panels, rows * d + VL, ROWS * KEYS, rows * d_room + VL, rows, rows, KEYS, FEW_ROOM, d_room, d_room};
    real *at[sizeof sizes / sizeof sizes[0]];
    size_t total = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        at[i] = work + total;
        total += round_up(sizes[i], 16);
    }
    if (room)
        *room = (struct piece_room){at[0], at[1], at[2], at[3], at[4], at[5], at[6], (lane *)at[7], (struct few_room *)at[8], at[9], at[10]};
    return total;
}

/* o_id (rows, ld) = o shrink + (p v) grow for one panel of the values, each strip over its span. p_ij (rows, KEYS). */
static void values_panel(ptrdiff_t rows, int vectors, const struct span *span, const real *p_ij, const real *v_jc, const real *shrink_i,
                         const real *grow_i, real *o_id, ptrdiff_t ld) {
#define VALUES_(rows_, vectors_)                                                                                  \
    do {                                                                                                          \
        vec sum[MR][2];                                                                                           \
        _Pragma("GCC unroll 16") for (int i = 0; i < rows_; i++)                                                  \
            _Pragma("GCC unroll 2") for (int j = 0; j < vectors_; j++) sum[i][j] = all(0);                        \
        panel_product(rows_, vectors_, span->hi - span->lo, p_ij + span->lo, KEYS, 1, v_jc + span->lo * NR, sum); \
        _Pragma("GCC unroll 16") for (int i = 0; i < rows_; i++)                                                  \
            _Pragma("GCC unroll 2") for (int j = 0; j < vectors_; j++) {                                          \
                real *o = o_id + i * ld + j * VL;                                                                 \
                store(o, merged(load(o), all(shrink_i[i]), sum[i][j], all(grow_i[i])));                           \
            }                                                                                                     \
    } while (0)
#define VALUES(rows_)               \
    do {                            \
        if (vectors == 2)           \
            VALUES_(rows_, 2);      \
        else                        \
            VALUES_(rows_, 1);      \
    } while (0)
    for (; rows > 0; rows -= MR, span++, p_ij += MR * KEYS, shrink_i += MR, grow_i += MR, o_id += MR * ld)
        if (span->hi) FOR_STRIP(rows, VALUES);
#undef VALUES
#undef VALUES_
}

/* The same where values are not all finite: weights of zero take no part. Slow, and rarely needed. */
static void values_panel_careful(ptrdiff_t rows, int vectors, const struct span *spans, const real *p_ij, const real *v_jc,
                                 const real *shrink_i, const real *grow_i, real *o_id, ptrdiff_t ld) {
    for (ptrdiff_t i = 0; i < rows; i++)
        for (int l = 0; l < vectors; l++) {
            vec sum = all(0);
            for (ptrdiff_t j = spans[i / MR].lo; j < spans[i / MR].hi; j++)
                if (p_ij[i * KEYS + j] != 0) sum += p_ij[i * KEYS + j] * load(v_jc + j * NR + l * VL);
            real *o = o_id + i * ld + l * VL;
            store(o, merged(load(o), all(shrink_i[i]), sum, all(grow_i[i])));
        }
}

/* ROWS or fewer queries, from the piece's `from`-th, against a tile. */
static void rows_with_tile(const struct head *head, const struct tile *tile, const struct mt_attention_sizes *sizes, ptrdiff_t at_block,
                           ptrdiff_t i0, ptrdiff_t from, ptrdiff_t rows, ptrdiff_t row0, struct piece_room *room) {
    struct span spans[ROWS / STRIP_STEP];
    real tile_top_i[ROWS], tile_total_i[ROWS], shrink_i[ROWS], grow_i[ROWS];
    ptrdiff_t d = sizes->d, d_room = round_up(d, VL), strips = div_up(rows, MR), none = 1;
    for (ptrdiff_t strip = 0; strip < strips; strip++) {
        spans[strip] = strip_span(head, tile, i0 + from + strip * MR, i0 + from + min_size(rows, (strip + 1) * MR));
        if (spans[strip].hi) none = 0;
    }
    if (none) return;
    /* 1: scores */
    rows_scores(rows, spans, d, room->q_di + from * d, tile->k_t, room->s_ij);
    /* 2: maxima of all rows first, for a row's exponentials wait for its maximum */
    for (ptrdiff_t r = rows; r < ROWS; r++) tile_top_i[r] = -INFINITY, tile_total_i[r] = 0;
    for (ptrdiff_t r = 0; r < rows; r++)
        tile_top_i[r] = ceil(finish_scores(head, tile, i0 + from + r, spans[r / MR].lo, spans[r / MR].hi, room->s_ij + r * KEYS));
    for (ptrdiff_t r = 0; r < rows; r++)
        tile_total_i[r] = row_weights(room->s_ij + r * KEYS, spans[r / MR].lo, spans[r / MR].hi, row_shift_of(tile_top_i[r]));
    if (sizes->dropout > 0)
        for (ptrdiff_t r = 0; r < rows; r++)
            row_drop(draw_of_row(sizes, at_block, row0 + i0 + from + r), tile->at, spans[r / MR].lo, spans[r / MR].hi, room->s_ij + r * KEYS);
    /* 3: by what the sums so far shrink under the new maxima, and those of the tile */
    real *top_i = room->top_i + from, *total_i = room->total_i + from;
    for (ptrdiff_t r = 0; r < ROWS; r += VL) {
        vec old = load(top_i + r), top = load(tile_top_i + r), new_top = max_vec(top, old);
        vec shift = choose(new_top == all(-INFINITY), all(0), new_top);
        vec shrink = power_of_two(old - shift), grow = power_of_two(top - shift);
        store(top_i + r, new_top);
        store(total_i + r, merged(load(total_i + r), shrink, load(tile_total_i + r), grow));
        store(shrink_i + r, shrink);
        store(grow_i + r, grow);
    }
    /* 4: weighted values */
    for (ptrdiff_t c = 0; c < d; c += NR) /* a panel of values stays in L1 */
        (tile->v_is_finite ? values_panel : values_panel_careful)(rows, d - c > VL ? 2 : 1, spans, room->s_ij, tile->v + c * KEYS, shrink_i,
                                                                  grow_i, room->o_id + from * d_room + c, d_room);
}

/* out_d, lse of row `row` from what all tiles gave. lse_bht may be NULL. */
static void finish_row(const struct mt_attention_sizes *sizes, real top, real total, const real *o_d, ptrdiff_t row, real *out_bhtd,
                       real *lse_bht) {
    real share = total == 0 ? 0 : (real)(1 / (total * (1 - sizes->dropout))); /* 0: the query sees no key */
    real *out_d = out_bhtd + row * sizes->d;
    ptrdiff_t c = 0;
    for (; c + VL <= sizes->d; c += VL) store(out_d + c, load(o_d + c) * share);
    for (; c < sizes->d; c++) out_d[c] = o_d[c] * share;
    if (lse_bht) lse_bht[row] = total == 0 ? -INFINITY : (real)(top * LN_2 + log(total));
}

/* Queries [i0, i1) of head h in batch row b. */
static void attention_piece(const real *q_bhtd, const struct mt_block *blocks, const struct mt_attention_sizes *sizes, real *out_bhtd,
                            real *lse_bht, ptrdiff_t b, ptrdiff_t h, ptrdiff_t i0, ptrdiff_t i1, struct piece_room *room) {
    ptrdiff_t d = sizes->d, d_room = round_up(d, VL), row0 = (b * sizes->heads + h) * sizes->length, rows = i1 - i0;
    const real *q_td = q_bhtd + row0 * d;
    const real factor = (real)(sizes->scale * LOG2_E);
    pack_queries(q_td + i0 * d, rows, d, factor, room->q_di);
    memset(room->o_id, 0, (round_up(rows, MR) * d_room + VL) * sizeof(real));
    for (ptrdiff_t i = 0; i < round_up(rows, ROWS); i++) {
        room->top_i[i] = -INFINITY;
        room->total_i[i] = 0;
    }
    for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++) {
        struct head head = head_of(&blocks[at_block], sizes, b, h);
        if (head.index_tk) { /* each query has keys of its own */
            for (ptrdiff_t i = i0; i < i1; i++)
                for (ptrdiff_t at = 0; at < head.block->width; at += KEYS) {
                    struct asking asking = {head, i, row0 + i};
                    struct part of_tile = {.o_d = room->few_o_d}, so_far = {room->top_i[i - i0], room->total_i[i - i0], room->o_id + (i - i0) * d_room};
                    struct tile tile = few_tile(&head, i, at, min_size(KEYS, head.block->width - at), d, room->few);
                    if (!tile.n) continue;
                    for (ptrdiff_t c = 0; c < d; c++) room->few_q_d[c] = q_td[i * d + c] * factor;
                    few_parts(sizes, &asking, 1, at_block, &tile, room->few_q_d, room->few, &of_tile, 0);
                    merge_part(&so_far, of_tile.top, of_tile.total, of_tile.o_d, d);
                    room->top_i[i - i0] = so_far.top;
                    room->total_i[i - i0] = so_far.total;
                }
            continue;
        }
        ptrdiff_t end = last_seen(&head, i1 - 1);
        for (ptrdiff_t at = first_seen(&head, i0) / KEYS * KEYS; at < end; at += KEYS) {
            ptrdiff_t n = min_size(KEYS, end - at);
            struct tile tile = {.at = at, .n = n, .k_t = room->k_t, .v = room->v, .shown_j = fill_shown(&head, at, n, room->shown_j)};
            pack_keys(head.k_sd + at * d, n, d, room->k_t);
            tile.v_is_finite = pack_values(head.v_sd + at * d, n, d, room->v, KEYS);
            for (ptrdiff_t from = 0; from < rows; from += ROWS)
                rows_with_tile(&head, &tile, sizes, at_block, i0, from, min_size(ROWS, rows - from), row0, room);
        }
    }
    for (ptrdiff_t i = 0; i < rows; i++)
        finish_row(sizes, room->top_i[i], room->total_i[i], room->o_id + i * d_room, row0 + i0 + i, out_bhtd, lse_bht);
}

/* Scores that exist, at most; for judging the work. */
static double attention_scores(const struct mt_block *blocks, const struct mt_attention_sizes *sizes) {
    double scores = 0;
    for (ptrdiff_t at = 0; at < sizes->n_blocks; at++) scores += (double)blocks[at].width;
    return scores * sizes->batch * sizes->heads * sizes->length;
}

static int attention_many(const real *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes, real *out, real *lse,
                          double work) {
    enum { QUERIES_MOST = 384, QUERIES_LEAST = 48 };
    ptrdiff_t length = sizes->length, rows = sizes->batch * sizes->heads;
    /* Long runs of queries share the packing of a tile; enough pieces keep every thread busy; workspace stays within L2. */
    ptrdiff_t most = min_size(QUERIES_MOST, max_size(QUERIES_LEAST, QUERIES_MOST * 64 / max_size(sizes->d, 1)));
    ptrdiff_t wanted = div_up(4 * mt_team(1 << 20, work), rows);
    ptrdiff_t queries = round_up(min_size(max_size(div_up(length, wanted), QUERIES_LEAST), most), ROWS);
    ptrdiff_t runs = div_up(length, queries), pieces = rows * runs;
    queries = min_size(queries, round_up(length, MR));
    int team = mt_team(pieces, work);
    size_t room = piece_room_at(NULL, queries, sizes->d, NULL);
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        struct piece_room mine;
        piece_room_at(workspace + room * mt_thread_id(), queries, sizes->d, &mine);
        ptrdiff_t row = piece / runs, i0 = (runs - 1 - piece % runs) * queries; /* causal: the longest first */
        attention_piece(q, blocks, sizes, out, lse, row / sizes->heads, row % sizes->heads, i0, min_size(length, i0 + queries), &mine);
    }
    free(workspace);
    return 0;
}

/* ---- few queries, in pieces ---- */

/* Row `row` from its parts, `apart` reals from tile to tile: o (d_room), top, total. so_far_d (d_room,) is room for the sum. */
static void few_finish(const struct mt_attention_sizes *sizes, const real *parts, ptrdiff_t tiles, ptrdiff_t apart, real *so_far_d, ptrdiff_t row,
                       real *out, real *lse) {
    ptrdiff_t d_room = round_up(sizes->d, VL);
    struct part so_far = {-INFINITY, 0, so_far_d};
    memset(so_far_d, 0, d_room * sizeof(real));
    for (ptrdiff_t at_tile = 0; at_tile < tiles; at_tile++, parts += apart)
        if (parts[d_room + 1] != 0) merge_part(&so_far, parts[d_room], parts[d_room + 1], parts, sizes->d);
    finish_row(sizes, so_far.top, so_far.total, so_far_d, row, out, lse);
}

static int attention_few(const real *q_bhtd, const struct mt_block *blocks, const struct mt_attention_sizes *sizes, real *out, real *lse,
                         ptrdiff_t group, double work) {
    ptrdiff_t d = sizes->d, d_room = round_up(d, VL), heads = sizes->heads, length = sizes->length;
    ptrdiff_t units = sizes->batch * (heads / group), rows = group * length, tiles = 0;
    for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++) tiles += div_up(blocks[at_block].width, KEYS);
    int most = mt_team(1 << 20, work);
    ptrdiff_t spans = units >= 2 * most ? 1 : max_size(1, min_size(tiles, div_up(4 * most, units))), pieces = units * spans;
    int team = mt_team(pieces, work);
    /* parts (units or threads, tiles, rows): o and behind it top and total; then q (rows, d) and the room of a thread */
    ptrdiff_t part = d_room + 2 * VL, of_unit = tiles * rows * part;
    size_t of_q = round_up(rows * d, 16), of_thread = round_up(of_q + FEW_ROOM + d_room, 16);
    real *workspace = new_reals((spans > 1 ? units : team) * of_unit + of_thread * team + 16);
    if (!workspace) return -1;
    real *threads = workspace + round_up((spans > 1 ? units : team) * of_unit, 16);
    const real factor = (real)(sizes->scale * LOG2_E);
#pragma omp parallel num_threads(team)
    {
        real *q_id = threads + of_thread * mt_thread_id();
        real *so_far_d = q_id + of_q + FEW_ROOM;
        struct few_room *room = (struct few_room *)(q_id + of_q);
#pragma omp for schedule(static)
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            ptrdiff_t at_unit = piece / spans, span = piece % spans, b = at_unit / (heads / group), h0 = at_unit % (heads / group) * group;
            ptrdiff_t row0 = (b * heads + h0) * length, at_tile = 0, first = tiles * span / spans, last = tiles * (span + 1) / spans;
            real *parts = workspace + (spans > 1 ? at_unit : mt_thread_id()) * of_unit;
            for (ptrdiff_t c = 0; c < rows * d; c++) q_id[c] = q_bhtd[row0 * d + c] * factor;
            for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++)
                for (ptrdiff_t at = 0; at < blocks[at_block].width; at += KEYS, at_tile++) {
                    if (at_tile < first || at_tile >= last) continue;
                    int at_once = blocks[at_block].index ? 1 : FEW;
                    for (ptrdiff_t r0 = 0; r0 < rows; r0 += at_once) {
                        struct asking asking[FEW];
                        struct part of_tile[FEW];
                        int nq = (int)min_size(at_once, rows - r0);
                        ptrdiff_t end = 0, begin = blocks[at_block].width;
                        for (int i = 0; i < nq; i++) {
                            asking[i] = (struct asking){head_of(&blocks[at_block], sizes, b, h0 + (r0 + i) / length), (r0 + i) % length, row0 + r0 + i};
                            of_tile[i].o_d = parts + (at_tile * rows + r0 + i) * part;
                            end = max_size(end, last_seen(&asking[i].head, asking[i].i));
                            begin = min_size(begin, first_seen(&asking[i].head, asking[i].i));
                        }
                        if (blocks[at_block].index) end = blocks[at_block].width, begin = 0;
                        ptrdiff_t n = end <= at || begin >= at + KEYS ? 0 : min_size(KEYS, end - at);
                        struct tile tile = {.at = at};
                        if (n) tile = few_tile(&asking[0].head, asking[0].i, at, n, d, room);
                        if (tile.n) few_parts(sizes, asking, nq, at_block, &tile, q_id + r0 * d, room, of_tile, part);
                        for (int i = 0; i < nq; i++) {
                            of_tile[i].o_d[d_room] = tile.n ? of_tile[i].top : -INFINITY;
                            of_tile[i].o_d[d_room + 1] = tile.n ? of_tile[i].total : 0;
                        }
                    }
                }
            if (spans == 1)
                for (ptrdiff_t r = 0; r < rows; r++) few_finish(sizes, parts + r * part, tiles, rows * part, so_far_d, row0 + r, out, lse);
        }
        if (spans > 1) {
#pragma omp for schedule(static)
            for (ptrdiff_t row = 0; row < units * rows; row++)
                few_finish(sizes, workspace + row / rows * of_unit + row % rows * part, tiles, rows * part, so_far_d, row, out, lse);
        }
    }
    free(workspace);
    return 0;
}

/* q_bhtd (B, H, T, D) and blocks read; out_bhtd (B, H, T, D), lse_bht (B, H, T) or NULL written. -1: no workspace. */
static int attention(const void *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes, void *out, void *lse) {
    if (!sizes->batch || !sizes->heads || !sizes->length) return 0;
    ptrdiff_t group = sizes->heads; /* heads that read one kv head in every block: 1 where blocks differ */
    for (ptrdiff_t at = 0; at < sizes->n_blocks; at++) {
        ptrdiff_t here = sizes->heads / blocks[at].kv_heads;
        if (at && here != group) here = 1;
        group = here;
    }
    if (!sizes->n_blocks) group = 1;
    double work = attention_scores(blocks, sizes) * (4.0 * sizes->d / VL + 8);
    ptrdiff_t rows = group * sizes->length, units = sizes->batch * (sizes->heads / group);
    if (rows <= FEW || (rows <= FEW_MOST && units < mt_team(1 << 20, work))) return attention_few(q, blocks, sizes, out, lse, group, work);
    return attention_many(q, blocks, sizes, out, lse, work);
}
