/* The kernels in float that dot products of bfloat16 make faster than those of avx512vnni are: products whose factors are rounded
 * to it (Cooper Lake, Sapphire Rapids, Zen 4 and newer, all of which have VNNI, too). */
#define ISA avx512bf16
#define ISA_AVX512 1
#define ISA_VNNI 1
#define ISA_BF16 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 64
#include "instances/all.h"
