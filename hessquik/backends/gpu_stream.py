"""Copies of arrays to and from a GPU through bounded pinned memory, overlapped with computation.

A call whose arrays are on the host is split into chunks of rows, which use two slots (sets of buffers) in turn:

    copy in       [ chunk 0 ][ chunk 1 ]          [ chunk 2 ] …
    compute                  [ chunk 0 ][ chunk 1 ]
    copy out                            [ chunk 0 ][ chunk 1 ]

:class:`Driver` wraps every CUDA call, so that the order of events is tested without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["CHUNK_BYTES", "DIRECT_BYTES", "Cuda", "Driver", "Stages", "per_device", "retried", "stages_of"]

T = TypeVar("T")

#: Most bytes of one array of a chunk on the host.
CHUNK_BYTES = 8 << 20
#: Chunks of at most so many bytes are not copied to the device: the kernel reads and writes pinned memory directly.
DIRECT_BYTES = 32 << 10
#: Slots of a stage.
SLOTS = 2
#: Most idle stages that are kept per device for later calls.
IDLE_STAGES = 2


class Driver(Protocol):
    """The CUDA functions that this module uses, for one device. Streams and events are opaque objects of the driver."""

    def stream(self) -> Any:
        """Return a new stream."""
        ...

    def event(self) -> Any:
        """Return a new event."""
        ...

    def caller(self) -> Any:
        """Return the stream that the calling thread uses."""
        ...

    def record(self, event: Any, stream: Any) -> None:
        """Record an event that completes when all work queued so far on a stream is done."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Make work queued on a stream from now on wait for an event."""
        ...

    def synchronize(self, event: Any) -> None:
        """Block the calling thread until an event completes."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[object]:
        """Make a stream the one that the calling thread uses, within a block."""
        ...

    def copy(self, out: Tensor, source: Tensor) -> None:
        """Queue a copy between pinned memory and the device on the calling thread's stream."""
        ...

    def pinned(self, count: int) -> Tensor:
        """Return ``count`` bytes of pinned host memory."""
        ...

    def memory(self, count: int) -> Tensor:
        """Return ``count`` bytes of device memory for use on the thread's stream; deleting the tensor frees them."""
        ...

    def is_host(self, array: Tensor) -> bool:
        """Return whether an array is in the host's memory."""
        ...

    def free_memory(self) -> None:
        """Return unused memory to the device."""
        ...


class Cuda:
    """The driver of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Keep the device."""
        self.device = device

    def stream(self) -> torch.cuda.Stream:
        """Return a new stream."""
        return torch.cuda.Stream(self.device)

    def event(self) -> torch.cuda.Event:
        """Return a new event."""
        return torch.cuda.Event()

    def caller(self) -> torch.cuda.Stream:
        """Return the calling thread's stream."""
        return torch.cuda.current_stream(self.device)

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        """Record an event."""
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Make a stream wait for an event."""
        stream.wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        """Block the calling thread until an event completes."""
        event.synchronize()

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """Make a stream the calling thread's, within a block."""
        return torch.cuda.stream(stream)

    def copy(self, out: Tensor, source: Tensor) -> None:
        """Queue an asynchronous copy."""
        out.copy_(source, non_blocking=True)

    def pinned(self, count: int) -> Tensor:
        """Return ``count`` bytes of pinned host memory."""
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def memory(self, count: int) -> Tensor:
        """Return ``count`` bytes of device memory."""
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def is_host(self, array: Tensor) -> bool:
        """Return whether an array is in the host's memory."""
        return array.device.type == "cpu"

    def free_memory(self) -> None:
        """Return unused memory of torch's cache to the device."""
        torch.cuda.empty_cache()


#: A function (arrays, n) that launches n rows on the calling thread's stream; the device can access these arrays.
Launch = Callable[[Mapping[str, Tensor], int], None]
#: A buffer, and the array in it that was used last.
Part = tuple[Tensor, Tensor]


