"""Recognition of functions of one variable that several nodes of a graph compute: x · sigmoid(x) is SiLU.

:func:`resolve` replaces every product in a graph. A product of two functions of the same value becomes a formula of
this value; any other product becomes a difference of squares, u v = (u + v)²/4 − (u − v)²/4, which is exact.

Formulas here may also have the operations ``abs`` and ``relu``, which have a kink. Where the kinks cancel, as in
softplus = max(z, 0) + log(1 + exp(−|z|)), the formula is recognised by its normal form, a sum of products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from hessquik import activations as act
from hessquik.activations import hessQuikActivationFunction
from hessquik.expressions import MAX_OPERATIONS, Formula
from hessquik.importing.graph import (
    Affine,
    Input,
    Map,
    Node,
    Pointwise,
    Product,
    affine,
    as_map,
    compose,
    diagonal,
    evaluate,
    identity,
    ordered,
)

__all__ = ["KINKED", "is_nonnegative", "resolve"]

#: Operations that the formulas in files may not have.
KINKED = ("abs", "relu")
#: Operations that have a kink where their argument is a square.
ROOTS = ("sqrt", "power")
#: Operations whose results are nowhere below 0.
NONNEGATIVE = ("exp", "ndtr", "sigmoid", "softplus", "sqrt")
#: Relative difference up to which coefficients of two normal forms count as equal.
TOLERANCE = 1e-12
#: Most terms of a normal form; a formula with more is not recognised.
MAX_TERMS = 32

#: Activations as formulas.
FORMULAS: dict[type[hessQuikActivationFunction], Formula] = {
    act.arctanActivation: ["atan", "z"],
    act.expActivation: ["exp", "z"],
    act.geluActivation: ["mul", "z", ["ndtr", "z"]],
    act.identityActivation: "z",
    act.quadraticActivation: ["mul", 0.5, ["mul", "z", "z"]],
    act.sigmoidActivation: ["sigmoid", "z"],
    act.siluActivation: ["mul", "z", ["sigmoid", "z"]],
    act.sinActivation: ["sin", "z"],
    act.tanhActivation: ["tanh", "z"],
}

_ROOT = 1 / math.sqrt(2)
_TANH_ARGUMENT = ["mul", math.sqrt(2 / math.pi), ["add", "z", ["mul", 0.044715, ["power", "z", 3]]]]
_SMALL = ["log1p", ["exp", ["neg", ["abs", "z"]]]]
_SMALL_BY_LOG = ["log", ["add", 1.0, ["exp", ["neg", ["abs", "z"]]]]]


def _sum(*formulas: Formula) -> Formula:
    total = formulas[0]
    for formula in formulas[1:]:
        total = ["add", total, formula]
    return total


#: Formulas, each with the activation that replaces it.
KNOWN: list[tuple[Formula, hessQuikActivationFunction]] = [
    *((formula, kind()) for kind, formula in FORMULAS.items()),
    (["mul", ["mul", 0.5, "z"], ["add", 1.0, ["erf", ["mul", _ROOT, "z"]]]], act.geluActivation()),
    (["mul", ["mul", 0.5, "z"], ["add", 1.0, ["tanh", _TANH_ARGUMENT]]], act.geluTanhActivation()),
    (["mul", "z", ["tanh", ["softplus", "z"]]], act.mishActivation()),
    (["div", "z", ["add", 1.0, ["abs", "z"]]], act.softsignActivation()),
    (["exp", ["neg", ["mul", "z", "z"]]], act.gaussianActivation()),
    (["abs", "z"], act.reluActivation(-1.0)),
    (["softplus", "z"], act.softplusActivation(1.0, 40.0)),
    (["log", ["add", 1.0, ["exp", "z"]]], act.softplusActivation(1.0, 40.0)),
    (["log1p", ["exp", "z"]], act.softplusActivation(1.0, 40.0)),
    (_sum(["relu", "z"], _SMALL), act.softplusActivation(1.0, 40.0)),
    (_sum(["relu", "z"], _SMALL_BY_LOG), act.softplusActivation(1.0, 40.0)),
]


def resolve(output: Node, x: Tensor) -> Node:
    """Return a graph that computes the same value without products and without formulas that have kinks.

    Args:
        output: The value.
        x: Points (n, d), at which the factors of products are compared in size.
    """
    rewritten: dict[Node, Node] = {}
    values: dict[Node, Tensor] = {}
    chains: dict[Node, dict[Node, Formula]] = {}
    for node in ordered([output]):
        new: Node
        match node:
            case Input():
                rewritten[node] = node
                chains[node] = {node: "z"}
                values[node] = x
                continue
            case Affine():
                terms = [(rewritten[term], matrix) for term, matrix in node.terms]
                total = Affine(node.place, node.width, tuple(terms), node.offset)
                chain = _sum_chain(total, chains)
                new = _recognise_kinks(node, chain) or total
            case Pointwise():
                of = rewritten[node.of]
                formula = _formula(node.function)
                chain = {} if formula is None else _composed(formula, chains[of])
                new = _recognise_kinks(node, chain) or _applied(node, of)
            case Product():
                new, chain = _product(node, rewritten[node.left], rewritten[node.right], chains, values)
        rewritten[node] = new
        chains[new] = {new: "z"} | chain
    return rewritten[output]


def _product(
    node: Product,
    left: Node,
    right: Node,
    chains: dict[Node, dict[Node, Formula]],
    values: dict[Node, Tensor],
) -> tuple[Node, dict[Node, Formula]]:
    """Return a node that computes a product without one, and its formulas, one for each value that it is one of.

    If an exporter multiplied one factor by constants, as in z ⊙ (c ⊙ σ(z)), they are moved out of the product first.
    """
    for (u, a), (v, b) in itertools.product(_unscaled(left), _unscaled(right)):
        chain = _joined("mul", chains.get(u, {}), chains.get(v, {}))
        found = _function_of_one(node, chain)
        if found is not None:
            new = affine(node.place, [(found, compose(a, b))])
            return new, chain if new is found else {}
    logarithms = [_logarithm(left), _logarithm(right)]
    if None in logarithms:
        new = _polarised(node.place, left, right, _balancing(left, right, values))
    else:
        argument = affine(node.place, [(part, 1.0) for part in logarithms if part is not None])
        new = Pointwise(node.place, node.width, argument, act.expActivation())
    return new, _joined("mul", chains[left], chains[right])


def _unscaled(node: Node) -> list[tuple[Node, Map]]:
    """Return the ways to write a value as a node times a map: as itself and, if it scales a term, as that term."""
    found: list[tuple[Node, Map]] = [(node, 1.0)]
    if isinstance(node, Affine) and len(node.terms) == 1 and node.offset is None:
        ((term, matrix),) = node.terms
        if isinstance(matrix, Tensor) and torch.equal(matrix, torch.diag(torch.diagonal(matrix))):
            found.append((term, matrix))
    return found


def _function_of_one(node: Product, chain: dict[Node, Formula]) -> Node | None:
    """Return a product as a function of one value, or ``None`` if it is none or the function has kinks."""
    for base, formula in chain.items():
        function = _finished(formula)
        if function is not None:
            return Pointwise(node.place, node.width, base, function)
    return None


def _recognise_kinks(node: Node, chain: dict[Node, Formula]) -> Node | None:
    """Return a node with the function that a formula with kinks is in simpler terms, or ``None``.

    In some the kinks cancel; the root of a square has one, although its operations have none.
    """
    for base, formula in chain.items():
        if formula in (["abs", "z"], ["relu", "z"]):
            continue
        factor, found = (1.0, _finished(formula)) if _has(KINKED, formula) else _absolute(formula)
        if found is not None:
            return affine(node.place, [(Pointwise(node.place, node.width, base, found), factor)])
    return None


def _absolute(formula: Formula) -> tuple[float, hessQuikActivationFunction | None]:
    """Return c and |z| if a formula with a root is c |z|."""
    normal = _normal_or_none(formula) if _has(ROOTS, formula) else None
    if normal is None or list(normal) != [_ABSOLUTE]:
        return 1.0, None
    return normal[_ABSOLUTE], act.reluActivation(-1.0)


def _applied(node: Pointwise, of: Node) -> Node:
    """Return the node of a function of a value."""
    function = _finished(node.function)
    assert function is not None, "readers make formulas of one operation"
    return Pointwise(node.place, node.width, of, function)


def _has(operations: Collection[str], formula: Formula) -> bool:
    """Return True if a formula has one of some operations."""
    return isinstance(formula, list) and (formula[0] in operations or any(_has(operations, p) for p in formula[1:]))


def _formula(function: hessQuikActivationFunction | Formula) -> Formula | None:
    """Return an activation as a formula, if it has one."""
    if isinstance(function, act.softplusActivation):
        scaled = ["softplus", ["mul", function.beta, "z"]]
        return ["mul", 1 / function.beta, scaled] if function.beta != 1 else ["softplus", "z"]
    if isinstance(function, act.expressionActivation):
        return function.formula
    if isinstance(function, act.reluActivation) and function.negative_slope == 0:
        return ["relu", "z"]
    if isinstance(function, hessQuikActivationFunction):
        return FORMULAS.get(type(function))
    return function


def is_nonnegative(value: Node) -> bool:
    """Return True if it is plain that a value has no entry below 0, as a sum of squares or exponentials has none."""
    found: set[Node] = set()
    for node in ordered([value]):
        match node:
            case Pointwise():
                is_known = _has_no_negative(_formula(node.function))
            case Affine():
                numbers = [torch.as_tensor(matrix) for _, matrix in node.terms]
                numbers += [] if node.offset is None else [node.offset]
                is_known = all(term in found for term, _ in node.terms) and all(bool((n >= 0).all()) for n in numbers)
            case Product():
                is_known = node.left is node.right or {node.left, node.right} <= found
            case _:
                is_known = False
        found |= {node} if is_known else set()
    return value in found


def _has_no_negative(formula: Formula | None) -> bool:
    """Return True if it is plain that a formula is nowhere below 0."""
    if not isinstance(formula, list):
        return isinstance(formula, int | float) and formula >= 0
    operation, *parts = formula
    if operation in {"add", "mul"} and all(map(_has_no_negative, parts)):
        return True
    is_square = (operation == "mul" and parts[0] == parts[1]) or (operation == "power" and parts[1] % 2 == 0)
    return is_square or operation in NONNEGATIVE


def _logarithm(node: Node) -> Node | None:
    """Return the logarithm of an exponential, or of a root or a negative power, be it scaled; else ``None``.

    Products of these are exponentials of sums, which keep their digits where one factor is far larger than the other.
    """
    match node:
        case Pointwise(function=act.expActivation()):
            return node.of
        case Pointwise():
            formula = _formula(node.function)
            if not isinstance(formula, list) or formula[:2] not in (["power", "z"], ["sqrt", "z"]):
                return None
            exponent = 0.5 if formula[0] == "sqrt" else float(formula[2])
            if exponent >= 1 or not is_nonnegative(node.of):  # whole powers have derivatives at 0, logarithms none
                return None
            logarithm = Pointwise(node.place, node.width, node.of, act.expressionActivation(["log", "z"]))
            return affine(node.place, [(logarithm, exponent)])
        case Affine(terms=((term, matrix),), offset=None):
            full = matrix * identity(node.width) if isinstance(matrix, float) else matrix
            inner = _logarithm(term) if bool((((full > 0).sum(0) == 1) & ((full >= 0).all(0))).all()) else None
            return inner and affine(node.place, [(inner, as_map((full > 0).double()))], full.sum(0).log())
    return None


def _polarised(place: str, u: Node, v: Node, factors: Tensor) -> Node:
    """Return u ⊙ v as ½ q(su + v/s) − ½ q(su − v/s) with factors s and q(z) = z²/2."""
    s, inverse, square = diagonal(factors), diagonal(1 / factors), act.quadraticActivation()
    squares = [
        (Pointwise(place, u.width, affine(place, [(u, s), (v, compose(inverse, sign))]), square), sign / 2)
        for sign in (1.0, -1.0)
    ]
    return affine(place, squares)


def _balancing(u: Node, v: Node, values: dict[Node, Tensor]) -> Tensor:
    """Return factors s, powers of 2, with which su is about as large as v/s.

    The squares of a sum and a difference of unequal numbers cancel but for their last digits.
    """
    evaluate([u, v], values)
    exponent = (values[v].abs().mean(0).log2() - values[u].abs().mean(0).log2()) / 2
    return torch.exp2(torch.where(exponent.isfinite(), exponent, 0.0).round())


def _composed(formula: Formula, chain: dict[Node, Formula]) -> dict[Node, Formula]:
    """Return a formula of a value in terms of each node that the value itself is a formula of."""
    return _bounded({base: _substitute(formula, inner) for base, inner in chain.items()})


def _joined(operation: str, left: dict[Node, Formula], right: dict[Node, Formula]) -> dict[Node, Formula]:
    """Return an operation on two values in terms of each node that both are formulas of, the nearest first."""
    return _bounded({base: [operation, left[base], right[base]] for base in left if base in right})


def _bounded(chain: dict[Node, Formula]) -> dict[Node, Formula]:
    return {base: formula for base, formula in chain.items() if _size(formula) <= MAX_OPERATIONS}


def _sum_chain(node: Affine, chains: dict[Node, dict[Node, Formula]]) -> dict[Node, Formula]:
    """Return a sum of multiples of values plus one number in terms of each node that all values are formulas of."""
    offset = 0.0 if node.offset is None else float(node.offset[0])
    is_uniform = node.offset is None or bool((node.offset == offset).all())
    if not is_uniform or not all(isinstance(matrix, float) for _, matrix in node.terms):
        return {}
    total: dict[Node, Formula] | None = None
    for term, factor in node.terms:
        chain = {base: _multiple(float(factor), formula) for base, formula in chains[term].items()}
        total = chain if total is None else _joined("add", total, chain)
    assert total is not None
    return _bounded({base: ["add", formula, offset] if offset else formula for base, formula in total.items()})


def _multiple(factor: float, formula: Formula) -> Formula:
    return formula if factor == 1 else ["neg", formula] if factor == -1 else ["mul", factor, formula]


def _substitute(formula: Formula, inner: Formula) -> Formula:
    """Return a formula with another in the place of z.

    Examples:
        >>> _substitute(["mul", "z", ["tanh", "z"]], ["exp", "z"])
        ['mul', ['exp', 'z'], ['tanh', ['exp', 'z']]]
    """
    if isinstance(formula, list | tuple):
        return [formula[0], *(_substitute(part, inner) for part in formula[1:])]
    return inner if formula == "z" else formula


def _size(formula: Formula) -> int:
    """Return the number of operations of a formula."""
    return 1 + sum(map(_size, formula[1:])) if isinstance(formula, list | tuple) else 0


def _named(formula: Formula) -> hessQuikActivationFunction | Formula:
    """Return the activation that a formula is equal to, or the formula; without kinks, if they cancel.

    Examples:
        >>> _named(["mul", ["sigmoid", "z"], "z"])
        siluActivation()
        >>> _named(["mul", ["abs", "z"], ["abs", "z"]])
        ['mul', 1.0, ['power', 'z', 2]]
    """
    normal = _normal_or_none(formula)
    if normal is None:
        return formula
    known = next((activation for known, activation in _NORMALS if _same(normal, known)), None)
    if known is None and _has(KINKED, formula) and all(factor == "z" for product in normal for factor, _ in product):
        return _polynomial(normal)
    return known or formula


#: A sum of products: the coefficient of each product, which is given by its factors and their exponents.
Normal = dict[tuple[tuple[Any, int], ...], float]


#: The product |z|.
_ABSOLUTE = ((("abs", "z"), 1),)


def _normal_or_none(formula: Formula) -> Normal | None:
    """Return a formula's normal form, or ``None`` if it has too many terms."""
    try:
        return _normal(formula)
    except OverflowError:
        return None


