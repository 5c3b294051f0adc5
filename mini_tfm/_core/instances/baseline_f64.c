/* The kernels in double for any processor: 16-byte vectors, which the compiler turns into SSE2 or NEON. */
#define ISA baseline
#define REAL_IS_DOUBLE 1
#define VECTOR_BYTES 16
#include "instances/before.h"
#include "instances/all.h"
