/* Attention forward over several key/value blocks in one softmax, without a (T, S) matrix (arXiv 2205.14135), by an online
 * softmax (arXiv 1805.02867).
 *
 * A piece is a run of queries of one head. It goes through the keys tile by tile, and through its queries in strips of MR
 * rows: scores, exponentials and the product with the values of a strip stay in L1, the packed tile is used by every strip.
 * Tiles begin at multiples of KEYS whatever the queries are, and a hidden key adds an exact zero, so a query's bits depend
 * on its own row and on the keys alone: neither on its strip, nor on the other queries, nor on whether there are any. */

enum { KEYS = 64, STRIPS = 4, QUERIES_MOST = 192, QUERIES_LEAST = 48 };

/* One head of one batch row reading one block. */
struct head {
    const struct mt_block *block;
    const real *k_sd, *v_sd; /* (S, D) */
    const uint8_t *valid_s;  /* (S,) or NULL */
    const int64_t *index_tk; /* (T, K) or NULL */
    const real *bias;        /* of query 0 and key 0, or NULL; strides in block->bias_stride */
    ptrdiff_t end;           /* rows from here on are hidden: S or the row's length */
    ptrdiff_t b, kv;
};

static struct head head_of(const struct mt_block *block, const struct mt_attention_sizes *sizes, ptrdiff_t b, ptrdiff_t h) {
    ptrdiff_t kv = h / (sizes->heads / block->kv_heads), bank = (b * block->kv_heads + kv) * block->source * sizes->d;
    return (struct head){
        .block = block,
        .k_sd = (const real *)block->k + bank,
        .v_sd = (const real *)block->v + bank,
        .valid_s = block->valid ? block->valid + b * block->source : NULL,
        .index_tk = block->index ? block->index + (b * sizes->heads + h) * sizes->length * block->width : NULL,
        .bias = block->bias ? (const real *)block->bias + b * block->bias_stride[0] + h * block->bias_stride[1] : NULL,
        .end = block->lengths ? block->lengths[b] : block->source,
        .b = b,
        .kv = kv,
    };
}

/* Query i sees rows [first, last) at most. Both ends grow with i. */
INLINE ptrdiff_t first_seen(const struct head *head, ptrdiff_t i) {
    return head->block->window ? max_size(0, i + head->block->offset - head->block->window + 1) : 0;
}

INLINE ptrdiff_t last_seen(const struct head *head, ptrdiff_t i) {
    const struct mt_block *block = head->block;
    if (block->causal) return min_size(head->end, i + block->offset + 1);
    return block->window ? min_size(head->end, i + block->offset + block->window) : head->end;
}

/* Up to KEYS keys and values, packed for the micro-kernel. */
struct tile {
    ptrdiff_t at, n;     /* keys [at, at + n) */
    const real *k_t;     /* (D, KEYS) */
    const real *v;       /* n rows, v_ld apart, of D reals and zeros to a multiple of NR */
    ptrdiff_t v_ld;
    const lane *shown_j; /* (KEYS,) all ones or zero, or NULL: all shown */
    int v_is_finite;     /* -1: not looked yet */
};

/* Workspace of a piece for one tile; d_room is D rounded up to NR. */
struct tile_room {
    real *k_t, *k_rows, *v_rows; /* (D, KEYS), (KEYS, d_room), (KEYS, d_room) */
    real *v_t;                   /* backward: (D, KEYS) */
    lane *shown_j;               /* (KEYS,) */
};

static size_t tile_room_size(ptrdiff_t d, ptrdiff_t d_room) { return KEYS * (2 * d + 2 * d_room + 1); }

static struct tile_room tile_room_at(real *work, ptrdiff_t d, ptrdiff_t d_room) {
    struct tile_room room = {.k_t = work, .v_t = work + KEYS * d, .k_rows = work + 2 * KEYS * d};
    room.v_rows = room.k_rows + KEYS * d_room;
    room.shown_j = (lane *)(room.v_rows + KEYS * d_room);
    return room;
}

/* The tile at rows [at, at + n) of the head's bank. */
static struct tile tile_of_bank(const struct head *head, ptrdiff_t at, ptrdiff_t n, ptrdiff_t d, ptrdiff_t d_room, struct tile_room *room) {
    struct tile tile = {.at = at, .n = n, .k_t = room->k_t, .v = head->v_sd + at * d, .v_ld = d, .v_is_finite = -1};
    pack_transposed(head->k_sd + at * d, d, n, d, room->k_t, KEYS, round_up(n, NR));
    if (d != d_room) {
        pack_plain(head->v_sd + at * d, d, n, d, room->v_rows, d_room);
        tile.v = room->v_rows;
        tile.v_ld = d_room;
    }
    if (head->valid_s) {
        for (ptrdiff_t j = 0; j < KEYS; j++) room->shown_j[j] = j < n && head->valid_s[at + j] ? -1 : 0;
        tile.shown_j = room->shown_j;
    }
    return tile;
}

