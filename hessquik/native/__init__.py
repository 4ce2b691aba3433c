"""The CPU machine: runs a program by one call of a compiled kernel.

The library is built when the package is installed, where there is a C compiler; without it
:mod:`hessquik.machine` does the same with torch. A row's arithmetic is the same wherever it stands and whatever
stands beside it, so its bits are, too.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Mapping
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from hessquik.activations import (
    antiTanhActivation,
    quadraticActivation,
    sigmoidActivation,
    softplusActivation,
    tanhActivation,
)
from hessquik.memory import Arena
from hessquik.program import Program, Step, View

__all__ = ["Native", "Packed", "is_available", "vector_bytes"]

_OPERATIONS = ("multiply", "activate", "scale", "sum_products", "contract", "congruence")
_ACTIVATIONS = (tanhActivation, antiTanhActivation, sigmoidActivation, softplusActivation, quadraticActivation)
_WORKSPACE, _CONSTANT = 0, 1
#: What steps and calls mean, as in native.c: a kernel built from other sources would compute other numbers.
_REVISION = 3
#: Vectors per panel of a packed matrix, as in native.c.
_PANEL_VECTORS = 2


class _Operand(Structure):
    _fields_ = [(name, c_int64) for name in ("base", "offset", "column", "row", "outer", "inner", "column_step")]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("op", "kind", "outer", "inner", "width", "depth", "is_followed")),
        ("alpha", c_double),
        ("beta", c_double),
        ("operand", _Operand * 5),
    ]


class _Call(Structure):
    _fields_ = [
        ("once", POINTER(_Step)),
        ("onces", c_int64),
        ("step", POINTER(_Step)),
        ("steps", c_int64),
        ("bases", POINTER(c_void_p)),
        ("scratch", c_void_p),
        ("first", c_int64),
        ("stop", c_int64),
        ("tile_rows", c_int64),
        ("zeroed", c_int64),
    ]


def _library() -> ctypes.CDLL | None:
    """The compiled kernel, if it was built, and from these sources."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            revision = library.hessquik_revision() if hasattr(library, "hessquik_revision") else 1
            if revision == _REVISION:
                return library
            warnings.warn(
                f"expected a CPU kernel of revision {_REVISION}, got {revision}, which is not used; install again",
                RuntimeWarning,
                stacklevel=2,
            )
    return None


_LIBRARY = _library()
_memory = threading.local()


def is_available(program: Program | None = None) -> bool:
    """Whether the kernel was built and knows every activation of the program."""
    return _LIBRARY is not None and all(
        step.activation is None or type(step.activation) in _ACTIVATIONS
        for step in (() if program is None else program.steps)
    )


def vector_bytes() -> int:
    """Width of this machine's vectors."""
    assert _LIBRARY is not None
    return int(_LIBRARY.hessquik_vector_bytes())


