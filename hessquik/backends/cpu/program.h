/* A program as the kernel reads it: what hessquik.steps says, with every array's place worked out.
 *
 * It is one block of words, which are numbers of eight bytes, without addresses, so that networks that differ in their
 * weights alone may share it. The structures are lists of fields, from which both the C types and the table by which
 * Python packs them are made: names and order are written once.
 */

#ifndef HESSQUIK_PROGRAM_H
#define HESSQUIK_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

typedef int64_t I;

/* Where an array begins. ABSENT: there is none. */
enum { ABSENT, CONSTANT, EXTERNAL, TILE, SHARED };
#define SPACES(F) F(ABSENT) F(CONSTANT) F(EXTERNAL) F(TILE) F(SHARED)

#define KINDS(F) F(Product) F(Map) F(SumProducts) F(Contract) F(Congruence) F(Clear)
#define KIND_CODE(name) IS_##name,
enum { KINDS(KIND_CODE) };

/* The primitives of hessquik.pointwise. */
#define PRIMITIVES(F) \
    F(add) F(sub) F(mul) F(div) F(neg) F(abs) F(sqrt) F(maximum) F(minimum) F(gt) F(ge) F(where) \
    F(exp) F(expm1) F(log) F(log1p) F(tanh) F(sigmoid) F(erf) F(ndtr) F(sin) F(cos) F(atan)
#define PRIMITIVE_CODE(name) OP_##name,
enum { PRIMITIVES(PRIMITIVE_CODE) };

/* An array (rows, outer, inner, columns).
 *   constant   which of the program's constants
 *   external   which of the call's arrays
 *   base       of TILE memory, numbers per row of the tile; of SHARED memory, numbers
 *   start      numbers from the beginning of a row
 *   row, outer, inner, column   numbers between neighbours
 *   is_whole   the vector that holds the last column may be read or written whole */
#define ARRAY_FIELDS(F) \
    F(I, space) F(I, constant) F(I, external) F(I, base) F(I, start) F(I, row) F(I, outer) F(I, inner) F(I, column) \
    F(I, is_whole)

/* What every step begins with.
 *   size        in words, with the lists behind it
 *   is_shared   all rows share what it writes */
#define STEP_FIELDS(F) F(I, kind) F(I, size) F(I, is_shared)

/* C = A B + D, then E = alpha C * S + F * T.
 *   panel       numbers between panels of B's columns
 *   packs       B has to be packed first, into the scratch memory
 *   is_merged   the inner entries of all rows are one matrix
 *   period      rows of that matrix after which D, E, S, F and T go on to the next row
 *   is_plain    all columns are neighbours */
#define PRODUCT_FIELDS(F) \
    STEP_FIELDS(F) F(Array, a) F(Array, b) F(Array, add) F(Array, out) F(Array, scaled) F(Array, by) F(Array, term) \
    F(Array, term_by) F(double, alpha) F(I, outer) F(I, inner) F(I, depth) F(I, columns) F(I, panel) F(I, packs) \
    F(I, is_merged) F(I, period) F(I, is_plain)

/* Pointwise instructions. Behind it are its inputs, instructions, outputs and constants.
 * Registers: inputs, results, constants.
 *   width       numbers from one inner entry to the next where all are neighbours; a multiple of the vector
 *   slots       chunks of scratch memory that copies and results use between them */
#define MAP_FIELDS(F) \
    STEP_FIELDS(F) F(I, outer) F(I, inner) F(I, columns) F(I, width) F(I, slots) F(I, inputs) F(I, instructions) \
    F(I, outputs) F(I, constants)
/* is_run: every inner entry is `width` behind the one before it, over all rows. */
#define INPUT_FIELDS(F) F(Array, array) F(I, slot) F(I, is_run)
#define INSTRUCTION_FIELDS(F) F(I, op) F(I, slot) F(I, a) F(I, b) F(I, c)
/* is_direct: the instruction may write it at once. */
#define OUTPUT_FIELDS(F) F(Array, array) F(I, value) F(I, is_run) F(I, is_direct)
#define NUMBER_FIELDS(F) F(double, value)

/* Sums over the inner axis; over the columns, to which D is added; and J diag(c_m) J^T. */
#define SUM_PRODUCTS_FIELDS(F) STEP_FIELDS(F) F(Array, a) F(Array, b) F(Array, out) F(I, outer) F(I, inner) F(I, columns)
#define CONTRACT_FIELDS(F) \
    STEP_FIELDS(F) F(Array, a) F(Array, b) F(Array, add) F(Array, out) F(I, left) F(I, right) F(I, columns) \
    F(I, is_merged)
#define CONGRUENCE_FIELDS(F) \
    STEP_FIELDS(F) F(Array, a) F(Array, b) F(Array, out) F(I, tangents) F(I, outputs) F(I, columns) F(I, by_pairs)

/* Zeros behind the columns of an array that the step before it wrote. */
#define CLEAR_FIELDS(F) STEP_FIELDS(F) F(Array, array) F(I, outer) F(I, inner) F(I, count)

/* Behind it are the steps, first those that run once.
 *   size      in words, with the steps
 *   scratch   bytes */
#define PROGRAM_FIELDS(F) \
    F(I, size) F(I, is_double) F(I, vector_bytes) F(I, tile_rows) F(I, tile_size) F(I, shared_size) F(I, scratch) \
    F(I, constants) F(I, arrays) F(I, onces) F(I, steps)

#define FIELD(type, name) type name;
typedef struct { ARRAY_FIELDS(FIELD) } Array;
typedef struct { STEP_FIELDS(FIELD) } Step;
typedef struct { PRODUCT_FIELDS(FIELD) } Product;
typedef struct { INPUT_FIELDS(FIELD) } Input;
typedef struct { INSTRUCTION_FIELDS(FIELD) } Instruction;
typedef struct { OUTPUT_FIELDS(FIELD) } Output;
typedef struct { NUMBER_FIELDS(FIELD) } Number;
typedef struct { MAP_FIELDS(FIELD) } Map;
typedef struct { SUM_PRODUCTS_FIELDS(FIELD) } SumProducts;
typedef struct { CONTRACT_FIELDS(FIELD) } Contract;
typedef struct { CONGRUENCE_FIELDS(FIELD) } Congruence;
typedef struct { CLEAR_FIELDS(FIELD) } Clear;
typedef struct { PROGRAM_FIELDS(FIELD) } Program;
#undef FIELD

#define STRUCTURES(F) \
    F(Array, ARRAY_FIELDS) F(Product, PRODUCT_FIELDS) F(Input, INPUT_FIELDS) F(Instruction, INSTRUCTION_FIELDS) \
    F(Output, OUTPUT_FIELDS) F(Number, NUMBER_FIELDS) F(Map, MAP_FIELDS) F(SumProducts, SUM_PRODUCTS_FIELDS) \
    F(Contract, CONTRACT_FIELDS) F(Congruence, CONGRUENCE_FIELDS) F(Clear, CLEAR_FIELDS) F(Program, PROGRAM_FIELDS)

/* Bytes of a chunk that a map's instructions go over; vectors per panel of a packed matrix; rows of pairs, and of dot
 * products, at once. */
enum { CHUNK_BYTES = 2048, NV = 2, PAIRS = 24, BLOCK = 4 };

/* Bytes of this machine's vectors. */
I hessquik_vector_bytes(void);

/* Compute rows start to stop, given the addresses of the constants and of the call's arrays; 0, or -1 if there is no
 * memory for a tile. */
int hessquik_run(const Program *program, void *const *constants, void *const *arrays, I start, I stop);

#endif