/* The rows that query i picks in slots [at, at + n) of its index; rows that are not shown are zeros. */
static struct tile tile_of_index(const struct head *head, ptrdiff_t i, ptrdiff_t at, ptrdiff_t n, ptrdiff_t d, ptrdiff_t d_room,
                                 struct tile_room *room) {
    const int64_t *rows_k = head->index_tk + i * head->block->width + at;
    memset(room->k_rows, 0, KEYS * d_room * sizeof(real));
    memset(room->v_rows, 0, KEYS * d_room * sizeof(real));
    for (ptrdiff_t j = 0; j < KEYS; j++) {
        int64_t row = j < n ? rows_k[j] : -1;
        int shown = row >= 0 && row < head->end && (!head->valid_s || head->valid_s[row]);
        room->shown_j[j] = shown ? -1 : 0;
        if (!shown) continue;
        memcpy(room->k_rows + j * d_room, head->k_sd + row * d, d * sizeof(real));
        memcpy(room->v_rows + j * d_room, head->v_sd + row * d, d * sizeof(real));
    }
    pack_transposed(room->k_rows, d_room, n, d, room->k_t, KEYS, round_up(n, NR));
    return (struct tile){.at = at, .n = n, .k_t = room->k_t, .v = room->v_rows, .v_ld = d_room, .shown_j = room->shown_j, .v_is_finite = -1};
}

/* n scores of one row: s_j = scale s_j + bias, -inf but for keys in [first, last) that are shown. Returns the maximum, NaN
 * passed over. */
static real row_scores(real *s_j, ptrdiff_t n, real scale, const real *bias_j, ptrdiff_t bias_stride, ptrdiff_t first, ptrdiff_t last,
                       const lane *shown_j) {
    static const lane LANES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec lanes;
    memcpy(&lanes, LANES, sizeof lanes);
    vec top = all(-INFINITY);
    for (ptrdiff_t j = 0; j < n; j += VL) {
        vec s = load(s_j + j) * scale;
        if (bias_j && bias_stride == 1 && j + VL <= n) {
            s += load(bias_j + j);
        } else if (bias_j) {
            vec bias = all(0);
            for (ptrdiff_t l = 0; l < VL && j + l < n; l++) bias[l] = bias_j[(j + l) * bias_stride];
            s += bias;
        }
        if (j < first || j + VL > last) {
            ivec key = lanes + (lane)j;
            s = choose((key >= (lane)first) & (key < (lane)last), s, all(-INFINITY));
        }
        if (shown_j) {
            ivec shown;
            memcpy(&shown, shown_j + j, sizeof shown);
            s = choose(shown, s, all(-INFINITY));
        }
        top = max_vec(s, top);
        store(s_j + j, s);
    }
    return max_lanes(top);
}

/* The same for KEYS scores of which all are seen, bias_j NULL or of stride 1: the loop that the time goes into. */
INLINE real row_scores_plain(real *s_j, real scale, const real *bias_j) {
    vec top = all(-INFINITY);
    for (ptrdiff_t j = 0; j < KEYS; j += VL) {
        vec s = load(s_j + j) * scale;
        if (bias_j) s += load(bias_j + j);
        top = max_vec(s, top);
        store(s_j + j, s);
    }
    return max_lanes(top);
}

/* s_ij (rows, KEYS) = scale q k^T + bias for queries i0, i0 + 1, ..., -inf where hidden, and top_i (rows,) their maxima.
 * q_id has `rows` rows of D. Written are the first n columns, rounded up to a vector. */
static void strip_scores(const struct head *head, const struct tile *tile, const real *q_id, ptrdiff_t i0, ptrdiff_t rows, ptrdiff_t d,
                         real scale, real *s_ij, real *top_i) {
    micro_set(rows, tile->n, d, q_id, d, 1, tile->k_t, KEYS, s_ij, KEYS);
    ptrdiff_t stride = head->block->bias_stride[3];
    for (ptrdiff_t r = 0; r < rows; r++) {
        real *s_j = s_ij + r * KEYS;
        ptrdiff_t first = 0, last = tile->n;
        if (!head->index_tk) {
            first = max_size(0, first_seen(head, i0 + r) - tile->at);
            last = min_size(last, last_seen(head, i0 + r) - tile->at);
        }
        const real *bias_j = head->bias ? head->bias + (i0 + r) * head->block->bias_stride[2] + tile->at * stride : NULL;
        if (first > 0 || last < KEYS || tile->shown_j || (bias_j && stride != 1))
            top_i[r] = row_scores(s_j, tile->n, scale, bias_j, stride, first, last, tile->shown_j);
        else if (bias_j)
            top_i[r] = row_scores_plain(s_j, scale, bias_j);
        else
            top_i[r] = row_scores_plain(s_j, scale, NULL);
    }
}

