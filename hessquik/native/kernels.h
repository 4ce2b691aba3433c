/* The steps of a program for one kind of number and one kind of processor.
 *
 * Included by native.c once per pair, with
 *   REAL, INT     the numbers, and integers of the same size
 *   NAME(x)       x with a suffix of its own
 *   VECTOR_BYTES  size of a vector register
 *   MR            rows of the matrix product's block, as many as its accumulators fit the registers
 *
 * Every number of a row is computed by the same operations in the same order wherever the row stands: products
 * add up over their inner index from its start to its end, never over rows, and no loop over rows has another
 * kernel for its last few. That is why the rows computed beside it cannot change a row's bits.
 */

#define V NAME(vector)
#define VI NAME(integers)
#define VL ((I)(VECTOR_BYTES / sizeof(REAL)))
#define DOUBLE (sizeof(REAL) == 8)

typedef REAL V __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef INT VI __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef V NAME(unaligned) __attribute__((aligned(sizeof(REAL))));

INLINE V NAME(load)(const REAL *p) { return *(const NAME(unaligned) *)p; }
INLINE void NAME(store)(REAL *p, V v) { *(NAME(unaligned) *)p = v; }
INLINE V NAME(splat)(REAL a) { return a - (V){0}; } /* a + 0 would not be a for a = -0 */
INLINE V NAME(select)(VI mask, V a, V b) { return (V)((mask & (VI)a) | (~mask & (VI)b)); }

INLINE V NAME(load_some)(const REAL *p, I count) {
    V v = {0};
    if (count >= VL) return NAME(load)(p);
    __builtin_memcpy(&v, p, count * sizeof(REAL));
    return v;
}

INLINE void NAME(store_some)(REAL *p, V v, I count) {
    if (count >= VL) NAME(store)(p, v);
    else __builtin_memcpy(p, &v, count * sizeof(REAL));
}

/* C = alpha a (* S) (+ D (* T)) for the columns of one vector. */
INLINE void NAME(scale_some)(REAL alpha, V a, const REAL *S, const REAL *D, const REAL *T, REAL *C, I count) {
    a *= alpha;
    if (S) a *= NAME(load_some)(S, count);
    ROUND(a);
    if (D) {
        V d = NAME(load_some)(D, count);
        if (T) {
            d *= NAME(load_some)(T, count);
            ROUND(d);
        }
        a += d;
    }
    NAME(store_some)(C, a, count);
}

INLINE const REAL *NAME(moved)(const REAL *p, I by) { return p ? p + by : 0; }

/* Where an operand begins for a row of the tile, or null if the step has none. */
INLINE REAL *NAME(at)(const Call *call, const Operand *o, I first, I row) {
    if (o->base < 0) return 0;
    const I offset = o->base == WORKSPACE ? o->offset * call->tile_rows : o->offset;
    return (REAL *)call->bases[o->base] + offset + o->column + (o->base == WORKSPACE ? row : first + row) * o->row;
}

/* ---- Pointwise functions. For y <= 0, with y = k ln 2 + r: exp y = 2^k exp r, and exp r - 1 by its series. ---- */

