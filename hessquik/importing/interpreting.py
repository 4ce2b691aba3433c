"""Operations on arrays of rows, of torch or ONNX, converted to nodes of a graph.

A reader interprets a program on a fixed number of rows. Arguments are torch tensors where they are constants, and
:class:`Features` where they depend on the inputs. Affine operations need no formula here: their matrices are found
by applying the operations to the unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from hessquik.activations import reluActivation
from hessquik.errors import UnsupportedError
from hessquik.importing.graph import Map, Node, Pointwise, Product, affine, as_map, compose, identity, refuse

__all__ = [
    "Features",
    "apply_affine",
    "as_float64",
    "axis_of_rows",
    "by_trial",
    "features_in",
    "filled",
    "maximum",
    "minimum",
    "multiply",
    "readable",
    "rectify",
    "spread",
]


@dataclass(frozen=True, slots=True)
class Features:
    """A value that depends on the inputs, with the shape that it has in the library that is read.

    Attributes:
        node: The node of the graph; its entries are those of one row's array, flattened in C order.
        shape: Shape of one row's array.
        axis: Axis of the rows in the whole array; ``None`` if it is the first one and must remain so.
    """

    node: Node
    shape: tuple[int, ...]
    axis: int | None = None

    def whole(self, rows: int) -> tuple[int, ...]:
        """Return the shape of the whole array.

        Examples:
            >>> from hessquik.importing.graph import Input
            >>> Features(Input("x", 6), (2, 3), 1).whole(7)
            (2, 7, 3)
        """
        axis = self.axis or 0
        return (*self.shape[:axis], rows, *self.shape[axis:])

    def arrange(self, array: Tensor) -> Tensor:
        """Return the whole array from the features of every row, (rows, width)."""
        return array.reshape(len(array), *self.shape).movedim(0, self.axis or 0)


@contextmanager
def readable(place: str) -> Iterator[None]:
    """Turn any exception of a node's operation into an error that names the node.

    Raises:
        UnsupportedError: the operation does not accept its arguments.
    """
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:  # any error that wrong arguments cause in torch or the standard's reference
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise refuse(
            place,
            f"has arguments that cannot be read ({type(error).__name__}: {reason})",
            "export the model anew, or write it with other operations",
        ) from None


def as_float64(value: Any) -> Any:
    """Convert a floating-point tensor, or those in a nested list, to float64 on the CPU; keep other values."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to("cpu", torch.float64)
    if isinstance(value, list | tuple):
        return type(value)(as_float64(part) for part in value)
    return value


def features_in(argument: Any) -> list[Features]:
    """Return all :class:`Features` in an argument and its nested lists, in order."""
    if isinstance(argument, Features):
        return [argument]
    if isinstance(argument, list | tuple):
        return [found for part in argument for found in features_in(part)]
    return []


def apply_affine(
    place: str, function: Callable[..., Any], args: Sequence[Any], additive: Collection[int], rows: int
) -> Any:
    """Return the result of an affine operation: one :class:`Features`, or a list of them.

    Args:
        place: The node's name.
        function: The operation on tensors of ``rows`` rows.
        args: Its arguments.
        additive: Positions of the arguments whose constants the operation adds; with these at 0 it is linear.
        rows: Number of rows.

    Raises:
        UnsupportedError: the operation is not affine, or its rows depend on each other.
    """
    depends = features_in(args)
    linear_args = tuple(_zeroed(arg) if i in additive else arg for i, arg in enumerate(args))
    zeros = [torch.zeros(each.whole(rows), dtype=torch.float64) for each in depends]

    def part(select: Callable[[Any], Tensor]) -> Features:
        def linear(arrays: Sequence[Tensor]) -> Tensor:
            return select(function(*filled(linear_args, iter(arrays))))

        adds = any(_has_constants(arg) for i, arg in enumerate(args) if i in additive)
        offset = select(function(*filled(args, iter(zeros)))) if adds else None
        return by_trial(place, linear, offset, depends, rows)

    example = function(*filled(linear_args, iter(zeros)))
    if isinstance(example, Tensor):
        return part(lambda result: result)
    return [part(itemgetter(i)) for i in range(len(example))]


