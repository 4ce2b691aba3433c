"""Functions of one variable z as data: formulas that files can hold, with exact first and second derivatives.

A formula is ``"z"``, a number, or a list ``[operation, formula, …]`` with an operation of :data:`UNARY` or
:data:`BINARY`, or ``["power", formula, k]`` with a whole k or ±0.5; ``["mul", "z", ["sigmoid", "z"]]`` is SiLU. All
operations are smooth where they are defined, and so is every formula.

Derivatives follow by the chain rule, operation by operation: with u the inner function, (f ∘ u)' = f'(u) u' and
(f ∘ u)'' = f''(u) u'² + f'(u) u''.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["BINARY", "MAX_OPERATIONS", "UNARY", "Formula", "differentiate", "fault"]

#: ``"z"``, a number or a list.
Formula = Any
#: A number stands for a constant, whose derivatives are 0.
Value = Tensor | float
#: Value, first and second derivative.
Jet = tuple[Value, Value, Value]

#: Operations of one formula, so that a file cannot hold an endless one.
MAX_OPERATIONS = 64


def _cut(u: Tensor) -> Tensor:
    """Hold u where exp(−u²) is surely 0, so that what it is multiplied with stays finite."""
    return u.clamp(-40.0, 40.0)


def _density(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * _cut(u) * _cut(u)) / math.sqrt(2 * math.pi)


def _bell(u: Tensor) -> Tensor:
    return 2 / math.sqrt(math.pi) * torch.exp(-_cut(u) * _cut(u))


#: f(u), and (f', f'') from u and f(u).
UNARY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], tuple[Value, Value]]]] = {
    "neg": (torch.neg, lambda u, f: (-1.0, 0.0)),
    "exp": (torch.exp, lambda u, f: (f, f)),
    "expm1": (torch.expm1, lambda u, f: (f + 1, f + 1)),
    "log": (torch.log, lambda u, f: (1 / u, -1 / (u * u))),
    "log1p": (torch.log1p, lambda u, f: (1 / (1 + u), -1 / ((1 + u) * (1 + u)))),
    "sqrt": (torch.sqrt, lambda u, f: (0.5 / f, -0.25 / (f * u))),
    "sin": (torch.sin, lambda u, f: (torch.cos(u), -f)),
    "cos": (torch.cos, lambda u, f: (-torch.sin(u), -f)),
    "atan": (torch.atan, lambda u, f: (1 / (1 + u * u), -2 * u / ((1 + u * u) * (1 + u * u)))),
    "tanh": (torch.tanh, lambda u, f: (1 - f * f, -2 * f * (1 - f * f))),
    "sigmoid": (torch.sigmoid, lambda u, f: (f * (1 - f), f * (1 - f) * (1 - 2 * f))),
    "softplus": (
        lambda u: torch.nn.functional.softplus(u, 1.0, 40.0),
        lambda u, f: (torch.sigmoid(u), torch.sigmoid(u) * torch.sigmoid(-u)),
    ),
    "erf": (torch.erf, lambda u, f: (_bell(u), -2 * _cut(u) * _bell(u))),
    "ndtr": (torch.special.ndtr, lambda u, f: (_density(u), -_cut(u) * _density(u))),
}


def _plus(a: Value, b: Value) -> Value:
    return b if _is(a, 0.0) else a if _is(b, 0.0) else a + b


def _times(a: Value, b: Value) -> Value:
    if _is(a, 0.0) or _is(b, 0.0):
        return 0.0
    return b if _is(a, 1.0) else a if _is(b, 1.0) else a * b


def _is(a: Value, number: float) -> bool:
    return isinstance(a, float) and a == number


def _product(a: Jet, b: Jet) -> Jet:
    middle = _times(2.0, _times(a[1], b[1]))
    second = _plus(_plus(_times(a[2], b[0]), middle), _times(a[0], b[2]))
    return _times(a[0], b[0]), _plus(_times(a[1], b[0]), _times(a[0], b[1])), second


def _sum(a: Jet, b: Jet) -> Jet:
    return _plus(a[0], b[0]), _plus(a[1], b[1]), _plus(a[2], b[2])


def _negative(a: Jet) -> Jet:
    return _times(-1.0, a[0]), _times(-1.0, a[1]), _times(-1.0, a[2])


def _power(a: Jet, exponent: float) -> Jet:
    """Return the jet of a to a whole power or ±½."""
    if exponent == 0.5:
        return _apply("sqrt", a)
    if exponent < 0:
        value = _power(a, -exponent)
        return _quotient((1.0, 0.0, 0.0), value)
    result: Jet = (1.0, 0.0, 0.0)
    square, left = a, int(exponent)
    while left:
        result = _product(result, square) if left % 2 else result
        left //= 2
        square = _product(square, square) if left else square
    return result


def _quotient(a: Jet, b: Jet) -> Jet:
    """Return the jet of a / b: with q = a / b, q' = (a' − q b') / b and q'' = (a'' − 2 q' b' − q b'') / b."""
    value = a[0] / b[0]
    first = _plus(a[1], _times(-1.0, _times(value, b[1]))) / b[0]
    second = _plus(a[2], _times(-2.0, _times(first, b[1])))
    return value, first, _plus(second, _times(-1.0, _times(value, b[2]))) / b[0]


