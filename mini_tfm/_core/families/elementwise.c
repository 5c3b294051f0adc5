/* Activations, sums, recurrences and dropout: element by element, so any cut into pieces gives the same bits. */

enum { ELEMENTS = 16384 }; /* in a piece: 64 KB of float */

INLINE vec size_of(vec x) { return (vec)((ivec)x & ~(ivec)all(-(real)0)); }

/* s = sigmoid(x), and its derivative s (1 - s) without the cancellation of 1 - s. */
INLINE vec sigmoid_and_slope(vec x, vec *slope) {
    vec e = exp_weight(-size_of(x)); /* at most 1 */
    vec larger = 1 / (1 + e), smaller = e * larger;
    *slope = larger * smaller;
    return choose(x < 0, smaller, larger);
}

INLINE vec sigmoid(vec x) {
    vec slope;
    return sigmoid_and_slope(x, &slope);
}

#define GELU_C ((real)1.5957691216057307117598) /* 2 sqrt(2 / pi): 0.5 (1 + tanh u) = sigmoid(2 u) */
#define GELU_K ((real)0.044715)
#define ROOT_HALF ((real)0.70710678118654752440)
#define ROOT_2PI_INVERSE ((real)0.39894228040143267794)

/* For gelu in float: 0.5 + x p(x^2), with p fitted on |x| <= 5.5 and kept at its end beyond, where the result is 0 or 1 to
 * within the error. p is taken in u = x^2 / 15.125 - 1, from -1 to 1, where its terms hardly cancel; even and odd powers
 * apart, for two short chains. */
#define GELU_FAR ((real)5.5)

/* y of `count` vectors at once: one alone is a chain that waits for itself. */
INLINE void gelu_steps(int count, const vec *x, vec *y, const real *p_even, const real *p_odd) {
    vec u[4], uu[4], even[4], odd[4];
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
        u[j] = min_vec(all(1), x[j] * x[j] * (real)(1 / 15.125) - 1);
        uu[j] = u[j] * u[j];
        even[j] = all(p_even[0]);
        odd[j] = all(p_odd[0]);
    }
#pragma GCC unroll 8
    for (int i = 1; i < 8; i++) {
        vec c_even = all(p_even[i]), c_odd = all(p_odd[i]);
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            even[j] = even[j] * uu[j] + c_even;
            odd[j] = odd[j] * uu[j] + c_odd;
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) y[j] = (even[j] + odd[j] * u[j]) * x[j] + (real)0.5;
}

/* The normal distribution's function, within 4e-8 before rounding. */
INLINE void gelu_phi(int count, const vec *x, vec *phi) {
#if REAL_IS_DOUBLE
    for (int j = 0; j < count; j++) phi[j] = (real)0.5 * (1 + erf_vec(x[j] * ROOT_HALF));
#else
    static const real even[] = {0.000538080116f, 0.00102383783f, 0.00423638616f, 0.010468618f,
                                0.0202879831f,   0.0320817418f,  0.0477369912f,  0.12855193f};
    static const real odd[] = {0,              -0.00136883033f, -0.00122939807f, -0.00767467404f,
                               -0.0146713639f, -0.0261124689f,  -0.0387872681f,  -0.0641724765f};
    gelu_steps(count, x, phi, even, odd);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) phi[j] = min_vec(all(1), max_vec(all(0), phi[j]));
#endif
}

/* The derivative of x phi(x), within 6e-8 (1 + |x|) before rounding. */
INLINE void gelu_slope(int count, const vec *x, vec *slope) {
#if REAL_IS_DOUBLE
    gelu_phi(count, x, slope);
    for (int j = 0; j < count; j++) {
        vec near = min_vec(all(40), max_vec(all(-40), x[j])); /* beyond, the density is 0, and inf times it would be NaN */
        slope[j] += near * exp_weight(near * near * (real)-0.5) * ROOT_2PI_INVERSE;
    }
#else
    static const real even[] = {0.0124674784f, 0.00297605526f, 0.0509886518f, 0.0597710796f,
                                0.0756156668f, 0.0601453558f,  0.0536731854f, 0.128759146f};
    static const real odd[] = {-0.0057176291f, -0.00357407355f, -0.0318337455f, -0.050225053f,
                               -0.0740076825f, -0.0686457828f,  -0.0537438206f, -0.0657396987f};
    gelu_steps(count, x, slope, even, odd);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) slope[j] = choose(x[j] >= GELU_FAR, all(1), choose(x[j] <= -GELU_FAR, all(0), slope[j]));
#endif
}

/* y = kind(x) of `count` vectors. */
INLINE void activate(int count, const vec *x, vec *y, int kind) {
    if (kind == MT_GELU) gelu_phi(count, x, y);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) switch (kind) {
        case MT_RELU: y[j] = choose(x[j] <= 0, all(0), x[j]); break; /* this way round NaN stays */
        case MT_GELU: y[j] *= x[j]; break;
        case MT_GELU_TANH: y[j] = x[j] * sigmoid(GELU_C * (x[j] + GELU_K * x[j] * x[j] * x[j])); break;
        default: y[j] = x[j] * sigmoid(x[j]);
        }
}

