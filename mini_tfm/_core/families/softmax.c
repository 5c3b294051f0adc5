/* Softmax over rows, its backward, and its logarithm. */

/* What a row is shifted by: its maximum, so that no exp overflows, or 0 when there is nothing but -inf. NaN is passed
 * over here and comes back through exp. */
INLINE real row_shift(const real *x_d, ptrdiff_t d) {
    vec top = all(-INFINITY), top2 = top, top3 = top, top4 = top;
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= d; i += 4 * VL) {
        top = max_vec(load(x_d + i), top);
        top2 = max_vec(load(x_d + i + VL), top2);
        top3 = max_vec(load(x_d + i + 2 * VL), top3);
        top4 = max_vec(load(x_d + i + 3 * VL), top4);
    }
    top = max_vec(max_vec(top2, top), max_vec(top4, top3));
    for (; i + VL <= d; i += VL) top = max_vec(load(x_d + i), top);
    if (i < d) top = max_vec(load_some(x_d + i, d - i, -INFINITY), top);
    real m = max_lanes(top);
    return m == -INFINITY ? 0 : m;
}

/* sum exp(x - shift), and the terms in y when it is not NULL; any shift. */
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

/* The same for a shift that is no less than any x, as row_shift gives it. With a stream: fetches the next row, sends the one
 * before. */
INLINE real row_exp_weight(const real *x_d, real *y_d, ptrdiff_t d, real shift, struct stream *stream) {
    vec total = all(0);
    ptrdiff_t i = 0;
    for (; i + 2 * VL <= d; i += 2 * VL) {
        if (stream) {
            __builtin_prefetch(x_d + i + d);
            if (2 * VL == LINE || i % LINE == 0) stream_step(stream);
        }
        for (int half = 0; half < 2; half++) {
            vec e = exp_weight(load(x_d + i + half * VL) - shift);
            if (y_d) store(y_d + i + half * VL, e);
            total += e;
        }
    }
    for (; i < d; i += VL) {
        int whole = i + VL <= d;
        vec e = exp_weight((whole ? load(x_d + i) : load_some(x_d + i, d - i, -INFINITY)) - shift);
        if (y_d && whole) store(y_d + i, e);
        if (y_d && !whole) store_some(y_d + i, e, d - i);
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
    vec total = all(0), total2 = all(0), total3 = all(0), total4 = all(0);
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= d; i += 4 * VL) {
        total += load(a_d + i) * load(b_d + i);
        total2 += load(a_d + i + VL) * load(b_d + i + VL);
        total3 += load(a_d + i + 2 * VL) * load(b_d + i + 2 * VL);
        total4 += load(a_d + i + 3 * VL) * load(b_d + i + 3 * VL);
    }
    total = (total + total2) + (total3 + total4);
    for (; i + VL <= d; i += VL) total += load(a_d + i) * load(b_d + i);
    if (i < d) total += load_some(a_d + i, d - i, 0) * load_some(b_d + i, d - i, 0);
    return sum_lanes(total);
}

/* x_nd (N, d) read, y_nd (N, d) written. A row of -inf gives zeros. */
static void softmax(const void *x, void *y, ptrdiff_t n, ptrdiff_t d) {
    const real *x_nd = x;
    real *y_nd = y;
    ptrdiff_t rows = rows_in_chunk(d), pieces = div_up(n, rows);
    int past = past_caches(n * d) && d <= CHUNK; /* a longer row's terms wait where the result will be */
#pragma omp parallel num_threads(mt_team(pieces, 4.0 * n * d))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real room[CHUNK] __attribute__((aligned(64)));
            ptrdiff_t first = piece * rows, last = min_size(n, first + rows);
            struct stream stream = stream_open(y_nd + first * d, room);
            for (ptrdiff_t row = first; row < last; row++) {
                const real *x_d = x_nd + row * d;
                real *y_d = past ? stream.chunk + (row - first) * d : y_nd + row * d;
                /* 1: the maximum, for stability; 2: exp and its sum; 3: the division */
                for (ptrdiff_t i = 0; past && i < d; i += LINE) __builtin_prefetch(x_d + 2 * d + i, 0, 2); /* as in norm_forward */
                real shift = row_shift(x_d, d), total = row_exp_weight(x_d, y_d, d, shift, past ? &stream : NULL);
                if (total != 0) row_scale(y_d, d, 1 / total);
                stream.ready = (row - first + 1) * d;
            }
            if (past) stream_close(&stream);
        }
        past_end(past);
    }
}

