"""From the layers of a network and what is asked of it to the cheapest program.

The formulas are those of :mod:`hessquik.calculus`, written as steps instead of carried out. What can be chosen,
and is by counting:

    start      tangents begin with the d unit vectors of x or, if x enters by fewer than d columns [K₁ K₂ …] = QR,
               with the orthonormal rows of Qᵀ: f(x) = g(xQ), so ∇²f = Q ∇²g Qᵀ and Δf = Δg
    order      backward: adjoints give the weights c of a sum of congruences, and Jv from the gradient;
               forward: second derivatives travel along with the tangents, which pays when there are many outputs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from hessquik.calculus import DIRECTIONAL
from hessquik.layers.form import Form, Map
from hessquik.program import VECTOR_BYTES, Program, View, Writer

__all__ = ["Ask", "Plan", "choose"]

#: Floating-point operations that take as long as moving one byte between a core and its caches.
OPERATIONS_PER_BYTE = 2.0
#: What a tile's workspace may take, so that it stays in a core's second-level cache.
TILE_BYTES = 640 << 10
#: What matrices may take, so that they stay there too.
MATRIX_BYTES = 1 << 20
#: Rows of the smallest tile, so that a wide layer's weights are fetched once for a few rows at least.
SMALLEST_TILE_ROWS = 4
#: Rows of the largest tile.
LARGEST_TILE_ROWS = 256

#: Pairs of tangents per output above which second derivatives are not carried forward.
MOST_PAIRS_PER_OUTPUT = 8

Parts = tuple[View | None, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of a network.

    Attributes:
        quantities: Names.
        weights: Rows of λ: ``None``, ``"shared"`` or ``"each"``.
        directions: Likewise for v.
        k: Number of directions.
    """

    quantities: frozenset[str]
    weights: str | None = None
    directions: str | None = None
    k: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """A program and why it was chosen; ``print`` shows both.

    Attributes:
        ask: What it answers.
        start: Where tangents begin: ``x`` or ``reduced``; ``None`` if there are none.
        order: ``backward`` or ``forward``: by adjoints, or by tangents alone.
        rows: Rows of a tile.
        operations: Floating-point operations per row.
        bytes: Bytes per row that steps read and write.
        program: The steps.
        shapes: Of a row's results.
    """

    ask: Ask
    start: str | None
    order: str
    rows: int
    operations: int
    bytes: int
    program: Program
    shapes: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        """The choice and the steps."""
        head = (
            f"{', '.join(sorted(self.ask.quantities))}: tangents from {self.start or 'nowhere'}, {self.order}, "
            f"tiles of {self.rows} rows, {self.operations} operations and {self.bytes} bytes a row"
        )
        return "\n  ".join([head, *map(str, self.program.steps)])


def choose(forms: Sequence[Form], ask: Ask, dtype: torch.dtype, outputs: int) -> Plan:
    """The plan with the least work among all that answer ``ask``."""
    plans = []
    basis = _basis(forms)
    shapes = _shapes(ask, sum(forms[0].widths), outputs if ask.weights is None else 1)
    for order in ("backward", "forward"):
        for start in ("x", "reduced"):
            if start == "reduced" and basis is None:
                continue
            formulas = _Formulas(forms, ask, dtype, None if start == "x" else basis, order == "forward", outputs)
            if formulas.is_possible():
                formulas.write()
                program = formulas.writer.finish()
                moved = program.numbers * dtype.itemsize
                fitting = TILE_BYTES // max(1, program.workspace * dtype.itemsize)
                rows = max(SMALLEST_TILE_ROWS, min(LARGEST_TILE_ROWS, fitting))
                used = start if formulas.has_tangents else None
                plans.append(Plan(ask, used, order, rows, program.operations, moved, program, shapes))

    def cost(plan: Plan) -> float:
        # Matrices that do not stay in the cache are fetched once per tile; the rows of the smallest pay for it.
        fetched = max(0, plan.program.matrix_numbers * dtype.itemsize - MATRIX_BYTES)
        return plan.operations + OPERATIONS_PER_BYTE * (plan.bytes + fetched / SMALLEST_TILE_ROWS)

    return min(plans, key=cost)


