"""Translation of programs to the C kernel's structures: one for each step, with addresses and strides of views."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import Structure
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor

from hessquik.backends.cpu.packing import Packed, pack_matrix, pad_columns
from hessquik.backends.cpu.structures import CONSTANTS, make
from hessquik.steps import Congruence, Contract, Map, Product, Program, Step, SumProducts
from hessquik.strided import Space, View

__all__ = ["Translation"]

#: Period of a product whose scaling and addends have no jump between rows.
_NO_PERIOD = 2**31 - 1
#: From this number of outputs on, a congruence computes all outputs of a pair of tangents at once, which is faster.
OUTPUTS_BY_PAIRS = 8


class Translation:
    """A program in the kernel's structures.

    Args:
        program: The program.
        dtype: Dtype of all arrays.
        tile_rows: Rows of a tile.
        vector_bytes: Bytes of one SIMD vector.
        packed: The packed weights of the network, if its programs share them.

    Attributes:
        arrays: Names of the inputs and outputs, in the order in which a call gives their addresses.
        address: Address of the C structure of the program; valid as long as this object lives.
        packed_bytes: Bytes of the constants, which other programs may share.
    """

    def __init__(
        self, program: Program, dtype: torch.dtype, tile_rows: int, vector_bytes: int, packed: Packed | None = None
    ) -> None:
        """Translate every step."""
        self._packed = packed
        self._program = program
        self._dtype = dtype
        self._vector_bytes = vector_bytes
        self._lanes = vector_bytes // dtype.itemsize
        self._kept: list[Any] = []
        self._scratch = 0
        self.arrays: list[str] = []
        once, steps = (self._pointers(self._step(step) for step in part) for part in (program.once, program.steps))
        self._structure = make(
            "Program",
            is_double=dtype == torch.float64,
            vector_bytes=vector_bytes,
            tile_rows=tile_rows,
            tile_size=program.tile_size,
            shared_size=program.shared_size,
            scratch=self._scratch + 4096,
            arrays=len(self.arrays),
            onces=len(program.once),
            once=once,
            steps=len(program.steps),
            step=steps,
        )
        self.address = ctypes.addressof(self._structure)
        self.packed_bytes = sum({id(t): t.nbytes for t in self._kept if isinstance(t, Tensor)}.values())

    # ---- Arrays ----

    def _pointers(self, structures: Iterable[Structure]) -> int:
        """Return the address of an array of the structures' addresses."""
        found = list(structures)
        pointers = (ctypes.c_void_p * len(found))(*map(ctypes.addressof, found))
        self._kept += [found, pointers]
        return ctypes.addressof(pointers)

    def _list(self, name: str, structures: list[Any]) -> int:
        """Return the address of an array of structures."""
        array = (type(make(name)) * len(structures))(*structures)
        self._kept.append(array)
        return ctypes.addressof(array)

    def _whole(self, columns: int) -> int:
        """Return a number of columns rounded up to whole vectors."""
        return -(-columns // self._lanes) * self._lanes

    def _read(self, view: View | None, width: int = 0) -> Any:
        """Return the structure of a view that is read up to column ``width``, or of an absent array for ``None``."""
        if view is None:
            return make("Array", space=CONSTANTS["ABSENT"])
        if view.buffer.data is not None:
            return self._constant(view, width)
        outer, inner, column = view.strides
        array = make(
            "Array",
            space=CONSTANTS[view.buffer.space.name if view.buffer.space in _INSIDE else "EXTERNAL"],
            start=view.offset,
            row=view.buffer.row_stride,
            outer=outer,
            inner=inner,
            column=1 if view.shape[2] == 1 else column,
        )
        if view.buffer.space in _INSIDE:
            array.base = view.buffer.offset
        else:
            if view.buffer.name not in self.arrays:
                self.arrays.append(view.buffer.name)
            array.external = self.arrays.index(view.buffer.name)
        # Tile memory can be read past the end of an array; a caller's array may end with its last column.
        array.is_whole = array.column == 1 and (view.buffer.space in _INSIDE or width <= view.shape[2])
        return array

    def _constant(self, view: View, width: int) -> Any:
        """Return the structure of a dense copy of a constant, zero-padded to ``width``; strides of 0 stay 0."""
        single = [slice(1) if stride == 0 else slice(None) for stride in view.strides[:2]]
        columns = max(width, view.shape[2])
        data = pad_columns(view.constants[(*single, slice(None))], self._dtype, self._whole(columns), self._packed)
        self._kept.append(data)
        outer, inner = (0 if data.shape[axis] == 1 else data.stride(axis) for axis in (0, 1))
        return make(
            "Array",
            space=CONSTANTS["CONSTANT"],
            address=data.data_ptr(),
            outer=outer,
            inner=inner,
            column=1,
            is_whole=True,
        )

    def _write(self, view: View | None, width: int = 0) -> Any:
        """Return the structure of a view that is written up to ``width`` in whole vectors, including its padding."""
        array = self._read(view, width)
        if view is not None:
            columns, padding = view.shape[2], self._program.padding(view)
            array.is_whole = array.column == 1 and width - columns <= padding
            array.zeros_at = width if array.is_whole else columns
            array.zeros = max(columns + padding - array.zeros_at, 0) if padding else 0
        return array

    # ---- Steps ----

    def _step(self, step: Step) -> Structure:
        structure: Structure = _RULES[type(step)](self, step)
        self._kept.append(structure)
        return structure

    def _needs(self, size: int) -> None:
        """Reserve at least ``size`` bytes of scratch memory."""
        self._scratch = max(self._scratch, size)

    def _product(self, step: Product) -> Structure:
        contraction = self._as_contraction(step)
        if contraction is not None:
            return self._contract(contraction)
        a, b, out, scaling = step.a, step.b, step.out, step.scaling
        outer, inner, depth = a.shape
        columns = b.shape[2]
        width, panel = self._whole(columns), CONSTANTS["NV"] * self._lanes
        structure = make(
            "Product", kind=CONSTANTS["PRODUCT"], outer=outer, inner=inner, depth=depth, columns=columns, panel=panel
        )
        if b.buffer.data is not None:
            data = pack_matrix(b.constants[0], self._dtype, panel, self._packed)
            self._kept.append(data)
            structure.panel = depth * panel
            structure.b = make("Array", space=CONSTANTS["CONSTANT"], address=data.data_ptr(), inner=panel, column=1)
        else:
            structure.b = self._read(b, width)
            if b.buffer.space not in _INSIDE or structure.b.column != 1:
                structure.packs, structure.panel = True, depth * panel
                self._needs(-(-columns // panel) * depth * panel * self._dtype.itemsize)
        beside = (step.add, *((scaling.out, scaling.by, scaling.add, scaling.add_by) if scaling else ()))
        matrices = [view for view in (a, out) if view is not None]
        is_b_shared = b.buffer.row_stride == 0
        structure.is_merged = is_b_shared and (outer == 1 or b.strides[0] == 0) and all(map(_is_even, matrices))
        structure.period = inner
        if not structure.is_merged or all(view is None or _is_even(view) for view in beside):
            structure.period = _NO_PERIOD
        names = {"a": a, "add": step.add}
        if scaling is not None:
            structure.alpha = scaling.alpha
            names |= {"by": scaling.by, "term": scaling.add, "term_by": scaling.add_by}
        around = [view for view in (*beside, out) if view is not None]
        structure.is_plain = all(_has_plain_columns(view) for view in around)
        # If the columns of any array are not adjacent, all arrays are written number by number.
        write = self._write if structure.is_plain else self._numbers
        structure.out = write(out, width)
        structure.scaled = write(scaling.out if scaling else None, width)
        for name, view in names.items():
            setattr(structure, name, self._read(view, width))
        if structure.is_merged and inner == 1:
            for name in (*names, "out", "scaled"):
                array = getattr(structure, name)
                array.inner = array.row
        return structure  # type: ignore[no-any-return]

    def _map(self, step: Map) -> Structure:
        outer, inner, columns = step.shape
        views = [*step.inputs, *(view for _, view in step.outputs)]
        width = self._whole(columns)
        padded = -(-columns // self._program.vector) * self._program.vector
        if padded % self._lanes == 0 and all(_is_run(view, padded) for view in views):
            width = padded
        inputs, outputs = len(step.inputs), step.outputs
        numbers = sorted({x for instruction in step.instructions for x in instruction.inputs if isinstance(x, float)})
        results = inputs + len(numbers)
        # The kernel numbers registers: inputs, then constants, then results.
        number = {register: register if register < inputs else register + len(numbers) for register in range(
            inputs + len(step.instructions))}  # fmt: skip
        operands = [
            [inputs + numbers.index(x) if isinstance(x, float) else number[x] for x in instruction.inputs]
            for instruction in step.instructions
        ]
        last_use = {register: i for i, read in enumerate(operands) for register in read}
        last_use |= {number[register]: len(operands) for register, _ in outputs}
        slots, used = self._slots(operands, last_use, inputs, results)
        read = [self._read(view, width) for view in step.inputs]
        written = [self._write(view, width) for _, view in outputs]
        direct: set[int] = set()
        flags: list[bool] = []
        for (register, view), array in zip(outputs, written, strict=True):
            place = number[register]
            overwritten = [i for i, other in enumerate(step.inputs) if other.buffer is view.buffer]
            for i in overwritten:
                if last_use.get(i, -1) == len(operands):  # kept as it was: read it before anything is written
                    read[i].is_whole = False
            is_free = all(last_use.get(i, -1) <= place - results for i in overwritten)
            flags.append(
                place >= results and place not in direct and array.is_whole and array.column == 1 and is_free
            )
            if flags[-1]:
                direct.add(place)
        pointers = 3 * len(views) + results + len(operands)
        self._needs(used * CONSTANTS["CHUNK_BYTES"] + len(numbers) * self._vector_bytes + 2 * 8 * pointers)
        constants = (ctypes.c_double * len(numbers))(*numbers)
        self._kept.append(constants)
        return make(  # type: ignore[no-any-return]
            "Map",
            kind=CONSTANTS["MAP"],
            outer=outer,
            inner=inner,
            columns=columns,
            width=width,
            slots=used,
            inputs=inputs,
            input=self._list(
                "Input",
                [
                    make("Input", array=array, slot=slot, is_run=_is_run(view, width))
                    for array, slot, view in zip(read, count(), step.inputs, strict=False)
                ],
            ),
            constants=len(numbers),
            constant=ctypes.addressof(constants),
            instructions=len(operands),
            instruction=self._list(
                "Instruction",
                [
                    make(
                        "Instruction",
                        op=CONSTANTS[instruction.op],
                        slot=slot,
                        **dict(zip("abc", read_, strict=False)),
                    )
                    for instruction, slot, read_ in zip(step.instructions, slots, operands, strict=True)
                ],
            ),
            outputs=len(outputs),
            output=self._list(
                "Output",
                [
                    make("Output", array=array, value=number[register], is_run=_is_run(view, width), is_direct=flag)
                    for (register, view), array, flag in zip(outputs, written, flags, strict=True)
                ],
            ),
        )

    @staticmethod
    def _slots(
        operands: list[list[int]], last_use: dict[int, int], inputs: int, results: int
    ) -> tuple[list[int], int]:
        """Allocate a slot to every result, reused after its last use; return the slots and their number."""
        free: list[int] = []
        found: list[int] = []
        used = inputs
        for i, read in enumerate(operands):
            if not free:
                free.append(used)
                used += 1
            found.append(free.pop())
            for register in {*read, results + i}:
                if register >= results and last_use.get(register, i) == i:
                    free.append(found[register - results])
        return found, used

    def _sum_products(self, step: SumProducts) -> Structure:
        outer, inner, columns = step.a.shape
        width = self._whole(columns)
        a, b = (self._reduced(view) for view in (step.a, step.b))
        return make(  # type: ignore[no-any-return]
            "SumProducts", kind=CONSTANTS["SUM_PRODUCTS"], a=a, b=b, out=self._write(step.out, width), outer=outer,
            inner=inner, columns=columns,
        )  # fmt: skip

    def _as_contraction(self, step: Product) -> Contract | None:
        """Return the contraction that equals a product with a constant of a single column, or ``None``."""
        a, b = step.a, step.b
        is_single = a.shape[0] == 1 and b.shape[2] == 1 and b.buffer.data is not None
        if not is_single or step.out is None or step.add is not None or step.scaling is not None:
            return None
        is_dense = a.buffer.space in _INSIDE and (a.shape[2] == 1 or a.strides[2] == 1)
        if not is_dense or a.shape[2] + self._program.padding(a) < self._whole(a.shape[2]):
            return None
        return Contract(a, b.permuted((0, 2, 1)), step.out)

    def _contract(self, step: Contract) -> Structure:
        a, b, out = self._reduced(step.a), self._reduced(step.b), self._numbers(step.out)
        is_merged = step.b.buffer.row_stride == 0 and _is_even(step.a) and _is_even(step.out)
        if is_merged and step.a.shape[1] == 1:
            a.inner, out.inner = a.row, out.row
        return make(  # type: ignore[no-any-return]
            "Contract", kind=CONSTANTS["CONTRACT"], a=a, b=b, out=out, left=step.a.shape[1], right=step.b.shape[1],
            columns=self._whole(step.a.shape[2]), is_merged=is_merged,
        )  # fmt: skip

    def _congruence(self, step: Congruence) -> Structure:
        tangents, outputs, columns = step.a.shape[1], step.b.shape[1], self._whole(step.a.shape[2])
        by_pairs = outputs >= OUTPUTS_BY_PAIRS and step.out.strides[2] == 1
        panel = CONSTANTS["NV"] * self._lanes
        rows = max(CONSTANTS["BLOCK"], CONSTANTS["PAIRS"] + -(-outputs // panel) * panel)
        self._needs(rows * columns * self._dtype.itemsize)
        out = self._write(step.out, self._whole(outputs)) if by_pairs else self._numbers(step.out)
        return make(  # type: ignore[no-any-return]
            "Congruence", kind=CONSTANTS["CONGRUENCE"], a=self._reduced(step.a), b=self._reduced(step.b), out=out,
            tangents=tangents, outputs=outputs, columns=columns, by_pairs=by_pairs,
        )  # fmt: skip

    def _reduced(self, view: View | None) -> Any:
        """Return the structure of a view that is read in whole vectors, its columns padded with zeros."""
        is_dense = view is None or view.shape[2] == 1 or view.strides[2] == 1 or view.buffer.data is not None
        if view is not None and (not is_dense or view.buffer.space in {Space.INPUT, Space.OUTPUT}):
            raise ValueError(f"sums over columns need an array of the tile with neighbouring columns, got {view}")
        return self._read(view, 0 if view is None else self._whole(view.shape[2]))

    def _numbers(self, view: View | None, width: int = 0) -> Any:
        """Return the structure of a view that is written one number at a time, followed by its padding."""
        array = self._write(view, 0 if view is None else view.shape[2])
        array.is_whole = False
        return array


_INSIDE = frozenset({Space.TILE, Space.SHARED})
_RULES: dict[type, Any] = {
    Product: Translation._product,
    Map: Translation._map,
    SumProducts: Translation._sum_products,
    Contract: Translation._contract,
    Congruence: Translation._congruence,
}


def _is_even(view: View) -> bool:
    """Return whether the inner axis goes on from one row to the next at the same stride."""
    return view.shape[1] == 1 or view.buffer.row_stride == view.shape[1] * view.strides[1]


def _has_plain_columns(view: View) -> bool:
    """Return whether columns are adjacent in memory; those of a constant are, since it is copied densely."""
    return view.shape[2] == 1 or view.strides[2] == 1 or view.buffer.data is not None


def _is_run(view: View, width: int) -> bool:
    """Return whether the entries of all rows have the constant distance ``width`` in memory."""
    extents = view.shape[:2]
    strides = (view.buffer.row_stride, *(s for e, s in zip(extents, view.strides[:2], strict=True) if e > 1))
    inside = (prod(extents), *(prod(extents[i + 1 :]) for i, e in enumerate(extents) if e > 1))
    return all(stride == entries * width for stride, entries in zip(strides, inside, strict=True))
