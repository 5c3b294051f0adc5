/* Layer normalisation (arXiv 1607.06450) and root-mean-square normalisation (arXiv 1910.07467), forward and backward. */

INLINE real row_sum(const real *x_d, ptrdiff_t d) {
    vec total = all(0), total2 = all(0), total3 = all(0), total4 = all(0);
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= d; i += 4 * VL) {
        total += load(x_d + i);
        total2 += load(x_d + i + VL);
        total3 += load(x_d + i + 2 * VL);
        total4 += load(x_d + i + 3 * VL);
    }
    total = (total + total2) + (total3 + total4);
    for (; i + VL <= d; i += VL) total += load(x_d + i);
    if (i < d) total += load_some(x_d + i, d - i, 0);
    return sum_lanes(total);
}

/* sum (x - centre)^2: the second pass is there for stability, E[x^2] - E[x]^2 cancels. off, if not NULL: sum (x - centre), by which
 * the centre misses the mean. */
INLINE real row_spread(const real *x_d, ptrdiff_t d, real centre, real *off) {
    vec total = all(0), total2 = all(0), total3 = all(0), total4 = all(0), c;
    vec sum = all(0), sum2 = all(0), sum3 = all(0), sum4 = all(0);
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= d; i += 4 * VL) {
        c = load(x_d + i) - centre;
        total += c * c;
        if (off) sum += c;
        c = load(x_d + i + VL) - centre;
        total2 += c * c;
        if (off) sum2 += c;
        c = load(x_d + i + 2 * VL) - centre;
        total3 += c * c;
        if (off) sum3 += c;
        c = load(x_d + i + 3 * VL) - centre;
        total4 += c * c;
        if (off) sum4 += c;
    }
    total = (total + total2) + (total3 + total4);
    sum = (sum + sum2) + (sum3 + sum4);
    for (; i + VL <= d; i += VL) {
        c = load(x_d + i) - centre;
        total += c * c;
        sum += c;
    }
    if (i < d) {
        c = load_some(x_d + i, d - i, centre) - centre;
        total += c * c;
        sum += c;
    }
    if (off) *off = sum_lanes(sum);
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

/* Mean and mean (x - mean)^2 of a row; centred 0: about 0. */
struct moments {
    double mean, variance;
};

INLINE struct moments row_moments(const real *x_d, ptrdiff_t d, const int centred) {
    const real share = d ? 1 / (real)d : 0;
    if (!centred) {
        double spread = row_spread(x_d, d, 0, NULL);
        return (struct moments){0, (isinf(spread) ? row_spread_wide(x_d, d, 0) : spread) * share};
    }
    /* 1: a centre, as near as a rounded sum of rounded values comes to the mean */
    real off, centre = row_sum(x_d, d) * share;
    if (isinf(centre)) centre = (real)(row_sum_wide(x_d, d) * share);
    /* 2: by what it misses the mean; once more from there, where beside a large offset that is no less than the values differ by */
    for (int again = 0;; again = 1) {
        double spread = row_spread(x_d, d, centre, &off);
        if (isinf(spread)) return (struct moments){centre, row_spread_wide(x_d, d, centre) * share};
        double missed = isfinite(off) && d ? (double)off / d : 0, variance = spread * share - missed * missed;
        if (again || !(missed * missed > spread * share / 16)) return (struct moments){centre + missed, variance < 0 ? 0 : variance};
        centre = (real)(centre + missed);
    }
}

/* A call, never inlined: a compiler that sees how the variance was made may fuse its last product with the sum in one norm and not in
 * another, and a row must have the same bits in all. */
static __attribute__((noinline)) real rstd_of(double variance, double eps) { return (real)(1 / sqrt(variance + eps)); }

