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

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hessquik.pointwise import PRIMITIVES

__all__ = ["VIEWS", "Builder", "Graph", "Node", "Rule", "fill_of"]

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
        fill: The number that all entries of a constant are; ``None`` if they differ.
        number: The number that a formula has here; ``None`` for weights, also if they are a single one.
    """

    op: str
    inputs: tuple[int, ...]
    shape: Shape
    is_shared: bool
    arguments: tuple[Any, ...] = ()
    data: Tensor | None = None
    fill: float | None = None
    number: float | None = None

    @property
    def is_identity(self) -> bool:
        """Return whether the node is a constant identity matrix."""
        if self.data is None or len(self.shape) != 2 or self.shape[0] != self.shape[1] or not self.data.numel():
            return False
        entries = self.data.numpy()  # a few of which tell so of most matrices, however large they are
        if entries[0, 0] != 1 or entries[-1, -1] != 1 or (len(entries) > 1 and entries[0, 1] != 0):
            return False
        return bool((entries.diagonal() == 1).all()) and int(self.data.count_nonzero()) == len(entries)

    def structure(self) -> Hashable:
        """Return all of the node but the entries of a constant; a number is a part of it, to the bit."""
        strides = None if self.data is None else self.data.stride()
        number = None if self.number is None else self.number.hex()
        return self.op, self.inputs, self.shape, self.is_shared, self.arguments, strides, number

    @property
    def is_pointwise(self) -> bool:
        """Return whether the operation is a primitive of :mod:`hessquik.pointwise`."""
        return self.op in PRIMITIVES


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

    def structure(self) -> Hashable:
        """Return all that a program's steps depend on: of constants the strides, of numbers the values.

        Examples:
            >>> def times(*weights, number=1.0):
            ...     builder = Builder()
            ...     product = builder.add("mul", builder.constant(torch.tensor(weights)), builder.full(number))
            ...     return builder.finish({"y": product}).structure()
            >>> times(1.0, 2.0) == times(3.0, 0.0), times(1.0, number=2.0) == times(1.0, number=3.0)
            (True, False)
        """
        return tuple(map(Node.structure, self.nodes)), tuple(self.outputs.items())

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
    """Builds a graph node by node; equal nodes are merged, and rules simplify each node when it is added.

    Attributes:
        rules: The rules for each operation, in the order in which they are tried, also on nodes that rules add.
        nodes: The nodes so far.
    """

    rules: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    _known: dict[Any, int] = field(default_factory=dict)

    def add(self, op: str, *inputs: int, arguments: tuple[Any, ...] = ()) -> int:
        """Add an operation, unless an equal or a simpler one is known, and return the index of its result."""
        key = op, inputs, arguments
        found = self._known.get(key)
        if found is None:
            read = [self.nodes[i] for i in inputs]
            shapes = [node.shape for node in read]
            shape = _SHAPES[op](shapes, *arguments) if op in _SHAPES else _broadcast(shapes)
            node = Node(op, inputs, shape, all([one.is_shared for one in read]), arguments)
            simpler = (rule(self, node) for rule in self.rules.get(op, ()))
            found = next((index for index in simpler if index is not None), None)
            found = self._known[key] = self.append(node) if found is None else found
        return found

    def constant(self, data: Tensor) -> int:
        """Add a constant of at least two axes, converted to float64 unless it is in float32."""
        place = data.data_ptr(), data.stride(), data.shape
        if place in self._known:
            return self._known[place]
        kept = data.detach().to("cpu", torch.float32 if data.dtype == torch.float32 else torch.float64)
        while kept.ndim < 2:
            kept = kept.unsqueeze(0)
        shape, fill = tuple(kept.shape), fill_of(kept)
        if (fill, shape) in self._known:
            return self._known[fill, shape]
        found = self.append(Node("constant", (), shape, True, (), kept, fill))
        if fill is not None:
            self._known[fill, shape] = found
        elif kept.data_ptr() == data.data_ptr():  # as long as the node holds the memory, nothing else has its place
            self._known[place] = found
        return found

    def full(self, number: float, shape: Shape = (1, 1)) -> int:
        """Add a number, or a constant of equal entries, whose memory is that of one."""
        key = "full", number, shape
        if key not in self._known:
            data, fill = torch.tensor(number, dtype=torch.float64).expand(shape), float(number)
            one = fill if data.numel() == 1 else None
            self._known[key] = self.append(Node("constant", (), shape, True, (), data, fill, one))
        return self._known[key]

    def input(self, name: str, shape: Shape, is_shared: bool = False) -> int:
        """Add an input of the call."""
        return self.append(Node("input", (), shape, is_shared, (name,)))

    def append(self, node: Node) -> int:
        """Add a node as it is and return its index."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def finish(self, outputs: Mapping[str, int]) -> Graph:
        """Return the graph of the nodes that the results depend on."""
        wanted = set(outputs.values())
        for i in reversed(range(len(self.nodes))):
            if i in wanted:
                wanted.update(self.nodes[i].inputs)
        place = {i: new for new, i in enumerate(sorted(wanted))}
        nodes = []
        for i in place:
            node = self.nodes[i]
            inputs = tuple([place[j] for j in node.inputs])
            same = node.arguments, node.data, node.fill, node.number
            nodes.append(Node(node.op, inputs, node.shape, node.is_shared, *same))
        return Graph(tuple(nodes), {name: place[i] for name, i in outputs.items()})


#: A rewriting of a node that is to be added: the index of its replacement, or ``None`` to leave it as it is.
Rule = Callable[[Builder, Node], int | None]


def fill_of(data: Tensor) -> float | None:
    """Return the number that all entries are, 0 if there are none; two entries tell of most weights that they differ.

    Examples:
        >>> fill_of(torch.full((2, 3), 0.5)), fill_of(torch.eye(2))
        (0.5, None)
    """
    if not data.numel():
        return 0.0
    entries = data.numpy()
    first = entries[(0,) * data.ndim]
    is_one = data.numel() == 1 or not any(data.stride())
    differs = not is_one and (entries[(-1,) * data.ndim] != first or not (entries == first).all())
    return None if differs else float(first)


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
