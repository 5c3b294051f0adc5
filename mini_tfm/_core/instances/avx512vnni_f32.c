/* The kernels in float that VNNI makes faster than those of avx512 are: products with int8 weights (Cascade Lake, Zen 4 and
 * newer). */
#define ISA avx512vnni
#define ISA_AVX512 1
#define ISA_VNNI 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 64
#include "instances/all.h"
