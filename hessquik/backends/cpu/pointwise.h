/* The primitives of hessquik.pointwise on vectors, and maps, which apply them. Included by steps.h.
 *
 * Every lane is computed by the same operations, so where a number stands does not matter. Results below the smallest
 * normal number are zero. Errors are a few units in the last place.
 */

INLINE V NAME(magnitude)(V x) { return (V)((VI)x & ~(VI)NAME(splat)((REAL)-0.0)); }
INLINE V NAME(with_sign)(V x, V sign) { return (V)((VI)x | ((VI)sign & (VI)NAME(splat)((REAL)-0.0))); }
INLINE VI NAME(is_nan)(V x) { return (VI)(x != x); }
INLINE V NAME(power_of_two)(VI k) { return (V)((k + (IS_DOUBLE ? 1023 : 127)) << (IS_DOUBLE ? 52 : 23)); }

/* y + low = k ln 2 + r; returns exp(r) - 1 by its series. */
INLINE V NAME(reduced_expm1)(V y, V low, V *k) {
    static const REAL inverse_factorial[] = {
        (REAL)(1.0 / 2), (REAL)(1.0 / 6), (REAL)(1.0 / 24), (REAL)(1.0 / 120), (REAL)(1.0 / 720), (REAL)(1.0 / 5040),
#if IS_DOUBLE
        1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0,
#endif
    };
    const V shift = SPLAT(IS_DOUBLE ? 6755399441055744.0 : 12582912.0); /* adding it rounds to an integer */
    *k = (y * (REAL)1.4426950408889634 + shift) - shift;
    /* The first part of ln 2 has few enough bits that k times it is exact. */
    V r = y - *k * COEFFICIENTS(log_2)[0];
    r = r - (*k * COEFFICIENTS(log_2)[1] - low);
    POLYNOMIAL(p, r, inverse_factorial);
    return p * r * r + r;
}

/* exp(y + low) for y <= 0. */
INLINE V NAME(exp_negative)(V y, V low) {
    const V lowest = SPLAT(IS_DOUBLE ? -708.0 : -87.0);
    VI vanishes = (VI)(y < lowest);
    V k, p = NAME(reduced_expm1)(SELECT(vanishes, lowest, y), low, &k);
    V scale = NAME(power_of_two)(__builtin_convertvector(k, VI));
    /* Not scale p + scale: without fused operations the product would vanish near the smallest numbers. */
    return (V)((VI)((p + 1) * scale) & ~vanishes);
}

/* exp(y) - 1 for y <= 0. */
INLINE V NAME(expm1_negative)(V y) {
    const V lowest = SPLAT(IS_DOUBLE ? -708.0 : -87.0);
    V k, p = NAME(reduced_expm1)(SELECT(y < lowest, lowest, y), (V){0}, &k);
    V scale = NAME(power_of_two)(__builtin_convertvector(k, VI));
    return scale * p + (scale - 1);
}

INLINE V NAME(clamp)(V x, REAL low, REAL high) {
    x = SELECT(x < SPLAT(low), SPLAT(low), x);
    return SELECT(x > SPLAT(high), SPLAT(high), x);
}

INLINE V NAME(exp)(V x) {
    V k, p = NAME(reduced_expm1)(NAME(clamp)(x, (REAL)(IS_DOUBLE ? -746 : -104), (REAL)(IS_DOUBLE ? 710 : 89)), (V){0}, &k);
    VI whole = __builtin_convertvector(k, VI), half = whole >> 1; /* 2^k itself may be out of range */
    return (p + 1) * NAME(power_of_two)(half) * NAME(power_of_two)(whole - half);
}

INLINE V NAME(expm1)(V x) {
    V k, p = NAME(reduced_expm1)(NAME(clamp)(x, (REAL)(IS_DOUBLE ? -708 : -87), (REAL)(IS_DOUBLE ? 710 : 89)), (V){0}, &k);
    V scale = NAME(power_of_two)(__builtin_convertvector(k, VI) - 1);
    V result = 2 * (scale * p + (scale - (REAL)0.5));
    return SELECT(x == 0, x, result);
}

INLINE V NAME(tanh)(V x) {
    V expm1 = NAME(expm1_negative)(-2 * NAME(magnitude)(x));
    return NAME(with_sign)(((V){0} - expm1) / (expm1 + 2), x); /* not -expm1, whose zero is negative */
}

