"""Devices as values: the numbers of a processor that planning depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CPU", "GPU", "Device"]


@dataclass(frozen=True, slots=True)
class Device:
    """The numbers of a processor, and of the backend that uses it, that planning depends on.

    Attributes:
        vector_bytes: Arrays are padded to whole vectors of that many bytes.
        tile_bytes: What the memory of a tile may take, so that it stays in a cache.
        matrix_bytes: What the constant matrices may take, so that they stay there too.
        operations_per_byte: Floating-point operations that take as long as moving a byte to or from that cache.
        smallest_tile_rows: Rows of the smallest tile: a wide layer's matrix is fetched for that many at least.
        largest_tile_rows: Rows of the largest tile.
        pairs_per_output: Pairs of tangents per output above which second derivatives are not carried forward.
    """

    vector_bytes: int
    tile_bytes: int
    matrix_bytes: int
    operations_per_byte: float
    smallest_tile_rows: int
    largest_tile_rows: int
    pairs_per_output: int = 8

    def lanes(self, dtype: torch.dtype) -> int:
        """Return how many numbers a vector has."""
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
    tile_bytes=256 << 20,
    matrix_bytes=16 << 20,
    operations_per_byte=10.0,
    smallest_tile_rows=32,
    largest_tile_rows=8192,
)
