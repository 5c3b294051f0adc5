/* Attention forward over several key/value blocks in one softmax, without a (T, S) matrix (arXiv 2205.14135), by a softmax whose
 * parts are merged (arXiv 1805.02867). Few queries have a way of their own, attention_few.c, with the same bits.
 *
 * A piece is a run of queries of one head; it goes through the keys tile by tile, each packed once for all of its queries, ROWS of
 * them at a time: their scores stay in L1 between the two products. */

/* Workspace of a piece; d_room is D rounded up to a vector, and rows_room is `queries` rounded up to MR. */
struct piece_room {
    real *k_t, *v;     /* a tile */
    real *q_di;        /* (rows_room / MR, D, MR), and a vector more that packing writes over */
    real *s_ij;        /* (ROWS, SCORES_LD) */
    real *o_id;        /* (rows_room, d_room) */
    real *top_i, *total_i; /* (rows_room,) */
    lane *shown_j;     /* (KEYS,) */
    struct few_room *few;
    real *few_q_d, *few_o_d; /* (d_room,) */
    real *gathered;    /* (KEYS, D) keys, then values, that are not packed from where they lie, if there are any */
    real *k_scale_j, *v_scale_j; /* (KEYS,) of those */
};

/* In reals, a multiple of a cache line. room NULL: only counted. */
static size_t piece_room_at(real *work, ptrdiff_t queries, ptrdiff_t d, int gathering, struct piece_room *room) {
    ptrdiff_t d_room = round_up(d, VL), d_panels = round_up(d, NR), rows = round_up(queries, ROWS);
    ptrdiff_t sizes[] = {KEYS * d, KEYS * d_panels, rows * d + VL, ROWS * SCORES_LD, rows * d_room + VL, rows, rows, KEYS, FEW_ROOM, d_room, d_room, gathering ? KEYS * d : 0, gathering ? KEYS : 0, gathering ? KEYS : 0};
    real *at[sizeof sizes / sizeof sizes[0]];
    size_t total = share_out(work, sizes, sizeof sizes / sizeof sizes[0], at);
    if (room)
        *room = (struct piece_room){at[0], at[1], at[2], at[3], at[4], at[5], at[6], (lane *)at[7], (struct few_room *)at[8], at[9], at[10], at[11], at[12], at[13]};
    return total;
}

