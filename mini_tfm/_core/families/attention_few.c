/* Attention forward for few queries: a piece is a span of the tiles of one kv head, for all queries that read it. Keys are
 * transposed in registers and nothing is packed, for nothing is used twice; the parts of all tiles are merged at the end, in
 * order. An index block, where each query has keys of its own, takes this way at every length. */

enum { FEW = 4, FEW_MOST = 24 }; /* queries at once; more than FEW_MOST go the other way */
/* Rows are fetched one phase ahead: a tile's values while its keys are read, the next tile's keys while the values are. The processor
 * foresees neither, for a head's rows are few and its keys are taken VL at a time. */

/* A row of keys or values, of what an mt_kept says. */
typedef const void *kept_row;

/* VL numbers of a row; of int8 without their scale. */
INLINE vec load_row(const int kept, kept_row x, ptrdiff_t p) {
    return kept == MT_KEPT_INT8       ? load_elements(MT_ROWS_INT8, (const char *)x + p)
           : kept == MT_KEPT_BFLOAT16 ? load_bfloat16((const uint16_t *)x + p)
                                      : load((const real *)x + p);
}

INLINE real number_of(const int kept, kept_row x, ptrdiff_t p) {
    return kept == MT_KEPT_INT8 ? ((const int8_t *)x)[p] : kept == MT_KEPT_BFLOAT16 ? from_bfloat16(((const uint16_t *)x)[p]) : ((const real *)x)[p];
}

/* The at-th of the numbers that each lane holds, the first one below. */
INLINE vec numbers_in_lanes(const int kept, vec x, const int at) {
    if (kept == MT_KEPT_INT8) return __builtin_convertvector((ivec)((uvec)x << (24 - 8 * at)) >> 24, vec);
    if (kept == MT_KEPT_BFLOAT16) return at ? (vec)((uvec)x & (ulane)0xFFFF0000) : (vec)((uvec)x << 16);
    return x;
}

/* s_j (groups * VL) of each of nq queries = q k^T for keys at k_j, rows of D; q_id (nq, D). Their values at v_j are fetched.
 * A square of keys is transposed in registers; a lane has 2 numbers of bfloat16, 4 of int8, so that fewer are. nq, groups and kept
 * are constants wherever this is inlined. */
INLINE void few_scores_of(const int nq, const int groups, const int kept, const kept_row *k_j, const kept_row *v_j, ptrdiff_t d, const real *q_id,
                          real *s_ij) {
    const int in_lane = kept == MT_KEPT_INT8 ? 4 : kept == MT_KEPT_BFLOAT16 ? 2 : 1;
    const ptrdiff_t step = in_lane * VL, line = in_lane * LINE;
    vec sum[FEW][4];
    for (int i = 0; i < nq; i++)
        for (int g = 0; g < groups; g++) sum[i][g] = all(0);
    ptrdiff_t p = 0;
    for (; p + step <= d; p += step)
        for (int g = 0; g < groups; g++) {
            vec x[VL];
            const size_t at = p * kept_bytes(kept);
            for (ptrdiff_t l = 0; l < VL && p % line == 0; l++) __builtin_prefetch((const char *)v_j[g * VL + l] + at, 0, 2);
            for (ptrdiff_t l = 0; l < VL; l++) memcpy(&x[l], (const char *)k_j[g * VL + l] + at, sizeof x[l]);
            transpose_vectors(x);
            for (ptrdiff_t l = 0; l < VL; l++)
                for (int part = 0; part < in_lane; part++) {
                    vec k = numbers_in_lanes(kept, x[l], part);
                    for (int i = 0; i < nq; i++) sum[i][g] += q_id[i * d + p + in_lane * l + part] * k;
                }
        }
    for (; in_lane > 1 && p + VL <= d; p += VL)
        for (int g = 0; g < groups; g++) {
            vec x[VL];
            for (ptrdiff_t l = 0; l < VL; l++) x[l] = load_row(kept, k_j[g * VL + l], p);
            transpose_vectors(x);
            for (ptrdiff_t l = 0; l < VL; l++)
                for (int i = 0; i < nq; i++) sum[i][g] += q_id[i * d + p + l] * x[l];
        }
    for (; p < d; p++)
        for (int g = 0; g < groups; g++) {
            real x[VL];
            for (ptrdiff_t l = 0; l < VL; l++) x[l] = number_of(kept, k_j[g * VL + l], p);
            for (int i = 0; i < nq; i++) sum[i][g] += q_id[i * d + p] * load(x);
        }
    for (int i = 0; i < nq; i++)
        for (int g = 0; g < groups; g++) store(s_ij + i * KEYS + g * VL, sum[i][g]);
}