@dataclass
class _Slot:
    """Buffers of one chunk: its inputs and results on the host and on the device."""

    done: Any
    host: dict[str, Part] = field(default_factory=dict)
    device: dict[str, Part] = field(default_factory=dict)
    #: Results in flight: pairs of the caller's array and the pinned memory to copy into it.
    waiting: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    is_used: bool = False

    def drain(self, driver: Driver) -> None:
        """Wait until the chunk is computed, and copy its results to the caller's arrays."""
        if self.is_used:
            driver.synchronize(self.done)
            for wanted, found in self.waiting:
                wanted.copy_(found)
            self.forget()

    def forget(self) -> None:
        """Discard the results in flight."""
        self.waiting.clear()
        self.is_used = False


class _Stage:
    """Streams and slots, used by one call at a time."""

    def __init__(self, driver: Driver, slots: int = SLOTS) -> None:
        """Create the streams and events; memory is allocated by the first call."""
        self.driver = driver
        self.inward, self.compute, self.outward = driver.stream(), driver.stream(), driver.stream()
        self.arrived, self.computed = driver.event(), driver.event()
        self.slots = [_Slot(driver.event()) for _ in range(slots)]

    def run(self, call: _Call, n: int, launch: Launch) -> None:
        """Run a call chunk by chunk."""
        driver = self.driver
        if call.there:
            begun = driver.event()
            driver.record(begun, driver.caller())
            driver.wait(self.compute, begun)
        try:
            for turn, first in enumerate(range(0, n, call.rows)):
                slot = self.slots[turn % len(self.slots)]
                slot.drain(driver)
                self._chunk(call, slot, first, min(n, first + call.rows), launch)
            for slot in self.slots:
                slot.drain(driver)
        except BaseException:
            # Wait for copies and kernels in flight: they read and write this stage's memory. Their results are not used.
            ended = driver.event()
            for stream in (self.inward, self.compute, self.outward):
                driver.record(ended, stream)
                driver.synchronize(ended)
            for slot in self.slots:
                slot.forget()
            raise
        if call.there:
            ended = driver.event()
            driver.record(ended, self.compute)
            driver.wait(driver.caller(), ended)

    def _chunk(self, call: _Call, slot: _Slot, first: int, last: int, launch: Launch) -> None:
        """Queue the copies and the launch of one chunk; the slot must be drained."""
        driver, count = self.driver, last - first

        def rows(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: array if name in call.shared else array[first:last] for name, array in arrays.items()}

        arrays, here = rows(call.there), rows(call.here)
        host = {name: self._part(slot.host, name, array, driver.pinned) for name, array in here.items()}
        for name in call.inputs:
            host[name].copy_(here[name])
        slot.waiting += [(here[name], host[name]) for name in call.outputs]
        if count * call.row_bytes + call.shared_bytes <= DIRECT_BYTES:
            with driver.on(self.compute):
                launch({**arrays, **host}, count)
            slot.is_used = True
            driver.record(slot.done, self.compute)
            return
        with driver.on(self.inward):
            # Memory that torch's allocator holds free for a stream may still be in use there, by work queued before. So
            # all is allocated for this stream, and computing waits for what is queued here by then.
            device = {name: self._part(slot.device, name, array, driver.memory) for name, array in here.items()}
            for name in call.inputs:
                driver.copy(device[name], host[name])
        driver.record(self.arrived, self.inward)
        driver.wait(self.compute, self.arrived)
        with driver.on(self.compute):
            launch({**arrays, **device}, count)
        slot.is_used = True
        driver.record(self.computed, self.compute)
        driver.wait(self.outward, self.computed)
        with driver.on(self.outward):
            for name in call.outputs:
                driver.copy(host[name], device[name])
        driver.record(slot.done, self.outward)

    @staticmethod
    def _part(kept: dict[str, Part], name: str, like: Tensor, make: Callable[[int], Tensor]) -> Tensor:
        """Return the buffer ``name`` of a slot with the shape and dtype of ``like``; allocate it if it is too small."""
        if name in kept:
            memory, array = kept[name]
            if array.shape == like.shape and array.dtype is like.dtype:
                return array
        size = like.numel() * like.element_size()
        if name not in kept or memory.numel() < size:
            memory = make(max(size, 4096))
        array = memory[:size].view(like.dtype).view(like.shape)
        kept[name] = memory, array
        return array


