/* The steps of a program for one kind of number and one kind of processor.
 *
 * Included by kernel.c for each REAL and VECTOR_BYTES, by which it names everything.
 *
 * Every number of a row is computed by the same operations in the same order wherever the row stands: products
 * add up over their inner index from its start to its end, never over rows, and no loop over rows has another
 * kernel for its last few. That is why the rows computed beside it cannot change a row's bits.
 */

#include "coefficients.h"

typedef REAL V __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef INT VI __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef V NAME(unaligned) __attribute__((aligned(sizeof(REAL))));
typedef VI NAME(unaligned_integers) __attribute__((aligned(sizeof(REAL))));

INLINE V NAME(load)(const REAL *p) { return *(const NAME(unaligned) *)p; }
INLINE void NAME(store)(REAL *p, V v) { *(NAME(unaligned) *)p = v; }
INLINE V NAME(splat)(REAL a) { return a - (V){0}; } /* a + 0 would not be a for a = -0 */
INLINE V NAME(select)(VI mask, V a, V b) { return (V)((mask & (VI)a) | (~mask & (VI)b)); }

/* All bits in the first `count` lanes, at most all. */
INLINE VI NAME(lanes)(I count) {
    static const INT bits[2 * LANES] = {[0 ... LANES - 1] = -1};
    return *(const NAME(unaligned_integers) *)(bits + LANES - (count < VL ? count : VL));
}

/* The first `count` numbers of a vector, at least one, and zeros. */
INLINE V NAME(load_some)(const REAL *p, I count) {
    if (count >= VL) return NAME(load)(p);
#ifdef HAS_MASKS
    return NAME(MASKED_LOAD)(p, count);
#else
    V v = {0};
    for (I l = 0; l < count; l++) v[l] = p[l];
    return v;
#endif
}

INLINE void NAME(store_some)(REAL *p, V v, I count) {
    if (count >= VL) {
        NAME(store)(p, v);
        return;
    }
#ifdef HAS_MASKS
    NAME(MASKED_STORE)(p, v, count);
#else
    for (I l = 0; l < count; l++) p[l] = v[l];
#endif
}

/* Store the numbers and, where the whole vector may be written, zeros behind them. */
INLINE void NAME(store_last)(REAL *p, V v, I count, I is_whole) {
    if (is_whole) NAME(store)(p, (V)((VI)v & NAME(lanes)(count)));
    else NAME(store_some)(p, v, count);
}

/* Where an array begins for the first row of the tile, or null if there is none. */
INLINE REAL *NAME(at)(const Call *call, const Array *a) {
    switch (a->space) {
    case CONSTANT: return (REAL *)call->constants[a->constant] + a->start;
    case EXTERNAL: return (REAL *)call->arrays[a->external] + a->start + call->first * a->row;
    case TILE: return (REAL *)call->tile + a->base * call->tile_rows + a->start;
    case SHARED: return (REAL *)call->shared + a->base + a->start;
    default: return 0;
    }
}

#include "pointwise.h"

/* ---- Products ---- */

/* An array that a product reads or writes beside its matrices: its row `i` belongs to row i / period of the tile. */
typedef struct {
    REAL *at;
    I row, inner, column;
} NAME(Beside);

/* C = A B (+ D), whole matrices; B is in panels of NV vectors of columns. Then, while C is in registers,
 * E = alpha C (* S) (+ F (* T)). */
typedef struct {
    I rows, columns, depth;
    const REAL *A;
    I a_row, a_depth;
    const REAL *B;
    I b_panel, b_depth;
    REAL *C; /* null if only the scaling reads it */
    I c_row, c_column, c_is_whole;
    REAL alpha;
    I period, is_plain, e_is_whole;
    NAME(Beside) D, E, S, F, T;
} NAME(Matrices);

