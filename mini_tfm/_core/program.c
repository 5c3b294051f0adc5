/* See program.h. Each call opens a parallel region of its own: threads that have just finished one still spin, so that a region costs
 * about a microsecond. */
#include "program.h"

#include <math.h>
#include <string.h>

/* To the nearest, ties to even; NaN stays one. As families/bfloat16.c. */
static void round_to_bfloat16(const float *from, ptrdiff_t d, uint16_t *to) {
    for (ptrdiff_t c = 0; c < d; c++) {
        uint32_t bits;
        memcpy(&bits, from + c, sizeof bits);
        uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
        to[c] = (uint16_t)((from[c] == from[c] ? rounded : bits | 0x400000) >> 16);
    }
}

/* to (d + 4,): from (d,) = scale * whole numbers from -127 to 127, as near as can be, ties to even; and behind them the scale. That is NaN
 * where a number is not finite, and 0 where all are so small that its inverse might not be finite. A product of floats is exact in
 * double, so the compiler may contract it with the sum that rounds it. As reference/kept.py. */
static void round_to_int8(const float *from, ptrdiff_t d, int8_t *to) {
    int32_t most_bits = 0; /* of numbers without their sign, which are ordered as their bits are */
    for (ptrdiff_t c = 0; c < d; c++) {
        int32_t bits;
        memcpy(&bits, from + c, sizeof bits);
        bits &= 0x7FFFFFFF;
        most_bits = bits > most_bits ? bits : most_bits;
    }
    float most, scale = NAN;
    memcpy(&most, &most_bits, sizeof most);
    const int is_finite = most_bits < 0x7F800000, is_large = is_finite && most >= 1e-30f;
    if (is_finite) scale = is_large ? most / 127 : 0;
    const float inverse = is_large ? 127 / most : 0;
    if (is_large)
        for (ptrdiff_t c = 0; c < d; c++) to[c] = (int8_t)(int32_t)((double)from[c] * inverse + 0x1.8p52 - 0x1.8p52);
    else
        memset(to, 0, d);
    memcpy(to + d, &scale, sizeof scale);
}

void mt_keep(int is_double, int kept, const struct mt_rows *from, const struct mt_rows *to, ptrdiff_t at, const int64_t *at_b,
             ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t n, ptrdiff_t d) {
    const ptrdiff_t old = is_double ? sizeof(double) : sizeof(float);
    const ptrdiff_t new = kept == MT_KEPT_INT8 ? 1 : kept == MT_KEPT_BFLOAT16 ? (ptrdiff_t)sizeof(uint16_t) : old;
    for (ptrdiff_t b = 0; b < batch; b++) {
        if (at_b) at = at_b[b];
        for (ptrdiff_t h = 0; h < heads; h++)
            for (ptrdiff_t i = 0; i < n; i++) {
                char *row = (char *)to->at + (b * to->stride[0] + h * to->stride[1] + (at + i) * to->stride[2]) * new;
                const char *given = (const char *)from->at + (b * from->stride[0] + h * from->stride[1] + i * from->stride[2]) * old;
                if (kept == MT_KEPT_BFLOAT16)
                    round_to_bfloat16((const float *)given, d, (uint16_t *)row);
                else if (kept == MT_KEPT_INT8)
                    round_to_int8((const float *)given, d, (int8_t *)row);
                else
                    memmove(row, given, d * old);
            }
    }
}

void mt_scale(int is_double, const void *x_, double scale, void *y_, ptrdiff_t n) {
    if (is_double) {
        const double *x = x_;
        double *y = y_;
        for (ptrdiff_t i = 0; i < n; i++) y[i] = x[i] * scale;
    } else {
        const float *x = x_, factor = (float)scale;
        float *y = y_;
        for (ptrdiff_t i = 0; i < n; i++) y[i] = x[i] * factor;
    }
}

/* Attention whose own block has grown since it was recorded. */
static int attend(const struct mt_call *call, uint64_t grows, struct mt_now now) {
    struct mt_attention_sizes sizes = call->sizes;
    sizes.batch = now.batch * call->n / sizes.length; /* beams may be queries of one row */
    const size_t element = call->is_double ? sizeof(double) : sizeof(float);
    for (ptrdiff_t i = 0; i < sizes.n_blocks; i++) {
        struct mt_block *block = &call->blocks[i]; /* brought to now in place: it says where it is */
        ptrdiff_t more = now.keys - block->source;
        if (!(grows >> i & 1) || !more) continue;
        block->source = block->width = now.keys;
        block->offset += more;
        if (block->bias && !block->lengths) block->bias = (const char *)block->bias - more * block->bias_stride[3] * (ptrdiff_t)element; /* the last key's stays */
    }
    return mt_attention(call->is_double, &call->from, call->blocks, &sizes, &call->to, call->lse);
}

static int run_call(const struct mt_call *call, uint64_t grows, struct mt_now now) {
    const int wide = call->is_double;
    const ptrdiff_t rows = call->n * now.batch;
    switch (call->kind) {
    case MT_CALL_LAYER_NORM:
        mt_layer_norm(wide, call->x, call->weight, call->bias, call->eps, call->y, call->mean, call->rstd, rows, call->d);
        return 0;
    case MT_CALL_RMS_NORM:
        mt_rms_norm(wide, call->x, call->weight, call->eps, call->y, call->rstd, rows, call->d);
        return 0;
    case MT_CALL_HEADS_NORM:
        mt_rms_norm_heads(wide, &call->from, call->weight, call->eps, &call->to, call->rstd, now.batch, call->heads, call->n, call->d);
        return 0;
    case MT_CALL_LINEAR:
        return mt_packed_linear(wide, call->x, &call->packed, &call->then, call->y, rows);
    case MT_CALL_ACTIVATION:
        mt_activation(wide, call->x, call->y, rows * call->d, call->then.activation);
        return 0;
    case MT_CALL_ADD:
        mt_add(wide, call->x, call->then.residual, call->y, rows * call->d);
        return 0;
    case MT_CALL_RECURRENCE:
        mt_recurrence(wide, &call->from, &call->to, call->state, call->y, now.batch, call->n, call->d);
        return 0;
    case MT_CALL_ROTARY:
        return mt_rotary(wide, &call->from, call->positions, call->per_row, call->frequencies, call->half, 0, &call->to, now.batch,
                         call->heads, call->n, call->d);
    case MT_CALL_KEEP:
        mt_keep(wide, call->kept, &call->from, &call->to, now.keys - call->n, call->at_b, now.batch, call->heads, call->n, call->d);
        return 0;
    default:
        return attend(call, grows, now);
    }
}

int mt_run_calls(const struct mt_call *calls, const uint64_t *grows, ptrdiff_t n, struct mt_now now) {
    for (ptrdiff_t i = 0; i < n; i++) {
        int failed = run_call(&calls[i], grows[i], now);
        if (failed) return failed;
    }
    return 0;
}
