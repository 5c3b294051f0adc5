/* Token rows and their gradient, the sinusoidal table, rotary positions. */

/* table_vd (V, d), ids_n (N,) in [0, V) read; out_nd (N, d) written. */
static void embedding(const void *table, const int64_t *ids_n, void *out, ptrdiff_t n, ptrdiff_t d) {
    const real *table_vd = table;
    real *out_nd = out;
    if (!d) return;
#pragma omp parallel for num_threads(mt_team(n, 2.0 * n * d)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) memcpy(out_nd + row * d, table_vd + ids_n[row] * d, d * sizeof(real));
}

/* ids_n (N,) in [0, V), dout_nd (N, d) read; dtable_vd (V, d) accumulated. The pieces are ranges of columns: each goes
 * through the ids in order, so repeated ids add up in one order and no two threads meet. */
static void embedding_backward(const int64_t *ids_n, const void *dout, void *dtable, ptrdiff_t n, ptrdiff_t d) {
    enum { COLUMNS = 64 };
    const real *dout_nd = dout;
    real *dtable_vd = dtable;
    ptrdiff_t pieces = div_up(d, COLUMNS);
#pragma omp parallel for num_threads(mt_team(pieces, 3.0 * n * d)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t first = piece * COLUMNS, width = min_size(COLUMNS, d - first);
        for (ptrdiff_t row = 0; row < n; row++) {
            const real *restrict from = dout_nd + row * d + first;
            real *restrict to = dtable_vd + ids_n[row] * d + first;
            for (ptrdiff_t i = 0; i < width; i++) to[i] += from[i];
        }
    }
}

/* out_nd (N, d_model) written, in double before it is rounded. arXiv 1706.03762 section 3.5. */
static void sinusoidal_positions(void *out, ptrdiff_t n, ptrdiff_t d_model) {
    real *out_nd = out;
#pragma omp parallel for num_threads(mt_team(n, 300.0 * n * d_model)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++)
        for (ptrdiff_t i = 0; i < d_model; i++) {
            double angle = row * pow(10000.0, -(double)(i - i % 2) / d_model);
            out_nd[row * d_model + i] = (real)(i % 2 ? cos(angle) : sin(angle));
        }
}

/* x_bhtd (B, H, T, D), D even, positions (T,) or (B, T) read; y_bhtd written. Pairs (i, i + D/2). -1: no workspace. */
static int rotary(const void *x, const int64_t *positions, int positions_per_row, double base, int inverse, void *y, ptrdiff_t batch,
                  ptrdiff_t heads, ptrdiff_t length, ptrdiff_t d) {
    const real *x_bhtd = x;
    real *y_bhtd = y;
    ptrdiff_t half = d / 2, n_positions = (positions_per_row ? batch : 1) * length;
    if (!batch || !heads || !length || !half) return 0;
    /* 1: cos and sin once a position, for all heads: turns_p2i (positions, 2, D/2) */
    real *turns_p2i = malloc((size_t)n_positions * d * sizeof(real));
    double *frequency_i = malloc(half * sizeof(double));
    if (!turns_p2i || !frequency_i) {
        free(turns_p2i);
        free(frequency_i);
        return -1;
    }
    for (ptrdiff_t i = 0; i < half; i++) frequency_i[i] = pow(base, -2.0 * i / d);
#pragma omp parallel for num_threads(mt_team(n_positions, 200.0 * n_positions * d)) schedule(static)
    for (ptrdiff_t p = 0; p < n_positions; p++)
        for (ptrdiff_t i = 0; i < half; i++) {
            double angle = positions[p] * frequency_i[i];
            turns_p2i[p * d + i] = (real)cos(angle);
            turns_p2i[p * d + half + i] = (real)(inverse ? -sin(angle) : sin(angle));
        }
    /* 2: turn */
    ptrdiff_t n = batch * heads * length;
#pragma omp parallel for num_threads(mt_team(n, 2.0 * n * d)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        ptrdiff_t b = row / (heads * length), t = row % length;
        const real *restrict cos_i = turns_p2i + (positions_per_row ? b * length + t : t) * d, *restrict sin_i = cos_i + half;
        const real *restrict from = x_bhtd + row * d;
        real *restrict to = y_bhtd + row * d;
        for (ptrdiff_t i = 0; i < half; i++) {
            to[i] = from[i] * cos_i[i] - from[half + i] * sin_i[i];
            to[half + i] = from[half + i] * cos_i[i] + from[i] * sin_i[i];
        }
    }
    free(turns_p2i);
    free(frequency_i);
    return 0;
}
