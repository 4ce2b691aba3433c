"""What runs a plan for any number of rows: the CPU kernel, or torch on tiles of a few row counts.

Torch's tiles go through lanes. A lane is a machine with, on a GPU, a stream and pinned buffers of its own; two of
them in turn let one tile's copies overlap the other's computing:

    lane 0   in ─ compute ─ out        in ─ compute ─ out
    lane 1              in ─ compute ─ out        in ─ compute ─ out
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import cycle

import torch
from torch import Tensor

from hessquik.machine import Machine
from hessquik.native import Native, Packed
from hessquik.plan import Ask, Plan

__all__ = ["Lane", "NativeRunner", "Runner", "TorchRunner"]

#: Rows of torch's smallest tile; with fewer, other kernels run (matrix times vector) and give other bits.
SMALLEST_TILE_ROWS = 8
#: Lanes of a call on a GPU; one computes while the other copies.
LANES = 2
_INPUTS = frozenset({"x", "weights", "directions"})


class NativeRunner:
    """Runs a plan on the CPU kernel: any number of rows, no padding."""

    def __init__(self, plan: Plan, dtype: torch.dtype, packed: Packed) -> None:
        """Translate the plan."""
        self.plan = plan
        self.ladder = tuple(sorted({1, plan.rows}))
        self.shared = _shared(plan.ask)
        self._native = Native(plan.program, dtype, plan.rows, packed)

    def run(self, arrays: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop`` of the results."""
        if start < stop:
            self._native.run(arrays, stop - start, start)