INLINE V NAME(sigmoid)(V x) {
    V e = NAME(exp_negative)(-NAME(magnitude)(x), (V){0});
    return SELECT(x < 0, e, SPLAT(1)) / (e + 1);
}

/* log(u) + more for u = 2^k (1 + f), 1 + f between sqrt(1/2) and sqrt(2): 2 artanh(f / (2 + f)) by its series. */
INLINE V NAME(log_and)(V u, V more) {
    static const REAL odd[] = {
        (REAL)(1.0 / 3), (REAL)(1.0 / 5), (REAL)(1.0 / 7), (REAL)(1.0 / 9), (REAL)(1.0 / 11),
#if IS_DOUBLE
        1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23,
#endif
    };
    const VI root_half = (VI)SPLAT(0.70710678118654752440);
    VI exponent = ((VI)u - root_half) >> (IS_DOUBLE ? 52 : 23);
    V f = (V)((VI)u - (exponent << (IS_DOUBLE ? 52 : 23))) - 1, k = __builtin_convertvector(exponent, V);
    V s = f / (f + 2), z = s * s, square = (REAL)0.5 * f * f;
    POLYNOMIAL(p, z, odd);
    /* log(1 + f) = f - f²/2 + s (f²/2 + 2 z p) */
    V tail = s * (square + 2 * z * p) + (k * COEFFICIENTS(log_2)[1] + more);
    return k * COEFFICIENTS(log_2)[0] + (f - (square - tail));
}

INLINE V NAME(log)(V x) {
    const V infinity = SPLAT(__builtin_inf()), smallest = SPLAT(IS_DOUBLE ? 2.2250738585072014e-308 : 1.17549435e-38f);
    V result = NAME(log_and)(x, (V){0});
    result = SELECT(x < smallest, -infinity, result);
    result = SELECT(x == infinity, infinity, result);
    return SELECT((VI)(x <= -smallest) | NAME(is_nan)(x), SPLAT(__builtin_nan("")), result);
}

INLINE V NAME(log1p)(V x) {
    const V infinity = SPLAT(__builtin_inf());
    V u = x + 1;
    V lost = SELECT(x < 1, x - (u - 1), 1 - (u - x));
    V result = NAME(log_and)(u, lost / u);
    result = SELECT(x == infinity, infinity, result);
    result = SELECT(x == -1, -infinity, result);
    result = SELECT(x == 0, x, result);
    return SELECT((VI)(x < -1) | NAME(is_nan)(x), SPLAT(__builtin_nan("")), result);
}

/* exp(a²) erfc(a) for a >= 0. */
INLINE V NAME(erfcx)(V a) {
    V sum = a + ERFCX_CENTRE, u = (a - ERFCX_CENTRE) / sum;
    POLYNOMIAL(p, u, COEFFICIENTS(erfcx));
    return p / sum;
}

/* exp(-scale a²) without the error that rounding a² would make: a² = high² + (a - high) (a + high), high² exact. */
INLINE V NAME(gaussian)(V a, REAL scale) {
    V high = (V)((VI)a & ((VI){0} - ((INT)1 << (IS_DOUBLE ? 27 : 12))));
    return NAME(exp_negative)(-scale * (high * high), -scale * ((a - high) * (a + high)));
}

INLINE V NAME(erf)(V x) {
    V a = NAME(magnitude)(x), z = a * a;
    VI is_small = (VI)(a < 1);
    z = SELECT(is_small, z, SPLAT(1));
    POLYNOMIAL(small, z, COEFFICIENTS(erf));
    a = SELECT(a > (REAL)COEFFICIENTS(ERFCX_LARGEST), SPLAT(COEFFICIENTS(ERFCX_LARGEST)), a);
    V large = 1 - NAME(exp_negative)(-(a * a), (V){0}) * NAME(erfcx)(a);
    return SELECT(is_small, x * small, NAME(with_sign)(large, x));
}

