"""The Triton backend: a program runs in one launch for any number of rows, on one of two kernels.

* The table kernel interprets any program. It is compiled once per dtype and processor generation, in 10 to 15
  seconds, when the first network is loaded or before (``python -m hessquik.backends.gpu_compile 90``).
* A plan kernel is generated for one program and runs in about half the time. :func:`ready_programs` compiles the
  kernels of the programs that it is given in parallel, in 5 to 10 seconds each, when a network is loaded.

Triton keeps both in its cache on disk. Both round each product and each sum, in a fixed order, so a row's bits do not
depend on the size of a tile. The last bits of the two kernels may differ, so the kernel of each plan is chosen when a
network is loaded, and no request compiles anything.

With ``TRITON_INTERPRET=1`` Triton interprets the same source on the CPU, slowly, for tests.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from hessquik.backends import gpu_driver
from hessquik.backends.gpu_compile import BLOCKS, compile_ahead, compile_kernel, compile_unrolled
from hessquik.backends.gpu_kernel import run_table
from hessquik.backends.gpu_stream import per_device, retried, stages_of
from hessquik.backends.gpu_table import CALL_ARRAYS, LARGEST_ROW_NUMBERS, Table
from hessquik.backends.gpu_unrolled import Unrolled, Unrolling, define_kernel, source
from hessquik.steps import Map, Product, Program, Step, SumProducts
from hessquik.strided import View

__all__ = [
    "UNROLLINGS",
    "TritonProgram",
    "UnrolledProgram",
    "fits",
    "is_available",
    "is_interpreted",
    "ready_programs",
    "unrolling",
]

#: Oldest compute capability that is supported: 8.0 (A100).
OLDEST = (8, 0)
#: Most rows of a tile, and most entries of one array of a tile: the kernel's index arithmetic is exact below it.
MOST_TILE_ROWS, MOST_ENTRIES = 32, 1 << 20
#: Most bytes of the memory of all instances together.
MEMORY_BYTES = 512 << 20
BASES_BYTES, ALIGNMENT = 256, 128


#: Tiles of plan kernels, chosen by measuring on an H200.
UNROLLINGS = {torch.float32: Unrolling(rows=16, instances=4), torch.float64: Unrolling(rows=16, instances=2)}
#: Compute capability from which on Triton computes products in float64 without tensor cores. Blocks of the usual
#: depth would not fit the registers: up to 5 kB of each thread's numbers went to memory.
WITHOUT_FLOAT64_TENSOR_CORES = 100
#: Most passages of a plan kernel; each takes about half a second to compile.
MOST_FORMS = 32


def unrolling(dtype: torch.dtype, arch: int) -> Unrolling:
    """Return the tiles of plan kernels for a compute capability, such as 90."""
    if dtype == torch.float64 and arch >= WITHOUT_FLOAT64_TENSOR_CORES:
        return replace(UNROLLINGS[dtype], depth=16)
    return UNROLLINGS[dtype]


def is_interpreted() -> bool:
    """Return whether Triton interprets the kernel on the host."""
    return not isinstance(run_table, triton.JITFunction)


def is_available(device: torch.device) -> bool:
    """Return whether the kernel runs on a device."""
    if device.type == "cuda":
        return not is_interpreted() and torch.cuda.get_device_capability(device) >= OLDEST
    return device.type == "cpu" and is_interpreted()


class _Device:
    """The state that all programs of one device share: kernels, stages and the constants of networks."""

    def __init__(self, device: torch.device) -> None:
        """Read the device's properties; kernels are compiled when they are first needed."""
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.stages = stages_of(device) if self.is_cuda else None
        self._lock = threading.Lock()
        self._kernels: dict[torch.dtype | str, Any] = {}
        self._constants: weakref.WeakValueDictionary[tuple[Any, ...], Tensor] = weakref.WeakValueDictionary()
        self.processors, self.arch = 2, 0
        if self.is_cuda:
            gpu_driver.use()
            properties = torch.cuda.get_device_properties(device)
            self.processors = properties.multi_processor_count
            self.arch = 10 * properties.major + properties.minor

    def kernel(self, dtype: torch.dtype) -> Any:
        """Return the table kernel for this device, compiled and loaded when it is first asked for."""
        return self._compiled(dtype, lambda: compile_kernel(dtype, self.arch))

    def unrolled(self, kernel: Unrolled) -> Any:
        """Return a plan kernel for this device, compiled and loaded when it is first asked for."""
        return self._compiled(kernel.text, lambda: compile_unrolled(kernel, self.arch))

    def _compiled(self, key: torch.dtype | str, compiled: Callable[[], Any]) -> Any:
        found = self._kernels.get(key)
        if found is None:
            found = compiled()
            retried(lambda: self._load(found), self.free_memory)
            with self._lock:
                found = self._kernels.setdefault(key, found)
        return found

    def _load(self, kernel: Any) -> None:
        """Have Triton load a kernel onto the device now, and not at its first launch."""
        try:
            with torch.cuda.device(self.device):
                kernel[1, 1, 1]
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    def constant(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a constant as a dense tensor on the device, its columns zero-padded to whole vectors of 16 bytes."""
        key = (data.data_ptr(), data.shape, data.stride(), dtype)
        columns = data.shape[2]
        with self._lock:
            found = self._constants.get(key)
            if found is None:
                matrix = data
                for axis, stride in enumerate(data.stride()):
                    if not stride:
                        matrix = matrix.narrow(axis, 0, 1)
                lanes = 16 // dtype.itemsize
                padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[2] % lanes))
                found = padded.to(self.device, dtype, memory_format=torch.contiguous_format).contiguous()
                if found.data_ptr() == data.data_ptr():
                    found = found.clone()
                self._constants[key] = found
        return found if data.stride(2) else found[..., :1].expand(*found.shape[:2], columns)

    def free_memory(self) -> None:
        """Free all memory of the device that is kept for later."""
        if self.stages is not None:
            self.stages.free_memory()


@per_device
def _shared_state(device: torch.device) -> _Device:
    return _Device(device)


class TritonProgram:
    """A program that the Triton kernel runs; threads may share it.

    Args:
        program: The program.
        dtype: ``torch.float32`` or ``torch.float64``, of all numbers.
        device: A CUDA device with its index, or the CPU if Triton interprets.

    Attributes:
        tile_rows: Row counts of the tiles, ascending.

    Raises:
        ValueError: the program has an array that is too large for the kernel's indices.
        torch.OutOfMemoryError: the device's memory does not hold the constants.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        """Write the table, and compile the kernel unless it is compiled already."""
        entries = _most_entries(program)
        if entries > MOST_ENTRIES:
            raise ValueError(f"a step may have {MOST_ENTRIES} entries per row, one has {entries}")
        self._most_rows = max(1, min(MOST_TILE_ROWS, MOST_ENTRIES // entries))
        self._program, self._dtype = program, dtype
        self._state = _shared_state(device)
        self._blocks = BLOCKS[dtype]
        self._keep: list[Tensor] = []
        #: Streams on which the program has run.
        self._streams: set[int] = set()
        self._arrays: Table | Unrolled = retried(self._write, self._state.free_memory)
        self._shared = frozenset(name for name, is_shared in self._arrays.inputs.items() if is_shared)
        self.tile_rows = (1, self._most_rows) if self._most_rows > 1 else (1,)
        self._compile()

    def _compile(self) -> None:
        self._kernel = self._state.kernel(self._dtype) if self._state.is_cuda else run_table
        constants = self._blocks.constants(self._dtype)
        self._constants = tuple(constants[name] for name in run_table.arg_names if name in constants)

    def _placing(self) -> Callable[[View], Tensor]:
        """Return a function that puts a constant on the device in the shape of its view, for as long as this program.

        It does not refer to the program, whose memory is thus freed with the last reference to it.
        """
        state, program, dtype, keep = self._state, self._program, self._dtype, self._keep
        keep.clear()

        def place(view: View) -> Tensor:
            found = state.constant(program.constant(view), dtype)
            keep.append(found)
            shape = found.shape if view.strides[2] == 0 else (*found.shape[:2], view.shape[2])
            return found[..., : shape[2]].expand(view.shape)

        return place

    def _write(self) -> Table:
        table = Table(self._program, self._placing(), 16 // self._dtype.itemsize)
        self._spilled = table.spilled
        self._numbers = torch.tensor(table.numbers, dtype=torch.int64).to(self._state.device)
        return table

    def run(self, arrays: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Compute rows ``start`` to ``stop``; other rows are unchanged.

        Results on the host are complete on return; results on the device are ready for work that the caller queues on
        its current stream afterwards.

        Args:
            arrays: Contiguous inputs and outputs by name, of the program's dtype, on the device or on the host.
            start: The first row.
            stop: The row after the last one.

        Raises:
            torch.OutOfMemoryError: the device's memory does not hold a tile of one row.
        """
        n, state = stop - start, self._state
        if n <= 0:
            return
        used = {name: arrays[name] for name in self._arrays.names}
        if start:
            used = {name: array if name in self._shared else array[start:stop] for name, array in used.items()}
        stages = state.stages
        if stages is None:
            self._launch(used, n)
            return
        with torch.cuda.device(state.device):
            if any(array.is_cpu for array in used.values()):
                outputs = frozenset(self._arrays.outputs)
                retried(lambda: stages.run(used, outputs, self._shared, n, self._launch), state.free_memory)
            else:
                self._launch(used, n)

    def _launch(self, arrays: Mapping[str, Tensor], n: int) -> None:
        """Launch the kernel for the first n rows, on the calling thread's stream."""
        tile_rows, instances = self._shape(n)
        while True:
            size = self._memory(tile_rows)[0]
            try:
                memory = retried(lambda: self._scratch(instances * size), self._state.free_memory)  # noqa: B023
                break
            except torch.OutOfMemoryError:
                if tile_rows == instances == 1:
                    raise
            # Not in the handler: there the exception's traceback keeps objects of the failed attempt alive.
            tile_rows, instances = max(1, tile_rows // 2), max(1, instances // 2)
        addresses = [arrays[name].data_ptr() for name in self._arrays.names]
        self._begin(instances, n, tile_rows, memory.data_ptr(), addresses, self._stream())

    def _stream(self) -> dict[str, int]:
        """Return the calling thread's stream as the kernel takes it.

        After the program is dropped, its memory goes to others once the work on the streams that torch knows is done.
        """
        state = self._state
        if not state.is_cuda:
            return {}
        stream = triton.runtime.driver.active.get_current_stream(state.device.index)
        if stream not in self._streams:
            now = torch.cuda.current_stream(state.device)
            for array in (self._numbers, *self._keep):
                array.record_stream(now)
            self._streams.add(stream)
        return {"stream": stream}

    def _begin(
        self, instances: int, n: int, tile_rows: int, memory: int, addresses: list[int], stream: dict[str, int]
    ) -> None:
        """Start the kernel."""
        addresses += [0] * (CALL_ARRAYS - len(addresses))
        once, steps = len(self._program.once), len(self._program.steps)
        sizes = self._memory(tile_rows)
        given = (self._numbers.data_ptr(), once, steps, n, tile_rows, memory, *sizes, tuple(addresses))
        self._kernel[(instances, 1, 1)](*given, *self._constants, **stream)

    def _shape(self, n: int) -> tuple[int, int]:
        """Return the rows of a tile and the number of instances.

        There is one instance per multiprocessor with tiles of up to 8 rows; for more rows two, with larger tiles.
        """
        processors = self._state.processors
        rows = -(-n // processors)
        if rows > 8:
            rows = max(8, -(-n // (2 * processors)))
        rows = min(rows, self._most_rows)
        while rows > 1 and 2 * processors * self._memory(rows)[0] > MEMORY_BYTES:
            rows //= 2
        tiles = -(-n // rows)
        instances = min(tiles, 2 * processors, max(1, MEMORY_BYTES // self._memory(rows)[0]))
        return rows, instances

    def _memory(self, tile_rows: int) -> tuple[int, int, int]:
        """Return an instance's bytes, and the offsets of SHARED memory and of spilled registers in it."""
        size = self._dtype.itemsize

        def whole(count: int) -> int:
            return -(-count * size // ALIGNMENT) * ALIGNMENT

        shared = BASES_BYTES + whole(self._program.tile_size * tile_rows)
        spilled = shared + whole(self._program.shared_size)
        return spilled + whole(self._spilled * self._blocks.ME), shared, spilled

    def _scratch(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self._state.device)


class UnrolledProgram(TritonProgram):
    """A program that a plan kernel runs, which is generated for this program.

    Args:
        program: The program.
        dtype: ``torch.float32`` or ``torch.float64``, of all numbers.
        device: A CUDA device with its index, or the CPU if Triton interprets.
        sizes: Sizes of its tiles.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device, sizes: Unrolling) -> None:
        """Write the kernel's source, and compile it unless it is compiled already."""
        self._sizes = sizes
        self._source = source(program, dtype.itemsize, sizes)
        super().__init__(program, dtype, device)

    def _write(self) -> Unrolled:  # type: ignore[override]
        self._most_rows, place = self._sizes.rows, self._placing()
        numbers = self._source.table(lambda view: place(view).data_ptr())
        self._numbers = torch.tensor(numbers, dtype=torch.int64).to(self._state.device)
        return self._source

    def _compile(self) -> None:
        self._kernel = self._state.unrolled(self._source) if self._state.is_cuda else define_kernel(self._source.text)

    def _shape(self, n: int) -> tuple[int, int]:
        """Return the rows of a tile and the number of instances."""
        processors = self._state.processors
        rows, instances = -(-n // processors), self._sizes.instances * processors
        if rows > 8:
            rows = max(8, -(-n // instances))
        rows = min(rows, self._most_rows)
        return rows, min(-(-n // rows), instances)

    def _memory(self, tile_rows: int) -> tuple[int, int, int]:
        return self._source.bytes, 0, 0

    def _begin(
        self, instances: int, n: int, tile_rows: int, memory: int, addresses: list[int], stream: dict[str, int]
    ) -> None:
        once, steps = len(self._program.once), len(self._program.steps)
        given = (self._numbers.data_ptr(), once, steps, n, tile_rows, memory, *addresses)
        self._kernel[(instances, 1, 1)](*given, **stream)


def fits(program: Program) -> bool:
    """Return whether the kernels' indices reach every entry of a program's arrays, and a call takes all of these."""
    views = [view for step in (*program.once, *program.steps) for view in (*step.reads(), *step.writes())]
    named = {view.buffer.name for view in views if view.buffer.name}
    is_small = all(view.buffer.size <= LARGEST_ROW_NUMBERS for view in views)
    return is_small and len(named) <= CALL_ARRAYS and _most_entries(program) <= MOST_ENTRIES


def ready_programs(programs: Sequence[Program], dtype: torch.dtype, device: torch.device) -> list[TritonProgram]:
    """Return programs ready to run, each on a plan kernel, or on the table kernel if that would be too large.

    The plan kernels and the table kernels of both dtypes are compiled side by side.

    Args:
        programs: The programs.
        dtype: ``torch.float32`` or ``torch.float64``, of all numbers.
        device: A CUDA device with its index, or the CPU if Triton interprets.
    """
    state = _shared_state(device)
    sizes = unrolling(dtype, state.arch)
    kernels = [_fitting(program, dtype, sizes, state) for program in programs]
    if state.is_cuda:
        compile_ahead([*BLOCKS, *(kernel for kernel in kernels if kernel is not None)], state.arch)
        for each in BLOCKS:
            state.kernel(each)
    return [
        TritonProgram(program, dtype, device) if kernel is None else UnrolledProgram(program, dtype, device, sizes)
        for program, kernel in zip(programs, kernels, strict=True)
    ]


def _fitting(program: Program, dtype: torch.dtype, sizes: Unrolling, state: _Device) -> Unrolled | None:
    """Return a program's plan kernel, or ``None`` if its indices, memory or number of passages exceed a limit."""
    if sizes.rows * _most_entries(program) > MOST_ENTRIES:
        return None
    kernel = source(program, dtype.itemsize, sizes)
    is_small = sizes.instances * state.processors * kernel.bytes <= MEMORY_BYTES
    return kernel if is_small and kernel.forms <= MOST_FORMS else None


def _most_entries(program: Program) -> int:
    """Return the most entries per row that the index of a step of a program runs over."""
    return max((_entries(step) for step in (*program.once, *program.steps)), default=1)


def _entries(step: Step) -> int:
    """Return the number of entries per row that a step's index runs over, at most."""
    if isinstance(step, Product):
        return prod(step.a.shape[:2])
    if isinstance(step, (Map, SumProducts)):
        outer, inner, columns = next(step.writes()).shape
        return outer * inner * (columns + 16)
    return 1