/* y = (x - mean) rstd weight + bias over a row; bias_d NULL: none. */
INLINE void row_normed(const real *x_d, const real *weight_d, const real *bias_d, struct two_parts mean, real rstd, real *y_d, ptrdiff_t d,
                       struct stream *stream) {
    const real rest = mean.rest * rstd;
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) {
        if (stream && i % LINE == 0) {
            __builtin_prefetch(x_d + i + d);
            stream_step(stream);
        }
        vec y = ((load(x_d + i) - mean.whole) * rstd - rest) * load(weight_d + i);
        store(y_d + i, bias_d ? y + load(bias_d + i) : y);
    }
    if (i < d) {
        ptrdiff_t some = d - i;
        vec y = ((load_some(x_d + i, some, 0) - mean.whole) * rstd - rest) * load_some(weight_d + i, some, 0);
        store_some(y_d + i, bias_d ? y + load_some(bias_d + i, some, 0) : y, some);
    }
}

/* x_nd (N, d), weight_d, bias_d (d,) or NULL read; y_nd (N, d), mean_n, in double for both reals, rstd_n (N,) written; mean NULL: none
 * is taken off. */
INLINE void norm_forward(const real *x_nd, const real *weight_d, const real *bias_d, double eps, real *y_nd, double *mean_n,
                         real *rstd_n, ptrdiff_t n, ptrdiff_t d) {
    ptrdiff_t rows = rows_in_chunk(d), pieces = div_up(n, rows);
    int past = past_caches(n * d) && d <= CHUNK;
#pragma omp parallel num_threads(mt_team(pieces, 2.0 * n * d))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real room[CHUNK] __attribute__((aligned(64)));
            ptrdiff_t first = piece * rows, last = min_size(n, first + rows);
            struct stream stream = stream_open(y_nd + first * d, room);
            for (ptrdiff_t row = first; row < last; row++) {
                const real *x_d = x_nd + row * d;
                /* The row after the next one, or memory would rest in all passes but the last. */
                for (ptrdiff_t i = 0; past && i < d; i += LINE) __builtin_prefetch(x_d + 2 * d + i, 0, 2);
                struct moments of = row_moments(x_d, d, mean_n != NULL);
                real rstd = rstd_of(of.variance, eps);
                real *y_d = past ? stream.chunk + (row - first) * d : y_nd + row * d;
                row_normed(x_d, weight_d, bias_d, in_two_parts(of.mean), rstd, y_d, d, past ? &stream : NULL);
                stream.ready = (row - first + 1) * d;
                if (mean_n) mean_n[row] = of.mean;
                rstd_n[row] = rstd;
            }
            if (past) stream_close(&stream);
        }
        past_end(past);
    }
}

static void layer_norm(const void *x, const void *weight, const void *bias, double eps, void *y, void *mean, void *rstd, ptrdiff_t n,
                       ptrdiff_t d) {
    norm_forward(x, weight, bias, eps, y, mean, rstd, n, d);
}

static void rms_norm(const void *x, const void *weight, double eps, void *y, void *rstd, ptrdiff_t n, ptrdiff_t d) {
    norm_forward(x, weight, NULL, eps, y, NULL, rstd, n, d);
}

/* The same of x (B, H, N, d) into y, rows that lie anywhere; rstd (B H N,) written. */
static void rms_norm_heads(const struct mt_rows *x, const void *weight, double eps, const struct mt_rows *y, void *rstd_, ptrdiff_t batch,
                           ptrdiff_t heads, ptrdiff_t n, ptrdiff_t d) {
    real *rstd_n = rstd_;
    ptrdiff_t rows = batch * heads * n;
#pragma omp parallel for num_threads(mt_team(rows, 2.0 * rows * d)) schedule(static)
    for (ptrdiff_t row = 0; row < rows; row++) {
        ptrdiff_t b = row / (heads * n), h = row / n % heads, i = row % n;
        const real *x_d = head_rows(x, b, h) + i * x->stride[2];
        rstd_n[row] = rstd_of(row_moments(x_d, d, 0).variance, eps);
        row_normed(x_d, weight, NULL, in_two_parts(0), rstd_n[row], head_rows(y, b, h) + i * y->stride[2], d, NULL);
    }
}

