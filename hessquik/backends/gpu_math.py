"""The pointwise primitives in Triton, accurate in float32 and float64.

They use additions, products, divisions and bit operations only, so the same source runs on a GPU and in Triton's
interpreter. Sine and cosine are left to the compiler, because reducing large arguments takes long tables. Each docstring
gives the formula; ulp is the distance between neighbouring floating-point numbers.

Each product and each sum is rounded, except in polynomials: there a term is one fused multiply-add, with one rounding on a
GPU and two in the interpreter.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "atan",
    "divide",
    "erf",
    "exp",
    "expm1",
    "log",
    "log1p",
    "ndtr",
    "sigmoid",
    "square_root",
    "tanh",
]


@triton.jit
def divide(a, b):
    """Return a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(x):
    """Return √x, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _polynomial(x, coefficients: tl.constexpr):
    """Return the polynomial with coefficients c₀, c₁, …, highest power first, by Horner's rule."""
    y = tl.full(x.shape, coefficients[0], x.dtype)
    for i in tl.static_range(1, len(coefficients)):
        y = tl.fma(y, x, tl.full(x.shape, coefficients[i], x.dtype))
    return y


@triton.jit
def _power_of_two(k, like):
    """Return 2ᵏ in the dtype of ``like``; k must be the exponent of a normal number."""
    if like.dtype == tl.float64:
        return ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _reduced_expm1(x):
    """Return the integer k and eʳ − 1 = r + r² (1/2! + r/3! + …), where x = k ln 2 + r and |r| ≤ ln 2 / 2."""
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    if x.dtype == tl.float64:
        r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
        q = _polynomial(
            r,
            (
                1 / 6227020800,
                1 / 479001600,
                1 / 39916800,
                1 / 3628800,
                1 / 362880,
                1 / 40320,
                1 / 5040,
                1 / 720,
                1 / 120,
                1 / 24,
                1 / 6,
                0.5,
            ),
        )
    else:
        r = (x - k * 0.693359375) + k * 2.12194440054690583e-4
        q = _polynomial(r, (1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5))
    return k.to(tl.int32), r + r * r * q


