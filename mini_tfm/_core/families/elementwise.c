/* Activations and dropout: element by element, so any cut into pieces gives the same bits. */

enum { ELEMENTS = 16384 }; /* in a piece: 64 KB of float */

INLINE vec size_of(vec x) { return (vec)((ivec)x & ~(ivec)all(-(real)0)); }

/* s = sigmoid(x), and its derivative s (1 - s) without the cancellation of 1 - s. */
INLINE vec sigmoid_and_slope(vec x, vec *slope) {
    vec e = exp_below(-size_of(x)); /* at most 1 */
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

/* For gelu in float: 0.5 + x p(x^2), with p fitted on |x| <= 5.5; beyond, 0 or 1 to within the error. p is taken in
 * u = x^2 / 15.125 - 1, from -1 to 1, where its terms hardly cancel; even and odd powers apart, for two short chains. */
#define GELU_FAR ((real)5.5)

INLINE vec gelu_step(vec x, const real *p_even, const real *p_odd, int n_pairs) {
    vec u = min_vec(all(1), x * x * (real)(1 / 15.125) - 1), uu = u * u, even = all(p_even[0]), odd = all(p_odd[0]);
    for (int i = 1; i < n_pairs; i++) {
        even = even * uu + p_even[i];
        odd = odd * uu + p_odd[i];
    }
    vec y = (even + odd * u) * x + (real)0.5;
    y = choose(x >= GELU_FAR, all(1), y);
    return choose(x <= -GELU_FAR, all(0), y);
}

/* The normal distribution's function, within 4e-8 before rounding. */
INLINE vec gelu_phi(vec x) {
#if REAL_IS_DOUBLE
    return (real)0.5 * (1 + erf_vec(x * ROOT_HALF));
#else
    static const real even[] = {0.000538080116f, 0.00102383783f, 0.00423638616f, 0.010468618f,
                                0.0202879831f,   0.0320817418f,  0.0477369912f,  0.12855193f};
    static const real odd[] = {0, -0.00136883033f, -0.00122939807f, -0.00767467404f,
                               -0.0146713639f, -0.0261124689f, -0.0387872681f, -0.0641724765f};
    return gelu_step(x, even, odd, 8);
#endif
}

/* The derivative of x phi(x), within 6e-8 (1 + |x|). */
INLINE vec gelu_slope(vec x) {
#if REAL_IS_DOUBLE
    vec near = min_vec(all(40), max_vec(all(-40), x)); /* beyond, the density is 0, and inf times it would be NaN */
    return gelu_phi(x) + near * exp_below(near * near * (real)-0.5) * ROOT_2PI_INVERSE;
#else
    static const real even[] = {0.0124674784f, 0.00297605526f, 0.0509886518f, 0.0597710796f,
                                0.0756156668f, 0.0601453558f,  0.0536731854f, 0.128759146f};
    static const real odd[] = {-0.0057176291f, -0.00357407355f, -0.0318337455f, -0.050225053f,
                               -0.0740076825f, -0.0686457828f,  -0.0537438206f, -0.0657396987f};
    return gelu_step(x, even, odd, 8);
#endif
}

INLINE vec activate(vec x, int kind) {
    switch (kind) {
    case MT_RELU: return choose(x <= 0, all(0), x); /* this way round NaN stays */
    case MT_GELU: return x * gelu_phi(x);
    case MT_GELU_TANH: return x * sigmoid(GELU_C * (x + GELU_K * x * x * x));
    default: return x * sigmoid(x);
    }
}

/* The derivative at x, times dy. */
INLINE vec activate_backward(vec x, vec dy, int kind) {
    vec s, slope, near;
    switch (kind) {
    case MT_RELU: return choose(x > 0, dy, all(0));
    case MT_GELU: return dy * gelu_slope(x);
    case MT_GELU_TANH:
        near = min_vec(all(30), max_vec(all(-30), x)); /* beyond, the slope is 0, and 0 times x^3 = inf would be NaN */
        s = sigmoid_and_slope(GELU_C * (near + GELU_K * near * near * near), &slope);
        return dy * (s + near * slope * (GELU_C * (1 + 3 * GELU_K * near * near)));
    default:
        s = sigmoid_and_slope(x, &slope);
        return dy * (s + x * slope);
    }
}

INLINE void activate_piece(const real *x, real *y, ptrdiff_t n, int kind) {
    ptrdiff_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) { /* two at once: one alone is a chain that waits for itself */
        vec y0 = activate(load(x + i), kind), y1 = activate(load(x + i + VL), kind);
        store(y + i, y0);
        store(y + i + VL, y1);
    }
    for (; i + VL <= n; i += VL) store(y + i, activate(load(x + i), kind));
    if (i < n) store_some(y + i, activate(load_some(x + i, n - i, 0), kind), n - i);
}

