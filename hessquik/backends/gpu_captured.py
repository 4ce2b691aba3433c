"""Wide networks on a GPU: torch's libraries compute a tile, which is captured as a CUDA graph and replayed.

A tile takes a hundred launches; a replay is one. The captured tiles of a device share the memory of their intermediate
results and the libraries' workspace, so one runs after the other, whatever streams the calls are on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hessquik.backends.gpu_stream import Cuda, Driver, Stages, per_device, retried, stages_of
from hessquik.backends.torch import TorchProgram
from hessquik.graph import Graph

__all__ = ["CapturedProgram", "Captures", "CapturingDriver", "CudaCapturing", "captures_of"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: Most bytes of the inputs and results of all captured tiles of a device.
MAX_TILE_BYTES = 1 << 30


class CapturingDriver(Driver, Protocol):
    """The CUDA functions that capture needs, for one device."""

    def active(self) -> AbstractContextManager[object]:
        """Return a context in which the device is the current one."""
        ...

    def pool(self) -> Any:
        """Return a new pool of device memory for captured work."""
        ...

    def capture(self, work: Callable[[], T], pool: Any) -> tuple[T, Any]:
        """Return the result of ``work``, and its captured launches, which write the same tensors again.

        Raises:
            torch.OutOfMemoryError: memory runs out.
            RuntimeError: the device cannot capture this work.
        """
        ...

    def replay(self, captured: Any) -> None:
        """Queue captured launches on the calling thread's stream."""
        ...

    def hold(self, arrays: Iterable[Tensor], streams: set[int]) -> None:
        """Keep the memory of arrays from others until the work on the calling thread's stream is done.

        Args:
            arrays: The arrays, which work on this stream reads.
            streams: The streams for which this was said before; this one is added.
        """
        ...


class CudaCapturing(Cuda):
    """The driver of a CUDA device that captures."""

    def __init__(self, device: torch.device) -> None:
        """Capture on a stream of its own, for which libraries have a workspace of its own."""
        super().__init__(device)
        self._capturing = torch.cuda.Stream(device)

    def active(self) -> AbstractContextManager[object]:
        """Make the device the current one, within a block."""
        return torch.cuda.device(self.device)

    def pool(self) -> Any:
        """Return a new pool of device memory."""
        return torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], T], pool: Any) -> tuple[T, torch.cuda.CUDAGraph]:
        """Run work once, so that libraries load their kernels, and capture it."""
        graph, stream = torch.cuda.CUDAGraph(), self._capturing
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            work()
            # Other threads may allocate memory meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        stream.synchronize()
        return result, graph

    def replay(self, captured: torch.cuda.CUDAGraph) -> None:
        """Queue a CUDA graph on the calling thread's stream."""
        captured.replay()

    def hold(self, arrays: Iterable[Tensor], streams: set[int]) -> None:
        """Tell torch's allocator which stream the arrays are used on."""
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in streams:
            for array in arrays:
                array.record_stream(stream)
            streams.add(stream.cuda_stream)


@dataclass(eq=False)
class _Tile:
    """A tile of one size.

    Attributes:
        inputs: Where its inputs are copied to.
        results: Where the captured launches write the results.
        captured: The launches; ``None`` if the device cannot capture them.
        is_dropped: Whether it has lost its memory to others.
        streams: The streams on which it has run.
        last_use: A number that grows with every use of a tile on this device.
    """

    inputs: dict[str, Tensor]
    results: dict[str, Tensor] = field(default_factory=dict)
    captured: Any = None
    is_dropped: bool = False
    streams: set[int] = field(default_factory=set)
    last_use: int = 0

    @property
    def size(self) -> int:
        """Return the bytes of inputs and results."""
        arrays = (*self.inputs.values(), *self.results.values())
        return sum(array.untyped_storage().nbytes() for array in arrays)


