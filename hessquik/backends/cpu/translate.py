"""Translation of programs to the C kernel's structures: one for each step, with places and strides of views."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessquik.backends.cpu.packing import Packed, pack_matrix, pad_columns
from hessquik.backends.cpu.structures import CONSTANTS, Fields, pack, pack_sized
from hessquik.steps import Congruence, Contract, Map, Product, Program, Step, SumProducts
from hessquik.strided import Space, View

__all__ = ["Translation"]

#: Period of a product whose scaling and addends have no jump between rows.
_NO_PERIOD = 2**31 - 1
#: From this number of outputs on, a congruence computes all outputs of a pair of tangents at once, which is faster.
OUTPUTS_BY_PAIRS = 8


class _Constant(NamedTuple):
    """How a constant is packed.

    Attributes:
        view: Its entries.
        width: Columns of a panel of a matrix, or to which the columns of another array are padded.
        is_matrix: Whether it is a matrix that is packed in panels.
    """

    view: View
    width: int
    is_matrix: bool


class Translation:
    """The steps of a program in the kernel's structures, whatever the constants.

    Args:
        program: The program.
        dtype: Dtype of all arrays.
        tile_rows: Rows of a tile.
        vector_bytes: Bytes of one SIMD vector.

    Attributes:
        arrays: Names of the inputs and outputs, in the order in which a call gives their addresses.
        words: The steps.
    """

    def __init__(self, program: Program, dtype: torch.dtype, tile_rows: int, vector_bytes: int) -> None:
        """Translate every step."""
        self._program = replace(program, constants=())  # which are not to be kept
        self._dtype = dtype
        self._vector_bytes = vector_bytes
        self._lanes = vector_bytes // dtype.itemsize
        self._constants: list[_Constant] = []
        self._scratch = 0
        self._clears: list[Fields] = []
        self.arrays: list[str] = []
        once, steps = ([part for step in half for part in self._step(step)] for half in (program.once, program.steps))
        fields = {
            "is_double": dtype == torch.float64,
            "vector_bytes": vector_bytes,
            "tile_rows": tile_rows,
            "tile_size": program.tile_size,
            "shared_size": program.shared_size,
            "scratch": self._scratch + 4096,
            "constants": len(self._constants),
            "arrays": len(self.arrays),
            "onces": len(once),
            "steps": len(steps),
        }
        self.words = pack_sized("Program", fields, (*once, *steps))

    def packed(self, program: Program, packed: Packed | None = None) -> list[Tensor]:
        """Return the constants of a program with these steps as the kernel reads them.

        Args:
            program: The program.
            packed: The packed weights of the network, if its programs share them.
        """
        return [
            pack_matrix(program.constant(view)[0], self._dtype, width, packed)
            if is_matrix
            else pad_columns(program.constant(view), self._dtype, width, packed)
            for view, width, is_matrix in self._constants
        ]

    # ---- Arrays ----

    def _whole(self, columns: int) -> int:
        """Return a number of columns rounded up to whole vectors."""
        return -(-columns // self._lanes) * self._lanes

    def _read(self, view: View | None, width: int = 0) -> Fields:
        """Return the fields of a view that is read up to column ``width``, or of an absent array for ``None``."""
        if view is None:
            return {}
        buffer = view.buffer
        if buffer.space is Space.CONSTANT:
            return self._constant(view, width)
        outer, inner, column = view.strides
        is_dense = view.shape[2] == 1 or column == 1
        array = {
            "start": view.offset,
            "row": buffer.row_stride,
            "outer": outer,
            "inner": inner,
            "column": 1 if is_dense else column,
            # Tile memory can be read past the end of an array; a caller's array may end with its last column.
            "is_whole": is_dense and (buffer.space.is_inside or width <= view.shape[2]),
        }
        if buffer.space.is_inside:
            return array | {"space": CONSTANTS[buffer.space.name], "base": buffer.offset}
        if buffer.name not in self.arrays:
            self.arrays.append(buffer.name)
        return array | {"space": CONSTANTS["EXTERNAL"], "external": self.arrays.index(buffer.name)}

    def _constant(self, view: View, width: int) -> Fields:
        """Return the fields of a dense copy of a constant, zero-padded to ``width``; strides of 0 stay 0."""
        rows = View(
            view.buffer, (*map(_distinct, view.shape, view.strides[:2]), view.shape[2]), view.strides, view.offset
        )
        columns = self._whole(max(width, view.shape[2]))
        outer, inner, _ = rows.shape
        strides = {"outer": inner * columns if outer > 1 else 0, "inner": columns if inner > 1 else 0}
        return self._held(_Constant(rows, columns, False)) | strides

    def _held(self, constant: _Constant) -> Fields:
        """Note how a constant is to be packed, and return the fields of an array that begins there."""
        self._constants.append(constant)
        place = len(self._constants) - 1
        return {"space": CONSTANTS["CONSTANT"], "constant": place, "column": 1, "is_whole": True}

    def _write(self, view: View | None, width: int = 0) -> Fields:
        """Return the fields of a view that is written up to ``width`` in whole vectors where it may be.

        Else, and without a width, it is written one number at a time. Zeros are set behind what is written.
        """
        if view is None:
            return {}
        outer, inner, columns = view.shape
        padding, array = self._program.padding(view), self._read(view)
        array["is_whole"] = array["column"] == 1 and 0 < width <= columns + padding
        written = width if array["is_whole"] else columns
        if written < columns + padding:
            rest = array | {"start": array["start"] + written}
            self._clears.append({"array": rest, "outer": outer, "inner": inner, "count": columns + padding - written})
        return array

    def _reduced(self, view: View | None) -> Fields:
        """Return the fields of a view that is read in whole vectors, its columns padded with zeros."""
        if view is not None and (not _has_plain_columns(view) or view.buffer.space in {Space.INPUT, Space.OUTPUT}):
            raise ValueError(f"sums over columns need an array of the tile with neighbouring columns, got {view}")
        return self._read(view, 0 if view is None else self._whole(view.shape[2]))

    # ---- Steps ----

    def _step(self, step: Step) -> Iterator[bytes]:
        """Yield the words of a step, and of those that set padding behind its results to zero."""
        self._clears.clear()
        is_shared = all(view.buffer.space is Space.SHARED for view in step.writes())
        translated = [_RULES[type(step)](self, step)]
        translated += [("Clear", clear, ()) for clear in self._clears]
        for name, fields, behind in translated:
            fields |= {"kind": CONSTANTS[name], "is_shared": is_shared}
            yield pack_sized(name, fields, [pack(*part) for part in behind])

    def _needs(self, size: int) -> None:
        """Reserve at least ``size`` bytes of scratch memory."""
        self._scratch = max(self._scratch, size)

    def _product(self, step: Product) -> _Translated:
        if self._is_contraction(step):
            assert step.out is not None
            return self._contract(Contract(step.a, step.b.permuted((0, 2, 1)), step.out), step.add)
        (outer, inner, depth), columns, scaling = step.a.shape, step.b.shape[2], step.scaling
        width, panel = self._whole(columns), CONSTANTS["NV"] * self._lanes
        if step.b.buffer.space is Space.CONSTANT:
            b = self._held(_Constant(step.b, panel, True)) | {"inner": panel}
        else:
            b = self._read(step.b, width)
        read, written = {"add": step.add}, {"out": step.out}
        if scaling is not None:
            read |= {"by": scaling.by, "term": scaling.add, "term_by": scaling.add_by}
            written |= {"scaled": scaling.out}
        beside = [view for view in (*written.values(), *read.values()) if view is not None]
        is_b_shared = step.b.buffer.row_stride == 0 and (outer == 1 or step.b.strides[0] == 0)
        is_merged = is_b_shared and _is_even(step.a) and (step.out is None or _is_even(step.out))
        has_jumps = is_merged and not all(map(_is_even, beside))
        is_plain = all(map(_has_plain_columns, beside))
        # If the columns of any array are not adjacent, all arrays are written number by number.
        arrays = {name: self._write(view, width if is_plain else 0) for name, view in written.items()}
        arrays |= {name: self._read(view, width) for name, view in {"a": step.a, **read}.items()}
        if is_merged and inner == 1:
            for array in arrays.values():
                array["inner"] = array.get("row", 0)
        fields = {
            "alpha": 1.0 if scaling is None else scaling.alpha,
            "outer": outer,
            "inner": inner,
            "depth": depth,
            "columns": columns,
            "panel": panel * (depth if step.b.buffer.space is Space.CONSTANT else 1),
            "is_merged": is_merged,
            "period": inner if has_jumps else _NO_PERIOD,
            "is_plain": is_plain,
        }
        return "Product", arrays | fields | {"b": b}, ()

    def _is_contraction(self, step: Product) -> bool:
        """Return whether a product with a constant of a single column is faster as a sum over columns."""
        a, b = step.a, step.b
        is_single = a.shape[0] == 1 and b.shape[2] == 1 and b.buffer.space is Space.CONSTANT
        if not is_single or step.out is None or step.scaling is not None:
            return False
        is_dense = a.buffer.space.is_inside and (a.shape[2] == 1 or a.strides[2] == 1)
        return is_dense and a.shape[2] + self._program.padding(a) >= self._whole(a.shape[2])

    def _map(self, step: Map) -> _Translated:
        outer, inner, columns = step.shape
        views = [*step.inputs, *(view for _, view in step.outputs)]
        width = self._whole(columns)
        padded = -(-columns // self._program.vector) * self._program.vector
        if padded % self._lanes == 0 and all(_is_run(view, padded) for view in views):
            width = padded
        # Registers: inputs, results, constants.
        inputs = len(step.inputs)
        computed = inputs + len(step.instructions)
        numbers = sorted({x for instruction in step.instructions for x in instruction.inputs if isinstance(x, float)})
        operands = [
            [computed + numbers.index(x) if isinstance(x, float) else x for x in instruction.inputs]
            for instruction in step.instructions
        ]
        last_use = {register: i for i, read in enumerate(operands) for register in read}
        last_use |= {register: len(operands) for register, _ in step.outputs}
        slots, used = _slots(operands, last_use, inputs)
        read = [self._read(view, width) for view in step.inputs]
        outputs: list[Fields] = []
        direct: set[int] = set()
        for register, view in step.outputs:
            array = self._write(view, width)
            overwritten = [i for i, other in enumerate(step.inputs) if other.buffer is view.buffer]
            for i in overwritten:
                if last_use.get(i, -1) == len(operands):  # kept as it was: read it before anything is written
                    read[i]["is_whole"] = False
            is_free = register not in direct and all(last_use.get(i, -1) <= register - inputs for i in overwritten)
            is_direct = register >= inputs and array["is_whole"] and is_free
            if is_direct:
                direct.add(register)
            is_run = _is_run(view, width)
            outputs.append({"array": array, "value": register, "is_run": is_run, "is_direct": is_direct})
        pointers = computed + len(numbers) + len(views)
        self._needs(used * CONSTANTS["CHUNK_BYTES"] + len(numbers) * self._vector_bytes + 8 * pointers)
        fields = {
            "outer": outer,
            "inner": inner,
            "columns": columns,
            "width": width,
            "slots": used,
            "inputs": inputs,
            "instructions": len(operands),
            "outputs": len(outputs),
            "constants": len(numbers),
        }
        behind: list[tuple[str, Fields]] = [
            ("Input", {"array": array, "slot": slot, "is_run": _is_run(view, width)})
            for slot, (array, view) in enumerate(zip(read, step.inputs, strict=True))
        ]
        behind += [
            (
                "Instruction",
                {"op": CONSTANTS[instruction.op], "slot": slot, **dict(zip("abc", registers, strict=False))},
            )
            for instruction, slot, registers in zip(step.instructions, slots, operands, strict=True)
        ]
        behind += [("Output", output) for output in outputs]
        behind += [("Number", {"value": number}) for number in numbers]
        return "Map", fields, behind

    def _sum_products(self, step: SumProducts) -> _Translated:
        outer, inner, columns = step.a.shape
        a, b, out = self._reduced(step.a), self._reduced(step.b), self._write(step.out, self._whole(columns))
        return "SumProducts", {"a": a, "b": b, "out": out, "outer": outer, "inner": inner, "columns": columns}, ()

    def _contract(self, step: Contract, add: View | None = None) -> _Translated:
        out = step.out.permuted((1, 2, 0))
        views = [view for view in (step.a, add, step.out) if view is not None]
        arrays = {"a": self._reduced(step.a), "b": self._reduced(step.b), "add": self._read(add)}
        arrays["out"] = self._write(step.out) | dict(zip(("outer", "inner", "column"), out.strides, strict=True))
        is_merged = step.b.buffer.row_stride == 0 and all(map(_is_even, views))
        if is_merged and step.a.shape[1] == 1:
            for name, axis in (("a", "inner"), ("add", "inner"), ("out", "outer")):
                arrays[name][axis] = arrays[name].get("row", 0)
        left, right, outputs = out.shape
        columns = self._whole(step.a.shape[2])
        extents = {"left": left, "right": right, "outputs": outputs, "columns": columns}
        return "Contract", arrays | extents | {"is_merged": is_merged}, ()

    def _congruence(self, step: Congruence) -> _Translated:
        (left, right, outputs), columns = step.out.shape, self._whole(step.a.shape[2])
        by_pairs = outputs >= OUTPUTS_BY_PAIRS and step.out.strides[2] == 1
        panel = CONSTANTS["NV"] * self._lanes
        rows = max(CONSTANTS["BLOCK"], CONSTANTS["PAIRS"] + -(-outputs // panel) * panel)
        self._needs(rows * columns * self._dtype.itemsize)
        a = self._reduced(step.a)
        out = self._write(step.out, self._whole(outputs) if by_pairs else 0)
        arrays = {"a": a, "b": a, "weights": self._reduced(step.b), "out": out}
        extents = {"left": left, "right": right, "outputs": outputs, "columns": columns}
        return "Contract", arrays | extents | {"by_pairs": by_pairs}, ()


def _distinct(extent: int, stride: int) -> int:
    """Return how many distinct entries an axis has."""
    return extent if stride else 1


#: A structure's name and fields, and the structures behind it.
_Translated = tuple[str, Fields, Sequence[tuple[str, Fields]]]
_RULES: dict[type, Callable[[Translation, Any], _Translated]] = {
    Product: Translation._product,
    Map: Translation._map,
    SumProducts: Translation._sum_products,
    Contract: Translation._contract,
    Congruence: Translation._congruence,
}


def _slots(operands: list[list[int]], last_use: dict[int, int], inputs: int) -> tuple[list[int], int]:
    """Allocate a slot to every result, reused after its last use; return the slots and their number."""
    free: list[int] = []
    found: list[int] = []
    used = inputs
    for i, read in enumerate(operands):
        if not free:
            free.append(used)
            used += 1
        found.append(free.pop())
        for register in {*read, inputs + i}:
            if inputs <= register < inputs + len(operands) and last_use.get(register, i) == i:
                free.append(found[register - inputs])
    return found, used


def _is_even(view: View) -> bool:
    """Return whether the inner axis goes on from one row to the next at the same stride."""
    return view.shape[1] == 1 or view.buffer.row_stride == view.shape[1] * view.strides[1]


def _has_plain_columns(view: View) -> bool:
    """Return whether columns are adjacent in memory; those of a constant are, since it is copied densely."""
    return view.shape[2] == 1 or view.strides[2] == 1 or view.buffer.space is Space.CONSTANT


def _is_run(view: View, width: int) -> bool:
    """Return whether the entries of all rows have the constant distance ``width`` in memory."""
    extents = view.shape[:2]
    strides = (view.buffer.row_stride, *(s for e, s in zip(extents, view.strides[:2], strict=True) if e > 1))
    inside = (prod(extents), *(prod(extents[i + 1 :]) for i, e in enumerate(extents) if e > 1))
    return all(stride == entries * width for stride, entries in zip(strides, inside, strict=True))
