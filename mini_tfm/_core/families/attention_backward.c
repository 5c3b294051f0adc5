/* Attention backward (arXiv 2205.14135, algorithm 4): the weights are computed again tile by tile from lse.
 *
 *     P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta), delta = rowsum(dO O)
 *     dV += P^T dO   dK += scale dS^T Q   dQ += scale dS K   dbias += dS
 *
 * Every gradient element is one chain over queries (dK, dV) or keys (dQ) in ascending order, as in gemm.c; so it does not
 * matter which of the two ways below the work is cut, and the faster one is taken. */

enum { QUERIES = 96 }; /* queries in a tile of the backward; a multiple of MR */

struct backward {
    const real *dout_bhtd, *q_bhtd, *lse_bht, *delta_bht;
    const struct mt_block *blocks;
    const struct mt_attention_sizes *sizes;
    real *dq_bhtd;
};

/* Workspace of a piece. */
struct backward_room {
    struct tile_room tile;
    real *q_id, *dout_id; /* (QUERIES, d_room), only where d is not d_room */
    real *p_ij, *ds_ij;   /* (QUERIES, KEYS) */
};

static size_t backward_room_size(ptrdiff_t d, ptrdiff_t d_room) {
    return round_up(tile_room_size(d, d_room) + 2 * QUERIES * (d_room + KEYS), 16);
}

static struct backward_room backward_room_at(real *work, ptrdiff_t d, ptrdiff_t d_room) {
    struct backward_room room = {.tile = tile_room_at(work, d, d_room)};
    room.p_ij = work + round_up(tile_room_size(d, d_room), 16);
    room.ds_ij = room.p_ij + QUERIES * KEYS;
    room.q_id = room.ds_ij + QUERIES * KEYS;
    room.dout_id = room.q_id + QUERIES * d_room;
    return room;
}

/* c (m, n; ldc) += a b, element (i, k) of a at a[i * a_row + k * a_col]; b's rows are readable to a multiple of NR. */
static void add_product(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const real *a, ptrdiff_t a_row, ptrdiff_t a_col, const real *b,
                        ptrdiff_t ldb, real *c, ptrdiff_t ldc, int careful) {
    void (*add)(ptrdiff_t, ptrdiff_t, ptrdiff_t, const real *, ptrdiff_t, ptrdiff_t, const real *, ptrdiff_t, real *, ptrdiff_t) =
        careful ? micro_add_skipping_zeros : micro_add;
    ptrdiff_t whole = n / NR * NR, columns = n - whole;
    real corner[MR * NR];
    for (ptrdiff_t i = 0; i < m; i += MR) {
        ptrdiff_t rows = min_size(MR, m - i);
        real *last = c + i * ldc + whole;
        add(rows, whole, k, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc);
        if (!columns) continue;
        pack_plain(last, ldc, rows, columns, corner, NR);
        add(rows, NR, k, a + i * a_row, a_row, a_col, b + whole, ldb, corner, NR);
        for (ptrdiff_t r = 0; r < rows; r++) memcpy(last + r * ldc, corner + r * NR, columns * sizeof(real));
    }
}

/* p_ij (rows, KEYS) holds scores, ds_ij holds dP: they become P and scale dS, and dbias is accumulated. Returns whether any
 * score was hidden. dbias: of query i0 and the tile's first key, or NULL. */
