"""Rules that simplify a graph: they compute the same results with fewer operations.

:class:`hessquik.graph.Builder` applies them to each node that is added. A rule gets a node whose inputs are as simple
as they get, and returns the index of its replacement, or ``None``.
"""

from __future__ import annotations

from hessquik import operations
from hessquik.graph import Builder, Node, Rule

__all__ = [
    "RULES",
    "compose_views",
    "drop_ones",
    "drop_zeros",
    "fold_constants",
    "join_sums",
    "merge_scalars",
    "recognise_contractions",
    "sink_reshapes",
]


def fold_constants(builder: Builder, node: Node) -> int | None:
    """Evaluate nodes that depend only on constants, in float64."""
    inputs = [builder.nodes[i] for i in node.inputs]
    if any(one.data is None for one in inputs):
        return None
    data = operations.fold(node, inputs)
    is_number = data.numel() == 1 and all(one.number is not None for one in inputs)
    return builder.full(float(data), node.shape) if is_number else builder.constant(data)


def drop_zeros(builder: Builder, node: Node) -> int | None:
    """Leave out zeros: x + 0 = x − 0 = x, 0 + x = x, and every product with 0 is 0."""
    zeros = [builder.nodes[i].fill == 0 for i in node.inputs]
    if not any(zeros):
        return None
    if node.op in {"mul", "matmul"}:
        return builder.full(0.0, node.shape)
    if node.op in {"contract", "congruence"}:
        return _without_zero_terms(builder, node, zeros)
    if node.op == "sub" and not zeros[1]:
        return None
    kept = node.inputs[0] if zeros[1] else node.inputs[1]
    return kept if builder.nodes[kept].shape == node.shape else None


def _without_zero_terms(builder: Builder, node: Node, zeros: list[bool]) -> int:
    """Leave out the terms of a sum of products that have a factor of zero."""
    count = len(zeros) // 2
    kept = [i for i in range(count) if not (zeros[i] or zeros[count + i])]
    if not kept:
        return builder.full(0.0, node.shape)
    inputs = [node.inputs[i] for i in kept] + [node.inputs[count + i] for i in kept]
    return builder.add(node.op, *inputs)


def drop_ones(builder: Builder, node: Node) -> int | None:
    """Leave out factors of one and products with identity matrices."""
    for place, i in enumerate(node.inputs):
        other, factor = node.inputs[1 - place], builder.nodes[i]
        if (node.op == "div" and place == 0) or builder.nodes[other].shape != node.shape:
            continue
        if factor.is_identity if node.op == "matmul" else factor.fill == 1:
            return other
    return None


def merge_scalars(builder: Builder, node: Node) -> int | None:
    """Write −x as x (−1), a x as x a and (x a) b as x (a b) for numbers a and b."""
    if node.op == "neg":
        return builder.add("mul", node.inputs[0], builder.full(-1.0))
    left, right = (builder.nodes[i] for i in node.inputs)
    if right.number is None:
        return None if left.number is None else builder.add("mul", *reversed(node.inputs))
    inner = builder.nodes[left.inputs[1]].number if left.op == "mul" else None
    if inner is None:
        return None
    return builder.add("mul", left.inputs[0], builder.full(inner * right.number))


def compose_views(builder: Builder, node: Node) -> int | None:
    """Join permutations with permutations and reshapes with reshapes; leave out those that change nothing.

    A sum over one entry changes nothing either.
    """
    (i,) = node.inputs
    source, arguments = builder.nodes[i], node.arguments
    if node.op == "sum":
        return i if source.shape[-2] == 1 else None
    if arguments == (source.shape if node.op == "reshape" else tuple(range(len(arguments)))):
        return i
    if source.op != node.op:
        return None
    if node.op == "permute":
        arguments = tuple(source.arguments[axis] for axis in arguments)
    return builder.add(node.op, *source.inputs, arguments=arguments)


def sink_reshapes(builder: Builder, node: Node) -> int | None:
    """Move a reshape that removes axes of length 1 from the result of a pointwise operation to its inputs."""
    source = builder.nodes[node.inputs[0]]
    if not source.is_pointwise or len(node.shape) >= len(source.shape):
        return None
    kept = [axis for axis, extent in enumerate(source.shape) if extent != 1]
    while len(kept) < len(node.shape):  # axes of one entry that stay: the last ones
        free = [axis for axis in range(len(source.shape)) if axis not in kept]
        kept = sorted([*kept, free[-1]])
    if len(kept) != len(node.shape) or tuple(source.shape[axis] for axis in kept) != node.shape:
        return None
    operands = []
    for i in source.inputs:
        shape = (1,) * (len(source.shape) - len(builder.nodes[i].shape)) + builder.nodes[i].shape
        operands.append(builder.add("reshape", i, arguments=tuple(shape[axis] for axis in kept)))
    return builder.add(source.op, *operands)


def recognise_contractions(builder: Builder, node: Node) -> int | None:
    """Write a bᵀ as a contraction where b is an array of the row."""
    a, right = node.inputs[0], builder.nodes[node.inputs[1]]
    if right.op != "permute" or right.arguments != (1, 0) or len(builder.nodes[a].shape) != 2:
        return None
    return builder.add("contract", a, right.inputs[0])


def join_sums(builder: Builder, node: Node) -> int | None:
    """Write sums of contractions, or of congruences, as one that runs over all terms."""
    left, right = (builder.nodes[i] for i in node.inputs)
    if left.op != right.op or left.op not in {"contract", "congruence"} or left.shape != right.shape:
        return None
    i, j = len(left.inputs) // 2, len(right.inputs) // 2
    inputs = (*left.inputs[:i], *right.inputs[:j], *left.inputs[i:], *right.inputs[j:])
    return builder.add(left.op, *inputs)


#: The rules for each operation in the order in which they are tried; products with zeros and ones are dropped before
#: they are folded, since d unit vectors times a wide matrix take as long as d points.
RULES: dict[str, tuple[Rule, ...]] = dict.fromkeys(operations.NAMES, (fold_constants,)) | {
    "add": (drop_zeros, fold_constants, join_sums),
    "sub": (drop_zeros, fold_constants),
    "mul": (drop_zeros, drop_ones, fold_constants, merge_scalars),
    "div": (drop_ones, fold_constants),
    "neg": (fold_constants, merge_scalars),
    "matmul": (drop_zeros, drop_ones, fold_constants, recognise_contractions),
    "contract": (drop_zeros, fold_constants),
    "congruence": (drop_zeros, fold_constants),
    "sum": (fold_constants, compose_views),
    "permute": (fold_constants, compose_views),
    "reshape": (fold_constants, compose_views, sink_reshapes),
}
