/* Exact nearest rows by inner product.
 *
 * A piece is a strip of up to MR queries against the whole bank, in tiles: the scores of a tile come from the micro-kernel,
 * the best k of each query are kept in a heap whose top is the worst of them. One order, score and then index, decides
 * everything, so the result does not depend on how the bank was cut. */

struct found {
    real score;
    int64_t index; /* -1: nothing yet, which is worse than anything found */
};

INLINE int is_worse(struct found a, struct found b) {
    if (a.index < 0 || b.index < 0) return a.index < 0 && b.index >= 0;
    return a.score < b.score || (a.score == b.score && a.index > b.index);
}

/* heap_k is a heap with the worst on top, but for its element `at`, which sinks to its place. */
static void sink(struct found *heap_k, ptrdiff_t k, ptrdiff_t at) {
    struct found moving = heap_k[at];
    for (;;) {
        ptrdiff_t child = 2 * at + 1;
        if (child >= k) break;
        if (child + 1 < k && is_worse(heap_k[child + 1], heap_k[child])) child++;
        if (!is_worse(heap_k[child], moving)) break;
        heap_k[at] = heap_k[child];
        at = child;
    }
    heap_k[at] = moving;
}

/* queries_bnd (B, N, d), bank_bmd (B, M, d), valid_bm (B, M) or NULL read; scores_bnk, index_bnk (B, N, k) written.
 * -1: no workspace. */
static int search(const void *queries, const void *bank, const uint8_t *valid_bm, void *scores, int64_t *index_bnk, ptrdiff_t batch,
                  ptrdiff_t n, ptrdiff_t m, ptrdiff_t d, ptrdiff_t k) {
    enum { TILE = 64, GROUP_STRIPS = 8, SPLIT = 16384 }; /* rows a tile, strips a group, least rows a part */
    const real *queries_bnd = queries, *bank_bmd = bank;
    real *scores_bnk = scores;
    if (!batch || !n || !k) return 0;
    /* A group of queries reads the bank once. A long bank is split, so that one query alone has more than one piece. */
    ptrdiff_t groups = div_up(n, MR * GROUP_STRIPS), parts = max_size(div_up(m, max_size(SPLIT, k)), 1), part_m = div_up(m, parts);
    ptrdiff_t kept = min_size(k, max_size(part_m, 1)), pieces = batch * groups * parts;
    int team = mt_team(pieces, 2.0 * batch * n * m * d / VL);
    ptrdiff_t rows = batch * n;
    size_t room = (size_t)TILE * d + (size_t)MR * TILE;
    real *workspace = new_reals(room * team);
    struct found *heaps = malloc((size_t)rows * parts * kept * sizeof *heaps); /* (B, N, parts, kept) */
    ptrdiff_t *heads = calloc((size_t)rows * parts, sizeof *heads);            /* (B, N, parts): taken so far of each */
    if (!workspace || !heaps || !heads) {
        free(workspace);
        free(heaps);
        free(heads);
        return -1;
    }
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t b = piece / (groups * parts), group = piece / parts % groups, part = piece % parts;
        ptrdiff_t first = group * MR * GROUP_STRIPS, last = min_size(n, first + MR * GROUP_STRIPS);
        real *bank_t = workspace + room * mt_thread_id(), *scores_ij = bank_t + TILE * d;
        for (ptrdiff_t i = first; i < last; i++)
            for (ptrdiff_t at = 0; at < kept; at++) heaps[((b * n + i) * parts + part) * kept + at] = (struct found){0, -1};
        ptrdiff_t end = min_size(m, (part + 1) * part_m);
        for (ptrdiff_t j0 = part * part_m; j0 < end; j0 += TILE) {
            ptrdiff_t columns = min_size(TILE, end - j0);
            pack_transposed(bank_bmd + (b * m + j0) * d, d, columns, d, bank_t, TILE, round_up(columns, NR));
            for (ptrdiff_t i0 = first; i0 < last; i0 += MR) {
                ptrdiff_t rows = min_size(MR, last - i0);
                micro_set(rows, columns, d, queries_bnd + (b * n + i0) * d, d, 1, bank_t, TILE, scores_ij, TILE);
                for (ptrdiff_t i = 0; i < rows; i++) {
                    struct found *heap_k = heaps + ((b * n + i0 + i) * parts + part) * kept;
                    for (ptrdiff_t j = 0; j < columns; j++) {
                        struct found here = {scores_ij[i * TILE + j], j0 + j};
                        /* The first test alone turns nearly all away. NaN fails both. */
                        if (heap_k[0].index >= 0 && !(here.score > heap_k[0].score)) continue;
                        if (isnan(here.score) || (valid_bm && !valid_bm[b * m + j0 + j])) continue;
                        heap_k[0] = here;
                        sink(heap_k, kept, 0);
                    }
                }
            }
        }
    }
    /* The parts' best, best first: each heap is emptied from the worst up, then merged by taking the best head. */
#pragma omp parallel for num_threads(mt_team(rows, 20.0 * rows * parts * kept)) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        ptrdiff_t *head_p = heads + row * parts;
        for (ptrdiff_t part = 0; part < parts; part++) {
            struct found *heap_k = heaps + (row * parts + part) * kept;
            for (ptrdiff_t left = kept; left > 1; left--) {
                struct found worst = heap_k[0];
                heap_k[0] = heap_k[left - 1];
                heap_k[left - 1] = worst;
                sink(heap_k, left - 1, 0);
            }
        }
        for (ptrdiff_t at = 0; at < k; at++) {
            struct found best = {-INFINITY, -1};
            ptrdiff_t from = 0;
            for (ptrdiff_t part = 0; part < parts; part++) {
                if (head_p[part] == kept) continue;
                struct found head = heaps[(row * parts + part) * kept + head_p[part]];
                if (is_worse(best, head)) {
                    best = head;
                    from = part;
                }
            }
            scores_bnk[row * k + at] = best.score;
            index_bnk[row * k + at] = best.index;
            if (best.index >= 0) head_p[from]++;
        }
    }
    free(workspace);
    free(heaps);
    free(heads);
    return 0;
}
