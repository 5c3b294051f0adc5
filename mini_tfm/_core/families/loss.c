/* Cross entropy with label smoothing, of logits that are there and of logits that are made a chunk of the vocabulary at a
 * time. */

/* What is known of a row after some of its logits: sum exp(x - top) over them, and what the loss needs besides. */
struct seen {
    real top, sum; /* top: the largest but for NaN, -inf before anything else was seen; sum: NaN after a NaN or an inf */
    real at_target;
    double total; /* of the logits: in double, for the loss has but their distance from the top */
};

/* logits x_v (width), those of classes from v0 on. */
INLINE struct seen see_more(struct seen was, const real *x_v, ptrdiff_t width, int64_t target, ptrdiff_t v0, int smoothed) {
    enum { CHAINS = 4 }; /* one chain of sums or maxima would wait for itself */
    /* 1: the largest */
    vec top[CHAINS], sum[CHAINS];
    for (int c = 0; c < CHAINS; c++) top[c] = all(-INFINITY), sum[c] = all(0);
    ptrdiff_t i = 0;
    for (; i + CHAINS * VL <= width; i += CHAINS * VL)
        for (int c = 0; c < CHAINS; c++) top[c] = max_vec(load(x_v + i + c * VL), top[c]);
    for (; i + VL <= width; i += VL) top[0] = max_vec(load(x_v + i), top[0]);
    if (i < width) top[0] = max_vec(load_some(x_v + i, width - i, -INFINITY), top[0]);
    struct seen now = was;
    now.top = max_lanes(max_vec(max_vec(top[0], top[1]), max_vec(top[2], top[3])));
    if (!(now.top > was.top)) now.top = was.top;
    real shift = now.top == -INFINITY ? 0 : now.top; /* so that -inf - -inf is not asked for */
    /* 2: the sum, the earlier one brought to the new top */
    for (i = 0; i + CHAINS * VL <= width; i += CHAINS * VL)
        for (int c = 0; c < CHAINS; c++) sum[c] += exp_vec(load(x_v + i + c * VL) - shift);
    for (; i + VL <= width; i += VL) sum[0] += exp_vec(load(x_v + i) - shift);
    if (i < width) sum[0] += exp_vec(load_some(x_v + i, width - i, -INFINITY) - shift);
    if (was.top != now.top && was.sum != 0) now.sum *= exp_real(was.top - shift);
    now.sum += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    /* 3: the rest */
    if (target >= v0 && target < v0 + width) now.at_target = x_v[target - v0];
    if (smoothed) {
        vec total = all(0);
        for (i = 0; i + VL <= width; i += VL) total += load(x_v + i) - shift;
        if (i < width) total += load_some(x_v + i, width - i, shift) - shift;
        now.total += (double)sum_lanes(total) + (double)shift * width;
    }
    return now;
}

INLINE struct seen nothing_seen(void) { return (struct seen){-INFINITY, 0, 0, 0}; }

/* The loss is a sum of distances from the top, so logits that share an offset lose nothing by it. */
INLINE void loss_of(struct seen row, ptrdiff_t vocab, double smoothing, real *loss, double *lse) {
    double shift = row.top == -INFINITY ? 0 : row.top, log_sum = log(row.sum);
    double cost = log_sum + (1 - smoothing) * (shift - row.at_target);
    if (smoothing != 0) cost += smoothing * (shift - row.total / vocab);
    *loss = row.at_target == -INFINITY ? INFINITY : (real)cost;
    *lse = shift + log_sum;
}

/* dx_v (width) = (softmax - smoothed one-hot) * dloss of logits x_v, which may be dx_v itself, of classes from v0 on. */
INLINE void dlogits_row(const real *x_v, real *dx_v, ptrdiff_t width, double lse, real dloss, int64_t target, ptrdiff_t v0, real share,
                        real smoothing) {
    const int is_here = target >= v0 && target < v0 + width;
    const int hopeless = lse == -INFINITY; /* every logit was -inf: there is no distribution to speak of */
    const struct two_parts off = in_two_parts(lse);
    real at_target = is_here && !hopeless ? exp_real(x_v[target - v0] - off.whole - off.rest) : 0; /* before x_v is overwritten */
    ptrdiff_t i = 0;
    for (; !hopeless && i + VL <= width; i += VL) store(dx_v + i, (exp_vec(load(x_v + i) - off.whole - off.rest) - share) * dloss);
    if (!hopeless && i < width)
        store_some(dx_v + i, (exp_vec(load_some(x_v + i, width - i, -INFINITY) - off.whole - off.rest) - share) * dloss, width - i);
    for (i = 0; hopeless && i < width; i++) dx_v[i] = (0 - share) * dloss;
    if (is_here) dx_v[target - v0] = ((at_target - (1 - smoothing)) - share) * dloss;
}

/* logits_nv (N, V), targets_n (N,) in [0, V) or ignore_index read; losses_n, lse_n (N,) written, 0 in ignored rows. lse is double for
 * both reals. */
