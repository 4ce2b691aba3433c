"""A reference interpreter of programs, in float64 with torch, and random programs to compare backends on.

case = random_case(seed)
inputs = case.inputs(n)
expected = interpret(case.program, inputs, n, tile_rows=7)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from hessquik.pointwise import PRIMITIVES
from hessquik.steps import Congruence, Contract, Instruction, Map, Product, Program, Scaling, Step, SumProducts
from hessquik.strided import Buffer, Space, View

__all__ = ["Case", "interpret", "outputs_of", "random_case"]

Find = Callable[[View], Tensor]


def interpret(program: Program, inputs: Mapping[str, Tensor], n: int, tile_rows: int) -> dict[str, Tensor]:
    """Run a program and return its outputs as (rows, size).

    Args:
        program: The program.
        inputs: Arrays by name, (rows, …), or without rows if all rows share them.
        n: Number of rows.
        tile_rows: Rows of a tile.
    """
    arrays = {name: array.double().reshape(-1) for name, array in inputs.items()}
    arrays |= {name: torch.full((n * size,), math.nan).double() for name, size in outputs_of(program).items()}
    # Memory is filled with NaN, so that reading a number that was not written shows in the results.
    tile = torch.full((program.tile_size * tile_rows,), math.nan, dtype=torch.float64)
    common = torch.full((program.shared_size,), math.nan, dtype=torch.float64)

    def run(step: Step, first: int, rows: int) -> None:
        def find(view: View, more: int = 0) -> Tensor:
            """Return the array (rows, outer, inner, columns), with ``more`` numbers after the columns."""
            buffer = view.buffer
            memory, offset = tile, buffer.offset * tile_rows
            if buffer.space is Space.SHARED:
                memory, offset = common, buffer.offset
            elif buffer.space is Space.CONSTANT:
                memory = program.constants[buffer.constant]
                offset = memory.storage_offset()
            elif buffer.space in {Space.INPUT, Space.OUTPUT}:
                memory, offset = arrays[buffer.name], first * buffer.row_stride
            strides = (buffer.row_stride, *view.strides[:2], 1 if view.shape[2] == 1 else view.strides[2])
            return memory.as_strided((rows, *view.shape[:2], view.shape[2] + more), strides, offset + view.offset)

        _RULES[type(step)](step, find)
        for view in step.writes():
            if padding := program.padding(view):
                find(view, padding)[..., view.shape[2] :] = 0.0

    for step in program.once:
        is_shared = all(view.buffer.space is Space.SHARED for view in step.writes())
        run(step, 0, 1 if is_shared else tile_rows)
    for first in range(0, n, tile_rows):
        for step in program.steps:
            run(step, first, min(tile_rows, n - first))
    return {name: arrays[name].view(n, -1) for name in outputs_of(program)}


def _product(step: Product, find: Find) -> None:
    c = find(step.a) @ find(step.b)
    if step.add is not None:
        c = c + find(step.add)
    scaling = step.scaling
    if scaling is not None:
        e = scaling.alpha * c
        if scaling.by is not None:
            e = e * find(scaling.by)
        if scaling.add is not None:
            e = e + find(scaling.add) * (1.0 if scaling.add_by is None else find(scaling.add_by))
        find(scaling.out).copy_(e)
    if step.out is not None:
        find(step.out).copy_(c)


def _map(step: Map, find: Find) -> None:
    registers = [find(view).clone() for view in step.inputs]
    shape = find(step.outputs[0][1]).shape
    for instruction in step.instructions:
        operands = [
            torch.full(shape, x, dtype=torch.float64) if isinstance(x, float) else registers[x]
            for x in instruction.inputs
        ]
        registers.append(PRIMITIVES[instruction.op].on_tensors(*operands))
    for register, view in step.outputs:
        find(view).copy_(registers[register])


def _sum_products(step: SumProducts, find: Find) -> None:
    a = find(step.a)
    find(step.out).copy_((a if step.b is None else a * find(step.b)).sum(dim=2, keepdim=True))


def _contract(step: Contract, find: Find) -> None:
    find(step.out).copy_(find(step.a) @ find(step.b).mT)


def _congruence(step: Congruence, find: Find) -> None:
    a, b = find(step.a)[:, 0], find(step.b)[:, 0]
    find(step.out).copy_(torch.einsum("naw,nmw,nbw->nabm", a, b, a))


_RULES: dict[type, Callable[..., None]] = {
    Product: _product,
    Map: _map,
    SumProducts: _sum_products,
    Contract: _contract,
    Congruence: _congruence,
}


def _views(program: Program) -> list[View]:
    return [view for step in (*program.once, *program.steps) for view in (*step.reads(), *step.writes())]


def outputs_of(program: Program) -> dict[str, int]:
    """Return the numbers per row of every output."""
    return {view.buffer.name: view.buffer.size for view in _views(program) if view.buffer.space is Space.OUTPUT}


# ---- Random programs ----

WIDTHS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 20, 31, 32, 33, 48, 50, 63, 64, 100)
EXTENTS = (1, 1, 2, 3, 4, 5, 9)
#: Largest array, so that programs stay quick.
MOST_NUMBERS = 4000


@dataclass
class Case:
    """A random program with the sizes of its inputs.

    Attributes:
        program: The program.
        shared: Inputs that all rows share, by name: how many numbers.
        each: Inputs per row, by name: how many numbers.
    """

    program: Program
    shared: dict[str, int]
    each: dict[str, int]

    def inputs(self, n: int, seed: int = 0) -> dict[str, Tensor]:
        """Return random inputs for n rows, float64; those of a row do not depend on n."""
        generator = torch.Generator().manual_seed(seed)
        found = {name: torch.randn(size, generator=generator).double() for name, size in self.shared.items()}
        rows = [
            {name: torch.randn(size, generator=generator).double() for name, size in self.each.items()}
            for _ in range(n)
        ]
        return found | {name: torch.stack([row[name] for row in rows]) for name in self.each}


@dataclass
class _Writer:
    """Writes a random program; arrays whose entries may be large are passed through tanh."""

    random: Random
    vector: int
    generator: torch.Generator
    steps: list[Step] = field(default_factory=list)
    once: list[Step] = field(default_factory=list)
    known: list[View] = field(default_factory=list)
    sizes: dict[Space, int] = field(default_factory=lambda: {Space.TILE: 0, Space.SHARED: 0})
    constants: list[Tensor] = field(default_factory=list)
    outputs: int = 0
    dead: list[Buffer] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    magnitudes: dict[int, float] = field(default_factory=dict)

    def is_shared(self, *views: View | None) -> bool:
        return all(view is None or view.buffer.is_shared for view in views)

    def size(self, *views: View | None) -> float:
        """Return the product of the approximate magnitudes of the entries of some arrays."""
        return math.prod(self.magnitudes.get(id(view.buffer), 2.0) for view in views if view is not None)

    def emit(self, step: Step, *magnitudes: float) -> None:
        """Add a step; later steps may read the arrays that it writes, unless they are outputs."""
        is_once = self.is_shared(*step.writes()) or (
            self.is_shared(*step.reads()) and all(view.buffer.space is Space.TILE for view in step.writes())
            and self.random.random() < 0.3
        )  # fmt: skip
        (self.once if is_once else self.steps).append(step)
        if is_once:
            self.kept.update(id(view.buffer) for view in step.writes())
        for view, magnitude in zip(step.writes(), magnitudes, strict=True):
            if view.buffer.space is not Space.OUTPUT:
                self.known.append(view)
                self.magnitudes[id(view.buffer)] = min(magnitude, 20.0)
                if magnitude > 20.0:
                    squash = Map((view,), (Instruction("tanh", (0,)),), ((1, view),))
                    (self.once if is_once else self.steps).append(squash)

    def padded(self, columns: int) -> int:
        return -(-columns // self.vector) * self.vector

    def new(self, shape: tuple[int, int, int], is_shared: bool = False) -> View:
        """Return an array to write: new memory or that of a retired array, sometimes scattered, or an output."""
        random = self.random
        if not is_shared and random.random() < 0.15:
            return self.output(shape)
        axes = [0, 1, 2]
        if random.random() < 0.15:
            random.shuffle(axes)
        stored = [shape[i] for i in axes]
        pitch = self.padded(stored[2])
        strides = (stored[1] * pitch, pitch, 1)
        buffer = Buffer(Space.SHARED if is_shared else Space.TILE, stored[0] * strides[0], is_shared=is_shared)
        reused = next((old for old in self.dead if old.size >= buffer.size and not is_shared), None)
        if reused is not None:
            self.dead.remove(reused)
            # Rows of a buffer are neighbours, so memory of more numbers per row begins at the same offset.
            buffer.offset = reused.offset
        else:
            buffer.offset = self.sizes[buffer.space]
            self.sizes[buffer.space] += buffer.size
        return View(buffer, shape, tuple(strides[axes.index(i)] for i in range(3)))  # type: ignore[arg-type]

    def output(self, shape: tuple[int, int, int]) -> View:
        """Return a new output with its axes stored in random order."""
        axes = [0, 1, 2]
        if self.random.random() < 0.5:
            self.random.shuffle(axes)
        stored = [shape[i] for i in axes]
        strides = (stored[1] * stored[2], stored[2], 1)
        self.outputs += 1
        buffer = Buffer(Space.OUTPUT, math.prod(shape), f"output {self.outputs}")
        return View(buffer, shape, tuple(strides[axes.index(i)] for i in range(3)))  # type: ignore[arg-type]

    def constant(self, shape: tuple[int, int, int], scale: float = 1.0) -> View:
        """Return a constant of random numbers with its axes stored in random order, repeated along some of them."""
        random = self.random
        extents = [extent if random.random() < 0.8 else 1 for extent in shape[:2]] + [shape[2]]
        axes = [0, 1, 2]
        if random.random() < 0.3:
            random.shuffle(axes)
        stored = [extents[i] for i in axes]
        data = scale * torch.randn(stored, generator=self.generator).double()
        strides = (stored[1] * stored[2], stored[2], 1)
        view = View(
            Buffer(Space.CONSTANT, data.numel(), constant=len(self.constants), is_shared=True),
            tuple(extents),  # type: ignore[arg-type]
            tuple(strides[axes.index(i)] for i in range(3)),  # type: ignore[arg-type]
        )
        self.constants.append(data)
        return view.repeated(shape)

    def retire(self) -> None:
        """Retire a random array, so that its memory can be used again."""
        candidates = [
            view for view in self.known if view.buffer.space is Space.TILE and id(view.buffer) not in self.kept
        ]
        if len(candidates) > 4:
            buffer = self.random.choice(candidates).buffer
            self.known = [view for view in self.known if view.buffer is not buffer]
            self.dead.append(buffer)

    def pick(self, want: Callable[[View], bool] = lambda view: True) -> View | None:
        found = [view for view in self.known if want(view)]
        return self.random.choice(found) if found else None

    def like(self, shape: tuple[int, int, int], is_shared: bool = False) -> View:
        """Return an array of a shape: an existing one, perhaps broadcast or with axes exchanged, or a constant."""
        candidates = []
        for view in self.known:
            for turned in (view, view.permuted((0, 2, 1)), view.permuted((1, 0, 2)), view.permuted((2, 1, 0))):
                fits = all(have in {1, wanted} for have, wanted in zip(turned.shape[:2], shape[:2], strict=True))
                if fits and turned.shape[2] == shape[2] and (not is_shared or view.buffer.is_shared):
                    candidates.append(turned.repeated(shape))
        if candidates and self.random.random() < 0.8:
            return self.random.choice(candidates)
        return self.constant(shape)

    def product(self) -> None:
        random = self.random
        source = self.pick()
        assert source is not None
        a = source.permuted(random.choice([(0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 0, 2)]))
        if a.shape[1] > 2 and random.random() < 0.2:
            a = a.part(1, 1, a.shape[1])
        outer, inner, depth = a.shape
        columns = random.choice([width for width in WIDTHS if outer * inner * width <= MOST_NUMBERS])
        shape = (outer, inner, columns)
        of_row = [
            turned
            for view in self.known
            for turned in (view, view.permuted((0, 2, 1)), view.permuted((1, 0, 2)))
            if view.buffer.space.is_inside
            and (turned.strides[2] == 1 or turned.shape[2] == 1)
            and turned.shape[0] in {1, outer}
            and turned.shape[1] == depth
            and outer * inner * turned.shape[2] <= MOST_NUMBERS
        ]
        if of_row and random.random() < 0.5:
            b = random.choice(of_row)
            shape = (outer, inner, b.shape[2])
            b = b.repeated((outer, *b.shape[1:]))
        else:
            b = self.constant((1, depth, columns), depth**-0.5).repeated((outer, depth, columns))
        add = self.like(shape) if random.random() < 0.5 else None
        is_shared = self.is_shared(a, b, add)
        out: View | None = self.new(shape, is_shared)
        owned = [
            view
            for view in self.known
            if view.shape == shape and view.buffer.space is Space.TILE and id(view.buffer) not in self.kept
            and view.buffer not in {a.buffer, b.buffer}
        ]  # fmt: skip
        if owned and random.random() < 0.4 and not is_shared:
            out = add = random.choice(owned)  # adding in place
            self.known = [view for view in self.known if view.buffer is not add.buffer]
        scaling = None
        if random.random() < 0.5:
            by, more, more_by = (self.like(shape) if random.random() < 0.5 else None for _ in range(3))
            others = [view.buffer for view in (by, more, more_by) if view is not None]
            is_apart = out is None or out.buffer not in others
            is_scaled_shared = self.is_shared(by, more, more_by) and is_shared
            if is_apart and is_scaled_shared == is_shared:
                alpha = random.choice([1.0, 1.0, -0.5, 2.0])
                scaling = Scaling(self.new(shape, is_shared), alpha, by, more, more_by if more is not None else None)
                if (
                    random.random() < 0.4
                    and out is not None
                    and out.buffer.space is not Space.OUTPUT
                    and add is not out
                ):
                    out = None
        found = self.size(a, b) * (1.0 if b.buffer.space is Space.CONSTANT else depth**0.5) + self.size(add)
        scaled = 0.0
        if scaling is not None:
            scaled = 2 * found * self.size(scaling.by) + self.size(scaling.add, scaling.add_by)
        self.emit(
            Product(a, b, add, out, scaling), *([found] * (out is not None)), *([scaled] * (scaling is not None))
        )

    def map(self) -> None:
        random = self.random
        shape = (random.choice(EXTENTS), random.choice(EXTENTS), random.choice(WIDTHS))
        source = self.pick(lambda view: math.prod(view.shape) <= MOST_NUMBERS)
        if source is not None:
            shape = source.shape
            if random.random() < 0.2 and shape[1] == 1:
                shape = (shape[0], random.choice(EXTENTS), shape[2])
        inputs = tuple(self.like(shape) for _ in range(random.choice([1, 1, 2, 3])))
        is_shared = self.is_shared(*inputs)
        count = len(inputs)
        instructions: list[Instruction] = []

        def do(op: str, *operands: int | float) -> int:
            instructions.append(Instruction(op, operands))
            sizes = [abs(x) if isinstance(x, float) else magnitudes[x] for x in operands]
            large = {"mul": math.prod, "div": lambda s: 2 * s[0], "add": sum, "sub": sum, "exp": lambda s: 3.0}
            magnitudes.append(large.get(op, max)(sizes))  # type: ignore[operator]
            return count + len(instructions) - 1

        magnitudes = [self.size(view) for view in inputs]
        registers = list(range(count))
        for _ in range(random.choice([0, 1, 2, 4, 8])):
            op = random.choice(sorted(PRIMITIVES))
            x, y = random.choice(registers), random.choice([*registers, 0.75, -1.25])
            if op == "div":
                result = do(op, x, do("add", do("abs", y), 0.5))
            elif op in {"exp", "expm1"}:
                result = do(op, do("minimum", x, 1.0))
            elif op in {"log", "sqrt"}:
                result = do(op, do("add", do("abs", x), 0.25))
            elif op == "log1p":
                result = do(op, do("abs", x))
            elif op in {"gt", "ge", "where"}:  # continuous, so that rounding decides nothing
                result = do(
                    "where", do("ge" if op == "ge" else "gt", x, y), do("sub", x, y), do("mul", do("sub", x, y), 0.5)
                )
            else:
                result = do(op, *([x, y] if PRIMITIVES[op].arity == 2 else [x]))
            if op in {"mul", "add", "sub", "log", "div"} and random.random() < 0.5:
                result = do("tanh", result)
            registers.append(result)
        kept = random.sample(registers, min(len(registers), random.choice([1, 1, 2, 3])))
        outputs: list[tuple[int, View]] = []
        owned = [
            view
            for view in inputs
            if view.size == math.prod(shape) and view.buffer.space is Space.TILE and id(view.buffer) not in self.kept
            and sum(other.buffer is view.buffer for other in inputs) == 1
        ]  # fmt: skip
        for register in kept:
            if owned and random.random() < 0.3 and not is_shared:
                view = owned.pop()
                self.known = [other for other in self.known if other.buffer is not view.buffer]
                outputs.append((register, view))
            else:
                outputs.append((register, self.new(shape, is_shared)))
        self.emit(Map(inputs, tuple(instructions), tuple(outputs)), *(magnitudes[register] for register in kept))

    def dense(self) -> View | None:
        """Return a random array that may be read in whole vectors, or ``None``."""
        return self.pick(lambda view: view.strides[2] == 1 and view.buffer.space in {Space.TILE, Space.SHARED})

    def sum_products(self) -> None:
        a = self.dense()
        if a is None:
            return
        b = None
        if self.random.random() < 0.6:
            fitting = [
                view.repeated(a.shape)
                for view in self.known
                if view.strides[2] == 1 and view.buffer.space in {Space.TILE, Space.SHARED}
                and all(have in {1, wanted} for have, wanted in zip(view.shape, a.shape, strict=True))
                and view.shape[2] == a.shape[2]
            ]  # fmt: skip
            b = self.random.choice(fitting)
            if b.shape != a.shape:
                b = None
        shape = (a.shape[0], 1, a.shape[2])
        self.emit(SumProducts(a, b, self.new(shape, self.is_shared(a, b))), a.shape[1] ** 0.5 * self.size(a, b))

    def pair(self) -> tuple[View, View] | None:
        """Return two arrays with the same number of columns, to sum over them, or ``None``."""
        a = self.dense()
        if a is None or a.shape[0] > 1:
            return None
        others = [
            view
            for view in self.known
            if view.strides[2] == 1 and view.buffer.space in {Space.TILE, Space.SHARED}
            and view.shape[2] == a.shape[2] and view.shape[0] == 1
        ]  # fmt: skip
        return a, self.random.choice(others)

    def contract(self) -> None:
        if pair := self.pair():
            a, b = pair
            out = self.new((1, a.shape[1], b.shape[1]), self.is_shared(a, b))
            self.emit(Contract(a, b, out), a.shape[2] ** 0.5 * self.size(a, b))

    def congruence(self) -> None:
        if pair := self.pair():
            a, b = pair
            if a.shape[1] ** 2 * b.shape[1] <= MOST_NUMBERS:
                out = self.new((a.shape[1], a.shape[1], b.shape[1]), self.is_shared(a, b))
                self.emit(Congruence(a, b, out), a.shape[2] ** 0.5 * self.size(a, a, b))

    def join(self) -> None:
        """Copy two arrays side by side into one."""
        first = self.pick(lambda view: view.shape[2] <= MOST_NUMBERS // 40)
        if first is None:
            return
        second = self.like((*first.shape[:2], self.random.choice(WIDTHS)))
        width = first.shape[2] + second.shape[2]
        whole = self.new((*first.shape[:2], width))
        at = first.shape[2]
        known = list(self.known)
        for source, out in ((first, whole.part(2, 0, at)), (second, whole.part(2, at, width))):
            self.steps.append(Map((source,), (), ((0, out),)))
        self.known = known
        if whole.buffer.space is not Space.OUTPUT:
            self.known.append(whole)
            self.magnitudes[id(whole.buffer)] = max(self.size(first), self.size(second))


def random_case(seed: int, vector: int = 16, count: int = 14) -> Case:
    """Return a valid program of random steps; all arrays that are left at the end are copied to outputs.

    Args:
        seed: Seed of everything random.
        vector: Columns of arrays are padded to a multiple of this.
        count: Approximate number of steps.
    """
    random = Random(seed)
    writer = _Writer(random, vector, torch.Generator().manual_seed(seed))
    each = {"x": random.choice(WIDTHS)}
    shared: dict[str, int] = {}
    writer.known.append(View(Buffer(Space.INPUT, each["x"], "x"), (1, 1, each["x"]), (0, 0, 1)))
    k, d, is_shared = random.choice(EXTENTS), random.choice(WIDTHS), random.random() < 0.5
    (shared if is_shared else each)["directions"] = k * d
    directions = Buffer(Space.INPUT, k * d, "directions", is_shared=is_shared)
    writer.known.append(View(directions, (1, k, d), (0, d, 1)))
    kinds = [writer.product] * 5 + [writer.map] * 4
    kinds += [writer.sum_products, writer.contract, writer.congruence, writer.congruence, writer.join]
    for _ in range(count):
        random.choice(kinds)()
        if random.random() < 0.3:
            writer.retire()
    for view in writer.known[2:]:
        writer.steps.append(Map((view,), (), ((0, writer.output(view.shape)),)))
    sizes = writer.sizes[Space.TILE], writer.sizes[Space.SHARED]
    program = Program(tuple(writer.once), tuple(writer.steps), *sizes, vector, tuple(writer.constants))
    return Case(program, shared, each)
