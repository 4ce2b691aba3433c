/* Runs a program on a CPU: one call for any number of rows, tile by tile.
 *
 * Plain C with the vectors of GCC and clang; no Python, no torch. The processor's widest vectors are chosen when the
 * kernel is used, so that one build serves every x86-64 machine.
 */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "program.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
/* Functions of steps.h, for processors with the features TARGET. */
#define FUNCTION static TARGET
#define APART static __attribute__((noinline)) TARGET
#define INLINE static inline __attribute__((always_inline)) TARGET

/* A product that is rounded before it is added to: else the compiler makes one operation of both here and two there. */
#if defined(__x86_64__)
#define ROUND(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define ROUND(v) __asm__("" : "+w"(v))
#else
#define ROUND(v) __asm__("" : "+m"(v))
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VI){__VA_ARGS__})
#endif
/* The first and the second halves of two vectors, interleaved. */
#define LOW_2 0, 2
#define HIGH_2 1, 3
#define LOW_4 0, 4, 1, 5
#define HIGH_4 2, 6, 3, 7
#define LOW_8 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_8 4, 12, 5, 13, 6, 14, 7, 15
#define LOW_16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)

/* ---- What is another one for each REAL, float or double, and VECTOR_BYTES ---- */

/* x with a suffix of its own. */
#define NAME_(x, real, bytes) x##_##real##_##bytes
#define NAME_OF(x, real, bytes) NAME_(x, real, bytes)
#define NAME(x) NAME_OF(x, REAL, VECTOR_BYTES)
#define IS_float 0
#define IS_double 1
#define IS_DOUBLE JOINED(IS_, REAL)
#define INT_float int32_t
#define INT_double int64_t
#define INT JOINED(INT_, REAL)
#define COEFFICIENTS(name) JOINED(name##_, REAL)

/* A vector, integers of the same size, and how many numbers it holds. */
#define V NAME(vector)
#define VI NAME(integers)
#define VL ((I)LANES)
#define LANES_float_64 16
#define LANES_double_64 8
#define LANES_float_32 8
#define LANES_double_32 4
#define LANES_float_16 4
#define LANES_double_16 2
#define LANES NAME(LANES)

#define SPLAT(a) NAME(splat)((REAL)(a))
#define SELECT(mask, a, b) NAME(select)((VI)(mask), a, b)
#define POLYNOMIAL(p, x, coefficients) \
    V p = SPLAT(coefficients[sizeof coefficients / sizeof *coefficients - 1]); \
    UNROLL for (int i_ = sizeof coefficients / sizeof *coefficients - 2; i_ >= 0; i_--) p = p * (x) + coefficients[i_]

/* Rows of the matrix product's block, as many as its sums fit the registers, and of one that is twice as wide. */
#define ROWS_64 8
#define ROWS_32 6
#define ROWS_16 6
#define MR JOINED(ROWS_, VECTOR_BYTES)
#define FEW_ROWS_64 4
#define FEW_ROWS_32 3
#define FEW_ROWS_16 3
#define FEW_ROWS JOINED(FEW_ROWS_, VECTOR_BYTES)

enum { MOST_NV = 4 * NV, MOST_SUMS = 16 };

/* What a program runs with: memory, the call's arrays and the tile. */
typedef struct {
    void *tile, *shared, *scratch;
    void *const *arrays, *const *constants;
    I tile_rows, first, rows;
} Call;

static inline const Step *behind(const Step *step) { return (const Step *)((const I *)step + step->size); }

#define FOR_EACH_UP_TO_3(do, nv) do(1, nv) do(2, nv) do(3, nv)
#define FOR_EACH_UP_TO_4(do, nv) FOR_EACH_UP_TO_3(do, nv) do(4, nv)
#define FOR_EACH_UP_TO_6(do, nv) FOR_EACH_UP_TO_4(do, nv) do(5, nv) do(6, nv)
#define FOR_EACH_UP_TO_8(do, nv) FOR_EACH_UP_TO_6(do, nv) do(7, nv) do(8, nv)
#define FOR_EACH_UP_TO(count) JOINED(FOR_EACH_UP_TO_, count)

