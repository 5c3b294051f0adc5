/* What the C side offers to kernels.pyx: the kernels that kernels.h lists, one table of them for each (instruction set, real),
 * and nothing else.
 *
 * Contract: every pointer was checked by the caller (rank, dtype, shape, C-contiguous unless strides are passed); sizes
 * are never negative and may be zero; outputs do not overlap inputs. Kernels that need workspace return 0, or -1 when it
 * cannot be had, before anything was written, and those that can run long MT_STOPPED (threads.h); the others cannot fail. None touches Python, so the GIL is released.
 * `void *` stands for the real of the table: float or double.
 *
 * Letters: B batch, H heads, T queries, S keys, D head size, N rows, d row length, V vocabulary. */
#ifndef MINI_TFM_CORE_H
#define MINI_TFM_CORE_H

#include <stddef.h>
#include <stdint.h>

enum mt_activation { MT_RELU, MT_GELU, MT_GELU_TANH, MT_SILU };

/* An array (B, H, N, D) whose rows of D lie anywhere. */
struct mt_rows {
    void *at;
    ptrdiff_t stride[3]; /* from batch row to batch row, head to head, row to row: in elements, any sign, may be 0 in what is read */
};

/* What keys and values are kept in: as they are, or narrower: forward, without an index, in the table for float. A row of int8 has a
 * float behind its D numbers, at any address, by which they are multiplied: D + 4 bytes. */
enum mt_kept { MT_KEPT_REAL, MT_KEPT_BFLOAT16, MT_KEPT_INT8 };

/* One block of keys and values, reference/attention.py's Block flattened. */
struct mt_block {
    struct mt_rows k, v;      /* (B, Hkv, S, D), or of as many rows as owners name */
    int kept;                 /* an mt_kept: what k and v are */
    ptrdiff_t kv_heads;       /* Hkv, divides H */
    ptrdiff_t source;         /* S */
    const int64_t *owners;    /* (B, S) through owners_ld, or NULL: which row of k and v has the key; forward, without an index */
    ptrdiff_t owners_ld;
    const uint8_t *valid;     /* (B, S) or NULL: all */
    const int64_t *lengths;   /* (B,) or NULL: all */
    const int64_t *index;     /* (B, H, T, width) or NULL; -1 = none */
    ptrdiff_t width;          /* scores a query has here: S, or the index's K */
    const void *bias;         /* (B, H, T, width) through strides, or NULL */
    ptrdiff_t bias_stride[4]; /* in elements, any sign, may be 0 */
    int64_t offset;           /* query i's own key is i + offset */
    int64_t window;           /* 0: none */
    int64_t prefix;           /* rows before it are seen by all, also where causal */
    int causal;
    struct mt_rows dk, dv;    /* backward: (B, Hkv, S, D) written, or at NULL: not needed */
    void *dbias;              /* backward: accumulated through strides, or NULL */
    ptrdiff_t dbias_stride[4];
};

struct mt_attention_sizes {
    ptrdiff_t batch, heads, length, d; /* B, H, T, D */
    ptrdiff_t n_blocks;
    double scale;
    double cap;     /* of the scores: cap tanh(score / cap), before the bias; 0: none */
    double dropout; /* share of the weights that are zeroed, in [0, 1) */
    uint64_t seed;
};

/* What the rows of a bank are made of. float16 and int8 go with the table for float. */
enum mt_row_kind { MT_ROWS_REAL, MT_ROWS_HALF, MT_ROWS_INT8 };

/* Rows to be searched, where they lie: any strides, any alignment, read only. */
struct mt_bank {
    const void *rows;     /* (B, M, d) through strides */
    ptrdiff_t stride[3];  /* in bytes, any sign */
    int kind;             /* enum mt_row_kind */
    const float *scales;  /* (B, M), what a row's scores are multiplied by, or NULL */
    const uint8_t *valid; /* (B, M) or NULL: all */
    const uint8_t *codes; /* (B, M, a multiple of 64 >= d, + 16), made of the rows, or NULL: search_codes.c */
    ptrdiff_t code_stride[2]; /* in bytes */
};

/* The output layer and its targets: logits x W + bias that exist `chunk` classes at a time. */
struct mt_output_layer {
    const void *x, *weight, *bias; /* (N, d); (d, V), or (V, d) if transposed; (V,) or NULL */
    const int64_t *targets;        /* (N,) in [0, V), or ignore_index */
    ptrdiff_t n, d, vocab, chunk;  /* chunk >= 1 */
    int transposed, bfloat16; /* bfloat16: the factors of its products are rounded to it */
    int64_t ignore_index;
    double label_smoothing;
};

/* A weight packed once for many products; families/packed.c lays it out, for one instruction set. */
enum mt_weight { MT_REAL, MT_BFLOAT16, MT_INT8 };

struct mt_packed {
    void *memory;                 /* packed_bytes() bytes on a cache line of their own */
    ptrdiff_t d_in, d_out, group; /* group: rows of int8 that share a scale; d_in where all do */
    int kind, gated;              /* an mt_weight; whether a gate's columns lie between */
};

/* What follows a product: activation(y + bias), or activation(gate + gate_bias) * (y + bias), and + residual. */
struct mt_epilogue {
    const void *bias, *gate_bias; /* (d_out,) or NULL */
    const void *residual;         /* (N, d_out) or NULL */
    int activation;               /* an mt_activation, or -1: none */
};

/* The table: a pointer for each line of kernels.h. */
struct mt_kernels {
    const char *isa; /* filled in when it is chosen */
#define KERNEL(result, name, parameters, arguments) result(*name) parameters;
#include "kernels.h"
};

/* The table for float (is_double 0) or double (1) of the instruction set chosen by mt_choose_isa. */
const struct mt_kernels *mt_kernels(int is_double);

/* Each kernel as a function: mt_softmax(is_double, x, y, n, d). */
#define MT_BARE(...) __VA_ARGS__
#define KERNEL(result, name, parameters, arguments) \
    static inline result mt_##name(int is_double, MT_BARE parameters) { return mt_kernels(is_double)->name arguments; }
#include "kernels.h"
#undef MT_BARE

/* Chooses by name, or the best that this processor runs when name is NULL. -1: unknown, or the processor cannot run it. */
int mt_choose_isa(const char *name);

/* Name of the i-th instruction set that is built in, best first, or of the i-th of those that this processor runs; NULL past
 * the end. */
const char *mt_isa_name(int i, int built);

/* Is it made of another one, for tests? */
int mt_is_emulated(const char *name);

#endif
