"""Arrays that record the operations applied to them instead of computing.

An :class:`Array` stands for a tensor of the shape (rows, k, w), the number of rows being left open. It takes part in
torch's functions by their protocol (``__torch_function__``), so code written for tensors, such as
:mod:`hessquik.calculus` and every activation, runs on it unchanged and leaves a :class:`~hessquik.graph.Graph`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from hessquik import algebra
from hessquik.errors import TraceError
from hessquik.graph import Builder

__all__ = ["Array"]


class Array:
    """A node of a graph that is being built, used like a tensor (rows, k, w).

    Args:
        builder: The graph.
        index: The node.

    Examples:
        >>> builder = Builder()
        >>> z = Array(builder, builder.input("z", (1, 3)))
        >>> slope = 1 - torch.tanh(z) ** 2
        >>> print(builder.finish({"slope": slope.index}))
        %0[1, 3] = input(z)
        %1[1, 3] = tanh(%0)
        %2[1, 3] = mul(%1, %1)
        %3[1, 1] = constant() = 1
        %4[1, 3] = sub(%3, %2)
        return slope=%4
    """

    __slots__ = ("builder", "index")

    def __init__(self, builder: Builder, index: int) -> None:
        """Keep the graph and the node's index."""
        self.builder = builder
        self.index = index

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Record a function of torch."""
        handler = FUNCTIONS.get(function)
        if handler is None:
            name = getattr(function, "__name__", str(function))
            raise TraceError(
                f"torch's {name} cannot be traced; expected a composition of "
                f"{', '.join(sorted({f.__name__ for f in FUNCTIONS}))}"
            )
        return handler(*args, **(kwargs or {}))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (1, k, w); the first axis stands for the rows."""
        return (1, *self.builder.nodes[self.index].shape)

    @property
    def ndim(self) -> int:
        """Number of axes, including that of the rows."""
        return len(self.shape)

    @property
    def mT(self) -> Array:
        """The last two axes exchanged."""
        axes = range(self.ndim - 1)
        return self._then("permute", *axes[:-2], axes[-1], axes[-2])

    def constant(self, data: Tensor) -> Array:
        """Return numbers (1, k, w) as a constant of the same graph."""
        return Array(self.builder, _node(self.builder, data))

    def _then(self, op: str, *arguments: Any) -> Array:
        return Array(self.builder, self.builder.add(op, self.index, arguments=arguments))

    def __getattr__(self, name: str) -> Any:
        """Return a method of tensors, if it can be traced."""
        function = getattr(Tensor, name, None)
        handler = FUNCTIONS.get(function) or FUNCTIONS.get(getattr(torch, name, None))  # type: ignore[arg-type]
        if handler is None:
            raise AttributeError(f"a traced array has no {name}")
        return lambda *args, **kwargs: handler(self, *args, **kwargs)

    def __bool__(self) -> NoReturn:
        """Raise an error, since a traced array has no values to test."""
        raise TraceError("a traced array has no truth value; use torch.where to choose between entries")

    def __add__(self, other: Any) -> Array:
        return _apply("add", self, other)

    def __radd__(self, other: Any) -> Array:
        return _apply("add", other, self)

    def __sub__(self, other: Any) -> Array:
        return _apply("sub", self, other)

    def __rsub__(self, other: Any) -> Array:
        return _apply("sub", other, self)

    def __mul__(self, other: Any) -> Array:
        return _apply("mul", self, other)

    def __rmul__(self, other: Any) -> Array:
        return _apply("mul", other, self)

    def __truediv__(self, other: Any) -> Array:
        return _apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Array:
        return _apply("div", other, self)

    def __neg__(self) -> Array:
        return _apply("neg", self)

    def __abs__(self) -> Array:
        return _apply("abs", self)

    def __pow__(self, exponent: Any) -> Array:
        return _power(self, exponent)

    def __matmul__(self, other: Any) -> Array:
        return _matmul(self, other)

    def __rmatmul__(self, other: Any) -> Array:
        return _matmul(other, self)

    def __gt__(self, other: Any) -> Array:
        return _apply("gt", self, other)

    def __ge__(self, other: Any) -> Array:
        return _apply("ge", self, other)

    def __lt__(self, other: Any) -> Array:
        return _apply("gt", other, self)

    def __le__(self, other: Any) -> Array:
        return _apply("ge", other, self)