/* HESSQUIK_GENERIC: only the vectors that every processor has, which compile in a fraction of the time. */
#if defined(__x86_64__) && !defined(HESSQUIK_GENERIC)
#define HAS_WIDE_VECTORS
/* The first `count` lanes, fewer than all. */
#define BITS(count) ((1u << (count)) - 1)
#define MASKED_LOAD_float_64(p, count) (V) _mm512_maskz_loadu_ps((__mmask16)BITS(count), p)
#define MASKED_LOAD_double_64(p, count) (V) _mm512_maskz_loadu_pd((__mmask8)BITS(count), p)
#define MASKED_LOAD_float_32(p, count) (V) _mm256_maskload_ps(p, (__m256i)NAME(lanes)(count))
#define MASKED_LOAD_double_32(p, count) (V) _mm256_maskload_pd(p, (__m256i)NAME(lanes)(count))
#define MASKED_STORE_float_64(p, v, count) _mm512_mask_storeu_ps(p, (__mmask16)BITS(count), (__m512)(v))
#define MASKED_STORE_double_64(p, v, count) _mm512_mask_storeu_pd(p, (__mmask8)BITS(count), (__m512d)(v))
#define MASKED_STORE_float_32(p, v, count) _mm256_maskstore_ps(p, (__m256i)NAME(lanes)(count), (__m256)(v))
#define MASKED_STORE_double_32(p, v, count) _mm256_maskstore_pd(p, (__m256i)NAME(lanes)(count), (__m256d)(v))

#define HAS_MASKS
#define VECTOR_BYTES 64
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512cd,avx2,fma,bmi,bmi2")))
#include "both.h"
#define VECTOR_BYTES 32
#define TARGET __attribute__((target("avx2,fma,bmi,bmi2")))
#include "both.h"
#undef HAS_MASKS
#endif

/* The vectors that every processor has. */
#define VECTOR_BYTES 16
#define TARGET
#include "both.h"

I hessquik_vector_bytes(void) {
#ifdef HAS_WIDE_VECTORS
    __builtin_cpu_init();
    const int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512cd");
    if (has_avx2) return has_avx512 ? 64 : 32;
#endif
    return 16;
}

/* ---- Memory of calls, which is kept for later ones, whichever thread makes them ---- */

typedef struct {
    size_t size;
} Block;
/* One for each thread that calls at once: it mostly finds the one that it used last, which is in its cache. */
enum { MOST_KEPT = 16 };
static const size_t MOST_KEPT_BYTES = (size_t)64 << 20;
static Block *kept[MOST_KEPT];

static Block *acquire(size_t size) {
    Block *block = NULL;
    for (int i = 0; i < MOST_KEPT && !block; i++) block = __atomic_exchange_n(&kept[i], NULL, __ATOMIC_ACQ_REL);
    if (block && block->size >= size) return block;
    free(block);
    if (posix_memalign((void **)&block, 64, size)) return NULL;
    block->size = size;
    return block;
}

static void release(Block *block) {
    for (int i = 0; i < MOST_KEPT && block->size <= MOST_KEPT_BYTES; i++) {
        Block *none = NULL;
        if (__atomic_compare_exchange_n(&kept[i], &none, block, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
    }
    free(block);
}

/* Numbers below the smallest normal one count as zero, whatever the calling thread's setting, which is returned. */
static uint64_t flush_denormals(void) {
#if defined(__x86_64__)
    const uint64_t mode = _mm_getcsr();
    _mm_setcsr((unsigned)mode | 0x8040);
    return mode;
#elif defined(__aarch64__)
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | (UINT64_C(1) << 24)));
    return mode;
#else
    return 0;
#endif
}

static void restore(uint64_t mode) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)mode);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#else
    (void)mode;
#endif
}

int hessquik_run(const Program *p, void *const *constants, void *const *arrays, I start, I stop) {
    if (start >= stop) return 0;
    const I most = p->tile_rows < stop - start ? p->tile_rows : stop - start;
    const size_t real = p->is_double ? 8 : 4, head = 64;
    /* The last array may be read some vectors beyond its end. */
    const size_t shared = ((size_t)p->shared_size * real + 63) & ~(size_t)63;
    const size_t tile = (((size_t)p->tile_size * (size_t)most + 64) * real + 63) & ~(size_t)63;
    Block *block = acquire(head + shared + tile + (size_t)p->scratch);
    if (!block) return -1;
    char *memory = (char *)block + head;
    Call call = {memory + shared, memory, memory + shared + tile, arrays, constants, most, start, most};
    const uint64_t mode = flush_denormals();
    void (*run)(const Program *, Call *, I) = p->is_double ? run_double_16 : run_float_16;
#ifdef HAS_WIDE_VECTORS
    if (p->vector_bytes == 64) run = p->is_double ? run_double_64 : run_float_64;
    if (p->vector_bytes == 32) run = p->is_double ? run_double_32 : run_float_32;
#endif
    run(p, &call, stop);
    restore(mode);
    release(block);
    return 0;
}