class Packed:
    """Matrices in the kernel's layout, so that the programs of a network share them."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._arena = Arena()
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def pack(self, matrix: Tensor, panel: int) -> Tensor:
        """A matrix as panels of some columns each, padded with zeros."""
        # A matrix that is kept here keeps its address to itself.
        key = (matrix.data_ptr(), *matrix.shape, *matrix.stride(), panel)
        if key not in self._known:
            depth, columns = matrix.shape
            panels = -(-columns // panel)
            padded = torch.zeros(depth, panels * panel, dtype=matrix.dtype)
            padded[:, :columns] = matrix
            layout = self._arena.empty((panels, depth, panel), matrix.dtype)
            self._known[key] = matrix, layout.copy_(padded.view(depth, panels, panel).transpose(0, 1))
        return self._known[key][1]


class Native:
    """A program made ready for the kernel.

    Args:
        program: The program.
        dtype: Of all numbers.
        tile_rows: Rows of a tile.
        packed: Matrices in the kernel's layout, shared by the programs of a network.
        width: Bytes of the vectors; the machine's widest if not given.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype,
        tile_rows: int,
        packed: Packed,
        width: int | None = None,
    ) -> None:
        """Translate the steps."""
        assert _LIBRARY is not None
        self.program = program
        self.dtype = dtype
        self.tile_rows = tile_rows
        self.vector_bytes = width or vector_bytes()
        self._packed = packed
        self._kept: list[Tensor] = []
        self._arrays: list[str] = []
        self._once = (_Step * len(program.once))(*map(self._step, program.once))
        self._steps = (_Step * len(program.steps))(*map(self._step, program.steps))
        for place, step in enumerate(program.steps):
            if step.follows:
                self._steps[place - 1].is_followed = 1
        self._places = c_void_p * (2 + len(self._arrays))
        self._kind = c_int64(dtype == torch.float64), c_int64(self.vector_bytes)

    def run(self, arrays: Mapping[str, Tensor], rows: int, first: int = 0) -> None:
        """Compute ``rows`` rows from ``first`` on.

        Args:
            arrays: Contiguous inputs and results by name; an input of one row serves all rows.
            rows: How many.
            first: The first of them.
        """
        assert _LIBRARY is not None
        tile_rows = min(self.tile_rows, rows)
        size = self.program.workspace * tile_rows
        start = self._workspace(size + self.program.scratch)
        bases = self._places(start, None, *[arrays[name].data_ptr() for name in self._arrays])
        call = _Call(
            self._once, len(self._once), self._steps, len(self._steps), bases, start + size * self.dtype.itemsize,
            first, first + rows, tile_rows, self.program.zeroed * tile_rows,
        )  # fmt: skip
        _LIBRARY.hessquik_run(byref(call), *self._kind)

    def _step(self, step: Step) -> _Step:
        """A step as the kernel reads it."""
        name, out = step.operation, step.out
        a, b = step.inputs[:2]
        assert a is not None
        coded = _Step(op=_OPERATIONS.index(name), alpha=step.alpha, outer=out.shape[0], inner=out.shape[1])
        coded.width = out.shape[2]
        views: tuple[View | None, ...] = (out, *step.inputs)
        if name == "multiply":
            assert b is not None
            coded.inner, coded.depth = a.shape[1], b.shape[1]
        elif name == "activate":
            views = (a, out, *step.inputs[1:])
            assert step.activation is not None
            coded.kind = _ACTIVATIONS.index(type(step.activation))
            coded.alpha = getattr(step.activation, "beta", 1.0)
            coded.beta = getattr(step.activation, "threshold", 0.0)
        elif name == "sum_products":
            coded.inner = a.shape[1]
        elif name == "contract":
            assert b is not None
            coded.outer, coded.inner, coded.depth = a.shape[1], b.shape[1], self._padded(a.shape[2])
        elif name == "congruence":
            assert b is not None
            coded.outer, coded.inner, coded.depth = b.shape[1], a.shape[1], self._padded(a.shape[2])
        for place in range(5):
            view = views[place] if place < len(views) else None
            is_matrix = name == "multiply" and place == 2
            coded.operand[place] = self._operand(view, is_matrix, out.shape[1])
        if not step.is_read:
            coded.operand[views.index(out)].base = -1
        return coded

    def _padded(self, columns: int) -> int:
        """Columns with their padding, which is zero where sums run over it."""
        lanes = self.vector_bytes // self.dtype.itemsize
        return -(-columns // lanes) * lanes

    def _operand(self, view: View | None, is_matrix: bool, inner: int) -> _Operand:
        """Where an array lies; one inner entry serves all."""
        if view is None:
            return _Operand(base=-1)
        buffer = view.buffer
        panel = _PANEL_VECTORS * self.vector_bytes // self.dtype.itemsize
        operand = _Operand(
            column=view.column, row=view.row_stride, outer=view.strides[0], column_step=view.strides[2]
        )
        operand.inner = 0 if view.shape[1] == 1 and inner > 1 and not is_matrix else view.strides[1]
        if is_matrix:
            operand.outer = panel
        if buffer.data is None:
            if buffer.base == "workspace":
                operand.base = _WORKSPACE
            else:
                if buffer.base not in self._arrays:
                    self._arrays.append(buffer.base)
                operand.base = 2 + self._arrays.index(buffer.base)
            operand.offset = buffer.offset
            return operand
        matrix = view.constant
        assert matrix is not None
        data = self._packed.pack(matrix, panel) if is_matrix else buffer.data
        if is_matrix:
            operand.outer, operand.inner, operand.column_step, operand.column = view.shape[1] * panel, panel, 1, 0
        self._kept.append(data)
        operand.base, operand.offset = _CONSTANT, data.data_ptr() // self.dtype.itemsize
        return operand

    def _workspace(self, count: int) -> int:
        """Address of the calling thread's memory for ``count`` numbers and a vector more, which loads may touch."""
        needed = count * self.dtype.itemsize + 1024
        size, start, _ = getattr(_memory, "workspace", (0, 0, None))
        if size < needed:
            memory = torch.zeros(needed, dtype=torch.uint8)
            start = memory.data_ptr()
            _memory.workspace = needed, start, memory
        return start