class TorchRunner:
    """Runs a plan with torch: tiles of a few row counts, the last one padded with zeros.

    Args:
        plan: What to run.
        dtype: Of all numbers.
        device: Where the plan's constants are.

    Attributes:
        ladder: Row counts of the tiles, ascending. It has one if tiles of different sizes give different bits here,
            and is halved when the device's memory does not hold a tile.
    """

    def __init__(self, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
        """Choose the row counts: the smallest, and the power of two whose workspace fits a tile."""
        self.plan = plan
        self.dtype = dtype
        self.device = device
        rows = SMALLEST_TILE_ROWS
        while 2 * rows <= plan.rows:
            rows *= 2
        self.ladder: tuple[int, ...] = tuple(sorted({SMALLEST_TILE_ROWS, rows}))
        self.shared = _shared(plan.ask)
        self._lock = threading.Lock()
        self._idle: dict[int, list[Lane]] = {}
        if device.type != "cpu" and not self.is_same_in_all_tiles():
            self.ladder = self.ladder[-1:]

    def run(self, arrays: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop`` of the results."""
        while start < stop:
            ladder = self.ladder
            rows = next((rows for rows in ladder if rows >= stop - start), ladder[-1])
            # All tiles of this size; what is left over may fit a smaller one.
            end = min(stop, start + max(1, (stop - start) // rows) * rows)
            try:
                start = self._run_tiles(arrays, start, end, rows)
                continue
            except torch.OutOfMemoryError:
                if rows <= SMALLEST_TILE_ROWS:
                    raise
            # Not in the handler: the error holds what was being run, and its memory.
            self._halve(rows)

    def is_same_in_all_tiles(self) -> bool:
        """Whether the same rows have the same bits in tiles of every size."""
        found: list[Tensor] = []
        for rows in self.ladder:
            lane = self._take(rows)
            generator = torch.Generator().manual_seed(0)
            with torch.inference_mode():
                for name, place in sorted(lane.machine.arrays.items()):
                    if name in _INPUTS:
                        copies = 1 if name in self.shared else rows
                        row = torch.randn(place.numel() // copies, generator=generator, dtype=torch.float64)
                        place.copy_(row.repeat(copies))
                lane.machine.run()
                results = [
                    place.view(rows, -1) for name, place in sorted(lane.machine.arrays.items()) if name not in _INPUTS
                ]
                found += torch.cat(results, dim=1).cpu()
            self._give(rows, [lane])
        return all(torch.equal(found[0], row) for row in found)

    def _run_tiles(self, arrays: Mapping[str, Tensor], start: int, stop: int, rows: int) -> int:
        """Compute tiles of one size and return where they end; lanes take turns."""
        lanes: list[Lane] = []
        try:
            count = LANES if self.device.type == "cuda" and stop - start > rows else 1
            while len(lanes) < count:
                lanes.append(self._take(rows))
            turn = cycle(lanes)
            with torch.inference_mode():
                for first in range(start, stop, rows):
                    next(turn).start(arrays, first, min(stop, first + rows), self.shared)
                for lane in lanes:
                    lane.finish()
        except BaseException:
            # What its lanes were doing is of no use, nor is it known how far they came.
            for lane in lanes:
                lane.drop()
            raise
        self._give(rows, lanes)
        return stop

    def _take(self, rows: int) -> Lane:
        """A lane that nobody uses."""
        with self._lock:
            idle = self._idle.setdefault(rows, [])
            if idle:
                return idle.pop()
        with torch.inference_mode():
            return Lane(Machine(self.plan.program, self.dtype, self.device, rows))

    def _give(self, rows: int, lanes: list[Lane]) -> None:
        """Lanes to be used again, unless their tiles are too large by now."""
        with self._lock:
            if rows in self.ladder:
                self._idle.setdefault(rows, []).extend(lanes)

    def _halve(self, rows: int) -> None:
        """Give memory back and go on with smaller tiles."""
        with self._lock:
            self._idle.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if rows in self.ladder:  # else another thread was first
                smaller = {row for row in self.ladder if row < rows}
                self.ladder = tuple(sorted({*smaller, rows // 2}))


class Lane:
    """A machine, and how a tile gets in and out.

    Inputs and results that are in the computer's memory go to and from a GPU by way of pinned buffers, so that the
    copies run beside the computing; what is on the device is copied there.

    Args:
        machine: What computes.
        is_staged: Whether buffers are used for what is in the computer's memory; by default on a GPU.
    """

    def __init__(self, machine: Machine, is_staged: bool | None = None) -> None:
        """Make the stream; buffers come when they are needed."""
        self.machine = machine
        is_cuda = machine.device.type == "cuda"
        self._is_staged = is_cuda if is_staged is None else is_staged
        self._is_pinned = is_cuda
        self._stream = torch.cuda.Stream(machine.device) if is_cuda else None
        self._buffers: dict[str, Tensor] = {}
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def start(self, arrays: Mapping[str, Tensor], start: int, stop: int, shared: frozenset[str]) -> None:
        """Begin with a tile: copy it in, run, and begin to copy it out; the tile before it is finished first."""
        self.finish()
        count, rows = stop - start, self.machine.rows
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.machine.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for name, place in self.machine.arrays.items():
                if name in shared:
                    self._copy_in(name, place, arrays[name].reshape(-1))
                elif name in _INPUTS:
                    here = place.view(rows, -1)
                    self._copy_in(name, here[:count], arrays[name][start:stop].reshape(count, -1))
                    here[count:].zero_()
            self.machine.run()
            for name, place in self.machine.arrays.items():
                if name not in _INPUTS:
                    wanted = arrays[name][start:stop]
                    self._copy_out(name, wanted, place.view(rows, *wanted.shape[1:])[:count])

    def finish(self) -> None:
        """Have the results where they belong; later work of the calling thread's stream comes after them."""
        if self._stream is None:
            pass
        elif self._buffers:  # which nobody may write to or read from before
            self._stream.synchronize()
        else:
            torch.cuda.current_stream(self.machine.device).wait_stream(self._stream)
        for wanted, buffer in self._waiting:
            wanted.copy_(buffer)
        self._waiting.clear()

    def drop(self) -> None:
        """Wait for what runs and forget its results."""
        self._waiting.clear()
        if self._stream is not None:
            self._stream.synchronize()

    def _copy_in(self, name: str, place: Tensor, given: Tensor) -> None:
        """An input to its place."""
        if self._is_staged and given.device.type == "cpu":
            given = self._buffer(name, given.numel()).view(given.shape).copy_(given)
        place.copy_(given, non_blocking=True)

    def _copy_out(self, name: str, wanted: Tensor, found: Tensor) -> None:
        """A result to where it is wanted, or to a buffer on the way there."""
        if self._is_staged and wanted.device.type == "cpu":
            buffer = self._buffer(name, found.numel()).view(found.shape)
            buffer.copy_(found, non_blocking=True)
            self._waiting.append((wanted, buffer))
        else:
            wanted.copy_(found, non_blocking=True)

    def _buffer(self, name: str, count: int) -> Tensor:
        """Memory of the computer for an input or result, which a tile never needs more of than its own size."""
        if name not in self._buffers:
            size = self.machine.arrays[name].numel()
            self._buffers[name] = torch.empty(size, dtype=self.machine.dtype, pin_memory=self._is_pinned)
        return self._buffers[name][:count]


Runner = NativeRunner | TorchRunner


def _shared(ask: Ask) -> frozenset[str]:
    """The inputs that are the same for all rows."""
    given = {"weights": ask.weights, "directions": ask.directions}
    return frozenset(name for name, how in given.items() if how == "shared")
