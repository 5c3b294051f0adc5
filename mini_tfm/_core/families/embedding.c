/* Token rows and their gradient, the sinusoidal table, rotary positions; heads that change places with rows. */

/* table_vd (V, d), ids_n (N,) in [0, V) read; out_nd (N, d) written. */
static void embedding(const void *table, const int64_t *ids_n, void *out, ptrdiff_t n, ptrdiff_t d) {
    const real *table_vd = table;
    real *out_nd = out;
    if (!d) return;
    enum { AHEAD = 4 }; /* rows: nothing else foretells where the next ones are */
    ptrdiff_t pieces = div_up(n, AHEAD);
    int past = past_caches(n * d);
#pragma omp parallel num_threads(mt_team(pieces, 1.5 * n * d))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++)
            for (ptrdiff_t row = piece * AHEAD; row < min_size(n, (piece + 1) * AHEAD); row++) {
                if (row + AHEAD < n)
                    for (ptrdiff_t i = 0; i < d && i < 1024; i += 64 / sizeof(real))
                        __builtin_prefetch(table_vd + ids_n[row + AHEAD] * d + i);
                copy_row(table_vd + ids_n[row] * d, out_nd + row * d, d, past);
            }
        past_end(past);
    }
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

/* cos and sin of n angles, in double: within 2 units in the last place of 1. Quarter turns are taken off (pi / 2 in two
 * numbers, the first short, so that its product is exact up to a million of them; libm's way beyond), and Taylor's series
 * on |r| <= pi / 4 has a remainder of 5e-17. No branch in the loop, so that it becomes vectors. */
static void cos_sin(const double *angle_n, double *cos_n, double *sin_n, ptrdiff_t n) {
    double largest = 0;
    for (ptrdiff_t i = 0; i < n; i++) largest = fabs(angle_n[i]) > largest ? fabs(angle_n[i]) : largest;
    if (!(largest < 1e6)) {
        for (ptrdiff_t i = 0; i < n; i++) {
            cos_n[i] = cos(angle_n[i]);
            sin_n[i] = sin(angle_n[i]);
        }
        return;
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        const double magic = 0x1.8p52; /* rounds to an integer, which is then in the low bits */
        double shifted = angle_n[i] * 0.63661977236758134308 + magic, turns = shifted - magic;
        int64_t quarter;
        memcpy(&quarter, &shifted, sizeof quarter);
        double r = (angle_n[i] - turns * 0x1.921fb544p0) - turns * 0x1.0b4611a626331p-34, s = r * r;
        double sine = s * (-1.0 / 1307674368000.0) + 1.0 / 6227020800.0, cosine = s * (1.0 / 20922789888000.0) - 1.0 / 87178291200.0;
        sine = sine * s - 1.0 / 39916800.0;
        cosine = cosine * s + 1.0 / 479001600.0;
        sine = sine * s + 1.0 / 362880.0;
        cosine = cosine * s - 1.0 / 3628800.0;
        sine = sine * s - 1.0 / 5040.0;
        cosine = cosine * s + 1.0 / 40320.0;
        sine = sine * s + 1.0 / 120.0;
        cosine = cosine * s - 1.0 / 720.0;
        sine = sine * s - 1.0 / 6.0;
        cosine = cosine * s + 1.0 / 24.0;
        sine = sine * s * r + r;
        cosine = (cosine * s - 0.5) * s + 1;
        double across = quarter & 1 ? cosine : sine, along = quarter & 1 ? sine : cosine;
        sin_n[i] = quarter & 2 ? -across : across;
        cos_n[i] = (quarter + 1) & 2 ? -along : along;
    }
}

enum { ANGLES = 128 }; /* at once: the buffers are on the stack */

