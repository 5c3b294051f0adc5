/* The kernels in float for AVX-512 F, BW, DQ, VL and FMA (x86-64-v4: Skylake-X, Zen 4 and newer). */
#define ISA avx512
#define ISA_AVX512 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 64
#include "instances/all.h"
