/* One AdamW step, and the sum of squares for gradient clipping. */

/* grad (n,) read; param, m, v (n,) updated. arXiv 1711.05101. The four pass through memory once. */
static void adamw(void *param_, const void *grad_, void *m_, void *v_, ptrdiff_t n, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t step, double grad_scale) {
    real *param = param_, *m = m_, *v = v_;
    const real *grad = grad_;
    const real keep = (real)(1 - lr * weight_decay), rate = (real)(lr / (1 - pow(beta1, (double)step))), epsilon = (real)eps;
    const real correction = (real)(1 / (1 - pow(beta2, (double)step)));
    const real b1 = (real)beta1, b2 = (real)beta2, c1 = (real)(1 - beta1), c2 = (real)(1 - beta2), scale = (real)grad_scale;
    ptrdiff_t pieces = div_up(n, ELEMENTS);
#pragma omp parallel for num_threads(mt_team(pieces, 8.0 * n)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t at = piece * ELEMENTS, end = min_size(n, at + ELEMENTS);
        for (ptrdiff_t i = at; i < end; i += VL) {
            ptrdiff_t some = min_size(VL, end - i);
            int whole = some == VL;
            vec g = (whole ? load(grad + i) : load_some(grad + i, some, 0)) * scale;
            vec mi = b1 * (whole ? load(m + i) : load_some(m + i, some, 0)) + c1 * g;
            vec vi = b2 * (whole ? load(v + i) : load_some(v + i, some, 0)) + c2 * g * g;
            vec root = vi * correction;
            for (ptrdiff_t j = 0; j < VL; j++) root[j] = REAL_IS_DOUBLE ? sqrt(root[j]) : sqrtf(root[j]);
            vec pi = keep * (whole ? load(param + i) : load_some(param + i, some, 0)) - rate * mi / (root + epsilon);
            if (whole) {
                store(m + i, mi);
                store(v + i, vi);
                store(param + i, pi);
            } else {
                store_some(m + i, mi, some);
                store_some(v + i, vi, some);
                store_some(param + i, pi, some);
            }
        }
    }
}

/* x (n,) read; *sum = sum x^2 in double, piece by piece and then over the pieces in order. -1: no workspace. */
static int sum_of_squares(const void *x_, ptrdiff_t n, double *sum) {
    enum { LANES = 8 };
    const real *x = x_;
    ptrdiff_t pieces = div_up(n, ELEMENTS);
    double *sum_p = malloc(max_size(pieces, 1) * sizeof(double));
    if (!sum_p) return -1;
#pragma omp parallel for num_threads(mt_team(pieces, 1.0 * n)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t end = min_size(n, (piece + 1) * ELEMENTS), i = piece * ELEMENTS;
        double lanes[LANES] = {0}, total = 0;
        for (; i + LANES <= end; i += LANES)
            for (int j = 0; j < LANES; j++) lanes[j] += (double)x[i + j] * (double)x[i + j];
        for (; i < end; i++) total += (double)x[i] * (double)x[i];
        for (int j = 0; j < LANES; j++) total += lanes[j];
        sum_p[piece] = total;
    }
    *sum = 0;
    for (ptrdiff_t piece = 0; piece < pieces; piece++) *sum += sum_p[piece];
    free(sum_p);
    return 0;
}
