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
#include "families/checksum.c"
#include "families/search.c"
#include "families/attention_tile.c"
#include "families/attention_few.c"
#include "families/attention.c"
#include "families/attention_backward.c"
#include "families/attention_mass.c"

#define PASTE(start, isa, end) start##isa##end
#define NAMED(start, isa, end) PASTE(start, isa, end)

#if ISA_VNNI || ISA_DOT
#define SET(result, name, parameters, arguments) kernels->name = name;
#define SKIP(result, name, parameters, arguments)

/* An instruction set that adds to another one for a few kernels: these in place of the other's, and nothing else is compiled
 * again. */
void NAMED(mt_refine_, ISA, )(struct mt_kernels *kernels);
void NAMED(mt_refine_, ISA, )(struct mt_kernels *kernels) {
#define KERNEL SKIP
#define PACKED_KERNEL SET
#if ISA_BF16
#define BFLOAT16_KERNEL SET
#else
#define BFLOAT16_KERNEL SKIP
#endif
#include "kernels.h"
}
#else
#if REAL_IS_DOUBLE
#define TABLE NAMED(mt_kernels_, ISA, _f64)
#else
#define TABLE NAMED(mt_kernels_, ISA, _f32)
#endif
extern const struct mt_kernels TABLE;
const struct mt_kernels TABLE = {
#define KERNEL(result, name, parameters, arguments) .name = name,
#include "kernels.h"
};
#endif
