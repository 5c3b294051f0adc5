/* A decoding step as a list of calls: the kernels that one step of a model ran, with the buffers they read and wrote, to be run again.
 * kernels.pyx records it (program.pxi). */
#ifndef MINI_TFM_PROGRAM_H
#define MINI_TFM_PROGRAM_H

#include "core.h"

enum mt_call_kind {
    MT_CALL_LAYER_NORM,
    MT_CALL_RMS_NORM,
    MT_CALL_HEADS_NORM,
    MT_CALL_LINEAR,
    MT_CALL_ACTIVATION,
    MT_CALL_ADD,
    MT_CALL_RECURRENCE,
    MT_CALL_ROTARY,
    MT_CALL_KEEP,
    MT_CALL_ATTENTION
};

/* One call. What has no place in a kind is zero. */
struct mt_call {
    int kind, is_double;
    ptrdiff_t n, d;      /* rows of a stream, numbers of a row */
    const void *x;       /* read */
    void *y;             /* written */
    void *state;         /* of a recurrence */
    const void *weight, *bias; /* of norms */
    double eps;
    void *mean, *rstd;   /* of norms, written */
    struct mt_packed packed;
    struct mt_epilogue then; /* of products; its activation, and as its residual what is added */
    struct mt_rows from, to; /* of heads' norms, rotary, keep, attention: queries, outputs; of a recurrence: its inputs, what forgets */
    const int64_t *positions; /* (n,) of rotary, or with per_row (B, n) */
    int per_row;
    const int64_t *at_b; /* (B,) of keep: the place of each stream's first row; NULL: of all now.keys - n */
    const double *frequencies;
    ptrdiff_t half, heads;
    int kept; /* an mt_kept */
    struct mt_block *blocks; /* (sizes.n_blocks,) of attention */
    struct mt_attention_sizes sizes;
    void *lse;
};

/* The number of keys that the blocks with `grows` had when the call was recorded is in their source. */
struct mt_now {
    ptrdiff_t batch; /* streams: at most as many as were recorded, the first of them */
    ptrdiff_t keys;  /* keys of the own block of each, the new one included; where it has lengths, the most of them */
};

/* grows (n calls,): a bit for each block of an attention that has now.keys keys. Returns what a kernel that fails does. */
int mt_run_calls(const struct mt_call *calls, const uint64_t *grows, ptrdiff_t n, struct mt_now now);

/* y (n,) = scale * x (n,); x may be y. */
void mt_scale(int is_double, const void *x, double scale, void *y, ptrdiff_t n);

/* to (B, H, n, D), an mt_kept, at row `at`, or where at_b (B,) is not NULL at row at_b[b], becomes `from` (B, H, n, D). */
void mt_keep(int is_double, int kept, const struct mt_rows *from, const struct mt_rows *to, ptrdiff_t at, const int64_t *at_b,
             ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t n, ptrdiff_t d);

#endif