static int strip_gradients(ptrdiff_t rows, ptrdiff_t n, const real *lse_i, const real *delta_i, real scale, real *p_ij, real *ds_ij,
                           real *dbias, const ptrdiff_t *dbias_stride) {
    int some_hidden = 0;
    for (ptrdiff_t r = 0; r < rows; r++) {
        real *p_j = p_ij + r * KEYS, *ds_j = ds_ij + r * KEYS;
        ivec seen_any = all_lanes(lse_i[r] == -INFINITY ? 0 : -1), hidden_any = all_lanes(0);
        for (ptrdiff_t j = 0; j < n; j += VL) {
            vec s = load(p_j + j);
            ivec seen = (s != -INFINITY) & seen_any;
            vec p = choose(seen, exp_weight(s - lse_i[r]), all(0));
            vec ds = choose(seen, p * (load(ds_j + j) - delta_i[r]), all(0));
            if (dbias)
                for (ptrdiff_t l = 0; l < VL && j + l < n; l++) dbias[r * dbias_stride[2] + (j + l) * dbias_stride[3]] += ds[l];
            store(p_j + j, p);
            store(ds_j + j, ds * scale);
            hidden_any |= ~seen;
        }
        some_hidden |= any_lane(hidden_any);
    }
    return some_hidden;
}

/* Queries [i0, i1) <= QUERIES of head h against one tile of the bank. dk, dv: of the tile's first key, or NULL. */
static void backward_tiles(const struct backward *of, const struct head *head, struct tile *tile, const real *k_rows, ptrdiff_t k_ld,
                           int *k_is_finite, const real *v_t, ptrdiff_t h, ptrdiff_t i0, ptrdiff_t i1, int want_dq, real *dk, real *dv,
                           real *dbias, struct backward_room *room) {
    const struct mt_attention_sizes *sizes = of->sizes;
    ptrdiff_t d = sizes->d, d_room = round_up(d, NR), n = tile->n, m = i1 - i0;
    ptrdiff_t row = (head->b * sizes->heads + h) * sizes->length + i0;
    const real *q_id = of->q_bhtd + row * d, *dout_id = of->dout_bhtd + row * d;
    real scale = (real)sizes->scale, top_i[MR]; /* the maxima are not needed: lse is */
    /* 1: P and dS; scores first, for the packed keys and values together would not stay in L1 */
    for (ptrdiff_t i = 0; i < m; i += MR)
        strip_scores(head, tile, q_id + i * d, i0 + i, min_size(MR, m - i), d, scale, room->p_ij + i * KEYS, top_i);
    for (ptrdiff_t i = 0; i < m; i += MR)
        micro_set(min_size(MR, m - i), n, d, dout_id + i * d, d, 1, v_t, KEYS, room->ds_ij + i * KEYS, KEYS);
    int some_hidden = strip_gradients(m, n, of->lse_bht + row, of->delta_bht + row, scale, room->p_ij, room->ds_ij,
                                  dbias ? dbias + i0 * head->block->dbias_stride[2] : NULL, head->block->dbias_stride);
    /* 2: dQ, dK, dV. Something hidden that is not finite must not get in by 0 * NaN. */
    if (want_dq) {
        if (some_hidden && *k_is_finite < 0) *k_is_finite = is_finite(k_rows, k_ld, n, d);
        add_product(m, d, n, room->ds_ij, KEYS, 1, k_rows, k_ld, of->dq_bhtd + row * d, d, some_hidden && !*k_is_finite);
    }
    if (!dk) return;
    int careful = some_hidden && !(is_finite(q_id, d, m, d) && is_finite(dout_id, d, m, d));
    ptrdiff_t ld = d;
    if (d != d_room) {
        pack_plain(q_id, d, m, d, room->q_id, d_room);
        pack_plain(dout_id, d, m, d, room->dout_id, d_room);
        q_id = room->q_id, dout_id = room->dout_id, ld = d_room;
    }
    add_product(n, d, m, room->p_ij, 1, KEYS, dout_id, ld, dv, d, careful);
    add_product(n, d, m, room->ds_ij, 1, KEYS, q_id, ld, dk, d, careful);
}

