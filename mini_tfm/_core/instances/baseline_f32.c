/* The kernels in float for any processor: 16-byte vectors, which the compiler turns into SSE2 or NEON. */
#define ISA baseline
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 16
#include "instances/before.h"
#include "instances/all.h"
