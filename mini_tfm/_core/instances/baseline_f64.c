/* The kernels in double for any processor: 16-byte vectors, which on x86 the compiler turns into SSE2. */
#define ISA baseline
#define REAL_IS_DOUBLE 1
#define VECTOR_BYTES 16
#include "instances/all.h"
