/* The kernels in float that AMX makes faster than those of avx512bf16 are: products of several rows with int8 weights (Sapphire
 * Rapids and newer). */
#define ISA avx512amx
#define ISA_AVX512 1
#define ISA_VNNI 1
#define ISA_BF16 1
#define ISA_AMX 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 64
#include "instances/all.h"
