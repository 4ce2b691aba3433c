"""The CPU backend: a compiled kernel that runs a program in one call, for any number of rows.

It is built when the package is installed, if there is a C compiler (GCC or clang). A row's arithmetic does not depend
on its index or on the other rows, so neither do its bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hessquik.backends.cpu.packing import Packed
from hessquik.backends.cpu.structures import CONSTANTS, KERNEL
from hessquik.backends.cpu.translate import Translation
from hessquik.backends.runner import Bound, refuse
from hessquik.steps import Program

__all__ = ["CpuProgram", "is_available", "vector_bytes"]


def is_available() -> bool:
    """Return whether the kernel was built from the present sources."""
    return KERNEL is not None


def vector_bytes() -> int:
    """Return the bytes of this machine's vectors."""
    assert KERNEL is not None
    return int(KERNEL.vector_bytes)


class CpuProgram:
    """A program that the kernel runs; threads may share it.

    Args:
        program: The program.
        dtype: ``torch.float32`` or ``torch.float64``, of all numbers.
        tile_rows: Rows of a tile.
        vector_bytes: Bytes of the vectors, 16, 32 or 64; the machine's widest if not given.
        packed: The packed weights of the network, if its programs share them.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype,
        tile_rows: int,
        vector_bytes: int | None = None,
        packed: Packed | None = None,
    ) -> None:
        """Translate the program."""
        assert KERNEL is not None, "the CPU kernel was not built"
        widest = int(KERNEL.vector_bytes)
        if vector_bytes is not None and (vector_bytes not in {16, 32, 64} or vector_bytes > widest):
            raise ValueError(f"vector_bytes must be 16, 32 or 64 and at most {widest} here, got {vector_bytes}")
        kind = Translation, dtype, tile_rows, vector_bytes or widest
        translation: Translation = program.derive(kind, lambda: Translation(program, *kind[1:]))
        self._arrays = tuple(translation.arrays)
        self._words = translation.words
        self._constants = translation.packed(program, packed)
        self._addresses = _words(constant.data_ptr() for constant in self._constants)

    def run(self, arrays: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop``; other rows are unchanged.

        Args:
            arrays: Contiguous inputs and outputs by name, of the program's dtype.
            start: The first row.
            stop: The row after the last one.
        """
        assert KERNEL is not None
        addresses = _words(arrays[name].data_ptr() for name in self._arrays)
        KERNEL.run(self._words, self._addresses, addresses, start, stop)

    def bind(
        self, inputs: Mapping[str, tuple[int, ...]], results: Mapping[str, tuple[int, ...]], most_rows: int
    ) -> Bound:
        """Return a function of tensors that runs the program for at most so many rows and returns new results.

        Args:
            inputs: Shapes of x, weights and directions, in this order, the number of rows as -1; () for ``None``.
            results: Shapes of the results.
            most_rows: The largest number of rows.
        """
        assert KERNEL is not None
        index = {name: i for i, name in enumerate(self._arrays)}

        def slots(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
            return _slots((index.get(name, -1), shape) for name, shape in shapes.items())

        try:
            bound: Bound = KERNEL.bind(
                self._constants,
                self._words,
                self._addresses,
                Tensor,
                most_rows,
                slots(inputs),
                tuple(results),
                slots(results),
            )
        except (AttributeError, ValueError):  # a torch without DLPack's functions; more results than a call may have
            return refuse
        return bound


def _words(numbers: Iterable[int]) -> bytes:
    """Return integers of eight bytes."""
    return array("q", numbers).tobytes()


def _slots(arrays: Iterable[tuple[int, tuple[int, ...]]]) -> bytes:
    """Return arrays as ``bind`` takes them: the place among those of the program, or -1, and the shape of each."""
    axes = CONSTANTS["MOST_AXES"]
    return b"".join(_words((place, len(shape), *shape, *[0] * (axes - len(shape)))) for place, shape in arrays)
