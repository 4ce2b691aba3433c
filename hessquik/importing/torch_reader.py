"""torch modules and exported programs as graphs.

``torch.export`` captures a module as a list of calls of ATen operators; a ``.pt2`` file holds such a list as JSON.
:func:`read` interprets either, on a fixed number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessquik.errors import UnsupportedError
from hessquik.importing import torch_operations as operations
from hessquik.importing.graph import Node, refuse
from hessquik.importing.interpreting import (
    Features,
    apply_affine,
    as_float64,
    features_in,
    maximum,
    minimum,
    multiply,
    readable,
    rectify,
)

__all__ = ["HANDLERS", "Call", "Program", "Ref", "read", "run"]


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
        """The operator's name without package and overload."""
        return self.target.split(".")[1] if self.target.startswith("aten.") else self.target

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
    """

    input: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    constants: dict[str, Tensor]
    calls: list[Call]
    output: str
    takes_any_rows: bool = False

    @property
    def width(self) -> int:
        """Number of inputs of a point."""
        return int(torch.Size(self.shape[1:]).numel())


def read(program: Program, point: Node) -> Node:
    """Return a program's output as a value of a graph, from the value that it takes.

    Raises:
        UnsupportedError: the program does something that cannot be exact here.
    """
    rows, *shape = program.shape
    values: dict[str, Any] = {name: as_float64(tensor) for name, tensor in program.constants.items()}
    values[program.input] = Features(point, tuple(shape))
    _expect_known(program)
    for call in program.calls:
        if call.computes:
            args, kwargs = _arguments(call, values)
            with readable(_place(call)):
                _store(call, _interpret(call, args, kwargs, rows), values)
    output = values[program.output]
    if not isinstance(output, Features):
        raise refuse(program.output, "does not depend on the input", "return what the network computes of it")
    return output.node


def _expect_known(program: Program) -> None:
    """Refuse a program with an operator that cannot be exact, before anything of it is computed."""
    dependent = {program.input}
    for call in program.calls:
        if not call.computes:
            continue
        if dependent.isdisjoint(_names(call.args)) and dependent.isdisjoint(_names(list(call.kwargs.values()))):
            continue
        tables = (HANDLERS, operations.POINTWISE, operations.ADDITIVE)
        if call.target != "_operator.getitem" and not any(call.operation in table for table in tables):
            raise _unknown(call)
        dependent |= set(call.outputs) if call.operation not in _SIZES else set()


def _names(argument: Any) -> list[str]:
    """Return the names of all values in an argument."""
    if isinstance(argument, list | tuple):
        return [name for part in argument for name in _names(part)]
    return [argument.name] if isinstance(argument, Ref) else []


def run(program: Program, x: Tensor) -> Tensor:
    """Run the program itself on points (rows, d), by torch."""
    values: dict[str, Any] = {
        name: tensor.to(x.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in program.constants.items()
    }
    values[program.input] = x.reshape(-1, *program.shape[1:])
    for call in program.calls:
        if call.computes:
            args, kwargs = _arguments(call, values)
            _store(call, _compute(call, args, kwargs), values)
    result: Tensor = values[program.output]
    return result.reshape(len(x), -1)


#: Arguments that choose device and layout, and do not change values.
_IGNORED = {"device", "layout", "memory_format", "non_blocking", "copy", "pin_memory"}


def _arguments(call: Call, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call by position and by name."""
    kwargs = {name: _resolved(value, values) for name, value in call.kwargs.items() if name not in _IGNORED}
    return _resolved(call.args, values), kwargs


