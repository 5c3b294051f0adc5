/* What attention each key receives: mass_bs = sum over heads and asking queries of exp(S - lse), the column sums of the weights.
 *
 * A piece is one tile of the keys of a batch row; it goes through the heads and queries in order, so the sums do not depend on
 * the threads. Scores are those of the forward, bit for bit. */

struct mass_room {
    real *k_t, *q_di, *s_ij, *q_d; /* (KEYS / NR, D, NR), (ROWS / MR, D, MR) and a vector more, (ROWS, SCORES_LD), (D,) */
    lane *shown_j;
    struct few_room *few;
};

/* In reals, a multiple of a cache line. room NULL: only counted. */
static size_t mass_room_at(real *work, ptrdiff_t d, struct mass_room *room) {
    ptrdiff_t sizes[] = {KEYS * d, ROWS * d + VL, ROWS * SCORES_LD, d, KEYS, FEW_ROOM};
    real *at[sizeof sizes / sizeof sizes[0]];
    size_t total = share_out(work, sizes, sizeof sizes / sizeof sizes[0], at);
    if (room) *room = (struct mass_room){at[0], at[1], at[2], at[3], (lane *)at[4], (struct few_room *)at[5]};
    return total;
}

/* s_j [lo, hi) become the weights of a query whose log-sum-exp is lse. */
static void mass_weights(real *s_j, ptrdiff_t lo, ptrdiff_t hi, double lse) {
    const struct two_parts off = in_two_parts(lse * LOG2_E);
    for (ptrdiff_t j = lo; j < hi; j += VL) store(s_j + j, exp2_below(load(s_j + j) - off.whole - off.rest, all(-BIAS), all(MAGIC)));
}

/* Keys [at, at + n) of batch row b, which every query of every head may see. mass_j (n,) written. */
static void mass_of_tile(const struct mt_rows *q, const struct mt_block *block, const struct mt_attention_sizes *sizes, const double *lse_bht,
                         const uint8_t *asking_t, ptrdiff_t b, ptrdiff_t at, ptrdiff_t n, real *mass_j, struct mass_room *room,
                         int *stop) {
    ptrdiff_t d = sizes->d, length = sizes->length;
    real sum_j[KEYS] = {0};
    for (ptrdiff_t h = 0; h < sizes->heads; h++) {
        struct head head = head_of(block, sizes, b, h);
        ptrdiff_t row0 = (b * sizes->heads + h) * length;
        struct tile tile = {.at = at, .n = min_size(n, head.end - at), .shown_j = fill_shown(&head, at, n, room->shown_j)};
        if (tile.n <= 0) break;
        if (h % (sizes->heads / block->kv_heads) == 0) pack_keys(head.k_sd + at * head.k_ld, head.k_ld, tile.n, d, room->k_t);
        for (ptrdiff_t i0 = 0; i0 < length && !mt_stopped(stop); i0 += ROWS) {
            ptrdiff_t rows = min_size(ROWS, length - i0);
            struct span spans[ROWS / MR];
            int some = 0;
            for (ptrdiff_t r = 0; r < rows; r += MR) spans[r / MR] = strip_span(&head, &tile, i0 + r, i0 + min_size(rows, r + MR));
            for (ptrdiff_t r = 0; r < rows; r++) some |= asking_t[i0 + r] && spans[r / MR].hi;
            if (!some) continue;
            pack_queries(head_rows(q, b, h) + i0 * q->stride[2], q->stride[2], rows, d, (real)(sizes->scale * LOG2_E), room->q_di);
            rows_scores(rows, spans, d, room->q_di, room->k_t, room->s_ij);
            for (ptrdiff_t r = 0; r < rows; r++) {
                real *s_j = room->s_ij + r * SCORES_LD;
                double lse = lse_bht[row0 + i0 + r];
                struct span span = spans[r / MR];
                if (!asking_t[i0 + r] || !span.hi || lse == -INFINITY) continue;
                finish_scores(&head, &tile, i0 + r, span.lo, span.hi, s_j);
                mass_weights(s_j, span.lo, span.hi, lse);
                for (ptrdiff_t j = span.lo; j < span.hi; j += VL) store(sum_j + j, load(sum_j + j) + load(s_j + j));
            }
        }
    }
    memcpy(mass_j, sum_j, n * sizeof(real));
}

/* The same of an index block, whose queries pick rows anywhere: the whole batch row. mass_s (S,) zeroed. */
static void mass_of_index(const struct mt_rows *q, const struct mt_block *block, const struct mt_attention_sizes *sizes, const double *lse_bht,
                          const uint8_t *asking_t, ptrdiff_t b, real *mass_s, struct mass_room *room, int *stop) {
    ptrdiff_t d = sizes->d, width = block->width;
    for (ptrdiff_t h = 0; h < sizes->heads; h++) {
        struct head head = head_of(block, sizes, b, h);
        for (ptrdiff_t i = 0; i < sizes->length && !mt_stopped(stop); i++) {
            ptrdiff_t row = (b * sizes->heads + h) * sizes->length + i;
            if (!asking_t[i] || lse_bht[row] == -INFINITY) continue;
            const real *q_d = head_rows(q, b, h) + i * q->stride[2];
            for (ptrdiff_t c = 0; c < d; c++) room->q_d[c] = q_d[c] * (real)(sizes->scale * LOG2_E);
            for (ptrdiff_t at = 0; at < width; at += KEYS) {
                ptrdiff_t n = min_size(KEYS, width - at);
                struct tile tile = few_tile(&head, i, at, n, room->few);
                if (!tile.n) continue;
                few_scores(1, 4, 0, room->few->k_j, room->few->k_j, n, d, room->q_d, room->s_ij);
                finish_scores(&head, &tile, i, 0, n, room->s_ij);
                mass_weights(room->s_ij, 0, n, lse_bht[row]);
                for (ptrdiff_t j = 0; j < n; j++)
                    if (tile.shown_j[j]) mass_s[head.index_tk[i * width + at + j]] += room->s_ij[j];
            }
        }
    }
}

/* q (B, H, T, D), one block, lse_bht (B, H, T), asking_bt (B, T) read; mass_bs (B, S) written. -1: no workspace. */
static int attention_mass(const struct mt_rows *q, const struct mt_block *block, const struct mt_attention_sizes *sizes, const void *lse,
                          const uint8_t *asking_bt, void *mass) {
    ptrdiff_t source = block->source, tiles = block->index ? 1 : div_up(source, KEYS), pieces = sizes->batch * tiles;
    real *mass_bs = mass;
    memset(mass_bs, 0, (size_t)sizes->batch * source * sizeof(real));
    if (!pieces || !sizes->heads || !sizes->length) return 0;
    int team = mt_team(pieces, attention_scores(block, sizes) * (2.0 * sizes->d / VL + 4));
    size_t room = mass_room_at(NULL, sizes->d, NULL);
    real *workspace = new_reals(room * team);
    if (!workspace) return -1;
    int stop = 0;
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        struct mass_room mine;
        ptrdiff_t b = piece / tiles, at = piece % tiles * KEYS;
        const uint8_t *asking_t = asking_bt + b * sizes->length;
        mass_room_at(workspace + room * mt_thread_id(), sizes->d, &mine);
        if (block->index)
            mass_of_index(q, block, sizes, lse, asking_t, b, mass_bs + b * source, &mine, &stop);
        else
            mass_of_tile(q, block, sizes, lse, asking_t, b, at, min_size(KEYS, source - at), mass_bs + b * source + at, &mine, &stop);
    }
    free(workspace);
    return stop ? MT_STOPPED : 0;
}
