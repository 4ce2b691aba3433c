"""What the operations of a graph do to tensors (rows, …): the definition that every backend follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hessquik.algebra import congruence, pairs, unpack
from hessquik.graph import Node
from hessquik.pointwise import PRIMITIVES

__all__ = ["compute_node", "fold"]


def compute_node(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Return a node's array (rows, …) from those of its inputs; a leading axis of 1 stands for all rows."""
    if node.op in PRIMITIVES:
        return PRIMITIVES[node.op].on_tensors(*_aligned(inputs))
    return _OPERATIONS[node.op](*inputs, *node.arguments)


def _aligned(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Insert axes behind the rows, so that arrays of different ranks broadcast."""
    rank = max(array.ndim for array in inputs)
    return [array[(slice(None), *(None,) * (rank - array.ndim))] for array in inputs]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if b.ndim == 3 and b.shape[0] == 1 and a.ndim >= 3:
        return (a.reshape(-1, a.shape[-1]) @ b[0]).reshape(*a.shape[:-1], b.shape[-1])
    a, b = _aligned((a, b))
    return a @ b


def _contract(*arrays: Tensor) -> Tensor:
    left, right = _joined(arrays)
    return left @ right.mT


def _congruence(*arrays: Tensor) -> Tensor:
    return congruence(*_joined(arrays))


def _joined(arrays: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the first half of the arrays side by side, and the second."""
    count = len(arrays) // 2
    if count == 1:
        return arrays[0], arrays[1]
    rows = max(array.shape[0] for array in arrays)
    both = [torch.cat([a.expand(rows, -1, -1) for a in half], dim=-1) for half in (arrays[:count], arrays[count:])]
    return both[0], both[1]


def _cat(*arrays: Tensor) -> Tensor:
    leading = torch.broadcast_shapes(*(array.shape[:-1] for array in arrays))
    return torch.cat([array.expand(*leading, -1) for array in arrays], dim=-1)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "matmul": _matmul,
    "contract": _contract,
    "congruence": _congruence,
    "sum": lambda a: a.sum(-2, keepdim=True),
    "pairs": pairs,
    "unpack": unpack,
    "cat": _cat,
    "slice": lambda a, start, stop: a[..., start:stop],
    "permute": lambda a, *axes: a.permute(0, *(axis + 1 for axis in axes)),
    "reshape": lambda a, *shape: a.reshape(a.shape[0], *shape),
    "diagonal": lambda a: torch.diagonal(a, dim1=-3, dim2=-2).mT,
}


def fold(node: Node, inputs: Sequence[Node]) -> Tensor:
    """Return the numbers of a node whose inputs are constants."""
    arrays: list[Any] = [one.data for one in inputs]
    return compute_node(node, [array.unsqueeze(0) for array in arrays]).squeeze(0)