/* The same where each query has keys of its own: row by row, gradients go to the rows that it picked, in order. */
static void backward_index(const struct backward *of, const struct head *head, ptrdiff_t h, ptrdiff_t i0, ptrdiff_t i1, int want_dq,
                           real *dk_sd, real *dv_sd, real *dbias, struct backward_room *room) {
    const struct mt_attention_sizes *sizes = of->sizes;
    ptrdiff_t d = sizes->d, d_room = round_up(d, NR), width = head->block->width;
    real top_i[MR];
    for (ptrdiff_t i = i0; i < i1; i++)
        for (ptrdiff_t at = 0; at < width; at += KEYS) {
            ptrdiff_t n = min_size(KEYS, width - at), row = (head->b * sizes->heads + h) * sizes->length + i;
            struct tile tile = tile_of_index(head, i, at, n, d, d_room, &room->tile);
            const real *q_d = of->q_bhtd + row * d, *dout_d = of->dout_bhtd + row * d;
            pack_transposed(room->tile.v_rows, d_room, n, d, room->tile.v_t, KEYS, round_up(n, NR));
            strip_scores(head, &tile, q_d, i, 1, d, (real)sizes->scale, room->p_ij, top_i);
            micro_set(1, n, d, dout_d, d, 1, room->tile.v_t, KEYS, room->ds_ij, KEYS);
            const ptrdiff_t *stride = head->block->dbias_stride;
            strip_gradients(1, n, of->lse_bht + row, of->delta_bht + row, (real)sizes->scale, room->p_ij, room->ds_ij,
                            dbias ? dbias + i * stride[2] + at * stride[3] : NULL, stride);
            /* Rows that are not shown were packed as zeros, so they add none but exact zeros to dQ. */
            if (want_dq) add_product(1, d, n, room->ds_ij, KEYS, 1, room->tile.k_rows, d_room, of->dq_bhtd + row * d, d, 0);
            if (!dk_sd) continue;
            const int64_t *rows_k = head->index_tk + i * width + at;
            for (ptrdiff_t j = 0; j < n; j++) {
                if (!tile.shown_j[j] || (room->p_ij[j] == 0 && room->ds_ij[j] == 0)) continue;
                real p = room->p_ij[j], ds = room->ds_ij[j], *dk_d = dk_sd + rows_k[j] * d, *dv_d = dv_sd + rows_k[j] * d;
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
                           ptrdiff_t parts, int want_dq, int want_dkv, real *work) {
    const struct mt_attention_sizes *sizes = of->sizes;
    ptrdiff_t d = sizes->d, d_room = round_up(d, NR);
    struct backward_room room = backward_room_at(work, d, d_room);
    for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++) {
        const struct mt_block *block = &of->blocks[at_block];
        int block_dkv = want_dkv && block->dk;
        if (!want_dq && !block_dkv) continue;
        ptrdiff_t group = sizes->heads / block->kv_heads;
        for (ptrdiff_t kv_h0 = h0; kv_h0 < h1; kv_h0 += group) {
            struct head head = head_of(block, sizes, b, kv_h0);
            ptrdiff_t bank = (b * block->kv_heads + head.kv) * block->source * d;
            real *dk_sd = block_dkv ? (real *)block->dk + bank : NULL, *dv_sd = block_dkv ? (real *)block->dv + bank : NULL;
            ptrdiff_t tiles = div_up(head.index_tk ? 0 : head.end, KEYS);
            for (ptrdiff_t at_tile = tiles * part / parts; at_tile < tiles * (part + 1) / parts; at_tile++) {
                ptrdiff_t at = at_tile * KEYS, n = min_size(KEYS, head.end - at);
                struct tile tile = tile_of_bank(&head, at, n, d, d_room, &room.tile);
                pack_transposed(head.v_sd + at * d, d, n, d, room.tile.v_t, KEYS, round_up(n, NR));
                const real *k_rows = head.k_sd + at * d;
                int k_is_finite = -1;
                if (d != d_room && want_dq) {
                    pack_plain(k_rows, d, n, d, room.tile.k_rows, d_room);
                    k_rows = room.tile.k_rows;
                }
                for (ptrdiff_t h = kv_h0; h < kv_h0 + group; h++) {
                    head = head_of(block, sizes, b, h);
                    real *dbias = NULL;
                    if (want_dq && block->dbias)
                        dbias = (real *)block->dbias + b * block->dbias_stride[0] + h * block->dbias_stride[1] + at * block->dbias_stride[3];
                    for (ptrdiff_t i = i0; i < i1; i += QUERIES) {
                        /* Of these queries, those that see the tile: both ends of what they see grow with i. */
                        ptrdiff_t from = i, to = min_size(i1, i + QUERIES);
                        while (from < to && last_seen(&head, from) <= at) from++;
                        while (from < to && first_seen(&head, to - 1) >= at + n) to--;
                        if (from == to) continue;
                        backward_tiles(of, &head, &tile, k_rows, k_rows == room.tile.k_rows ? d_room : d, &k_is_finite, room.tile.v_t, h,
                                       from, to, want_dq, dk_sd ? dk_sd + at * d : NULL, dv_sd ? dv_sd + at * d : NULL, dbias, &room);
                    }
                }
            }
            if (!head.index_tk || (!want_dq && part > 0)) continue;
            for (ptrdiff_t h = kv_h0; h < kv_h0 + group; h++) {
                head = head_of(block, sizes, b, h);
                real *dbias = NULL;
                if (want_dq && block->dbias) dbias = (real *)block->dbias + b * block->dbias_stride[0] + h * block->dbias_stride[1];
                backward_index(of, &head, h, i0, i1, want_dq, dk_sd, dv_sd, dbias, &room);
            }
        }
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

/* dout_bhtd, out_bhtd, lse_bht, q_bhtd and blocks read; dq_bhtd and the blocks' dk, dv written, dbias accumulated.
 * -1: no workspace. */
static int attention_backward(const void *dout, const void *out, const void *lse, const void *q, const struct mt_block *blocks,
                              const struct mt_attention_sizes *sizes, void *dq) {
    ptrdiff_t batch = sizes->batch, heads = sizes->heads, length = sizes->length, d = sizes->d, rows = batch * heads * length;
    const real *dout_bhtd = dout, *out_bhtd = out;
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
    size_t room = backward_room_size(d, round_up(d, NR));
    real *workspace = new_reals(room * team + max_size(rows, 1));
    if (!workspace) return -1;
    real *delta_bht = workspace + room * team;
    for (ptrdiff_t at = 0; at < sizes->n_blocks; at++)
        if (blocks[at].dk) {
            size_t bytes = (size_t)batch * blocks[at].kv_heads * blocks[at].source * d * sizeof(real);
            memset(blocks[at].dk, 0, bytes);
            memset(blocks[at].dv, 0, bytes);
        }
    memset(dq, 0, (size_t)rows * d * sizeof(real));
#pragma omp parallel for num_threads(mt_team(rows, 2.0 * rows * d)) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) delta_bht[row] = row_dot(dout_bhtd + row * d, out_bhtd + row * d, d);
    struct backward of = {dout, q, lse, delta_bht, blocks, sizes, dq};
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t at = 0; at < pieces * cuts * (split ? 2 : 1); at++) {
        real *mine = workspace + room * mt_thread_id();
        ptrdiff_t piece = at / cuts % pieces, cut = at % cuts, h0 = piece % units * unit;
        ptrdiff_t b0 = has_dbias ? 0 : piece / units, b1 = has_dbias ? batch : b0 + 1;
        for (ptrdiff_t b = b0; b < b1; b++) {
            if (!split)
                backward_piece(&of, b, h0, h0 + unit, 0, length, 0, 1, 1, 1, mine);
            else if (at < pieces * cuts)
                backward_piece(&of, b, h0, h0 + unit, length * cut / cuts, length * (cut + 1) / cuts, 0, 1, 1, 0, mine);
            else
                backward_piece(&of, b, h0, h0 + unit, 0, length, cut, cuts, 0, 1, mine);
        }
    }
    free(workspace);
    return 0;
}