def by_trial(
    place: str,
    linear: Callable[[Sequence[Tensor]], Tensor],
    offset: Tensor | None,
    features: Sequence[Features],
    rows: int,
) -> Features:
    """Return the result of an operation whose matrices are found by applying it to the unit vectors."""
    zeros = [torch.zeros(each.whole(rows), dtype=torch.float64) for each in features]
    axis = axis_of_rows(place, linear, offset, features, rows)

    def rows_first(arrays: Sequence[Tensor]) -> Tensor:
        return linear(arrays).movedim(axis or 0, 0)

    shape = tuple(rows_first(zeros).shape[1:])
    terms: list[tuple[Node, Map]] = []
    for i, each in enumerate(features):
        unit = identity(each.node.width)
        columns = [torch.zeros(0, math.prod(shape), dtype=torch.float64)]
        for start in range(0, len(unit), rows):
            chunk = unit[start : start + rows]
            array = torch.zeros(rows, each.node.width, dtype=torch.float64)
            array[: len(chunk)] = chunk
            arrays = [*zeros[:i], each.arrange(array), *zeros[i + 1 :]]
            columns.append(rows_first(arrays).reshape(rows, -1)[: len(chunk)])
        terms.append((each.node, as_map(torch.cat(columns))))
    numbers = [*(matrix for _, matrix in terms), 0.0 if offset is None else offset.nan_to_num(math.nan, 0.0, 0.0)]
    if not all(bool(torch.isfinite(torch.as_tensor(each, dtype=torch.float64)).all()) for each in numbers):
        raise refuse(place, "computes with NaN, or multiplies by infinity", "use finite numbers")
    _check(place, rows_first, features, terms, rows)
    shift = None
    if offset is not None:
        constant = offset.movedim(axis or 0, 0).reshape(rows, -1)
        if not torch.equal(constant, constant[:1].expand_as(constant)):
            raise refuse(place, "adds another constant to every row", "add the same constant to all rows")
        shift = constant[0].clone()
    return Features(affine(place, terms, shift), shape, axis)


def axis_of_rows(
    place: str,
    linear: Callable[[Sequence[Tensor]], Tensor],
    offset: Tensor | None,
    features: Sequence[Features],
    rows: int,
) -> int | None:
    """Return the axis of the rows in a result: of several that are as long, the one along which rows stay apart."""
    alone = [each.arrange(torch.eye(rows, 1, dtype=torch.float64).expand(-1, each.node.width)) for each in features]
    result = linear(alone)
    shape = tuple(result.shape) if offset is None else tuple(offset.shape)
    if any(each.axis is None for each in features):
        found: list[int | None] = [None] if shape and shape[0] == rows else []
    else:
        found = [axis for axis, size in enumerate(shape) if size == rows]
    if not found:
        raise refuse(place, f"makes an array {shape} of {rows} rows", "keep one row per point")
    apart = (axis for axis in found if not result.movedim(axis or 0, 0)[1:].any())
    return next(apart, found[0])


def _check(
    place: str,
    linear: Callable[[Sequence[Tensor]], Tensor],
    features: Sequence[Features],
    terms: Sequence[tuple[Node, Map]],
    rows: int,
) -> None:
    """Check the matrices of an operation on random rows; refuse the operation if it is not linear in each row."""
    generator = torch.Generator().manual_seed(0)
    trial = [torch.randn(rows, each.node.width, dtype=torch.float64, generator=generator) for each in features]

    def predicted(size: Callable[[Any], Any]) -> Tensor:
        parts = [compose(size(array), size(matrix)) for array, (_, matrix) in zip(trial, terms, strict=True)]
        return torch.stack([torch.as_tensor(part) for part in parts]).sum(0)

    got = linear([each.arrange(array) for each, array in zip(features, trial, strict=True)]).reshape(rows, -1)
    difference = (got - predicted(lambda part: part)).abs()
    if not bool((difference <= 1e-9 * predicted(abs)).all()):
        raise refuse(
            place,
            "multiplies values that both depend on the inputs, or lets rows depend on each other",
            "only products entry by entry can be exact here, and each row must be computed alone",
        )


