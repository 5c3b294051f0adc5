/* What the C side offers to kernels.pyx: one table of kernels for each (instruction set, real) and nothing else.
 *
 * Contract: every pointer was checked by the caller (rank, dtype, shape, C-contiguous unless strides are passed); sizes
 * are never negative and may be zero; outputs do not overlap inputs. Kernels that need workspace return 0, or -1 when it
 * cannot be had, before anything was written; the others cannot fail. None touches Python, so the GIL is released.
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

/* One block of keys and values, reference/attention.py's Block flattened. */
struct mt_block {
    struct mt_rows k, v;      /* (B, Hkv, S, D) */
    ptrdiff_t kv_heads;       /* Hkv, divides H */
    ptrdiff_t source;         /* S */
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

struct mt_kernels {
    const char *isa; /* filled in when it is chosen */

    int (*gemm)(const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
                int accumulate, const void *bias);
    /* Factors rounded to bfloat16, exact products, sums in float32. Not for double. */
    int (*gemm_bfloat16)(const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
                         int accumulate, const void *bias);
    size_t (*packed_bytes)(const struct mt_packed *w);
    int (*pack)(const struct mt_packed *w, const void *weight, const void *gate, int transposed);
    void (*unpack)(const struct mt_packed *w, void *weight, void *gate);
    int (*packed_linear)(const void *x, const struct mt_packed *w, const struct mt_epilogue *then, void *out, ptrdiff_t n);
    int (*linear_top_k)(const void *x, const struct mt_packed *w, const void *bias, void *scores, int64_t *ids, void *lse, ptrdiff_t n,
                        ptrdiff_t k);

    void (*softmax)(const void *x, void *y, ptrdiff_t n, ptrdiff_t d);
    void (*softmax_backward)(const void *y, const void *dy, void *dx, ptrdiff_t n, ptrdiff_t d);
    void (*log_softmax)(const void *x, void *y, ptrdiff_t n, ptrdiff_t d);

    void (*layer_norm)(const void *x, const void *weight, const void *bias, double eps, void *y, void *mean, void *rstd,
                       ptrdiff_t n, ptrdiff_t d);
    int (*layer_norm_backward)(const void *dy, const void *x, const void *weight, const void *mean, const void *rstd, void *dx,
                               void *dweight, void *dbias, ptrdiff_t n, ptrdiff_t d);
    void (*rms_norm)(const void *x, const void *weight, double eps, void *y, void *rstd, ptrdiff_t n, ptrdiff_t d);
    int (*rms_norm_backward)(const void *dy, const void *x, const void *weight, const void *rstd, void *dx, void *dweight,
                             ptrdiff_t n, ptrdiff_t d);

    void (*activation)(const void *x, void *y, ptrdiff_t n, int kind);
    void (*activation_backward)(const void *x, const void *dy, void *dx, ptrdiff_t n, int kind);
    void (*dropout)(const void *x, void *y, ptrdiff_t n, double p, uint64_t seed);

    void (*embedding)(const void *table, const int64_t *ids, void *out, ptrdiff_t n, ptrdiff_t d);
    void (*embedding_backward)(const int64_t *ids, const void *dout, void *dtable, ptrdiff_t n, ptrdiff_t d);
    int (*sinusoidal_positions)(void *out, ptrdiff_t n, ptrdiff_t d_model);
    int (*rotary)(const struct mt_rows *x, const int64_t *positions, int positions_per_row, double base, int inverse,
                  const struct mt_rows *y, ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t length, ptrdiff_t d);

    void (*cross_entropy)(const void *logits, const int64_t *targets, int64_t ignore_index, double label_smoothing, void *losses,
                          void *lse, ptrdiff_t n, ptrdiff_t vocab);
    void (*cross_entropy_backward)(const void *logits, const int64_t *targets, const void *lse, const void *dlosses,
                                   int64_t ignore_index, double label_smoothing, void *dlogits, ptrdiff_t n, ptrdiff_t vocab);

    int (*linear_cross_entropy)(const struct mt_output_layer *layer, void *losses, void *lse);
    int (*linear_cross_entropy_backward)(const struct mt_output_layer *layer, const void *lse, const void *dlosses, void *dx,
                                         void *dweight, void *dbias);

    void (*adamw)(void *param, const void *grad, void *m, void *v, ptrdiff_t n, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t step, double grad_scale);
    int (*sum_of_squares)(const void *x, ptrdiff_t n, double *sum);

    int (*search)(const void *queries, const struct mt_bank *bank, void *scores, int64_t *index, ptrdiff_t batch, ptrdiff_t n,
                  ptrdiff_t m, ptrdiff_t d, ptrdiff_t k);

    int (*attention)(const struct mt_rows *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes,
                     const struct mt_rows *out, void *lse);
    int (*attention_backward)(const struct mt_rows *dout, const struct mt_rows *out, const void *lse, const struct mt_rows *q,
                              const struct mt_block *blocks, const struct mt_attention_sizes *sizes, const struct mt_rows *dq);
    int (*attention_mass)(const struct mt_rows *q, const struct mt_block *block, const struct mt_attention_sizes *sizes, const void *lse,
                          const uint8_t *asking, void *mass);
};

/* The table for float (is_double 0) or double (1) of the instruction set chosen by mt_choose_isa. */
const struct mt_kernels *mt_kernels(int is_double);

/* Chooses by name, or the best that this processor runs when name is NULL. -1: unknown, or the processor cannot run it. */
int mt_choose_isa(const char *name);

/* Name of the i-th instruction set that is built in, best first, or of the i-th of those that this processor runs; NULL past
 * the end. */
const char *mt_isa_name(int i, int built);

/* Is it made of another one, for tests? */
int mt_is_emulated(const char *name);

#endif
