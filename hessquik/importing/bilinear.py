"""Operations that are linear in each of two values, such as a product of two matrices that depend on the inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessquik.importing.graph import Product, affine, as_map, identity, refuse
from hessquik.importing.interpreting import Features, features_in

__all__ = ["apply_bilinear"]

#: Most pairs of entries of the two values.
MAX_PAIRS = 1 << 14


def apply_bilinear(place: str, function: Callable[..., Tensor], args: Sequence[Any], rows: int) -> Features:
    """Return Σᵢⱼ uᵢ vⱼ Tᵢⱼ, the result of an operation that is linear in u and in v.

    The coefficients T are found by applying the operation to pairs of unit vectors, as the matrices of affine
    operations are. Each pair with coefficients other than 0 becomes one product.

    Args:
        place: The node's name.
        function: The operation on tensors of ``rows`` rows.
        args: Its arguments, two of which depend on the inputs.
        rows: Number of rows.

    Raises:
        UnsupportedError: there are too many pairs, or rows depend on each other.
    """
    left, right = features_in(args)
    first, second = (i for i, arg in enumerate(args) if isinstance(arg, Features))

    def apply(u: Tensor, v: Tensor) -> Tensor:
        filled = list(args)
        filled[first], filled[second] = u.reshape(rows, *left.shape), v.reshape(rows, *right.shape)
        return function(*filled)

    p, q = left.node.width, right.node.width
    if p * q > MAX_PAIRS:
        raise refuse(
            place,
            f"multiplies {p} by {q} values that both depend on the inputs",
            f"multiply values of at most {MAX_PAIRS} pairs, or entry by entry",
        )
    shape = tuple(apply(torch.zeros(rows, p).double(), torch.zeros(rows, q).double()).shape)
    if not shape or shape[0] != rows:
        raise refuse(place, f"makes an array {shape} of {rows} rows", "keep one row per point")
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(q))
    coefficients = torch.cat([_on_units(apply, chunk, p, q, rows) for chunk in pairs.split(rows)])
    is_used = coefficients.any(1)
    i, j = pairs[is_used].T
    matrix = coefficients[is_used]
    _check(place, apply, (p, q), (i, j, matrix), rows)
    u, v = (
        affine(place, [(value.node, as_map(identity(value.node.width)[:, index]))])
        for value, index in ((left, i), (right, j))
    )
    if left.node is right.node and torch.equal(i, j):
        v = u  # so that the product is known as a square
    return Features(affine(place, [(Product(place, len(i), u, v), as_map(matrix))]), shape[1:])


def _on_units(apply: Callable[[Tensor, Tensor], Tensor], pairs: Tensor, p: int, q: int, rows: int) -> Tensor:
    """Return the results of an operation on pairs of unit vectors, one pair in each row."""
    u, v = torch.zeros(rows, p, dtype=torch.float64), torch.zeros(rows, q, dtype=torch.float64)
    row = torch.arange(len(pairs))
    u[row, pairs[:, 0]] = v[row, pairs[:, 1]] = 1.0
    return apply(u, v).reshape(rows, -1)[: len(pairs)]


def _check(
    place: str,
    apply: Callable[[Tensor, Tensor], Tensor],
    widths: tuple[int, int],
    terms: tuple[Tensor, Tensor, Tensor],
    rows: int,
) -> None:
    """Refuse an operation whose result on random rows is not the sum that was found."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for width in widths)
    i, j, matrix = terms
    if not torch.allclose(apply(u, v).reshape(rows, -1), (u[:, i] * v[:, j]) @ matrix, rtol=1e-9, atol=1e-9):
        raise refuse(place, "lets rows depend on each other", "compute each row alone")
