/* The kernels in float for any processor: 16-byte vectors, which on x86 the compiler turns into SSE2. */
#define ISA baseline
#define REAL_IS_DOUBLE 0
#define VECTOR_BYTES 16
#include "instances/all.h"