static int cross_entropy(const void *logits, const int64_t *targets_n, int64_t ignore_index, double label_smoothing, void *losses,
                         void *lse, ptrdiff_t n, ptrdiff_t vocab) {
    const real *logits_nv = logits;
    real *losses_n = losses;
    double *lse_n = lse;
    int stop = 0;
#pragma omp parallel for num_threads(mt_team(n, 8.0 * n * vocab)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        losses_n[row] = lse_n[row] = 0;
        if (targets_n[row] == ignore_index || mt_stopped(&stop)) continue;
        struct seen all_of_it = see_more(nothing_seen(), logits_nv + row * vocab, vocab, targets_n[row], 0, label_smoothing != 0);
        loss_of(all_of_it, vocab, label_smoothing, &losses_n[row], &lse_n[row]);
    }
    return stop ? MT_STOPPED : 0;
}

/* logits_nv (N, V), targets_n, lse_n, dlosses_n (N,) read; dlogits_nv (N, V) written, 0 in ignored rows. */
static int cross_entropy_backward(const void *logits, const int64_t *targets_n, const void *lse, const void *dlosses,
                                   int64_t ignore_index, double label_smoothing, void *dlogits, ptrdiff_t n, ptrdiff_t vocab) {
    const real *logits_nv = logits, *dlosses_n = dlosses;
    const double *lse_n = lse;
    real *dlogits_nv = dlogits, smoothing = (real)label_smoothing;
    real share = vocab ? smoothing / vocab : 0;
    int stop = 0;
#pragma omp parallel for num_threads(mt_team(n, 6.0 * n * vocab)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        if (mt_stopped(&stop)) continue;
        if (targets_n[row] == ignore_index)
            memset(dlogits_nv + row * vocab, 0, vocab * sizeof(real));
        else
            dlogits_row(logits_nv + row * vocab, dlogits_nv + row * vocab, vocab, lse_n[row], dlosses_n[row], targets_n[row], 0, share,
                        smoothing);
    }
    return stop ? MT_STOPPED : 0;
}

/* What a chunk of the output layer is made with. Its weight is rows of (V, d), which lie together, or columns of (d, V),
 * which are copied so that the matrix product finds them so. */
struct chunk {
    ptrdiff_t v0, width;
    const real *weight; /* (width, d), or (d, width) */
};

/* (rows, width) of a matrix whose rows lie `ld` apart, to or from one whose rows lie together. */
static void copy_columns(const real *from, ptrdiff_t ld_from, real *to, ptrdiff_t ld_to, ptrdiff_t rows, ptrdiff_t width) {
#pragma omp parallel for num_threads(mt_team(rows, 2.0 * rows * width)) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) memcpy(to + row * ld_to, from + row * ld_from, width * sizeof(real));
}

/* gemm, of factors rounded to bfloat16 where the layer wants them. */
static int layer_gemm(const struct mt_output_layer *layer, const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k,
                      int trans_a, int trans_b, int accumulate) {
    return (layer->bfloat16 ? gemm_bfloat16 : gemm)(a, b, c, m, n, k, trans_a, trans_b, accumulate, NULL);
}

/* logits_nw (N, width) = x W of the chunk at v0, without the bias. panel: room for (d, chunk), unused when transposed. */
static int chunk_logits(const struct mt_output_layer *layer, ptrdiff_t v0, struct chunk *chunk, real *panel, real *logits_nw) {
    const real *weight = layer->weight;
    ptrdiff_t d = layer->d, width = min_size(layer->chunk, layer->vocab - v0);
    if (!layer->transposed) copy_columns(weight + v0, layer->vocab, panel, width, d, width);
    *chunk = (struct chunk){v0, width, layer->transposed ? weight + v0 * d : panel};
    return layer_gemm(layer, layer->x, chunk->weight, logits_nw, layer->n, width, d, 0, layer->transposed, 0);
}

INLINE void add_bias(const struct mt_output_layer *layer, const struct chunk *chunk, real *x_w) {
    const real *bias_w = (const real *)layer->bias + chunk->v0;
    if (layer->bias)
        for (ptrdiff_t i = 0; i < chunk->width; i++) x_w[i] += bias_w[i];
}

