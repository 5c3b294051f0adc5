/* The kernels in float for NEON, which every 64-bit ARM has. */
#define ISA neon
#define ISA_NEON 1
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 16
#include "instances/all.h"
