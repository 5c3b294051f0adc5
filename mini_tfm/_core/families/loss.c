/* Cross entropy with label smoothing. */

/* logits_nv (N, V), targets_n (N,) in [0, V) or ignore_index read; losses_n, lse_n (N,) written, 0 in ignored rows. */
static void cross_entropy(const void *logits, const int64_t *targets_n, int64_t ignore_index, double label_smoothing, void *losses,
                          void *lse, ptrdiff_t n, ptrdiff_t vocab) {
    const real *logits_nv = logits;
    real *losses_n = losses, *lse_n = lse, smoothing = (real)label_smoothing;
#pragma omp parallel for num_threads(mt_team(n, 8.0 * n * vocab)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        losses_n[row] = lse_n[row] = 0;
        if (targets_n[row] == ignore_index) continue;
        const real *x_v = logits_nv + row * vocab;
        real row_lse = row_log_sum_exp(x_v, vocab), at_target = x_v[targets_n[row]];
        real loss = row_lse - (1 - smoothing) * at_target;
        if (smoothing != 0) loss -= smoothing * (row_sum(x_v, vocab) / vocab);
        losses_n[row] = at_target == -INFINITY ? INFINITY : loss;
        lse_n[row] = row_lse;
    }
}

/* logits_nv (N, V), targets_n, lse_n, dlosses_n (N,) read; dlogits_nv (N, V) written, 0 in ignored rows. */
static void cross_entropy_backward(const void *logits, const int64_t *targets_n, const void *lse, const void *dlosses,
                                   int64_t ignore_index, double label_smoothing, void *dlogits, ptrdiff_t n, ptrdiff_t vocab) {
    const real *logits_nv = logits, *lse_n = lse, *dlosses_n = dlosses;
    real *dlogits_nv = dlogits, smoothing = (real)label_smoothing;
    real share = vocab ? smoothing / vocab : 0;
#pragma omp parallel for num_threads(mt_team(n, 6.0 * n * vocab)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        const real *x_v = logits_nv + row * vocab;
        real *dx_v = dlogits_nv + row * vocab, dloss = dlosses_n[row];
        if (targets_n[row] == ignore_index) {
            for (ptrdiff_t i = 0; i < vocab; i++) dx_v[i] = 0;
            continue;
        }
        if (lse_n[row] == -INFINITY) /* every logit was -inf: there is no distribution to speak of */
            for (ptrdiff_t i = 0; i < vocab; i++) dx_v[i] = 0;
        else
            row_exp(x_v, dx_v, vocab, lse_n[row]);
        dx_v[targets_n[row]] -= 1 - smoothing;
        for (ptrdiff_t i = 0; i < vocab; i++) dx_v[i] = (dx_v[i] - share) * dloss;
    }
}