@dataclass(frozen=True)
class _Call:
    """The arrays of a call on the host (``here``) and on the device (``there``), and the rows of a chunk."""

    here: Mapping[str, Tensor]
    there: Mapping[str, Tensor]
    inputs: Sequence[str]
    outputs: Sequence[str]
    shared: frozenset[str]
    rows: int
    row_bytes: int
    shared_bytes: int


class Stages:
    """A pool of stages for one device; a call takes an idle stage, or creates one if all are in use.

    Attributes:
        driver: The device's driver.
        caches: Functions that free what else is kept in the device's memory.
    """

    def __init__(self, driver: Driver) -> None:
        """Start with an empty pool."""
        self.driver = driver
        self.caches: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._idle: list[_Stage] = []

    def run(
        self,
        arrays: Mapping[str, Tensor],
        outputs: frozenset[str],
        shared: frozenset[str],
        n: int,
        launch: Launch,
    ) -> None:
        """Run the first n rows of a call that has arrays on the host.

        Results on the host are complete on return; results on the device are ready for work that the caller queues on
        its current stream afterwards.

        Args:
            arrays: The arrays of the whole call by name, on the host or on the device.
            outputs: Names of the arrays that are written.
            shared: Names of the arrays that all rows share; they are not sliced.
            n: Number of rows.
            launch: Launches rows of a call.
        """
        here = {name: array for name, array in arrays.items() if self.driver.is_host(array)}
        there = {name: array for name, array in arrays.items() if name not in here}
        inputs = [name for name in here if name not in outputs]
        wanted = [name for name in here if name in outputs]
        row_bytes, shared_bytes = 0, 0
        largest = 1
        for name, array in here.items():
            size = array.numel() * array.element_size()
            if name in shared:
                shared_bytes += size
            else:
                per_row = size // max(1, array.shape[0])
                row_bytes += per_row
                largest = max(largest, per_row)
        rows = max(1, CHUNK_BYTES // largest)
        call = _Call(here, there, inputs, wanted, shared, rows, row_bytes, shared_bytes)
        with self._lock:
            stage = self._idle.pop() if self._idle else None
        if stage is None:
            stage = _Stage(self.driver)
        stage.run(call, n, launch)
        with self._lock:
            if len(self._idle) < IDLE_STAGES:
                self._idle.append(stage)

    def free_memory(self) -> None:
        """Free the memory of idle stages and of all caches, and what torch's cache does not use."""
        with self._lock:
            self._idle.clear()
        for clear in self.caches:
            clear()
        self.driver.free_memory()


def per_device(make: Callable[[torch.device], T]) -> Callable[[torch.device], T]:
    """Decorate a function that makes an object for a device: it is called once for each, whatever threads ask."""
    made: dict[torch.device, T] = {}
    lock = threading.Lock()

    @wraps(make)
    def shared(device: torch.device) -> T:
        with lock:
            if device not in made:
                made[device] = make(device)
            return made[device]

    return shared


@per_device
def stages_of(device: torch.device) -> Stages:
    """Return the stages of a CUDA device."""
    return Stages(Cuda(device))


def retried(attempt: Callable[[], T], free_memory: Callable[[], None]) -> T:
    """Return the result of an attempt; if it runs out of memory, free memory and try once more."""
    try:
        return attempt()
    except torch.OutOfMemoryError:
        pass
    free_memory()
    return attempt()