/* Are all of (rows, columns) finite? x - x is NaN where not. */
static int is_finite(const real *x, ptrdiff_t ld, ptrdiff_t rows, ptrdiff_t columns) {
    vec bad = all(0);
    for (ptrdiff_t i = 0; i < rows; i++) {
        ptrdiff_t j = 0;
        for (; j + VL <= columns; j += VL) bad += load(x + i * ld + j) - load(x + i * ld + j);
        for (; j < columns; j++) bad[0] += x[i * ld + j] - x[i * ld + j];
    }
    return !any_lane(bad != bad);
}

/* The online softmax of `rows` queries: takes in the scores s_ij of a tile, which become weights, and their maxima
 * tile_top_i; top_i (running maximum), total_i (running sum of exponentials) and o_id (rows, d_room), the weighted values,
 * go on. */
static void strip_update(struct tile *tile, ptrdiff_t rows, ptrdiff_t d, ptrdiff_t d_room, real *s_ij, const real *tile_top_i, real *top_i,
                         real *total_i, real *o_id) {
    int some_hidden = 0;
    /* 1: the new maxima, and by what the sums under the old ones shrink. NaN was passed over and comes back through exp. */
    real shrink_i[2 * MR] = {0}, shift_i[MR];
    for (ptrdiff_t r = 0; r < rows; r++) {
        real old_top = top_i[r], new_top = tile_top_i[r] > old_top ? tile_top_i[r] : old_top;
        shift_i[r] = new_top == -INFINITY ? 0 : new_top; /* for stability only; -inf - -inf would be NaN */
        shrink_i[r] = old_top - shift_i[r];
        top_i[r] = new_top;
    }
    for (ptrdiff_t r = 0; r < rows; r += VL) store(shrink_i + r, exp_weight(load(shrink_i + r)));
    for (ptrdiff_t r = 0; r < rows; r++)
        if (shrink_i[r] != 1 && total_i[r] != 0) {
            total_i[r] *= shrink_i[r];
            row_scale(o_id + r * d_room, d_room, shrink_i[r]);
        }
    /* 2: weights and their sums */
    for (ptrdiff_t r = 0; r < rows; r++) {
        real *s_j = s_ij + r * KEYS;
        vec total = all(0);
        ivec hidden = all_lanes(0);
#pragma GCC unroll 4
        for (ptrdiff_t j = 0; j < tile->n; j += VL) {
            vec s = load(s_j + j);
            vec p = exp_weight(s - shift_i[r]);
            hidden |= s == -INFINITY;
            store(s_j + j, p);
            total += p;
        }
        total_i[r] += sum_lanes(total);
        some_hidden |= any_lane(hidden);
    }
    /* 3: weighted values. 0 * NaN of a hidden row must not get in; looking for it is only worth while where rows are hidden. */
    if (some_hidden && tile->v_is_finite < 0) tile->v_is_finite = is_finite(tile->v, tile->v_ld, tile->n, d);
    int careful = some_hidden && !tile->v_is_finite;
    (careful ? micro_add_skipping_zeros : micro_add)(rows, d_room, tile->n, s_ij, KEYS, 1, tile->v, tile->v_ld, o_id, d_room);
}

/* Queries [i0, i1) of head h in batch row b. work: tile_room_size + STRIPS * MR * KEYS + (i1 - i0) * (d_room + 2)
 * reals. */
