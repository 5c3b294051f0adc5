/* The list of kernels. A line here, its function in families/, and everything else in C is made of it: the table (core.h), its
 * instances and their refinements (instances/all.h), and mt_<name>(is_double, ...), by which the Cython side calls it.
 *
 *     KERNEL(result, name, (parameters), (their names))
 *
 * Whoever includes this says what KERNEL is. PACKED_KERNEL are those that an instruction set with dot products of bytes (VNNI,
 * DOT) puts in another one's place, BFLOAT16_KERNEL those that one with products of bfloat16 does. */
#ifndef PACKED_KERNEL
#define PACKED_KERNEL KERNEL
#endif
#ifndef BFLOAT16_KERNEL
#define BFLOAT16_KERNEL KERNEL
#endif

KERNEL(int, gemm,
       (const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b, int accumulate,
        const void *bias),
       (a, b, c, m, n, k, trans_a, trans_b, accumulate, bias))
/* Factors rounded to bfloat16, exact products, sums in float32. Not for double. */
BFLOAT16_KERNEL(int, gemm_bfloat16,
                (const void *a, const void *b, void *c, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, int trans_a, int trans_b,
                 int accumulate, const void *bias),
                (a, b, c, m, n, k, trans_a, trans_b, accumulate, bias))

PACKED_KERNEL(size_t, packed_bytes, (const struct mt_packed *w), (w))
PACKED_KERNEL(int, pack, (const struct mt_packed *w, const void *weight, const void *gate, int transposed),
              (w, weight, gate, transposed))
PACKED_KERNEL(void, unpack, (const struct mt_packed *w, void *weight, void *gate), (w, weight, gate))
PACKED_KERNEL(int, repack,
              (const struct mt_packed *w, const void *values, const void *scales, const void *gate, const void *gate_scales),
              (w, values, scales, gate, gate_scales))
PACKED_KERNEL(void, unpack_kept, (const struct mt_packed *w, void *values, void *scales, void *gate, void *gate_scales),
              (w, values, scales, gate, gate_scales))
PACKED_KERNEL(int, packed_linear,
              (const void *x, const struct mt_packed *w, const struct mt_epilogue *then, void *out, ptrdiff_t n),
              (x, w, then, out, n))
PACKED_KERNEL(int, linear_top_k,
              (const void *x, const struct mt_packed *w, const void *bias, void *scores, int64_t *ids, void *lse, ptrdiff_t n,
               ptrdiff_t k),
              (x, w, bias, scores, ids, lse, n, k))

KERNEL(void, softmax, (const void *x, void *y, ptrdiff_t n, ptrdiff_t d), (x, y, n, d))
KERNEL(void, softmax_backward, (const void *y, const void *dy, void *dx, ptrdiff_t n, ptrdiff_t d), (y, dy, dx, n, d))
KERNEL(void, log_softmax, (const void *x, void *y, ptrdiff_t n, ptrdiff_t d), (x, y, n, d))

KERNEL(void, layer_norm,
       (const void *x, const void *weight, const void *bias, double eps, void *y, void *mean, void *rstd, ptrdiff_t n, ptrdiff_t d),
       (x, weight, bias, eps, y, mean, rstd, n, d))
KERNEL(int, layer_norm_backward,
       (const void *dy, const void *x, const void *weight, const void *mean, const void *rstd, void *dx, void *dweight, void *dbias,
        ptrdiff_t n, ptrdiff_t d),
       (dy, x, weight, mean, rstd, dx, dweight, dbias, n, d))
KERNEL(void, rms_norm, (const void *x, const void *weight, double eps, void *y, void *rstd, ptrdiff_t n, ptrdiff_t d),
       (x, weight, eps, y, rstd, n, d))
KERNEL(int, rms_norm_backward,
       (const void *dy, const void *x, const void *weight, const void *rstd, void *dx, void *dweight, ptrdiff_t n, ptrdiff_t d),
       (dy, x, weight, rstd, dx, dweight, n, d))
KERNEL(void, rms_norm_heads,
       (const struct mt_rows *x, const void *weight, double eps, const struct mt_rows *y, void *rstd, ptrdiff_t batch, ptrdiff_t heads,
        ptrdiff_t n, ptrdiff_t d),
       (x, weight, eps, y, rstd, batch, heads, n, d))

