"""Taylor tests: the order at which the error of an approximation falls tells whether its derivatives are right.

With a step h → 0 in a direction p, exact derivatives leave
    E0 = ‖f(x + hp) − f(x)‖ = O(h)    E1 = ‖… − h p·∇f‖ = O(h²)    E2 = ‖… − ½h² pᵀ∇²f p‖ = O(h³)
and wrong ones an error of a lower order, which wins as h falls. Source: E. Haber, Computational Methods in
Geophysical Electromagnetics, SIAM 2014 (doi:10.1137/1.9781611973808), chapter 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

__all__ = ["convert_to_base", "errors", "observed_order", "rounding"]

#: Units of rounding, of the numbers that are subtracted, below which an error shows nothing.
ROUNDING_UNITS = 100
#: Fewer steps than this cannot tell an order from rounding.
LEAST_STEPS = 5


def errors(f: Callable[[float], Tensor], terms: Sequence[Tensor], steps: Sequence[float]) -> list[tuple[float, ...]]:
    """Return the errors of the Taylor approximations of orders 0, 1, … of f(h) at 0.

    Args:
        f: A function of the step.
        terms: f(0), f'(0), and f''(0) if wanted.
        steps: The steps h.

    Returns:
        For every step one error per term, each with all terms up to that one.

    Examples:
        >>> import torch
        >>> e = torch.tensor(1.0, dtype=torch.float64)
        >>> for found in errors(lambda h: math.exp(h) * e, (e, e), (1.0, 0.5)):
        ...     print(", ".join(f"{error:.4f}" for error in found))
        1.7183, 0.7183
        0.6487, 0.1487
    """
    found = []
    for h in steps:
        rest, row = f(h), []
        for order, term in enumerate(terms):
            rest = rest - h**order / math.factorial(order) * term
            row.append(float(torch.linalg.vector_norm(rest)))
        found.append(tuple(row))
    return found


def rounding(terms: Sequence[Tensor]) -> float:
    """Return the error below which subtracting the terms of a Taylor approximation leaves nothing but rounding.

    Examples:
        >>> f"{rounding([torch.ones(4, dtype=torch.float64)]):.1e}"
        '4.4e-14'
    """
    size = sum(float(torch.linalg.vector_norm(term)) for term in terms)
    return ROUNDING_UNITS * torch.finfo(terms[0].dtype).eps * size


def observed_order(found: Sequence[float], order: int, base: float, noise: float) -> float:
    """Return the power of the step at which errors at steps 1, 1/base, 1/base², … decrease.

    The smallest steps whose errors exceed rounding decide: a wrong derivative shows there, while for large steps even
    the errors of a nearly right one decrease fast.

    Args:
        found: The errors, at least :data:`LEAST_STEPS`.
        order: The expected power.
        base: Ratio of two steps.
        noise: Error that is rounding alone, see :func:`rounding`.

    Returns:
        The power; ∞ if all errors are rounding from the first step on, 0 if no error exceeds rounding or is finite.

    Raises:
        ValueError: there are too few errors.

    Examples:
        >>> f"{observed_order([4.0**-k for k in range(10)], order=2, base=2.0, noise=1e-12):.1f}"
        '2.0'
        >>> f"{observed_order([4.0**-k + 1e-3 * 2.0**-k for k in range(16)], order=2, base=2.0, noise=1e-12):.1f}"
        '1.4'
    """
    if len(found) < LEAST_STEPS:
        raise ValueError(f"there must be at least {LEAST_STEPS} steps, got {len(found)}")
    if not all(map(math.isfinite, found)):
        return 0.0
    fall = base**order
    if max(found) <= fall * noise:
        return math.inf
    # Rounding inside f may be larger than outside; then the errors of the smallest steps no longer fall.
    readable = max(fall * noise, 10 * median(found[-max(1, len(found) // 5) :]))
    orders = [math.log(here / max(after, noise), base) for here, after in pairwise(found) if here > readable]
    return median(orders[-3:]) if orders else 0.0


def convert_to_base(a: Sequence[float], b: float = 2.0) -> tuple[float, ...]:
    """Write each number as c bᵉ with 1 ≤ c < b, for readable tables.

    Args:
        a: Numbers ≥ 0; what has no such form becomes (−1, 0), as 0 does, or itself with e = 0 if not finite.
        b: Base.

    Returns:
        c and e of every number, one after the other.

    Examples:
        >>> convert_to_base((6.0, 0.375))
        (1.5, 2, 1.5, -2)
        >>> convert_to_base((300.0,), b=10.0)
        (3.0, 2)
    """
    return tuple(part for number in a for part in _to_base(number, b))


def _to_base(number: float, b: float) -> tuple[float, int]:
    if not math.isfinite(number):
        return number, 0
    if number <= 0:
        return -1, 0
    exponent = math.floor(math.log(number, b))
    half = exponent // 2  # in two steps, since b to the power of a subnormal number's exponent is 0
    scaled = number / b**half / b ** (exponent - half)
    # The logarithm may round across a whole number.
    if scaled >= b:
        return scaled / b, exponent + 1
    return (scaled, exponent) if scaled >= 1 else (scaled * b, exponent - 1)
