"""torch modules and exported programs as graphs.

``torch.export`` captures a module as a list of calls of ATen operators; a ``.pt2`` file holds such a list as JSON.
:func:`read` interprets either, on a fixed number of rows.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hessquik.errors import UnsupportedError
from hessquik.importing import torch_constants as constants
from hessquik.importing import torch_operations as operations
from hessquik.importing.bilinear import apply_bilinear
from hessquik.importing.graph import Map, Node, affine, as_map, identity, refuse
from hessquik.importing.interpreting import (
    Features,
    apply_affine,
    as_float64,
    features_in,
    filled,
    maximum,
    minimum,
    multiply,
    readable,
    rectify,
    spread,
)

__all__ = ["COLLECT", "HANDLERS", "Call", "Operators", "Program", "Ref", "read", "run"]


@dataclass(frozen=True, slots=True)
class Ref:
    """The name of a value in a program."""

    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator.

    Attributes:
        target: The operator, such as ``aten.linear.default``.
        args: Its arguments; values of the program are :class:`Ref`.
        kwargs: Its arguments by name.
        outputs: Names of the values that it returns.
        place: Of the module that makes the call.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str, ...]
    place: str

    @property
    def operation(self) -> str:
        """The usual name of the function that it computes, without package and overload."""
        return _operation(self.target)

    @property
    def function(self) -> str:
        """The operator that computes the same, and changes no argument: ``aten.add`` for ``aten.add_``."""
        package, _, rest = self.target.partition(".")
        name, dot, overload = rest.partition(".")
        return f"{package}.{name.removesuffix('_')}{dot}{overload}" if self.changes_its_argument else self.target

    @property
    def changes_its_argument(self) -> bool:
        """Return True if it writes its result into its first argument."""
        alias = _alias(self.target)
        return alias is not None and alias.is_write and self.operation != "detach"

    @property
    def is_view(self) -> bool:
        """Return True if its results share memory with its first argument, or may do so."""
        return _alias(self.target) is not None or self.operation in operations.DROPS or self.target in _PARTS

    @property
    def computes(self) -> bool:
        """Return True if it returns a value, rather than asserting something."""
        return bool(self.outputs) and not self.operation.startswith("_assert")


@dataclass(frozen=True, slots=True)
class Program:
    """A captured module.

    Attributes:
        input: Name of the input.
        shape: Of the input, rows first.
        dtype: Of the input.
        constants: Parameters, buffers and other tensors, by the names of their values.
        calls: In order.
        output: Name of the output.
        takes_any_rows: Whether the number of rows may differ from that of the shape.
        titles: Names of parameters and buffers in the module, by the names of their values.
    """

    input: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    constants: dict[str, Tensor]
    calls: list[Call]
    output: str
    takes_any_rows: bool = False
    titles: Mapping[str, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Number of inputs of a point."""
        return int(torch.Size(self.shape[1:]).numel())

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype of the fewest digits in which it computes."""
        casts = (call for call in self.calls if call.operation in operations.UNCHANGED)
        dtypes = {self.dtype, *(dtype for call in casts for dtype in _dtypes(call.args, call.kwargs))}
        return torch.float32 if torch.float32 in dtypes else self.dtype


def read(program: Program, point: Node) -> Node:
    """Return a program's output as a value of a graph, from the value that it takes.

    Raises:
        UnsupportedError: the program does something that cannot be exact here.
    """
    rows, *shape = program.shape
    _expect_known(program)
    memory = _Memory(program, Features(point, tuple(shape), 0))
    for call in program.calls:
        if call.computes:
            with readable(_place(call)):
                _expect_numbers(program, call, memory.values)
                memory.store(call, Operators(_place(call), rows, program.dtype))
    output = memory.values.get(program.output)
    if not isinstance(output, Features):
        raise refuse(program.output, "does not depend on the input", "return what the network computes of it")
    if output.axis:
        raise refuse(
            program.output, f"has the rows along axis {output.axis}", "return one row per point, by a transpose"
        )
    return output.node


def _expect_known(program: Program) -> None:
    """Refuse a program with an operator that cannot be exact, before anything of it is computed."""
    dependent = {program.input}
    for call in program.calls:
        names = _names([*call.args, *call.kwargs.values()])
        if not call.computes or dependent.isdisjoint(names):
            continue
        if call.target not in _PYTHON and call.operation not in _KNOWN:
            raise _unknown(_place(call), call.target)
        if call.operation not in {*_SIZES, *operations.BY_SHAPE}:
            dependent |= {*call.outputs, *(names[:1] if call.changes_its_argument else ())}


def _expect_numbers(program: Program, call: Call, values: Mapping[str, Any]) -> None:
    """Refuse NaN and infinity among the constants of a call, by their names."""
    names = _names([*call.args, *call.kwargs.values()])
    if not any(isinstance(values.get(name), Features) for name in names):
        return
    for name in names:
        value = values.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        is_number = ~value.isnan() if call.operation == "clamp" else value.isfinite()  # inf is no bound
        if not bool(is_number.all()):
            kind = "NaN" if bool(value.isnan().any()) else "infinity"
            raise refuse(
                _place(call),
                f"computes with {program.titles.get(name, name)}, which has {kind}",
                "train or load the module anew; what it computes is not a number",
            )


def _names(argument: Any) -> list[str]:
    """Return the names of all values in an argument."""
    if isinstance(argument, list | tuple):
        return [name for part in argument for name in _names(part)]
    return [argument.name] if isinstance(argument, Ref) else []


#: What to do instead of a change of a buffer.
_STILL = "call module.eval() before; if it does so in evaluation as well, compute without buffers that change"


class _Memory:
    """Values by their names, some of which share memory: a change of one is a change of the others.

    Attributes:
        values: The values.
        views: The value that a value is a part of, and the function that takes the part.
        lost: Values that share memory with a changed one or do not, which only the module's memory would tell.
    """

    def __init__(self, program: Program, point: Features) -> None:
        self.values: dict[str, Any] = {name: as_float64(tensor) for name, tensor in program.constants.items()}
        self.values[program.input] = point
        self.views: dict[str, tuple[str, Callable[[Any], Any]]] = {}
        self.copies: set[str] = set()
        self.lost: set[str] = set()
        self.titles = {name: program.titles.get(name, f"constant {name}") for name in program.constants}

    def store(self, call: Call, t: Operators) -> None:
        """Compute a call, and store its results."""
        for name in _names([*call.args, *call.kwargs.values()]):
            if name in self.lost:
                raise refuse(
                    t.place, f"takes {name!r}, which may have been changed in place", "clone before a change"
                )
        args, kwargs = _arguments(call, self.values)
        results = _results(call, t.apply(call.function, args, kwargs))
        source = next(iter(_names(call.args[:1])), None)
        if call.changes_its_argument and source is not None:
            self._change(source, results[0], t)
            results = [self.values[source]]
            self.views[call.outputs[0]] = source, lambda value: value
        elif call.is_view and source is not None:
            for k, name in enumerate(call.outputs):
                self.views[name] = source, _part(call, t, args, kwargs, k)
            self.copies |= set(call.outputs) if call.operation in _MAY_COPY else set()
        self.values.update(zip(call.outputs, results, strict=True))

    def _change(self, name: str, value: Any, t: Operators) -> None:
        """Set a value, and all that share memory with it."""
        parts: list[Callable[[Any], Any]] = []
        root = name
        while root in self.views and root not in self.copies:
            root, part = self.views[root]
            parts.append(part)
        if root in self.titles:
            raise refuse(
                t.place,
                f"changes {self.titles[root]} at every call, as batch normalisation and spectral_norm do in training",
                _STILL,
            )
        changed = self._sharing(root, self.copies)
        self.lost |= self._sharing(self._first(root)) - changed
        self.values[root] = t.replaced(self.values[root], value, list(reversed(parts)))
        for each in self.views:
            if each in changed and each != root:
                base, part = self.views[each]
                self.values[each] = part(self.values[base])

    def _first(self, name: str) -> str:
        """Return the value that a value is a part of, be it a copy or not."""
        while name in self.views:
            name, _ = self.views[name]
        return name

    def _sharing(self, name: str, without: Collection[str] = ()) -> set[str]:
        """Return a value and all parts of it."""
        found = {name}
        for view, (base, _) in self.views.items():
            if base in found and view not in without:
                found.add(view)
        return found


def _part(call: Call, t: Operators, args: Sequence[Any], kwargs: Mapping[str, Any], k: int) -> Callable[[Any], Any]:
    """Return the function that computes the result k of a call from another first argument."""

    def part(value: Any) -> Any:
        return _results(call, t.apply(call.function, (value, *args[1:]), kwargs))[k]

    return part


def run(program: Program, x: Tensor) -> Tensor:
    """Run the program itself on points (rows, d), by torch."""
    values: dict[str, Any] = {
        name: tensor.to(x.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in program.constants.items()
    }
    values[program.input] = x.reshape(-1, *program.shape[1:])
    for call in program.calls:
        if call.computes:
            with readable(_place(call)):
                args, kwargs = _arguments(call, values)
                values.update(zip(call.outputs, _results(call, _compute(call, args, kwargs)), strict=True))
    result: Tensor = values[program.output]
    return result.reshape(len(x), -1)


#: Arguments that choose device and layout, and do not change values.
_IGNORED = {"device", "layout", "memory_format", "non_blocking", "copy", "pin_memory"}


def _arguments(call: Call, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call by position and by name."""
    keeps_lists = call.target in _PARTS
    kwargs = {k: _resolved(value, values, keeps_lists) for k, value in call.kwargs.items() if k not in _IGNORED}
    return _resolved(call.args, values, keeps_lists), kwargs


