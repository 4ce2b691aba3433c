"""Programs: the steps of a plan on arrays that are laid out in memory, ready for a backend.

A program is data. All arrays have the axes (rows, outer, inner, columns); most have one outer entry, and k tangents
or m adjoints as inner entries. A step treats every row alike:

    Product      C[o, i, j] = Σ_k A[o, i, k] B[o, k, j] + D[o, i, j], then E = α C ⊙ S + F ⊙ T
    Map          pointwise instructions on arrays of one shape
    SumProducts  C[o, 0, w] = Σ_i A[o, i, w] B[o, i, w]
    Contract     C[k, m] = Σ_w A[k, w] B[m, w]
    Congruence   C[a, b, m] = Σ_w A[a, w] B[m, w] A[b, w]

Rows are computed in tiles. Memory has five spaces: constants of the network; inputs and outputs of a call; memory of
a tile, which is used again for the next one; and memory that all tiles of a call share.

Invariants that layout establishes and backends keep:

* A view has the full shape of its step; where one entry serves several, the stride is 0.
* Arrays in TILE and SHARED memory have unit column stride unless a product or a map scatters into them. Their
  offsets, sizes and outer and inner strides are multiples of the program's vector, and the numbers between the last
  column and the next multiple of the vector are zero: the step that writes the columns writes these zeros too
  (:meth:`Program.padding`). ``SumProducts``, ``Contract`` and ``Congruence`` may therefore read whole vectors of
  their inputs, which are TILE, SHARED or CONSTANT arrays of unit column stride.
* Pieces of an array are written from left to right, so that the zeros after one are overwritten by the next.
* A product's B is a constant, or an array in TILE or SHARED memory whose columns are adjacent.
* A step never writes what it reads, except that a map may write an output onto one of its inputs, entry by entry, and
  that a product may add D in place (C is D).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from hessquik.pointwise import PRIMITIVES
from hessquik.strided import Space, View

__all__ = [
    "Congruence",
    "Contract",
    "Instruction",
    "Map",
    "Product",
    "Program",
    "Scaling",
    "Step",
    "SumProducts",
]


@dataclass(frozen=True, slots=True)
class Scaling:
    """E = α C ⊙ S + F ⊙ T of a product C.

    Attributes:
        out: E.
        alpha: α.
        by: S, or ``None`` for 1.
        add: F, or ``None`` for 0.
        add_by: T, or ``None`` for 1; only with F.
    """

    out: View
    alpha: float = 1.0
    by: View | None = None
    add: View | None = None
    add_by: View | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """C[o, i, j] = Σ_k A[o, i, k] B[o, k, j] + D[o, i, j].

    Attributes:
        a: A (outer, inner, depth).
        b: B (outer, depth, columns): a constant that all outer entries share (outer stride 0), or an array per row.
        add: D, or ``None`` for 0; a constant bias has inner stride 0.
        out: C, or ``None`` if only the scaling reads it.
        scaling: E, or ``None``.
    """

    a: View
    b: View
    add: View | None
    out: View | None
    scaling: Scaling | None = None

    @property
    def operations(self) -> int:
        """Floating-point operations per row."""
        outer, inner, depth = self.a.shape
        return 2 * outer * inner * depth * self.b.shape[2]

    def reads(self) -> Iterator[View]:
        """Return the arrays that are read."""
        scaling = self.scaling
        more = () if scaling is None else (scaling.by, scaling.add, scaling.add_by)
        return (view for view in (self.a, self.b, self.add, *more) if view is not None)

    def writes(self) -> Iterator[View]:
        """Return the arrays that are written."""
        scaled = None if self.scaling is None else self.scaling.out
        return (view for view in (self.out, scaled) if view is not None)

    def __str__(self) -> str:
        """Return the formula with its arrays."""
        text = f"{self.a} @ {self.b}" + (f" + {self.add}" if self.add else "")
        text = f"{self.out} = {text}" if self.out else text
        if self.scaling:
            s = self.scaling
            factors = [f"{s.alpha:g}" if s.alpha != 1 else "", "·", f"* {s.by}" if s.by else ""]
            added = f" + {s.add}" + (f" * {s.add_by}" if s.add_by else "") if s.add else ""
            text += f"; {s.out} = {' '.join(filter(None, factors))}{added}"
        return f"product      {text}"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One pointwise operation on registers.

    Attributes:
        op: A name in :data:`hessquik.pointwise.PRIMITIVES`.
        inputs: Registers that it reads, or constants (``float``).

    Registers are numbered: first the map's inputs, in order, then the results of its instructions, in order.
    """

    op: str
    inputs: tuple[int | float, ...]