KERNEL(void, activation, (const void *x, void *y, ptrdiff_t n, int kind), (x, y, n, kind))
KERNEL(void, activation_backward, (const void *x, const void *dy, void *dx, ptrdiff_t n, int kind), (x, dy, dx, n, kind))
KERNEL(void, add, (const void *x, const void *y, void *out, ptrdiff_t n), (x, y, out, n))
KERNEL(void, recurrence,
       (const struct mt_rows *x, const struct mt_rows *forget, void *state, void *out, ptrdiff_t batch, ptrdiff_t length, ptrdiff_t d),
       (x, forget, state, out, batch, length, d))
KERNEL(void, dropout, (const void *x, void *y, ptrdiff_t n, double p, uint64_t seed), (x, y, n, p, seed))

KERNEL(void, embedding, (const void *table, const int64_t *ids, void *out, ptrdiff_t n, ptrdiff_t d), (table, ids, out, n, d))
KERNEL(void, embedding_backward, (const int64_t *ids, const void *dout, void *dtable, ptrdiff_t n, ptrdiff_t d),
       (ids, dout, dtable, n, d))
KERNEL(int, sinusoidal_positions, (void *out, ptrdiff_t n, ptrdiff_t d_model), (out, n, d_model))
KERNEL(int, rotary,
       (const struct mt_rows *x, const int64_t *positions, int positions_per_row, const double *frequencies_i, ptrdiff_t half, int inverse,
        const struct mt_rows *y, ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t length, ptrdiff_t d),
       (x, positions, positions_per_row, frequencies_i, half, inverse, y, batch, heads, length, d))

KERNEL(int, cross_entropy,
       (const void *logits, const int64_t *targets, int64_t ignore_index, double label_smoothing, void *losses, void *lse,
        ptrdiff_t n, ptrdiff_t vocab),
       (logits, targets, ignore_index, label_smoothing, losses, lse, n, vocab))
KERNEL(int, cross_entropy_backward,
       (const void *logits, const int64_t *targets, const void *lse, const void *dlosses, int64_t ignore_index,
        double label_smoothing, void *dlogits, ptrdiff_t n, ptrdiff_t vocab),
       (logits, targets, lse, dlosses, ignore_index, label_smoothing, dlogits, n, vocab))
BFLOAT16_KERNEL(int, linear_cross_entropy, (const struct mt_output_layer *layer, void *losses, void *lse), (layer, losses, lse))
BFLOAT16_KERNEL(int, linear_cross_entropy_backward,
                (const struct mt_output_layer *layer, const void *lse, const void *dlosses, void *dx, void *dweight, void *dbias),
                (layer, lse, dlosses, dx, dweight, dbias))

KERNEL(void, adamw,
       (void *param, const void *grad, void *m, void *v, ptrdiff_t n, double lr, double beta1, double beta2, double eps,
        double weight_decay, int64_t step, double grad_scale),
       (param, grad, m, v, n, lr, beta1, beta2, eps, weight_decay, step, grad_scale))
KERNEL(int, sum_of_squares, (const void *x, ptrdiff_t n, double *sum), (x, n, sum))
KERNEL(int, checksum, (const void *x, ptrdiff_t n, uint64_t *sum), (x, n, sum))

KERNEL(int, search,
       (const void *queries, const struct mt_bank *bank, void *scores, int64_t *index, ptrdiff_t batch, ptrdiff_t n, ptrdiff_t m,
        ptrdiff_t d, ptrdiff_t k),
       (queries, bank, scores, index, batch, n, m, d, k))

KERNEL(int, attention,
       (const struct mt_rows *q, const struct mt_block *blocks, const struct mt_attention_sizes *sizes, const struct mt_rows *out,
        void *lse),
       (q, blocks, sizes, out, lse))
KERNEL(int, attention_backward,
       (const struct mt_rows *dout, const struct mt_rows *out, const void *lse, const struct mt_rows *q,
        const struct mt_block *blocks, const struct mt_attention_sizes *sizes, const struct mt_rows *dq),
       (dout, out, lse, q, blocks, sizes, dq))
KERNEL(int, attention_mass,
       (const struct mt_rows *q, const struct mt_block *block, const struct mt_attention_sizes *sizes, const void *lse,
        const uint8_t *asking, void *mass),
       (q, block, sizes, lse, asking, mass))

#undef KERNEL
#undef PACKED_KERNEL
#undef BFLOAT16_KERNEL
