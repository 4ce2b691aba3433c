"""Arrays in memory, described by strides: views of any rank, and joining of their axes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

__all__ = ["Buffer", "Space", "View", "collapsed"]


class Space(Enum):
    """A kind of memory."""

    CONSTANT = "constant"
    INPUT = "input"
    OUTPUT = "output"
    TILE = "tile"
    SHARED = "shared"

    @property
    def is_inside(self) -> bool:
        """True for memory that steps write for other steps."""
        return self in {Space.TILE, Space.SHARED}


@dataclass(eq=False, slots=True)
class Buffer:
    """An array's memory.

    Attributes:
        space: Its kind of memory.
        size: Numbers per row, or in total if all rows share it.
        name: Name of an input (``x``, ``weights``, ``directions``) or of an output (a quantity).
        constant: The place of a constant among those of its program.
        is_shared: Whether all rows share it: constants, SHARED memory and inputs that are given once for all rows.
        offset: Its begin in TILE memory, in numbers per row of the tile, or in SHARED memory, in numbers.
    """

    space: Space
    size: int
    name: str = ""
    constant: int = 0
    is_shared: bool = False
    offset: int = 0

    @property
    def row_stride(self) -> int:
        """Numbers between neighbouring rows.

        In TILE memory the rows of one buffer are neighbours: row r of a tile of R rows begins at
        ``offset * R + r * size``. Row r of an input or output begins at ``r * size``.
        """
        return 0 if self.is_shared else self.size

    def __str__(self) -> str:
        """Return the name of an input or output, else the space, and the offset unless it is a constant."""
        if self.name:
            return self.name
        return self.space.value if self.space is Space.CONSTANT else f"{self.space.value}[{self.offset}]"


@dataclass(frozen=True, slots=True)
class View:
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

    @property
    def size(self) -> int:
        """Number of distinct entries."""
        return prod(extent for extent, stride in zip(self.shape, self.strides, strict=True) if stride)

    def permuted(self, axes: tuple[int, ...]) -> View:
        """Return the array with its axes in another order."""
        shape, strides = tuple(self.shape[i] for i in axes), tuple(self.strides[i] for i in axes)
        return View(self.buffer, shape, strides, self.offset)

    def part(self, axis: int, start: int, stop: int) -> View:
        """Return entries ``start`` to ``stop`` along an axis."""
        axis %= len(self.shape)
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return View(self.buffer, shape, self.strides, self.offset + start * self.strides[axis])

    def diagonal(self) -> View:
        """Return the diagonal of the first two axes, the entries (i, i, …)."""
        strides = (self.strides[0] + self.strides[1], *self.strides[2:])
        return View(self.buffer, self.shape[1:], strides, self.offset)

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """Return the same entries in the same order under another shape, or ``None`` if no strides describe that."""
        if 0 in self.shape:
            return View(self.buffer, shape, (0,) * len(shape), self.offset)
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
        return None if axes else View(self.buffer, shape, tuple(reversed(strides)), self.offset)

    def repeated(self, shape: tuple[int, ...]) -> View:
        """Return the array broadcast to a shape."""
        if shape == self.shape:
            return self
        missing = len(shape) - len(self.shape)
        extents, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        kept = tuple(0 if old < new else stride for old, new, stride in zip(extents, shape, strides, strict=True))
        return View(self.buffer, shape, kept, self.offset)

    def in_three_axes(self) -> View:
        """Return the array with the axes of a step: (outer, inner, columns)."""
        missing = 3 - len(self.shape)
        if not missing:
            return self
        return View(self.buffer, (1,) * missing + self.shape, (0,) * missing + self.strides, self.offset)

    def __str__(self) -> str:
        """Return the buffer and the shape."""
        return f"{self.buffer}{list(self.shape)}"


def collapsed(arrays: list[View], keeps_columns: bool) -> list[View]:
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
    return [View(array.buffer, extents, own, array.offset) for array, own in zip(arrays, strides, strict=True)]