INLINE vec activate_one(vec x, int kind) {
    vec y;
    activate(1, &x, &y, kind);
    return y;
}

/* dx = kind'(x) dy of `count` vectors. */
INLINE void activate_backward(int count, const vec *x, const vec *dy, vec *dx, int kind) {
    if (kind == MT_GELU) gelu_slope(count, x, dx);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
        vec s, slope, near;
        switch (kind) {
        case MT_RELU: dx[j] = choose(x[j] <= 0, all(0), dy[j]); break; /* at NaN, which it lets through, dy */
        case MT_GELU: dx[j] *= dy[j]; break;
        case MT_GELU_TANH:
            near = min_vec(all(30), max_vec(all(-30), x[j])); /* beyond, the slope is 0, and 0 times x^3 = inf would be NaN */
            s = sigmoid_and_slope(GELU_C * (near + GELU_K * near * near * near), &slope);
            dx[j] = dy[j] * (s + near * slope * (GELU_C * (1 + 3 * GELU_K * near * near)));
            break;
        default:
            s = sigmoid_and_slope(x[j], &slope);
            dx[j] = dy[j] * (s + x[j] * slope);
        }
    }
}

INLINE void activate_piece(const real *x, real *y, ptrdiff_t n, int kind, int past) {
    vec from[4], to[4];
    ptrdiff_t i = to_boundary(y, n, past);
    if (i) {
        from[0] = load_some(x, i, 0);
        activate(1, from, to, kind);
        store_some(y, to[0], i);
    }
    for (; i + 4 * VL <= n; i += 4 * VL) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) from[j] = load(x + i + j * VL);
        activate(4, from, to, kind);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (past)
                store_past(y + i + j * VL, to[j]);
            else
                store(y + i + j * VL, to[j]);
    }
    for (; i < n; i += VL) {
        int whole = i + VL <= n;
        from[0] = whole ? load(x + i) : load_some(x + i, n - i, 0);
        activate(1, from, to, kind);
        if (whole)
            store(y + i, to[0]);
        else
            store_some(y + i, to[0], n - i);
    }
}

INLINE void activate_backward_piece(const real *x, const real *dy, real *dx, ptrdiff_t n, int kind, int past) {
    vec from[4], grad[4], to[4];
    ptrdiff_t i = to_boundary(dx, n, past);
    if (i) {
        from[0] = load_some(x, i, 0);
        grad[0] = load_some(dy, i, 0);
        activate_backward(1, from, grad, to, kind);
        store_some(dx, to[0], i);
    }
    for (; i + 4 * VL <= n; i += 4 * VL) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) from[j] = load(x + i + j * VL), grad[j] = load(dy + i + j * VL);
        activate_backward(4, from, grad, to, kind);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            if (past)
                store_past(dx + i + j * VL, to[j]);
            else
                store(dx + i + j * VL, to[j]);
    }
    for (; i < n; i += VL) {
        int whole = i + VL <= n;
        from[0] = whole ? load(x + i) : load_some(x + i, n - i, 0);
        grad[0] = whole ? load(dy + i) : load_some(dy + i, n - i, 0);
        activate_backward(1, from, grad, to, kind);
        if (whole)
            store(dx + i, to[0]);
        else
            store_some(dx + i, to[0], n - i);
    }
}

/* x (n,) read, y (n,) written. */
static void activation(const void *x_, void *y_, ptrdiff_t n, int kind) {
    const real *x = x_;
    real *y = y_;
    ptrdiff_t pieces = div_up(n, ELEMENTS);
    int past = past_caches(n);
#pragma omp parallel num_threads(mt_team(pieces, (kind == MT_RELU ? 1.0 : 4.0) * n))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            ptrdiff_t at = piece * ELEMENTS, m = min_size(ELEMENTS, n - at);
            switch (kind) { /* outside the loop over elements: each gets a loop of its own */
            case MT_RELU: activate_piece(x + at, y + at, m, MT_RELU, past); break;
            case MT_GELU: activate_piece(x + at, y + at, m, MT_GELU, past); break;
            case MT_GELU_TANH: activate_piece(x + at, y + at, m, MT_GELU_TANH, past); break;
            default: activate_piece(x + at, y + at, m, MT_SILU, past);
            }
        }
        past_end(past);
    }
}

