/* Every kernel for one instruction set and one real, and the table of them. Each instance is a translation unit of its own
 * in which every function is static, so the families need no name mangling. */
#include "simd.h"

#include "families/bfloat16.c"
#include "families/micro.c"
#include "families/gemm.c"
#include "families/stream.c"
#include "families/softmax.c"
#include "families/norm.c"
#include "families/elementwise.c"
#include "families/best.c"
#include "families/quantized.c"
#include "families/packed.c"
#include "families/embedding.c"
#include "families/loss.c"
#include "families/optimizer.c"
#include "families/search.c"
#include "families/attention_tile.c"
#include "families/attention_few.c"
#include "families/attention.c"
#include "families/attention_backward.c"
#include "families/attention_mass.c"

#define PASTE(start, isa, end) start##isa##end
#define NAMED(start, isa, end) PASTE(start, isa, end)

#if ISA_VNNI || ISA_DOT
/* An instruction set that adds to another one for a few kernels: these in place of the other's, and nothing else is compiled
 * again. */
void NAMED(mt_refine_, ISA, )(struct mt_kernels *kernels);
void NAMED(mt_refine_, ISA, )(struct mt_kernels *kernels) {
    kernels->packed_bytes = packed_bytes;
    kernels->pack = pack;
    kernels->unpack = unpack;
    kernels->packed_linear = packed_linear;
    kernels->linear_top_k = linear_top_k;
#if ISA_BF16
    kernels->gemm_bfloat16 = gemm_bfloat16;
    kernels->linear_cross_entropy = linear_cross_entropy;
    kernels->linear_cross_entropy_backward = linear_cross_entropy_backward;
#endif
}
#else
#if REAL_IS_DOUBLE
#define TABLE NAMED(mt_kernels_, ISA, _f64)
#else
#define TABLE NAMED(mt_kernels_, ISA, _f32)
#endif
extern const struct mt_kernels TABLE;
const struct mt_kernels TABLE = {
    .gemm = gemm,
    .gemm_bfloat16 = gemm_bfloat16,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .unpack = unpack,
    .packed_linear = packed_linear,
    .linear_top_k = linear_top_k,
    .softmax = softmax,
    .softmax_backward = softmax_backward,
    .log_softmax = log_softmax,
    .layer_norm = layer_norm,
    .layer_norm_backward = layer_norm_backward,
    .rms_norm = rms_norm,
    .rms_norm_backward = rms_norm_backward,
    .activation = activation,
    .activation_backward = activation_backward,
    .dropout = dropout,
    .embedding = embedding,
    .embedding_backward = embedding_backward,
    .sinusoidal_positions = sinusoidal_positions,
    .rotary = rotary,
    .cross_entropy = cross_entropy,
    .cross_entropy_backward = cross_entropy_backward,
    .linear_cross_entropy = linear_cross_entropy,
    .linear_cross_entropy_backward = linear_cross_entropy_backward,
    .adamw = adamw,
    .sum_of_squares = sum_of_squares,
    .search = search,
    .attention = attention,
    .attention_backward = attention_backward,
    .attention_mass = attention_mass,
};
#endif