/* losses_n, lse_n (N,) written. -1: no workspace. */
static int linear_cross_entropy(const struct mt_output_layer *layer, void *losses, void *lse) {
    const ptrdiff_t n = layer->n, vocab = layer->vocab, most = min_size(layer->chunk, vocab);
    const double smoothing = layer->label_smoothing;
    real *losses_n = losses;
    double *lse_n = lse;
    real *logits_nw = new_reals((size_t)n * most), *panel = new_reals(layer->transposed ? 0 : (size_t)layer->d * most);
    struct seen *seen_n = malloc((n + 1) * sizeof *seen_n);
    int failed = !logits_nw || !panel || !seen_n;
    for (ptrdiff_t row = 0; row < n && !failed; row++) seen_n[row] = nothing_seen();
    for (ptrdiff_t v0 = 0; v0 < vocab && !failed; v0 += layer->chunk) {
        struct chunk chunk;
        failed = chunk_logits(layer, v0, &chunk, panel, logits_nw);
        if (failed) break;
#pragma omp parallel for num_threads(mt_team(n, 8.0 * n * chunk.width)) schedule(static)
        for (ptrdiff_t row = 0; row < n; row++) {
            real *x_w = logits_nw + row * chunk.width;
            if (layer->targets[row] == layer->ignore_index) continue;
            add_bias(layer, &chunk, x_w);
            seen_n[row] = see_more(seen_n[row], x_w, chunk.width, layer->targets[row], v0, smoothing != 0);
        }
    }
    for (ptrdiff_t row = 0; row < n && !failed; row++) {
        losses_n[row] = lse_n[row] = 0;
        if (layer->targets[row] != layer->ignore_index) loss_of(seen_n[row], vocab, smoothing, &losses_n[row], &lse_n[row]);
    }
    free(logits_nw);
    free(panel);
    free(seen_n);
    return failed == MT_STOPPED ? MT_STOPPED : failed ? -1 : 0;
}

/* dbias_w (width) = the sum of the rows of dlogits_nw, in their order. Pieces are ranges of columns. */
static void sum_rows(const real *dlogits_nw, real *dbias_w, ptrdiff_t n, ptrdiff_t width) {
    enum { COLUMNS = 256 };
    ptrdiff_t pieces = div_up(width, COLUMNS);
#pragma omp parallel for num_threads(mt_team(pieces, 1.0 * n * width)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t first = piece * COLUMNS, last = min_size(width, first + COLUMNS);
        for (ptrdiff_t i = first; i < last; i++) dbias_w[i] = 0;
        for (ptrdiff_t row = 0; row < n; row++)
            for (ptrdiff_t i = first; i < last; i++) dbias_w[i] += dlogits_nw[row * width + i];
    }
}

/* lse_n, dlosses_n (N,) read; dx_nd (N, d) written; dweight, of weight's shape, accumulated, or NULL: not needed; dbias_v (V,)
 * written, or NULL. The logits are made again, chunk by chunk. -1: no workspace, and dweight may have part of it. */
static int linear_cross_entropy_backward(const struct mt_output_layer *layer, const void *lse, const void *dlosses, void *dx, void *dweight,
                                         void *dbias) {
    const ptrdiff_t n = layer->n, d = layer->d, vocab = layer->vocab, most = min_size(layer->chunk, vocab);
    const int columns = !layer->transposed;
    const real smoothing = (real)layer->label_smoothing, share = vocab ? smoothing / vocab : 0;
    const real *dlosses_n = dlosses;
    const double *lse_n = lse;
    real *dweight_ = dweight, *dbias_v = dbias;
    real *logits_nw = new_reals((size_t)n * most), *panel = new_reals(columns ? (size_t)d * most : 0);
    real *dpanel = new_reals(columns && dweight ? (size_t)d * most : 0);
    int failed = !logits_nw || !panel || !dpanel;
    if (!failed) memset(dx, 0, (size_t)n * d * sizeof(real));
    for (ptrdiff_t v0 = 0; v0 < vocab && !failed; v0 += layer->chunk) {
        struct chunk chunk;
        /* 1: dlogits in place of the logits */
        failed = chunk_logits(layer, v0, &chunk, panel, logits_nw);
        if (failed) break;
        const ptrdiff_t width = chunk.width;
#pragma omp parallel for num_threads(mt_team(n, 8.0 * n * width)) schedule(static)
        for (ptrdiff_t row = 0; row < n; row++) {
            real *x_w = logits_nw + row * width;
            if (layer->targets[row] == layer->ignore_index) {
                memset(x_w, 0, width * sizeof(real));
                continue;
            }
            add_bias(layer, &chunk, x_w);
            dlogits_row(x_w, x_w, width, lse_n[row], dlosses_n[row], layer->targets[row], v0, share, smoothing);
        }
        /* 2: dx += dlogits W^T */
        failed = layer_gemm(layer, logits_nw, chunk.weight, dx, n, d, width, 0, columns, 1);
        /* 3: dW += x^T dlogits */
        if (!failed && dweight && !columns) failed = layer_gemm(layer, logits_nw, layer->x, dweight_ + v0 * d, width, d, n, 1, 0, 1);
        if (!failed && dweight && columns) {
            copy_columns(dweight_ + v0, vocab, dpanel, width, d, width);
            failed = layer_gemm(layer, layer->x, logits_nw, dpanel, d, width, n, 1, 0, 1);
            if (!failed) copy_columns(dpanel, width, dweight_ + v0, vocab, d, width);
        }
        if (!failed && dbias) sum_rows(logits_nw, dbias_v + v0, n, width);
    }
    free(logits_nw);
    free(panel);
    free(dpanel);
    return failed == MT_STOPPED ? MT_STOPPED : failed ? -1 : 0;
}