/* The same for n keys, readable to a multiple of VL: `groups` squares at once, at least 4 chains together, for one waits for its own
 * last step; then what is left. */
INLINE void few_scores(const int nq, const int groups, const int kept, const kept_row *k_j, const kept_row *v_j, ptrdiff_t n, ptrdiff_t d,
                       const real *q_id, real *s_ij) {
    ptrdiff_t j = 0, room = round_up(n, VL);
    for (; j + groups * VL <= room; j += groups * VL) few_scores_of(nq, groups, kept, k_j + j, v_j + j, d, q_id, s_ij + j);
    for (; j < room; j += VL) few_scores_of(nq, 1, kept, k_j + j, v_j + j, d, q_id, s_ij + j);
}

/* o_id (nq, ld) columns [c, c + vectors * VL) = p v for values at v_j (n,). A weight of zero takes no part: 0 * NaN of something
 * hidden is not to get in. These columns of next_j (n_next,) are fetched. */
INLINE void few_values_columns(const int nq, const int vectors, const int kept, const kept_row *v_j, ptrdiff_t n, const kept_row *next_j,
                               ptrdiff_t n_next, const real *p_ij, ptrdiff_t c, real *o_id, ptrdiff_t ld) {
    const size_t size = kept_bytes(kept);
    vec sum[FEW][8];
    for (int i = 0; i < nq; i++)
        for (int l = 0; l < vectors; l++) sum[i][l] = all(0);
    for (ptrdiff_t j = 0; j < n; j++) {
        for (size_t l = 0; l < vectors * VL * size && j < n_next; l += 64) __builtin_prefetch((const char *)next_j[j] + c * size + l, 0, 2);
        for (int i = 0; i < nq; i++) {
            real p = p_ij[i * KEYS + j];
            if (p == 0) continue;
            for (int l = 0; l < vectors; l++) sum[i][l] += p * load_row(kept, v_j[j], c + l * VL);
        }
    }
    for (int i = 0; i < nq; i++)
        for (int l = 0; l < vectors; l++) store(o_id + i * ld + c + l * VL, sum[i][l]);
}

