"""Lowering of a graph to a program: the grouping of operations into steps, and the placement of arrays in memory.

Three decisions are made here, each in separate functions:

* **Fusion.** An addition after a product becomes part of it; a scaling α C ⊙ S + F ⊙ T after a product becomes its
  epilogue; pointwise operations of one shape become one map; a product of arrays that is summed over its tangents
  becomes one step.
* **Placement.** A result is written directly to its destination: to an output, also transposed, or next to the other
  operands of a contraction. Nodes that depend on no row are computed once per call.
* **Memory.** Arrays whose lifetimes do not overlap share memory.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod

from hessquik.graph import VIEWS, Graph, Node
from hessquik.recent import Recent
from hessquik.steps import (
    Congruence,
    Contract,
    Instruction,
    Map,
    Product,
    Program,
    Scaling,
    Step,
    SumProducts,
)
from hessquik.strided import Buffer, Space, View, collapsed

__all__ = ["lay_out"]

#: Most instructions of a map: the vectors of so many results fit in an interpreter's cache.
MAX_INSTRUCTIONS = 24


@dataclass(slots=True)
class _Fusion:
    """A product and the nodes that are computed with it.

    Attributes:
        raw: The node that is C = A B + D.
        add: The node D.
        first: The node of the scaling that reads C.
        scaled: The node that is E, if there is one.
        alpha, by, scale_add, scale_add_by: α and the nodes S, F, T.
    """

    raw: int
    add: int | None = None
    first: int | None = None
    scaled: int | None = None
    alpha: float = 1.0
    by: int | None = None
    scale_add: int | None = None
    scale_add_by: int | None = None


@dataclass(slots=True)
class _MapDraft:
    """A map under construction, to which operations can be added."""

    shape: tuple[int, ...]
    members: list[int] = field(default_factory=list)


#: Bytes of the steps that are kept, and what those of a node take with their translation for a backend, about.
RECENT_BYTES, NODE_BYTES = 16 << 20, 2048
#: Steps that were laid out last, and the nodes of their constants, by the structure of graphs.
recent: Recent[tuple[Program, list[int]]] = Recent(RECENT_BYTES)


def lay_out(graph: Graph, lanes: int) -> Program:
    """Return the program of a graph for vectors of ``lanes`` numbers.

    Graphs of one structure, as networks of one architecture have, share the steps.
    """
    key = graph.structure(), lanes
    program, constants = recent.get(key, lambda: _Layout(graph, lanes).finish(), NODE_BYTES * len(graph.nodes))
    data = (graph.nodes[i].data for i in constants)
    return replace(program, constants=tuple(array for array in data if array is not None))


class _Layout:
    def __init__(self, graph: Graph, lanes: int) -> None:
        self.graph, self.nodes, self.lanes = graph, graph.nodes, lanes
        self.uses = graph.uses()
        self.results = set(graph.outputs.values())
        self.fusions: dict[int, _Fusion] = {}
        self.absorbed: set[int] = set()
        self.summed: set[int] = set()
        self.owner: dict[int, int] = {}
        self.destination: dict[int, View] = {}
        self.arrays: dict[int, View] = {}
        self.constants: list[int] = []
        self.position: dict[int, int] = {}
        self.steps: list[Step | _MapDraft] = []
        #: Positions of the steps that run once per call, and those of the last of these and of the others.
        self.once: set[int] = set()
        self.last = {True: -1, False: -1}
        self.scattered: set[int] = set()
        self.externals: dict[str, Buffer] = {}
        self.padded_copies: dict[int, View] = {}

    def finish(self) -> tuple[Program, list[int]]:
        """Run all stages in order, and return the program without its constants, and the nodes that these are."""
        for i, node in enumerate(self.nodes):
            if node.op == "matmul":
                self.fuse_product(i)
            elif node.op == "sum":
                self.fuse_sum(node)
        self.place_outputs()
        joined = {i: self.place_terms(i) for i, node in enumerate(self.nodes) if self.is_sum_of_products(node)}
        for i, node in enumerate(self.nodes):
            if i in self.absorbed or node.op in VIEWS or node.op in {"constant", "input"}:
                continue
            if node.is_pointwise:
                self.position[i] = self.emit_pointwise(i)
                continue
            if self.is_sum_of_products(node):
                self.emit_sum_of_products(i, joined[i])
            else:
                getattr(self, f"emit_{node.op}")(i)
            self.position[i] = len(self.steps) - 1
        self.copy_outputs()
        done = [(place in self.once, step) for place, draft in enumerate(self.steps) for step in self.finished(draft)]
        once, steps = ([step for is_once, step in done if is_once is wanted] for wanted in (True, False))
        tile_size, shared_size = self.assign_memory(once, steps)
        return Program(tuple(once), tuple(steps), tile_size, shared_size, self.lanes), self.constants

    # ---- Fusion ----

    def fuse_product(self, i: int) -> None:
        """Find the operations that can be fused with the product ``i``."""
        fusion = _Fusion(raw=i)
        self.fusions[i] = fusion
        step = self.only_use(i)
        if step is not None and self.nodes[step].op == "add" and self.has_shape_of(step, i):
            other = self.other(step, i)
            if self.is_ready(other, i):
                fusion.raw, fusion.add = step, other
                self.absorb(step, i)
        self.fuse_scaling(i, fusion)

    def fuse_scaling(self, i: int, fusion: _Fusion) -> None:
        """Find the longest chain α C ⊙ S + F ⊙ T after C whose other operands are computed before C."""
        current, readers = fusion.raw, self.uses[fusion.raw]
        while fusion.scale_add is None:
            step = next((step for step in readers if self.extends_scaling(i, fusion, current, step)), None)
            if step is None:
                return
            current = fusion.scaled = step
            fusion.first = step if fusion.first is None else fusion.first
            self.absorb(step, i)
            only = self.only_use(current)
            readers = [] if only is None else [only]

    def extends_scaling(self, i: int, fusion: _Fusion, current: int, step: int) -> bool:
        """Add one operation to a scaling, if it fits, and return whether it did."""
        node = self.nodes[step]
        if step in self.absorbed or not self.has_shape_of(step, current) or node.op not in {"mul", "add"}:
            return False
        other = self.other(step, current)
        if node.op == "mul":
            return other != current and self.extends_by_factor(i, fusion, other)
        is_alone = current != fusion.raw or self.only_use(current) is not None
        return other != current and is_alone and self.extends_by_term(i, fusion, step, other)

    def extends_by_factor(self, i: int, fusion: _Fusion, factor: int) -> bool:
        """Use a factor as α or S, if possible; return whether it was used."""
        number = self.nodes[factor].number
        if number is not None:
            fusion.alpha *= number
        elif fusion.by is None and self.is_ready(factor, i):
            fusion.by = factor
        else:
            return False
        return True

    def extends_by_term(self, i: int, fusion: _Fusion, step: int, term: int) -> bool:
        """Use a term as F, or as F ⊙ T if it is a product that nothing else reads; return whether it was used."""
        node = self.nodes[term]
        if node.op == "mul" and self.only_use(term) == step and term not in self.absorbed:
            left, right = sorted(node.inputs, key=lambda j: self.nodes[j].shape != node.shape)
            if self.is_ready(left, i) and self.is_ready(right, i):
                fusion.scale_add, fusion.scale_add_by = left, right
                self.absorbed.add(term)
                return True
        fusion.scale_add = term if self.is_ready(term, i) else None
        return fusion.scale_add is not None

    def is_ready(self, i: int, product: int) -> bool:
        """Return whether a node is computed before a product and has adjacent columns in memory."""
        return self.is_before(i, product) and self.is_row_like(i, product)

    def fuse_sum(self, node: Node) -> None:
        """Fuse a sum over tangents with the product of arrays that it sums, if nothing else reads the product."""
        (j,) = node.inputs
        inner = self.nodes[j]
        is_free = inner.op == "mul" and self.only_use(j) is not None and j not in self.absorbed
        if is_free and all(self.nodes[k].shape == inner.shape for k in inner.inputs):
            self.absorbed.add(j)
            self.summed.add(j)

    def only_use(self, i: int) -> int | None:
        """Return the one node that reads ``i``, unless ``i`` is a result."""
        uses = set(self.uses[i])
        return next(iter(uses)) if len(uses) == 1 and i not in self.results else None

    def other(self, step: int, i: int) -> int:
        """Return the other operand of ``step`` than ``i``."""
        left, right = self.nodes[step].inputs
        return right if left == i else left

    def has_shape_of(self, step: int, i: int) -> bool:
        """Return whether two nodes are matrices of one shape, and all rows share both of them or neither."""
        a, b = self.nodes[step], self.nodes[i]
        return a.shape == b.shape and len(a.shape) == 2 and a.is_shared == b.is_shared

    def absorb(self, step: int, product: int) -> None:
        """Mark a node as computed by a product's step."""
        self.absorbed.add(step)
        self.owner[step] = product

    def is_before(self, i: int, product: int) -> bool:
        """Return whether a node is computed before a product."""
        while self.nodes[i].op in VIEWS:
            (i,) = self.nodes[i].inputs
        return self.nodes[i].op in {"constant", "input"} or self.owner.get(i, i) < product

    def is_row_like(self, i: int, product: int) -> bool:
        """Return whether a node has as many columns as a product, adjacent in memory."""
        if self.nodes[i].shape[-1] != self.nodes[product].shape[-1] or self.nodes[i].number is not None:
            return False
        while self.nodes[i].op in VIEWS:
            if self.nodes[i].op in {"permute", "diagonal"}:
                return False
            (i,) = self.nodes[i].inputs
        return True

    # ---- Placement ----

    def whole(self, columns: int) -> int:
        """Return a number of columns rounded up to whole vectors."""
        return -(-columns // self.lanes) * self.lanes

    def new(self, shape: tuple[int, ...], space: Space) -> View:
        """Return a new array, its rows padded to whole vectors: of columns, or of the last two of three axes."""
        *outer, columns = shape
        inner = outer.pop() if len(shape) > 2 else 1
        pitch = self.whole(inner * columns)
        strides = [pitch]
        for extent in reversed(outer[1:]):
            strides.insert(0, strides[0] * extent)
        buffer = Buffer(space, prod(outer) * pitch, is_shared=space is Space.SHARED)
        return View(buffer, shape, (*strides, *((columns,) if len(shape) > 2 else ()), 1))

    def space_of(self, node: Node) -> Space:
        """Return the memory space of a computed node."""
        return Space.SHARED if node.is_shared else Space.TILE

    def external(self, space: Space, name: str, shape: tuple[int, ...], is_shared: bool = False) -> View:
        """Return the array of an input or output, which has dense rows."""
        if name not in self.externals:
            self.externals[name] = Buffer(space, prod(shape), name, is_shared=is_shared)
        strides = list(accumulate(reversed(shape[1:]), int.__mul__, initial=1))
        return View(self.externals[name], shape, tuple(reversed(strides)))

    def place_outputs(self) -> None:
        """Place the node that computes each output directly in the output, through the views between them."""
        for name, output in self.graph.outputs.items():
            i = output
            place: View | None = self.external(Space.OUTPUT, name, self.nodes[i].shape)
            while place is not None and self.nodes[i].op in {"permute", "reshape"}:
                (source,) = self.nodes[i].inputs
                place = self.undone(i, place)
                i = source
            node = self.nodes[i]
            is_computed = node.op not in VIEWS and node.op not in {"constant", "input"} and not node.is_shared
            if place is not None and is_computed and i not in self.destination:
                self.destination[i] = place

    def undone(self, view: int, place: View) -> View | None:
        """Return the array of the input of a permutation or reshape whose result is in ``place``."""
        node = self.nodes[view]
        if node.op == "reshape":
            return place.reshaped(self.nodes[node.inputs[0]].shape)
        return place.permuted(tuple(node.arguments.index(axis) for axis in range(len(node.arguments))))

    def is_sum_of_products(self, node: Node) -> bool:
        """Return whether a node is a contraction or a congruence."""
        return node.op in {"contract", "congruence"}

    def place_terms(self, i: int) -> list[View | None]:
        """Place the terms on each side of a sum of several products next to each other."""
        inputs = self.nodes[i].inputs
        count = len(inputs) // 2
        return [self.place_side(inputs[:count]), self.place_side(inputs[count:])] if count > 1 else [None, None]

    def place_side(self, terms: tuple[int, ...]) -> View:
        """Return an array with room for all terms, each padded to whole vectors, and place those that can be."""
        columns = sum(self.whole(self.nodes[j].shape[-1]) for j in terms)
        inner = max(self.nodes[j].shape[-2] for j in terms)
        is_shared = all(self.nodes[j].is_shared for j in terms)
        joint = self.new((inner, columns), Space.SHARED if is_shared else Space.TILE)
        for j, place in self.slots(joint, terms):
            node = self.nodes[j]
            is_computed = node.op not in VIEWS and node.op not in {"constant", "input"}
            if is_computed and node.is_shared == is_shared and node.shape[-2] == inner and j not in self.destination:
                self.destination[j] = place
        return joint

    def slots(self, joint: View, terms: tuple[int, ...]) -> Iterator[tuple[int, View]]:
        """Yield each term with its columns of the joint array, which begin at whole vectors."""
        start = 0
        for j in terms:
            columns = self.nodes[j].shape[-1]
            yield j, joint.part(-1, start, start + columns)
            start += self.whole(columns)

    def array(self, i: int) -> View:
        """Return the array of a computed node, which is chosen on first use."""
        if i not in self.arrays:
            self.arrays[i] = self.destination.get(i) or self.allocate(i)
        return self.arrays[i]

    def allocate(self, i: int) -> View:
        """Return a new array for a node; if a chain of views alone reads it, its layout makes their result dense."""
        chain, last = [], i
        while (step := self.only_use(last)) is not None and self.nodes[step].op in {"permute", "reshape"}:
            if len(self.nodes[step].shape) > len(self.nodes[last].shape):
                break
            chain.append(step)
            last = step
        space = self.space_of(self.nodes[i])
        place: View | None = self.new(self.nodes[last].shape, space)
        for view in reversed(chain):
            place = place and self.undone(view, place)
        return place or self.new(self.nodes[i].shape, space)

    def read(self, i: int) -> View:
        """Return where a node's array can be read."""
        node = self.nodes[i]
        if i in self.arrays:
            return self.arrays[i]
        if node.data is not None:
            buffer = Buffer(Space.CONSTANT, node.data.numel(), constant=len(self.constants), is_shared=True)
            self.constants.append(i)
            self.arrays[i] = View(buffer, node.shape, node.data.stride())
        elif node.op == "input":
            self.arrays[i] = self.external(Space.INPUT, node.arguments[0], node.shape, node.is_shared)
        elif node.op in VIEWS:
            self.arrays[i] = self.view(i)
        else:
            return self.array(i)
        return self.arrays[i]

    def view(self, i: int) -> View:
        """Return the array of a view node: a view of its source's array, or of a copy if a reshape needs one."""
        node = self.nodes[i]
        source = self.read(node.inputs[0])
        if node.op == "permute":
            return source.permuted(node.arguments)
        if node.op == "slice":
            return source.part(-1, *node.arguments)
        if node.op == "diagonal":
            return source.diagonal()
        found = source.reshaped(node.shape)
        if found is not None:
            return found
        copy = self.new(node.shape, self.space_of(node))
        place = copy.reshaped(source.shape)
        assert place is not None, "a new array can be reshaped"
        self.copy(source, [place], node.is_shared)
        return copy

    def padded(self, i: int) -> View:
        """Return a node's array with its columns zero-padded to whole vectors; copy it if it lacks this padding."""
        array = self.read(i)
        if array.buffer.space is Space.CONSTANT and array.strides[-1] == 1:
            return array
        is_even = all(not stride % self.lanes for stride in (array.offset, *array.strides[:-1]))
        is_own = array.buffer.space.is_inside and array.strides[-1] == 1
        if is_own and is_even and not self.is_unpadded(i):
            return array
        if i not in self.padded_copies:
            node = self.nodes[i]
            self.padded_copies[i] = self.new(node.shape, self.space_of(node))
            self.copy(array, [self.padded_copies[i]], node.is_shared)
        return self.padded_copies[i]

    def has_padding(self, places: list[View]) -> bool:
        """Return whether an array among those to be written has a single column, which zeros have to follow."""
        return any(
            place.buffer.space.is_inside and place.shape[-1] == 1 and prod(place.shape) > 1 for place in places
        )

    def is_unpadded(self, i: int) -> bool:
        """Return whether the numbers after the last column, up to a whole vector, may be other than zero."""
        while self.nodes[i].op in {"permute", "reshape"}:
            (i,) = self.nodes[i].inputs
        return self.nodes[i].op in {"cat", "slice", "diagonal"} or i in self.scattered

    # ---- Steps ----

    def append(self, step: Step | _MapDraft, is_shared: bool) -> None:
        """Add a step, which runs once per call if all rows share what it reads."""
        self.last[is_shared] = len(self.steps)
        if is_shared:
            self.once.add(len(self.steps))
        self.steps.append(step)

    def position_of(self, i: int) -> int:
        """Return the position of the step that computes a node, or the source of a view."""
        while self.nodes[i].op in VIEWS:
            (i,) = self.nodes[i].inputs
        return self.position.get(self.owner.get(i, i), -1)

    def copy(self, source: View, places: list[View], is_shared: bool) -> None:
        """Add a step that copies an array."""
        arrays = collapsed([source.repeated(places[0].shape), *places], self.has_padding(places))
        step = Map((arrays[0].in_three_axes(),), (), tuple((0, array.in_three_axes()) for array in arrays[1:]))
        if prod(step.shape):
            self.append(step, is_shared)

    def copy_outputs(self) -> None:
        """Add copies to the outputs that are not computed in place."""
        for name, i in self.graph.outputs.items():
            place = self.external(Space.OUTPUT, name, self.nodes[i].shape)
            if self.read(i).buffer is not place.buffer:
                self.copy(self.read(i), [place], is_shared=False)

    def emit_matmul(self, i: int) -> None:
        """Add a product."""
        node, fusion = self.nodes[i], self.fusions[i]
        is_kept = fusion.first is None or self.only_use(fusion.raw) != fusion.first
        full = node.shape
        a = self.read(node.inputs[0])
        b = self.operand_b(node.inputs[1])
        out = self.array(fusion.raw) if is_kept else None
        a = a.repeated((*full[:-2], *a.shape[-2:]))
        b = b.repeated((*full[:-2], *b.shape[-2:]))
        add = None if fusion.add is None else self.read(fusion.add).repeated(full)
        is_narrow = full[-1] * 2 < self.lanes and full[-2] > full[-1]
        if a.buffer.space is Space.CONSTANT and b.buffer.space is not Space.CONSTANT and is_narrow:
            swap = (*range(len(full) - 2), len(full) - 1, len(full) - 2)
            a, b = b.permuted(swap), a.permuted(swap)
            out = out and out.permuted(swap)
            add = add and add.permuted(swap)
            assert fusion.scaled is None, "a product from the left is not scaled"
            self.scattered.add(fusion.raw)
        scaling = None
        if fusion.scaled is not None:
            by, more, more_by = (
                None if j is None else self.read(j).repeated(full).in_three_axes()
                for j in (fusion.by, fusion.scale_add, fusion.scale_add_by)
            )
            scaling = Scaling(self.array(fusion.scaled).in_three_axes(), fusion.alpha, by, more, more_by)
        self.append(self.merged(a, b, add, out, scaling), node.is_shared)

    def operand_b(self, i: int) -> View:
        """Return the right factor of a product: a constant, or an array whose rows can be read in whole vectors."""
        array = self.read(i)
        has_rows = array.shape[-1] == 1 or array.strides[-1] == 1
        is_readable = array.buffer.space is Space.CONSTANT or (array.buffer.space.is_inside and has_rows)
        return array if is_readable else self.padded(i)

    def merged(self, a: View, b: View, add: View | None, out: View | None, scaling: Scaling | None) -> Product:
        """Return a product; outer entries are joined with inner ones if all share B and the strides allow it."""
        if len(a.shape) == 3 and b.strides[0] == 0 and scaling is None:
            given = (a, add, out)
            flat = [array and array.reshaped((prod(array.shape[:2]), array.shape[2])) for array in given]
            if flat[0] and [array is None for array in flat] == [array is None for array in given]:
                a, add, out, b = flat[0], flat[1], flat[2], View(b.buffer, b.shape[1:], b.strides[1:], b.offset)
        return Product(a.in_three_axes(), b.in_three_axes(), _view(add), _view(out), scaling)

    def emit_pointwise(self, i: int) -> int:
        """Add an operation to a map that can take it, or to a new one, and return the map's position."""
        node = self.nodes[i]
        # What all rows share is computed before anything else is.
        inputs = (j for j in node.inputs if self.nodes[j].is_shared == node.is_shared)
        before = max(map(self.position_of, inputs), default=-1)
        for place in (before, self.last[node.is_shared]):
            draft = self.steps[place] if place >= max(before, 0) else None
            if isinstance(draft, _MapDraft) and self.has_room(draft, node):
                break
        else:
            draft, place = _MapDraft(node.shape), len(self.steps)
            self.append(draft, node.is_shared)
        draft.members.append(i)
        for j in node.inputs:
            if j not in draft.members and self.nodes[j].number is None:
                self.read(j)
        return place

    def has_room(self, draft: _MapDraft, node: Node) -> bool:
        """Return whether a map can take an operation."""
        return draft.shape == node.shape and len(draft.members) < MAX_INSTRUCTIONS

    def emit_sum(self, i: int) -> None:
        """Add a sum over the last axis but one."""
        node = self.nodes[i]
        (j,) = node.inputs
        inner = self.nodes[j]
        left, right = (inner.inputs[0], inner.inputs[1]) if j in self.summed else (j, None)
        a, b = self.padded(left), None if right is None else self.padded(right)
        self.append(SumProducts(a.in_three_axes(), _view(b), self.array(i).in_three_axes()), node.is_shared)

    def emit_sum_of_products(self, i: int, joined: list[View | None]) -> None:
        """Add a contraction or a congruence, after copies of the terms that are not computed in place."""
        node = self.nodes[i]
        count = len(node.inputs) // 2
        sides = []
        for terms, joint in zip((node.inputs[:count], node.inputs[count:]), joined, strict=True):
            if joint is None:
                sides.append(self.padded(terms[0]))
                continue
            for j, place in self.slots(joint, terms):
                if self.read(j) != place:
                    self.copy(self.read(j), [place], self.nodes[j].is_shared)
            sides.append(joint)
        kind = Contract if node.op == "contract" else Congruence
        if prod(node.shape):
            a, b, out = (array.in_three_axes() for array in (*sides, self.array(i)))
            self.append(kind(a, b, out), node.is_shared)

    def emit_pairs(self, i: int) -> None:
        """Add maps that multiply every tangent by itself and by those before it."""
        node = self.nodes[i]
        source, out = self.read(node.inputs[0]).in_three_axes(), self.array(i)
        for a in range(source.shape[1]):
            place = self.packed_row(out, a)
            factors = (source.part(1, 0, a + 1), source.part(1, a, a + 1).repeated(place.shape))
            self.append(Map(factors, (Instruction("mul", (0, 1)),), ((2, place),)), node.is_shared)

    def emit_unpack(self, i: int) -> None:
        """Add copies of every packed row to both triangles of the matrix."""
        source, out = self.read(self.nodes[i].inputs[0]), self.array(i)
        for a in range(self.nodes[i].shape[0]):
            below = out.part(0, a, a + 1).part(1, 0, a + 1)
            beside = out.part(1, a, a + 1).part(0, 0, a + 1).permuted((1, 0, 2))
            self.copy(self.packed_row(source, a), [below, beside], self.nodes[i].is_shared)

    def emit_pack(self, i: int) -> None:
        """Add copies of the rows of the lower triangle to the packed array."""
        source, out = self.read(self.nodes[i].inputs[0]), self.array(i)
        for a in range(source.shape[0]):
            row = source.part(0, a, a + 1).part(1, 0, a + 1)
            self.copy(row, [self.packed_row(out, a)], self.nodes[i].is_shared)

    def emit_cat(self, i: int) -> None:
        """Add copies of the parts, from left to right, so that no padding is left between them."""
        node, out = self.nodes[i], self.array(i)
        widths = [self.nodes[j].shape[-1] for j in node.inputs]
        for j, start in zip(node.inputs, accumulate(widths, initial=0), strict=False):
            place = out.part(-1, start, start + self.nodes[j].shape[-1])
            self.copy(self.read(j), [place], node.is_shared)

    def packed_row(self, packed: View, a: int) -> View:
        """Return row ``a`` of a triangle that is packed row by row, as (1, a + 1, columns)."""
        start = a * (a + 1) // 2
        return packed.part(0, start, start + a + 1).in_three_axes()

    def finished(self, draft: Step | _MapDraft) -> list[Step]:
        """Return the step of a draft, or a step itself, as a list, which is empty if nothing is to be written."""
        if not isinstance(draft, _MapDraft):
            return [draft] if all(prod(view.shape) for view in draft.writes()) else []
        if not prod(draft.shape):
            return []
        members = set(draft.members)
        outside: dict[int, int] = {}
        for i in draft.members:
            for j in self.nodes[i].inputs:
                if j not in members and self.nodes[j].number is None:
                    outside.setdefault(j, len(outside))
        register = {**outside, **{i: len(outside) + place for place, i in enumerate(draft.members)}}
        instructions = []
        for i in draft.members:
            operands = [self.nodes[j].number if j not in register else register[j] for j in self.nodes[i].inputs]
            instructions.append(Instruction(self.nodes[i].op, tuple(x for x in operands if x is not None)))
        kept = [i for i in draft.members if i in self.arrays or i in self.results]
        if not kept:
            return []
        places = [self.array(i) for i in kept]
        arrays = [self.read(j).repeated(draft.shape) for j in outside] + places
        views = [array.in_three_axes() for array in collapsed(arrays, self.has_padding(places))]
        outputs = tuple(zip((register[i] for i in kept), views[len(outside) :], strict=True))
        return [Map(tuple(views[: len(outside)]), tuple(instructions), outputs)]

    # ---- Memory ----

    def assign_memory(self, once: list[Step], steps: list[Step]) -> tuple[int, int]:
        """Give every array its offset and return the sizes of TILE and SHARED memory.

        What a step that runs once writes is kept until the last step of the last tile.
        """
        shared = 0
        lives: dict[int, tuple[int, int, Buffer]] = {}
        for place, step in [*((-1, step) for step in once), *enumerate(steps)]:
            for view in (*step.reads(), *step.writes()):
                buffer = view.buffer
                if buffer.space is Space.SHARED and id(buffer) not in lives:
                    buffer.offset, shared = shared, shared + buffer.size
                first, last, _ = lives.get(id(buffer), (place, len(steps) if place < 0 else place, buffer))
                lives[id(buffer)] = first, max(last, place), buffer
        return _first_fit([life for life in lives.values() if life[2].space is Space.TILE]), shared


def _view(array: View | None) -> View | None:
    """Return an array with the three axes of a step, if there is one."""
    return None if array is None else array.in_three_axes()


def _first_fit(lives: list[tuple[int, int, Buffer]]) -> int:
    """Assign offsets to arrays, each with its first and last step, so that no two live arrays overlap (first fit)."""
    placed: list[tuple[int, Buffer]] = []  # last step and array, by offset
    total = 0
    for start, stop, buffer in sorted(lives, key=lambda life: life[0]):
        offset = 0
        for last, other in placed:
            if last < start:
                continue
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, other.offset + other.size)
        buffer.offset = offset
        total = max(total, offset + buffer.size)
        insort(placed, (stop, buffer), key=lambda life: life[1].offset)
    return total
