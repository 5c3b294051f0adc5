"""The C side, as core.h and threads.h declare it."""

from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t, uint8_t, uint64_t


cdef extern from "core.h" nogil:
    struct mt_rows:
        void *at
        ptrdiff_t[3] stride

    struct mt_block:
        mt_rows k, v
        ptrdiff_t kv_heads, source
        const uint8_t *valid
        const int64_t *lengths
        const int64_t *index
        ptrdiff_t width
        const void *bias
        ptrdiff_t[4] bias_stride
        int64_t offset, window
        int64_t prefix
        int causal
        mt_rows dk, dv
        void *dbias
        ptrdiff_t[4] dbias_stride

    struct mt_attention_sizes:
        ptrdiff_t batch, heads, length, d, n_blocks
        double scale, dropout
        uint64_t seed

    struct mt_bank:
        const void *rows
        ptrdiff_t[3] stride
        int kind
        const float *scales
        const uint8_t *valid
        const uint8_t *codes
        ptrdiff_t[2] code_stride

    struct mt_output_layer:
        const void *x
        const void *weight
        const void *bias
        const int64_t *targets
        ptrdiff_t n, d, vocab, chunk
        int transposed, bfloat16
        int64_t ignore_index
        double label_smoothing

    struct mt_packed:
        void *memory
        ptrdiff_t d_in, d_out, group
        int kind, gated

    struct mt_epilogue:
        const void *bias
        const void *gate_bias
        const void *residual
        int activation

    # The members are function pointers in C; to Cython they are calls.
    struct mt_kernels_table "mt_kernels":
        const char *isa
        int (*gemm)(const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
                    int accumulate, const void *bias) noexcept nogil
        int (*gemm_bfloat16)(const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
                             int accumulate, const void *bias) noexcept nogil
        size_t (*packed_bytes)(const mt_packed *w) noexcept nogil
        int (*pack)(const mt_packed *w, const void *weight, const void *gate, int transposed) noexcept nogil
        void (*unpack)(const mt_packed *w, void *weight, void *gate) noexcept nogil
        int (*packed_linear)(const void *x, const mt_packed *w, const mt_epilogue *then, void *out, ptrdiff_t n) noexcept nogil
        int (*linear_top_k)(const void *x, const mt_packed *w, const void *bias, void *scores, int64_t *ids, void *lse, ptrdiff_t n,
                            ptrdiff_t k) noexcept nogil
        void (*softmax)(const void *x, void *y, ptrdiff_t n, ptrdiff_t d) noexcept nogil
        void (*softmax_backward)(const void *y, const void *dy, void *dx, ptrdiff_t n, ptrdiff_t d) noexcept nogil
        void (*log_softmax)(const void *x, void *y, ptrdiff_t n, ptrdiff_t d) noexcept nogil
        void (*layer_norm)(const void *x, const void *weight, const void *bias, double eps, void *y, void *mean, void *rstd,
                           ptrdiff_t n, ptrdiff_t d) noexcept nogil
        int (*layer_norm_backward)(const void *dy, const void *x, const void *weight, const void *mean, const void *rstd,
                                   void *dx, void *dweight, void *dbias, ptrdiff_t n, ptrdiff_t d) noexcept nogil
        void (*rms_norm)(const void *x, const void *weight, double eps, void *y, void *rstd, ptrdiff_t n, ptrdiff_t d) noexcept nogil
        int (*rms_norm_backward)(const void *dy, const void *x, const void *weight, const void *rstd, void *dx, void *dweight,
                                 ptrdiff_t n, ptrdiff_t d) noexcept nogil
        void (*activation)(const void *x, void *y, ptrdiff_t n, int kind) noexcept nogil
        void (*activation_backward)(const void *x, const void *dy, void *dx, ptrdiff_t n, int kind) noexcept nogil
        void (*dropout)(const void *x, void *y, ptrdiff_t n, double p, uint64_t seed) noexcept nogil
        void (*embedding)(const void *table, const int64_t *ids, void *out, ptrdiff_t n, ptrdiff_t d) noexcept nogil
        void (*embedding_backward)(const int64_t *ids, const void *dout, void *dtable, ptrdiff_t n, ptrdiff_t d) noexcept nogil
        int (*sinusoidal_positions)(void *out, ptrdiff_t n, ptrdiff_t d_model) noexcept nogil
        int (*rotary)(const mt_rows *x, const int64_t *positions, int positions_per_row, double base, int inverse,
                      const mt_rows *y, ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t length, ptrdiff_t d) noexcept nogil
        void (*cross_entropy)(const void *logits, const int64_t *targets, int64_t ignore_index, double label_smoothing,
                              void *losses, void *lse, ptrdiff_t n, ptrdiff_t vocab) noexcept nogil
        void (*cross_entropy_backward)(const void *logits, const int64_t *targets, const void *lse, const void *dlosses,
                                       int64_t ignore_index, double label_smoothing, void *dlogits, ptrdiff_t n,
                                       ptrdiff_t vocab) noexcept nogil
        int (*linear_cross_entropy)(const mt_output_layer *layer, void *losses, void *lse) noexcept nogil
        int (*linear_cross_entropy_backward)(const mt_output_layer *layer, const void *lse, const void *dlosses, void *dx,
                                             void *dweight, void *dbias) noexcept nogil
        void (*adamw)(void *param, const void *grad, void *m, void *v, ptrdiff_t n, double lr, double beta1, double beta2,
                      double eps, double weight_decay, int64_t step, double grad_scale) noexcept nogil
        int (*sum_of_squares)(const void *x, ptrdiff_t n, double *sum) noexcept nogil
        int (*search)(const void *queries, const mt_bank *bank, void *scores, int64_t *index, ptrdiff_t batch, ptrdiff_t n,
                      ptrdiff_t m, ptrdiff_t d, ptrdiff_t k) noexcept nogil
        int (*attention)(const mt_rows *q, const mt_block *blocks, const mt_attention_sizes *sizes, const mt_rows *out,
                         void *lse) noexcept nogil
        int (*attention_backward)(const mt_rows *dout, const mt_rows *out, const void *lse, const mt_rows *q,
                                  const mt_block *blocks, const mt_attention_sizes *sizes, const mt_rows *dq) noexcept nogil
        int (*attention_mass)(const mt_rows *q, const mt_block *block, const mt_attention_sizes *sizes, const void *lse,
                              const uint8_t *asking, void *mass) noexcept nogil

    const mt_kernels_table *mt_kernels(int is_double)
    int mt_choose_isa(const char *name)
    const char *mt_isa_name(int i, int built)
    int mt_is_emulated(const char *name)


cdef extern from "threads.h" nogil:
    int mt_has_openmp()
    void mt_set_threads(int n, int honour_limit)
    int mt_get_threads()
    void mt_after_fork()