def _polynomial(normal: Normal) -> Formula:
    """Return a polynomial's normal form as a formula."""
    powers = (["mul", number, ["power", "z", dict(product).get("z", 0)]] for product, number in normal.items())
    return _sum(*powers) if normal else ["mul", 0.0, "z"]


def _normal(formula: Formula) -> Normal:
    """Return a formula as a sum of products; factors are z, and functions with their arguments in normal form."""
    if not isinstance(formula, list | tuple):
        return {(("z", 1),): 1.0} if formula == "z" else {(): float(formula)}
    operation, first, *others = formula
    a = _normal(first)
    if operation == "power" and others[0] == int(others[0]):
        return _raised(a, int(others[0]))
    if operation == "sqrt" or (operation == "power" and others[0] == 0.5):
        return _root_of(a)
    if operation == "abs" and a == {(("z", 1),): 1.0}:
        return {_ABSOLUTE: 1.0}
    if operation in _RULES:
        return _RULES[operation](a, *map(_normal, others))
    return {(((operation, _frozen(a), *others), 1),): 1.0}


def _frozen(normal: Normal) -> tuple[Any, ...]:
    """Return a normal form in hashable form, its coefficients rounded to 12 digits."""
    return tuple(sorted(((product, float(f"{number:.12g}")) for product, number in normal.items()), key=repr))