INLINE void activate_backward_piece(const real *x, const real *dy, real *dx, ptrdiff_t n, int kind) {
    ptrdiff_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        vec dx0 = activate_backward(load(x + i), load(dy + i), kind);
        vec dx1 = activate_backward(load(x + i + VL), load(dy + i + VL), kind);
        store(dx + i, dx0);
        store(dx + i + VL, dx1);
    }
    for (; i + VL <= n; i += VL) store(dx + i, activate_backward(load(x + i), load(dy + i), kind));
    if (i < n) store_some(dx + i, activate_backward(load_some(x + i, n - i, 0), load_some(dy + i, n - i, 0), kind), n - i);
}

/* x (n,) read, y (n,) written. */
static void activation(const void *x_, void *y_, ptrdiff_t n, int kind) {
    const real *x = x_;
    real *y = y_;
    ptrdiff_t pieces = div_up(n, CHUNK);
    int past = past_caches(n);
#pragma omp parallel num_threads(mt_team(pieces, (kind == MT_RELU ? 1.0 : 4.0) * n))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real chunk[CHUNK] __attribute__((aligned(64)));
            ptrdiff_t at = piece * CHUNK, m = min_size(CHUNK, n - at);
            real *to = past ? chunk : y + at;
            switch (kind) { /* outside the loop over elements: each gets a loop of its own */
            case MT_RELU: activate_piece(x + at, to, m, MT_RELU); break;
            case MT_GELU: activate_piece(x + at, to, m, MT_GELU); break;
            case MT_GELU_TANH: activate_piece(x + at, to, m, MT_GELU_TANH); break;
            default: activate_piece(x + at, to, m, MT_SILU);
            }
            if (past) stream_out(y + at, chunk, m);
        }
        stream_end(past);
    }
}

/* x, dy (n,) read, dx (n,) written. */
static void activation_backward(const void *x_, const void *dy_, void *dx_, ptrdiff_t n, int kind) {
    const real *x = x_, *dy = dy_;
    real *dx = dx_;
    ptrdiff_t pieces = div_up(n, CHUNK);
    int past = past_caches(n);
#pragma omp parallel num_threads(mt_team(pieces, (kind == MT_RELU ? 2.0 : 5.0) * n))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real chunk[CHUNK] __attribute__((aligned(64)));
            ptrdiff_t at = piece * CHUNK, m = min_size(CHUNK, n - at);
            real *to = past ? chunk : dx + at;
            switch (kind) {
            case MT_RELU: activate_backward_piece(x + at, dy + at, to, m, MT_RELU); break;
            case MT_GELU: activate_backward_piece(x + at, dy + at, to, m, MT_GELU); break;
            case MT_GELU_TANH: activate_backward_piece(x + at, dy + at, to, m, MT_GELU_TANH); break;
            default: activate_backward_piece(x + at, dy + at, to, m, MT_SILU);
            }
            if (past) stream_out(dx + at, chunk, m);
        }
        stream_end(past);
    }
}

/* A bijection of 32 bits that spreads every input bit over the word; multiplications of 32 bits, for these vectorise. */
INLINE uint32_t mix32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x21F0AAADu;
    x ^= x >> 15;
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
    ptrdiff_t pieces = div_up(n, CHUNK);
    int past = past_caches(n);
#pragma omp parallel num_threads(mt_team(pieces, 6.0 * n))
    {
#pragma omp for schedule(static) nowait
        for (ptrdiff_t piece = 0; piece < pieces; piece++) {
            real chunk[CHUNK] __attribute__((aligned(64)));
            ptrdiff_t at = piece * CHUNK, m = min_size(CHUNK, n - at);
            /* 2^32 is a multiple of CHUNK: a piece never spans two keys. */
            uint64_t key = mix64(seed + ((uint64_t)at / 4294967296u + 1) * 0x9E3779B97F4A7C15u);
            uint32_t key_low = (uint32_t)key, key_high = (uint32_t)(key >> 32), begin = (uint32_t)at;
            const real *restrict from = x + at;
            real *restrict to = past ? chunk : y + at;
            for (ptrdiff_t i = 0; i < m; i++) {
                uint32_t drawn = mix32(mix32(begin + (uint32_t)i + key_low) ^ key_high);
                to[i] = drawn >= threshold ? from[i] * scale : 0;
            }
            if (past) stream_out(y + at, chunk, m);
        }
        stream_end(past);
    }
}