def multiply(place: str, left: Any, right: Any, rows: int, divide: bool = False) -> Features:
    """Return the product, or with ``divide`` the quotient, entry by entry; an operand depends on the inputs."""
    if divide and isinstance(right, Features):
        node = Pointwise(place, right.node.width, right.node, ["power", "z", -1])
        right, divide = replace(right, node=node), False
    if not (isinstance(left, Features) and isinstance(right, Features)):
        _refuse_other_rows(place, left, right)
        found: Features = apply_affine(place, torch.div if divide else torch.mul, (left, right), (), rows)
        return found
    shape = tuple(torch.broadcast_shapes(left.whole(rows), right.whole(rows)))
    a, b = (spread(place, each, shape, rows) for each in (left, right))
    if a.axis != b.axis:
        raise refuse(place, "multiplies each row by all others", "each row must be computed alone")
    return replace(a, node=Product(place, a.node.width, a.node, b.node))


def _refuse_other_rows(place: str, left: Any, right: Any) -> None:
    """Refuse a constant factor that differs between rows."""
    value, factor = (left, right) if isinstance(left, Features) else (right, left)
    from_end = len(value.shape) + 1 - (value.axis or 0)
    if isinstance(factor, Tensor) and factor.ndim >= from_end:
        first = factor.narrow(-from_end, 0, min(1, factor.shape[-from_end]))
        if bool((factor == first).all()):
            return
        raise refuse(place, "multiplies every row by another constant", "multiply all rows by the same constants")


def spread(place: str, value: Features, shape: tuple[int, ...], rows: int) -> Features:
    """Return a value broadcast to the shape of a whole array."""
    if value.whole(rows) == shape:
        return value
    found: Features = apply_affine(place, lambda u: u.broadcast_to(shape), (value,), (), rows)
    return found


def maximum(place: str, left: Any, right: Any, rows: int) -> Features:
    """Return max(u, v) = v + ReLU(u − v), entry by entry."""
    found: Features = apply_affine(place, torch.add, (_excess(place, left, right, rows), right), (1,), rows)
    return found


def minimum(place: str, left: Any, right: Any, rows: int) -> Features:
    """Return min(u, v) = u − ReLU(u − v), entry by entry."""
    found: Features = apply_affine(place, torch.sub, (left, _excess(place, left, right, rows)), (0,), rows)
    return found


def _excess(place: str, left: Any, right: Any, rows: int) -> Features:
    """Return ReLU(u − v)."""
    difference: Features = apply_affine(place, torch.sub, (left, right), (0, 1), rows)
    node = Pointwise(place, difference.node.width, difference.node, reluActivation())
    return replace(difference, node=node)


def rectify(place: str, x: Features, slopes: Tensor, rows: int) -> Features:
    """Return ReLU(z) − λ ReLU(−z) with slopes λ, which are broadcast to the shape of x."""
    z = x.node
    up = Pointwise(place, z.width, z, reluActivation())
    down = Pointwise(place, z.width, affine(place, [(z, -1.0)]), reluActivation())
    scaled = multiply(place, replace(x, node=down), -slopes, rows)
    return replace(x, node=affine(place, [(up, 1.0), (scaled.node, 1.0)]))


def filled(args: Any, arrays: Any) -> Any:
    """Return the arguments with each :class:`Features` replaced by the next array."""
    if isinstance(args, Features):
        return next(arrays)
    if isinstance(args, list | tuple):
        return type(args)(filled(arg, arrays) for arg in args)
    return args


def _zeroed(arg: Any) -> Any:
    """Return an argument with its constants replaced by 0."""
    if isinstance(arg, Tensor):
        return torch.zeros_like(arg)
    if isinstance(arg, list | tuple):
        return type(arg)(_zeroed(part) for part in arg)
    return 0.0 if isinstance(arg, int | float) and not isinstance(arg, bool) else arg


def _has_constants(arg: Any) -> bool:
    if isinstance(arg, list | tuple):
        return any(_has_constants(part) for part in arg)
    return isinstance(arg, Tensor | int | float) and not isinstance(arg, bool)
