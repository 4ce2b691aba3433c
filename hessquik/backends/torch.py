"""The torch backend: runs a graph node by node with torch, on every device that torch has.

Rows are computed in tiles of a few fixed row counts, the last one padded, so that torch's libraries choose the same
kernels for every row and the bits of a row do not depend on the other rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from hessquik.graph import Graph
from hessquik.operations import compute_node

__all__ = ["TorchProgram"]

#: Rows of the smallest tile; with fewer, libraries run kernels for vectors, which give other bits.
SMALLEST_TILE_ROWS = 8


class TorchProgram:
    """A graph that is run with torch.

    Args:
        graph: The graph.
        dtype: Dtype of all arrays.
        device: Device to run on.
        tile_rows: Rows of a tile at most.

    Attributes:
        tile_rows: Row counts of the tiles, ascending: one if tiles of different sizes give different bits here. They
            are halved when the device's memory does not hold a tile.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype, device: torch.device, tile_rows: int) -> None:
        """Convert the constants and choose the row counts."""
        self._graph = graph
        self._dtype, self._device = dtype, device
        self._constants = {
            i: node.data.to(device, dtype).unsqueeze(0) for i, node in enumerate(graph.nodes) if node.data is not None
        }
        self._last_use = {j: i for i, node in enumerate(graph.nodes) for j in node.inputs}
        self._lock = threading.Lock()
        largest = SMALLEST_TILE_ROWS
        while 2 * largest <= tile_rows:
            largest *= 2
        self.tile_rows: tuple[int, ...] = tuple(sorted({SMALLEST_TILE_ROWS, largest}))
        if not self._is_same_in_all_tiles():
            self.tile_rows = self.tile_rows[-1:]

    @torch.inference_mode()
    def run(self, arrays: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop`` of the results; inputs and results are in ``arrays`` by name.

        Raises:
            torch.OutOfMemoryError: not even the smallest tile fits the device's memory.
        """
        while start < stop:
            rows = next((rows for rows in self.tile_rows if rows >= stop - start), self.tile_rows[-1])
            count = min(rows, stop - start)
            try:
                found = self._compute(self._tile(arrays, start, count, rows))
            except torch.OutOfMemoryError:
                if rows <= SMALLEST_TILE_ROWS:
                    raise
                found = None
            if found is None:  # outside the handler, which holds the arrays of the tile that failed
                self._halve(rows)
                continue
            for name, array in found.items():
                wanted = arrays[name][start : start + count]
                wanted.copy_(array.expand(rows, *array.shape[1:])[:count].reshape(wanted.shape))
            start += count

    def _tile(self, arrays: Mapping[str, Tensor], start: int, count: int, rows: int) -> dict[str, Tensor]:
        """Return the inputs of a tile on the device, padded with zeros."""
        tile: dict[str, Tensor] = {}
        for node in self._graph.nodes:
            if node.op == "input":
                (name,) = node.arguments
                given = arrays[name]
                if node.is_shared:
                    tile[name] = given.to(self._device, self._dtype).reshape(1, *node.shape)
                    continue
                tile[name] = torch.zeros(rows, *node.shape, dtype=self._dtype, device=self._device)
                tile[name][:count] = given[start : start + count].reshape(count, *node.shape)
        return tile

    def _compute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the nodes in order; an array is dropped after its last use."""
        values: dict[int, Tensor] = dict(self._constants)
        kept = set(self._graph.outputs.values())
        for i, node in enumerate(self._graph.nodes):
            if node.op == "input":
                values[i] = inputs[node.arguments[0]]
            elif i not in values:
                values[i] = compute_node(node, [values[j] for j in node.inputs])
            for j in node.inputs:
                if self._last_use[j] == i and j not in kept:
                    values.pop(j, None)
        return {name: values[i] for name, i in self._graph.outputs.items()}

    @torch.inference_mode()
    def _is_same_in_all_tiles(self) -> bool:
        """Return whether equal rows have equal bits in tiles of every size and at every index."""
        found: dict[str, list[Tensor]] = {name: [] for name in self._graph.outputs}
        for rows in self.tile_rows:
            generator = torch.Generator().manual_seed(0)
            tile = {
                node.arguments[0]: torch.randn(1, *node.shape, generator=generator, dtype=torch.float64)
                .to(self._device, self._dtype)
                .repeat(1 if node.is_shared else rows, *(1,) * len(node.shape))
                for node in self._graph.nodes
                if node.op == "input"
            }
            for name, array in self._compute(tile).items():
                found[name] += array.flatten(1).cpu()
        return all(torch.equal(rows[0], row) for rows in found.values() for row in rows[1:])

    def _halve(self, rows: int) -> None:
        """Give memory back and go on with smaller tiles."""
        with self._lock:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if rows in self.tile_rows:  # else another thread was first
                smaller = {row for row in self.tile_rows if row < rows}
                self.tile_rows = tuple(sorted({*smaller, rows // 2}))
