/* The kernels in float for AVX2, FMA and F16C (x86-64-v3: Haswell, Zen and newer). */
#define ISA avx2
#define ISA_AVX2 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 32
#include <immintrin.h>
#include "instances/before.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "instances/all.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