INLINE REAL *NAME(beside)(const NAME(Beside) *b, I period, I i, I j) {
    const I row = (uint32_t)i / (uint32_t)period; /* of 32 bits, which divide several times faster */
    return b->at ? b->at + row * b->row + (i - row * period) * b->inner + j * b->column : 0;
}

/* Write the sums of mr rows from i and nv vectors from j where columns lie apart. */
APART void NAME(write_apart)(
    const NAME(Matrices) *p, I mr, I nv, I i0, I j0, const V *sum
) {
    for (I i = i0; i < i0 + mr; i++)
        for (I v = 0; v < nv; v++, sum++)
            for (I l = 0, j = j0 + v * VL; l < VL && j < p->columns; l++, j++) {
                REAL c = (*sum)[l];
                if (p->D.at) c += *NAME(beside)(&p->D, p->period, i, j);
                if (p->C) p->C[i * p->c_row + j * p->c_column] = c;
                if (!p->E.at) continue;
                REAL e = p->alpha * c;
                if (p->S.at) e *= *NAME(beside)(&p->S, p->period, i, j);
                ROUND(e);
                if (p->F.at) {
                    REAL f = *NAME(beside)(&p->F, p->period, i, j);
                    if (p->T.at) f *= *NAME(beside)(&p->T, p->period, i, j);
                    ROUND(f);
                    e += f;
                }
                *NAME(beside)(&p->E, p->period, i, j) = e;
            }
}

/* Write the sums of a block; of the last vector, if columns are missing, only those that there are. */
INLINE void NAME(write)(
    const int mr, const int nv, const int is_partial, const NAME(Matrices) *p, I i0, I j0, V *sum
) {
    const I count = p->columns - j0 - (nv - 1) * VL, period = p->period;
#define LOAD(p, v) (is_partial && (v) == nv - 1 ? NAME(load_some)((p) + (v) * VL, count) : NAME(load)((p) + (v) * VL))
#define STORE(p, v, x, is_whole) \
    if (is_partial && (v) == nv - 1) NAME(store_last)((p) + (v) * VL, x, count, is_whole); \
    else NAME(store)((p) + (v) * VL, x)
    const I begin = (uint32_t)i0 % (uint32_t)period;
    if (p->D.at) {
        const REAL *D = NAME(beside)(&p->D, period, i0, j0);
        const I step = p->D.inner, jump = p->D.row - (period - 1) * step;
        I place = begin;
        UNROLL for (int i = 0; i < mr; i++) {
            UNROLL for (int v = 0; v < nv; v++) sum[i * nv + v] += LOAD(D, v);
            const int is_last = ++place == period;
            place = is_last ? 0 : place;
            D += is_last ? jump : step;
        }
    }
    if (p->C)
        UNROLL for (int i = 0; i < mr; i++)
            UNROLL for (int v = 0; v < nv; v++) {
                STORE(p->C + (i0 + i) * p->c_row + j0, v, sum[i * nv + v], p->c_is_whole);
            }
    if (!p->E.at) return;
    const NAME(Beside) *const beside[4] = {&p->E, &p->S, &p->F, &p->T};
    REAL *at[4];
    I step[4], jump[4], place = begin;
    UNROLL for (int o = 0; o < 4; o++) {
        at[o] = NAME(beside)(beside[o], period, i0, j0);
        step[o] = beside[o]->inner;
        jump[o] = beside[o]->row - (period - 1) * step[o];
    }
    UNROLL for (int i = 0; i < mr; i++) {
        UNROLL for (int v = 0; v < nv; v++) {
            V e = p->alpha * sum[i * nv + v];
            if (at[1]) e *= LOAD(at[1], v);
            ROUND(e);
            if (at[2]) {
                V f = LOAD(at[2], v);
                if (at[3]) {
                    f *= LOAD(at[3], v);
                    ROUND(f);
                }
                e += f;
            }
            STORE(at[0], v, e, p->e_is_whole);
        }
        const int is_last = ++place == period;
        place = is_last ? 0 : place;
        UNROLL for (int o = 0; o < 4; o++) if (at[o]) at[o] += is_last ? jump[o] : step[o];
    }
}

