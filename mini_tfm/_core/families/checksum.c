/* A number that tells whether an array has changed: position counts, and any one changed bit. Not for enemies. */

/* x (n,) read, as words of 32 bits. Pieces of a fixed size, in each LANES chains of a multiply and a shift, both one to one, so
 * that no single change is lost; then the lanes, and the pieces by their number, into one number. It is the same on every
 * instruction set. -1: no workspace. */
static int checksum(const void *x, ptrdiff_t n, uint64_t *sum) {
    enum { LANES = 64, WORDS = 1 << 14 };
    const unsigned char *bytes = x;
    ptrdiff_t words = n * (ptrdiff_t)(sizeof(real) / 4), pieces = div_up(words, WORDS);
    uint64_t *sum_p = malloc(max_size(pieces, 1) * sizeof(uint64_t));
    if (!sum_p) return -1;
#pragma omp parallel for num_threads(mt_team(pieces, 0.5 * words)) schedule(static)
    for (ptrdiff_t piece = 0; piece < pieces; piece++) {
        ptrdiff_t i = piece * WORDS, end = min_size(words, i + WORDS);
        uint32_t lane[LANES] = {0}, word[LANES];
        for (; i < end; i += LANES) {
            if (end - i < LANES) memset(word, 0, sizeof word);
            memcpy(word, bytes + 4 * i, 4 * min_size(LANES, end - i));
            for (int j = 0; j < LANES; j++) {
                lane[j] = (lane[j] ^ word[j]) * 0x9E3779B1u;
                lane[j] ^= lane[j] >> 15;
            }
        }
        uint64_t digest = (uint64_t)piece;
        for (int j = 0; j < LANES; j++) {
            digest = (digest ^ lane[j]) * 0xBF58476D1CE4E5B9u;
            digest ^= digest >> 29;
        }
        sum_p[piece] = digest;
    }
    *sum = (uint64_t)words;
    for (ptrdiff_t piece = 0; piece < pieces; piece++) *sum += sum_p[piece];
    free(sum_p);
    return 0;
}