BINARY: dict[str, Callable[[Jet, Jet], Jet]] = {
    "add": _sum,
    "sub": lambda a, b: _sum(a, _negative(b)),
    "mul": _product,
    "div": _quotient,
}


def _apply(operation: str, a: Jet) -> Jet:
    value, derivatives = UNARY[operation]
    u = a[0] if not isinstance(a[0], float) else torch.tensor(a[0], dtype=torch.float64)
    f = value(u)
    first, second = derivatives(u, f)
    return f, _times(first, a[1]), _plus(_times(second, _times(a[1], a[1])), _times(first, a[2]))


def differentiate(formula: Formula, z: Tensor) -> Jet:
    """Return value, first and second derivative of a formula at z, each a tensor or, if it is constant, a number.

    Examples:
        >>> value, first, second = differentiate(["mul", "z", ["exp", "z"]], torch.zeros(1))
        >>> value, first, second
        (tensor([0.]), tensor([1.]), tensor([2.]))
    """
    if formula == "z":
        return z, 1.0, 0.0
    if isinstance(formula, int | float):
        return float(formula), 0.0, 0.0
    operation, *operands = formula
    if operation == "power":
        return _power(differentiate(operands[0], z), operands[1])
    jets = [differentiate(operand, z) for operand in operands]
    return BINARY[operation](*jets) if operation in BINARY else _apply(operation, *jets)


def fault(formula: Formula) -> str | None:
    """Return what is wrong with a formula, or ``None``.

    Examples:
        >>> fault(["tanh", "z"])
        >>> fault(["tan", "z"])
        "'tan' is no operation of formulas"
    """
    waiting, operations = [formula], 0
    while waiting:
        part = waiting.pop()
        if part == "z" or _is_number(part):
            continue
        if not isinstance(part, list | tuple) or not part or not isinstance(part[0], str):
            return f"a formula must be 'z', a number or a list that begins with an operation, got {part!r:.60}"
        operation, *operands = part
        operations += 1
        if operations > MAX_OPERATIONS:
            return f"a formula must have at most {MAX_OPERATIONS} operations"
        if operation == "power" and len(operands) == 2:
            exponent = operands.pop()
            is_whole = _is_number(exponent) and exponent == int(exponent) and abs(exponent) <= 16
            if not (is_whole or (_is_number(exponent) and abs(exponent) == 0.5)):
                return f"an exponent must be a whole number from -16 to 16, 0.5 or -0.5, got {exponent!r:.60}"
        elif operation not in UNARY and operation not in BINARY:
            return f"{operation!r:.60} is no operation of formulas"
        elif len(operands) != (1 if operation in UNARY else 2):
            return f"{operation} must have {1 if operation in UNARY else 2} operands, got {len(operands)}"
        waiting += operands
    return None if operations else "a formula must have at least one operation"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