INLINE void NAME(exponential)(V y, V *exp, V *expm1) {
    const V lowest = NAME(splat)(DOUBLE ? -708.0 : -87.0);
    const V shift = NAME(splat)(DOUBLE ? 6755399441055744.0 : 12582912.0); /* adding it rounds to an integer */
    y = NAME(select)((VI)(y < lowest), lowest, y);
    V k = (y * (REAL)1.4426950408889634 + shift) - shift;
    /* The first part of ln 2 has few enough bits that k times it is exact. */
    V r = DOUBLE ? (y - k * (REAL)0.693147180369123816490) - k * (REAL)1.90821492927058770002e-10
                 : (y - k * (REAL)0.693145751953125) - k * (REAL)1.42860682030941723212e-6;
    static const double inverse_factorial[] = {1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
        1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
    const int terms = DOUBLE ? 13 : 8;
    V p = NAME(splat)((REAL)inverse_factorial[terms - 1]);
    for (int i = terms - 2; i >= 1; i--) p = p * r + (REAL)inverse_factorial[i];
    p = p * r * r + r;
    V scale = (V)((__builtin_convertvector(k, VI) + (DOUBLE ? 1023 : 127)) << (DOUBLE ? 52 : 23));
    *exp = scale * p + scale;
    *expm1 = scale * p + (scale - 1);
}

/* log(1 + t) for 0 <= t <= 1: with u = 1 + t or half of it, log u = 2 artanh(f / (2 + f)), f = u - 1. */
INLINE V NAME(log_one_plus)(V t) {
    V u = t + 1, lost = t - (u - 1);
    VI is_large = (VI)(u > (REAL)1.4142135623730951);
    V f = NAME(select)(is_large, u * (REAL)0.5, u) - 1;
    V s = f / (f + 2), z = s * s;
    const int terms = DOUBLE ? 12 : 6;
    V p = NAME(splat)((REAL)(1.0 / (2 * terms - 1)));
    for (int i = terms - 2; i >= 1; i--) p = p * z + (REAL)(1.0 / (2 * i + 1));
    V log_u = 2 * s + 2 * s * (z * p);
    return log_u + NAME(select)(is_large, NAME(splat)((REAL)0.69314718055994531), (V){0}) + lost / u;
}

INLINE V NAME(magnitude)(V x) { return NAME(select)((VI)(x < 0), -x, x); }

INLINE V NAME(tanh)(V x) {
    V e, expm1;
    NAME(exponential)(-2 * NAME(magnitude)(x), &e, &expm1);
    V t = -expm1 / (expm1 + 2);
    return NAME(select)((VI)(x < 0), -t, t);
}

INLINE V NAME(sigmoid)(V x) {
    V e, expm1;
    NAME(exponential)(-NAME(magnitude)(x), &e, &expm1);
    return NAME(select)((VI)(x < 0), e, NAME(splat)(1)) / (e + 1);
}

/* The activations of hessquik.activations: value, slope and curvature at once. */
INLINE void NAME(jet)(I kind, REAL beta, REAL threshold, V x, V *value, V *slope, V *curvature) {
    V e, expm1, t;
    switch (kind) {
    case TANH:
        *value = t = NAME(tanh)(x);
        *slope = 1 - t * t;
        *curvature = -2 * t * *slope;
        break;
    case ANTI_TANH:
        NAME(exponential)(-2 * NAME(magnitude)(x), &e, &expm1);
        *value = NAME(magnitude)(x) + NAME(log_one_plus)(e);
        t = -expm1 / (expm1 + 2);
        *slope = t = NAME(select)((VI)(x < 0), -t, t);
        *curvature = 1 - t * t;
        break;
    case SIGMOID:
        *value = t = NAME(sigmoid)(x);
        *slope = t * (1 - t);
        *curvature = *slope * (1 - 2 * t);
        break;
    case SOFTPLUS: {
        V scaled = beta * x;
        VI is_identity = (VI)(scaled > threshold);
        NAME(exponential)(-NAME(magnitude)(scaled), &e, &expm1);
        V positive = NAME(select)((VI)(scaled < 0), (V){0}, scaled);
        *value = NAME(select)(is_identity, x, (positive + NAME(log_one_plus)(e)) / beta);
        t = NAME(select)((VI)(scaled < 0), e, NAME(splat)(1)) / (e + 1);
        *slope = t = NAME(select)(is_identity, NAME(splat)(1), t);
        *curvature = beta * t * (1 - t);
        break;
    }
    default: /* QUADRATIC */
        *value = (REAL)0.5 * x * x;
        *slope = x;
        *curvature = NAME(splat)(1);
    }
}

/* ---- Steps ---- */

/* A product of whole matrices, C[i, j] = sum over k of A[i, k] B[k, j] (+ bias[j]) (+ D[i, j]); B is packed in
 * panels of NV vectors of columns (b_panel apart) or lies row by row. A scaling may follow while C is in registers:
 * E = alpha C (* S) (+ D (* T)), each with rows of its own: a step of `point` after every `inner` rows of C. */
typedef struct {
    I rows, columns, depth;
    const REAL *A;
    I a_row, a_depth;
    const REAL *B;
    I b_panel, b_depth;
    const REAL *bias, *D;
    I d_row;
    REAL *C; /* null if only the scaling reads it */
    I c_row, c_column;
    REAL alpha;
    I inner;
    struct {
        REAL *at;
        I point, inner;
    } then[4]; /* E, S, D, T */
} NAME(Product);

/* Where column j of row i of E, S, D or T is, or null if there is none. */
INLINE REAL *NAME(row_of)(const NAME(Product) *p, I which, I i, I j) {
    const I point = (uint32_t)i / (uint32_t)p->inner; /* of 32 bits, which divide several times faster */
    REAL *at = p->then[which].at;
    return at ? at + point * p->then[which].point + (i - point * p->inner) * p->then[which].inner + j : 0;
}

/* Write the sums of mr rows from i and nv vectors from j where columns are missing or lie apart. */
static __attribute__((noinline)) void NAME(write_some)(const NAME(Product) *p, I mr, I nv, I i0, I j0, const V *sum) {
    for (I i = i0; i < i0 + mr; i++)
        for (I v = 0; v < nv; v++) {
            const I j = j0 + v * VL, count = p->columns - j;
            V s = *sum++;
            if (p->bias) s += NAME(load_some)(p->bias + j, count);
            if (p->D) s += NAME(load_some)(p->D + i * p->d_row + j, count);
            REAL *c = p->C + i * p->c_row + j * p->c_column;
            if (p->C && p->c_column == 1) NAME(store_some)(c, s, count);
            else if (p->C)
                for (I l = 0; l < VL && l < count; l++) c[l * p->c_column] = s[l];
            if (p->then[0].at)
                NAME(scale_some)(p->alpha, s, NAME(row_of)(p, 1, i, j), NAME(row_of)(p, 2, i, j),
                                 NAME(row_of)(p, 3, i, j), NAME(row_of)(p, 0, i, j), count);
        }
}

/* The part of C with mr rows from i and nv vectors of columns from j. */
INLINE void NAME(block)(const int mr, const int nv, const NAME(Product) *p, I i0, I j0) {
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
    if (p->columns - j0 < nv * VL || p->c_column != 1) {
        V copy[MOST_SUMS];
        UNROLL for (int i = 0; i < mr * nv; i++) copy[i] = sum[i];
        NAME(write_some)(p, mr, nv, i0, j0, copy);
        return;
    }
    /* Unrolled and without calls, the sums stay in registers. */
    if (p->bias)
        UNROLL for (int i = 0; i < mr; i++)
            UNROLL for (int v = 0; v < nv; v++) sum[i * nv + v] += NAME(load)(p->bias + j0 + v * VL);
    if (p->D)
        UNROLL for (int i = 0; i < mr; i++)
            UNROLL for (int v = 0; v < nv; v++) sum[i * nv + v] += NAME(load)(p->D + (i0 + i) * p->d_row + j0 + v * VL);
    if (p->C)
        UNROLL for (int i = 0; i < mr; i++)
            UNROLL for (int v = 0; v < nv; v++) NAME(store)(p->C + (i0 + i) * p->c_row + j0 + v * VL, sum[i * nv + v]);
    if (p->then[0].at) {
        const I inner = p->inner;
        I place = (uint32_t)i0 % (uint32_t)inner, step[4], next[4];
        REAL *E = NAME(row_of)(p, 0, i0, j0);
        const REAL *S = NAME(row_of)(p, 1, i0, j0), *D = NAME(row_of)(p, 2, i0, j0), *T = NAME(row_of)(p, 3, i0, j0);
        for (int o = 0; o < 4; o++) {
            step[o] = p->then[o].inner;
            next[o] = p->then[o].point - (inner - 1) * step[o];
        }
        UNROLL for (int i = 0; i < mr; i++) {
            UNROLL for (int v = 0; v < nv; v++) {
                V c = p->alpha * sum[i * nv + v];
                if (S) c *= NAME(load)(S + v * VL);
                ROUND(c);
                if (D) {
                    V d = NAME(load)(D + v * VL);
                    if (T) {
                        d *= NAME(load)(T + v * VL);
                        ROUND(d);
                    }
                    c += d;
                }
                NAME(store)(E + v * VL, c);
            }
            const int is_last = ++place == inner;
            place = is_last ? 0 : place;
            E += is_last ? next[0] : step[0];
            if (S) S += is_last ? next[1] : step[1];
            if (D) D += is_last ? next[2] : step[2];
            if (T) T += is_last ? next[3] : step[3];
        }
    }
}

/* Each size of block is a function of its own, small enough for the compiler to keep its sums in registers. */
#define BLOCK_FUNCTION(mr, nv) \
    static void NAME(block_##mr##_##nv)(const NAME(Product) *p, I i, I j) { NAME(block)(mr, nv, p, i, j); }
#define BLOCK_ENTRY(mr, nv) NAME(block_##mr##_##nv),
FOR_EACH_ROW_COUNT(BLOCK_FUNCTION, 1)
FOR_EACH_ROW_COUNT(BLOCK_FUNCTION, 2)
FOR_EACH_ROW_COUNT_4(BLOCK_FUNCTION, 4)
BLOCK_FUNCTION(1, 8)

/* Few rows take several panels at a time, so that there are sums enough to keep the multipliers busy. */
static void NAME(product)(const NAME(Product) *p) {
    static void (*const functions[4][MR])(const NAME(Product) *, I, I) = {
        {FOR_EACH_ROW_COUNT(BLOCK_ENTRY, 1)},
        {FOR_EACH_ROW_COUNT(BLOCK_ENTRY, 2)},
        {FOR_EACH_ROW_COUNT_4(BLOCK_ENTRY, 4)},
        {BLOCK_ENTRY(1, 8)},
    };
    /* Blocks of about the same height: 5 and 5 rows are faster than 8 and 2. */
    const I blocks = (p->rows + MR - 1) / MR, most = p->rows == 1 ? 3 : p->rows <= 4 ? 2 : 1;
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
#undef BLOCK_FUNCTION
#undef BLOCK_ENTRY

/* The sums over w of rows of A times rows of B, as many as a vector has lanes, in order. */
INLINE V NAME(across)(V *sums) {
    VI low, high;
    for (I i = 0; i < VL; i++) {
        low[i] = i / 2 + (i % 2) * VL;
        high[i] = VL / 2 + i / 2 + (i % 2) * VL;
    }
    /* Each round adds the two halves of every vector and leaves half as many vectors, interleaved. */
    for (I count = VL; count > 1; count /= 2)
        for (I i = 0; i < count / 2; i++) {
            V a = sums[i], b = sums[i + count / 2];
            sums[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
        }
    return sums[0];
}

/* The dot products of the first rows of A with the first columns, rows of B, over a padded width, of BLOCK x BLOCK. */
INLINE void NAME(dots)(
    const int rows, const int columns, I width, const REAL *const *a, const REAL *const *b, REAL *out
) {
    V sum[BLOCK * BLOCK];
    for (int i = 0; i < BLOCK * BLOCK; i++) sum[i] = (V){0};
    for (I w = 0; w < width; w += VL) {
        V right[BLOCK];
        for (int j = 0; j < columns; j++) right[j] = NAME(load)(b[j] + w);
        for (int i = 0; i < rows; i++) {
            V left = NAME(load)(a[i] + w);
            for (int j = 0; j < columns; j++) sum[i * BLOCK + j] += left * right[j];
        }
    }
    for (int i = 0; i < BLOCK * BLOCK; i += VL) NAME(store)(out + i, NAME(across)(sum + i));
}

static void NAME(congruence)(const Step *s, const REAL *J, const REAL *c, REAL *H, REAL *scratch) {
    const Operand *j_ = &s->operand[1], *c_ = &s->operand[2], *h_ = &s->operand[0];
    const I d = s->inner, width = s->depth, m = s->outer;
    REAL dot[BLOCK * BLOCK];
    const REAL *left[BLOCK], *right[BLOCK];
    for (int i = 0; i < BLOCK; i++) left[i] = scratch + i * width;
    for (I a = 0; a < d; a += BLOCK)
        for (I k = 0; k < m; k++) {
            for (int i = 0; i < BLOCK && a + i < d; i++)
                for (I w = 0; w < width; w += VL)
                    NAME(store)(scratch + i * width + w,
                                NAME(load)(J + (a + i) * j_->inner + w) * NAME(load)(c + k * c_->inner + w));
            for (I b = a; b < d; b += BLOCK) {
                for (int j = 0; j < BLOCK; j++) right[j] = J + (b + j < d ? b + j : d - 1) * j_->inner;
                NAME(dots)(BLOCK, BLOCK, width, left, right, dot);
                for (int i = 0; i < BLOCK && a + i < d; i++)
                    for (int j = b == a ? i : 0; j < BLOCK && b + j < d; j++)
                        H[(a + i) * h_->outer + (b + j) * h_->inner + k * h_->column_step] =
                            H[(b + j) * h_->outer + (a + i) * h_->inner + k * h_->column_step] = dot[i * BLOCK + j];
            }
        }
}

static void NAME(contract)(const Step *s, const REAL *A, const REAL *B, REAL *C) {
    const I rows = s->outer, columns = s->inner;
    REAL dot[BLOCK * BLOCK];
    const REAL *left[BLOCK], *right[BLOCK];
    for (I i0 = 0; i0 < rows; i0 += BLOCK)
        for (I j0 = 0; j0 < columns; j0 += BLOCK) {
            for (int i = 0; i < BLOCK; i++) {
                left[i] = A + (i0 + i < rows ? i0 + i : rows - 1) * s->operand[1].inner;
                right[i] = B + (j0 + i < columns ? j0 + i : columns - 1) * s->operand[2].inner;
            }
            if (columns > 1) NAME(dots)(BLOCK, BLOCK, s->depth, left, right, dot);
            else if (rows > 1) NAME(dots)(BLOCK, 1, s->depth, left, right, dot);
            else NAME(dots)(1, 1, s->depth, left, right, dot);
            for (int i = 0; i < BLOCK && i0 + i < rows; i++)
                for (int j = 0; j < BLOCK && j0 + j < columns; j++)
                    C[(i0 + i) * s->operand[0].inner + (j0 + j) * s->operand[0].column_step] = dot[i * BLOCK + j];
        }
}

/* The same over the outer and inner axes and the columns. */
static void NAME(scale)(const Step *s, const REAL *A, const REAL *S, const REAL *D, const REAL *T, REAL *C) {
    const Operand *o = s->operand;
    const REAL alpha = (REAL)s->alpha;
    const int is_dense = o[0].column_step == 1 && o[1].column_step == 1;
    for (I i = 0; i < s->outer; i++)
        for (I j = 0; j < s->inner; j++) {
            const REAL *a = A + i * o[1].outer + j * o[1].inner;
            const REAL *t = S ? S + i * o[2].outer + j * o[2].inner : 0;
            const REAL *d = D ? D + i * o[3].outer + j * o[3].inner : 0;
            const REAL *e = T ? T + i * o[4].outer + j * o[4].inner : 0;
            REAL *c = C + i * o[0].outer + j * o[0].inner;
            if (!is_dense) {
                for (I w = 0; w < s->width; w++) c[w * o[0].column_step] = alpha * a[w * o[1].column_step];
                continue;
            }
            for (I w = 0; w < s->width; w += VL) {
                const I count = s->width - w;
                NAME(scale_some)(alpha, NAME(load_some)(a + w, count), NAME(moved)(t, w), NAME(moved)(d, w),
                                 NAME(moved)(e, w), c + w, count);
            }
        }
}

/* C[w] = sum over the inner axis of A[j, w] B[j, w]. */
static void NAME(sum_products)(const Step *s, const REAL *A, const REAL *B, REAL *C) {
    for (I w = 0; w < s->width; w += VL) {
        V sum = {0};
        for (I j = 0; j < s->inner; j++)
            sum += NAME(load_some)(A + j * s->operand[1].inner + w, s->width - w) *
                   NAME(load_some)(B + j * s->operand[2].inner + w, s->width - w);
        if (s->operand[0].column_step == 1) NAME(store_some)(C + w, sum, s->width - w);
        else
            for (I l = 0; l < VL && w + l < s->width; l++) C[(w + l) * s->operand[0].column_step] = sum[l];
    }
}

/* Value, slope and curvature; and the scaling of the value, if one follows. */
static void NAME(activate)(
    const Call *call, const Step *s, const REAL *z, REAL *value, REAL *slope, REAL *curvature, I first, I row
) {
    V v, d, e;
    REAL *then[5] = {0};
    for (int i = 0; s->is_followed && i < 5; i++) then[i] = NAME(at)(call, &s[1].operand[i], first, row);
#define ACTIVATION(kind) \
    case kind: \
        for (I w = 0; w < s->width; w += VL) { \
            const I count = s->width - w; \
            NAME(jet)(kind, (REAL)s->alpha, (REAL)s->beta, NAME(load_some)(z + w, count), &v, &d, &e); \
            if (value) NAME(store_some)(value + w, v, count); \
            if (slope) NAME(store_some)(slope + w, d, count); \
            if (curvature) NAME(store_some)(curvature + w, e, count); \
            if (then[0]) \
                NAME(scale_some)((REAL)s[1].alpha, v, NAME(moved)(then[2], w), NAME(moved)(then[3], w), \
                                 NAME(moved)(then[4], w), then[0] + w, count); \
        } \
        break;
    switch (s->kind) {
        ACTIVATION(TANH)
        ACTIVATION(ANTI_TANH)
        ACTIVATION(SIGMOID)
        ACTIVATION(SOFTPLUS)
        ACTIVATION(QUADRATIC)
    }
#undef ACTIVATION
}

static void NAME(step)(const Call *call, const Step *s, I first, I rows) {
    const Operand *o = s->operand;
    if (s->op == MULTIPLY) {
        /* Rows whose tangents lie evenly are one matrix. */
        const int is_even = o[1].row == s->inner * o[1].inner && o[0].row == s->inner * o[0].inner &&
                            o[2].row == 0 && (o[4].base < 0 || o[4].row == s->inner * o[4].inner);
        const I count = is_even ? 1 : rows, height = is_even ? rows * s->inner : s->inner;
        const Step *then = s->is_followed ? s + 1 : 0;
        for (I row = 0; row < count; row++) {
            NAME(Product) p = {
                height, s->width, s->depth,
                NAME(at)(call, &o[1], first, row), o[1].inner, o[1].column_step,
                NAME(at)(call, &o[2], first, row), o[2].outer, o[2].inner,
                NAME(at)(call, &o[3], first, row), NAME(at)(call, &o[4], first, row), o[4].inner,
                NAME(at)(call, &o[0], first, row), o[0].inner, o[0].column_step,
                then ? (REAL)then->alpha : 0, s->inner, {{0}},
            };
            for (int i = 0; then && i < 4; i++) {
                const Operand *q = &then->operand[i ? i + 1 : 0];
                p.then[i].at = NAME(at)(call, q, first, row), p.then[i].point = q->row, p.then[i].inner = q->inner;
            }
            NAME(product)(&p);
        }
        return;
    }
    for (I row = 0; row < rows; row++) {
        REAL *p[5];
        for (int i = 0; i < 5; i++) p[i] = NAME(at)(call, &o[i], first, row);
        switch (s->op) {
        case ACTIVATE: NAME(activate)(call, s, p[0], p[1], p[2], p[3], first, row); break;
        case SCALE: NAME(scale)(s, p[1], p[2], p[3], p[4], p[0]); break;
        case SUM_PRODUCTS: NAME(sum_products)(s, p[1], p[2], p[0]); break;
        case CONTRACT: NAME(contract)(s, p[1], p[2], p[0]); break;
        case CONGRUENCE: NAME(congruence)(s, p[1], p[2], p[0], (REAL *)call->scratch); break;
        }
    }
}

static void NAME(run)(const Call *call) {
    __builtin_memset(call->bases[WORKSPACE], 0, call->zeroed * sizeof(REAL));
    for (I i = 0; i < call->onces; i++) /* one row where all rows share the result */
        NAME(step)(call, &call->once[i], call->first, call->once[i].operand[0].row ? call->tile_rows : 1);
    for (I first = call->first; first < call->stop; first += call->tile_rows) {
        const I left = call->stop - first, rows = left < call->tile_rows ? left : call->tile_rows;
        for (I i = 0; i < call->steps; i += 1 + call->step[i].is_followed)
            NAME(step)(call, &call->step[i], first, rows);
    }
}

#undef V
#undef VI
#undef VL
#undef DOUBLE