def _shapes(ask: Ask, d: int, m: int) -> dict[str, tuple[int, ...]]:
    """The shape of every quantity at one point."""
    k = ask.k
    return {
        "value": (m,),
        "gradient": (d, m),
        "hessian": (d, d, m),
        "laplacian": (m,),
        "hessian_diagonal": (d, m),
        "jvp": (k, m),
        "hvp": (k, d, m),
        "curvature": (k, m),
    }


def _basis(forms: Sequence[Form]) -> Tensor | None:
    """Orthonormal columns Q (d, r) that span everything x is multiplied by, if they are fewer than d."""
    d = sum(forms[0].widths)
    columns: list[Tensor] = []
    for place, form in enumerate(forms):
        if form.widths[-1] != d or (place and not forms[place - 1].carries):
            return None
        maps = [form.into[-1], form.skip[-1]]
        if any(isinstance(linear, float) for linear in maps):
            return None
        columns += [linear for linear in maps if isinstance(linear, Tensor)]
        if not form.carries:
            break
    if not columns or sum(matrix.shape[1] for matrix in columns) >= d:
        return None
    basis: Tensor = torch.linalg.qr(torch.cat(columns, dim=1).double().cpu()).Q
    return basis.to(columns[0].device)


@dataclass(slots=True)
class _Layer:
    """A layer linearised: where its value, slope and curvature are kept."""

    form: Form
    value: View
    widths: tuple[int, ...]
    slope: View | None
    curvature: View | None
    place: slice
    is_last_bend: bool


@dataclass(slots=True)
class _Tangents:
    """Tangents on their way through the layers, and where 𝒥 = [dz …] or its columns' squared norms go."""

    parts: Parts
    had: tuple[int, ...]
    J: View | None = None
    norms: View | None = None
    is_over: bool = False


@dataclass(slots=True)
class _Bends:
    """Tangents on their way, and second derivatives for pairs of them or for the sum of their squares."""

    du: Parts
    d2u: Parts
    had: tuple[int, ...]
    pairs: list[tuple[int, int]]
    sums: int


