/* The kernels in float for AVX2, FMA and F16C (x86-64-v3: Haswell, Zen and newer). */
#define ISA avx2
#define ISA_AVX2 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 32
#include "instances/all.h"