def _builder(*operands: Any) -> Builder:
    """Return the graph that the operands belong to."""
    return next(operand.builder for operand in operands if isinstance(operand, Array))


def _node(builder: Builder, operand: Any) -> int:
    """Return an operand's node; numbers and tensors become constants, which all rows share."""
    if isinstance(operand, Array):
        return operand.index
    if not isinstance(operand, Tensor):
        return builder.full(operand)
    return builder.constant(operand.squeeze(0) if operand.ndim > 2 and operand.shape[0] == 1 else operand)


def _apply(op: str, *operands: Any) -> Array:
    builder = _builder(*operands)
    return Array(builder, builder.add(op, *[_node(builder, operand) for operand in operands]))


def _primitive(op: str) -> Callable[..., Array]:
    return lambda *operands: _apply(op, *operands)


def _matmul(a: Any, b: Any) -> Array:
    return _apply("matmul", a, b)


def _power(x: Any, exponent: Any) -> Array:
    """Return x to an integer power, by repeated squaring, or to the power ½ or −½."""
    if exponent in (0.5, -0.5):
        root = _apply("sqrt", x)
        return root if exponent > 0 else 1 / root
    if not isinstance(exponent, int | float) or exponent != int(exponent):
        raise TraceError(f"a power must be a whole number, 0.5 or -0.5, got {exponent}")
    if exponent < 0:
        return 1 / _power(x, -exponent)
    result: Any = None
    square, left = x, int(exponent)
    while left:
        if left % 2:
            result = square if result is None else result * square
        left //= 2
        if left:
            square = square * square
    power: Array = 0 * x + 1 if result is None else result
    return power


def _clamp(x: Array, min: float | None = None, max: float | None = None) -> Array:
    if min is not None:
        x = _apply("maximum", x, min)
    return x if max is None else _apply("minimum", x, max)


def _softplus(x: Array, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """Return log(1 + exp(βx)) / β without overflow, and x where βx > threshold."""
    scaled = beta * x
    magnitude = _apply("abs", scaled)
    soft = (_apply("maximum", scaled, 0.0) + _apply("log1p", _apply("exp", -magnitude))) / beta
    return _apply("where", scaled > threshold, x, soft)


def _gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "none":
        return x * _apply("ndtr", x)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1 + _apply("tanh", inner))


def _elu(x: Array, alpha: float = 1.0, inplace: bool = False) -> Array:
    return _apply("where", x > 0, x, alpha * _apply("expm1", _apply("minimum", x, 0.0)))


def _sum(x: Array, dim: int, keepdim: bool = False) -> Array:
    if dim % x.ndim != x.ndim - 2 or not keepdim:
        raise TraceError("a sum must run over the last axis but one and keep it")
    return x._then("sum")


def _cat(arrays: Sequence[Any], dim: int = 0) -> Array:
    if dim not in (-1, arrays[0].ndim - 1):
        raise TraceError("arrays can be joined along the last axis only")
    return _apply("cat", *arrays)


def _split(x: Array, sizes: Sequence[int], dim: int = 0) -> tuple[Array, ...]:
    if dim not in (-1, x.ndim - 1):
        raise TraceError("arrays can be split along the last axis only")
    pieces, start = [], 0
    for size in sizes:
        pieces.append(x._then("slice", start, start + size))
        start += size
    return tuple(pieces)


def _reshape(x: Array, shape: Sequence[int]) -> Array:
    return x._then("reshape", *shape)


def _flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    if not start:
        raise TraceError("the axis of the rows cannot be joined with another")
    shape = x.shape[1:]
    return _reshape(x, (*shape[: start - 1], math.prod(shape[start - 1 : end]), *shape[end:]))


def _unflatten(x: Array, dim: int, sizes: Sequence[int]) -> Array:
    axis, shape = dim % x.ndim - 1, x.shape[1:]
    return _reshape(x, (*shape[:axis], *sizes, *shape[axis + 1 :]))


def _unsqueeze(x: Array, dim: int) -> Array:
    axis, shape = dim % (x.ndim + 1) - 1, x.shape[1:]
    return _reshape(x, (*shape[:axis], 1, *shape[axis:]))


def _transpose(x: Array, dim0: int, dim1: int) -> Array:
    axes = list(range(x.ndim - 1))
    i, j = dim0 % x.ndim - 1, dim1 % x.ndim - 1
    axes[i], axes[j] = axes[j], axes[i]
    return x._then("permute", *axes)


