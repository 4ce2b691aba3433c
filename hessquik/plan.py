"""Planning: the choice of the cheapest program that evaluates quantities of a network on a device.

The formulas of :mod:`hessquik.calculus` are traced in every applicable mode, and the plan with the least work on the
device is kept:

    mode    backward: sums over hidden units with weights from adjoints; forward: second derivatives are propagated
    start   initial tangents: the d unit vectors of x or, if x enters by fewer than d columns, a basis of these
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hessquik import passes
from hessquik.calculus import Backward, Forward, Question, Unavailable, compute
from hessquik.device import Device
from hessquik.errors import ShapeError
from hessquik.graph import Builder, Graph, Rule
from hessquik.layers import hessQuikLayer
from hessquik.layers.form import Form, Map
from hessquik.layout import lay_out
from hessquik.quantities import QUANTITIES
from hessquik.steps import Program
from hessquik.trace import Array

__all__ = ["Ask", "Plan", "choose", "exact_forms", "expect_traceable", "find_basis", "least_operations", "trace"]

Mode = type[Backward] | type[Forward]


@dataclass(frozen=True, slots=True)
class Ask:
    """A set of quantities asked of a network, and the form of its arguments.

    Attributes:
        quantities: Names of the quantities.
        weights: Form of λ: ``None``, ``"shared"`` by all rows, or one for ``"each"`` row.
        directions: Form of the directions v, likewise.
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
        ask: The quantities and the form of the arguments.
        mode: ``backward`` or ``forward``.
        start: Initial tangents: ``x`` or ``reduced``.
        rows: Rows of a tile.
        operations: Floating-point operations per row, at least one: results that are constant are written, too.
        bytes: Bytes per row that steps read and write.
        graph: The operations.
        program: The steps.
        shapes: Shapes of a row's results.
        kernel: What runs it; empty until an evaluator has chosen it.
    """

    ask: Ask
    mode: str
    start: str
    rows: int
    operations: int
    bytes: int
    graph: Graph
    program: Program
    shapes: dict[str, tuple[int, ...]]
    kernel: str = ""

    def cost(self, device: Device, dtype: torch.dtype) -> float:
        """Return the work of a row on a device, in operations."""
        # Matrices that do not stay in the cache are fetched once per tile; the rows of the smallest pay for it.
        fetched = max(0, self.program.matrix_size * dtype.itemsize - device.matrix_bytes)
        return self.operations + device.operations_per_byte * (self.bytes + fetched / device.smallest_tile_rows)

    def __str__(self) -> str:
        """Return the choice and the steps as text."""
        head = (
            f"{', '.join(sorted(self.ask.quantities))}: {self.mode}, tangents from {self.start}, "
            f"tiles of {self.rows} rows, {self.operations} operations and {self.bytes} bytes a row"
        )
        head += f", on {self.kernel}" if self.kernel else ""
        return "\n  ".join([head, *str(self.program).splitlines()])


def choose(forms: Sequence[Form], ask: Ask, dtype: torch.dtype, outputs: int, device: Device) -> Plan:
    """Return the plan with the least work among all that answer ``ask``.

    Args:
        forms: The layers; matrices in float32 are exact.
        ask: The quantities and the form of the arguments.
        dtype: Dtype to compute in.
        outputs: Number m of outputs.
        device: Figures of the device.
    """
    d = sum(forms[0].widths)
    shapes = {
        name: quantity.shape(d, outputs if ask.weights is None else 1, ask.k) for name, quantity in QUANTITIES.items()
    }
    plans = []
    for mode, start, basis in _ways(forms, ask, outputs, device):
        try:
            graph = trace(forms, ask, outputs, mode, basis, passes.RULES)
        except Unavailable:
            continue
        program = lay_out(graph, device.lanes(dtype))
        fitting = device.tile_bytes // max(1, program.tile_size * dtype.itemsize)
        rows = max(device.smallest_tile_rows, min(device.largest_tile_rows, fitting))
        moved = program.moved * dtype.itemsize
        name = mode.__name__.lower()
        plans.append(Plan(ask, name, start, rows, max(1, program.operations), moved, graph, program, shapes))
    return min(plans, key=lambda plan: plan.cost(device, dtype))


def least_operations(forms: Sequence[Form], ask: Ask, outputs: int) -> int:
    """Return a number of operations per row that no plan for ``ask`` goes below, from the layers' sizes alone.

    Every plan carries tangents or adjoints through all layers but the first: for second derivatives one tangent for
    each input, or for each direction in which the first layer depends on them; for a gradient that many or one
    adjoint per output; for products Hv an adjoint per direction and output.

    Examples:
        >>> from hessquik.networks import fullyConnectedNN
        >>> forms = fullyConnectedNN([5, 16, 32, 1]).forms()
        >>> least_operations(forms, Ask(frozenset({"laplacian"})), 1) == 2 * 5 * (16 * 32 + 32 * 1)
        True
    """
    asked = [QUANTITIES[name] for name in ask.quantities]
    numbers = sum(
        linear.numel()
        for form in forms[1:]
        for linear in (*form.into, *form.skip, form.out)
        if isinstance(linear, Tensor)
    )
    tangents = min(sum(forms[0].widths), forms[0].hidden)
    carried = 0
    if any(quantity.order == 2 and not quantity.is_directional for quantity in asked):
        carried = tangents
    elif any(quantity.order and not quantity.is_directional for quantity in asked):
        carried = min(tangents, 1 if ask.weights else outputs)
    if "hvp" in ask.quantities:
        carried = max(carried, ask.k * (1 if ask.weights else outputs))
    return 2 * carried * numbers


def _ways(forms: Sequence[Form], ask: Ask, outputs: int, device: Device) -> Iterator[tuple[Mode, str, Tensor | None]]:
    """Yield the candidates: modes, starts and bases."""
    asked = [QUANTITIES[name] for name in ask.quantities]
    all_axes = any(quantity.order and not quantity.is_directional for quantity in asked)
    second = any(quantity.order == 2 and not quantity.is_directional for quantity in asked)
    d = sum(forms[0].widths)
    starts: list[tuple[str, Tensor | None]] = [("x", None)]
    basis = find_basis(forms) if second else None
    if basis is not None:
        starts.append(("reduced", basis))
    for start, columns in starts:
        yield Backward, start, columns
        if not any(quantity.order for quantity in asked):
            continue
        # Pairs of tangents in place of adjoints: with many more of them than outputs they cannot be cheaper.
        tangents = (d if columns is None else columns.shape[1]) if all_axes else 0
        is_packed = any(quantity.order == 2 and not {"d", "p"}.isdisjoint(quantity.axes) for quantity in asked)
        pairs = tangents * (tangents + 1) // 2 if is_packed else 0
        if pairs <= device.pairs_per_output * outputs:
            yield Forward, start, columns


def trace(
    forms: Sequence[Form],
    ask: Ask,
    outputs: int,
    mode: Mode,
    basis: Tensor | None = None,
    rules: Mapping[str, Sequence[Rule]] | None = None,
) -> Graph:
    """Trace the calculus in a mode, and return its graph.

    Args:
        forms: The layers.
        ask: The quantities and the form of the arguments.
        outputs: Number m of outputs.
        mode: ``Backward`` or ``Forward``.
        basis: Q (d, r), if tangents start from the rows of Qᵀ.
        rules: The rules that simplify the graph, for each operation; none if not given.

    Raises:
        Unavailable: the mode cannot compute one of the quantities.
        ShapeError: a quantity's formula returns an array whose shape differs from the quantity's axes.

    Examples:
        >>> import torch
        >>> from hessquik.activations import quadraticActivation
        >>> from hessquik.calculus import Backward
        >>> from hessquik.layers import singleLayer
        >>> form = singleLayer(3, 2, quadraticActivation(), bias=False).form()
        >>> print(trace([form], Ask(frozenset({"value"})), 2, Backward))
        %0[1, 3] = input(x)
        %1[3, 2] = constant()
        %2[1, 2] = matmul(%0, %1)
        %3[1, 1] = constant() = 0.5
        %4[1, 2] = mul(%3, %2)
        %5[1, 2] = mul(%4, %2)
        return value=%5
    """
    builder = Builder(rules or {})
    d = sum(forms[0].widths)

    def given(name: str, shape: tuple[int, ...], how: str | None) -> Array | None:
        return None if how is None else Array(builder, builder.input(name, shape, how == "shared"))

    question = Question(
        Array(builder, builder.input("x", (1, d))),  # type: ignore[arg-type]
        sorted(ask.quantities),
        given("weights", (1, outputs), ask.weights),  # type: ignore[arg-type]
        given("directions", (ask.k, d), ask.directions),  # type: ignore[arg-type]
        basis,
    )
    with torch.no_grad():
        found = compute(mode, forms, question)
    arrays = cast("dict[str, Array]", found)
    for name, array in arrays.items():
        shape = QUANTITIES[name].shape(d, outputs if ask.weights is None else 1, ask.k)
        if [extent for extent in array.shape if extent != 1] != [extent for extent in shape if extent != 1]:
            raise ShapeError(
                f"the formula of {name} must give one array of shape {shape} per point, its axes being "
                f"{QUANTITIES[name].axes!r}, got {array.shape[1:]}"
            )
    return builder.finish({name: array.index for name, array in arrays.items()})


def expect_traceable(forms: Iterable[Form]) -> None:
    """Check that all activations and their first two derivatives can be traced, before any of them is asked for.

    Raises:
        TraceError: an activation calls a function that cannot be traced.
    """
    for activation in {id(form.activation): form.activation for form in forms}.values():
        builder = Builder()
        activation.jet(Array(builder, builder.input("z", (1, 1))), 2)  # type: ignore[arg-type]


def exact_forms(layers: Iterable[hessQuikLayer]) -> list[Form]:
    """Return layers as data, with what they compute of the weights (L⁺ = softplus(L)) in float64.

    Matrices that are weights themselves keep their dtype and memory.

    Examples:
        >>> from hessquik.networks import ICNN
        >>> first, second, *_ = exact_forms(ICNN(3, [None, 8, 2], dtype=torch.float32).layers())
        >>> first.into[-1].dtype, [linear.dtype for linear in second.into]
        (torch.float32, [torch.float64, torch.float32])
    """
    return [_exact_form(layer) for layer in layers]


def _exact_form(layer: hessQuikLayer) -> Form:
    own, weights = layer.form(), layer.state_dict().values()
    places = {weight.untyped_storage().data_ptr() for weight in weights}

    def is_computed(linear: Map) -> bool:
        return isinstance(linear, Tensor) and linear.untyped_storage().data_ptr() not in places

    maps = (*own.into, own.bias, *own.skip, own.out, own.offset)
    if all(weight.dtype == torch.float64 for weight in weights) or not any(map(is_computed, maps)):
        return own
    exact = deepcopy(layer).double().form()

    def chosen(linear: Any, in_float64: Any) -> Any:
        return in_float64 if is_computed(linear) else linear

    return replace(
        exact,
        into=tuple(map(chosen, own.into, exact.into)),
        bias=chosen(own.bias, exact.bias),
        skip=tuple(map(chosen, own.skip, exact.skip)),
        out=chosen(own.out, exact.out),
        offset=chosen(own.offset, exact.offset),
    )


def find_basis(forms: Sequence[Form]) -> Tensor | None:
    """Return orthonormal columns Q (d, r) that span everything x is multiplied by, if they are fewer than d.

    Args:
        forms: The layers.
    """
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
    with torch.no_grad():
        basis: Tensor = torch.linalg.qr(torch.cat(columns, dim=1).double().cpu()).Q
    return basis