/* out_nd (N, d_model) written, in double before it is rounded. arXiv 1706.03762 section 3.5. -1: no workspace. */
static int sinusoidal_positions(void *out, ptrdiff_t n, ptrdiff_t d_model) {
    real *out_nd = out;
    ptrdiff_t half = div_up(d_model, 2);
    double *frequency_i = malloc(max_size(half, 1) * sizeof(double));
    if (!frequency_i) return -1;
    for (ptrdiff_t i = 0; n && i < half; i++) frequency_i[i] = pow(10000.0, -2.0 * i / d_model);
#pragma omp parallel for num_threads(mt_team(n, 10.0 * n * d_model)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++)
        for (ptrdiff_t first = 0; first < half; first += ANGLES) {
            ptrdiff_t m = min_size(ANGLES, half - first), pairs = min_size(m, d_model / 2 - first);
            real *to = out_nd + row * d_model + 2 * first;
            double angle[ANGLES], cosine[ANGLES], sine[ANGLES];
            for (ptrdiff_t i = 0; i < m; i++) angle[i] = row * frequency_i[first + i];
            cos_sin(angle, cosine, sine, m);
            for (ptrdiff_t i = 0; i < pairs; i++) {
                to[2 * i] = (real)sine[i];
                to[2 * i + 1] = (real)cosine[i];
            }
            if (pairs < m) to[2 * pairs] = (real)sine[pairs];
        }
    free(frequency_i);
    return 0;
}

/* x (B, H, T, D), positions (T,) or (B, T), frequencies_i (half,), 2 half <= D, read; y (B, H, T, D) written. Pairs (i, i + half); what
 * is behind them stays as it is. -1: no workspace. */
static int rotary(const struct mt_rows *x, const int64_t *positions, int positions_per_row, const double *frequencies_i, ptrdiff_t half,
                  int inverse, const struct mt_rows *y, ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t length, ptrdiff_t d) {
    ptrdiff_t n_positions = (positions_per_row ? batch : 1) * length, turned = 2 * half;
    if (!batch || !heads || !length || !d) return 0;
    /* 1: cos and sin once a position, for all heads: turns_p2i (positions, 2, half) */
    real *turns_p2i = malloc((size_t)n_positions * turned * sizeof(real) + 1);
    if (!turns_p2i) return -1;
#pragma omp parallel for num_threads(mt_team(n_positions, 10.0 * n_positions * turned)) schedule(static)
    for (ptrdiff_t p = 0; p < n_positions; p++)
        for (ptrdiff_t first = 0; first < half; first += ANGLES) {
            ptrdiff_t m = min_size(ANGLES, half - first);
            real *cos_i = turns_p2i + p * turned + first, *sin_i = cos_i + half;
            double angle[ANGLES], cosine[ANGLES], sine[ANGLES];
            for (ptrdiff_t i = 0; i < m; i++) angle[i] = (double)positions[p] * frequencies_i[first + i];
            cos_sin(angle, cosine, sine, m);
            for (ptrdiff_t i = 0; i < m; i++) {
                cos_i[i] = (real)cosine[i];
                sin_i[i] = (real)(inverse ? -sine[i] : sine[i]);
            }
        }
    /* 2: turn */
    ptrdiff_t n = batch * heads * length;
#pragma omp parallel for num_threads(mt_team(n, 1.5 * n * d)) schedule(static)
    for (ptrdiff_t row = 0; row < n; row++) {
        ptrdiff_t b = row / (heads * length), h = row / length % heads, t = row % length;
        const real *restrict cos_i = turns_p2i + (positions_per_row ? b * length + t : t) * turned, *restrict sin_i = cos_i + half;
        const real *restrict from = head_rows(x, b, h) + t * x->stride[2];
        real *restrict to = head_rows(y, b, h) + t * y->stride[2];
        for (ptrdiff_t i = 0; i < half; i++) {
            to[i] = from[i] * cos_i[i] - from[half + i] * sin_i[i];
            to[half + i] = from[half + i] * cos_i[i] + from[i] * sin_i[i];
        }
        for (ptrdiff_t i = turned; i < d; i++) to[i] = from[i];
    }
    free(turns_p2i);
    return 0;
}
