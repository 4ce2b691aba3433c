/* A program as the kernel reads it: what hessquik.steps says, with every array's place worked out.
 *
 * It is one block of words, which are numbers of eight bytes, without addresses, so that networks that differ in their
 * weights alone may share it. Names and order of everything stand here once: lists make the C types and constants, and
 * the text from which Python learns them (structures.py).
 */

#ifndef HESSQUIK_PROGRAM_H
#define HESSQUIK_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

typedef int64_t I;

/* Constants by name, numbered from 0: where an array begins, which kind a step is, and the primitives of
 * hessquik.pointwise. ABSENT: there is no array. */
#define SPACES(F) F(ABSENT) F(CONSTANT) F(EXTERNAL) F(TILE) F(SHARED)
#define KINDS(F) F(Product) F(Map) F(SumProducts) F(Contract) F(Clear)
#define PRIMITIVES(F) \
    F(add) F(sub) F(mul) F(div) F(neg) F(abs) F(sqrt) F(maximum) F(minimum) F(gt) F(ge) F(where) \
    F(exp) F(expm1) F(log) F(log1p) F(tanh) F(sigmoid) F(erf) F(ndtr) F(sin) F(cos) F(atan)

/* Bytes of a chunk that a map's instructions go over; vectors per panel of a packed matrix; rows of pairs, and of dot
 * products, at once; axes of a bound result. */
#define SIZES(F) F(CHUNK_BYTES, 2048) F(NV, 2) F(PAIRS, 24) F(BLOCK, 4) F(MOST_AXES, 6)

/* What every step begins with.
 *   size        in words, with the lists behind it
 *   is_shared   all rows share what it writes */
#define STEP_FIELDS(F) F(I, kind) F(I, size) F(I, is_shared)

#define STRUCTURES(S, F) \
    /* An array (rows, outer, inner, columns). \
     *   constant   which of the program's constants \
     *   external   which of the call's arrays \
     *   base       of TILE memory, numbers per row of the tile; of SHARED memory, numbers \
     *   start      numbers from the beginning of a row \
     *   row, outer, inner, column   numbers between neighbours \
     *   is_whole   the vector that holds the last column may be read or written whole */ \
    S(Array, F(I, space) F(I, constant) F(I, external) F(I, base) F(I, start) F(I, row) F(I, outer) F(I, inner) \
      F(I, column) F(I, is_whole)) \
    S(Step, STEP_FIELDS(F)) \
    /* C = A B + D, then E = alpha C * S + F * T. \
     *   panel       numbers between panels of B's columns \
     *   is_merged   the inner entries of all rows are one matrix \
     *   period      rows of that matrix after which D, E, S, F and T go on to the next row \
     *   is_plain    all columns are neighbours */ \
    S(Product, STEP_FIELDS(F) F(Array, a) F(Array, b) F(Array, add) F(Array, out) F(Array, scaled) F(Array, by) \
      F(Array, term) F(Array, term_by) F(double, alpha) F(I, outer) F(I, inner) F(I, depth) F(I, columns) F(I, panel) \
      F(I, is_merged) F(I, period) F(I, is_plain)) \
    /* Pointwise instructions. Behind it are its inputs, instructions, outputs and constants. \
     * Registers: inputs, results, constants. \
     *   width       numbers from one inner entry to the next where all are neighbours; a multiple of the vector \
     *   slots       chunks of scratch memory that copies and results use between them \
     *   is_run      every inner entry is `width` behind the one before it, over all rows \
     *   is_direct   the instruction may write it at once */ \
    S(Map, STEP_FIELDS(F) F(I, outer) F(I, inner) F(I, columns) F(I, width) F(I, slots) F(I, inputs) \
      F(I, instructions) F(I, outputs) F(I, constants)) \
    S(Input, F(Array, array) F(I, slot) F(I, is_run)) \
    S(Instruction, F(I, op) F(I, slot) F(I, a) F(I, b) F(I, c)) \
    S(Output, F(Array, array) F(I, value) F(I, is_run) F(I, is_direct)) \
    S(Number, F(double, value)) \
    /* C[o, 0, w] = sum over the inner axis of A (* B). */ \
    S(SumProducts, STEP_FIELDS(F) F(Array, a) F(Array, b) F(Array, out) F(I, outer) F(I, inner) F(I, columns)) \
    /* C[i, j, k] = sum over the columns w of A[i, w] W[k, w] B[j, w] (+ D[i, j]). \
     *   left, right, outputs   extents of C; with W, B is A and C is symmetric, and without there is one output \
     *   is_merged      the rows of A, C and D of all rows are those of one matrix \
     *   by_pairs       by products of pairs, for all outputs at once */ \
    S(Contract, STEP_FIELDS(F) F(Array, a) F(Array, b) F(Array, weights) F(Array, add) F(Array, out) F(I, left) \
      F(I, right) F(I, outputs) F(I, columns) F(I, is_merged) F(I, by_pairs)) \
    /* Zeros behind the columns of an array that the step before it wrote. */ \
    S(Clear, STEP_FIELDS(F) F(Array, array) F(I, outer) F(I, inner) F(I, count)) \
    /* Behind it are the steps, first those that run once. \
     *   size      in words, with the steps \
     *   scratch   bytes */ \
    S(Program, F(I, size) F(I, is_double) F(I, vector_bytes) F(I, tile_rows) F(I, tile_size) F(I, shared_size) \
      F(I, scratch) F(I, constants) F(I, arrays) F(I, onces) F(I, steps))

#define SPACE_CODE(name) name,
#define KIND_CODE(name) IS_##name,
#define PRIMITIVE_CODE(name) OP_##name,
#define SIZE_CODE(name, value) name = value,
enum { SPACES(SPACE_CODE) };
enum { KINDS(KIND_CODE) };
enum { PRIMITIVES(PRIMITIVE_CODE) };
enum { SIZES(SIZE_CODE) };
#define FIELD(type, name) type name;
#define STRUCTURE(name, fields) typedef struct { fields } name;
STRUCTURES(STRUCTURE, FIELD)

/* Bytes of this machine's vectors. */
I hessquik_vector_bytes(void);

/* Compute rows start to stop, given the addresses of the constants and of the call's arrays; 0, or -1 if there is no
 * memory for a tile. */
int hessquik_run(const Program *program, void *const *constants, void *const *arrays, I start, I stop);

#endif