def _diagonal(x: Array, dim1: int = 0, dim2: int = 1) -> Array:
    if (dim1, dim2) != (-3, -2):
        raise TraceError("a diagonal must run along the last axes but one")
    return x._then("diagonal").mT


def _new_zeros(x: Array, *shape: int) -> Array:
    return Array(x.builder, x.builder.full(0.0, shape[1:]))


def _number_like(number: float) -> Callable[..., Array]:
    return lambda x, **_: Array(x.builder, x.builder.full(number))


#: The handler that records each of torch's functions that can be traced.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def _register(handler: Callable[..., Any], *functions: Callable[..., Any]) -> None:
    FUNCTIONS.update(dict.fromkeys(functions, handler))


def _fill_table() -> None:
    t, f = Tensor, functional
    for op in ("add", "sub", "mul", "div", "neg", "abs", "sqrt", "exp", "expm1", "log", "log1p", "sigmoid", "tanh"):
        _register(_primitive(op), getattr(torch, op), getattr(t, op))
    for op in ("sin", "cos", "erf", "atan", "maximum", "minimum", "gt", "ge"):
        _register(_primitive(op), getattr(torch, op), getattr(t, op))
    _register(_primitive("add"), t.__add__, t.__radd__)
    _register(lambda a, b: _apply("sub", b, a), t.__rsub__)
    _register(_primitive("sub"), t.__sub__)
    _register(_primitive("mul"), t.__mul__, t.__rmul__)
    _register(_primitive("div"), t.__truediv__)
    _register(lambda a, b: _apply("div", b, a), t.__rtruediv__)
    _register(_matmul, torch.matmul, t.matmul, t.__matmul__)
    _register(lambda a, b: _matmul(b, a), t.__rmatmul__)
    _register(lambda a, b: _apply("gt", b, a), torch.lt, t.lt, t.__lt__)
    _register(lambda a, b: _apply("ge", b, a), torch.le, t.le, t.__le__)
    _register(_primitive("gt"), t.__gt__)
    _register(_primitive("ge"), t.__ge__)
    _register(_primitive("where"), torch.where)
    _register(_primitive("ndtr"), torch.special.ndtr)
    _register(_primitive("atan"), torch.arctan, t.arctan)
    _register(lambda x: x * x, torch.square, t.square)
    _register(lambda x: 1 / x, torch.reciprocal, t.reciprocal)
    _register(lambda x: 1 / _apply("sqrt", x), torch.rsqrt, t.rsqrt)
    _register(_power, torch.pow, t.pow, t.__pow__)
    _register(_clamp, torch.clamp, t.clamp)
    _register(lambda x, mask, value: _apply("where", mask, value, x), torch.masked_fill, t.masked_fill)
    _register(_softplus, f.softplus)
    _register(lambda x, inplace=False: x * _apply("sigmoid", x), f.silu)
    _register(lambda x: -_softplus(-x, threshold=math.inf), f.logsigmoid)
    _register(lambda x, inplace=False: x * _apply("tanh", _softplus(x)), f.mish)
    _register(lambda x: x / (1 + _apply("abs", x)), f.softsign)
    _register(lambda x, inplace=False: _apply("maximum", x, 0.0), f.relu, torch.relu, t.relu)
    _register(_gelu, f.gelu)
    _register(_elu, f.elu)
    _register(_sum, torch.sum, t.sum)
    _register(_cat, torch.cat)
    _register(_split, torch.split, t.split)
    _register(_flatten, torch.flatten, t.flatten)
    _register(_unflatten, torch.unflatten, t.unflatten)
    _register(_unsqueeze, torch.unsqueeze, t.unsqueeze)
    _register(_transpose, torch.transpose, t.transpose)
    _register(_diagonal, torch.diagonal, t.diagonal)
    _register(_new_zeros, t.new_zeros)
    _register(lambda a, b: _apply("congruence", a, b), algebra.congruence)
    _register(lambda a: a._then("pairs"), algebra.pairs)
    _register(lambda a: a._then("unpack"), algebra.unpack)
    _register(lambda a: a._then("pack"), algebra.pack)
    _register(_number_like(1.0), torch.ones_like)
    _register(_number_like(0.0), torch.zeros_like)


_fill_table()
