"""Fit the polynomials of the CPU kernel's pointwise functions, split π / 2 and ln 2, and write them as a C header.

    python tools/fit_coefficients.py > hessquik/backends/cpu/coefficients.h

Every polynomial interpolates a smooth function at Chebyshev points in high precision; its degree is the least with
which the relative error stays below an eighth of the last bit or so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import mpmath
from mpmath import mpf

mpmath.mp.dps = 60
Function = Callable[[mpf], mpf]
#: Relative errors, for float and double.
WANTED = {"float": mpf(2) ** -26, "double": mpf(2) ** -55}
#: Where the variable of erfcx, u = (a - CENTRE) / (a + CENTRE), is zero.
CENTRE = 3


def interpolate(function: Function, low: mpf, high: mpf, degree: int) -> list[mpf]:
    """Return the coefficients, constant first, of the polynomial through the Chebyshev points of an interval."""
    angles = [mpmath.pi * (2 * i + 1) / (2 * degree + 2) for i in range(degree + 1)]
    points = [(low + high) / 2 + (high - low) / 2 * mpmath.cos(angle) for angle in angles]
    rows = mpmath.matrix([[point**k for k in range(degree + 1)] for point in points])
    return list(mpmath.lu_solve(rows, mpmath.matrix([function(point) for point in points])))


def fit(function: Function, low: mpf, high: mpf, wanted: mpf) -> list[mpf]:
    """Return the shortest polynomial whose relative error is small enough."""
    samples = [low + (high - low) * i / 400 for i in range(401)]
    values = [function(sample) for sample in samples]
    for degree in range(2, 40):
        coefficients = interpolate(function, low, high, degree)
        found = (mpmath.polyval(coefficients[::-1], sample) for sample in samples)
        if max(abs(p / value - 1) for p, value in zip(found, values, strict=True)) < wanted:
            return coefficients
    raise ValueError("no polynomial of degree below 40 is good enough")


def erf_by_x(z: mpf) -> mpf:
    """Return erf(x) / x for z = x²."""
    x = mpmath.sqrt(z)
    return mpmath.erf(x) / x if x else 2 / mpmath.sqrt(mpmath.pi)


def erfcx_by_inverse(u: mpf) -> mpf:
    """Return exp(a²) erfc(a) (a + c), which is of one size for all a, for u = (a - c) / (a + c)."""
    a = CENTRE * (1 + u) / (1 - u)
    return mpmath.exp(a * a) * mpmath.erfc(a) * (a + CENTRE)


def atan_by_t(z: mpf) -> mpf:
    """Return atan(t) / t for z = t²."""
    t = mpmath.sqrt(z)
    return mpmath.atan(t) / t if t else mpf(1)


def parts(value: mpf, bits: list[int]) -> list[mpf]:
    """Return numbers of some bits each that add up to a value; the last is what remains."""
    found: list[mpf] = []
    for count in bits:
        rest = value - sum(found)
        unit = mpf(2) ** (int(mpmath.floor(mpmath.log(rest, 2))) + 1 - count)
        found.append(mpmath.floor(rest / unit) * unit)
    return [*found, value - sum(found)]


def main() -> None:
    """Print the header."""
    largest = {"float": mpf(10), "double": mpf(27)}  # exp(-a²) is below the smallest number there
    # Times the integers that they are multiplied by (of 8 and 10, or 11 and 20 bits) the first parts are exact.
    log_2 = {"float": [16], "double": [42]}
    half_pi = {"float": [14, 14, 14], "double": [33, 33]}
    lines = [
        "/* Made by tools/fit_coefficients.py: polynomials, constants first, and parts of ln 2 and pi / 2. */",
        "#ifndef HESSQUIK_COEFFICIENTS_H",
        "#define HESSQUIK_COEFFICIENTS_H",
        "",
    ]
    for kind, wanted in WANTED.items():
        end = (largest[kind] - CENTRE) / (largest[kind] + CENTRE)
        polynomials = {
            "erf": fit(erf_by_x, mpf(0), mpf(1), wanted),
            "erfcx": fit(erfcx_by_inverse, mpf(-1), end, wanted),
            "atan": fit(atan_by_t, mpf(0), mpmath.tan(mpmath.pi / 8) ** 2, wanted),
            "log_2": parts(mpmath.log(2), log_2[kind]),
            "half_pi": parts(mpmath.pi / 2, half_pi[kind]),
        }
        for name, coefficients in polynomials.items():
            digits = ",\n    ".join(mpmath.nstr(value, 20) for value in coefficients)
            lines.append(f"static const {kind} {name}_{kind}[] = {{\n    {digits},\n}};")
    lines.append(f"#define ERFCX_CENTRE {CENTRE}")
    lines += [f"#define ERFCX_LARGEST_{kind} {int(value)}" for kind, value in largest.items()]
    lines.append("#endif")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
