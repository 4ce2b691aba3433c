"""Triton kernels generated for one program: every shape and stride is a literal in their source.

:func:`source` writes the kernel of a program as Triton code. Steps that differ only in the addresses of their arrays
share one passage of the code; the addresses are in a table, and a loop runs the steps in order. :func:`define_kernel`
turns the source into a function that Triton compiles or interprets. Networks of one architecture share a kernel, also in
Triton's cache on disk.

Sums run over ascending indices, one product after the other, as in :mod:`hessquik.backends.gpu_kernel`, for every size
of a tile and whichever other rows it has. The compiler may not contract products and sums to fused multiply-adds.
"""

from __future__ import annotations

import hashlib
import linecache
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import triton
import triton.language as tl

from hessquik.backends import gpu_math
from hessquik.steps import Congruence, Contract, Map, Product, Program, Step, SumProducts
from hessquik.strided import Space, View

__all__ = ["WARPS", "Unrolled", "Unrolling", "define_kernel", "source"]

#: Most rows and columns of a product's block.
PRODUCT_ROWS, PRODUCT_COLUMNS = 64, 64
#: Most rows of the tile (in float32; half in float64) and most depth of a block of a congruence or contraction.
PAIR_ROWS, PAIR_DEPTH = 8, 32
#: Most entries of a map's block, and of one whose instructions are few and cheap.
ENTRIES, CHEAP_ENTRIES = 512, 2048
#: Warps of an instance.
WARPS = 4
#: Cheap instructions, and the most instructions that count as few.
CHEAP = frozenset({"add", "sub", "mul", "neg", "abs", "where", "gt", "ge", "maximum", "minimum"})
FEW_INSTRUCTIONS = 6
#: An instance's memory is aligned to a multiple of this many bytes.
ALIGNMENT = 128


@dataclass(frozen=True)
class Unrolling:
    """The tiles of a kernel made for one program.

    Attributes:
        rows: Rows that the memory of a tile holds.
        instances: Most instances per multiprocessor.
        depth: Most depth of a product's block.
    """

    rows: int
    instances: int
    depth: int = 32


@dataclass
class Unrolled:
    """A kernel's source and the arguments that a call passes to it.

    Attributes:
        text: The source.
        steps: For each step the number of its passage, whether a barrier precedes it, its most rows, and the offsets,
            numbers and constants that the passage reads from the table.
        once: Number of steps that run once for all tiles; they are the first.
        names: Inputs and outputs, in the order of the arguments.
        inputs: For each input by name, whether all rows share it.
        outputs: Names of the outputs.
        bytes: Bytes of an instance's memory.
        forms: Number of passages.
    """

    text: str = ""
    steps: list[tuple[int, bool, int, list[int | float | View]]] = field(default_factory=list)
    once: int = 0
    names: list[str] = field(default_factory=list)
    inputs: dict[str, bool] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    bytes: int = 0
    forms: int = 0

    @property
    def arguments(self) -> list[str]:
        """Names of the kernel's arguments."""
        return ["table", "once", "steps", "rows", "tile_rows", "memory", *(f"a{i}" for i in range(len(self.names)))]

    @property
    def width(self) -> int:
        """Number of table entries per step."""
        return 3 + max((len(needs) for *_, needs in self.steps), default=0)

    def table(self, place: Callable[[View], int]) -> list[int]:
        """Return the steps as 64-bit integers.

        Args:
            place: Returns the address of a constant.
        """
        numbers: list[int] = []
        for form, waits, most, needs in self.steps:
            row = [form, int(waits), most]
            for need in needs:
                if isinstance(need, float):
                    row.append(int(struct.unpack("<q", struct.pack("<d", need))[0]))
                else:
                    row.append(place(need) if isinstance(need, View) else need)
            numbers += row + [0] * (self.width - len(row))
        # The kernel reads one step ahead.
        return numbers + [0] * self.width


def _power_of_two(x: int, least: int = 1) -> int:
    return max(least, 1 << (x - 1).bit_length())