static void attention_piece(const real *q_bhtd, const struct mt_block *blocks, const struct mt_attention_sizes *sizes, real *out_bhtd,
                            real *lse_bht, ptrdiff_t b, ptrdiff_t h, ptrdiff_t i0, ptrdiff_t i1, real *work) {
    ptrdiff_t d = sizes->d, d_room = round_up(d, NR), first_row = (b * sizes->heads + h) * sizes->length;
    const real *q_td = q_bhtd + first_row * d;
    real scale = (real)sizes->scale;
    struct tile_room room = tile_room_at(work, d, d_room);
    real tile_top_i[STRIPS * MR], *s_ij = work + tile_room_size(d, d_room), *o_id = s_ij + STRIPS * MR * KEYS, *top_i = o_id + (i1 - i0) * d_room, *total_i = top_i + (i1 - i0);
    memset(o_id, 0, (i1 - i0) * d_room * sizeof(real));
    for (ptrdiff_t i = 0; i < i1 - i0; i++) {
        top_i[i] = -INFINITY;
        total_i[i] = 0;
    }
    for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++) {
        struct head head = head_of(&blocks[at_block], sizes, b, h);
        if (head.index_tk) { /* each query has keys of its own: strips of one row */
            for (ptrdiff_t i = i0; i < i1; i++)
                for (ptrdiff_t at = 0; at < head.block->width; at += KEYS) {
                    struct tile tile = tile_of_index(&head, i, at, min_size(KEYS, head.block->width - at), d, d_room, &room);
                    strip_scores(&head, &tile, q_td + i * d, i, 1, d, scale, s_ij, tile_top_i);
                    strip_update(&tile, 1, d, d_room, s_ij, tile_top_i, top_i + (i - i0), total_i + (i - i0), o_id + (i - i0) * d_room);
                }
            continue;
        }
        ptrdiff_t end = last_seen(&head, i1 - 1);
        for (ptrdiff_t at = first_seen(&head, i0) / KEYS * KEYS; at < end; at += KEYS) {
            struct tile tile = tile_of_bank(&head, at, min_size(KEYS, end - at), d, d_room, &room);
            for (ptrdiff_t run = i0; run < i1; run += STRIPS * MR) {
                /* Scores of a few strips and then their updates: keys and values together would not stay in L1. */
                ptrdiff_t from = run, to = min_size(i1, run + STRIPS * MR);
                while (from < to && last_seen(&head, min_size(to, from + MR) - 1) <= at) from += MR;
                while (from < to && first_seen(&head, from + (to - 1 - from) / MR * MR) >= at + tile.n) to -= (to - 1 - from) % MR + 1;
                for (ptrdiff_t i = from; i < to; i += MR)
                    strip_scores(&head, &tile, q_td + i * d, i, min_size(MR, to - i), d, scale, s_ij + (i - from) * KEYS, tile_top_i + (i - from));
                for (ptrdiff_t i = from; i < to; i += MR)
                    strip_update(&tile, min_size(MR, to - i), d, d_room, s_ij + (i - from) * KEYS, tile_top_i + (i - from), top_i + (i - i0),
                                 total_i + (i - i0), o_id + (i - i0) * d_room);
            }
        }
    }
    for (ptrdiff_t i = i0; i < i1; i++) {
        real total = total_i[i - i0], *o_d = o_id + (i - i0) * d_room;
        real share = total == 0 ? 0 : 1 / total; /* 0: the query sees no key */
        for (ptrdiff_t c = 0; c < d; c++) out_bhtd[(first_row + i) * d + c] = o_d[c] * share;
        lse_bht[first_row + i] = total == 0 ? -INFINITY : top_i[i - i0] + (real)log(total);
    }
}

/* Scores that exist, at most; for judging the work. */
static double attention_scores(const struct mt_block *blocks, const struct mt_attention_sizes *sizes) {
    double scores = 0;
    for (ptrdiff_t at = 0; at < sizes->n_blocks; at++) scores += (double)blocks[at].width;
    return scores * sizes->batch * sizes->heads * sizes->length;
}

/* q_bhtd (B, H, T, D) and blocks read; out_bhtd (B, H, T, D), lse_bht (B, H, T) written. -1: no workspace. */
static int attention(const void *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes, void *out, void *lse) {
    ptrdiff_t length = sizes->length, rows = sizes->batch * sizes->heads, d = sizes->d, d_room = round_up(d, NR);
    if (!rows || !length) return 0;
    /* Long runs of queries share the packing of a tile; enough pieces keep every thread busy. */
    double work = attention_scores(blocks, sizes) * (4.0 * d / VL + 8);
    ptrdiff_t wanted = div_up(4 * mt_team(1 << 20, work), rows);
    ptrdiff_t queries = round_up(min_size(max_size(div_up(length, wanted), QUERIES_LEAST), QUERIES_MOST), MR);
    ptrdiff_t runs = div_up(length, queries), pieces = rows * runs;
    int team = mt_team(pieces, work);
    size_t room = round_up(tile_room_size(d, d_room) + STRIPS * MR * KEYS + queries * (d_room + 2), 16);
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t row = piece / runs, i0 = (runs - 1 - piece % runs) * queries; /* causal: the longest first */
        attention_piece(q, blocks, sizes, out, lse, row / sizes->heads, row % sizes->heads, i0, min_size(length, i0 + queries),
                        workspace + room * mt_thread_id());
    }
    free(workspace);
    return 0;
}