INLINE V NAME(ndtr)(V x) {
    V a = NAME(magnitude)(x);
    a = SELECT(a > (REAL)(COEFFICIENTS(ERFCX_LARGEST) * 1.414), SPLAT(COEFFICIENTS(ERFCX_LARGEST) * 1.414), a);
    V tail = (REAL)0.5 * (NAME(gaussian)(a, (REAL)0.5) * NAME(erfcx)(a * (REAL)0.70710678118654752440));
    return SELECT(x > 0, 1 - tail, tail);
}

/* x = k pi/2 + r, |r| <= pi/4, for x that is not large: the parts of pi/2 but the last have few bits. */
INLINE V NAME(quarter)(V x, VI *k) {
    const V shift = SPLAT(IS_DOUBLE ? 6755399441055744.0 : 12582912.0);
    V turns = (x * (REAL)0.63661977236758134308 + shift) - shift;
    *k = __builtin_convertvector(turns, VI);
    for (unsigned i = 0; i < sizeof COEFFICIENTS(half_pi) / sizeof(REAL); i++) x = x - turns * COEFFICIENTS(half_pi)[i];
    return x;
}

/* sin(x + quarters pi/2) */
INLINE V NAME(sine)(V x, INT quarters) {
    static const REAL sine[] = {
        (REAL)(-1.0 / 6), (REAL)(1.0 / 120), (REAL)(-1.0 / 5040), (REAL)(1.0 / 362880),
#if IS_DOUBLE
        -1.0 / 39916800, 1.0 / 6227020800.0, -1.0 / 1307674368000.0, 1.0 / 355687428096000.0,
#endif
    }, cosine[] = {
        (REAL)(1.0 / 24), (REAL)(-1.0 / 720), (REAL)(1.0 / 40320), (REAL)(-1.0 / 3628800),
#if IS_DOUBLE
        1.0 / 479001600, -1.0 / 87178291200.0, 1.0 / 20922789888000.0, -1.0 / 6402373705728000.0,
#endif
    };
    VI k;
    V r = NAME(quarter)(x, &k), z = r * r;
    k += quarters;
    POLYNOMIAL(s, z, sine);
    POLYNOMIAL(c, z, cosine);
    s = r + r * z * s;
    c = 1 - (REAL)0.5 * z + z * z * c;
    V result = SELECT((k & 1) == 0, s, c);
    return (V)((VI)result ^ ((k & 2) << (IS_DOUBLE ? 62 : 30)));
}

INLINE V NAME(atan)(V x) {
    V a = NAME(magnitude)(x);
    VI is_middle = (VI)(a > (REAL)0.41421356237309504880), is_large = (VI)(a > (REAL)2.41421356237309504880);
    V above = SELECT(is_large, SPLAT(-1), SELECT(is_middle, a - 1, a));
    V below = SELECT(is_large, a, SELECT(is_middle, a + 1, SPLAT(1)));
    V t = above / below, z = t * t;
    POLYNOMIAL(p, z, COEFFICIENTS(atan));
    V start = SELECT(is_large, SPLAT(1.57079632679489661923), SELECT(is_middle, SPLAT(0.78539816339744830962), (V){0}));
    return NAME(with_sign)(start + t * p, x);
}

#define LARGEST_ANGLE (IS_DOUBLE ? 5e5 : 1600.0)
/* sin and cos of numbers whose quarter turns have too many bits: lane by lane. */
APART void NAME(sine_of_large)(const REAL *x, REAL *result, I count, INT quarters) {
    for (I i = 0; i < count; i++)
        if (!(__builtin_fabs((double)x[i]) <= LARGEST_ANGLE))
            result[i] = (REAL)(quarters ? cos((double)x[i]) : sin((double)x[i]));
}

FUNCTION void NAME(sines)(const REAL *x, I step, REAL *result, I count, INT quarters) {
    REAL copy[CHUNK_BYTES / sizeof(REAL)];
    VI is_large = {0};
    for (I i = 0; i < count; i++) {
        V v = NAME(load)(x + i * step);
        is_large |= ~(VI)(NAME(magnitude)(v) <= (REAL)LARGEST_ANGLE);
        NAME(store)(copy + i * VL, v);
        NAME(store)(result + i * VL, NAME(sine)(v, quarters));
    }
    INT any = 0;
    for (I l = 0; l < VL; l++) any |= is_large[l];
    if (any) NAME(sine_of_large)(copy, result, count * VL, quarters);
}

