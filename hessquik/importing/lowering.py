"""Lowering of an imported graph to layers.

The functions of one variable are computed in as few layers as their order allows. The features between two layers are
the fewest numbers that determine all later results, found as a minimum cut through the affine part of the graph. An
affine function is thus computed where it makes the features narrower, and otherwise folded into the next layer's
weights; values that several layers need are carried along. A plain network becomes single layers, a residual network
residual layers, and any other structure skip layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hessquik.activations import hessQuikActivationFunction, identityActivation
from hessquik.architecture import describe
from hessquik.importing.graph import Affine, Map, Node, Pointwise, compose, identity, ordered, parents, plus
from hessquik.layers import hessQuikLayer, resnetLayer, singleLayer, skipLayer
from hessquik.networks import NN

__all__ = ["lower"]


def lower(output: Node) -> NN:
    """Return the network that computes a value of a graph without products, with float64 weights."""
    nodes = ordered([output])
    groups = _schedule(nodes)
    states = _states(nodes, groups, output)
    residual = _residual(nodes, states[-2], groups[-1], output) if groups else None
    if residual is not None:
        states[-1] = [residual]
    layers: list[hessQuikLayer] = []
    for group, (before, after) in zip(groups, pairwise(states), strict=True):
        layers += _layers(_Step.of(group, before, after))
    if residual is not None or not groups:
        linear, offset = _express([output], states[-1])[0]
        layers.append(_single(_stack([linear], states[-1], [output.width]), offset, identityActivation()))
    return NN(*layers)


def _residual(nodes: Sequence[Node], before: Sequence[Node], group: Sequence[Pointwise], output: Node) -> Node | None:
    """Return the value u + h σ(…) that the output is an affine function of, if there is one.

    A residual layer and a linear one then compute the output. The matrix is applied once, not to u and to σ(…) each.
    """
    if len(before) != 1 or len(group) != 1:
        return None
    (u,), (function,) = before, group
    for node in _affine_in({u, function}, nodes):
        if node.width == u.width and node is not output and output in _affine_in({node}, nodes):
            maps, offset = _express([node], [u, function])[0]
            skip, h = maps.get(u), maps.get(function)
            if isinstance(skip, float) and skip == 1.0 and isinstance(h, float) and offset is None:
                return node
    return None


def _affine_in(basis: set[Node], nodes: Sequence[Node]) -> list[Node]:
    """Return the values that are affine functions of the values in ``basis``, in order."""
    found: dict[Node, None] = {}
    for node in nodes:
        if isinstance(node, Affine) and node not in basis and all(p in basis or p in found for p in parents(node)):
            found[node] = None
    return list(found)


def _schedule(nodes: Sequence[Node]) -> list[list[Pointwise]]:
    """Return the functions of one variable in groups: one layer can compute a group, since it has one activation."""
    before: dict[Node, frozenset[Pointwise]] = {}
    for node in nodes:
        found: set[Pointwise] = set()
        for parent in parents(node):
            found |= {parent} if isinstance(parent, Pointwise) else before[parent]
        before[node] = frozenset(found)
    waiting = [node for node in nodes if isinstance(node, Pointwise)]
    descriptions = {node: json.dumps(describe(_activation(node))) for node in waiting}
    done: set[Pointwise] = set()
    groups = []
    while waiting:
        ready = [node for node in waiting if before[node] <= done]
        group = [node for node in ready if descriptions[node] == descriptions[ready[0]]]
        groups.append(group)
        done |= set(group)
        waiting = [node for node in waiting if node not in done]
    return groups


def _activation(node: Pointwise) -> hessQuikActivationFunction:
    assert isinstance(node.function, hessQuikActivationFunction)
    return node.function


def _states(nodes: Sequence[Node], groups: Sequence[Sequence[Pointwise]], output: Node) -> list[list[Node]]:
    """Return the values that the features consist of before the first layer, between layers and after the last.

    Values that more layers need come later among the features, so that layers can carry them along.
    """
    pending = {node for group in groups for node in group}
    blocked = _computed_from(nodes, pending)
    states: list[list[Node]] = [[node for node in nodes if not parents(node)]]
    for group in groups[:-1]:
        pending -= set(group)
        blocked = _computed_from(nodes, pending)
        states.append(_cut(nodes, [*states[-1], *group], blocked, output))
    last = {node: step for step, state in enumerate(states) for node in state}
    kept: list[Node] = []
    for step, state in enumerate(states):
        carried = kept
        while carried and not set(carried) <= set(state):
            carried = carried[1:]
        states[step] = [*sorted((n for n in state if n not in carried), key=lambda n: last[n]), *carried]
        kept = states[step]
    return [*states, [output]] if groups else states


def _computed_from(nodes: Sequence[Node], pending: set[Pointwise]) -> set[Node]:
    """Return the pending values and those that depend on them."""
    found: set[Node] = set(pending)
    for node in nodes:
        if not found.isdisjoint(parents(node)):
            found.add(node)
    return found


def _cut(nodes: Sequence[Node], known: Sequence[Node], blocked: set[Node], output: Node) -> list[Node]:
    """Return the values of least total width that follow from the known ones and determine the later ones.

    If there are several such cuts, return the earliest.
    """
    import networkx

    graph = networkx.DiGraph()
    reached = set(known)
    for node in nodes:  # edges run backwards, since networkx returns the cut that is nearest to the end of the flow
        if node in blocked:
            graph.add_edges_from(("last", (parent, "out")) for parent in parents(node) if parent in reached)
            continue
        if node not in reached and not (isinstance(node, Affine) and any(p in reached for p in parents(node))):
            continue
        graph.add_edge((node, "out"), (node, "in"), capacity=node.width)
        if node in known:
            graph.add_edge((node, "in"), "first")
        else:
            reached.add(node)
            graph.add_edges_from(((node, "in"), (parent, "out")) for parent in parents(node))
        if node is output:
            graph.add_edge("last", (node, "out"))
    _, (_, near) = networkx.minimum_cut(graph, "last", "first")
    return [node for node in nodes if (node, "in") in near and (node, "out") not in near]


#: A value as Σᵢ vᵢ Aᵢ + c.
Expressed = tuple[dict[Node, Map], Tensor | None]


def _express(targets: Sequence[Node], basis: Sequence[Node]) -> list[Expressed]:
    """Return values as affine functions of others."""
    return [_expressed(target, set(basis)) for target in targets]


def _expressed(target: Node, basis: set[Node]) -> Expressed:
    """Return a value as an affine function of others, by maps to it from each value that it is computed from."""
    maps: dict[Node, Map] = {target: 1.0}
    offset = torch.zeros(target.width, dtype=torch.float64)
    for node in reversed(ordered([target], until=basis)):
        if node in basis:
            continue
        assert isinstance(node, Affine)
        outer = maps.pop(node)
        for term, matrix in node.terms:
            maps[term] = plus(maps.get(term), compose(matrix, outer), term.width)
        if node.offset is not None:
            offset = offset + (node.offset * outer if isinstance(outer, float) else node.offset @ outer)
    return maps, offset if offset.any() else None


def _stack(columns: Sequence[dict[Node, Map]], rows: Sequence[Node], widths: Sequence[int]) -> Tensor:
    """Return the matrix made of all maps, from the features of ``rows`` to those of ``columns``."""
    return torch.cat(
        [torch.cat([_dense(maps.get(r), r.width, w) for r in rows]) for maps, w in zip(columns, widths, strict=True)],
        dim=1,
    )


def _dense(linear: Map | None, p: int, q: int) -> Tensor:
    if linear is None:
        return torch.zeros(p, q, dtype=torch.float64)
    return linear if isinstance(linear, Tensor) else linear * identity(p)


def _offsets(expressed: Sequence[Expressed], widths: Sequence[int]) -> Tensor | None:
    if all(offset is None for _, offset in expressed):
        return None
    parts = (
        torch.zeros(width, dtype=torch.float64) if offset is None else offset
        for (_, offset), width in zip(expressed, widths, strict=True)
    )
    return torch.cat(list(parts))


@dataclass(frozen=True, slots=True)
class _Step:
    """The computation of one group: z = uP + b, y = uS + σ(z)Q + μ, and the last c features of u carried after y.

    Attributes:
        act: σ.
        into: P (p, w).
        bias: b (w,).
        skip: S (p, q).
        out: Q (w, q).
        offset: μ (q,).
        carried: c.
    """

    act: hessQuikActivationFunction
    into: Tensor
    bias: Tensor | None
    skip: Tensor
    out: Tensor
    offset: Tensor | None
    carried: int

    @staticmethod
    def of(group: Sequence[Pointwise], before: Sequence[Node], after: Sequence[Node]) -> _Step:
        """Return the step that computes the values after a group from those before it."""
        kept = 0
        while kept < min(len(before), len(after)) and before[-1 - kept] is after[-1 - kept]:
            kept += 1
        new = after[: len(after) - kept]
        arguments = _express([node.of for node in group], before)
        results = _express(new, [*before, *group])
        hidden, widths = [node.width for node in group], [node.width for node in new]
        q = sum(widths)

        def matrix(rows: Sequence[Node]) -> Tensor:
            return _stack([maps for maps, _ in results], rows, widths) if new else torch.zeros(0, q)

        return _Step(
            _activation(group[0]),
            _stack([maps for maps, _ in arguments], before, hidden),
            _offsets(arguments, hidden),
            matrix(before),
            matrix(group),
            _offsets(results, widths),
            sum(node.width for node in after[len(after) - kept :]),
        )


def _layers(step: _Step) -> list[hessQuikLayer]:
    """Return the simplest layers that compute a step."""
    p, q = step.skip.shape
    is_mixed = not (step.out.shape[0] == q and torch.equal(step.out, identity(q)))
    if not step.carried and not step.skip.any():
        first = _single(step.into, step.bias, step.act)
        is_plain = not is_mixed and step.offset is None
        return [first] if is_plain else [first, _single(step.out, step.offset, identityActivation())]
    free = p - step.carried
    is_residual = free == q and torch.equal(step.skip[:free], identity(q)) and not step.skip[free:].any()
    h = float(step.out[0, 0])
    if is_residual and not step.carried and step.offset is None and _is_multiple(step.out, h):
        residual = resnetLayer(p, h, step.act, bias=step.bias is not None, dtype=torch.float64)
        return [_filled(residual, {"layer.K": step.into, "layer.b": step.bias})]
    skip = "identity" if is_residual else "matrix" if step.skip.any() else None
    layer = skipLayer(
        p,
        step.into.shape[1],
        q,
        step.act,
        bias=step.bias is not None,
        skip=skip,
        mix=is_mixed,
        offset=step.offset is not None,
        carried=step.carried,
        dtype=torch.float64,
    )
    weights = {"K": step.into, "b": step.bias, "M": step.out if is_mixed else None, "mu": step.offset}
    return [_filled(layer, weights | {"S": step.skip if skip == "matrix" else None})]


def _is_multiple(matrix: Tensor, factor: float) -> bool:
    return matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, factor * identity(len(matrix)))


def _single(into: Tensor, bias: Tensor | None, act: hessQuikActivationFunction) -> hessQuikLayer:
    p, w = into.shape
    layer = singleLayer(p, w, act, bias=bias is not None, dtype=torch.float64)
    return _filled(layer, {"K": into, "b": bias})


def _filled(layer: hessQuikLayer, weights: dict[str, Tensor | None]) -> hessQuikLayer:
    """Set the weights of a layer, and return it."""
    state = {name: tensor.clone() for name, tensor in weights.items() if tensor is not None}
    nn.Module.load_state_dict(layer, state)
    return layer