def _compute(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Evaluate a call on tensors."""
    if call.operation not in operations.UNCHANGED:
        return _function(call)(*args, **kwargs)
    dtypes = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.dtype)]
    return args[0].to(dtypes[0]) if dtypes else args[0]


def _store(call: Call, result: Any, values: dict[str, Any]) -> None:
    """Store the results of a call under its names."""
    results = result if isinstance(result, list | tuple) and len(call.outputs) > 1 else [result]
    if isinstance(result, list | tuple) and len(call.outputs) == 1:
        results = [result]  # a list that later calls take apart
    values.update(zip(call.outputs, results, strict=True))


def _resolved(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, list | tuple):
        return type(argument)(_resolved(part, values) for part in argument)
    return argument


#: Operators on sizes, which are plain integers here.
_ON_SIZES: dict[str, Callable[..., Any]] = {
    "_operator.add": lambda a, b: a + b,
    "_operator.sub": lambda a, b: a - b,
    "_operator.mul": lambda a, b: a * b,
    "_operator.floordiv": lambda a, b: a // b,
    "_operator.getitem": lambda a, b: a[b],
    "<built-in function add>": lambda a, b: a + b,
}


def _function(call: Call) -> Callable[..., Any]:
    """Return the function that a call is of, out of those that only compute."""
    if call.target in _ON_SIZES:
        return _ON_SIZES[call.target]
    name = call.operation
    is_known = name in {*operations.ADDITIVE, *operations.POINTWISE, *operations.CONSTANT, *HANDLERS}
    if not call.target.startswith("aten.") or not is_known:
        raise _unknown(call)
    packet = getattr(torch.ops.aten, name)
    overload = call.target.split(".")[2] if call.target.count(".") == 2 else "default"
    found: Callable[..., Any] = getattr(packet, overload)
    return found


def _place(call: Call) -> str:
    return (
        f"{call.place or call.outputs[0]!r} ({call.target})" if call.place else f"{call.outputs[0]} ({call.target})"
    )


def _unknown(call: Call) -> UnsupportedError:
    if call.operation in operations.REFUSED:
        return refuse(_place(call), *operations.REFUSED[call.operation])
    if "higher_order" in call.target:
        return refuse(_place(call), "decides or repeats while it runs", "write forward without branches on values")
    if not call.target.startswith("aten."):
        return refuse(_place(call), "is an operator of your own", "write it with torch's operators")
    return refuse(
        _place(call),
        "is not among the operations that can be exact here",
        "write it with those that the table of supported operations lists",
    )


def _interpret(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """Convert a call to values of the graph, or evaluate it if its arguments are constants."""
    if call.target == "_operator.getitem":
        return args[0][args[1]]
    if not (features_in(args) + features_in(list(kwargs.values()))):
        return as_float64(_compute(call, args, kwargs))
    return HANDLERS.get(call.operation, _by_table)(call, args, kwargs, rows)


def _by_table(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """Interpret a function of one variable or an affine operation."""
    name = call.operation
    if name in operations.POINTWISE and isinstance(args[0], Features) and len(features_in(args)) == 1:
        others = [float(arg) if isinstance(arg, Tensor) and arg.numel() == 1 else arg for arg in args[1:]]
        return Features(operations.POINTWISE[name](_place(call), args[0].node, *others, **kwargs), args[0].shape)
    if name in operations.ADDITIVE:
        return _linear(call, args, kwargs, rows)
    raise _unknown(call)


#: Operators whose results are sizes.
_SIZES = ("size", "sym_size")


def _size(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    sizes = (rows, *args[0].shape)
    return sizes[args[1]] if len(args) > 1 else sizes


def _drop(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Features:
    """Return the value as it is, in evaluation mode."""
    if args[1] and args[2]:
        raise _unknown(call)
    value: Features = args[0]
    return value


def _normalise(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """Interpret batch normalisation, which is affine in evaluation mode."""
    if args[5]:
        raise refuse(_place(call), *operations.REFUSED["native_batch_norm"])
    return _linear(call, args, kwargs, rows)


def _multiply(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """Interpret a product or quotient."""
    if kwargs.get("rounding_mode") is not None:
        raise refuse(_place(call), "rounds a quotient", "divide without rounding_mode")
    left, right = args
    return multiply(_place(call), left, right, rows, divide=call.operation == "div")


def _unchanged(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """Return the value as it is, unless it becomes an integer."""
    dtypes = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.dtype)]
    if any(not dtype.is_floating_point for dtype in dtypes):
        raise refuse(_place(call), "makes integers of the values", "keep the values as real numbers")
    if not {torch.float32, torch.float64} >= set(dtypes):
        raise refuse(_place(call), "rounds the values to few digits", "keep the values as float32 or float64")
    return args[0]


def _power(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """Interpret z to a power, or a positive number to the power z."""
    base, exponent = args
    if isinstance(base, Features) and not isinstance(exponent, Features | Tensor):
        return _by_table(call, args, kwargs, rows)
    if isinstance(base, int | float) and base > 0:
        place = _place(call)
        scaled = multiply(place, exponent, torch.tensor(math.log(base), dtype=torch.float64), rows)
        return Features(operations.POINTWISE["exp"](place, scaled.node), exponent.shape)
    raise refuse(
        _place(call), "raises to a power that is not one number", "write x^y as exp(y log x) with smooth parts"
    )


def _gate(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Features:
    """Interpret u ⊙ sigmoid(v) with the halves u and v of a value."""
    dim = args[1] if len(args) > 1 else -1
    left, right = apply_affine(_place(call), lambda z: z.chunk(2, dim), args[:1], (), rows)
    gate = Features(operations.POINTWISE["sigmoid"](_place(call), right.node), right.shape)
    return multiply(_place(call), left, gate, rows)


def _random_slope(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Features:
    """Interpret RReLU, whose slope is the mean one in evaluation mode."""
    x, lower, upper, is_training = (*args, *(1 / 8, 1 / 3, False)[len(args) - 1 :])[:4]
    if is_training:
        raise _unknown(call)
    return Features(operations.POINTWISE["leaky_relu"](_place(call), x.node, (lower + upper) / 2), x.shape)


def _slopes(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Features:
    """Interpret PReLU, with a slope per channel."""
    x, slopes = args
    shape = (1, -1, *(1,) * (len(x.shape) - 1)) if slopes.numel() > 1 else (1,)
    return rectify(_place(call), x, slopes.reshape(shape), rows)


def _linear(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Any:
    """Interpret an affine operation."""
    function = _function(call)
    kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    return apply_affine(
        _place(call), lambda *a: function(*a, **kwargs), args, operations.ADDITIVE[call.operation], rows
    )


#: Operations that need more than their row in a table.
HANDLERS: dict[str, Callable[[Call, tuple[Any, ...], dict[str, Any], int], Any]] = {
    **dict.fromkeys(operations.UNCHANGED, _unchanged),
    **dict.fromkeys(_SIZES, _size),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _drop),
    **dict.fromkeys(("mul", "div"), _multiply),
    "batch_norm": _normalise,
    "glu": _gate,
    "pow": _power,
    "prelu": _slopes,
    "rrelu": _random_slope,
    "maximum": lambda call, args, kwargs, rows: maximum(_place(call), args[0], args[1], rows),
    "minimum": lambda call, args, kwargs, rows: minimum(_place(call), args[0], args[1], rows),
}
