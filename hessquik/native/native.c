/* A program of hessquik.program, run on a CPU: one call for any number of rows, tile by tile.
 *
 * Plain C with GCC's vectors; no Python, no torch, no allocation. The processor's widest vectors are chosen when
 * the library is used, so that one build serves every x86-64 machine.
 */

#include <stdint.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define I int64_t
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

/* A product that is rounded before it is added to: else the compiler makes one operation of both here and two there. */
#if defined(__x86_64__)
#define ROUND(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define ROUND(v) __asm__("" : "+w"(v))
#else
#define ROUND(v) __asm__("" : "+m"(v))
#endif

enum { WORKSPACE = 0 };
enum { MULTIPLY, ACTIVATE, SCALE, SUM_PRODUCTS, CONTRACT, CONGRUENCE };
enum { TANH, ANTI_TANH, SIGMOID, SOFTPLUS, QUADRATIC };
enum { NV = 2, MOST_NV = 4 * NV, MOST_SUMS = 16, BLOCK = 4 };

/* An array (rows, outer, inner, columns): steps between neighbours along each axis, in numbers. */
typedef struct {
    I base, offset, column, row, outer, inner, column_step;
} Operand;

typedef struct {
    I op, kind, outer, inner, width, depth;
    I is_followed; /* the next step scales this one's results, and is carried out with it */
    double alpha, beta;
    Operand operand[5];
} Step;

typedef struct {
    const Step *once; /* what holds for all tiles */
    I onces;
    const Step *step;
    I steps;
    void *const *bases; /* the workspace, null for addresses as they are, inputs and results */
    void *scratch;
    I first, stop, tile_rows;
    I zeroed; /* numbers of the workspace that have to be zero at the start */
} Call;

#define FOR_EACH_ROW_COUNT_4(do, nv) do(1, nv) do(2, nv) do(3, nv) do(4, nv)
#define FOR_EACH_ROW_COUNT_6(do, nv) FOR_EACH_ROW_COUNT_4(do, nv) do(5, nv) do(6, nv)
#define FOR_EACH_ROW_COUNT_8(do, nv) FOR_EACH_ROW_COUNT_6(do, nv) do(7, nv) do(8, nv)

#define GENERIC_BYTES 16
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define FOR_EACH_ROW_COUNT FOR_EACH_ROW_COUNT_8
#define VECTOR_BYTES 64
#define MR 8
#define REAL float
#define INT int32_t
#define NAME(x) x##_float_v4
#include "kernels.h"
#undef REAL
#undef INT
#undef NAME
#define REAL double
#define INT int64_t
#define NAME(x) x##_double_v4
#include "kernels.h"
#undef REAL
#undef INT
#undef NAME
#undef VECTOR_BYTES
#undef MR
#undef FOR_EACH_ROW_COUNT
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FOR_EACH_ROW_COUNT FOR_EACH_ROW_COUNT_6
#define VECTOR_BYTES 32
#define MR 6
#define REAL float
#define INT int32_t
#define NAME(x) x##_float_v3
#include "kernels.h"
#undef REAL
#undef INT
#undef NAME
#define REAL double
#define INT int64_t
#define NAME(x) x##_double_v3
#include "kernels.h"
#undef REAL
#undef INT
#undef NAME
#undef VECTOR_BYTES
#undef MR
#undef FOR_EACH_ROW_COUNT
#pragma GCC pop_options
#endif

#define FOR_EACH_ROW_COUNT FOR_EACH_ROW_COUNT_6
#define VECTOR_BYTES GENERIC_BYTES
#define MR 6
#define REAL float
#define INT int32_t
#define NAME(x) x##_float
#include "kernels.h"
#undef REAL
#undef INT
#undef NAME
#define REAL double
#define INT int64_t
#define NAME(x) x##_double
#include "kernels.h"

/* What steps and calls mean; __init__.py has the same number, and both change with every change of meaning. */
I hessquik_revision(void) { return 3; }

/* Bytes of this machine's vectors; level, if not 0, asks for narrower ones (tests do). */
I hessquik_vector_bytes(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return 64;
    if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
    return GENERIC_BYTES;
}

/* Run the steps. Numbers below the smallest normal one count as zero, whatever the calling thread's setting. */
void hessquik_run(const Call *call, I is_double, I vector_bytes) {
#if defined(__SSE__)
    const unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    switch (vector_bytes) {
#if defined(__x86_64__)
    case 64: (is_double ? run_double_v4 : run_float_v4)(call); break;
    case 32: (is_double ? run_double_v3 : run_float_v3)(call); break;
#endif
    default: (is_double ? run_double : run_float)(call);
    }
#if defined(__SSE__)
    _mm_setcsr(mode);
#endif
}
