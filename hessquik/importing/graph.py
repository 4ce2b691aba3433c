"""The graph that every reader makes of another library's network: values that depend on the inputs.

A value is the input, an affine function of other values, a function of one variable of every entry of another
(:class:`Pointwise`), or the product of two, entry by entry. Nothing else is needed, and nothing here knows of torch's
operations, ONNX or scikit-learn. Matrices are float64 and act on row vectors; a number stands for a multiple of the
identity. Each value knows its ``place``, the name of the node that computes it where it comes from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessquik.activations import hessQuikActivationFunction
from hessquik.errors import UnsupportedError
from hessquik.expressions import Formula

__all__ = [
    "MAX_WIDTH",
    "Affine",
    "Input",
    "Map",
    "Node",
    "Pointwise",
    "Product",
    "affine",
    "as_map",
    "compose",
    "diagonal",
    "evaluate",
    "identity",
    "ordered",
    "parents",
    "plus",
    "refuse",
]

#: Features of one value: matrices that select them are square.
MAX_WIDTH = 1 << 14
#: A linear map on row vectors: a matrix, or a number for that multiple of the identity.
Map = Tensor | float


@dataclass(frozen=True, eq=False, slots=True)
class Input:
    """The input of the network."""

    place: str
    width: int


@dataclass(frozen=True, eq=False, slots=True)
class Affine:
    """Σᵢ vᵢ Aᵢ + c."""

    place: str
    width: int
    terms: tuple[tuple[Node, Map], ...]
    offset: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Pointwise:
    """σ(v), entry by entry; σ is an activation or a formula of one variable."""

    place: str
    width: int
    of: Node
    function: hessQuikActivationFunction | Formula


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """u ⊙ v."""

    place: str
    width: int
    left: Node
    right: Node


Node = Input | Affine | Pointwise | Product


def refuse(place: str, does: str, instead: str) -> UnsupportedError:
    """Return the error that names a node, what it does and what to do instead.

    Examples:
        >>> print(refuse("layers.2 (conv1d)", "is a convolution", "use nn.Linear"))
        node layers.2 (conv1d) is a convolution; use nn.Linear
    """
    return UnsupportedError(f"node {place} {does}; {instead}")


def parents(node: Node) -> tuple[Node, ...]:
    """Return the values that a value is computed from."""
    match node:
        case Affine():
            return tuple(term for term, _ in node.terms)
        case Pointwise():
            return (node.of,)
        case Product():
            return (node.left, node.right)
    return ()


def ordered(outputs: Iterable[Node], until: Collection[Node] = ()) -> list[Node]:
    """Return the outputs and all that they are computed from, each value after its parents.

    Args:
        outputs: The values to begin with.
        until: Values whose parents are left out.
    """
    found: dict[Node, None] = {}
    waiting = [(node, False) for node in reversed(list(outputs))]
    while waiting:
        node, is_complete = waiting.pop()
        if is_complete:
            found[node] = None
        elif node not in found:
            waiting.append((node, True))
            if node not in until:
                waiting += [(parent, False) for parent in reversed(parents(node)) if parent not in found]
    return list(found)


def affine(place: str, terms: Sequence[tuple[Node, Map]], offset: Tensor | None = None) -> Node:
    """Return the node Σᵢ vᵢ Aᵢ + c, or v itself if the sum is just v. Terms without entries are left out."""
    widths = {term.width if isinstance(matrix, float) else matrix.shape[1] for term, matrix in terms}
    some = [(term, matrix) for term, matrix in terms if term.width]
    if not some and widths != {0}:
        source = ordered([terms[0][0]])[0]
        some = [(source, torch.zeros(source.width, *widths, dtype=torch.float64))]
    terms = some or terms
    node, linear = terms[0]
    if offset is not None and not offset.any():
        offset = None
    if len(terms) == 1 and offset is None and isinstance(linear, float) and linear == 1.0:
        return node
    return Affine(place, widths.pop(), tuple(terms), offset)


def identity(width: int) -> Tensor:
    """Return the identity matrix.

    Raises:
        UnsupportedError: it is too large.
    """
    if width > MAX_WIDTH:
        raise UnsupportedError(
            f"a value must have at most {MAX_WIDTH} features, got {width}; make the network narrower"
        )
    return torch.eye(width, dtype=torch.float64)


def as_map(matrix: Tensor) -> Map:
    """Return a matrix, or the number a if it is a times the identity."""
    if 0 < matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, matrix[0, 0] * identity(len(matrix))):
        return float(matrix[0, 0])
    return matrix


def diagonal(numbers: Tensor) -> Map:
    """Return the map that multiplies each feature by its number."""
    return float(numbers[0]) if bool((numbers == numbers[0]).all()) else torch.diag(numbers)


def compose(inner: Map, outer: Map) -> Map:
    """Return the map u ↦ (u · inner) · outer."""
    if isinstance(inner, Tensor) and isinstance(outer, Tensor):
        return inner @ outer
    return inner * outer


def plus(a: Map | None, b: Map, width: int) -> Map:
    """Return the sum of two maps from ``width`` features; ``None`` is zero."""
    if a is None:
        return b
    if isinstance(a, float) and isinstance(b, float):
        return a + b
    return (a if isinstance(a, Tensor) else a * identity(width)) + (
        b if isinstance(b, Tensor) else b * identity(width)
    )


def evaluate(outputs: Iterable[Node], values: dict[Node, Tensor]) -> None:
    """Add outputs, and all that they are computed from, to the values (n, w) at some points.

    Args:
        outputs: Values of a graph without formulas.
        values: At the points; the input's must be there.
    """
    for node in ordered(outputs, until=values):
        if node not in values:
            values[node] = _value(node, values)


def _value(node: Node, values: Mapping[Node, Tensor]) -> Tensor:
    match node:
        case Affine():
            total = sum(torch.as_tensor(compose(values[term], matrix)) for term, matrix in node.terms)
            return torch.as_tensor(total if node.offset is None else total + node.offset)
        case Pointwise(function=hessQuikActivationFunction()):
            found: Tensor = node.function(values[node.of])[0]
            return found
        case Product():
            return values[node.left] * values[node.right]
    raise AssertionError(f"{node.place} has no value")
