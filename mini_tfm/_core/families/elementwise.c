/* Activations and dropout: element by element, so any cut into pieces gives the same bits. */

enum { ELEMENTS = 16384 }; /* in a piece: 64 KB of float */

INLINE vec sigmoid(vec x) { return 1 / (1 + exp_vec(-x)); }

/* s = sigmoid(x), and its derivative s (1 - s) without the cancellation of 1 - s. */
INLINE vec sigmoid_and_slope(vec x, vec *slope) {
    vec e = exp_vec(choose(x < 0, x, -x)); /* of -|x|: at most 1 */
    vec larger = 1 / (1 + e), smaller = e * larger;
    *slope = larger * smaller;
    return choose(x < 0, smaller, larger);
}

#define GELU_C ((real)1.5957691216057307117598) /* 2 sqrt(2 / pi): 0.5 (1 + tanh u) = sigmoid(2 u) */
#define GELU_K ((real)0.044715)
#define ROOT_HALF ((real)0.70710678118654752440)
#define ROOT_2PI_INVERSE ((real)0.39894228040143267794)

INLINE vec activate(vec x, int kind) {
    switch (kind) {
    case MT_RELU: return choose(x <= 0, all(0), x); /* this way round NaN stays */
    case MT_GELU: return x * (real)0.5 * (1 + erf_vec(x * ROOT_HALF));
    case MT_GELU_TANH: return x * sigmoid(GELU_C * (x + GELU_K * x * x * x));
    default: return x * sigmoid(x);
    }
}

/* The derivative at x, times dy. */
INLINE vec activate_backward(vec x, vec dy, int kind) {
    vec s, slope, near;
    switch (kind) {
    case MT_RELU: return choose(x > 0, dy, all(0));
    case MT_GELU:
        return dy * ((real)0.5 * (1 + erf_vec(x * ROOT_HALF)) + x * exp_vec(x * x * (real)-0.5) * ROOT_2PI_INVERSE);
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
    for (; i + VL <= n; i += VL) store(y + i, activate(load(x + i), kind));
    if (i < n) store_some(y + i, activate(load_some(x + i, n - i, 0), kind), n - i);
}

INLINE void activate_backward_piece(const real *x, const real *dy, real *dx, ptrdiff_t n, int kind) {
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) store(dx + i, activate_backward(load(x + i), load(dy + i), kind));
    if (i < n) store_some(dx + i, activate_backward(load_some(x + i, n - i, 0), load_some(dy + i, n - i, 0), kind), n - i);
}

/* x (n,) read, y (n,) written. */
static void activation(const void *x_, void *y_, ptrdiff_t n, int kind) {
    const real *x = x_;
    real *y = y_;
    ptrdiff_t pieces = div_up(n, ELEMENTS);
#pragma omp parallel for num_threads(mt_team(pieces, 8.0 * n)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t at = piece * ELEMENTS, m = min_size(ELEMENTS, n - at);
        switch (kind) { /* outside the loop over elements: each gets a loop of its own */
        case MT_RELU: activate_piece(x + at, y + at, m, MT_RELU); break;
        case MT_GELU: activate_piece(x + at, y + at, m, MT_GELU); break;
        case MT_GELU_TANH: activate_piece(x + at, y + at, m, MT_GELU_TANH); break;
        default: activate_piece(x + at, y + at, m, MT_SILU);
        }
    }
}

/* x, dy (n,) read, dx (n,) written. */
static void activation_backward(const void *x_, const void *dy_, void *dx_, ptrdiff_t n, int kind) {
    const real *x = x_, *dy = dy_;
    real *dx = dx_;
    ptrdiff_t pieces = div_up(n, ELEMENTS);
#pragma omp parallel for num_threads(mt_team(pieces, 12.0 * n)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t at = piece * ELEMENTS, m = min_size(ELEMENTS, n - at);
        switch (kind) {
        case MT_RELU: activate_backward_piece(x + at, dy + at, dx + at, m, MT_RELU); break;
        case MT_GELU: activate_backward_piece(x + at, dy + at, dx + at, m, MT_GELU); break;
        case MT_GELU_TANH: activate_backward_piece(x + at, dy + at, dx + at, m, MT_GELU_TANH); break;
        default: activate_backward_piece(x + at, dy + at, dx + at, m, MT_SILU);
        }
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
            uint32_t drawn = mix32(mix32(first + (uint32_t)i + key_low) ^ key_high);
            to[i] = drawn >= threshold ? from[i] * scale : 0;
        }
    }
}