/* o_id (rows, ld) = o shrink + (p v) grow for one panel of the values, each strip over its span. p_ij (rows, SCORES_LD). */
static void values_panel(ptrdiff_t rows, int vectors, const struct span *span, const real *p_ij, const real *v_jc, const real *shrink_i,
                         const real *grow_i, real *o_id, ptrdiff_t ld) {
#define VALUES_(rows_, vectors_)                                                                                  \
    do {                                                                                                          \
        vec sum[MR][2];                                                                                           \
        _Pragma("GCC unroll 16") for (int i = 0; i < rows_; i++)                                                  \
            _Pragma("GCC unroll 2") for (int j = 0; j < vectors_; j++) sum[i][j] = all(0);                        \
        panel_product(rows_, vectors_, span->hi - span->lo, p_ij + span->lo, SCORES_LD, 1, v_jc + span->lo * NR, sum); \
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
    for (; rows > 0; rows -= MR, span++, p_ij += MR * SCORES_LD, shrink_i += MR, grow_i += MR, o_id += MR * ld)
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
                if (p_ij[i * SCORES_LD + j] != 0) sum += p_ij[i * SCORES_LD + j] * load(v_jc + j * NR + l * VL);
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
        tile_top_i[r] = ceil(finish_scores(head, tile, i0 + from + r, spans[r / MR].lo, spans[r / MR].hi, room->s_ij + r * SCORES_LD));
    for (ptrdiff_t r = 0; r < rows; r++)
        tile_total_i[r] = row_weights(room->s_ij + r * SCORES_LD, spans[r / MR].lo, spans[r / MR].hi, row_shift_of(tile_top_i[r]));
    if (sizes->dropout > 0)
        for (ptrdiff_t r = 0; r < rows; r++)
            row_drop(draw_of_row(sizes, at_block, row0 + i0 + from + r), tile->at, spans[r / MR].lo, spans[r / MR].hi, room->s_ij + r * SCORES_LD);
    for (ptrdiff_t r = 0; r < rows; r++) scale_weights(tile, spans[r / MR].lo, spans[r / MR].hi, room->s_ij + r * SCORES_LD);
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

static int gathers(const struct mt_block *block) { return block->kept != MT_KEPT_REAL || block->owners; }

/* Queries [i0, i1) of head h in batch row b. */
static void attention_piece(const struct mt_rows *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes,
                            const struct mt_rows *out, double *lse_bht, ptrdiff_t b, ptrdiff_t h, ptrdiff_t i0, ptrdiff_t i1, struct piece_room *room,
                            int *stop) {
    ptrdiff_t d = sizes->d, d_room = round_up(d, VL), row0 = (b * sizes->heads + h) * sizes->length, rows = i1 - i0;
    const real *q_td = head_rows(q, b, h);
    const ptrdiff_t q_ld = q->stride[2];
    const real factor = (real)(sizes->scale * LOG2_E);
    pack_queries(q_td + i0 * q_ld, q_ld, rows, d, factor, room->q_di);
    memset(room->o_id, 0, (round_up(rows, MR) * d_room + VL) * sizeof(real));
    for (ptrdiff_t i = 0; i < round_up(rows, ROWS); i++) {
        room->top_i[i] = -INFINITY;
        room->total_i[i] = 0;
    }
    for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++) {
        struct head head = head_of(&blocks[at_block], sizes, b, h);
        if (head.index_tk) { /* each query has keys of its own */
            for (ptrdiff_t i = i0; i < i1 && !mt_stopped(stop); i++)
                for (ptrdiff_t at = 0; at < head.block->width; at += KEYS) {
                    struct asking asking = {head, i, row0 + i};
                    struct part of_tile = {.o_d = room->few_o_d}, so_far = {room->top_i[i - i0], room->total_i[i - i0], room->o_id + (i - i0) * d_room};
                    struct tile tile = few_tile(&head, i, at, min_size(KEYS, head.block->width - at), room->few);
                    if (!tile.n) continue;
                    room->few->n_next = 0;
                    for (ptrdiff_t c = 0; c < d; c++) room->few_q_d[c] = q_td[i * q_ld + c] * factor;
                    few_parts(sizes, &asking, 1, at_block, &tile, room->few_q_d, room->few, &of_tile, 0);
                    merge_part(&so_far, of_tile.top, of_tile.total, of_tile.o_d, d);
                    room->top_i[i - i0] = so_far.top;
                    room->total_i[i - i0] = so_far.total;
                }
            continue;
        }
        ptrdiff_t end = last_seen(&head, i1 - 1);
        for (ptrdiff_t at = first_seen(&head, i0) / KEYS * KEYS; at < end && !mt_stopped(stop); at += KEYS) {
            ptrdiff_t n = min_size(KEYS, end - at);
            struct tile tile = {.at = at, .n = n, .k_t = room->k_t, .v = room->v, .shown_j = fill_shown(&head, at, n, room->shown_j)};
            if (gathers(head.block)) {
                gather_rows(&head, &head.block->k, at, n, d, room->gathered);
                pack_keys(room->gathered, d, n, d, room->k_t);
                gather_rows(&head, &head.block->v, at, n, d, room->gathered);
                tile.v_is_finite = pack_values(room->gathered, d, n, d, room->v, KEYS);
                tile.k_scale_j = gather_scales(&head, &head.block->k, at, n, room->k_scale_j);
                tile.v_scale_j = gather_scales(&head, &head.block->v, at, n, room->v_scale_j);
            } else {
                pack_keys(head.k_sd + at * head.k_ld, head.k_ld, n, d, room->k_t);
                tile.v_is_finite = pack_values(head.v_sd + at * head.v_ld, head.v_ld, n, d, room->v, KEYS);
            }
            for (ptrdiff_t from = 0; from < rows; from += ROWS)
                rows_with_tile(&head, &tile, sizes, at_block, i0, from, min_size(ROWS, rows - from), row0, room);
        }
    }
    for (ptrdiff_t i = 0; i < rows; i++)
        finish_row(sizes, room->top_i[i], room->total_i[i], room->o_id + i * d_room, head_rows(out, b, h) + (i0 + i) * out->stride[2],
                   lse_bht ? lse_bht + row0 + i0 + i : NULL);
}

/* As attention(). */
static int attention_many(const struct mt_rows *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes,
                          const struct mt_rows *out, double *lse, double work) {
    enum { QUERIES_MOST = 384, QUERIES_LEAST = 48 };
    ptrdiff_t length = sizes->length, rows = sizes->batch * sizes->heads;
    /* Long runs of queries share the packing of a tile; enough pieces keep every thread busy; workspace stays within L2. */
    ptrdiff_t most = min_size(QUERIES_MOST, max_size(QUERIES_LEAST, QUERIES_MOST * 64 / max_size(sizes->d, 1)));
    ptrdiff_t wanted = div_up(4 * mt_team(1 << 20, work), rows);
    ptrdiff_t queries = round_up(min_size(max_size(div_up(length, wanted), QUERIES_LEAST), most), ROWS);
    ptrdiff_t runs = div_up(length, queries), pieces = rows * runs;
    queries = min_size(queries, round_up(length, MR));
    int team = mt_team(pieces, work), gathering = 0;
    for (ptrdiff_t at = 0; at < sizes->n_blocks; at++) gathering |= gathers(&blocks[at]);
    size_t room = piece_room_at(NULL, queries, sizes->d, gathering, NULL);
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
    int stop = 0;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        if (mt_stopped(&stop)) continue;
        struct piece_room mine;
        piece_room_at(workspace + room * mt_thread_id(), queries, sizes->d, gathering, &mine);
        ptrdiff_t row = piece / runs, i0 = (runs - 1 - piece % runs) * queries; /* causal: the longest first */
        attention_piece(q, blocks, sizes, out, lse, row / sizes->heads, row % sizes->heads, i0, min_size(length, i0 + queries), &mine, &stop);
    }
    free(workspace);
    return stop ? MT_STOPPED : 0;
}

/* q (B, H, T, D) and blocks read; out (B, H, T, D), lse (B, H, T) or NULL written. -1: no workspace. */
static int attention(const struct mt_rows *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes,
                     const struct mt_rows *out, void *lse) {
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