def _compute(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a call of a program that has been read."""
    if call.operation in operations.UNCHANGED:
        value = args[0].clone() if _alias(call.target) is None else args[0]
        dtypes = _dtypes(args, kwargs)
        return value.to(dtypes[0]) if dtypes else value
    if call.target in _PYTHON:
        return _python(_place(call), call.target, args)
    if call.operation not in _KNOWN:
        return constants.compute(_place(call), call.target, args, kwargs, _KNOWN)
    return _found(_place(call), call.target)(*args, **kwargs)


def _found(place: str, target: str) -> Callable[..., Any]:
    function = constants.find(target)
    if function is None:
        raise _unknown(place, target)
    return function


def _results(call: Call, result: Any) -> list[Any]:
    """Return the results of a call in the order of its outputs; one output can be a list for later calls."""
    is_apart = isinstance(result, list | tuple) and len(call.outputs) > 1
    return list(result)[: len(call.outputs)] if is_apart else [result]


def _resolved(argument: Any, values: Mapping[str, Any], keeps_lists: bool) -> Any:
    """Return an argument with values in the places of names; in files a list of one has the name of its part."""
    if isinstance(argument, Ref):
        value = values[argument.name]
        return value[0] if isinstance(value, list) and len(value) == 1 and not keeps_lists else value
    if isinstance(argument, list | tuple):
        return type(argument)(_resolved(part, values, keeps_lists) for part in argument)
    return argument


#: Operators that take a value out of a list.
_PARTS = ("_operator.getitem", "<built-in function getitem>")
#: The name of an operator that returns a list of its arguments.
COLLECT = "list"
#: Operators that take a value out of a list, and those on sizes.
_PYTHON: dict[str, Callable[..., Any]] = {
    COLLECT: lambda values: values,
    **dict.fromkeys(_PARTS, operator.getitem),
    "<built-in function add>": operator.add,
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "ge", "gt", "le", "lt", "eq", "ne")
    },
}
#: Operations whose results share memory with their arguments if these lie in order, and are copies otherwise.
_MAY_COPY = {"reshape", "reshape_as", "flatten", "ravel", "contiguous", "to", "type_as"}


def _python(place: str, target: str, args: Sequence[Any]) -> Any:
    """Return the result of an operator of Python on numbers, or of one on a list."""
    if target not in {COLLECT, *_PARTS} and not all(isinstance(arg, int | float) for arg in args):
        raise refuse(place, "computes with something else than sizes", "write it with torch's operators")
    return _PYTHON[target](*args)


def _operation(target: str) -> str:
    """Return the usual name of the function of an operator.

    Examples:
        >>> _operation("aten.add_.Tensor"), _operation("aten.true_divide.Tensor"), _operation("mine.f")
        ('add', 'div', 'mine.f')
    """
    if not target.startswith("aten."):
        return target
    name = target.split(".")[1]
    name = name.removesuffix("_")
    return operations.ALIASES.get(name, name)


def _alias(target: str) -> Any:
    """Return how an operator's first argument shares memory with its results, or is changed; ``None`` if neither."""
    found = constants.find(target)
    if isinstance(found, torch._ops.OpOverloadPacket):
        found = getattr(found, "default", None)
    arguments = found._schema.arguments if isinstance(found, torch._ops.OpOverload) else []
    return arguments[0].alias_info if arguments else None


def _place(call: Call) -> str:
    return (
        f"{call.place or call.outputs[0]!r} ({call.target})" if call.place else f"{call.outputs[0]} ({call.target})"
    )


def _unknown(place: str, target: str) -> UnsupportedError:
    operation = _operation(target)
    if operation in operations.REFUSED:
        return refuse(place, *operations.REFUSED[operation])
    if "autocast" in target:
        return refuse(place, "computes in few digits (torch.autocast)", "remove it")
    if "functorch" in target:
        return refuse(
            place,
            "transforms a function while it runs (torch.func)",
            "return the function itself in place of its derivative; for vmap, save exported.run_decompositions({})",
        )
    if "higher_order" in target:
        return refuse(place, "decides or repeats while it runs", "write forward without branches on values")
    if not target.startswith("aten."):
        return refuse(place, "is an operator of your own", "write it with torch's operators")
    return refuse(
        place,
        "is not among the operations that can be exact here",
        "write it with those that the table of supported operations lists",
    )


@dataclass(frozen=True, slots=True)
class Operators:
    """torch's operators on values that depend on the inputs, by their names: ``t.add(u, v)``.

    Attributes:
        place: Name of the node that is computed.
        rows: Number of rows.
        dtype: Of the program's input.
    """

    place: str
    rows: int
    dtype: torch.dtype

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.apply(f"aten.{name}", args, kwargs)

    @property
    def precision(self) -> float:
        """Relative precision of numbers of the program's dtype."""
        return torch.finfo(self.dtype).eps

    def apply(self, target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Interpret an operator as values of the graph, or evaluate it if its arguments are constants."""
        if target in _PYTHON:
            return _python(self.place, target, args)
        name = _operation(target)
        if "out" in kwargs:
            raise refuse(self.place, "writes into another array (out=), as spectral_norm does in training", _STILL)
        if name in {"index", "index_put"}:
            args = (args[0], _positions(args[1]), *args[2:])
        if not features_in([*args, *kwargs.values()]) and name not in _ON_ANYTHING:
            return as_float64(constants.compute(self.place, target, args, kwargs, _KNOWN))
        if name in HANDLERS:
            return HANDLERS[name](self, *args, **kwargs)
        if name in operations.POINTWISE and isinstance(args[0], Features) and len(features_in(args)) == 1:
            others = [float(arg) if isinstance(arg, Tensor) and arg.numel() == 1 else arg for arg in args[1:]]
            return replace(args[0], node=operations.POINTWISE[name](self.place, args[0].node, *others, **kwargs))
        if name in operations.ADDITIVE:
            return self.affine(target, args, kwargs, operations.ADDITIVE[name])
        raise _unknown(self.place, target)

    def affine(self, target: str, args: Sequence[Any], kwargs: Mapping[str, Any], additive: Collection[int]) -> Any:
        """Interpret an affine operation, or a product of two values."""
        named = {key: value for key, value in kwargs.items() if key != "dtype"}
        found = _found(self.place, target)
        features = features_in(args)

        def function(*arguments: Any) -> Any:
            return found(*arguments, **named)

        shapes = iter([torch.zeros(1, dtype=torch.float64).expand(each.whole(self.rows)) for each in features])
        result = constants.rehearse(self.place, found, filled(args, shapes), named)
        outputs = sum(part.numel() for part in tree_leaves(result) if isinstance(part, Tensor)) // self.rows
        constants.expect_bounded(self.place, outputs * max(each.node.width for each in features))
        if len(features) > 1 and _operation(target) in operations.PRODUCTS:
            return apply_bilinear(self.place, function, args, self.rows)
        return apply_affine(self.place, function, args, additive, self.rows)

    def replaced(self, whole: Any, part: Any, views: Sequence[Callable[[Any], Any]]) -> Any:
        """Return a value with a part of it, a view of a view and so on, replaced by another value."""
        if not views:
            return part
        shape = whole.whole(self.rows) if isinstance(whole, Features) else tuple(whole.shape)
        positions = torch.arange(torch.Size(shape).numel()).reshape(shape)
        for view in views:
            positions = view(positions)

        def function(old: Tensor, new: Tensor) -> Tensor:
            numbers = new.expand(positions.shape).reshape(-1)
            return old.reshape(-1).scatter(0, positions.reshape(-1), numbers).reshape(shape)

        if not features_in([whole, part]):
            return function(whole, part.to(whole.dtype))
        return apply_affine(self.place, function, (whole, part), (0, 1), self.rows)


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with every mask as the positions where it is True."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in {torch.bool, torch.uint8}
        found += list(index.nonzero().unbind(1)) if is_mask and index is not None else [index]
    return found


#: Operators whose results are sizes.
_SIZES = ("size", "sym_size")


def _size(t: Operators, value: Any, *axis: int) -> Any:
    sizes = value.whole(t.rows) if isinstance(value, Features) else tuple(value.shape)
    return sizes[axis[0]] if axis else sizes


def _drop(t: Operators, value: Any, probability: float, is_training: bool) -> Any:
    """Return the value as it is, in evaluation mode."""
    if probability and is_training:
        raise refuse(t.place, *operations.REFUSED["dropout"])
    return value


def _normalise(t: Operators, *args: Any) -> Any:
    """Interpret batch normalisation, which is affine in evaluation mode."""
    if args[5]:
        raise refuse(t.place, *operations.REFUSED["_native_batch_norm_legit"])
    return t.affine("aten.batch_norm", args, {}, operations.ADDITIVE["batch_norm"])


def _divide(t: Operators, left: Any, right: Any, *, rounding_mode: str | None = None) -> Any:
    """Interpret a quotient."""
    if rounding_mode is not None:
        raise refuse(t.place, "rounds a quotient", "divide without rounding_mode")
    return multiply(t.place, left, right, t.rows, divide=True)


def _unchanged(t: Operators, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the value as it is, unless it becomes an integer."""
    if not isinstance(value, Features):
        return as_float64(value.to(_dtypes(args, kwargs)[0])) if _dtypes(args, kwargs) else value
    dtypes = _dtypes(args, kwargs)
    if any(dtype.is_complex for dtype in dtypes):
        raise refuse(t.place, *operations.REFUSED["complex"])
    if any(not dtype.is_floating_point for dtype in dtypes):
        raise refuse(t.place, "makes integers of the values", "keep the values as real numbers")
    if not {torch.float32, torch.float64} >= set(dtypes):
        raise refuse(t.place, "rounds the values to few digits", "keep the values as float32 or float64")
    return value


def _dtypes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.dtype]:
    return [part for part in (*args, *kwargs.values()) if isinstance(part, torch.dtype)]


def _detach(t: Operators, value: Any) -> Any:
    """Return a constant as it is."""
    if isinstance(value, Features):
        raise refuse(t.place, *operations.REFUSED["detach"])
    return value


def _power(t: Operators, base: Any, exponent: Any) -> Any:
    """Interpret z to constant powers, or positive numbers to the power z."""
    if isinstance(base, Features) and not isinstance(exponent, Features):
        return _by_entry(t, base, [exponent], operations.POINTWISE["pow"])
    if isinstance(exponent, Features) and not isinstance(base, Features):
        numbers = torch.as_tensor(base, dtype=torch.float64)
        if bool((numbers > 0).all()):
            return t.exp(t.mul(exponent, numbers.log()))
    raise refuse(t.place, "raises to a power that is not one number", "write x^y as exp(y log x) with smooth parts")


def _by_entry(t: Operators, value: Features, constants: Sequence[Any], function: Callable[..., Node]) -> Features:
    """Return a function of the entries of a value and of constants, those of equal constants together."""
    arrays = [torch.as_tensor(each, dtype=torch.float64) for each in constants]
    shape = torch.broadcast_shapes(value.whole(t.rows), *(each.shape for each in arrays))
    value = spread(t.place, value, shape, t.rows)
    rows = [each.broadcast_to(shape).movedim(value.axis or 0, 0).reshape(t.rows, -1) for each in arrays]
    given = torch.stack(rows)
    if not torch.allclose(given, given[:, :1], rtol=0.0, atol=0.0, equal_nan=True):
        raise refuse(t.place, "has other constants for every row", "compute all rows with the same constants")
    kinds, kind = given[:, 0].unique(dim=1, return_inverse=True)
    terms: list[tuple[Node, Map]] = []
    for k, numbers in enumerate(kinds.T.tolist()):
        chosen = identity(value.node.width)[kind == k]
        part = affine(t.place, [(value.node, as_map(chosen.T))])
        terms.append((function(t.place, part, *numbers), as_map(chosen)))
    return replace(value, node=affine(t.place, terms)) if terms else value


def _clamp(t: Operators, x: Features, low: Any = None, high: Any = None) -> Any:
    """Interpret a clamp with bounds that are numbers, constants by entry, or other values."""
    if not features_in([low, high]):
        bounds = (-math.inf if low is None else low, math.inf if high is None else high)
        return _by_entry(t, x, bounds, operations.POINTWISE["clamp"])
    x = x if low is None else t.maximum(x, low)
    return x if high is None else t.minimum(x, high)


def _random_slope(
    t: Operators, x: Features, lower: float = 1 / 8, upper: float = 1 / 3, is_training: bool = False, *_: Any
) -> Any:
    """Interpret RReLU, whose slope is the mean one in evaluation mode."""
    if is_training:
        raise refuse(t.place, *operations.REFUSED["rrelu"])
    return t.leaky_relu(x, (lower + upper) / 2)


def _slopes(t: Operators, x: Features, slopes: Tensor) -> Features:
    """Interpret PReLU, with a slope per channel."""
    shape = (1, -1, *(1,) * (len(x.shape) - 1)) if slopes.numel() > 1 else (1,)
    return rectify(t.place, x, slopes.reshape(shape), t.rows)


def _by_shape(name: str, t: Operators, *args: Any, **kwargs: Any) -> Any:
    """Interpret an operation to which one argument gives its shape alone."""
    k = operations.BY_SHAPE[name]
    if isinstance(args[k], Features):
        args = (*args[:k], torch.zeros((), dtype=torch.float64).expand(args[k].whole(t.rows)), *args[k + 1 :])
    return t.affine(f"aten.{name}", args, kwargs, ()) if features_in(args) else getattr(t, name)(*args, **kwargs)


def _choose(t: Operators, mask: Tensor, left: Any, right: Any) -> Any:
    """Interpret a choice by a constant mask."""
    return t.affine("aten.where", (mask, left, right), {}, (1, 2))


#: Operations that need more than their row in a table.
HANDLERS: dict[str, Callable[..., Any]] = {
    **operations.FORMULAS,
    **{name: partial(_by_shape, name) for name in operations.BY_SHAPE},
    **dict.fromkeys(operations.UNCHANGED, _unchanged),
    **dict.fromkeys(operations.DROPS, _drop),
    **dict.fromkeys(_SIZES, _size),
    "batch_norm": _normalise,
    "clamp": _clamp,
    "detach": _detach,
    "div": _divide,
    "maximum": lambda t, left, right: maximum(t.place, left, right, t.rows),
    "minimum": lambda t, left, right: minimum(t.place, left, right, t.rows),
    "mul": lambda t, left, right: multiply(t.place, left, right, t.rows),
    "pow": _power,
    "prelu": _slopes,
    "rrelu": _random_slope,
    "where": _choose,
}
#: Operations that are interpreted on constants as on other values.
_ON_ANYTHING = {*operations.UNCHANGED, *operations.DROPS, *_SIZES}
#: Operations that are known to compute functions.
_KNOWN = frozenset(itertools.chain(HANDLERS, operations.POINTWISE, operations.ADDITIVE, operations.PLAIN))
