"""Rewrite rules of graphs, which compute the same results with fewer operations.

A rule gets a node whose inputs are rewritten already, and returns the index of its replacement, or ``None``.
:func:`optimise` applies all rules in one pass, merges equal nodes, and removes dead nodes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hessquik import operations
from hessquik.graph import Builder, Graph, Node, Rule, is_filled, needed, rewrite

__all__ = [
    "RULES",
    "compose_views",
    "drop_ones",
    "drop_zeros",
    "fold_constants",
    "join_sums",
    "merge_scalars",
    "optimise",
    "recognise_contractions",
    "remove_dead",
    "sink_reshapes",
]


def fold_constants(builder: Builder, node: Node) -> int | None:
    """Evaluate nodes that depend only on constants, in float64."""
    inputs = [builder.nodes[i] for i in node.inputs]
    if not inputs or any(one.data is None for one in inputs):
        return None
    return builder.constant(operations.fold(node, inputs))


def drop_zeros(builder: Builder, node: Node) -> int | None:
    """Leave out zeros: x + 0 = x − 0 = x, 0 + x = x, and every product with 0 is 0."""
    zeros = [builder.nodes[i].is_zero for i in node.inputs]
    if node.op in {"add", "sub"} and any(zeros):
        kept = node.inputs[0] if zeros[1] else node.inputs[1]
        if node.op == "sub" and not zeros[1]:
            return None
        return kept if builder.nodes[kept].shape == node.shape else None
    if node.op in {"mul", "matmul"} and any(zeros):
        return builder.zeros(node.shape)
    if node.op in {"contract", "congruence"}:
        return _without_zero_terms(builder, node, zeros)
    return None


def _without_zero_terms(builder: Builder, node: Node, zeros: list[bool]) -> int | None:
    """Leave out the terms of a sum of products that have a factor of zero."""
    count = len(zeros) // 2
    kept = [i for i in range(count) if not (zeros[i] or zeros[count + i])]
    if len(kept) == count:
        return None
    if not kept:
        return builder.zeros(node.shape)
    inputs = [node.inputs[i] for i in kept] + [node.inputs[count + i] for i in kept]
    return builder.add(node.op, *inputs)


def drop_ones(builder: Builder, node: Node) -> int | None:
    """Leave out factors of one and products with identity matrices."""
    if node.op not in {"mul", "div", "matmul"}:
        return None
    for place, i in enumerate(node.inputs):
        other = node.inputs[1 - place]
        if (node.op == "div" and place == 0) or builder.nodes[other].shape != node.shape:
            continue
        factor = builder.nodes[i]
        is_one = (
            factor.is_identity if node.op == "matmul" else factor.data is not None and is_filled(factor.data, 1.0)
        )
        if is_one:
            return other
    return None


def merge_scalars(builder: Builder, node: Node) -> int | None:
    """Write −x as −1 x, x / a as (1/a) x and (x a) b as x (a b)."""
    if node.op == "neg":
        return builder.add("mul", node.inputs[0], builder.constant(torch.tensor([[-1.0]])))
    if node.op == "mul":
        left, right = (builder.nodes[i] for i in node.inputs)
        if left.number is not None and right.number is None:
            return merge_scalars(builder, replace(node, inputs=node.inputs[::-1])) or builder.add(
                "mul", *node.inputs[::-1]
            )
        if right.number is not None and left.op == "mul":
            inner = builder.nodes[left.inputs[1]].number
            if inner is not None:
                product = torch.tensor([[inner * right.number]], dtype=torch.float64)
                return builder.add("mul", left.inputs[0], builder.constant(product))
    return None


def compose_views(builder: Builder, node: Node) -> int | None:
    """Join permutations with permutations and reshapes with reshapes; leave out those that change nothing.

    A sum over one entry changes nothing either.
    """
    if node.op == "sum" and builder.nodes[node.inputs[0]].shape[-2] == 1:
        return node.inputs[0]
    if node.op not in {"permute", "reshape"}:
        return None
    (i,) = node.inputs
    source = builder.nodes[i]
    if node.op == "permute" and node.arguments == tuple(range(len(node.arguments))):
        return i
    if node.op == "reshape" and source.shape == node.shape:
        return i
    if source.op != node.op:
        return None
    arguments = node.arguments
    if node.op == "permute":
        arguments = tuple(source.arguments[axis] for axis in arguments)
    joined = Node(node.op, source.inputs, node.shape, node.is_shared, arguments)
    found = compose_views(builder, joined)
    return builder.append(joined) if found is None else found


def sink_reshapes(builder: Builder, node: Node) -> int | None:
    """Move a reshape that removes axes of length 1 from the result of a pointwise operation to its inputs."""
    if node.op != "reshape" or not builder.nodes[node.inputs[0]].is_pointwise:
        return None
    source = builder.nodes[node.inputs[0]]
    if len(node.shape) >= len(source.shape):
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
        wanted = tuple(shape[axis] for axis in kept)
        operand = Node("reshape", (i,), wanted, builder.nodes[i].is_shared, wanted)
        found = compose_views(builder, operand)
        operands.append(builder.append(operand) if found is None else found)
    return builder.add(source.op, *operands)


def recognise_contractions(builder: Builder, node: Node) -> int | None:
    """Write a bᵀ as a contraction where b is an array of the row."""
    if node.op != "matmul":
        return None
    a, right = node.inputs[0], builder.nodes[node.inputs[1]]
    if right.op != "permute" or right.arguments != (1, 0) or len(builder.nodes[a].shape) != 2:
        return None
    return builder.add("contract", a, right.inputs[0])


def join_sums(builder: Builder, node: Node) -> int | None:
    """Write sums of contractions, or of congruences, as one that runs over all terms."""
    if node.op != "add":
        return None
    left, right = (builder.nodes[i] for i in node.inputs)
    if left.op != right.op or left.op not in {"contract", "congruence"} or left.shape != right.shape:
        return None
    i, j = len(left.inputs) // 2, len(right.inputs) // 2
    inputs = (*left.inputs[:i], *right.inputs[:j], *left.inputs[i:], *right.inputs[j:])
    return builder.add(left.op, *inputs)


#: The rules in the order in which they are tried; products with zeros and ones are dropped before they are folded,
#: since d unit vectors times a wide matrix take as long as d points.
RULES: tuple[Rule, ...] = (
    drop_zeros,
    drop_ones,
    fold_constants,
    merge_scalars,
    compose_views,
    sink_reshapes,
    recognise_contractions,
    join_sums,
)


def remove_dead(graph: Graph) -> Graph:
    """Remove the nodes that no result depends on."""
    kept = sorted(needed(graph))
    place = {i: new for new, i in enumerate(kept)}
    nodes = []
    for i in kept:
        node = graph.nodes[i]
        inputs = tuple(place[j] for j in node.inputs)
        nodes.append(Node(node.op, inputs, node.shape, node.is_shared, node.arguments, node.data))
    return Graph(tuple(nodes), {name: place[i] for name, i in graph.outputs.items()})


def optimise(graph: Graph) -> Graph:
    """Apply every rule, merge equal nodes and remove dead ones."""

    def first_that_applies(builder: Builder, node: Node) -> int | None:
        for rule in RULES:
            found = rule(builder, node)
            if found is not None:
                return found
        return None

    return remove_dead(rewrite(remove_dead(graph), first_that_applies, is_merging=True))
