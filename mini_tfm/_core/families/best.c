/* The best k of many scores, for rows that are searched and for the columns of an output layer.
 *
 * They are kept in a heap whose top is the worst of them. One order, score and then index, decides everything: so the result
 * depends neither on how what was searched was cut nor on which thread took which piece. */

struct found {
    real score;
    int64_t index; /* -1: nothing yet, which is worse than anything found */
};

INLINE int is_worse(struct found a, struct found b) {
    if (a.index < 0 || b.index < 0) return a.index < 0 && b.index >= 0;
    return a.score < b.score || (a.score == b.score && a.index > b.index);
}

/* heap_k is a heap with the worst on top, but for its element `at`, which sinks to its place. */
static void sink(struct found *heap_k, ptrdiff_t k, ptrdiff_t at) {
    struct found moving = heap_k[at];
    for (;;) {
        ptrdiff_t child = 2 * at + 1;
        if (child >= k) break;
        if (child + 1 < k && is_worse(heap_k[child + 1], heap_k[child])) child++;
        if (!is_worse(heap_k[child], moving)) break;
        heap_k[at] = heap_k[child];
        at = child;
    }
    heap_k[at] = moving;
}

/* The worst score that still gets in, unless it comes late. */
INLINE real worst_of(const struct found *heap_k) { return heap_k[0].index < 0 ? -INFINITY : heap_k[0].score; }

INLINE void offer(struct found *heap_k, ptrdiff_t k, struct found here) {
    if (!is_worse(heap_k[0], here)) return;
    heap_k[0] = here;
    sink(heap_k, k, 0);
}

static void nothing_found(struct found *heaps, ptrdiff_t count) {
    for (ptrdiff_t at = 0; at < count; at++) heaps[at] = (struct found){-INFINITY, -1};
}

/* scores_k, index_k = the best k of `slots` heaps of `kept`, `apart` from one another, which are used up; head: `slots` zeros. */
static void take_best(struct found *heaps, ptrdiff_t slots, ptrdiff_t apart, ptrdiff_t kept, ptrdiff_t *head, ptrdiff_t k, real *scores_k,
                      int64_t *index_k) {
    for (ptrdiff_t slot = 0; slot < slots; slot++) { /* emptied from the worst up: the best first */
        struct found *heap_k = heaps + slot * apart;
        for (ptrdiff_t left = kept; left > 1; left--) {
            struct found worst = heap_k[0];
            heap_k[0] = heap_k[left - 1];
            heap_k[left - 1] = worst;
            sink(heap_k, left - 1, 0);
        }
    }
    for (ptrdiff_t at = 0; at < k; at++) {
        struct found best = {-INFINITY, -1};
        ptrdiff_t from = 0;
        for (ptrdiff_t slot = 0; slot < slots; slot++) {
            if (head[slot] == kept) continue;
            struct found next = heaps[slot * apart + head[slot]];
            if (is_worse(best, next)) {
                best = next;
                from = slot;
            }
        }
        scores_k[at] = best.score;
        index_k[at] = best.index;
        if (best.index >= 0) head[from]++;
    }
}
