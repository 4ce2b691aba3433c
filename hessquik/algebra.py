"""Operations on arrays (n, k, w) that torch has no function for; they can be traced like torch's own.

Letters: n samples, k tangents or adjoints, w features, m outputs; leading axes are the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["congruence", "leading_shape", "pack", "pairs", "unpack"]


def _traceable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function so that it also accepts arrays that implement ``__torch_function__``."""

    @wraps(function)
    def dispatch(*arrays: Tensor) -> Tensor:
        if has_torch_function(arrays):
            result: Tensor = handle_torch_function(dispatch, arrays, *arrays)
            return result
        return function(*arrays)

    return dispatch


@_traceable
def congruence(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrices Σ_w a[i, w] b[m, w] a[j, w] of every sample.

    Args:
        a: (n, d, w).
        b: (n, m, w).

    Returns:
        (n, d, d, m), symmetric in i and j.

    Examples:
        >>> congruence(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.ones(1, 1, 2)).squeeze()
        tensor([[5., 2.],
                [2., 1.]])
    """
    d, m = a.shape[-2], b.shape[-2]
    weighted = (a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2)
    result: Tensor = (a @ weighted.mT).unflatten(-1, (d, m))
    return result


@_traceable
def pairs(a: Tensor) -> Tensor:
    """Return a[i] ⊙ a[j] for j ≤ i, row by row of the lower triangle.

    Args:
        a: (n, k, w).

    Returns:
        (n, k(k+1)/2, w).

    Examples:
        >>> pairs(torch.tensor([[[2.0], [3.0]]])).flatten()
        tensor([4., 6., 9.])
    """
    i, j = torch.tril_indices(a.shape[-2], a.shape[-2], device=a.device)
    return a[..., i, :] * a[..., j, :]


@_traceable
def pack(full: Tensor) -> Tensor:
    """Return the lower triangles of symmetric matrices, row by row.

    Args:
        full: (n, k, k, m).

    Returns:
        (n, k(k+1)/2, m).

    Examples:
        >>> pack(torch.tensor([[[[4.0], [6.0]], [[6.0], [9.0]]]])).flatten()
        tensor([4., 6., 9.])
    """
    i, j = torch.tril_indices(full.shape[-3], full.shape[-3], device=full.device)
    return full[..., i, j, :]


@_traceable
def unpack(packed: Tensor) -> Tensor:
    """Return the symmetric matrices whose lower triangles are packed row by row.

    Args:
        packed: (n, k(k+1)/2, m).

    Returns:
        (n, k, k, m).

    Examples:
        >>> unpack(torch.tensor([[[4.0], [6.0], [9.0]]])).squeeze()
        tensor([[4., 6.],
                [6., 9.]])
    """
    k = int((2 * packed.shape[-2]) ** 0.5)
    i, j = torch.tril_indices(k, k, device=packed.device)
    full = packed.new_empty((*packed.shape[:-2], k, k, packed.shape[-1]))
    full[..., i, j, :] = packed
    full[..., j, i, :] = packed
    return full


def leading_shape(*arrays: Tensor) -> tuple[int, ...]:
    """Return the shape to which arrays broadcast, without the last axis.

    ``torch.broadcast_shapes`` is not used, because it imports hundreds of modules, which takes seconds.

    Examples:
        >>> leading_shape(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))
        (5, 2)
    """
    return tuple(torch.broadcast_tensors(*(array[..., :1] for array in arrays))[0].shape[:-1])