@dataclass(frozen=True, slots=True)
class Map:
    """Pointwise instructions on arrays of one shape.

    Attributes:
        inputs: Arrays that are read, one into each of the first registers.
        instructions: Operations, each with a result in the next register.
        outputs: Registers that are stored, each with its array.
    """

    inputs: tuple[View, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[tuple[int, View], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Entries of outer, inner and columns."""
        return self.outputs[0][1].shape

    @property
    def operations(self) -> int:
        """Floating-point operations per row."""
        return prod(self.shape) * sum(PRIMITIVES[step.op].operations for step in self.instructions)

    def reads(self) -> Iterator[View]:
        """Return the arrays that are read."""
        return iter(self.inputs)

    def writes(self) -> Iterator[View]:
        """Return the arrays that are written."""
        return (view for _, view in self.outputs)

    def __str__(self) -> str:
        """Return the instructions with their arrays."""
        names: list[str] = [str(view) for view in self.inputs]
        short = [f"r{i}" for i in range(len(self.inputs) + len(self.instructions))]
        lines = [f"{short[i]} = {name}" for i, name in enumerate(names)]
        for i, step in enumerate(self.instructions, len(names)):
            arguments = ", ".join(short[x] if isinstance(x, int) else f"{x:g}" for x in step.inputs)
            lines.append(f"{short[i]} = {step.op}({arguments})")
        lines += [f"{view} = {short[register]}" for register, view in self.outputs]
        return f"map          {'; '.join(lines)}"


@dataclass(frozen=True, slots=True)
class _Sum:
    """A sum over one axis of products of two arrays."""

    a: View
    b: View | None
    out: View

    def reads(self) -> Iterator[View]:
        """Return the arrays that are read."""
        return (view for view in (self.a, self.b) if view is not None)

    def writes(self) -> Iterator[View]:
        """Return the array that is written."""
        return iter((self.out,))


@dataclass(frozen=True, slots=True)
class SumProducts(_Sum):
    """C[o, 0, w] = Σ_i A[o, i, w] B[o, i, w], or Σ_i A[o, i, w] where B is ``None``."""

    @property
    def operations(self) -> int:
        """Floating-point operations per row."""
        return 2 * prod(self.a.shape)

    def __str__(self) -> str:
        """Return the formula with its arrays."""
        return f"sum products {self.out} = Σ {self.a}" + (f" * {self.b}" if self.b else "")


@dataclass(frozen=True, slots=True)
class Contract(_Sum):
    """C[0, k, m] = Σ_w A[0, k, w] B[0, m, w]."""

    b: View

    @property
    def operations(self) -> int:
        """Floating-point operations per row."""
        return 2 * self.a.shape[1] * self.b.shape[1] * self.a.shape[2]

    def __str__(self) -> str:
        """Return the formula with its arrays."""
        return f"contract     {self.out} = {self.a} · {self.b}"


@dataclass(frozen=True, slots=True)
class Congruence(_Sum):
    """C[a, b, m] = Σ_w A[0, a, w] B[0, m, w] A[0, b, w], symmetric in a and b."""

    b: View

    @property
    def operations(self) -> int:
        """Floating-point operations per row; only one triangle of the symmetric result is computed."""
        d, m = self.a.shape[1], self.b.shape[1]
        return (d * (d + 1) + d) * m * self.a.shape[2]

    def __str__(self) -> str:
        """Return the formula with its arrays."""
        return f"congruence   {self.out} = {self.a} diag {self.b} {self.a}ᵀ"


Step = Product | Map | SumProducts | Contract | Congruence


@dataclass(frozen=True)
class Program:
    """The steps of a plan, and the memory that they need.

    Attributes:
        once: Steps that run once, at the beginning of a call, since their results are valid for all of its tiles.
            Those that write SHARED memory run for one row. Those that write TILE memory run for every row of a tile;
            no other step writes there.
        steps: Steps of a tile, in order.
        tile_size: Numbers of TILE memory per row of a tile.
        shared_size: Numbers of SHARED memory.
        vector: The columns of TILE and SHARED arrays are padded with zeros to a multiple of this.
        constants: Tensors in float64 or float32.
        derived: What follows from the steps alone, by name; programs that differ in their constants share it.
    """

    once: tuple[Step, ...]
    steps: tuple[Step, ...]
    tile_size: int
    shared_size: int
    vector: int = 16
    constants: tuple[Tensor, ...] = ()
    derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def derive(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return what follows from the steps alone; it is made once."""
        if name not in self.derived:
            self.derived[name] = make()
        return self.derived[name]

    def constant(self, view: View) -> Tensor:
        """Return the entries of a constant view."""
        data = self.constants[view.buffer.constant]
        return data.as_strided(view.shape, view.strides, data.storage_offset() + view.offset)

    def padding(self, view: View) -> int:
        """Return how many numbers after the columns of a written array its step sets to zero.

        In TILE and SHARED memory these are the numbers up to the next multiple of the vector. There are none where
        the columns are scattered or rows have no padding between them.
        """
        rows = zip(view.shape[:2], view.strides[:2], strict=True)
        is_scattered = view.shape[2] > 1 and view.strides[2] != 1
        has_no_gaps = any(extent > 1 and stride % self.vector for extent, stride in rows)
        if not view.buffer.space.is_inside or is_scattered or has_no_gaps:
            return 0
        return -(view.offset + view.shape[2]) % self.vector

    @property
    def operations(self) -> int:
        """Floating-point operations per row."""
        return int(self.derive("operations", lambda: sum(step.operations for step in self.steps)))

    @property
    def moved(self) -> int:
        """Numbers per row that steps read and write, constants excluded, each counted once per step."""
        return int(self.derive("moved", self._moved))

    def _moved(self) -> int:
        views = (view for step in self.steps for view in (*step.reads(), *step.writes()))
        return sum(view.size for view in views if view.buffer.space is not Space.CONSTANT)

    @property
    def matrix_size(self) -> int:
        """Numbers of the constant matrices that products read; a matrix and its transpose are two."""
        return int(self.derive("matrix_size", self._matrix_size))

    def _matrix_size(self) -> int:
        factors = [step.b for step in self.steps if isinstance(step, Product)]
        matrices = {(b.buffer.constant, b.strides): b.size for b in factors if b.buffer.space is Space.CONSTANT}
        return sum(matrices.values())

    def __str__(self) -> str:
        """Return one line per step."""
        return "\n".join([*(f"once {step}" for step in self.once), *map(str, self.steps)])
