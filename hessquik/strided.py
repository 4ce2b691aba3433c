"""Arrays of any rank in a buffer, described by strides: views of them, and joining of their axes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from hessquik.steps import Buffer, View

__all__ = ["Strided", "collapsed"]


@dataclass(frozen=True, slots=True)
class Strided:
    """A row's array in a buffer.

    Attributes:
        buffer: The memory.
        shape: Entries along each axis.
        strides: Numbers between neighbours along each axis; 0 repeats an entry.
        offset: Numbers from the beginning of the row to the first entry.
    """

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def permuted(self, axes: tuple[int, ...]) -> Strided:
        """Return the array with its axes in another order."""
        shape, strides = tuple(self.shape[i] for i in axes), tuple(self.strides[i] for i in axes)
        return Strided(self.buffer, shape, strides, self.offset)

    def part(self, axis: int, start: int, stop: int) -> Strided:
        """Return entries ``start`` to ``stop`` along an axis."""
        axis %= len(self.shape)
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return Strided(self.buffer, shape, self.strides, self.offset + start * self.strides[axis])

    def diagonal(self) -> Strided:
        """Return the diagonal of the first two axes, the entries (i, i, …)."""
        return replace(self, shape=self.shape[1:], strides=(self.strides[0] + self.strides[1], *self.strides[2:]))

    def reshaped(self, shape: tuple[int, ...]) -> Strided | None:
        """Return the same entries in the same order under another shape, or ``None`` if no strides describe that."""
        if 0 in self.shape:
            return replace(self, shape=shape, strides=(0,) * len(shape))
        axes = [(extent, stride) for extent, stride in zip(self.shape, self.strides, strict=True) if extent != 1]
        strides: list[int] = []
        for extent in reversed(shape):
            if extent == 1:
                strides.append(0)
                continue
            if not axes:
                return None
            inner, stride = axes.pop()
            while inner < extent and axes and axes[-1][1] == inner * stride:
                inner *= axes.pop()[0]
            if inner % extent:
                return None
            strides.append(stride)
            if inner > extent:
                axes.append((inner // extent, stride * extent))
        return None if axes else replace(self, shape=shape, strides=tuple(reversed(strides)))

    def repeated(self, shape: tuple[int, ...]) -> Strided:
        """Return the array broadcast to a shape."""
        missing = len(shape) - len(self.shape)
        extents, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        kept = tuple(0 if old < new else stride for old, new, stride in zip(extents, shape, strides, strict=True))
        return Strided(self.buffer, shape, kept, self.offset)

    def view(self) -> View:
        """Return the array as a view with the three axes of a step."""
        missing = 3 - len(self.shape)
        shape, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        return View(self.buffer, shape, strides, self.offset)  # type: ignore[arg-type]


def collapsed(arrays: list[Strided], keeps_columns: bool) -> list[Strided]:
    """Return arrays of one shape with the fewest axes: neighbours are joined where the strides of all allow it.

    Args:
        arrays: The arrays.
        keeps_columns: Whether the last axis stays the last one even if it has one entry.
    """
    shape = arrays[0].shape
    kept: list[list[int]] = []
    for axis, extent in enumerate(shape):
        if extent == 1 and not (keeps_columns and axis == len(shape) - 1):
            continue
        if kept and all(array.strides[kept[-1][-1]] == array.strides[axis] * extent for array in arrays):
            kept[-1].append(axis)
        else:
            kept.append([axis])
    extents = tuple(prod(shape[axis] for axis in group) for group in kept) or (1,)
    strides = [tuple(array.strides[group[-1]] for group in kept) or (1,) for array in arrays]
    return [replace(array, shape=extents, strides=own) for array, own in zip(arrays, strides, strict=True)]