def _fitting(count: int, largest: int) -> int:
    """Return the largest block size, a power of two from 16 on, with which whole blocks exceed the rows by at most 25 %.

    If there is none, return 16.
    """
    block = min(largest, _power_of_two(count, 16))
    while block > 16 and -(-count // block) * block > 1.25 * count:
        block //= 2
    return block


class _Writer:
    """Writes a program's kernel."""

    def __init__(self, program: Program, itemsize: int, sizes: Unrolling) -> None:
        """Begin an empty kernel."""
        self.program, self.itemsize, self.rows, self.product_depth = program, itemsize, sizes.rows, sizes.depth
        self.dtype = {4: "tl.float32", 8: "tl.float64"}[itemsize]
        self.lines: list[str] = []
        self.depth = 0
        self.tile_bytes = self.whole(program.tile_size * sizes.rows)
        self.found = Unrolled()
        #: Constants, offsets and numbers that the current step reads from the table.
        self.needs: list[int | float | View] = []
        self.passages: dict[tuple[str, ...], int] = {}
        #: Memory touched since the last barrier: memory, begin, end, whether it was written.
        self.touched: list[tuple[str, int, int, bool]] = []

    # Text

    def put(self, *lines: str) -> None:
        """Add lines at the current indentation."""
        self.lines += ["    " * self.depth + line for line in lines]

    def loop(self, line: str) -> _Deeper:
        """Add a line that begins a block, and return a context manager that indents the block."""
        self.put(line)
        return _Deeper(self)

    def whole(self, count: int) -> int:
        """Return the bytes of ``count`` numbers, rounded up to a multiple of the alignment."""
        return -(-count * self.itemsize // ALIGNMENT) * ALIGNMENT

    def write(self) -> Unrolled:
        """Write the kernel."""
        found, pointer = self.found, f"tl.pointer_type({self.dtype})"
        found.bytes = max(ALIGNMENT, self.tile_bytes + self.whole(self.program.shared_size))
        found.once = len(self.program.once)
        for step in self.program.once:
            is_one_row = all(view.buffer.space is Space.SHARED for view in step.writes())
            self.step(step, 1 if is_one_row else self.rows)
        self.touched.clear()
        for step in self.program.steps:
            self.step(step, self.rows)
        self.put(
            f"def run_plan({', '.join(found.arguments)}):",
            "    table = table.to(tl.pointer_type(tl.int64))",
            f"    own = memory + tl.program_id(0).to(tl.int64) * {found.bytes}",
            f"    tile = tl.multiple_of(own.to({pointer}), {ALIGNMENT})",
            "    tiles = (rows + tile_rows - 1) // tile_rows",
            "    own_tiles = (tiles - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)",
            f"    for turn in range({-1 if found.once else 0}, own_tiles):",
            "        index = tl.program_id(0) + turn * tl.num_programs(0)",
            "        start = tl.where(turn < 0, 0, index.to(tl.int64) * tile_rows)",
            "        tl.debug_barrier()",
        )
        self.depth = 2
        for i, name in enumerate(found.names):
            self.put(f"c{i} = a{i}.to({pointer}) + start * {self._row_size(name)}")
        fields = ["form", "waits", "most", *(f"m{i}" for i in range(found.width - 3))]
        self.put("first = tl.where(turn < 0, 0, once)", "last = tl.where(turn < 0, once, once + steps)")
        # The next step's numbers are read while one is computed.
        self.put(*(f"next_{name} = tl.load(table + first * {found.width} + {i})" for i, name in enumerate(fields)))
        with self.loop("for step in range(first, last):"):
            self.put(*(f"{name} = next_{name}" for name in fields))
            self.put(f"at = table + (step + 1) * {found.width}")
            self.put(*(f"next_{name} = tl.load(at + {i})" for i, name in enumerate(fields)))
            self.put("live = tl.minimum(tl.where(turn < 0, tile_rows, rows - start), tile_rows).to(tl.int32)")
            self.put("live = tl.minimum(live, most.to(tl.int32))")
            with self.loop("if waits != 0:"):
                self.put("tl.debug_barrier()")
            for passage, i in self.passages.items():
                with self.loop(f"if form == {i}:"):
                    self.put(*passage)
        self.depth = 0
        found.text, found.forms = "\n".join(self.lines) + "\n", len(self.passages)
        return found

    def _row_size(self, name: str) -> int:
        for step in (*self.program.once, *self.program.steps):
            for view in (*step.reads(), *step.writes()):
                if view.buffer.name == name:
                    return view.buffer.row_stride
        raise AssertionError(name)

    # Memory

    def base(self, view: View) -> str:
        """Return the expression of the address of a view's first entry in the tile's first row."""
        buffer, found = view.buffer, self.found
        if buffer.space in {Space.CONSTANT, Space.TILE, Space.SHARED}:
            need: int | View = view
            if buffer.space is not Space.CONSTANT:
                tile = buffer.space is Space.TILE
                begin = buffer.offset * self.rows if tile else self.tile_bytes // self.itemsize + buffer.offset
                need = begin + view.offset
            return f"b{self._needed(need)}"
        if buffer.name not in found.names:
            found.names.append(buffer.name)
        if buffer.space is Space.INPUT:
            found.inputs[buffer.name] = buffer.is_shared
        else:
            found.outputs.add(buffer.name)
        return f"(c{found.names.index(buffer.name)} + {view.offset})"

    def strides(self, view: View) -> tuple[int, int, int, int]:
        """Return strides of rows, outer, inner and columns."""
        outer, inner, column = view.strides
        if view.buffer.space is Space.CONSTANT:
            # Constants are dense, their columns zero-padded to whole vectors.
            lanes = 16 // self.itemsize
            shape = [extent if stride else 1 for extent, stride in zip(view.shape, view.strides, strict=True)]
            width = -(-shape[2] // lanes) * lanes
            outer = shape[1] * width if shape[0] > 1 else 0
            inner = width if shape[1] > 1 else 0
            return 0, outer, inner, 1 if column else 0
        shape = list(view.shape)
        return (
            view.buffer.row_stride,
            outer if shape[0] > 1 else 0,
            inner if shape[1] > 1 else 0,
            column if shape[2] > 1 else 1,
        )

    def _touches(self, step: Step) -> Iterator[tuple[str, int, int, bool]]:
        for views, is_written in ((step.reads(), False), (step.writes(), True)):
            for view in views:
                buffer = view.buffer
                if buffer.space is not Space.CONSTANT:
                    begin = 0 if buffer.name else buffer.offset
                    yield buffer.name or buffer.space.value, begin, begin + buffer.size, is_written

    def step(self, step: Step, most: int) -> None:
        """Append a step, and write its passage unless an equal one exists."""
        touches = list(self._touches(step))
        waits = any(
            space == other and begin < end_ and begin_ < end and (is_written or was_written)
            for space, begin, end, is_written in touches
            for other, begin_, end_, was_written in self.touched
        )
        if waits:
            self.touched.clear()
        self.touched += touches
        self.lines, self.needs = [], []
        if isinstance(step, Product):
            self.product(step)
        elif isinstance(step, Map):
            self.map(step)
        elif isinstance(step, SumProducts):
            self.sum_products(step)
        else:
            self.pairs(step)
        needs = [self._need(i, need) for i, need in enumerate(self.needs)]
        passage = (f"# {type(step).__name__.lower()}", *needs, *self.lines)
        self.lines = []
        form = self.passages.setdefault(passage, len(self.passages))
        self.found.steps.append((form, waits, most, self.needs))

    def _needed(self, need: int | float | View) -> int:
        """Return the index of an entry that the step reads from the table; add the entry if it is new."""
        for i, known in enumerate(self.needs):
            if type(known) is type(need) and known == need:
                return i
        self.needs.append(need)
        return len(self.needs) - 1

    def _need(self, i: int, need: int | float | str | View) -> str:
        """Return the source line that turns the step's table entry ``i`` into an address or a number."""
        pointer = f"tl.pointer_type({self.dtype})"
        if isinstance(need, float):
            return f"n{i} = m{i}.to(tl.float64, bitcast=True).to({self.dtype})"
        if isinstance(need, View):
            return f"b{i} = tl.multiple_of(m{i}.to({pointer}), 16)"
        lanes = 16 // self.itemsize
        offset = f"m{i}.to(tl.int32)"
        return f"b{i} = tile + " + (offset if need % lanes else f"tl.multiple_of({offset}, {lanes})")

    # Steps

    def product(self, step: Product) -> None:
        """Write the code of C = A B + D, E = α C ⊙ S + F ⊙ T, in blocks of rows of the matrix."""
        outer, inner, depth = step.a.shape
        columns = step.b.shape[2]
        in_groups = outer > 1 or bool(step.b.buffer.row_stride)
        most = inner if in_groups else self.rows * inner
        bm = _fitting(most, PRODUCT_ROWS)
        width = columns + max(self.program.padding(view) for view in step.writes())
        bn = min(PRODUCT_COLUMNS, _power_of_two(width, 16))
        bk = min(self.product_depth, _power_of_two(depth, 16))
        self.put(f"k = tl.arange(0, {bk})", f"j = tl.arange(0, {bn})")
        if in_groups:
            with self.loop(f"for group in range(0, live * {outer}):"):
                self.put(f"row = group // {outer}", f"outer = group - row * {outer}")
                self._blocks(step, f"{inner}", True, bm, bn, bk, width)
        else:
            self._blocks(step, f"live * {inner}" if inner > 1 else "live", False, bm, bn, bk, width)

    def _blocks(self, step: Product, length: str, in_groups: bool, bm: int, bn: int, bk: int, width: int) -> None:
        inner, depth, columns = step.a.shape[1], step.a.shape[2], step.b.shape[2]

        def place(view: View, rows: str, t: str, cols: str) -> tuple[str, bool]:
            """Return the expression of the addresses of a matrix's entries, and whether it depends on the row."""
            row, outer, per_inner, column = self.strides(view)
            terms = [self.base(view)]
            if in_groups:
                terms += [f"row * {row}"] * bool(row) + [f"outer * {outer}"] * bool(outer)
                along = f"({rows} * {per_inner})" if per_inner else ""
            else:
                beyond = row - inner * per_inner
                parts = [f"{rows} * {per_inner}"] * bool(per_inner) + [f"{t} * {beyond}"] * bool(beyond)
                along = f"({' + '.join(parts)})" if parts else ""
            terms += [f"{along}[:, None]"] if along else []
            terms.append(f"({cols} * {column})[None, :]" if column != 1 else f"{cols}[None, :]")
            return " + ".join(terms), bool(along)

        def load_b(k: str) -> None:
            row, outer, per_k, column = self.strides(step.b)
            terms = [self.base(step.b)]
            if in_groups:
                terms += [f"row * {row}"] * bool(row) + [f"outer * {outer}"] * bool(outer)
            at = f"({k} * {per_k})[:, None] + ({'j' if bn >= width else 'jj'} * {column})[None, :]"
            masks = [] if depth % bk == 0 else [f"({k} < {depth})[:, None]"]
            if columns % bn:
                masks.append(f"({'j' if bn >= width else 'jj'} < {columns})[None, :]")
            mask = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
            self.put(f"y = tl.load({' + '.join(terms)} + {at}{mask})")

        def load_a(k: str) -> None:
            masks = ["is_row"] + ([] if depth % bk == 0 else [f"({k} < {depth})[None, :]"])
            at, has_rows = place(step.a, "e", "t", k)
            at += "" if has_rows else " + (e * 0)[:, None]"
            self.put(f"x = tl.load({at}, mask={' & '.join(masks)}, other=0.0)")

        dot = f'total = tl.dot(x, y, total, input_precision="ieee", out_dtype={self.dtype})'
        with self.loop(f"for begin in range(0, {length}, {bm}):"):
            self.put(f"e = begin + tl.arange(0, {bm})", f"t = e // {inner}" if inner > 1 else "t = e")
            self.put(f"is_row = (e < {length})[:, None]")
            columns_name = "j"
            deeper: Any = None
            if width > bn:
                columns_name = "jj"
                deeper = self.loop(f"for j0 in range(0, {width}, {bn}):")
                deeper.__enter__()
                self.put("jj = j0 + j")
            self.put(f"total = tl.zeros(({bm}, {bn}), {self.dtype})")
            if depth <= bk:
                load_a("k")
                load_b("k")
                self.put(dot)
            else:
                with self.loop(f"for k0 in range(0, {depth}, {bk}):"):
                    self.put("kk = k0 + k")
                    load_a("kk")
                    load_b("kk")
                    self.put(dot)
            self._epilogue(step, lambda view: place(view, "e", "t", columns_name), columns_name, columns, bn)
            if deeper is not None:
                deeper.__exit__()

    def _epilogue(
        self, step: Product, place: Callable[[View], tuple[str, bool]], j: str, columns: int, bn: int
    ) -> None:
        def load(view: View) -> str:
            at, has_rows = place(view)
            masks = ["is_row"] * has_rows + [f"({j} < {columns})[None, :]"] * bool(columns % bn)
            return f"tl.load({at}, mask={' & '.join(masks)}, other=0.0)" if masks else f"tl.load({at})"

        def store(view: View, value: str) -> None:
            stop = columns + self.program.padding(view)
            mask = "is_row" if stop % bn == 0 else f"is_row & ({j} < {stop})[None, :]"
            at, has_rows = place(view)
            at += "" if has_rows else " + (e * 0)[:, None]"
            self.put(f"tl.store({at}, {value}, mask={mask})")

        if step.add is not None:
            self.put(f"total += {load(step.add)}")
        if step.out is not None:
            store(step.out, "total")
        scaling = step.scaling
        if scaling is not None:
            self.put("scaled = total")
            if scaling.alpha != 1.0:
                self.put(f"scaled *= {self.number(scaling.alpha)}")
            if scaling.by is not None:
                self.put(f"scaled *= {load(scaling.by)}")
            if scaling.add is not None:
                self.put(f"more = {load(scaling.add)}")
                if scaling.add_by is not None:
                    self.put(f"more *= {load(scaling.add_by)}")
                self.put("scaled += more")
            store(scaling.out, "scaled")

    def _entries(self, shape: tuple[int, ...], padded: int, block: int) -> None:
        """Write the code that computes the indices r, o, i, w of a block of entries, and its masks."""
        outer, inner, columns = shape
        self.put(f"e = e0 + tl.arange(0, {block})", f"w = e % {padded}" if padded > 1 else "w = e * 0")
        self.put(f"q = e // {padded}" if padded > 1 else "q = e")
        self.put(f"i = q % {inner}" if inner > 1 else "i = 0", f"q = q // {inner}" if inner > 1 else "q = q")
        self.put(f"o = q % {outer}" if outer > 1 else "o = 0", f"r = q // {outer}" if outer > 1 else "r = q")
        self.put(
            "within = e < count", f"is_entry = within & (w < {columns})" if padded > columns else "is_entry = within"
        )

    def _at(self, view: View, inner: str = "i") -> str:
        row, outer, per_inner, column = self.strides(view)
        parts = [("r", row), ("o", outer if view.shape[0] > 1 else 0), (inner, per_inner), ("w", column)]
        terms = [f"{name} * {stride}" if stride != 1 else name for name, stride in parts if stride]
        return f"{self.base(view)} + ({' + '.join(terms) or 'e * 0'})"

    def number(self, x: float) -> str:
        """Return the expression of a number: a literal if it is a small multiple of ½, else a name from the table."""
        if isfinite(x) and abs(x) <= 1024 and (2 * x).is_integer():
            return repr(float(x))
        return f"n{self._needed(x)}"

    def map(self, step: Map) -> None:
        """Write the code of a map: its instructions on blocks of entries."""
        outer, inner, columns = step.shape
        padded = columns + max(self.program.padding(view) for view in step.writes())
        total = self.rows * outer * inner * padded
        is_cheap = len(step.instructions) <= FEW_INSTRUCTIONS and all(
            instruction.op in CHEAP for instruction in step.instructions
        )
        block = min(_power_of_two(total, 32 * WARPS), CHEAP_ENTRIES if is_cheap else ENTRIES)
        self.put(f"count = live * {outer * inner * padded}")
        with self.loop(f"for e0 in range(0, count, {block}):"):
            self._entries(step.shape, padded, block)
            for i, view in enumerate(step.inputs):
                self.put(f"v{i} = tl.load({self._at(view)}, mask=is_entry, other=0.0)")
            for i, instruction in enumerate(step.instructions, len(step.inputs)):
                operands = [
                    f"tl.full(({block},), 0.0, {self.dtype}) + {self.number(x)}" if isinstance(x, float) else f"v{x}"
                    for x in instruction.inputs
                ]
                self.put(f"v{i} = {self.instruction(instruction.op, operands)}")
            for register, view in step.outputs:
                stop = columns + self.program.padding(view)
                mask = "within" if stop == padded else f"within & (w < {stop})"
                value = f"v{register}" if padded == columns else f"tl.where(w < {columns}, v{register}, 0.0)"
                self.put(f"tl.store({self._at(view)}, {value}, mask={mask})")

    def instruction(self, op: str, x: list[str]) -> str:
        """Return the expression of a primitive."""
        nan = "propagate_nan=tl.PropagateNan.ALL"
        known = {
            "mul": lambda: f"({x[0]}) * ({x[1]})",
            "add": lambda: f"{x[0]} + ({x[1]})",
            "sub": lambda: f"{x[0]} - ({x[1]})",
            "neg": lambda: f"-({x[0]})",
            "abs": lambda: f"tl.abs({x[0]})",
            "where": lambda: f"tl.where({x[0]} != 0.0, {x[1]}, {x[2]})",
            "gt": lambda: f"({x[0]} > {x[1]}).to({self.dtype})",
            "ge": lambda: f"({x[0]} >= {x[1]}).to({self.dtype})",
            "maximum": lambda: f"tl.maximum({x[0]}, {x[1]}, {nan})",
            "minimum": lambda: f"tl.minimum({x[0]}, {x[1]}, {nan})",
            "sin": lambda: f"tl.sin({x[0]})",
            "cos": lambda: f"tl.cos({x[0]})",
            "div": lambda: f"gpu_math.divide({x[0]}, {x[1]})",
            "sqrt": lambda: f"gpu_math.square_root({x[0]})",
        }
        return known[op]() if op in known else f"gpu_math.{op}({x[0]})"

    def sum_products(self, step: SumProducts) -> None:
        """Write the code of C[o, 0, w] = Σ_i A[o, i, w] B[o, i, w]."""
        outer, inner, columns = step.a.shape
        padded = columns + self.program.padding(step.out)
        total = self.rows * outer * padded
        block = min(_power_of_two(total, 32 * WARPS), ENTRIES)
        self.put(f"count = live * {outer * padded}")
        with self.loop(f"for e0 in range(0, count, {block}):"):
            self._entries((outer, 1, columns), padded, block)
            self.put(f"total = tl.zeros(({block},), {self.dtype})")
            with self.loop(f"for s in range(0, {inner}):"):
                self.put(f"x = tl.load({self._at(step.a, 's')}, mask=is_entry, other=0.0)")
                if step.b is not None:
                    self.put(f"y = tl.load({self._at(step.b, 's')}, mask=is_entry, other=0.0)")
                    self.put("x *= y")
                self.put("total += x")
            self.put(f"tl.store({self._at(step.out)}, total, mask=within)")

    def pairs(self, step: Congruence | Contract) -> None:
        """Write the code of C[i, j, m] = Σ_w A[i, w] S[m, w] B[j, w].

        A congruence has B = A; a contraction has no S and one m.
        """
        is_symmetric = isinstance(step, Congruence)
        _, height, depth = step.a.shape
        padding = self.program.padding(step.out)
        width, count = (height, step.b.shape[1]) if is_symmetric else (step.b.shape[1], 1)
        stored = width if is_symmetric else width + padding
        cb = min(16, _power_of_two(max(height, stored), 16))
        rb = min(_power_of_two(self.rows), PAIR_ROWS * 4 // self.itemsize)
        bw = min(PAIR_DEPTH, _power_of_two(depth, 16))
        a_row, _, a_inner, _ = self.strides(step.a)
        b_row, _, b_inner, _ = self.strides(step.b)
        c_row, c_outer, c_inner, c_column = self.strides(step.out)
        c_i, c_j, c_m = (c_outer, c_inner, c_column) if is_symmetric else (c_inner, c_column, 0)
        s_row, s_inner = b_row, b_inner
        right_row, right_inner, right_view = (a_row, a_inner, step.a) if is_symmetric else (b_row, b_inner, step.b)
        is_single = is_symmetric and height <= cb
        all_m = count + (padding if is_symmetric else 0)
        self.put(f"w = tl.arange(0, {bw})")
        with self.loop(f"for r0 in range(0, live, {rb}):"):
            self.put(f"r = r0 + tl.arange(0, {rb})", "is_row = (r < live)[:, None, None]")
            with (
                self.loop(f"for m in range(0, {all_m}):"),
                self.loop(f"for i0 in range(0, {height}, {cb}):"),
                self.loop(f"for j0 in range(0, {'i0 + 1' if is_symmetric else stored}, {cb}):"),
            ):
                self.put(f"i = i0 + tl.arange(0, {cb})", f"j = j0 + tl.arange(0, {cb})")
                self.put(f"down = is_row & (i < {height})[None, :, None]")
                self.put(f"across = is_row & (j < {width})[None, :, None]")
                self.put(f"left = (r * {a_row})[:, None, None] + (i * {a_inner})[None, :, None]")
                self.put(f"right = (r * {right_row})[:, None, None] + (j * {right_inner})[None, :, None]")
                self.put(f"total = tl.zeros(({rb}, {cb}, {cb}), {self.dtype})")
                stop = f"tl.where(m < {count}, {depth}, 0)" if all_m > count else f"{depth}"
                with self.loop(f"for w0 in range(0, {stop}, {bw}):"):
                    self.put("ww = (w0 + w)[None, None, :]")
                    if depth % bw:
                        self.put(f"inside = ww < {depth}")
                    also = " & inside" if depth % bw else ""
                    self.put(f"x = tl.load({self.base(step.a)} + (left + ww), mask=down{also}, other=0.0)")
                    if is_single:
                        self.put("y = x")
                    else:
                        self.put(f"y = tl.load({self.base(right_view)} + (right + ww), mask=across{also}, other=0.0)")
                    if is_symmetric:
                        at = f"(r * {s_row})[:, None, None] + (m * {s_inner} + ww)"
                        self.put(f"s = tl.load({self.base(step.b)} + ({at}), mask=is_row{also}, other=0.0)")
                        self.put("x = x * s")
                    self.put("y = tl.permute(y, (0, 2, 1))")
                    self.put(f'total = tl.dot(x, y, total, input_precision="ieee", out_dtype={self.dtype})')
                self.put("at_i = i[None, :, None]", "at_j = j[None, None, :]")
                limit = " & (at_j <= at_i)" if is_symmetric else ""
                self.put(f"mask = is_row & (at_i < {height}) & (at_j < {stored}){limit}")
                self.put(f"place = {self.base(step.out)} + m * {c_m} + (r * {c_row})[:, None, None]")
                self.put(f"tl.store(place + (at_i * {c_i} + at_j * {c_j}), total, mask=mask)")
                if is_symmetric:
                    self.put(f"tl.store(place + (at_j * {c_i} + at_i * {c_j}), total, mask=mask)")


class _Deeper:
    """Context manager that indents the lines written inside it."""

    def __init__(self, writer: _Writer) -> None:
        self.writer = writer

    def __enter__(self) -> None:
        self.writer.depth += 1

    def __exit__(self, *_: object) -> None:
        self.writer.depth -= 1


def source(program: Program, itemsize: int, sizes: Unrolling) -> Unrolled:
    """Return the kernel of a program as source code.

    Args:
        program: The program.
        itemsize: Bytes of a number, 4 or 8.
        sizes: Sizes of its tiles and blocks.
    """
    return _Writer(program, itemsize, sizes).write()


def define_kernel(text: str) -> Any:
    """Return the kernel function that a source defines, for Triton to compile or interpret."""
    name = f"<kernel {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": __name__, "tl": tl, "gpu_math": gpu_math}
    exec(compile(text, name, "exec"), space)
    return triton.jit(space["run_plan"])