def _scaled(normal: Normal, factor: float) -> Normal:
    return {product: number * factor for product, number in normal.items()}


def _added(a: Normal, b: Normal) -> Normal:
    total = dict(a)
    for product, number in b.items():
        total[product] = total.get(product, 0.0) + number
    return {product: number for product, number in total.items() if number}


def _multiplied(a: Normal, b: Normal) -> Normal:
    total: Normal = {}
    for left, x in a.items():
        for right, y in b.items():
            factors = dict(left)
            for factor, exponent in right:
                factors[factor] = factors.get(factor, 0) + exponent
            total = _added(total, {_simplified(factors): x * y})
    if len(total) > MAX_TERMS:
        raise OverflowError("a normal form with too many terms")
    return total


def _simplified(factors: dict[Any, int]) -> tuple[tuple[Any, int], ...]:
    """Return a product of factors and exponents in its one form, with |f|² as f²."""
    plain: dict[Any, int] = {}
    for factor, k in factors.items():
        is_even = factor[0] == "abs" and k % 2 == 0
        base = factor[1] if is_even else factor
        plain[base] = plain.get(base, 0) + k
    return tuple(sorted(((f, k) for f, k in plain.items() if k), key=repr))


def _root_of(a: Normal) -> Normal:
    """Return √a: that of a square c f² is √c |f|."""
    if len(a) == 1:
        ((product, number),) = a.items()
        if number > 0 and all(k % 2 == 0 for _, k in product):
            return {_simplified({("abs", f): k // 2 for f, k in product}): math.sqrt(number)}
    return {((("sqrt", _frozen(a)), 1),): 1.0}


def _raised(a: Normal, exponent: int) -> Normal:
    if len(a) == 1 and exponent < 0:
        ((product, number),) = a.items()
        return {tuple((factor, k * exponent) for factor, k in product): number**exponent}
    if exponent < 0:
        return {((("sum", _frozen(a)), exponent),): 1.0}
    result: Normal = {(): 1.0}
    for _ in range(exponent):
        result = _multiplied(result, a)
    return result


#: Normal forms of operations from those of their operands.
_RULES: dict[str, Callable[..., Normal]] = {
    "neg": lambda a: _scaled(a, -1.0),
    "add": _added,
    "sub": lambda a, b: _added(a, _scaled(b, -1.0)),
    "mul": _multiplied,
    "div": lambda a, b: _multiplied(a, _raised(b, -1)),
}


def _same(a: Normal, b: Normal) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[key], b[key], rel_tol=TOLERANCE) for key in a)


def _finished(function: hessQuikActivationFunction | Formula) -> hessQuikActivationFunction | None:
    """Return a function of one variable as an activation, or ``None`` for a formula with kinks."""
    found = _named(function) if isinstance(function, list | tuple | str) else function
    if isinstance(found, hessQuikActivationFunction):
        return found
    return None if _has(KINKED, found) else act.expressionActivation(found)


_NORMALS = [(_normal(formula), activation) for formula, activation in KNOWN]