/* The part of C with mr rows from i and nv vectors of columns from j. */
INLINE void NAME(block)(const int mr, const int nv, const NAME(Matrices) *p, I i0, I j0) {
    const REAL *A = p->A + i0 * p->a_row, *B = p->B + j0 / (NV * VL) * p->b_panel;
    const I a_row = p->a_row, a_depth = p->a_depth, b_panel = p->b_panel, b_depth = p->b_depth;
    V sum[MOST_SUMS];
    UNROLL for (int i = 0; i < mr * nv; i++) sum[i] = (V){0};
    for (I k = p->depth; k > 0; k--, A += a_depth, B += b_depth) {
        V b[MOST_NV];
        UNROLL for (int v = 0; v < nv; v++) b[v] = NAME(load)(B + v / NV * b_panel + v % NV * VL);
        UNROLL for (int i = 0; i < mr; i++) {
            V a = NAME(splat)(A[i * a_row]);
            UNROLL for (int v = 0; v < nv; v++) sum[i * nv + v] += a * b[v];
        }
    }
    if (!p->is_plain) {
        V copy[MOST_SUMS];
        UNROLL for (int i = 0; i < mr * nv; i++) copy[i] = sum[i];
        NAME(write_apart)(p, mr, nv, i0, j0, copy);
    } else if (nv <= 2 && p->columns - j0 < nv * VL) NAME(write)(mr, nv, 1, p, i0, j0, sum); /* wider ones are full */
    else NAME(write)(mr, nv, 0, p, i0, j0, sum); /* unrolled and without calls, the sums stay in registers */
}

