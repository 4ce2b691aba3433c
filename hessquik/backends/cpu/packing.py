"""Constants in the kernel's layout. Programs share them; they are dropped when no program uses them any more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hessquik.memory import Arena

__all__ = ["Packed", "pack_matrix", "pad_columns"]

_arena = Arena()
_known: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


class Packed:
    """The packed forms of a network's weights, by the place of the weights in memory.

    It must not outlive the weights, nor may these change.

    Args:
        weights: The weights.

    Examples:
        >>> weight = torch.ones(128, 128, dtype=torch.float64)
        >>> packed = Packed([weight])
        >>> first = pack_matrix(weight, torch.float64, 8, packed)
        >>> pack_matrix(weight, torch.float64, 8, packed) is first
        True
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """Start without packed forms."""
        self._places = {weight.untyped_storage().data_ptr() for weight in weights}
        self.known: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()

    def place(self, array: Tensor) -> tuple[object, ...] | None:
        """Return what distinguishes an array among the weights; ``None`` if it is not among them."""
        if array.untyped_storage().data_ptr() not in self._places:
            return None
        return array.data_ptr(), array.shape, array.stride()


def pack_matrix(matrix: Tensor, dtype: torch.dtype, panel: int, packed: Packed | None = None) -> Tensor:
    """Return a matrix (depth, columns) as panels (panels, depth, panel), padded with zeros.

    Examples:
        >>> pack_matrix(torch.ones(2, 3), torch.float32, 2).tolist()
        [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]
    """
    depth, columns = matrix.shape
    panels = -(-columns // panel)
    return _shared(matrix.unsqueeze(0), dtype, panels * panel, (panels, depth, panel), packed)


def pad_columns(array: Tensor, dtype: torch.dtype, columns: int, packed: Packed | None = None) -> Tensor:
    """Return an array (outer, inner, columns) with its columns padded with zeros.

    Examples:
        >>> pad_columns(torch.ones(1, 1, 3), torch.float32, 4).tolist()
        [[[1.0, 1.0, 1.0, 0.0]]]
    """
    return _shared(array, dtype, columns, (*array.shape[:2], columns), packed)


def _shared(array: Tensor, dtype: torch.dtype, columns: int, shape: tuple[int, ...], packed: Packed | None) -> Tensor:
    """Return the padded array in the layout of panels, the same one for the same weights or the same numbers."""
    key = None if packed is None else packed.place(array)
    known = _known if packed is None or key is None else packed.known
    if key is None:
        key = hashlib.blake2b(array.contiguous().numpy().data, digest_size=16).digest(), array.shape, array.dtype
    found = known.get((*key, dtype, shape))
    if found is None:
        found = known[(*key, dtype, shape)] = _in_panels(array, dtype, columns, shape)
    return found


def _padded(array: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    """Return a copy of an array (outer, depth, columns) in a dtype, with columns of zeros appended."""
    padded = torch.zeros(*array.shape[:2], columns, dtype=dtype)
    padded[..., : array.shape[2]] = array
    return padded


def _in_panels(array: Tensor, dtype: torch.dtype, columns: int, shape: tuple[int, ...]) -> Tensor:
    """Return a copy of an array (outer, depth, columns) in panels of ``shape[2]`` columns, padded with zeros."""
    found = _arena.empty(shape, dtype)
    outer, depth, width = array.shape
    panel = shape[2]
    panels = found.view(outer, columns // panel, depth, panel)
    whole = width // panel
    panels[:, :whole] = array[..., : whole * panel].unflatten(2, (whole, panel)).transpose(1, 2)
    if whole < columns // panel:
        panels[:, whole] = _padded(array[..., whole * panel :], dtype, panel)
    return found
