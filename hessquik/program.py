"""A program: the steps that compute some quantities of one network for any number of rows.

A program is data. It names arrays, says how they are laid out, and lists steps on them; the machines that run it
are :mod:`hessquik.native` (a CPU kernel) and :mod:`hessquik.machine` (torch, on any device). All arrays have the
axes (rows, outer, inner, columns); most have one outer and several inner entries: k tangents or m adjoints.

    multiply      C = A B + b + D        B: a matrix of the network, or one per row
    activate      σ(z), σ'(z), σ''(z)
    scale         C = α A ⊙ S + D ⊙ T    S and T may have one inner entry for all of A's
    sum_products  C = Σ_inner A ⊙ B
    contract      C[k, m] = Σ_w A[k, w] B[m, w]
    congruence    C[a, b, m] = Σ_w A[a, w] B[m, w] A[b, w]

A scaling of what a product or an activation has just computed follows it: a machine may do both at once, while the
numbers are in its registers. One that does one after the other computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hessquik.activations import hessQuikActivationFunction

__all__ = ["VECTOR_BYTES", "Buffer", "Operation", "Program", "Step", "View", "Writer"]

Operation = Literal["multiply", "activate", "scale", "sum_products", "contract", "congruence"]
#: Columns of workspace arrays are padded to this many bytes, the widest vector register.
VECTOR_BYTES = 64


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory that a program reads or writes.

    Attributes:
        base: ``workspace``, ``constant``, or the name of an input or a quantity.
        size: Numbers per row; of a constant, in all.
        data: The numbers of a constant.
        is_zeroed: The padding behind its columns has to be zero, because sums run over it.
        is_shared: It is the same for all rows: an input, or what follows from such inputs and constants alone.
        offset: Where it begins in a row's share of the workspace.
    """

    base: str
    size: int
    data: Tensor | None = None
    is_zeroed: bool = False
    is_shared: bool = False
    offset: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """Part of a buffer as an array (outer, inner, columns) per row.

    Attributes:
        buffer: The memory.
        shape: Entries of outer, inner and columns.
        strides: Steps between neighbours, in numbers.
        column: Where it begins in the buffer.
    """

    buffer: Buffer
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    column: int = 0

    @property
    def constant(self) -> Tensor | None:
        """The numbers (inner, columns) if they are the same for every row and call."""
        if self.buffer.data is None:
            return None
        return self.buffer.data.as_strided(self.shape[1:], self.strides[1:], self.column)

    @property
    def is_shared(self) -> bool:
        """Whether it is the same for every row of a call."""
        return self.buffer.data is not None or self.buffer.is_shared

    @property
    def row_stride(self) -> int:
        """Step between rows."""
        return 0 if self.is_shared else self.buffer.size

    def columns(self, start: int, stop: int) -> View:
        """Columns ``start`` to ``stop``."""
        shape = (*self.shape[:2], stop - start)
        return replace(self, shape=shape, column=self.column + start * self.strides[2])

    def outer(self, index: int) -> View:
        """One outer entry."""
        return replace(self, shape=(1, *self.shape[1:]), column=self.column + index * self.strides[0])

    def inner(self, start: int, stop: int) -> View:
        """Inner entries ``start`` to ``stop``."""
        shape = (self.shape[0], stop - start, self.shape[2])
        return replace(self, shape=shape, column=self.column + start * self.strides[1])

    def swap(self) -> View:
        """Inner entries and columns exchanged."""
        (a, b, c), (i, j, k) = self.shape, self.strides
        return replace(self, shape=(a, c, b), strides=(i, k, j))


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on arrays.

    Attributes:
        operation: Which one, see the module's table.
        out: C; for ``activate`` the value.
        inputs: A, B or S, b, D, T, in the table's order, ``None`` where there is none; for ``activate`` z and then
            where σ' and σ'' go.
        alpha: α.
        activation: σ.
        operations: Floating-point operations per row.
        follows: It scales the results of the step before it, number by number.
        is_read: Any step but the one that follows it reads C, or it is a result.
    """

    operation: Operation
    out: View
    inputs: tuple[View | None, ...]
    alpha: float = 1.0
    activation: hessQuikActivationFunction | None = None
    operations: int = 0
    follows: bool = False
    is_read: bool = True

    def moved(self) -> tuple[View, ...]:
        """What goes to and from memory if a step that follows is taken along."""
        read = self.inputs[1:] if self.follows else self.inputs
        return (*(view for view in read if view is not None), *((self.out,) if self.is_read else ()))

    def views(self) -> tuple[View, ...]:
        """Everything it reads or writes."""
        return (self.out, *(view for view in self.inputs if view is not None))

    def __str__(self) -> str:
        """The operation with its shapes."""
        names = ", ".join(f"{view.buffer.base}{list(view.shape)}" for view in self.views())
        return f"{'  then ' if self.follows else ''}{self.operation}({names})"


@dataclass(frozen=True, slots=True)
class Program:
    """The steps, and what they cost.

    Attributes:
        once: Steps whose results hold for all tiles of a call.
        steps: Steps of a tile.
        workspace: Numbers per row that the steps use between them.
        zeroed: How many of them, from the first, have to be zero at the start.
        scratch: Numbers that one step may use at a time.
    """

    once: tuple[Step, ...]
    steps: tuple[Step, ...]
    workspace: int
    zeroed: int
    scratch: int

    @property
    def operations(self) -> int:
        """Floating-point operations per row."""
        return sum(step.operations for step in self.steps)

    @property
    def numbers(self) -> int:
        """Numbers per row that go to and from arrays of the row, counted once per step."""
        return sum(
            view.shape[0] * view.shape[1] * view.shape[2]
            for step in self.steps
            for view in step.moved()
            if view.buffer.data is None
        )

    @property
    def matrix_numbers(self) -> int:
        """Numbers of the network's matrices that products read; one and its transpose are two."""
        matrices = {
            (b.buffer.data.data_ptr(), *b.strides): b.shape[1] * b.shape[2]
            for step in self.steps
            if step.operation == "multiply" and (b := step.inputs[1]) is not None and b.buffer.data is not None
        }
        return sum(matrices.values())