class Captures:
    """The captured tiles of one device, which run one after the other.

    Args:
        driver: The device's driver.
        stages: The device's stages.

    Attributes:
        driver: The device's driver.
        stages: The device's stages.
        lock: Held while a tile is captured or queued.
    """

    def __init__(self, driver: CapturingDriver, stages: Stages) -> None:
        """Start without tiles."""
        self.driver, self.stages = driver, stages
        stages.caches.append(self.clear)
        self.lock = threading.Lock()
        self._done = driver.event()
        self._tiles: weakref.WeakSet[_Tile] = weakref.WeakSet()
        self._uses = count()
        self._pool: Any = None

    def capture(self, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> _Tile:
        """Return a new tile. Tiles that were not used for longest lose their memory if all together have too much.

        Raises:
            torch.OutOfMemoryError: memory runs out.
        """
        if not self._tiles:  # torch does not allow a pool again that no graph uses any more
            self._pool = self.driver.pool()
        try:
            results, captured = self.driver.capture(lambda: compute(inputs), self._pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("a CUDA graph cannot be captured, its operations are launched one by one: %s", error)
            return _Tile(inputs)
        tile = _Tile(inputs, results, captured, last_use=next(self._uses))
        self._tiles.add(tile)
        kept = sorted(self._tiles, key=lambda one: one.last_use)
        while len(kept) > 1 and sum(one.size for one in kept) > MAX_TILE_BYTES:
            self._drop(kept.pop(0))
        return tile

    @contextlib.contextmanager
    def turn(self, tile: _Tile) -> Iterator[None]:
        """Queue work with a tile in this block, after all work with tiles that was queued before."""
        driver, tile.last_use = self.driver, next(self._uses)
        driver.wait(driver.caller(), self._done)
        try:
            yield
        finally:
            driver.record(self._done, driver.caller())

    def wait(self) -> None:
        """Wait until all tiles that were queued are done."""
        self.driver.synchronize(self._done)

    def clear(self) -> None:
        """Free the memory of all tiles."""
        with self.lock:
            for tile in list(self._tiles):
                self._drop(tile)

    def _drop(self, tile: _Tile) -> None:
        self.wait()
        self._tiles.discard(tile)
        tile.inputs, tile.results, tile.captured, tile.is_dropped = {}, {}, None, True


@per_device
def captures_of(device: torch.device) -> Captures:
    """Return the captured tiles of a CUDA device."""
    return Captures(CudaCapturing(device), stages_of(device))


class CapturedProgram(TorchProgram):
    """A graph that torch's libraries run on a GPU, a replay for each tile; threads may share it.

    Args:
        graph: The graph.
        dtype: Dtype of all arrays.
        device: The device.
        tile_rows: Rows of a tile at most.
        captures: The captured tiles of the device.

    Raises:
        torch.OutOfMemoryError: the device's memory does not hold the constants and the smallest tile.
    """

    def __init__(
        self, graph: Graph, dtype: torch.dtype, device: torch.device, tile_rows: int, captures: Captures
    ) -> None:
        """Capture the tiles of all sizes."""
        self._captures = captures
        self._tiles: dict[int, _Tile] = {}
        super().__init__(graph, dtype, device, tile_rows)
        self._shared = frozenset(name for name, node in self._inputs.items() if node.is_shared)

    @torch.inference_mode()
    def run(self, arrays: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop`` of the results; inputs and results are in ``arrays`` by name.

        Results on the host are complete on return; results on the device are ready for work that the caller queues on
        its current stream afterwards.

        Raises:
            torch.OutOfMemoryError: not even the smallest tile fits the device's memory.
        """
        n, driver, stages = stop - start, self._captures.driver, self._captures.stages
        if n <= 0:
            return
        used = {name: arrays[name] for name in (*self._inputs, *self._graph.outputs)}
        if start:
            used = {name: array if name in self._shared else array[start:stop] for name, array in used.items()}
        if not any(driver.is_host(array) for array in used.values()):
            self._launch(used, n)
            return
        with driver.active():
            outputs = frozenset(self._graph.outputs)
            retried(lambda: stages.run(used, outputs, self._shared, n, self._launch), stages.free_memory)

    def _launch(self, arrays: Mapping[str, Tensor], n: int) -> None:
        super().run(arrays, 0, n)

    def _run_tile(self, arrays: Mapping[str, Tensor], start: int, count: int, rows: int) -> None:
        """Compute ``count`` rows in a tile of ``rows``; those after them are of earlier calls."""
        captures, driver = self._captures, self._captures.driver
        with captures.lock:
            tile = self._tiles.get(rows)
            if tile is None or tile.is_dropped:
                tile = self._tiles[rows] = captures.capture(self._tile(rows), self._compute)
            with captures.turn(tile):
                driver.hold((*self._constants.values(), *tile.inputs.values()), tile.streams)
                for name, part in self._given(arrays, start, count).items():
                    driver.copy(tile.inputs[name][: len(part)], part)
                if tile.captured is None:
                    results = self._compute(tile.inputs)
                else:
                    results = tile.results
                    driver.replay(tile.captured)
                for wanted, found in self._found(results, arrays, start, count):
                    driver.copy(wanted, found)

    def _wait(self) -> None:
        self._captures.wait()

    def _free_memory(self) -> None:
        self._captures.stages.free_memory()
