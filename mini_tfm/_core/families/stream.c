/* Results that the caches cannot hold go to memory past them: a line that is written whole need not be read first, which
 * is a third of a copy's traffic (a copy is 1.6 times as fast, Zen 3). Such stores wait for memory, so they are made while
 * something else is computed: rows are made in a chunk on the stack, which stays in L1, and a line of a row that is done
 * leaves with every line of the next. */

enum { CHUNK = 16384 / sizeof(real) };
enum { PAST_CACHES = 16 << 20 }; /* bytes of a result: with what it is made of, no less than most last-level caches hold */

struct stream {
    real *to, *chunk;            /* element i of the one becomes element i of the other */
    ptrdiff_t head, sent, ready; /* elements before the first whole line; sent, but for the head; finished in the chunk */
};

#if ISA_AVX2 || ISA_AVX512
enum { STREAMS = 1 };

/* x to a place on a vector's boundary, past the caches. */
INLINE void store_past(real *p, vec x) {
#if VECTOR_BYTES == 64
    _mm512_stream_si512((void *)p, (__m512i)x);
#else
    _mm256_stream_si256((__m256i *)p, (__m256i)x);
#endif
}
#else
enum { STREAMS = 0 };

INLINE void store_past(real *p, vec x) { store(p, x); }
#endif

/* Elements before y's first vector boundary, where stores past the caches can begin; 0 when there are none to be. */
INLINE ptrdiff_t to_boundary(const real *y, ptrdiff_t n, int past) {
    return past ? min_size(n, (ptrdiff_t)(-(uintptr_t)y % VECTOR_BYTES / sizeof(real))) : 0;
}

INLINE void copy_row(const real *x_d, real *y_d, ptrdiff_t d, int past) {
    ptrdiff_t i = past ? to_boundary(y_d, d, past) : d;
    memcpy(y_d, x_d, i * sizeof(real));
    for (; i + VL <= d; i += VL) store_past(y_d + i, load(x_d + i));
    memcpy(y_d + i, x_d + i, (d - i) * sizeof(real));
}

INLINE int past_caches(ptrdiff_t n) { return STREAMS && (size_t)n > PAST_CACHES / sizeof(real); }

/* A thread's last act before the join, so that the others see what it sent. */
INLINE void past_end(int past) {
#if ISA_AVX2 || ISA_AVX512
    if (past) _mm_sfence();
#else
    (void)past;
#endif
}

/* room: CHUNK reals. */
INLINE struct stream stream_open(real *to, real *room) {
    ptrdiff_t head = -(uintptr_t)to % 64 / sizeof(real);
    return (struct stream){to, room, head, head, 0};
}

/* Sends a line, if one is finished. */
INLINE void stream_step(struct stream *s) {
    if (s->sent + LINE > s->ready) return;
    for (ptrdiff_t i = 0; i < LINE; i += VL) store_past(s->to + s->sent + i, load(s->chunk + s->sent + i));
    s->sent += LINE;
}

/* Sends the rest. */
INLINE void stream_close(struct stream *s) {
    while (s->sent + LINE <= s->ready) stream_step(s);
    memcpy(s->to, s->chunk, min_size(s->head, s->ready) * sizeof(real));
    if (s->sent < s->ready) memcpy(s->to + s->sent, s->chunk + s->sent, (s->ready - s->sent) * sizeof(real));
}

/* Rows of a result that are made in one chunk. */
INLINE ptrdiff_t rows_in_chunk(ptrdiff_t d) { return d ? max_size(1, CHUNK / d) : 1; }