/* A piece of a backward is a run of rows whose sums for dweight and dbias are kept apart and added in the order of the
 * pieces, so that they do not depend on the threads: NORM_ROWS or more, in so many pieces at most. */
enum { NORM_ROWS = 32, NORM_PIECES = 64 };

/* What a row's dx depends on beside its elements. */
struct row_slopes {
    struct two_parts mean;
    real rstd, g_mean, gz_mean; /* g = dy weight, z = (x - mean) rstd */
};

INLINE struct row_slopes slopes_of_row(const real *dy_d, const real *x_d, const real *weight_d, double mean, real rstd, int centred,
                                       ptrdiff_t d) {
    const struct two_parts off = in_two_parts(mean);
    vec g_sum = all(0), gz_sum = all(0), g_sum2 = all(0), gz_sum2 = all(0), g, c;
    ptrdiff_t i = 0;
    for (; i + 2 * VL <= d; i += 2 * VL) {
        g = load(dy_d + i) * load(weight_d + i);
        c = load(x_d + i) - off.whole;
        g_sum += g;
        gz_sum += g * c;
        g = load(dy_d + i + VL) * load(weight_d + i + VL);
        c = load(x_d + i + VL) - off.whole;
        g_sum2 += g;
        gz_sum2 += g * c;
    }
    g_sum += g_sum2;
    gz_sum += gz_sum2;
    for (; i < d; i += VL) {
        int whole = i + VL <= d;
        g = whole ? load(dy_d + i) * load(weight_d + i) : load_some(dy_d + i, d - i, 0) * load_some(weight_d + i, d - i, 0);
        c = (whole ? load(x_d + i) : load_some(x_d + i, d - i, off.whole)) - off.whole;
        g_sum += g;
        gz_sum += g * c;
    }
    real share = 1 / (real)d, sum = sum_lanes(g_sum);
    return (struct row_slopes){off, rstd, centred ? sum * share : 0, (sum_lanes(gz_sum) - off.rest * sum) * rstd * share};
}

/* dx of one row's vector, and its part of the parameters' gradients. */
INLINE vec dx_of(vec dy, vec x, vec weight, vec mean, vec rest, vec rstd, vec g_mean, vec gz_mean, vec *dweight, vec *dbias) {
    vec z = (x - mean) * rstd - rest;
    *dweight += dy * z;
    *dbias += dy;
    return (dy * weight - g_mean - z * gz_mean) * rstd;
}

/* dx = rstd (g - mean(g) - z mean(g z)) of `rows` rows (1 or 2), and their part of the parameters' gradients. Two rows at
 * once halve the loads and stores of the latter. */
INLINE void dx_of_rows(int rows, const real *dy_d, const real *x_d, const real *weight_d, const struct row_slopes *slopes, ptrdiff_t d,
                       real *dx_d, real *dweight_d, real *dbias_d, struct stream *stream) {
    const struct row_slopes s = slopes[0], t = slopes[rows - 1];
    vec s_mean = all(s.mean.whole), s_rest = all(s.mean.rest * s.rstd), s_rstd = all(s.rstd), s_g = all(s.g_mean), s_gz = all(s.gz_mean);
    vec t_mean = all(t.mean.whole), t_rest = all(t.mean.rest * t.rstd), t_rstd = all(t.rstd), t_g = all(t.g_mean), t_gz = all(t.gz_mean);
    const real *dy2_d = dy_d + d, *x2_d = x_d + d;
    real *dx2_d = dx_d + d;
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) {
        if (stream && i % LINE == 0) {
            for (int r = 0; r < rows; r++) {
                __builtin_prefetch(dy_d + (rows + r) * d + i);
                __builtin_prefetch(x_d + (rows + r) * d + i);
                stream_step(stream);
            }
        }
        vec weight = load(weight_d + i), dweight = load(dweight_d + i), dbias = load(dbias_d + i);
        store(dx_d + i, dx_of(load(dy_d + i), load(x_d + i), weight, s_mean, s_rest, s_rstd, s_g, s_gz, &dweight, &dbias));
        if (rows == 2) store(dx2_d + i, dx_of(load(dy2_d + i), load(x2_d + i), weight, t_mean, t_rest, t_rstd, t_g, t_gz, &dweight, &dbias));
        store(dweight_d + i, dweight);
        store(dbias_d + i, dbias);
    }
    if (i < d) {
        ptrdiff_t some = d - i;
        vec weight = load_some(weight_d + i, some, 0), dweight = load_some(dweight_d + i, some, 0), dbias = load_some(dbias_d + i, some, 0);
        vec dy = load_some(dy_d + i, some, 0), x = load_some(x_d + i, some, 0);
        store_some(dx_d + i, dx_of(dy, x, weight, s_mean, s_rest, s_rstd, s_g, s_gz, &dweight, &dbias), some);
        if (rows == 2) {
            dy = load_some(dy2_d + i, some, 0);
            x = load_some(x2_d + i, some, 0);
            store_some(dx2_d + i, dx_of(dy, x, weight, t_mean, t_rest, t_rstd, t_g, t_gz, &dweight, &dbias), some);
        }
        store_some(dweight_d + i, dweight, some);
        store_some(dbias_d + i, dbias, some);
    }
}

