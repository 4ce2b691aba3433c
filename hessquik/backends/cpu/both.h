/* The steps for both kinds of numbers, and vectors of VECTOR_BYTES of processors with the features TARGET. */

#define REAL float
#include "steps.h"
#undef REAL
#define REAL double
#include "steps.h"
#undef REAL
#undef VECTOR_BYTES
#undef TARGET
