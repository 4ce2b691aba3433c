"""The operations of a graph on tensors (rows, …): the definition that every backend follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hessquik.algebra import congruence, leading_shape, pack, pairs, unpack
from hessquik.graph import VIEWS, Node
from hessquik.pointwise import PRIMITIVES

__all__ = ["NAMES", "compute_node", "fold"]

#: Numbers of a whole vector. Libraries compute what is left of a vector, or begins within one, by other instructions
#: and in another order. Where a row's bits would depend on its place, arrays are padded with zeros to whole vectors.
WHOLE = 16


def compute_node(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Return a node's array (rows, …) from those of its inputs; a leading axis of 1 stands for all rows."""
    if node.op in PRIMITIVES:
        primitive = PRIMITIVES[node.op].on_tensors
        if len(inputs) > 1:
            return primitive(*_aligned(inputs))
        flat = inputs[0].reshape(-1)
        return primitive(_padded(flat, -len(flat) % (4 * WHOLE)))[: len(flat)].reshape(inputs[0].shape)
    return _OPERATIONS[node.op](*inputs, *node.arguments)


def _aligned(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Insert axes after that of the rows, so that arrays of different ranks broadcast."""
    rank = max(array.ndim for array in inputs)
    return [array[(slice(None), *(None,) * (rank - array.ndim))] for array in inputs]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if b.ndim == 3 and b.shape[0] == 1 and a.ndim >= 3:
        depth, columns = b.shape[-2:]
        matrix = _padded(b[0], -columns % WHOLE, -depth % WHOLE)
        product = _whole(a).reshape(-1, matrix.shape[0]) @ matrix
        return product[:, :columns].reshape(*a.shape[:-1], columns)
    a, b = _aligned((a, b))
    return a @ b


def _whole(array: Tensor) -> Tensor:
    """Return an array with its columns padded with zeros to whole vectors."""
    return _padded(array, -array.shape[-1] % WHOLE)


def _padded(array: Tensor, columns: int, rows: int = 0) -> Tensor:
    """Return a dense array with zeros after its last columns and rows, which begins with a whole vector."""
    if columns or rows or not array.is_contiguous() or array.storage_offset() % WHOLE:
        return pad(array, (0, columns, 0, rows) if rows else (0, columns))
    return array


def _contract(*arrays: Tensor) -> Tensor:
    left, right = map(_whole, _joined(arrays))
    return left @ right.mT


def _congruence(*arrays: Tensor) -> Tensor:
    return congruence(*map(_whole, _joined(arrays)))


def _joined(arrays: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the first half of the arrays side by side, and the second."""
    count = len(arrays) // 2
    if count == 1:
        return arrays[0], arrays[1]
    rows = max(array.shape[0] for array in arrays)
    both = [torch.cat([a.expand(rows, -1, -1) for a in half], dim=-1) for half in (arrays[:count], arrays[count:])]
    return both[0], both[1]


def _cat(*arrays: Tensor) -> Tensor:
    leading = leading_shape(*arrays)
    return torch.cat([array.expand(*leading, -1) for array in arrays], dim=-1)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "matmul": _matmul,
    "contract": _contract,
    "congruence": _congruence,
    "sum": lambda a: a.sum(-2, keepdim=True),
    "pairs": pairs,
    "unpack": unpack,
    "pack": pack,
    "cat": _cat,
    "slice": lambda a, start, stop: a[..., start:stop],
    "permute": lambda a, *axes: a.permute(0, *(axis + 1 for axis in axes)),
    "reshape": lambda a, *shape: a.reshape(a.shape[0], *shape),
    "diagonal": lambda a: torch.diagonal(a, dim1=-3, dim2=-2).mT,
}


#: All operations of graphs.
NAMES = (*_OPERATIONS, *PRIMITIVES)


def fold(node: Node, inputs: Sequence[Node]) -> Tensor:
    """Return the numbers of a node whose inputs are constants, computed in float64."""
    arrays: list[Any] = [one.data for one in inputs]
    if node.op not in VIEWS:
        arrays = [array.double() for array in arrays]
    if node.is_pointwise:
        found: Tensor = PRIMITIVES[node.op].on_tensors(*arrays)
        return found
    return compute_node(node, [array.unsqueeze(0) for array in arrays]).squeeze(0)
