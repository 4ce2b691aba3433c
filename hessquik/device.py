"""The figures of a device that planning depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CPU", "GPU", "Device"]


@dataclass(frozen=True, slots=True)
class Device:
    """The figures of a device, and of its backend, that planning depends on.

    Attributes:
        vector_bytes: Bytes of a vector; arrays are padded to whole vectors.
        tile_bytes: Most bytes of a tile's memory, so that it stays in the cache.
        matrix_bytes: Most bytes of the constant matrices for which they stay in the cache too.
        operations_per_byte: Floating-point operations that take as long as moving one byte to or from the cache.
        smallest_tile_rows: Fewest rows of a tile, so that the matrices of wide layers are loaded for several rows.
        largest_tile_rows: Most rows of a tile.
        pairs_per_output: Pairs of tangents per output above which forward mode is not considered.
    """

    vector_bytes: int
    tile_bytes: int
    matrix_bytes: int
    operations_per_byte: float
    smallest_tile_rows: int
    largest_tile_rows: int
    pairs_per_output: int = 8

    def lanes(self, dtype: torch.dtype) -> int:
        """Return the number of entries of a dtype in a vector."""
        return self.vector_bytes // dtype.itemsize


#: One core of a server processor with AVX-512 and 1 MiB of second-level cache.
CPU = Device(
    vector_bytes=64,
    tile_bytes=640 << 10,
    matrix_bytes=1 << 20,
    operations_per_byte=2.0,
    smallest_tile_rows=4,
    largest_tile_rows=256,
)

#: A data-centre GPU. Tiles are large for torch's library; the Triton kernel chooses its own, by the number of rows.
GPU = Device(
    vector_bytes=16,
    tile_bytes=512 << 20,
    matrix_bytes=16 << 20,
    operations_per_byte=10.0,
    smallest_tile_rows=32,
    largest_tile_rows=8192,
)
