"""Programs as tables of numbers, which the Triton kernel interprets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hessquik.pointwise import PRIMITIVES
from hessquik.steps import Congruence, Contract, Instruction, Map, Product, Program, Step, SumProducts
from hessquik.strided import Space, View

__all__ = ["LARGEST_ROW_NUMBERS", "OPCODES", "Table"]

#: Numbers per view, step and instruction; slots and kinds of steps, as in :mod:`hessquik.backends.gpu_kernel`.
VIEW, STEP, CODE = 10, 88, 15
CONSTANT, TILE, SHARED, CALL = 0, 1, 2, 4
PRODUCT, MAP, SUM_PRODUCTS, PAIRS = range(4)
HAS_D, HAS_C, HAS_E, HAS_S, HAS_F, HAS_T, IN_GROUPS, IS_ALIGNED = (1 << i for i in range(8))
HAS_B, IS_SYMMETRIC, IS_FLAT = 1, 2, 4
LOAD, STORE, FILL, SPILL, CONDITION = 0, 1, 25, 26, 27
REGISTERS = 8
#: Most inputs and outputs of a call.
CALL_ARRAYS = 24
#: Most numbers of an array per row: offsets within a row are 32-bit integers.
LARGEST_ROW_NUMBERS = 1 << 30

_NAMES = (
    "mul add sub div neg abs where gt ge maximum minimum sqrt exp expm1 log log1p tanh sigmoid erf ndtr atan sin cos"
)
#: The opcode of each primitive. Primitives of similar cost have neighbouring opcodes.
OPCODES = {name: number for number, name in enumerate(_NAMES.split(), 2)}
assert OPCODES.keys() == PRIMITIVES.keys()


@dataclass
class Table:
    """A program as 64-bit integers.

    Args:
        program: The program.
        place: Returns a constant view as a tensor on the device, its columns padded with zeros to whole vectors of
            16 bytes; the caller keeps it alive as long as the table is used.
        lanes: Numbers in 16 bytes.

    Attributes:
        names: Inputs and outputs in the order of their slots.
        numbers: The table.
        spilled: Most values that a map spills from registers to memory.
        inputs: For each input by name, whether all rows share it.
        outputs: Names of the outputs.
    """

    program: Program
    place: Callable[[View], Tensor]
    lanes: int
    names: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    spilled: int = 0
    inputs: dict[str, bool] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Write the steps, then the instructions of their maps."""
        steps = (*self.program.once, *self.program.steps)
        self._code: list[int] = []
        self._code_at = len(steps) * STEP
        for step in steps:
            numbers = self._step(step)
            self.numbers += numbers + [0] * (STEP - len(numbers))
        # The kernel reads one instruction ahead.
        self.numbers += self._code + [0] * CODE

    def _step(self, step: Step) -> list[int]:
        one_row = int(all(view.buffer.space is Space.SHARED for view in step.writes()))
        if isinstance(step, Product):
            return self._product(step, one_row)
        if isinstance(step, Map):
            at = self._code_at + len(self._code)
            count = self._instructions(step)
            outer, inner, columns = step.shape
            padded = columns + max(self.program.padding(view) for view in step.writes())
            is_flat = IS_FLAT if outer == inner == 1 else 0
            return [MAP, is_flat, outer, inner, columns, count, one_row, 0, at, padded]
        if isinstance(step, SumProducts):
            flags = HAS_B if step.b is not None else 0
            return [
                SUM_PRODUCTS,
                flags,
                *step.a.shape,
                0,
                one_row,
                0,
                *self._views(step.a, step.b),
                *self._out(step.out),
            ]
        if isinstance(step, Contract):
            (_, k, w), m = step.a.shape, step.b.shape[1]
            # The result's axis i is its inner axis, j its columns; it has no axis m.
            slot, per_row, more, call_row, row, _, i, j, _, padding = self._out(step.out)
            out = [slot, per_row, more, call_row, row, i, j, 0, 0, padding]
            return [PAIRS, 0, 1, k, m, w, one_row, 0, *self._views(step.a, step.b, None), *out]
        assert isinstance(step, Congruence)
        (_, d, w), m = step.a.shape, step.b.shape[1]
        views = [*self._views(step.a, step.a, step.b), *self._out(step.out)]
        return [PAIRS, IS_SYMMETRIC, m, d, d, w, one_row, 0, *views]

    def _product(self, step: Product, one_row: int) -> list[int]:
        a, b, scaling = step.a, step.b, step.scaling
        flags = 0
        views: list[View | None] = [a, b, step.add, step.out, None, None, None, None]
        if scaling is not None:
            views[4:] = [scaling.by, scaling.add, scaling.add_by, scaling.out]
        present = (HAS_D, HAS_C, HAS_S, HAS_F, HAS_T, HAS_E)
        for flag, view in zip(present, views[2:], strict=True):
            flags |= flag if view is not None else 0
        outer, inner, depth = a.shape
        if outer > 1 or (b.buffer.row_stride and not one_row):
            flags |= IN_GROUPS
        alpha = _bits(1.0 if scaling is None else scaling.alpha)
        places = [self._out(view) if view in (views[3], views[7]) else self._view(view) for view in views]
        for place in places:
            # Without groups, one index counts the inner entries of all rows: add this at each step to the next row.
            place[8] = 0 if flags & IN_GROUPS else place[4] - inner * place[6]
        if all(self._is_aligned(view, places[i], i in {3, 7}) for i, view in enumerate(views)):
            flags |= IS_ALIGNED
        head = [PRODUCT, flags, outer, inner, b.shape[2], depth, one_row, alpha]
        return head + [number for place in places for number in place]

    def _is_aligned(self, view: View | None, place: list[int], is_written: bool) -> bool:
        """Return whether a product may read or write a view in whole vectors of 16 bytes."""
        if view is None:
            return True
        space = view.buffer.space
        if space not in {Space.CONSTANT, Space.TILE, Space.SHARED} or (place[7] != 1 and view.shape[2] > 1):
            return False
        if space is not Space.CONSTANT and self.program.vector % self.lanes:
            return False
        if is_written and (view.shape[2] + place[9]) % self.lanes:
            return False
        _, per_row, more, _, row, outer, inner, _, beyond, _ = place
        return not any(number % self.lanes for number in (per_row, more, row, outer, inner, beyond))

    def _views(self, *views: View | None) -> list[int]:
        return [number for view in views for number in self._view(view)]

    def _out(self, view: View | None) -> list[int]:
        """Return the ten numbers of a view that is written, including the columns of zeros to write after it."""
        numbers = self._view(view)
        if view is not None:
            numbers[9] = self.program.padding(view)
        return numbers

    def _view(self, view: View | None) -> list[int]:
        """Return the ten numbers of a view, as the kernel reads them; zeros for ``None``."""
        if view is None:
            return [0] * VIEW
        buffer = view.buffer
        if buffer.space is Space.CONSTANT:
            data = self.place(view)
            strides = [stride if extent > 1 else 0 for extent, stride in zip(data.shape, data.stride(), strict=True)]
            return [CONSTANT, 0, data.data_ptr() // data.element_size(), 0, 0, *strides, 0, 0]
        if buffer.size > LARGEST_ROW_NUMBERS:
            raise ValueError(f"an array may have {LARGEST_ROW_NUMBERS} numbers per row, {buffer} has {buffer.size}")
        row, per_row, call_row, more = buffer.row_stride, 0, 0, view.offset
        if buffer.space is Space.TILE:
            slot, per_row = TILE, buffer.offset
        elif buffer.space is Space.SHARED:
            slot, more = SHARED, more + buffer.offset
        else:
            slot, call_row = CALL + self._name(view), row
        outer, inner, column = view.strides
        # Zeros after a single column are adjacent to it, so its stride counts as 1.
        return [slot, per_row, more, call_row, row, outer, inner, column if view.shape[2] > 1 else 1, 0, 0]

    def _name(self, view: View) -> int:
        buffer = view.buffer
        if buffer.name not in self.names:
            if len(self.names) == CALL_ARRAYS:
                raise ValueError(f"a program may have {CALL_ARRAYS} inputs and outputs, {buffer.name} is one more")
            self.names.append(buffer.name)
        if buffer.space is Space.INPUT:
            self.inputs[buffer.name] = buffer.is_shared
        else:
            self.outputs.add(buffer.name)
        return self.names.index(buffer.name)

    def _instructions(self, step: Map) -> int:
        """Append a map's instructions to the code, with values assigned to registers; return their number."""
        writer = _MapWriter(step, self._view, self._out)
        self.spilled = max(self.spilled, writer.spilled)
        self._code += writer.code
        return len(writer.code) // CODE


class _MapWriter:
    """Assigns the values of a map to registers and writes its instructions.

    An input is loaded just before its first use, except that inputs which an output overwrites are loaded before
    anything is stored. A result is stored as soon as it is computed. If all registers are in use, the value whose next
    use is furthest away is evicted: it is spilled to memory unless it can be loaded again from its input.
    """

    def __init__(self, step: Map, view: Callable[[View], list[int]], out: Callable[[View], list[int]]) -> None:
        """Write the instructions."""
        self.step, self.view, self.out = step, view, out
        self.code: list[int] = []
        self.spilled = 0
        self._registers: list[int | None] = [None] * REGISTERS
        self._memory: dict[int, int] = {}
        self._uses = self._when_used()
        written = {id(out.buffer) for _, out in step.outputs}
        self._overwritten = {i for i, given in enumerate(step.inputs) if id(given.buffer) in written}
        for i in sorted(self._overwritten):
            self._reg(i, -1, set())
        for i in range(len(step.inputs)):
            self._store(i, -1)
        for now, instruction in enumerate(step.instructions):
            self._write(now, instruction)

    def _when_used(self) -> dict[int, list[int]]:
        uses: dict[int, list[int]] = {}
        for now, instruction in enumerate(self.step.instructions):
            for x in instruction.inputs:
                if not isinstance(x, float):
                    uses.setdefault(x, []).append(now)
        for register, _ in self.step.outputs:
            if register < len(self.step.inputs):
                uses.setdefault(register, []).insert(0, -1)
        return uses

    def _write(self, now: int, instruction: Instruction) -> None:
        value = len(self.step.inputs) + now
        operands = list(instruction.inputs)
        held = {x for x in operands if not isinstance(x, float)}
        number, taken = 0.0, False
        if instruction.op == "where":
            condition = operands.pop(0)
            if isinstance(condition, float):
                number, taken = condition, True
            self._emit(CONDITION, a=self._operand(condition, now, held), number=number)
            number, taken = 0.0, False
        places = []
        for x in operands:
            if isinstance(x, float) and taken and x != number:
                # An instruction holds one number only, so a second one is made in a register first.
                register = self._free(now, held)
                self._registers[register] = -1 - now
                self._emit(OPCODES["add"], register, REGISTERS, REGISTERS, number=x / 2)
                places.append(register)
                continue
            if isinstance(x, float):
                number, taken = x, True
            places.append(self._operand(x, now, held))
        for i, holds in enumerate(self._registers):
            is_last = holds is not None and not any(use > now for use in self._uses.get(holds, ()))
            if is_last:
                self._registers[i] = None
        register = self._free(now, set())
        first, second = (places * 2)[:2]
        self._emit(OPCODES[instruction.op], register, first, second, number)
        self._registers[register] = value
        self._store(value, now)

    def _operand(self, x: int | float, now: int, held: set[int]) -> int:
        return REGISTERS if isinstance(x, float) else self._reg(x, now, held)

    def _store(self, value: int, now: int) -> None:
        """Store a value if it is an output, and free its register if it is not used later."""
        for register, out in self.step.outputs:
            if register == value:
                self._emit(STORE, -1, self._reg(value, now, {value}), view=self.out(out))
        if not any(use > now for use in self._uses.get(value, ())) and value in self._registers:
            self._registers[self._registers.index(value)] = None

    def _reg(self, value: int, now: int, held: set[int]) -> int:
        """Return the register of a value; load the value first if it is in none."""
        if value in self._registers:
            return self._registers.index(value)
        register = self._free(now, held)
        if value in self._memory:
            self._emit(FILL, register, view=[self._memory[value]])
        else:
            assert value < len(self.step.inputs), "a computed value is in a register or in memory"
            self._emit(LOAD, register, view=self.view(self.step.inputs[value]))
        self._registers[register] = value
        return register

    def _free(self, now: int, held: set[int]) -> int:
        """Return a free register; evict the value whose next use is furthest away if there is none."""
        if None in self._registers:
            return self._registers.index(None)
        candidates = [
            i for i, holds in enumerate(self._registers) if holds is not None and holds >= 0 and holds not in held
        ]

        def next_use(i: int) -> int:
            holds = self._registers[i]
            assert holds is not None
            return next((use for use in self._uses.get(holds, ()) if use > now), len(self.step.instructions))

        register = max(candidates, key=next_use)
        value = self._registers[register]
        assert value is not None
        can_load = value < len(self.step.inputs) and value not in self._overwritten
        if not can_load and value not in self._memory:
            self._memory[value] = self.spilled
            self.spilled += 1
            self._emit(SPILL, -1, register, view=[self._memory[value]])
        self._registers[register] = None
        return register

    def _emit(
        self, op: int, out: int = -1, a: int = 0, b: int = 0, number: float = 0.0, view: list[int] | None = None
    ) -> None:
        view = view or []
        self.code += [op, out, a, b, _bits(number), *view, *[0] * (VIEW - len(view))]


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
