"""Products of values that both depend on the inputs, such as ``bmm``, ``einsum`` and ``nn.Bilinear``.

The operations need no formula here: like the matrices of affine operations, their coefficients are found by applying
them to unit vectors. A bilinear function Σᵢⱼ Tᵢⱼₒ uᵢ vⱼ is then a matrix applied to a product entry by entry.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessquik.importing.graph import Map, Node, Product, affine, as_map, identity, refuse
from hessquik.importing.interpreting import Features, axis_of_rows, by_trial, features_in, filled

__all__ = ["apply_bilinear"]

#: Pairs of entries (uᵢ, vⱼ), and coefficients Tᵢⱼₒ, that are tried.
MAX_PAIRS = 1 << 14
MAX_COEFFICIENTS = 1 << 24
#: Products of one operation.
MAX_PRODUCTS = 4096

Function = Callable[[Sequence[Tensor]], Tensor]


def apply_bilinear(place: str, function: Callable[..., Tensor], args: Sequence[Any], rows: int) -> Features:
    """Return the result of an operation that multiplies values: c + Σₖ Aₖ uₖ + Σₖₗ Tₖₗ(uₖ, uₗ) with k < l.

    Args:
        place: The node's name.
        function: The operation on tensors of ``rows`` rows.
        args: Its arguments, at least two of which are :class:`Features`.
        rows: Number of rows.

    Raises:
        UnsupportedError: the operation is another function, its rows depend on each other, or it is too large.
    """
    features = features_in(args)
    zeros = [torch.zeros(each.whole(rows), dtype=torch.float64) for each in features]
    offset = function(*filled(args, iter(zeros)))

    def change(arrays: Sequence[Tensor]) -> Tensor:
        return function(*filled(args, iter(arrays))) - offset

    axis = axis_of_rows(place, change, None, features, rows)

    def rows_first(arrays: Sequence[Tensor]) -> Tensor:
        arranged = [each.arrange(array) for each, array in zip(features, arrays, strict=True)]
        return change(arranged).movedim(axis or 0, 0).reshape(rows, -1)

    generator = torch.Generator().manual_seed(0)
    trial = [torch.randn(rows, each.node.width, dtype=torch.float64, generator=generator) for each in features]
    constant = offset.movedim(axis or 0, 0)
    shape = tuple(constant.shape[1:])
    constant = constant.reshape(rows, -1)
    terms: list[tuple[Node, Map]] = []
    predicted, size = torch.zeros_like(constant), torch.zeros_like(constant)
    for k, each in enumerate(features):
        alone = _only(rows_first, features, (k,), rows)
        if (change_of_one := alone([trial[k]])).any():
            found = by_trial(place, alone, None, [Features(each.node, (each.node.width,))], rows)
            terms.append((found.node, 1.0))
            predicted, size = predicted + change_of_one, size + change_of_one.abs()
    for k, l in itertools.combinations(range(len(features)), 2):
        coefficients = _coefficients(place, rows_first, features, (k, l), rows)
        if coefficients.any():
            terms.append(_products(place, features[k].node, features[l].node, coefficients))
            predicted = predicted + torch.einsum("ri,rj,ijo->ro", trial[k], trial[l], coefficients)
            size = size + torch.einsum("ri,rj,ijo->ro", trial[k].abs(), trial[l].abs(), coefficients.abs())
    is_exact = bool(((rows_first(trial) - predicted).abs() <= 1e-9 * size).all())
    if not is_exact or not bool((constant == constant[:1]).all()):
        several = "multiplies more than two values that depend on the inputs, or " if len(features) > 2 else ""
        raise refuse(place, f"{several}lets rows depend on each other", "compute each row alone, of two factors")
    if not terms:
        terms = [(features[0].node, torch.zeros(features[0].node.width, constant.shape[1], dtype=torch.float64))]
    return Features(affine(place, terms, constant[0].clone()), shape, axis)


def _only(function: Function, features: Sequence[Features], chosen: tuple[int, ...], rows: int) -> Function:
    """Return a function of the chosen values with all others at 0."""

    def part(arrays: Sequence[Tensor]) -> Tensor:
        given = dict(zip(chosen, arrays, strict=True))
        rest = (torch.zeros(rows, each.node.width, dtype=torch.float64) for each in features)
        return function([given.get(k, zero) for k, zero in enumerate(rest)])

    return part


def _coefficients(
    place: str, function: Function, features: Sequence[Features], pair: tuple[int, int], rows: int
) -> Tensor:
    """Return T (p, q, m) of two values of p and q features."""
    p, q = (features[k].node.width for k in pair)
    both, left, right = (_only(function, features, chosen, rows) for chosen in (pair, pair[:1], pair[1:]))
    outputs = both([torch.zeros(rows, p, dtype=torch.float64), torch.zeros(rows, q, dtype=torch.float64)]).shape[1]
    if p * q > MAX_PAIRS or p * q * outputs > MAX_COEFFICIENTS:
        raise refuse(
            place,
            f"multiplies {p} by {q} values that both depend on the inputs",
            f"multiply values of at most {MAX_PAIRS} pairs, or entry by entry",
        )
    u, v = identity(p).repeat_interleave(q, 0), identity(q).repeat(p, 1)
    found = []
    for a, b in zip(u.split(rows), v.split(rows), strict=True):
        x, y = (torch.cat([each, each.new_zeros(rows - len(each), each.shape[1])]) for each in (a, b))
        found.append((both([x, y]) - left([x]) - right([y]))[: len(a)])
    return torch.cat(found).reshape(p, q, outputs)


def _products(place: str, u: Node, v: Node, coefficients: Tensor) -> tuple[Node, Map]:
    """Return a product entry by entry and the matrix that makes the results of it, by the fewest products.

    These are uᵢ vⱼ for all pairs, or uᵢ (Σⱼ Tᵢⱼₒ vⱼ) for all i and o, or (Σᵢ Tᵢⱼₒ uᵢ) vⱼ for all j and o.
    """
    p, q, m = coefficients.shape
    i, j = coefficients.any(2).nonzero(as_tuple=True)
    ways = [(identity(p)[:, i], identity(q)[:, j], coefficients[i, j])]
    i, o = coefficients.any(1).nonzero(as_tuple=True)
    ways.append((identity(p)[:, i], coefficients[i, :, o].T, identity(m)[o]))
    j, o = coefficients.any(0).nonzero(as_tuple=True)
    ways.append((coefficients[:, j, o], identity(q)[:, j], identity(m)[o]))
    left, right, out = min(ways, key=lambda way: len(way[2]))
    if len(out) > MAX_PRODUCTS:
        raise refuse(
            place,
            f"multiplies values that both depend on the inputs, in {len(out)} products",
            f"multiply at most {MAX_PRODUCTS} pairs of values",
        )
    a, b = affine(place, [(u, as_map(left))]), affine(place, [(v, as_map(right))])
    if u is v and torch.equal(left, right):
        b = a  # so that the product is known as a square
    return Product(place, len(out), a, b), as_map(out)