/* x, dy (n,) read, dx (n,) written. */
static void activation_backward(const void *x_, const void *dy_, void *dx_, ptrdiff_t n, int kind) {
    const real *x = x_, *dy = dy_;
    real *dx = dx_;
    ptrdiff_t pieces = div_up(n, ELEMENTS);
    int past = past_caches(n);
#pragma omp parallel num_threads(mt_team(pieces, (kind == MT_RELU ? 2.0 : 5.0) * n))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            ptrdiff_t at = piece * ELEMENTS, m = min_size(ELEMENTS, n - at);
            switch (kind) {
            case MT_RELU: activate_backward_piece(x + at, dy + at, dx + at, m, MT_RELU, past); break;
            case MT_GELU: activate_backward_piece(x + at, dy + at, dx + at, m, MT_GELU, past); break;
            case MT_GELU_TANH: activate_backward_piece(x + at, dy + at, dx + at, m, MT_GELU_TANH, past); break;
            default: activate_backward_piece(x + at, dy + at, dx + at, m, MT_SILU, past);
            }
        }
        past_end(past);
    }
}

/* x, y (n,) read, out (n,) written. */
static void add(const void *x_, const void *y_, void *out_, ptrdiff_t n) {
    const real *x = x_, *y = y_;
    real *out = out_;
    ptrdiff_t pieces = div_up(n, ELEMENTS);
#pragma omp parallel for num_threads(mt_team(pieces, 1.0 * n)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t at = piece * ELEMENTS, m = min_size(ELEMENTS, n - at);
        const real *restrict a = x + at, *restrict b = y + at;
        real *restrict to = out + at;
        for (ptrdiff_t i = 0; i < m; i++) to[i] = a[i] + b[i];
    }
}

enum { COLUMNS_OF_STATE = 64 }; /* in a piece: a multiple of VL */

/* x, forget (B, T, d), rows that lie anywhere, read; state (B, d) read, and last of all written; out (B, T, d) written:
 * c_t = f_t c_{t-1} + (1 - f_t) x_t, f = sigmoid(forget). */
static void recurrence(const struct mt_rows *x, const struct mt_rows *forget, void *state_, void *out_, ptrdiff_t batch, ptrdiff_t length,
                       ptrdiff_t d) {
    real *state_bd = state_, *out_btd = out_;
    ptrdiff_t across = div_up(d, COLUMNS_OF_STATE), pieces = batch * across;
#pragma omp parallel for num_threads(mt_team(pieces, 5.0 * batch * length * d)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t b = piece / across, first = piece % across * COLUMNS_OF_STATE, end = min_size(d, first + COLUMNS_OF_STATE);
        for (ptrdiff_t i = first; i < end; i += VL) {
            ptrdiff_t some = end - i;
            const int whole = some >= VL;
            real *state = state_bd + b * d + i;
            vec c = whole ? load(state) : load_some(state, some, 0);
            for (ptrdiff_t t = 0; t < length; t++) {
                const real *x_d = head_rows(x, b, 0) + t * x->stride[2] + i, *forget_d = head_rows(forget, b, 0) + t * forget->stride[2] + i;
                real *out = out_btd + (b * length + t) * d + i;
                vec f = sigmoid(whole ? load(forget_d) : load_some(forget_d, some, 0));
                c = f * c + (1 - f) * (whole ? load(x_d) : load_some(x_d, some, 0));
                if (whole)
                    store(out, c);
                else
                    store_some(out, c, some);
            }
            if (whole)
                store(state, c);
            else
                store_some(state, c, some);
        }
    }
}

/* What is drawn for the counter x under two keys: a bijection of 32 bits that spreads every input bit over the word. The
 * second key comes in between the multiplications, so that counters that overlap do not share a pattern. In 32 bits, for these
 * vectorise. */
INLINE uint32_t drawn(uint32_t x, uint32_t low, uint32_t high) {
    x += low;
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= (x >> 15) ^ high;
    x *= 0xD35A2D97u;
    return x ^ (x >> 15);
}

/* The finaliser of splitmix64. */
INLINE uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* x (n,) read, y (n,) written: x / (1 - p) where the hash of (seed, index) is at least p * 2^32, else 0. Two 32-bit keys
 * serve 2^32 elements, so that the hash itself stays in 32 bits. reference/elementwise.py says the same in NumPy. */
static void dropout(const void *x_, void *y_, ptrdiff_t n, double p, uint64_t seed) {
    const real *x = x_;
    real *y = y_;
    const real scale = (real)(1.0 / (1.0 - p));
    const uint32_t threshold = (uint32_t)(p * 4294967296.0);
    ptrdiff_t pieces = div_up(n, ELEMENTS);
#pragma omp parallel for num_threads(mt_team(pieces, 4.0 * n)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t at = piece * ELEMENTS, m = min_size(ELEMENTS, n - at);
        /* 2^32 is a multiple of ELEMENTS: a piece never spans two keys. */
        uint64_t key = mix64(seed + ((uint64_t)at / 4294967296u + 1) * 0x9E3779B97F4A7C15u);
        uint32_t key_low = (uint32_t)key, key_high = (uint32_t)(key >> 32), first = (uint32_t)at;
        const real *restrict from = x + at;
        real *restrict to = y + at;
        for (ptrdiff_t i = 0; i < m; i++) {
            to[i] = drawn(first + (uint32_t)i, key_low, key_high) >= threshold ? from[i] * scale : 0;
        }
    }
}
