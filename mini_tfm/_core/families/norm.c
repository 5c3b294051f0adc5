/* Layer normalisation (arXiv 1607.06450) and root-mean-square normalisation (arXiv 1910.07467), forward and backward. */

/* Rows that one piece of a backward takes. Its sums for dweight and dbias are kept apart and added in the order of the
 * pieces, so that they do not depend on the threads. */
enum { NORM_ROWS = 64 };

INLINE real row_sum(const real *x_d, ptrdiff_t d) {
    vec total = all(0);
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) total += load(x_d + i);
    if (i < d) total += load_some(x_d + i, d - i, 0);
    return sum_lanes(total);
}

/* sum (x - centre)^2: the second pass is there for stability, E[x^2] - E[x]^2 cancels. */
INLINE real row_spread(const real *x_d, ptrdiff_t d, real centre) {
    vec total = all(0);
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) {
        vec c = load(x_d + i) - centre;
        total += c * c;
    }
    if (i < d) {
        vec c = load_some(x_d + i, d - i, centre) - centre;
        total += c * c;
    }
    return sum_lanes(total);
}

/* The same two in double, for rows of large values whose sums overflow in float. */
static double row_sum_wide(const real *x_d, ptrdiff_t d) {
    double total = 0;
    for (ptrdiff_t i = 0; i < d; i++) total += x_d[i];
    return total;
}

static double row_spread_wide(const real *x_d, ptrdiff_t d, double centre) {
    double total = 0;
    for (ptrdiff_t i = 0; i < d; i++) total += (x_d[i] - centre) * (x_d[i] - centre);
    return total;
}

/* x_nd (N, d), weight_d, bias_d (d,) or NULL read; y_nd (N, d), mean_n, rstd_n (N,) written; mean NULL: none is taken off. */
INLINE void norm_forward(const real *x_nd, const real *weight_d, const real *bias_d, double eps, real *y_nd, real *mean_n,
                         real *rstd_n, ptrdiff_t n, ptrdiff_t d) {
    real share = d ? 1 / (real)d : 0;
#pragma omp parallel for num_threads(mt_team(n, 4.0 * n * d)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        const real *x_d = x_nd + row * d;
        real *y_d = y_nd + row * d;
        real mean = mean_n ? row_sum(x_d, d) * share : 0;
        if (isinf(mean)) mean = (real)(row_sum_wide(x_d, d) * share);
        double spread = row_spread(x_d, d, mean);
        if (isinf(spread)) spread = row_spread_wide(x_d, d, mean);
        real rstd = (real)(1 / sqrt(spread * share + eps));
        if (bias_d)
            for (ptrdiff_t i = 0; i < d; i++) y_d[i] = (x_d[i] - mean) * rstd * weight_d[i] + bias_d[i];
        else
            for (ptrdiff_t i = 0; i < d; i++) y_d[i] = (x_d[i] - mean) * rstd * weight_d[i];
        if (mean_n) mean_n[row] = mean;
        rstd_n[row] = rstd;
    }
}

static void layer_norm(const void *x, const void *weight, const void *bias, double eps, void *y, void *mean, void *rstd, ptrdiff_t n,
                       ptrdiff_t d) {
    norm_forward(x, weight, bias, eps, y, mean, rstd, n, d);
}

static void rms_norm(const void *x, const void *weight, double eps, void *y, void *rstd, ptrdiff_t n, ptrdiff_t d) {
    norm_forward(x, weight, NULL, eps, y, NULL, rstd, n, d);
}

/* dy_nd, x_nd (N, d), weight_d (d,), mean_n or NULL, rstd_n (N,) read; dx_nd (N, d), dweight_d, dbias_d (d,) or NULL written.
 * With z = (x - mean) rstd and g = dy weight: dx = rstd (g - mean(g) - z mean(g z)), without mean(g) where no mean was
 * taken off; dweight = sum dy z, dbias = sum dy. */
INLINE int norm_backward(const real *dy_nd, const real *x_nd, const real *weight_d, const real *mean_n, const real *rstd_n,
                         real *dx_nd, real *dweight_d, real *dbias_d, ptrdiff_t n, ptrdiff_t d) {
    ptrdiff_t pieces = div_up(n, NORM_ROWS);
    real share = d ? 1 / (real)d : 0;
    real *sums_p2d = calloc(max_size(pieces, 1) * 2 * max_size(d, 1), sizeof(real)); /* a piece's dweight, dbias */
    if (!sums_p2d) return -1;
#pragma omp parallel for num_threads(mt_team(pieces, 6.0 * n * d)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        real *restrict dweight_sum = sums_p2d + piece * 2 * d, *restrict dbias_sum = dweight_sum + d;
        for (ptrdiff_t row = piece * NORM_ROWS; row < min_size(n, (piece + 1) * NORM_ROWS); row++) {
            const real *x_d = x_nd + row * d, *dy_d = dy_nd + row * d;
            real *restrict dx_d = dx_nd + row * d;
            real mean = mean_n ? mean_n[row] : 0, rstd = rstd_n[row];
            /* 1: the two sums over the row */
            vec g_sum = all(0), gz_sum = all(0);
            for (ptrdiff_t i = 0; i < d; i += VL) {
                int whole = i + VL <= d;
                vec g = whole ? load(dy_d + i) * load(weight_d + i) : load_some(dy_d + i, d - i, 0) * load_some(weight_d + i, d - i, 0);
                vec z = ((whole ? load(x_d + i) : load_some(x_d + i, d - i, mean)) - mean) * rstd;
                g_sum += g;
                gz_sum += g * z;
            }
            real g_mean = mean_n ? sum_lanes(g_sum) * share : 0, gz_mean = sum_lanes(gz_sum) * share;
            /* 2: the row's dx, and its part of the parameters' gradients */
            for (ptrdiff_t i = 0; i < d; i++) {
                real z = (x_d[i] - mean) * rstd;
                dx_d[i] = (dy_d[i] * weight_d[i] - g_mean - z * gz_mean) * rstd;
                dweight_sum[i] += dy_d[i] * z;
                dbias_sum[i] += dy_d[i];
            }
        }
    }
    for (ptrdiff_t i = 0; i < d; i++) {
        dweight_d[i] = 0;
        if (dbias_d) dbias_d[i] = 0;
    }
    for (ptrdiff_t piece = 0; piece < pieces; piece++)
        for (ptrdiff_t i = 0; i < d; i++) {
            dweight_d[i] += sums_p2d[piece * 2 * d + i];
            if (dbias_d) dbias_d[i] += sums_p2d[(piece * 2 + 1) * d + i];
        }
    free(sums_p2d);
    return 0;
}

static int layer_norm_backward(const void *dy, const void *x, const void *weight, const void *mean, const void *rstd, void *dx,
                               void *dweight, void *dbias, ptrdiff_t n, ptrdiff_t d) {
    return norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias, n, d);
}

static int rms_norm_backward(const void *dy, const void *x, const void *weight, const void *rstd, void *dx, void *dweight, ptrdiff_t n,
                             ptrdiff_t d) {
    return norm_backward(dy, x, weight, NULL, rstd, dx, dweight, NULL, n, d);
}
