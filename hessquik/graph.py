"""Graphs: the operations of a plan as a value that can be printed, compared and rewritten.

A node computes one array per row. Shapes omit the axis of rows: most arrays are (k, w), k tangents or m adjoints of w
features; Hessians are (d, d, m). A node that depends only on constants and on inputs shared by all rows is shared.

    input        an input of the call
    constant     numbers of the network: float64, or float32 weights as they are
    matmul       a b over the last two axes; one of the operands may lack leading axes
    contract     Σ_l a_l b_lᵀ                                  inputs a_1 … a_L, b_1 … b_L
    congruence   Σ_l a_l diag(b_l[m]) a_lᵀ, outputs m last     likewise
    sum          over the last axis but one, which stays with extent 1
    pairs        a[i] ⊙ a[j] for j ≤ i, row by row of the lower triangle
    unpack       such pairs (k(k+1)/2, m) → both triangles (k, k, m)
    pack         symmetric (k, k, m) → their lower triangles (k(k+1)/2, m)
    cat, slice   along the last axis
    permute, reshape, diagonal
    …            and the pointwise primitives of :mod:`hessquik.pointwise`, which broadcast
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hessquik.pointwise import PRIMITIVES

__all__ = ["VIEWS", "Builder", "Graph", "Node", "Rule", "is_filled", "needed", "rewrite"]

#: Operations that name entries of their input and compute nothing.
VIEWS = frozenset({"permute", "reshape", "slice", "diagonal"})

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operation.

    Attributes:
        op: Name of the operation.
        inputs: Indices of the nodes that it reads.
        shape: Shape of one row's array.
        is_shared: Whether the array is the same for all rows.
        arguments: Arguments of the operation: a name, axes, a range.
        data: Entries of a constant: float64, or float32 weights as they are.
    """

    op: str
    inputs: tuple[int, ...]
    shape: Shape
    is_shared: bool
    arguments: tuple[Any, ...] = ()
    data: Tensor | None = None

    @property
    def is_zero(self) -> bool:
        """Return whether the node is a constant of zeros."""
        return self.data is not None and is_filled(self.data, 0.0)

    @property
    def is_identity(self) -> bool:
        """Return whether the node is a constant identity matrix."""
        data = self.data
        if data is None or data.ndim != 2 or data.shape[0] != data.shape[1] or not data.numel():
            return False
        ends = data[0, 0] == data[-1, -1] == 1 and (len(data) == 1 or data[0, 1] == data[1, 0] == 0)
        return bool(ends) and bool((data.diagonal() == 1).all()) and int(data.count_nonzero()) == len(data)

    @property
    def is_pointwise(self) -> bool:
        """Return whether the operation is a primitive of :mod:`hessquik.pointwise`."""
        return self.op in PRIMITIVES

    @property
    def number(self) -> float | None:
        """Return the value of a constant with one entry, else ``None``."""
        return float(self.data) if self.data is not None and self.data.numel() == 1 else None


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in topological order, and the names of the results.

    Attributes:
        nodes: The nodes; each reads only nodes before it.
        outputs: Index of every result, by name.
    """

    nodes: tuple[Node, ...]
    outputs: Mapping[str, int]

    def uses(self) -> list[list[int]]:
        """Return for every node the nodes that read it, repeated if they read it several times."""
        uses: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for j in node.inputs:
                uses[j].append(i)
        return uses

    def __str__(self) -> str:
        """Return one line per node, and one with the results."""
        lines = []
        for i, node in enumerate(self.nodes):
            arguments = [f"%{j}" for j in node.inputs] + [str(argument) for argument in node.arguments]
            mark = " shared" if node.is_shared and node.op != "constant" else ""
            value = f" = {node.number:g}" if node.number is not None else ""
            lines.append(f"%{i}{list(node.shape)}{mark} = {node.op}({', '.join(arguments)}){value}")
        lines.append("return " + ", ".join(f"{name}=%{i}" for name, i in self.outputs.items()))
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        """Return whether both graphs have the same operations and equal constants."""
        if not isinstance(other, Graph):
            return NotImplemented
        return str(self) == str(other) and all(
            a.data is None or (b.data is not None and torch.equal(a.data, b.data))
            for a, b in zip(self.nodes, other.nodes, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(slots=True)
class Builder:
    """Builds a graph node by node.

    Attributes:
        nodes: The nodes so far.
        is_merging: Whether a node equal to an existing one is replaced by it.
    """

    nodes: list[Node] = field(default_factory=list)
    is_merging: bool = False
    _known: dict[Any, int] = field(default_factory=dict)

    def add(self, op: str, *inputs: int, arguments: tuple[Any, ...] = (), data: Tensor | None = None) -> int:
        """Add an operation and return its index."""
        shapes = [self.nodes[i].shape for i in inputs]
        shape = _SHAPES[op](shapes, *arguments) if op in _SHAPES else _broadcast(shapes)
        return self.append(Node(op, inputs, shape, all(self.nodes[i].is_shared for i in inputs), arguments, data))

    def constant(self, data: Tensor) -> int:
        """Add a constant of at least two axes, converted to float64 unless it is in float32."""
        data = data.detach().to("cpu", torch.float32 if data.dtype == torch.float32 else torch.float64)
        while data.ndim < 2:
            data = data.unsqueeze(0)
        return self.append(Node("constant", (), tuple(data.shape), True, (), data))

    def zeros(self, shape: Shape) -> int:
        """Add a constant of zeros, whose memory is that of one number."""
        return self.constant(torch.zeros((), dtype=torch.float64).expand(shape))

    def input(self, name: str, shape: Shape, is_shared: bool = False) -> int:
        """Add an input of the call."""
        return self.append(Node("input", (), shape, is_shared, (name,)))

    def append(self, node: Node) -> int:
        """Add a node, unless merging finds an equal one, and return its index."""
        if self.is_merging:
            key: Any = (node.op, node.inputs, node.arguments)
            if node.number is not None:
                key = ("number", node.number, node.shape)
            elif node.data is not None:
                key = (node.data.data_ptr(), node.data.stride(), node.shape)
            if key in self._known:
                return self._known[key]
            self._known[key] = len(self.nodes)
        self.nodes.append(node)
        return len(self.nodes) - 1

    def finish(self, outputs: Mapping[str, int]) -> Graph:
        """Return the graph."""
        return Graph(tuple(self.nodes), dict(outputs))


#: A rewriting of one node: its inputs are indices in the new graph, and so is the result; ``None``
#: leaves the node as it is.
Rule = Callable[[Builder, Node], int | None]


def rewrite(graph: Graph, rule: Rule, is_merging: bool = False) -> Graph:
    """Return a graph in which every node is replaced by the result of a rule."""
    builder = Builder(is_merging=is_merging)
    place: list[int] = []
    for node in graph.nodes:
        moved = Node(
            node.op, tuple(place[i] for i in node.inputs), node.shape, node.is_shared, node.arguments, node.data
        )
        found = rule(builder, moved)
        place.append(builder.append(moved) if found is None else found)
    return builder.finish({name: place[i] for name, i in graph.outputs.items()})


def is_filled(data: Tensor, number: float) -> bool:
    """Return whether all entries are the number; one entry tells so of most weights, however large they are.

    Examples:
        >>> is_filled(torch.zeros(2, 3), 0.0), is_filled(torch.eye(2), 1.0)
        (True, False)
    """
    if not data.numel():
        return True
    if float(data[(0,) * data.ndim]) != number:
        return False
    return not any(data.stride()) or bool((data == number).all() if number else not data.any())


def needed(graph: Graph) -> Iterator[int]:
    """Yield the indices of the nodes that results depend on, last first."""
    wanted = set(graph.outputs.values())
    for i in reversed(range(len(graph.nodes))):
        if i in wanted:
            wanted.update(graph.nodes[i].inputs)
            yield i


def _broadcast(shapes: list[Shape]) -> Shape:
    """Return the shape to which arrays of these shapes broadcast."""
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return first
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True)
    extents = [set(column) - {1} for column in columns]
    if any(len(found) > 1 for found in extents):
        raise ValueError(f"expected arrays whose shapes broadcast, got {shapes}")
    return tuple(next(iter(found), 1) for found in extents)


def _matmul(shapes: list[Shape]) -> Shape:
    (*left, k, p), (*right, r, q) = shapes
    if p != r:
        raise ValueError(f"expected matrices that can be multiplied, got {shapes[0]} and {shapes[1]}")
    return (*_broadcast([tuple(left), tuple(right)]), k, q)


def _diagonal(shapes: list[Shape]) -> Shape:
    (k, _, m) = shapes[0]
    return k, m


_SHAPES: dict[str, Callable[..., Shape]] = {
    "matmul": _matmul,
    "contract": lambda shapes: (shapes[0][-2], shapes[len(shapes) // 2][-2]),
    "congruence": lambda shapes: (shapes[0][-2], shapes[0][-2], shapes[len(shapes) // 2][-2]),
    "sum": lambda shapes: (*shapes[0][:-2], 1, shapes[0][-1]),
    "pairs": lambda shapes: (shapes[0][0] * (shapes[0][0] + 1) // 2, shapes[0][1]),
    "unpack": lambda shapes: (_side(shapes[0][0]), _side(shapes[0][0]), shapes[0][1]),
    "pack": lambda shapes: (shapes[0][0] * (shapes[0][0] + 1) // 2, shapes[0][2]),
    "cat": lambda shapes: (*_broadcast([shape[:-1] for shape in shapes]), sum(shape[-1] for shape in shapes)),
    "slice": lambda shapes, start, stop: (*shapes[0][:-1], stop - start),
    "permute": lambda shapes, *axes: tuple(shapes[0][axis] for axis in axes),
    "reshape": lambda shapes, *shape: shape,
    "diagonal": _diagonal,
}


def _side(pairs: int) -> int:
    """Return k, given k(k+1)/2."""
    k = int((2 * pairs) ** 0.5)
    assert k * (k + 1) // 2 == pairs
    return k