/* ---- Maps ---- */

/* One instruction on count vectors; a step of 0 instead of a vector repeats a constant. */
FUNCTION void NAME(apply)(
    I op, REAL *restrict result, I count, const REAL *a, I a_step, const REAL *b, I b_step, const REAL *c, I c_step
) {
#define APPLY(name, value) \
    case OP_##name: \
        for (I i = 0; i < count; i++) { \
            V x = NAME(load)(a + i * a_step); \
            NAME(store)(result + i * VL, value); \
        } \
        break;
#define APPLY_2(name, value) \
    case OP_##name: \
        for (I i = 0; i < count; i++) { \
            V x = NAME(load)(a + i * a_step), y = NAME(load)(b + i * b_step); \
            NAME(store)(result + i * VL, value); \
        } \
        break;
    switch (op) {
    APPLY_2(add, x + y)
    APPLY_2(sub, x - y)
    APPLY_2(mul, x * y)
    APPLY_2(div, x / y)
    APPLY(neg, -x)
    APPLY(abs, NAME(magnitude)(x))
    APPLY_2(maximum, SELECT((VI)(x > y) | NAME(is_nan)(x), x, y))
    APPLY_2(minimum, SELECT((VI)(x < y) | NAME(is_nan)(x), x, y))
    APPLY_2(gt, (V)((VI)(x > y) & (VI)SPLAT(1)))
    APPLY_2(ge, (V)((VI)(x >= y) & (VI)SPLAT(1)))
    APPLY(exp, NAME(exp)(x))
    APPLY(expm1, NAME(expm1)(x))
    APPLY(log, NAME(log)(x))
    APPLY(log1p, NAME(log1p)(x))
    APPLY(tanh, NAME(tanh)(x))
    APPLY(sigmoid, NAME(sigmoid)(x))
    APPLY(erf, NAME(erf)(x))
    APPLY(ndtr, NAME(ndtr)(x))
    APPLY(atan, NAME(atan)(x))
    case OP_sin: NAME(sines)(a, a_step, result, count, 0); break;
    case OP_cos: NAME(sines)(a, a_step, result, count, 1); break;
    case OP_sqrt:
        for (I i = 0; i < count; i++)
            for (I l = 0; l < VL; l++) result[i * VL + l] = IS_DOUBLE ? __builtin_sqrt(a[i * a_step + l]) : __builtin_sqrtf(a[i * a_step + l]);
        break;
    case OP_where:
        for (I i = 0; i < count; i++) {
            V x = NAME(load)(a + i * a_step), y = NAME(load)(b + i * b_step), z = NAME(load)(c + i * c_step);
            NAME(store)(result + i * VL, SELECT(x != 0, y, z));
        }
        break;
    }
}

/* Where a map is: inner entry (row, o, i) and the numbers from w on of this and the next `entries` ones. */
typedef struct {
    I row, o, i, w, entries;
} NAME(Place);

INLINE REAL *NAME(entry)(const REAL *base, const Array *a, const NAME(Place) *at) {
    return (REAL *)base + at->row * a->row + at->o * a->outer + at->i * a->inner + at->w * a->column;
}

INLINE void NAME(next)(NAME(Place) *at, const Map *m) {
    if (++at->i < m->inner) return;
    at->i = 0;
    if (++at->o < m->outer) return;
    at->o = 0, at->row++;
}

/* Copy entries of an array, which lie anyhow, to neighbouring places, `width` apart. */
FUNCTION void NAME(gather)(
    const Map *m, const Array *a, const REAL *base, NAME(Place) at, I width, REAL *restrict copy
) {
    const I left = m->columns - at.w, count = left < width ? left : width, whole = a->is_whole ? count : count / VL * VL;
    for (I n = 0; n < at.entries; n++, copy += width, NAME(next)(&at, m)) {
        const REAL *from = NAME(entry)(base, a, &at);
        if (a->column == 1) {
            I w = 0;
            for (; w < whole; w += VL) NAME(store)(copy + w, NAME(load)(from + w));
            if (w < count) NAME(store)(copy + w, NAME(load_some)(from + w, count - w));
        } else
            for (I w = 0; w < width; w++) copy[w] = w < count ? from[w * a->column] : 0;
    }
}