@dataclass
class Writer:
    """Writes a program, step by step; what depends on no input is computed at once.

    Attributes:
        dtype: Of all numbers.
        steps: The steps so far.
    """

    dtype: torch.dtype
    steps: list[Step] = field(default_factory=list)
    once: list[Step] = field(default_factory=list)

    def new(self, inner: int, columns: int, is_zeroed: bool = False, is_shared: bool = False) -> View:
        """A workspace array (1, inner, columns), its columns padded to whole vectors."""
        lanes = VECTOR_BYTES // self.dtype.itemsize
        pitch = -(-columns // lanes) * lanes
        buffer = Buffer("workspace", inner * pitch, is_zeroed=is_zeroed, is_shared=is_shared)
        return View(buffer, (1, inner, columns), (0, pitch, 1))

    def constant(self, matrix: Tensor) -> View:
        """The numbers (inner, columns) of a matrix, the same for all rows."""
        data = matrix.to(self.dtype).contiguous()
        return View(Buffer("constant", data.numel(), data), (1, *data.shape), (0, data.shape[1], 1))

    def external(self, base: str, *shape: int, is_shared: bool = False) -> View:
        """An input or result (outer, inner, columns), without padding."""
        outer, inner, columns = (1, 1, *shape)[-3:]
        buffer = Buffer(base, outer * inner * columns, is_shared=is_shared)
        return View(buffer, (outer, inner, columns), (inner * columns, columns, 1))

    def emit(self, operation: Operation, out: View, *inputs: View | None, alpha: float = 1.0, work: int) -> View:
        """Add a step and return what it writes."""
        step = Step(operation, out, inputs, alpha, operations=work)
        # Nothing else is put where these results are, so they hold for the tiles to come.
        stays = out.buffer.is_shared or out.buffer.is_zeroed
        (self.once if stays and _is_shared(*inputs) else self.steps).append(step)
        return out

    def multiply(
        self,
        a: View,
        b: Tensor | View,
        bias: Tensor | None = None,
        add: View | None = None,
        out: View | None = None,
    ) -> View:
        """A B + b + D."""
        if isinstance(b, Tensor):
            if out is None and a.constant is not None and bias is None and (add is None or add.constant is not None):
                product = a.constant.double() @ b.double()
                return self.constant(product if add is None or add.constant is None else product + add.constant)
            b = b.to(self.dtype)
            b = View(Buffer("constant", b.numel(), b), (1, b.shape[0], b.shape[1]), (0, b.stride(0), b.stride(1)))
        depth, columns = b.shape[1:]
        shift = None if bias is None else self.constant(bias.unsqueeze(0))
        out = self.new(a.shape[1], columns, is_shared=_is_shared(a, b, add)) if out is None else out
        return self.emit("multiply", out, a, b, shift, add, work=2 * a.shape[1] * depth * columns)

    def scale(
        self,
        a: View,
        by: View | None = None,
        alpha: float = 1.0,
        add: View | None = None,
        out: View | None = None,
        add_by: View | None = None,
    ) -> View:
        """Α A ⊙ S + D ⊙ T."""
        is_alone = by is None and add_by is None
        if out is None and a.constant is not None and is_alone and (add is None or add.constant is not None):
            scaled = alpha * a.constant
            return self.constant(scaled if add is None or add.constant is None else scaled + add.constant)
        out = self.new(a.shape[1], a.shape[2], is_shared=_is_shared(a, by, add, add_by)) if out is None else out
        work = 2 * a.shape[0] * a.shape[1] * a.shape[2]
        return self.emit("scale", out, a, by, add, add_by, alpha=alpha, work=work)

    def activate(self, activation: hessQuikActivationFunction, z: View, order: int) -> tuple[View, View, View]:
        """σ(z), σ'(z) and σ''(z); what lies above ``order`` is not computed."""
        value, slope, curvature = (self.new(1, z.shape[2]) for _ in range(3))
        wanted = tuple(view if order >= above else None for above, view in ((1, slope), (2, curvature)))
        self.steps.append(Step("activate", value, (z, *wanted), 1.0, activation, 20 * z.shape[2]))
        return value, slope, curvature

    def sum_products(self, a: View, b: View, out: View | None = None) -> View:
        """Σ_inner A ⊙ B."""
        out = self.new(1, a.shape[2], is_zeroed=True) if out is None else out
        return self.emit("sum_products", out, a, b, work=2 * a.shape[1] * a.shape[2])

    def contract(self, a: View, b: View, out: View) -> View:
        """Σ_w A[k, w] B[m, w]."""
        return self.emit("contract", out, a, b, work=2 * a.shape[1] * b.shape[1] * a.shape[2])

    def congruence(self, a: View, c: View, out: View) -> View:
        """Σ_w A[a, w] C[m, w] A[b, w], out with axes (a, b, m)."""
        d, m = a.shape[1], c.shape[1]
        return self.emit("congruence", out, a, c, work=(d * (d + 1) + d) * m * a.shape[2])

    def finish(self) -> Program:
        """Lay the workspace out: arrays whose lives do not overlap share memory, unless their padding is zero.

        Steps whose results nobody reads are left out. What a step and the one that follows it need lives at the same
        time.
        """
        read: set[int] = set()
        self.steps = list(_needed(self.steps, read))[::-1]
        self.once = list(_needed(self.once, read))[::-1]
        groups: list[list[Step]] = []
        for step in self.steps:
            if groups and _follows(step, *groups[-1]):
                groups[-1].append(step)
            else:
                groups.append([step])
        last = {
            id(view.buffer): place for place, group in enumerate(groups) for step in group for view in step.views()
        }
        buffers = {id(view.buffer): view.buffer for step in (*self.once, *self.steps) for view in step.views()}
        size = 0
        for buffer in buffers.values():
            if buffer.is_zeroed:
                buffer.offset, size = size, size + buffer.size
        zeroed = size
        for buffer in buffers.values():
            if buffer.base == "workspace" and buffer.is_shared:
                buffer.offset, size = size, size + buffer.size
        free: dict[int, list[int]] = {}
        placed: set[int] = set()
        for place, group in enumerate(groups):
            here = {id(view.buffer): view.buffer for step in group for view in step.views()}
            here = {
                key: buffer
                for key, buffer in here.items()
                if buffer.base == "workspace" and not buffer.is_zeroed and not buffer.is_shared
            }
            for key, buffer in here.items():
                if key not in placed:
                    placed.add(key)
                    spaces = free.setdefault(buffer.size, [])
                    if spaces:
                        buffer.offset = spaces.pop()
                    else:
                        buffer.offset, size = size, size + buffer.size
            for key, buffer in here.items():
                if last[key] == place:
                    free[buffer.size].append(buffer.offset)
        steps = [
            replace(
                step,
                follows=step is not group[0],
                is_read=step.out.buffer.base != "workspace"
                or step.out.buffer.is_zeroed
                or last[id(step.out.buffer)] != place,
            )
            for place, group in enumerate(groups)
            for step in group
        ]
        widest = max((step.inputs[0].shape[2] for step in steps if step.inputs[0] is not None), default=0)
        return Program(tuple(self.once), tuple(steps), size, zeroed, 4 * (widest + VECTOR_BYTES))


def _needed(steps: list[Step], read: set[int]) -> Iterator[Step]:
    """The steps from the last to the first that write what a later one reads, or a result; ``read`` grows."""
    for step in reversed(steps):
        if any(id(view.buffer) in read or view.buffer.base != "workspace" for view in _written(step)):
            read.update(id(view.buffer) for view in step.views())
            yield step


def _written(step: Step) -> tuple[View, ...]:
    """What a step writes."""
    also = step.inputs[1:] if step.operation == "activate" else ()
    return (step.out, *(view for view in also if view is not None))


def _follows(step: Step, head: Step, *others: Step) -> bool:
    """Whether a step scales, number by number, what the one before it computes."""
    if others or step.operation != "scale" or head.operation not in {"multiply", "activate"}:
        return False
    if step.inputs[0] != head.out or step.out.shape != head.out.shape:
        return False
    arrays = (head.out, *step.views())
    if any(view.strides[2] != 1 or view.shape[0] != 1 or view.shape[2] != head.out.shape[2] for view in arrays):
        return False
    # It writes nothing that other numbers of the first need, and reads nothing that is made of other numbers.
    needed = {id(view.buffer) for view in head.views()}
    read = {id(view.buffer) for view in step.inputs[1:] if view is not None}
    return id(step.out.buffer) not in needed and id(head.out.buffer) not in read


def _is_shared(*views: View | None) -> bool:
    """Whether all of them are the same for every row of a call."""
    return all(view is None or view.is_shared for view in views)
