/* The kernels in float that dot products of bytes make faster than those of neon are: products with int8 weights
 * (Cortex-A76, Neoverse N1, Apple M1 and newer). */
#define ISA neondot
#define ISA_NEON 1
#define ISA_DOT 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 16
#include "instances/all.h"
