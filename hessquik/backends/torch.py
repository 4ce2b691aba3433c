"""The torch backend: runs a graph node by node with torch, on every device that torch has.

Rows are computed in tiles of a few fixed row counts, the last one padded, so that torch's libraries choose the same
kernels for every row and the bits of a row do not depend on the other rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hessquik.graph import Graph
from hessquik.operations import compute_node

__all__ = ["TorchProgram"]

#: Rows of the smallest tile; with fewer, libraries run kernels for vectors, which give other bits.
SMALLEST_TILE_ROWS = 8
#: Rows of a tile over those of the next smaller one.
TILE_FACTOR = 4


class TorchProgram:
    """A graph that is run with torch.

    Args:
        graph: The graph.
        dtype: Dtype of all arrays.
        device: Device to run on.
        tile_rows: Rows of a tile at most.

    Attributes:
        tile_rows: Row counts of the tiles, ascending: those that give the bits of the largest. One that the device's
            memory does not hold is left out; the last one is halved.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype, device: torch.device, tile_rows: int) -> None:
        """Convert the constants and choose the row counts."""
        self._graph = graph
        self._dtype, self._device = dtype, device
        self._constants = {
            i: node.data.to(device, dtype).unsqueeze(0) for i, node in enumerate(graph.nodes) if node.data is not None
        }
        self._inputs = {node.arguments[0]: node for node in graph.nodes if node.op == "input"}
        self._last_use = {j: i for i, node in enumerate(graph.nodes) for j in node.inputs}
        self._lock = threading.Lock()
        rows = SMALLEST_TILE_ROWS
        while 2 * rows <= tile_rows:
            rows *= 2
        sizes = [rows]
        while sizes[0] > SMALLEST_TILE_ROWS:
            sizes.insert(0, max(SMALLEST_TILE_ROWS, sizes[0] // TILE_FACTOR))
        self.tile_rows = self._with_equal_bits(sizes)

    @torch.inference_mode()
    def run(self, arrays: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop`` of the results; inputs and results are in ``arrays`` by name.

        Raises:
            torch.OutOfMemoryError: not even the smallest tile fits the device's memory.
        """
        while start < stop:
            # The largest tile that is filled at least by half.
            rows = max((rows for rows in self.tile_rows if rows <= 2 * (stop - start)), default=self.tile_rows[0])
            count = min(rows, stop - start)
            try:
                self._run_tile(arrays, start, count, rows)
            except torch.OutOfMemoryError:
                if rows <= SMALLEST_TILE_ROWS:
                    raise
                count = 0
            if count == 0:  # outside the handler, which holds the arrays of the tile that failed
                self._leave_out(rows)
            start += count

    def _run_tile(self, arrays: Mapping[str, Tensor], start: int, count: int, rows: int) -> None:
        """Compute ``count`` rows in a tile of ``rows``, padded with zeros."""
        tile = self._tile(rows)
        for name, part in self._given(arrays, start, count).items():
            tile[name][: len(part)] = part
        for wanted, found in self._found(self._compute(tile), arrays, start, count):
            wanted.copy_(found)

    def _tile(self, rows: int) -> dict[str, Tensor]:
        """Return arrays of zeros for the inputs of a tile; inputs that all rows share have one row."""
        return {
            name: torch.zeros(1 if node.is_shared else rows, *node.shape, dtype=self._dtype, device=self._device)
            for name, node in self._inputs.items()
        }

    def _given(self, arrays: Mapping[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
        """Return the inputs of a tile's rows in the shapes of the graph, as views."""
        return {
            name: arrays[name].reshape(1, *node.shape)
            if node.is_shared
            else arrays[name][start : start + count].reshape(count, *node.shape)
            for name, node in self._inputs.items()
        }

    def _found(
        self, results: Mapping[str, Tensor], arrays: Mapping[str, Tensor], start: int, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of views: the place of some rows of a result, and these rows in a tile."""
        return [
            (
                arrays[name][start : start + count].view(count, *array.shape[1:]),
                array.expand(max(count, len(array)), *array.shape[1:])[:count],
            )
            for name, array in results.items()
        ]

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
    def _with_equal_bits(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the row counts whose tiles give rows the bits that the largest gives; those that memory holds."""
        found: dict[int, Tensor] = {}
        for rows in reversed(sizes):
            try:
                found[rows] = self._bits(rows)
            except torch.OutOfMemoryError:
                if rows == sizes[0]:
                    raise
            if rows not in found:
                self._free_memory()
        expected = next(iter(found.values()))[:1]
        return tuple(
            rows for rows in sizes if rows in found and (rows == max(found) or (found[rows] == expected).all())
        )

    def _bits(self, rows: int) -> Tensor:
        """Return the results of a tile in which the same few rows stand again and again: a row for each time."""
        generator, times = torch.Generator().manual_seed(0), rows // SMALLEST_TILE_ROWS
        arrays: dict[str, Tensor] = {}
        for name, node in self._inputs.items():
            some = torch.randn(1 if node.is_shared else SMALLEST_TILE_ROWS, *node.shape, generator=generator)
            repeats = (1 if node.is_shared else times, *(1,) * len(node.shape))
            arrays[name] = some.repeat(repeats).to(self._device, self._dtype)
        for name, i in self._graph.outputs.items():
            shape = (rows, *self._graph.nodes[i].shape)
            arrays[name] = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._run_tile(arrays, 0, rows, rows)
        self._wait()
        results = [arrays[name].reshape(times, -1).cpu().view(torch.int32) for name in self._graph.outputs]
        return torch.cat(results, dim=1)

    def _wait(self) -> None:
        """Wait until the tiles that were run are computed; what torch runs itself, it waits for itself."""

    def _leave_out(self, rows: int) -> None:
        """Give memory back and go on with smaller tiles."""
        self._free_memory()
        with self._lock:
            if rows in self.tile_rows:  # else another thread was first
                self.tile_rows = tuple(size for size in self.tile_rows if size < rows) or (rows // 2,)

    def _free_memory(self) -> None:
        """Free unused memory in torch's cache."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