/* dx = y (dy - dot) over a row. */
INLINE void softmax_slope(const real *y_d, const real *dy_d, real *dx_d, ptrdiff_t d, real dot, struct stream *stream) {
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) {
        if (stream && i % LINE == 0) {
            __builtin_prefetch(y_d + i + d);
            __builtin_prefetch(dy_d + i + d);
            stream_step(stream);
        }
        store(dx_d + i, load(y_d + i) * (load(dy_d + i) - dot));
    }
    for (; i < d; i++) dx_d[i] = y_d[i] * (dy_d[i] - dot);
}

/* y_nd, dy_nd (N, d) read, dx_nd (N, d) written: dx = y (dy - sum(y dy)). */
static void softmax_backward(const void *y, const void *dy, void *dx, ptrdiff_t n, ptrdiff_t d) {
    const real *y_nd = y, *dy_nd = dy;
    real *dx_nd = dx;
    ptrdiff_t rows = rows_in_chunk(d), pieces = div_up(n, rows);
    int past = past_caches(n * d) && d <= CHUNK;
#pragma omp parallel num_threads(mt_team(pieces, 2.0 * n * d))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real room[CHUNK] __attribute__((aligned(64)));
            ptrdiff_t first = piece * rows, last = min_size(n, first + rows);
            struct stream stream = stream_open(dx_nd + first * d, room);
            for (ptrdiff_t row = first; row < last; row++) {
                const real *y_d = y_nd + row * d, *dy_d = dy_nd + row * d;
                real dot = row_dot(y_d, dy_d, d);
                softmax_slope(y_d, dy_d, past ? stream.chunk + (row - first) * d : dx_nd + row * d, d, dot, past ? &stream : NULL);
                stream.ready = (row - first + 1) * d;
            }
            if (past) stream_close(&stream);
        }
        past_end(past);
    }
}

/* log sum exp of a row in two parts, its maximum and the rest; zeros where there is nothing but -inf, which stays as it is. */
INLINE struct two_parts row_lse(const real *x_d, ptrdiff_t d, struct stream *stream) {
    real shift = row_shift(x_d, d), total = row_exp_weight(x_d, NULL, d, shift, stream);
    return (struct two_parts){shift, total == 0 ? 0 : (real)log(total)};
}

/* x - lse */
INLINE void row_less(const real *x_d, real *y_d, ptrdiff_t d, struct two_parts lse) {
    ptrdiff_t i = 0;
    for (; i + VL <= d; i += VL) store(y_d + i, load(x_d + i) - lse.whole - lse.rest);
    for (; i < d; i++) y_d[i] = x_d[i] - lse.whole - lse.rest;
}

/* x_nd (N, d) read, y_nd (N, d) written. A row of -inf stays -inf. */
static void log_softmax(const void *x, void *y, ptrdiff_t n, ptrdiff_t d) {
    const real *x_nd = x;
    real *y_nd = y;
    ptrdiff_t rows = rows_in_chunk(d), pieces = div_up(n, rows);
    int past = past_caches(n * d) && d <= CHUNK;
#pragma omp parallel num_threads(mt_team(pieces, 4.0 * n * d))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real room[CHUNK] __attribute__((aligned(64)));
            ptrdiff_t first = piece * rows, last = min_size(n, first + rows);
            struct stream stream = stream_open(y_nd + first * d, room);
            for (ptrdiff_t row = first; row < last; row++) {
                const real *x_d = x_nd + row * d;
                struct two_parts lse = row_lse(x_d, d, past ? &stream : NULL);
                row_less(x_d, past ? stream.chunk + (row - first) * d : y_nd + row * d, d, lse);
                stream.ready = (row - first + 1) * d;
            }
            if (past) stream_close(&stream);
        }
        past_end(past);
    }
}