INLINE void few_values(const int nq, const int kept, const kept_row *v_j, ptrdiff_t n, const kept_row *next_j, ptrdiff_t n_next, ptrdiff_t d,
                       const real *p_ij, real *o_id, ptrdiff_t ld) {
    const int most = N_REGISTERS / 2 / nq; /* vectors of each query that are summed at once */
    ptrdiff_t c = 0;
    for (; most >= 8 && c + 8 * VL <= d; c += 8 * VL) few_values_columns(nq, 8, kept, v_j, n, next_j, n_next, p_ij, c, o_id, ld);
    for (; most >= 4 && c + 4 * VL <= d; c += 4 * VL) few_values_columns(nq, 4, kept, v_j, n, next_j, n_next, p_ij, c, o_id, ld);
    for (; c + 2 * VL <= d; c += 2 * VL) few_values_columns(nq, 2, kept, v_j, n, next_j, n_next, p_ij, c, o_id, ld);
    for (; c + VL <= d; c += VL) few_values_columns(nq, 1, kept, v_j, n, next_j, n_next, p_ij, c, o_id, ld);
    for (; c < d; c++)
        for (int i = 0; i < nq; i++) {
            real sum = 0;
            for (ptrdiff_t j = 0; j < n; j++) {
                real p = p_ij[i * KEYS + j];
                if (p != 0) sum += p * number_of(kept, v_j[j], c);
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
    kept_row k_j[KEYS], v_j[KEYS];
    kept_row next_j[KEYS]; /* keys that will be read next, n_next of them: to be fetched */
    ptrdiff_t n_next;
    lane shown_j[KEYS];
    real k_scale_j[KEYS], v_scale_j[KEYS];
    real s_ij[FEW * KEYS];
};

/* The rows of keys and values at [at, at + n) of the bank, or those that query i picks there. Where a slot picks none, it stands
 * for another and is not shown; a tile in which nothing is shown has n = 0. */
static struct tile few_tile(const struct head *head, ptrdiff_t i, ptrdiff_t at, ptrdiff_t n, struct few_room *room) {
    struct tile tile = {.at = at, .n = n};
    if (!head->index_tk) {
        const struct mt_block *block = head->block;
        const ptrdiff_t size = kept_bytes(block->kept);
        for (ptrdiff_t j = 0; j < round_up(n, VL); j++) {
            room->k_j[j] = row_of(head, &block->k, at + min_size(j, n - 1), size);
            room->v_j[j] = row_of(head, &block->v, at + min_size(j, n - 1), size);
        }
        tile.k_scale_j = gather_scales(head, &block->k, at, n, room->k_scale_j);
        tile.v_scale_j = gather_scales(head, &block->v, at, n, room->v_scale_j);
        tile.shown_j = fill_shown(head, at, n, room->shown_j);
        return tile;
    }
    const int64_t *rows_j = head->index_tk + i * head->block->width + at;
    int64_t some = -1;
    tile.shown_j = room->shown_j;
    for (ptrdiff_t j = 0; j < round_up(n, 4 * VL); j++) {
        int64_t row = j < n ? rows_j[j] : -1;
        int shown = row >= 0 && row < head->end && (!head->valid_s || head->valid_s[row]);
        room->shown_j[j] = shown ? -1 : 0;
        if (shown) some = row;
    }
    if (some < 0) return (struct tile){.at = at, .n = 0};
    for (ptrdiff_t j = 0; j < round_up(n, 4 * VL); j++) {
        int64_t row = room->shown_j[j] ? rows_j[j] : some;
        room->k_j[j] = head->k_sd + row * head->k_ld;
        room->v_j[j] = head->v_sd + row * head->v_ld;
    }
    return tile;
}

/* The keys of the tile that is read after the one at `at` of a block by the heads from h on of row b: of this block or the next, or the
 * first of the next heads or row. */
static void foresee(const struct mt_block *blocks, const struct mt_attention_sizes *sizes, ptrdiff_t b, ptrdiff_t h, ptrdiff_t group,
                    ptrdiff_t at_block, ptrdiff_t at, struct few_room *room) {
    struct head head = head_of(&blocks[at_block], sizes, b, h);
    room->n_next = 0;
    for (at += KEYS; at >= last_seen(&head, sizes->length - 1); at = first_seen(&head, 0) / KEYS * KEYS) {
        if (++at_block == sizes->n_blocks) at_block = 0, h += group;
        if (h == sizes->heads) h = 0, b++;
        if (b == sizes->batch) return;
        head = head_of(&blocks[at_block], sizes, b, h);
    }
    if (head.index_tk) return;
    room->n_next = min_size(KEYS, last_seen(&head, sizes->length - 1) - at);
    for (ptrdiff_t j = 0; j < room->n_next; j++) room->next_j[j] = row_of(&head, &head.block->k, at + j, kept_bytes(head.block->kept));
}

/* The parts that a tile gives to nq <= FEW queries; q_id (nq, D) is scaled, the parts' o_d lie ld apart. */
static void few_parts(const struct mt_attention_sizes *sizes, const struct asking *asking, int nq, ptrdiff_t at_block, const struct tile *tile,
                      const real *q_id, struct few_room *room, struct part *parts, ptrdiff_t ld) {
    ptrdiff_t d = sizes->d, n = tile->n;
    const int kept = REAL_IS_DOUBLE ? MT_KEPT_REAL : asking[0].head.block->kept;
#define SCORES(nq_, groups_)                                                                                    \
    switch (kept) {                                                                                             \
    case MT_KEPT_INT8: few_scores(nq_, groups_, MT_KEPT_INT8, room->k_j, room->v_j, n, d, q_id, room->s_ij); break;         \
    case MT_KEPT_BFLOAT16: few_scores(nq_, groups_, MT_KEPT_BFLOAT16, room->k_j, room->v_j, n, d, q_id, room->s_ij); break; \
    default: few_scores(nq_, groups_, MT_KEPT_REAL, room->k_j, room->v_j, n, d, q_id, room->s_ij);                         \
    }
    switch (nq) {
    case 1: SCORES(1, 4); break;
    case 2: SCORES(2, 2); break;
    case 3: SCORES(3, 1); break;
    default: SCORES(4, 1);
    }
#undef SCORES
    for (int i = 0; i < nq; i++) {
        real *s_j = room->s_ij + i * KEYS;
        parts[i].top = finish_scores(&asking[i].head, tile, asking[i].i, 0, n, s_j);
        parts[i].total = row_weights(s_j, 0, n, row_shift_of(parts[i].top));
        parts[i].top = ceil(parts[i].top);
        if (sizes->dropout > 0) row_drop(draw_of_row(sizes, at_block, asking[i].row), tile->at, 0, n, s_j);
        scale_weights(tile, 0, n, s_j);
    }
#define VALUES(nq_)                                                                                               \
    switch (kept) {                                                                                               \
    case MT_KEPT_INT8: few_values(nq_, MT_KEPT_INT8, room->v_j, n, room->next_j, room->n_next, d, room->s_ij, parts[0].o_d, ld); break;         \
    case MT_KEPT_BFLOAT16: few_values(nq_, MT_KEPT_BFLOAT16, room->v_j, n, room->next_j, room->n_next, d, room->s_ij, parts[0].o_d, ld); break; \
    default: few_values(nq_, MT_KEPT_REAL, room->v_j, n, room->next_j, room->n_next, d, room->s_ij, parts[0].o_d, ld);                         \
    }
    switch (nq) {
    case 1: VALUES(1); break;
    case 2: VALUES(2); break;
    case 3: VALUES(3); break;
    default: VALUES(4);
    }
#undef VALUES
}

enum { FEW_ROOM = (sizeof(struct few_room) + sizeof(real) - 1) / sizeof(real) };

/* Row `row` from its parts, `apart` reals from tile to tile: o (d_room), top, total. so_far_d (d_room,) is room for the sum. */
static void few_finish(const struct mt_attention_sizes *sizes, const real *parts, ptrdiff_t tiles, ptrdiff_t apart, real *so_far_d, ptrdiff_t row,
                       const struct mt_rows *out, double *lse) {
    ptrdiff_t d_room = round_up(sizes->d, VL);
    struct part so_far = {-INFINITY, 0, so_far_d};
    memset(so_far_d, 0, d_room * sizeof(real));
    for (ptrdiff_t at_tile = 0; at_tile < tiles; at_tile++, parts += apart)
        if (parts[d_room + 1] != 0) merge_part(&so_far, parts[d_room], parts[d_room + 1], parts, sizes->d);
    ptrdiff_t head = row / sizes->length, i = row % sizes->length;
    real *out_d = head_rows(out, head / sizes->heads, head % sizes->heads) + i * out->stride[2];
    finish_row(sizes, so_far.top, so_far.total, so_far_d, out_d, lse ? lse + row : NULL);
}

/* As attention(), for at most FEW_MOST queries of each of the `group` heads together that read one kv head. A span's size
 * does not show in the result: every tile's part is kept apart until all are there. */
static int attention_few(const struct mt_rows *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes,
                         const struct mt_rows *out, double *lse, ptrdiff_t group, double work) {
    ptrdiff_t d = sizes->d, d_room = round_up(d, VL), heads = sizes->heads, length = sizes->length;
    ptrdiff_t units = sizes->batch * (heads / group), rows = group * length, tiles = 0;
    for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++) tiles += div_up(blocks[at_block].width, KEYS);
    work += 2.0 * d * attention_scores(blocks, sizes) / rows; /* reading keys and values: what takes longest where few share it */
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
    int stop = 0;
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
            for (ptrdiff_t r = 0; r < rows; r++) {
                const real *q_d = head_rows(q, b, h0 + r / length) + r % length * q->stride[2];
                for (ptrdiff_t c = 0; c < d; c++) q_id[r * d + c] = q_d[c] * factor;
            }
            for (ptrdiff_t at_block = 0; at_block < sizes->n_blocks; at_block++)
                for (ptrdiff_t at = 0; at < blocks[at_block].width; at += KEYS, at_tile++) {
                    if (at_tile < first || at_tile >= last || mt_stopped(&stop)) continue;
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
                        if (n) tile = few_tile(&asking[0].head, asking[0].i, at, n, room);
                        room->n_next = 0;
                        if (tile.n && r0 + at_once >= rows) foresee(blocks, sizes, b, h0, group, at_block, at, room);
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
    return stop ? MT_STOPPED : 0;
}