/* dy_nd, x_nd (N, d), weight_d (d,), mean_n or NULL, rstd_n (N,) read; dx_nd (N, d), dweight_d, dbias_d (d,) or NULL written.
 * With z = (x - mean) rstd and g = dy weight: dx = rstd (g - mean(g) - z mean(g z)), without mean(g) where no mean was
 * taken off; dweight = sum dy z, dbias = sum dy. */
INLINE int norm_backward(const real *dy_nd, const real *x_nd, const real *weight_d, const double *mean_n, const real *rstd_n,
                         real *dx_nd, real *dweight_d, real *dbias_d, ptrdiff_t n, ptrdiff_t d) {
    ptrdiff_t piece_rows = max_size(NORM_ROWS, div_up(n, NORM_PIECES)), pieces = div_up(n, piece_rows);
    int past = past_caches(n * d) && 2 * d <= CHUNK;
    real *sums_p2d = calloc(max_size(pieces, 1) * 2 * max_size(d, 1), sizeof(real)); /* a piece's dweight, dbias */
    if (!sums_p2d) return -1;
#pragma omp parallel num_threads(mt_team(pieces, 3.0 * n * d))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real room[CHUNK] __attribute__((aligned(64)));
            struct stream stream = {0};
            real *dweight_sum = sums_p2d + piece * 2 * d, *dbias_sum = dweight_sum + d;
            ptrdiff_t first = piece * piece_rows, last = min_size(n, first + piece_rows), opened = first;
            for (ptrdiff_t row = first; row < last; row += 2) {
                const real *dy_d = dy_nd + row * d, *x_d = x_nd + row * d;
                real *dx_d = dx_nd + row * d;
                int rows = row + 1 < last ? 2 : 1;
                struct row_slopes slopes[2];
                for (int r = 0; r < rows; r++)
                    slopes[r] = slopes_of_row(dy_d + r * d, x_d + r * d, weight_d, mean_n ? mean_n[row + r] : 0, rstd_n[row + r],
                                              mean_n != NULL, d);
                if (past) {
                    if (row == opened) stream = stream_open(dx_d, room);
                    dx_d = stream.chunk + (row - opened) * d;
                }
                if (rows == 2)
                    dx_of_rows(2, dy_d, x_d, weight_d, slopes, d, dx_d, dweight_sum, dbias_sum, past ? &stream : NULL);
                else
                    dx_of_rows(1, dy_d, x_d, weight_d, slopes, d, dx_d, dweight_sum, dbias_sum, past ? &stream : NULL);
                if (past) {
                    stream.ready += rows * d;
                    if (stream.ready + 2 * d > CHUNK || row + 2 >= last) {
                        stream_close(&stream);
                        opened = row + 2;
                    }
                }
            }
        }
        past_end(past);
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