class _Formulas:
    """Writes one program: the formulas of :mod:`hessquik.calculus`, term by term."""

    def __init__(
        self, forms: Sequence[Form], ask: Ask, dtype: torch.dtype, basis: Tensor | None, is_forward: bool, m: int
    ) -> None:
        self.m = m
        self.forms, self.ask, self.dtype, self.basis, self.is_forward = forms, ask, dtype, basis, is_forward
        self.writer = Writer(dtype)
        self.wanted = ask.quantities
        self.has_tangents = False
        self.d = sum(forms[0].widths)
        self.device = next(
            (matrix.device for form in forms for matrix in (*form.into, *form.skip) if isinstance(matrix, Tensor)),
            torch.device("cpu"),
        )
        lanes = VECTOR_BYTES // dtype.itemsize
        self.hidden = [0 if form.activation.is_linear else -(-_width(form) // lanes) * lanes for form in forms]

    def is_possible(self) -> bool:
        """Whether this way answers what is asked and differs from the others."""
        second = self.wanted & {"hessian", "laplacian", "hessian_diagonal"}
        if self.is_forward and self.wanted & DIRECTIONAL:
            # Along the given directions alone, of which as many are carried as there are.
            return self.basis is None and self.wanted <= {"value", "jvp", "curvature"}
        if self.is_forward:
            tangents = second or self.wanted & {"gradient"}
            if not tangents or self.ask.weights is not None:
                return False
            # Pairs of tangents in place of adjoints: with many more of them than outputs it cannot be cheaper.
            D = self.d if self.basis is None else self.basis.shape[1]
            pairs = D * (D + 1) // 2 if self.wanted & {"hessian", "hessian_diagonal"} else 0
            return pairs <= MOST_PAIRS_PER_OUTPUT * self.m
        return self.basis is None or bool(second)

    def write(self) -> None:
        """Write the steps of every quantity; tangents go along with the value, while a layer's weights are near."""
        w = self.writer
        second = self.wanted & {"hessian", "laplacian", "hessian_diagonal", "hvp", "curvature"}
        first = self.wanted & {"gradient", "jvp"}
        m_out = self.m if self.ask.weights is None else 1
        x = w.external("x", self.d)
        entering, directed, bends = self.entering(), self.directed(), self.bends()
        layers: list[_Layer] = []
        for layer in self.linearize(x, 2 if second else int(bool(first))):
            layers.append(layer)
            for tangents in (entering, directed):
                if tangents is not None and not tangents.is_over:
                    self.push(tangents, layer)
            if bends is not None:
                self.push_second(bends, layer)
        weights, y = self.weights(), layers[-1].value
        if "value" in self.wanted:
            out = w.external("value", m_out)
            if weights is None:
                w.scale(y, out=out)
            else:
                w.contract(w.scale(y, out=w.new(1, self.m, is_zeroed=True)), weights, out)
        if bends is not None and self.wanted & DIRECTIONAL:
            self.read_along(bends, weights, m_out)
        elif bends is not None:
            self.read_bends(bends)
        elif second or first:
            self.pull_all(layers, weights, entering, directed, m_out)

    def weights(self) -> View | None:
        """λ with zeros behind it."""
        if self.ask.weights is None:
            return None
        given = self.writer.external("weights", self.m, is_shared=self.ask.weights == "shared")
        return self.writer.scale(given, out=self.writer.new(1, self.m, is_zeroed=True))

    def entering(self) -> _Tangents | None:
        """The tangents that the sums over hidden units need, all of 𝒥 only for a Hessian or its diagonal."""
        if self.is_forward or not self.wanted & {"hessian", "laplacian", "hessian_diagonal"}:
            return None
        start, hidden = self.start(), sum(self.hidden)
        if self.wanted & {"hessian", "hessian_diagonal"}:
            return _Tangents((start,), (self.d,), J=self.writer.new(start.shape[1], hidden, is_zeroed=True))
        return _Tangents((start,), (self.d,), norms=self.writer.new(1, hidden, is_zeroed=True))

    def directed(self) -> _Tangents | None:
        """The given directions as tangents."""
        if self.is_forward or not self.wanted & {"hvp", "curvature"}:
            return None
        J = self.writer.new(self.ask.k, sum(self.hidden), is_zeroed=True)
        return _Tangents((self.directions(),), (self.d,), J=J)

    def pull_all(
        self,
        layers: list[_Layer],
        weights: View | None,
        entering: _Tangents | None,
        directed: _Tangents | None,
        m: int,
    ) -> None:
        """What needs adjoints: the gradient, and sums over the hidden units with weights c (m, Σw)."""
        w = self.writer
        unit = w.constant(torch.eye(self.m, device=self.device)) if weights is None else weights
        c = w.new(m, sum(self.hidden), is_zeroed=True) if entering or directed else None
        gx = self.pull(layers, (unit, *(None for _ in range(layers[-1].form.carries))), c=c)
        if "gradient" in self.wanted:
            w.scale(gx, out=w.external("gradient", self.d, m).swap())
        if "jvp" in self.wanted:
            self.contract_jvp(gx, m)
        if c is not None and entering is not None:
            self.sum_over_units(entering, c, m)
        if c is not None and directed is not None:
            self.sum_along(layers, directed, c, m)

    def sum_over_units(self, tangents: _Tangents, c: View, m: int) -> None:
        """Hessian, Laplacian and diagonal."""
        w, J = self.writer, tangents.J
        if "laplacian" in self.wanted:
            norms = tangents.norms if J is None else w.sum_products(J, J)
            assert norms is not None
            w.contract(norms, c, w.external("laplacian", 1, m))
        if J is None:
            return
        if self.basis is None:
            self.assemble(J, c, m)
            return
        self.sandwich(w.congruence(J, c, self.middle(J.shape[1], m)))

    def sum_along(self, layers: list[_Layer], tangents: _Tangents, c: View, m: int) -> None:
        """Hv and vᵀHv."""
        w, d, k, J = self.writer, self.d, self.ask.k, tangents.J
        assert J is not None
        if "curvature" in self.wanted:
            squares = w.scale(J, J, out=w.new(k, J.shape[2], is_zeroed=True))
            w.contract(squares, c, w.external("curvature", k, m))
        if "hvp" in self.wanted:
            hvp = w.external("hvp", k, d, m)
            nothing: Parts = tuple(None for _ in range(1 + layers[-1].form.carries))
            if m == 1:  # all directions at once
                gx = self.pull(layers, nothing, extra=(J, c))
                w.scale(gx, out=View(hvp.buffer, (1, k, d), (0, d, 1)))
                return
            extra = w.new(k * m, J.shape[2])
            for i in range(k):
                w.scale(c, J.inner(i, i + 1), out=extra.inner(i * m, (i + 1) * m))
            gx = self.pull(layers, nothing, extra=(extra, None))
            for i in range(k):
                w.scale(gx.inner(i * m, (i + 1) * m), out=hvp.outer(i).swap())

    def assemble(self, J: View, c: View, m: int) -> None:
        """The Hessian and its diagonal from tangents that start at x."""
        w, d = self.writer, self.d
        if "hessian" in self.wanted:
            H = w.external("hessian", d, d, m)
            w.congruence(J, c, H)
            self.diagonal_of(H)
        else:
            squares = w.scale(J, J, out=w.new(d, J.shape[2], is_zeroed=True))
            w.contract(squares, c, w.external("hessian_diagonal", d, m))

    def diagonal_of(self, H: View) -> None:
        """The diagonal of a Hessian that is there."""
        if "hessian_diagonal" in self.wanted:
            d, m = H.shape[1:]
            diagonal = View(H.buffer, (1, d, m), (0, H.strides[0] + H.strides[1], H.strides[2]))
            self.writer.scale(diagonal, out=self.writer.external("hessian_diagonal", d, m))

    def middle(self, s: int, m: int) -> View:
        """A place for M (s, s, m): the outputs last if they fill vectors, as in the Hessian, else first."""
        if "hessian" in self.wanted and m * self.dtype.itemsize >= VECTOR_BYTES // 2:
            M = self.writer.new(s, s * m)
            return View(M.buffer, (s, s, m), (M.strides[1], m, 1))
        M = self.writer.new(m * s, s)
        return View(M.buffer, (s, s, m), (M.strides[1], 1, s * M.strides[1]))

    def sandwich(self, M: View) -> None:
        """Q M_k Qᵀ for every output k, or its diagonal."""
        assert self.basis is not None
        w, d, Q = self.writer, self.d, self.writer.constant(self.basis)
        s, _, m = M.shape
        outer, inner, step = M.strides
        if "hessian" in self.wanted:
            T = w.new(s, d * m)
            pitch = T.strides[1]
            if step == 1:
                for a in range(s):
                    right = View(M.buffer, (1, s, m), (0, inner, 1), a * outer)
                    w.multiply(Q, right, out=View(T.buffer, (1, d, m), (0, m, 1), a * pitch))
            else:
                for k in range(m):
                    left = View(M.buffer, (1, s, s), (0, outer, 1), k * step)
                    w.multiply(left, self.basis.T, out=View(T.buffer, (1, s, d), (0, pitch, m), k))
            H = w.external("hessian", d, d, m)
            w.multiply(Q, T, out=View(H.buffer, (1, d, d * m), (0, d * m, 1)))
            self.diagonal_of(H)
        elif "hessian_diagonal" in self.wanted:
            diagonal = w.external("hessian_diagonal", d, m)
            rows = w.constant(self.basis.T)
            for k in range(m):
                half = w.multiply(View(M.buffer, (1, s, s), (0, outer, 1), k * step), self.basis.T)
                w.sum_products(half, rows, out=View(diagonal.buffer, (1, 1, d), (0, 0, m), k))

    def read_along(self, bends: _Bends, weights: View | None, m: int) -> None:
        """Jv and vᵀHv from what came through all layers."""
        w, k = self.writer, self.ask.k
        for name, found in (("jvp", bends.du[0]), ("curvature", bends.d2u[0])):
            if name in self.wanted:
                out, along = w.external(name, k, m), found or self.zeros(k, self.m)
                if weights is None:
                    w.scale(along, out=out)
                else:
                    w.contract(w.scale(along, out=w.new(k, self.m, is_zeroed=True)), weights, out)

    def contract_jvp(self, gx: View, m: int) -> None:
        """Jv from the gradient."""
        w, k = self.writer, self.ask.k
        directions = w.scale(self.directions(), out=w.new(k, self.d, is_zeroed=True))
        w.contract(directions, w.scale(gx, out=w.new(m, self.d, is_zeroed=True)), w.external("jvp", k, m))

    def bends(self) -> _Bends | None:
        """The second derivatives that are carried forward, for pairs of tangents or for the sum of their squares."""
        if not self.is_forward:
            return None
        if self.wanted & DIRECTIONAL:
            squares = range(self.ask.k) if "curvature" in self.wanted else ()
            return _Bends((self.directions(),), (None,), (self.d,), [(a, a) for a in squares], 0)
        start = self.start()
        D = start.shape[1]
        pairs: list[tuple[int, int]] = []
        if "hessian" in self.wanted or ("hessian_diagonal" in self.wanted and self.basis is not None):
            pairs = [(a, b) for a in range(D) for b in range(a, D)]
        elif "hessian_diagonal" in self.wanted:
            pairs = [(a, a) for a in range(D)]
        sums = int("laplacian" in self.wanted and not pairs)
        return _Bends((start,), (None,), (self.d,), pairs, sums)

    def read_bends(self, bends: _Bends) -> None:
        """Gradient and second derivatives that came through all layers."""
        w, d, m, pairs = self.writer, self.d, self.m, bends.pairs
        D = self.d if self.basis is None else self.basis.shape[1]
        dy, d2y = bends.du[0] or self.zeros(D, m), bends.d2u[0]
        if "gradient" in self.wanted:
            gradient = w.external("gradient", d, m)
            if self.basis is None:
                w.scale(dy, out=gradient)
            else:
                w.multiply(w.constant(self.basis), dy, out=gradient)
        if d2y is None:
            self.flat(m)
            return
        if "laplacian" in self.wanted:
            out = w.external("laplacian", m)
            squares = [d2y] if bends.sums else [d2y.inner(i, i + 1) for i, (a, b) in enumerate(pairs) if a == b]
            for place, square in enumerate(squares):
                w.scale(square, add=out if place else None, out=out)
        if pairs and self.basis is None:
            self.unpack(pairs, d2y, w.external("hessian", d, d, m))
        elif pairs:
            M = self.middle(D, m)
            self.unpack(pairs, d2y, M)
            self.sandwich(M)

    def flat(self, m: int) -> None:
        """Second derivatives of a network that has none."""
        w, d = self.writer, self.d
        zeros = partial(torch.zeros, device=self.device)
        if "laplacian" in self.wanted:
            w.scale(w.constant(zeros(1, m)), out=w.external("laplacian", m))
        if "hessian_diagonal" in self.wanted:
            w.scale(w.constant(zeros(d, m)), out=w.external("hessian_diagonal", d, m))
        if "hessian" in self.wanted:
            H = w.external("hessian", d, d, m)
            w.scale(w.constant(zeros(d, d * m)), out=View(H.buffer, (1, d, d * m), (0, d * m, 1)))

    def unpack(self, pairs: list[tuple[int, int]], d2y: View, H: View) -> None:
        """Pairs (a, b), b ≥ a, to both triangles; or to the diagonal if that is all there is."""
        w = self.writer
        m = d2y.shape[2]
        if "hessian" not in self.wanted and self.basis is None:
            w.scale(d2y, out=w.external("hessian_diagonal", self.d, m))
            return
        for a in {a for a, _ in pairs}:
            mine = [i for i, (left, _) in enumerate(pairs) if left == a]
            row = d2y.inner(mine[0], mine[-1] + 1)
            begin = H.column + a * (H.strides[0] + H.strides[1])
            for step in H.strides[:2]:
                w.scale(row, out=View(H.buffer, (1, len(mine), m), (0, step, H.strides[2]), begin))
        if self.basis is None:
            self.diagonal_of(H)

    def directions(self) -> View:
        """The directions (k, d)."""
        return self.writer.external("directions", self.ask.k, self.d, is_shared=self.ask.directions == "shared")

    def start(self) -> View:
        """The tangents that everything is pushed from."""
        self.has_tangents = True
        eye = torch.eye(self.d, device=self.device)
        return self.writer.constant(eye if self.basis is None else self.basis.T)

    # ---- A chain of layers: the features, tangents and adjoints of one after the other. ----

    def linearize(self, x: View, order: int) -> Iterator[_Layer]:
        """Write the value of one layer after the other and what derivatives up to ``order`` need."""
        w = self.writer
        features: Parts = (x,)
        had: tuple[int, ...] = (self.d,)
        place = 0
        bent = [i for i, form in enumerate(self.forms) if not form.activation.is_linear]
        for i, (form, hidden) in enumerate(zip(self.forms, self.hidden, strict=True)):
            features = self.cut(features, had, form.widths)
            z = self.sum(self.terms(features, form.into), bias=form.bias)
            assert z is not None
            slope = curvature = None
            sigma = z
            if not form.activation.is_linear:
                sigma, slope, curvature = w.activate(form.activation, z, order)
            y = self.sum([*self.terms(features, form.skip), *self.term(sigma, form.out)], bias=form.offset)
            assert y is not None
            features = (y, *(features[-1:] if form.carries else ()))
            had = tuple(0 if part is None else part.shape[2] for part in features)
            is_last = not bent or i == bent[-1]
            yield _Layer(form, y, had, slope, curvature, slice(place, place + _width(form)), is_last)
            place += hidden

    def push(self, tangents: _Tangents, layer: _Layer) -> None:
        """Write dz of a layer into its columns of 𝒥 or of the norms, and dy if a later layer needs it."""
        form, columns = layer.form, (layer.place.start, layer.place.stop)
        parts = self.cut(tangents.parts, tangents.had, form.widths)
        slot = None if tangents.J is None or layer.slope is None else tangents.J.columns(*columns)
        dz = self.sum(self.terms(parts, form.into), out=slot)
        tangents.is_over = layer.is_last_bend
        if not tangents.is_over:
            ds = dz if layer.slope is None or dz is None else partial(self.writer.scale, dz, layer.slope)
            dy = self.sum([*self.terms(parts, form.skip), *self.term(ds, form.out)])
            tangents.parts, tangents.had = (dy, *(parts[-1:] if form.carries else ())), layer.widths
        if tangents.norms is not None and layer.slope is not None and dz is not None:
            self.writer.sum_products(dz, dz, out=tangents.norms.columns(*columns))

    def push_second(self, bends: _Bends, layer: _Layer) -> None:
        """Write dy and the second derivatives of y."""
        w, form = self.writer, layer.form
        needed = len(bends.pairs) + bends.sums
        du, d2u = self.cut(bends.du, bends.had, form.widths), self.cut(bends.d2u, bends.had, form.widths)
        dz = self.sum(self.terms(du, form.into))
        ds = dz if layer.slope is None or dz is None else partial(w.scale, dz, layer.slope)
        dy = self.sum([*self.terms(du, form.skip), *self.term(ds, form.out)])
        d2z = self.sum(self.terms(d2u, form.into)) if needed else None
        d2s: list[Any] = [d2z]
        if needed and dz is not None and layer.slope is not None:
            products = w.sum_products(dz, dz) if bends.sums else self.products(dz, bends.pairs)
            straight = None if d2z is None else partial(w.scale, d2z, layer.slope)
            d2s = [straight, partial(w.scale, products, layer.curvature)]
            if isinstance(form.out, Tensor):  # one product for both
                d2s = [self.sum([term for term in d2s if term is not None])]
        ways = [term for part in d2s for term in self.term(part, form.out)]
        d2y = self.sum([*self.terms(d2u, form.skip), *ways])
        carried = range(form.carries)
        bends.du = (dy, *(du[-1] for _ in carried))
        bends.d2u = (d2y, *(d2u[-1] for _ in carried))
        bends.had = layer.widths

    def products(self, dz: View, pairs: list[tuple[int, int]]) -> View:
        """Dz_a ⊙ dz_b for the pairs, which come in runs of one a with neighbouring b."""
        w = self.writer
        if pairs == [(a, a) for a in range(dz.shape[1])]:
            return w.scale(dz, dz)
        out = w.new(len(pairs), dz.shape[2])
        place = 0
        for a in sorted({a for a, _ in pairs}):
            run = [b for left, b in pairs if left == a]
            w.scale(dz.inner(run[0], run[-1] + 1), dz.inner(a, a + 1), out=out.inner(place, place + len(run)))
            place += len(run)
        return out

    def pull(
        self,
        layers: list[_Layer],
        adjoints: Parts,
        c: View | None = None,
        extra: tuple[View, View | None] | None = None,
    ) -> View:
        """Write the adjoint of x; on the way c = gs ⊙ σ'' into its columns, or let more enter at every z.

        Args:
            layers: All layers, linearised.
            adjoints: Of the features that the last one gives.
            c: Where gs ⊙ σ'' goes.
            extra: Two arrays over all hidden units whose product enters, or one of them alone.
        """
        w = self.writer
        had = layers[-1].widths
        for layer in reversed(layers):
            form = layer.form
            adjoints = self.cut(adjoints, had, layer.widths)
            had = form.widths
            gy = adjoints[0]
            columns = (layer.place.start, layer.place.stop)
            # A multiple of the identity goes with the scaling by the slope.
            alpha = form.out if layer.slope is not None and isinstance(form.out, float) else 1.0
            gs = gy if alpha != 1.0 else self.sum(self.term(gy, _transposed(form.out)))
            if layer.slope is None:
                gz = gs
            else:
                more, by = (None if array is None else array.columns(*columns) for array in extra or (None, None))
                if gs is None:
                    gz = more if more is None or by is None else w.scale(more, by)
                else:
                    if c is not None:
                        w.scale(gs, layer.curvature, alpha, out=c.columns(*columns))
                    gz = w.scale(gs, layer.slope, alpha, add=more, add_by=by)
            into = [self.term(gz, _transposed(linear)) for linear in form.into]
            skip = [self.term(gy, _transposed(linear)) for linear in form.skip]
            carried = adjoints[-1] if form.carries else None
            adjoints = tuple(
                self.sum([*skip[i], *into[i], *([carried] if carried is not None and i == len(skip) - 1 else [])])
                for i in range(len(skip))
            )
        (gx,) = self.cut(adjoints, had, (self.d,))
        return self.zeros(self.rows_of(layers, extra), self.d) if gx is None else gx

    def rows_of(self, layers: list[_Layer], extra: tuple[View, View | None] | None) -> int:
        """How many adjoints are pulled."""
        if extra is not None:
            return extra[0].shape[1]
        return layers[-1].widths[0] if self.ask.weights is None else 1

    def zeros(self, inner: int, columns: int) -> View:
        """What nothing contributes to."""
        return self.writer.constant(torch.zeros(inner, columns, device=self.device))

    # ---- Sums of products, the way every formula is built. ----

    def terms(self, parts: Parts, maps: Sequence[Map]) -> list[Any]:
        """The products uᵢ Mᵢ that are not zero."""
        return [term for part, linear in zip(parts, maps, strict=True) for term in self.term(part, linear)]

    def term(self, part: Any, linear: Map) -> list[Any]:
        """The product u M: nothing if it is zero, u if M = 1."""
        if part is None or linear is None:
            return []
        if isinstance(linear, Tensor):
            u = part() if callable(part) else part
            # What all rows share is computed once, in a place of its own.
            return [self.writer.multiply(u, linear) if u.is_shared else partial(self.writer.multiply, u, linear)]
        if linear == 1.0:
            return [part]
        if callable(part):
            return [partial(part, alpha=linear)]
        return [partial(self.writer.scale, part, alpha=linear)]

    def sum(self, terms: Sequence[Any], bias: Tensor | None = None, out: View | None = None) -> View | None:
        """Write the terms one onto the other: arrays that are there, and steps that can add to one."""
        arrays = [term for term in terms if isinstance(term, View)]
        steps = [term for term in terms if not isinstance(term, View)]
        total: View | None = None
        is_own = False
        for array in sorted(arrays, key=lambda array: not array.is_shared):
            if total is None:
                total = array
            else:
                total, is_own = self.writer.scale(array, add=total), True
        # The bias goes with a product, if there is one.
        products = [step for step in steps if step.func == self.writer.multiply]
        for step in [*products, *(step for step in steps if step.func != self.writer.multiply)]:
            keywords: dict[str, Any] = {}
            if bias is not None and step.func == self.writer.multiply:
                keywords["bias"], bias = bias, None
            target = total if is_own and total is not None and not total.is_shared else None
            total, is_own = step(add=total, out=target if out is None else out, **keywords), True
        if bias is not None:
            assert total is not None
            shift = self.writer.constant(bias.unsqueeze(0))
            total, is_own = self.writer.scale(total, add=shift), True
        if out is not None and (total is None or total.buffer is not out.buffer):
            total = self.writer.scale(self.zeros(*out.shape[1:]) if total is None else total, out=out)
        return total

    def cut(self, parts: Parts, had: tuple[int, ...], widths: tuple[int, ...]) -> Parts:
        """The same columns cut at other places than before: slices where one part holds them, else copies."""
        if had == widths:
            return parts
        inner = max((part.shape[1] for part in parts if part is not None), default=0)
        if not inner:
            return tuple(None for _ in widths)
        known = [self.zeros(inner, width) if part is None else part for part, width in zip(parts, had, strict=True)]
        places = list(accumulate(had, initial=0))
        pieces: list[View] = []
        for start, stop in pairwise(accumulate(widths, initial=0)):
            touched = [
                part.columns(max(start - begin, 0), min(stop - begin, part.shape[2]))
                for part, begin in zip(known, places, strict=False)
                if begin < stop and start < begin + part.shape[2]
            ]
            pieces.append(touched[0] if len(touched) == 1 else self.join(touched))
        return tuple(pieces)

    def join(self, pieces: list[View]) -> View:
        """Pieces side by side in one array."""
        out = self.writer.new(max(piece.shape[1] for piece in pieces), sum(piece.shape[2] for piece in pieces))
        place = 0
        for piece in pieces:
            self.writer.scale(piece, out=out.columns(place, place + piece.shape[2]))
            place += piece.shape[2]
        return out


def _width(form: Form) -> int:
    """Hidden units of a layer."""
    for linear, width in zip(form.into, form.widths, strict=True):
        if isinstance(linear, Tensor):
            return linear.shape[1]
        if linear is not None:
            return width
    raise AssertionError("a layer has at least one way in")


def _transposed(linear: Map) -> Map:
    """Mᵀ."""
    return linear.T if isinstance(linear, Tensor) else linear
