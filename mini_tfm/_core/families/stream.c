/* Results that the caches cannot hold go to memory past them: a line that is written whole need not be read first, which
 * is a third of a copy's traffic (1.4 times as fast on one thread, 1.6 on two, Zen 3). They are made in a chunk on the
 * stack, which stays in L1, and sent from there, so that nothing depends on how rows lie on lines. */

enum { CHUNK = 16384 / sizeof(real), PAST_CACHES = 32 << 20 /* bytes: last-level caches have 8 to 32 MB a thread's share */ };

#if ISA_AVX2 || ISA_AVX512
enum { STREAMS = 1 };

/* to_n = from_n, n <= CHUNK, `from` on a line of its own. */
INLINE void stream_out(real *to, const real *from, ptrdiff_t n) {
    ptrdiff_t step = 32 / sizeof(real), i = min_size(n, (ptrdiff_t)(-(uintptr_t)to % 32 / sizeof(real)));
    memcpy(to, from, i * sizeof(real));
    for (; i + step <= n; i += step) _mm256_stream_si256((__m256i *)(to + i), _mm256_loadu_si256((const __m256i *)(from + i)));
    memcpy(to + i, from + i, (n - i) * sizeof(real));
}
#else
enum { STREAMS = 0 };

INLINE void stream_out(real *to, const real *from, ptrdiff_t n) { memcpy(to, from, n * sizeof(real)); }
#endif

/* A thread's last act before the join, so that the others see what it sent. */
INLINE void stream_end(int past) {
#if ISA_AVX2 || ISA_AVX512
    if (past) _mm_sfence();
#else
    (void)past;
#endif
}

INLINE int past_caches(ptrdiff_t n) { return STREAMS && (size_t)n > PAST_CACHES / sizeof(real); }