/* Each size of block is a function of its own, small enough for the compiler to keep its sums in registers. */
#define BLOCK_FUNCTION(mr, nv) \
    FUNCTION void NAME(block_##mr##_##nv)(const NAME(Matrices) *p, I i, I j) { NAME(block)(mr, nv, p, i, j); }
#define BLOCK_ENTRY(mr, nv) NAME(block_##mr##_##nv),
FOR_EACH_UP_TO(MR)(BLOCK_FUNCTION, 1)
FOR_EACH_UP_TO(MR)(BLOCK_FUNCTION, 2)
FOR_EACH_UP_TO(FEW_ROWS)(BLOCK_FUNCTION, 4)
BLOCK_FUNCTION(1, 8)

/* Few rows take several panels at a time, so that there are sums enough to keep the multipliers busy. */
APART void NAME(multiply)(const NAME(Matrices) *p) {
    static void (*const functions[4][MR])(const NAME(Matrices) *, I, I) = {
        {FOR_EACH_UP_TO(MR)(BLOCK_ENTRY, 1)},
        {FOR_EACH_UP_TO(MR)(BLOCK_ENTRY, 2)},
        {FOR_EACH_UP_TO(FEW_ROWS)(BLOCK_ENTRY, 4)},
        {BLOCK_ENTRY(1, 8)},
    };
    /* Blocks of about the same height: 5 and 5 rows are faster than 8 and 2. */
    const I blocks = (p->rows + MR - 1) / MR, most = p->rows == 1 ? 3 : p->rows <= FEW_ROWS ? 2 : 1;
    for (I j = 0; j < p->columns;) {
        const I left = p->columns - j;
        I size = most;
        while (size > 1 && left < VL << size) size--;
        if (left <= VL) size = 0;
        for (I n = 0, i = 0; n < blocks; n++) {
            const I next = p->rows * (n + 1) / blocks;
            functions[size][next - i - 1](p, i, j);
            i = next;
        }
        j += VL << size;
    }
}

INLINE NAME(Beside) NAME(placed)(const Call *call, const Array *a, I row, I outer) {
    if (a->space == ABSENT) return (NAME(Beside)){0};
    return (NAME(Beside)){NAME(at)(call, a) + row * a->row + outer * a->outer, a->row, a->inner, a->column};
}

APART void NAME(product)(const Call *call, const Product *s) {
    const I count = s->is_merged ? 1 : call->rows;
    for (I row = 0; row < count; row++)
        for (I o = 0; o < s->outer; o++) {
            const NAME(Beside) a = NAME(placed)(call, &s->a, row, o), b = NAME(placed)(call, &s->b, row, o);
            const NAME(Beside) c = NAME(placed)(call, &s->out, row, o);
            const NAME(Matrices) p = {
                s->is_merged ? call->rows * s->inner : s->inner, s->columns, s->depth,
                a.at, a.inner, a.column, b.at, s->panel, b.inner, c.at, c.inner, c.column, s->out.is_whole,
                (REAL)s->alpha, s->period, s->is_plain, s->scaled.is_whole,
                NAME(placed)(call, &s->add, row, o), NAME(placed)(call, &s->scaled, row, o),
                NAME(placed)(call, &s->by, row, o), NAME(placed)(call, &s->term, row, o),
                NAME(placed)(call, &s->term_by, row, o),
            };
            NAME(multiply)(&p);
        }
}

/* ---- Sums over columns ---- */

/* The sums over w of rows of A times rows of B, as many as a vector has lanes, in order. */
INLINE V NAME(across)(V *sums) {
    /* Each round adds the two halves of every vector and leaves half as many vectors, interleaved. */
    UNROLL for (I count = VL; count > 1; count /= 2)
        UNROLL for (I i = 0; i < count / 2; i++) {
            V a = sums[i], b = sums[i + count / 2];
            sums[i] = (V)SHUFFLE(a, b, JOINED(LOW_, LANES)) + (V)SHUFFLE(a, b, JOINED(HIGH_, LANES));
        }
    return sums[0];
}

/* The dot products of a few rows of A with a few rows of B over a padded width, in the order of `out`. */
INLINE void NAME(dots)(
    const int rows, const int columns, I width, const REAL *A, I a_row, const REAL *B, I b_row, REAL *out
) {
    V sum[BLOCK * BLOCK];
    UNROLL for (int i = 0; i < BLOCK * BLOCK; i++) sum[i] = (V){0};
    for (I w = 0; w < width; w += VL) {
        V right[BLOCK];
        UNROLL for (int j = 0; j < columns; j++) right[j] = NAME(load)(B + j * b_row + w);
        UNROLL for (int i = 0; i < rows; i++) {
            V left = NAME(load)(A + i * a_row + w);
            UNROLL for (int j = 0; j < columns; j++) sum[i * columns + j] += left * right[j];
        }
    }
    UNROLL for (int i = 0; i < rows * columns; i += VL) NAME(store)(out + i, NAME(across)(sum + i));
}

/* Like those of products, each size is a function of its own. */
#define DOTS_FUNCTION(rows, columns) \
    FUNCTION void NAME(dots_##rows##_##columns)( \
        I width, const REAL *A, I a_row, const REAL *B, I b_row, REAL *out \
    ) { NAME(dots)(rows, columns, width, A, a_row, B, b_row, out); }
#define DOTS_ENTRY(rows, columns) NAME(dots_##rows##_##columns),
FOR_EACH_UP_TO_4(DOTS_FUNCTION, 1)
FOR_EACH_UP_TO_4(DOTS_FUNCTION, 2)
FOR_EACH_UP_TO_4(DOTS_FUNCTION, 3)
FOR_EACH_UP_TO_4(DOTS_FUNCTION, 4)
static void (*const NAME(dots_of)[BLOCK][BLOCK])(I, const REAL *, I, const REAL *, I, REAL *) = {
    {FOR_EACH_UP_TO_4(DOTS_ENTRY, 1)},
    {FOR_EACH_UP_TO_4(DOTS_ENTRY, 2)},
    {FOR_EACH_UP_TO_4(DOTS_ENTRY, 3)},
    {FOR_EACH_UP_TO_4(DOTS_ENTRY, 4)},
};

/* Copy rows to panels, as the columns of a matrix. */
FUNCTION void NAME(pack)(const REAL *rows, I row, I depth, I columns, REAL *restrict packed) {
    const I panel = NV * VL;
    for (I j = 0; j < columns; j += panel)
        for (I k = 0; k < depth; k++, packed += panel)
            for (I l = 0; l < panel; l++) packed[l] = j + l < columns ? rows[(j + l) * row + k] : 0;
}

/* The congruence of J and all c at once: the products J_a J_b, entry by entry, times the matrix of the c. */
FUNCTION void NAME(contract_by_pairs)(const Contract *s, const REAL *J, const REAL *c, REAL *H, REAL *scratch) {
    const I d = s->left, width = s->columns;
    REAL *pairs = scratch, *packed = scratch + PAIRS * width;
    NAME(pack)(c, s->weights.inner, width, s->outputs, packed);
    NAME(Matrices) p = {
        0, s->outputs, width, pairs, width, 1, packed, NV * VL * width, NV * VL, 0, s->out.inner, 1, s->out.is_whole,
        1, INT32_MAX, 1, s->out.is_whole, {0}, {0, 0, s->out.outer, 1}, {0}, {0}, {0},
    };
    for (I a = 0; a < d; a++)
        for (I b = a; b < d; b += p.rows) {
            p.rows = d - b < PAIRS ? d - b : PAIRS;
            for (I i = 0; i < p.rows; i++)
                for (I w = 0; w < width; w += VL)
                    NAME(store)(pairs + i * width + w,
                                NAME(load)(J + a * s->a.inner + w) * NAME(load)(J + (b + i) * s->a.inner + w));
            p.C = H + a * s->out.outer + b * s->out.inner;
            p.E.at = H + b * s->out.outer + a * s->out.inner;
            NAME(multiply)(&p);
        }
}

/* Rows of the next block: the last few have about the same height, since 4, 3 and 3 rows are faster than 4, 4 and 2. */
INLINE I NAME(height)(I left) {
    const uint32_t blocks = (uint32_t)(left + BLOCK - 1) / BLOCK;
    return left > 3 * BLOCK ? BLOCK : (uint32_t)(left + blocks - 1) / blocks;
}

/* C of one row, or of all if they are one matrix; a symmetric one has W and no D, another one D or neither. */
INLINE void NAME(contract_blocks)(
    const int is_symmetric, const Contract *s, I left, const REAL *A, const REAL *B, const REAL *W, const REAL *D, REAL *C,
    REAL *weighted
) {
    const I width = s->columns;
    REAL dot[BLOCK * BLOCK];
    for (I a = 0, m; a < left; a += m) {
        m = NAME(height)(left - a);
        for (I k = 0; k < s->outputs; k++) {
            const REAL *factor = A + a * s->a.inner, *weights = W + k * s->weights.inner;
            if (is_symmetric) {
                for (I i = 0; i < m; i++, factor += s->a.inner)
                    for (I w = 0; w < width; w += VL)
                        NAME(store)(weighted + i * width + w, NAME(load)(factor + w) * NAME(load)(weights + w));
                factor = weighted;
            }
            for (I b = is_symmetric ? a : 0, n; b < s->right; b += n) {
                n = NAME(height)(s->right - b);
                NAME(dots_of)[n - 1][m - 1](
                    width, factor, is_symmetric ? width : s->a.inner, B + b * s->b.inner, s->b.inner, dot
                );
                for (I i = 0; i < m; i++)
                    for (I j = is_symmetric && b == a ? i : 0; j < n; j++) {
                        REAL c = dot[i * n + j], *to = C + k * s->out.column;
                        if (!is_symmetric && D) c += D[(a + i) * s->add.inner + (b + j) * s->add.column];
                        to[(a + i) * s->out.outer + (b + j) * s->out.inner] = c;
                        if (is_symmetric) to[(b + j) * s->out.outer + (a + i) * s->out.inner] = c;
                    }
            }
        }
    }
}

APART void NAME(contract)(const Call *call, const Contract *s) {
    const REAL *A = NAME(at)(call, &s->a), *B = NAME(at)(call, &s->b), *W = NAME(at)(call, &s->weights);
    const REAL *D = NAME(at)(call, &s->add);
    REAL *C = NAME(at)(call, &s->out);
    const I count = s->is_merged ? 1 : call->rows, left = s->is_merged ? call->rows * s->left : s->left;
    for (I row = 0; row < count; row++, A += s->a.row, B += s->b.row, C += s->out.row) {
        if (s->by_pairs) NAME(contract_by_pairs)(s, A, W, C, call->scratch);
        else if (W) NAME(contract_blocks)(1, s, left, A, B, W, D, C, call->scratch);
        else NAME(contract_blocks)(0, s, left, A, B, W, D, C, call->scratch);
        if (W) W += s->weights.row;
        if (D) D += s->add.row;
    }
}

/* C[w] = sum over the inner axis of A[j, w] (* B[j, w]). */
FUNCTION void NAME(sum_products)(const Call *call, const SumProducts *s) {
    const REAL *A = NAME(at)(call, &s->a), *B = NAME(at)(call, &s->b);
    REAL *C = NAME(at)(call, &s->out);
    for (I row = 0; row < call->rows; row++)
        for (I o = 0; o < s->outer; o++) {
            const REAL *a = A + row * s->a.row + o * s->a.outer, *b = B ? B + row * s->b.row + o * s->b.outer : 0;
            REAL *c = C + row * s->out.row + o * s->out.outer;
            for (I w = 0; w < s->columns; w += VL) {
                V sum = {0};
                for (I j = 0; j < s->inner; j++) {
                    V v = NAME(load)(a + j * s->a.inner + w);
                    if (b) v *= NAME(load)(b + j * s->b.inner + w);
                    sum += v;
                }
                if (s->out.column == 1) NAME(store_last)(c + w, sum, s->columns - w, s->out.is_whole);
                else
                    for (I l = 0; l < VL && w + l < s->columns; l++) c[(w + l) * s->out.column] = sum[l];
            }
        }
}

/* ---- Programs ---- */

FUNCTION void NAME(clear)(const Call *call, const Clear *s) {
    REAL *at = NAME(at)(call, &s->array);
    for (I row = 0; row < call->rows; row++)
        for (I o = 0; o < s->outer; o++)
            for (I i = 0; i < s->inner; i++)
                memset(at + row * s->array.row + o * s->array.outer + i * s->array.inner, 0, s->count * sizeof(REAL));
}

FUNCTION void NAME(step)(const Call *call, const Step *s) {
    switch (s->kind) {
    case IS_Product: NAME(product)(call, (const Product *)s); break;
    case IS_Map: NAME(map)(call, (const Map *)s); break;
    case IS_SumProducts: NAME(sum_products)(call, (const SumProducts *)s); break;
    case IS_Contract: NAME(contract)(call, (const Contract *)s); break;
    case IS_Clear: NAME(clear)(call, (const Clear *)s); break;
    }
}

FUNCTION void NAME(run)(const Program *p, Call *call, I stop) {
    const Step *first = (const Step *)(p + 1);
    for (I i = 0; i < p->onces; i++, first = behind(first)) {
        call->rows = first->is_shared ? 1 : call->tile_rows;
        NAME(step)(call, first);
    }
    for (; call->first < stop; call->first += call->tile_rows) {
        const I left = stop - call->first;
        call->rows = left < call->tile_rows ? left : call->tile_rows;
        const Step *step = first;
        for (I i = 0; i < p->steps; i++, step = behind(step)) NAME(step)(call, step);
    }
}