FUNCTION void NAME(scatter)(const Map *m, const Array *a, REAL *base, NAME(Place) at, I width, const REAL *copy) {
    const I left = m->columns - at.w, count = left < width ? left : width, whole = count / VL * VL;
    for (I n = 0; n < at.entries; n++, copy += width, NAME(next)(&at, m)) {
        REAL *to = NAME(entry)(base, a, &at);
        if (a->column == 1) {
            for (I w = 0; w < whole; w += VL) NAME(store)(to + w, NAME(load)(copy + w));
            if (whole < count) NAME(store_last)(to + whole, NAME(load)(copy + whole), count - whole, a->is_whole);
        } else
            for (I w = 0; w < count; w++) to[w * a->column] = copy[w];
    }
}

/* Set the numbers behind the columns to zero where they were computed like the others. */
INLINE void NAME(mask_rest)(const Map *m, REAL *at, I entries, I w, I width) {
    const I count = m->columns - w;
    if (count >= width) return;
    for (I n = 0; n < entries; n++, at += width)
        for (I v = count / VL * VL; v < width; v += VL)
            NAME(store)(at + v, (V)((VI)NAME(load)(at + v) & NAME(lanes)(count > v ? count - v : 0)));
}

APART void NAME(map)(const Call *call, const Map *m) {
    const I size = CHUNK_BYTES / sizeof(REAL), inputs = m->inputs, constants = m->constants, outputs = m->outputs;
    const I computed = inputs + m->instructions;
    const Input *input = (const Input *)(m + 1);
    const Instruction *instruction = (const Instruction *)(input + inputs);
    const Output *output = (const Output *)(instruction + m->instructions);
    const Number *number = (const Number *)(output + outputs);
    /* The scratch memory has the slots, the constants, and then where all registers and arrays are. */
    REAL *slots = call->scratch, *constant = slots + m->slots * size;
    REAL **at = (REAL **)(constant + constants * VL), **base = at + computed + constants;
    for (I i = 0; i < constants; i++) {
        at[computed + i] = constant + i * VL;
        NAME(store)(at[computed + i], SPLAT(number[i].value));
    }
    for (I i = 0; i < inputs; i++) base[i] = NAME(at)(call, &input[i].array);
    for (I i = 0; i < outputs; i++) base[inputs + i] = NAME(at)(call, &output[i].array);
#define STEP(r) ((r) < computed ? VL : 0)
    const I width = m->width, most = width < size ? size / width : 1;
    const I entries = call->rows * m->outer * m->inner;
    NAME(Place) place = {0, 0, 0, 0, 0};
    for (I first = 0; first < entries; first += most) {
        place.entries = entries - first < most ? entries - first : most;
        for (I w = 0; w < width; w += size) {
            const I part = width - w < size ? width - w : size, count = place.entries * part / VL;
            place.w = w;
            for (I i = 0; i < inputs; i++) {
                const Array *a = &input[i].array;
                const int in_place = a->is_whole && (input[i].is_run || place.entries == 1) && a->column == 1;
                at[i] = in_place ? NAME(entry)(base[i], a, &place) : slots + input[i].slot * size;
                if (!in_place) NAME(gather)(m, a, base[i], place, part, at[i]);
            }
            for (I i = 0; i < m->instructions; i++) at[inputs + i] = slots + instruction[i].slot * size;
            for (I i = 0; i < outputs; i++)
                if (output[i].is_direct && (output[i].is_run || place.entries == 1))
                    at[output[i].value] = NAME(entry)(base[inputs + i], &output[i].array, &place);
            for (I i = 0; i < m->instructions; i++) {
                const Instruction *n = &instruction[i];
                NAME(apply)(n->op, at[inputs + i], count, at[n->a], STEP(n->a), at[n->b], STEP(n->b), at[n->c],
                            STEP(n->c));
            }
            for (I i = 0; i < outputs; i++) {
                REAL *value = at[output[i].value];
                if (output[i].is_direct && (output[i].is_run || place.entries == 1))
                    NAME(mask_rest)(m, value, place.entries, w, part);
                else NAME(scatter)(m, &output[i].array, base[inputs + i], place, part, value);
            }
        }
        for (I n = 0; n < place.entries; n++) NAME(next)(&place, m);
    }
}