@triton.jit
def _within(x, low: tl.constexpr, high: tl.constexpr):
    """Return x clamped to an interval; NaN becomes one of its ends."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def exp(x):
    """Return eˣ = 2ᵏ eʳ, to 1 ulp; 0 on underflow and infinity on overflow."""
    if x.dtype == tl.float64:
        k, p = _reduced_expm1(_within(x, -746.0, 710.0))
    else:
        k, p = _reduced_expm1(_within(x, -104.5, 89.0))
    half = k >> 1
    y = (1.0 + p) * _power_of_two(half, x) * _power_of_two(k - half, x)
    return tl.where(x != x, x, y)


@triton.jit
def expm1(x):
    """Return eˣ − 1 = 2ᵏ (eʳ − 1) + (2ᵏ − 1), to 2 ulp."""
    k, p = _reduced_expm1(_within(x, -60.0, 60.0))
    s = _power_of_two(k, x)
    y = s * p + (s - 1.0)
    y = tl.where(x > 50.0, exp(x), y)
    return tl.where((x != x) | (x == 0.0), x, y)


@triton.jit
def _log_of_normal(x):
    """Return log x of a normal positive number.

    log x = k ln 2 + log(1 + f) with √½ ≤ 1 + f < √2, and log(1 + f) = f − f²/2 + s (f²/2 + R) with s = f / (2 + f) and
    R = 2 s² (1/3 + s²/5 + s⁴/7 + …), from the series of the inverse hyperbolic tangent.
    """
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        k = ((bits >> 52) - 1023).to(tl.int32)
        m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        k = (bits >> 23) - 127
        m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    is_upper = m > 1.4142135623730951
    m = tl.where(is_upper, m * 0.5, m)
    k = (k + is_upper.to(tl.int32)).to(x.dtype)
    f = m - 1.0
    s = divide(f, f + 2.0)
    z = s * s
    if x.dtype == tl.float64:
        series = _polynomial(z, (2 / 23, 2 / 21, 2 / 19, 2 / 17, 2 / 15, 2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))
    else:
        series = _polynomial(z, (2 / 13, 2 / 11, 2 / 9, 2 / 7, 2 / 5, 2 / 3))
    half = 0.5 * f * f
    if x.dtype == tl.float64:
        low = s * (half + series * z) + k * 1.90821492927058770002e-10
        return k * 6.93147180369123816490e-01 - ((half - low) - f)
    else:
        low = s * (half + series * z) - k * 2.12194440054690583e-4
        return k * 0.693359375 - ((half - low) - f)


@triton.jit
def log(x):
    """Return log x, to 1 ulp; for subnormal x it is log(2⁶⁰ x) − 60 log 2."""
    if x.dtype == tl.float64:
        is_small = x < 2.2250738585072014e-308
    else:
        is_small = x < 1.1754943508222875e-38
    y = _log_of_normal(tl.where(is_small, x * 1152921504606846976.0, x))
    y = tl.where(is_small, y - 41.58883083359672, y)
    y = tl.where(x == 0.0, -float("inf"), y)
    y = tl.where(x == float("inf"), x, y)
    return tl.where((x < 0.0) | (x != x), float("nan"), y)


@triton.jit
def log1p(x):
    """Return log(1 + x) = x log(u) / (u − 1) with u = 1 + x as rounded, to 2 ulp (W. Kahan)."""
    u = 1.0 + x
    y = log(u)
    y = tl.where(u == float("inf"), y, divide(y * x, u - 1.0))
    y = tl.where(u == 0.0, -float("inf"), y)
    return tl.where(u == 1.0, x, y)


@triton.jit
def tanh(x):
    """Return tanh x: −t / (2 + t) with t = e^(−2|x|) − 1, and the sign of x."""
    t = expm1(-2.0 * tl.abs(x))
    y = divide(-t, 2.0 + t)
    y = tl.where(x < 0.0, -y, y)
    return tl.where((x == 0.0) | (x != x), x, y)


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e⁻ˣ), computed from e^(−|x|) so that neither tail loses accuracy."""
    e = exp(-tl.abs(x))
    return divide(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def _erf_near_zero(x):
    """Return erf x for |x| ≤ 0.46875: x times a quotient of polynomials in x²."""
    z = x * x
    a = _polynomial(
        z,
        (
            1.85777706184603153e-1,
            3.16112374387056560,
            1.13864154151050156e2,
            3.77485237685302021e2,
            3.20937758913846947e3,
        ),
    )
    b = _polynomial(
        z, (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
    )
    return x * divide(a, b)


@triton.jit
def _erfc_of_positive(y):
    """Return 1 − erf y for y ≥ 0.46875: e^(−y²) times a quotient of polynomials, in y up to 4 and in 1/y² beyond.

    W. J. Cody, Rational Chebyshev approximations for the error function, Math. Comp. 23 (1969). A rounding error of y²
    would be magnified by the exponential, so y² is split: y² = c² + (y − c)(y + c) with c = ⌊16 y⌋ / 16.
    """
    y = _within(y, 0.46875, 30.0)
    a = _polynomial(
        y,
        (
            2.15311535474403846e-8,
            5.64188496988670089e-1,
            8.88314979438837594,
            6.61191906371416295e1,
            2.98635138197400131e2,
            8.81952221241769090e2,
            1.71204761263407058e3,
            2.05107837782607147e3,
            1.23033935479799725e3,
        ),
    )
    b = _polynomial(
        y,
        (
            1.0,
            1.57449261107098347e1,
            1.17693950891312499e2,
            5.37181101862009858e2,
            1.62138957456669019e3,
            3.29079923573345963e3,
            4.36261909014324716e3,
            3.43936767414372164e3,
            1.23033935480374942e3,
        ),
    )
    near = divide(a, b)
    one = tl.full(y.shape, 1.0, y.dtype)
    z = divide(one, y * y)
    a = _polynomial(
        z,
        (
            1.63153871373020978e-2,
            3.05326634961232344e-1,
            3.60344899949804439e-1,
            1.25781726111229246e-1,
            1.60837851487422766e-2,
            6.58749161529837803e-4,
        ),
    )
    b = _polynomial(
        z,
        (
            1.0,
            2.56852019228982242,
            1.87295284992346047,
            5.27905102951428412e-1,
            6.05183413124413191e-2,
            2.33520497626869185e-3,
        ),
    )
    far = divide(5.6418958354775628695e-1 - z * divide(a, b), y)
    c = tl.floor(y * 16.0) * 0.0625
    return exp(-c * c) * exp(-(y - c) * (y + c)) * tl.where(y <= 4.0, near, far)


@triton.jit
def erf(x):
    """Return erf x, to 2 ulp."""
    tail = 1.0 - _erfc_of_positive(tl.abs(x))
    y = tl.where(x < 0.0, -tail, tail)
    y = tl.where(tl.abs(x) <= 0.46875, _erf_near_zero(_within(x, -1.0, 1.0)), y)
    return tl.where(x != x, x, y)


@triton.jit
def ndtr(x):
    """Return Φ(x) = erfc(−x / √2) / 2, the normal distribution function, without cancellation in its lower tail."""
    t = x * 0.70710678118654752440
    tail = 0.5 * _erfc_of_positive(tl.abs(t))
    y = tl.where(t < 0.0, tail, 1.0 - tail)
    y = tl.where(tl.abs(t) <= 0.46875, 0.5 + 0.5 * _erf_near_zero(_within(t, -1.0, 1.0)), y)
    return tl.where(x != x, x, y)


@triton.jit
def atan(x):
    """Return the arc tangent by its series, after two reductions of |x|.

    The reductions are t → 1/t if t > 1, then t → (t − 1) / (t + 1) if t > √2 − 1.
    """
    y = tl.abs(x)
    one = tl.full(y.shape, 1.0, y.dtype)
    is_large = y > 1.0
    t = tl.where(is_large, divide(one, y), y)
    is_upper = t > 0.41421356237309503
    t = tl.where(is_upper, divide(t - 1.0, t + 1.0), t)
    z = t * t
    if x.dtype == tl.float64:
        series = _polynomial(
            z,
            (-1 / 43, 1 / 41, -1 / 39, 1 / 37, -1 / 35, 1 / 33, -1 / 31, 1 / 29, -1 / 27, 1 / 25, -1 / 23, 1 / 21,
             -1 / 19, 1 / 17, -1 / 15, 1 / 13, -1 / 11, 1 / 9, -1 / 7, 1 / 5, -1 / 3),
        )  # fmt: skip
    else:
        series = _polynomial(
            z, (-1 / 23, 1 / 21, -1 / 19, 1 / 17, -1 / 15, 1 / 13, -1 / 11, 1 / 9, -1 / 7, 1 / 5, -1 / 3)
        )
    angle = t + t * z * series
    angle = tl.where(is_upper, 0.78539816339744830962 + angle, angle)
    angle = tl.where(is_large, 1.57079632679489661923 - angle, angle)
    angle = tl.where(x < 0.0, -angle, angle)
    return tl.where((x == 0.0) | (x != x), x, angle)
