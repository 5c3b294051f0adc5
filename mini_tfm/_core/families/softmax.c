/* Softmax over rows, its backward, and its logarithm. */

/* What a row is shifted by: its maximum, so that no exp overflows, or 0 when there is nothing but -inf. NaN is passed
 * over here and comes back through exp. */
INLINE real row_shift(const real *x_d, ptrdiff_t d) {
    vec top = all(-INFINITY);
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) top = max_vec(load(x_d + i), top);
    if (i < d) top = max_vec(load_some(x_d + i, d - i, -INFINITY), top);
    real m = max_lanes(top);
    return m == -INFINITY ? 0 : m;
}

/* sum exp(x - shift), and the terms in y when it is not NULL. */
INLINE real row_exp(const real *x_d, real *y_d, ptrdiff_t d, real shift) {
    vec total = all(0);
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) {
        vec e = exp_vec(load(x_d + i) - shift);
        if (y_d) store(y_d + i, e);
        total += e;
    }
    if (i < d) {
        vec e = exp_vec(load_some(x_d + i, d - i, -INFINITY) - shift);
        if (y_d) store_some(y_d + i, e, d - i);
        total += e;
    }
    return sum_lanes(total);
}

INLINE void row_scale(real *y_d, ptrdiff_t d, real factor) {
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) store(y_d + i, load(y_d + i) * factor);
    for (; i < d; i++) y_d[i] *= factor;
}

INLINE real row_dot(const real *a_d, const real *b_d, ptrdiff_t d) {
    vec total = all(0);
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) total += load(a_d + i) * load(b_d + i);
    if (i < d) total += load_some(a_d + i, d - i, 0) * load_some(b_d + i, d - i, 0);
    return sum_lanes(total);
}

/* x_nd (N, d) read, y_nd (N, d) written. A row of -inf gives zeros. */
static void softmax(const void *x, void *y, ptrdiff_t n, ptrdiff_t d) {
    const real *x_nd = x;
    real *y_nd = y;
#pragma omp parallel for num_threads(mt_team(n, 8.0 * n * d)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        real *y_d = y_nd + row * d;
        real total = row_exp(x_nd + row * d, y_d, d, row_shift(x_nd + row * d, d));
        if (total != 0) row_scale(y_d, d, 1 / total);
    }
}

/* y_nd, dy_nd (N, d) read, dx_nd (N, d) written: dx = y (dy - sum(y dy)). */
static void softmax_backward(const void *y, const void *dy, void *dx, ptrdiff_t n, ptrdiff_t d) {
    const real *y_nd = y, *dy_nd = dy;
    real *dx_nd = dx;
#pragma omp parallel for num_threads(mt_team(n, 2.0 * n * d)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        const real *y_d = y_nd + row * d, *dy_d = dy_nd + row * d;
        real *dx_d = dx_nd + row * d;
        real dot = row_dot(y_d, dy_d, d);
        for (ptrdiff_t i = 0; i < d; i++) dx_d[i] = y_d[i] * (dy_d[i] - dot);
    }
}

INLINE real row_log_sum_exp(const real *x_d, ptrdiff_t d) {
    real shift = row_shift(x_d, d);
    real total = row_exp(x_d, NULL, d, shift);
#if REAL_IS_DOUBLE
    return shift + log(total);
#else
    return shift + logf(total);
#endif
}

/* x_nd (N, d) read, y_nd (N, d) written. A row of -inf stays -inf. */
static void log_softmax(const void *x, void *y, ptrdiff_t n, ptrdiff_t d) {
    const real *x_nd = x;
    real *y_nd = y;
#pragma omp parallel for num_threads(mt_team(n, 8.0 * n * d)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        const real *x_d = x_nd + row * d;
        real *y_d = y_nd + row * d;
        real lse = row_log_sum_exp(x_d, d);
        for (ptrdiff_t i = 0; i < d; i++) y_d[i] = lse == -INFINITY ? -INFINITY : x_d[i] - lse;
    }
}
