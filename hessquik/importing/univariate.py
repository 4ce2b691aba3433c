"""Recognition of functions of one variable that several nodes of a graph compute: x · sigmoid(x) is SiLU.

:func:`resolve` replaces every product in a graph. A product of two functions of the same value becomes a formula of
this value; any other product becomes a difference of squares, u v = (u + v)²/4 − (u − v)²/4, which is exact.

Formulas here may also have the operations ``abs`` and ``relu``, which have a kink. Where the kinks cancel, as in
softplus = max(z, 0) + log(1 + exp(−|z|)), the formula is recognised by its normal form, a sum of products.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessquik import activations as act
from hessquik.activations import hessQuikActivationFunction
from hessquik.expressions import MAX_OPERATIONS, Formula
from hessquik.importing.graph import Affine, Input, Map, Node, Pointwise, Product, affine, compose, ordered

__all__ = ["KINKED", "resolve"]

#: Operations that the formulas in files may not have.
KINKED = ("abs", "relu")
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
    (["softplus", "z"], act.softplusActivation(1.0, 40.0)),
    (["log", ["add", 1.0, ["exp", "z"]]], act.softplusActivation(1.0, 40.0)),
    (["log1p", ["exp", "z"]], act.softplusActivation(1.0, 40.0)),
    (_sum(["relu", "z"], _SMALL), act.softplusActivation(1.0, 40.0)),
    (_sum(["relu", "z"], _SMALL_BY_LOG), act.softplusActivation(1.0, 40.0)),
]


def resolve(output: Node) -> Node:
    """Return a graph that computes the same value without products and without formulas that have kinks."""
    rewritten: dict[Node, Node] = {}
    chains: dict[Node, dict[Node, Formula]] = {}
    for node in ordered([output]):
        new: Node
        match node:
            case Input():
                rewritten[node] = node
                chains[node] = {node: "z"}
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
                new, chain = _product(node, rewritten[node.left], rewritten[node.right], chains)
        rewritten[node] = new
        chains[new] = {new: "z"} | chain
    return rewritten[output]


def _product(
    node: Product, left: Node, right: Node, chains: dict[Node, dict[Node, Formula]]
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
    return _polarised(node.place, left, right), _joined("mul", chains[left], chains[right])


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
    """Return a node with the known activation that a formula with kinks is equal to, or ``None``."""
    for base, formula in chain.items():
        if formula not in (["abs", "z"], ["relu", "z"]) and _has_kinks(formula):
            found = _named(formula)
            if isinstance(found, hessQuikActivationFunction):
                return Pointwise(node.place, node.width, base, found)
    return None


def _applied(node: Pointwise, of: Node) -> Node:
    """Return the node of a function of a value; |v| becomes ReLU(v) + ReLU(−v)."""
    if node.function != ["abs", "z"]:
        function = _finished(node.function)
        assert function is not None, "readers make formulas of one operation"
        return Pointwise(node.place, node.width, of, function)
    sides = [
        Pointwise(node.place, node.width, affine(node.place, [(of, s)]), act.reluActivation()) for s in (1.0, -1.0)
    ]
    return affine(node.place, [(side, 1.0) for side in sides])


def _has_kinks(formula: Formula) -> bool:
    return isinstance(formula, list) and (formula[0] in KINKED or any(map(_has_kinks, formula[1:])))


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


def _polarised(place: str, u: Node, v: Node) -> Node:
    """Return u ⊙ v as ½ q(u + v) − ½ q(u − v) with q(z) = z²/2."""
    squares = [
        (Pointwise(place, u.width, affine(place, [(u, 1.0), (v, sign)]), act.quadraticActivation()), sign / 2)
        for sign in (1.0, -1.0)
    ]
    return affine(place, squares)


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
    """Return the activation that a formula is equal to, or the formula.

    Examples:
        >>> _named(["mul", ["sigmoid", "z"], "z"])
        siluActivation()
    """
    try:
        normal = _normal(formula)
    except OverflowError:
        return formula
    return next((activation for known, activation in _NORMALS if _same(normal, known)), formula)


#: A sum of products: the coefficient of each product, which is given by its factors and their exponents.
Normal = dict[tuple[tuple[Any, int], ...], float]


def _normal(formula: Formula) -> Normal:
    """Return a formula as a sum of products; factors are z, and functions with their arguments in normal form."""
    if not isinstance(formula, list | tuple):
        return {(("z", 1),): 1.0} if formula == "z" else {(): float(formula)}
    operation, first, *others = formula
    a = _normal(first)
    if operation == "power" and others[0] == int(others[0]):
        return _raised(a, int(others[0]))
    if operation in _RULES:
        return _RULES[operation](a, *map(_normal, others))
    return {(((operation, _frozen(a), *others), 1),): 1.0}


def _frozen(normal: Normal) -> tuple[Any, ...]:
    """Return a normal form in hashable form, its coefficients rounded to 12 digits."""
    return tuple(sorted(((repr(product), float(f"{number:.12g}")) for product, number in normal.items())))


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
            product = tuple(sorted(((f, k) for f, k in factors.items() if k), key=repr))
            total = _added(total, {product: x * y})
    if len(total) > MAX_TERMS:
        raise OverflowError("a normal form with too many terms")
    return total


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
    return None if _has_kinks(found) else act.expressionActivation(found)


_NORMALS = [(_normal(formula), activation) for formula, activation in KNOWN]
