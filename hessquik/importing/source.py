"""The common part of all imports: scaling, kinks, lowering to layers, and a comparison with the source."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hessquik.activations import KINKS, hessQuikActivationFunction
from hessquik.architecture import MAX_WIDTH
from hessquik.errors import ShapeError, UnsupportedError
from hessquik.importing.graph import Node, Pointwise, ordered, refuse
from hessquik.importing.lowering import lower
from hessquik.importing.scaling import Scaling, scaled_input, scaled_output
from hessquik.importing.univariate import resolve
from hessquik.networks import NN

__all__ = ["BOUNDS", "Imported", "Source", "by_rows", "import_source"]

#: Bound of the difference between the source's own runtime and the network, relative to the largest value.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
#: Most by which a network increases the rounding of its inputs and outputs.
ROUNDING = 100.0
#: Points of the comparison: a number that no reader interprets a program with.
POINTS = 11
#: Those that are evaluated alone as well: an even number, unlike that of all.
ALONE = 6
#: Those at which the source's own derivatives may be others.
KINKED_POINTS = 2


@dataclass(frozen=True, slots=True)
class Source:
    """A network of another library.

    Attributes:
        width: Number of inputs.
        dtype: Of its computation.
        runtime: Name of the library that evaluates it, for messages.
        read: Returns its output in a graph, from the value that it takes.
        evaluate: Returns its own results (n, m) at points (n, d) in its own units, as the source computes them.
        precision: Of the runtime's own functions, relative.
        differentiate: Returns its own derivatives (n, d) of the sum of its results, each times its weight (m,), at
            points (n, d), if it has any.
    """

    width: int
    dtype: torch.dtype
    runtime: str
    read: Callable[[Node], Node]
    evaluate: Callable[[Tensor], Tensor]
    precision: float = 0.0
    differentiate: Callable[[Tensor, Tensor], Tensor | None] = lambda x, weights: None


def by_rows(evaluate: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    """Return a function of any number of points from one of exactly ``rows`` points."""

    def evaluate_all(x: Tensor) -> Tensor:
        padded = torch.cat([x, x[:1].expand(-len(x) % rows, -1)])
        return torch.cat([evaluate(chunk) for chunk in padded.split(rows)])[: len(x)]

    return evaluate_all


@contextmanager
def _of_a_size_to_be_read() -> Iterator[None]:
    """Turn the errors that too large a network causes into one that says so.

    Raises:
        UnsupportedError: the network has too many nodes in a row, or its matrices do not fit into the memory.
    """
    try:
        yield
    except (MemoryError, RecursionError) as error:
        raise UnsupportedError(
            f"the network is too large or too deep to be read here ({type(error).__name__}); make it smaller"
        ) from None


@dataclass(frozen=True, slots=True)
class Imported:
    """An imported network, and the comparison with its source.

    Attributes:
        network: The network.
        runtime: Name of the library that evaluated the source.
        error: The largest difference of values, relative to the largest value.
        points: Number of points where they were compared.
        region: Lower and upper bounds of these points.
    """

    network: NN
    runtime: str
    error: float
    points: int
    region: tuple[list[float], list[float]]


@torch.random.fork_rng(devices=[])
@_of_a_size_to_be_read()
def import_source(
    source: Source,
    scaling: Scaling,
    allow_kinks: bool,
    dtype: torch.dtype | None = None,
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Imported:
    """Build the network of a source, and compare their values.

    Args:
        source: The source.
        scaling: The scaling of its data before training.
        allow_kinks: Whether functions whose first derivatives jump are let through.
        dtype: Of the weights. If not given, the source's own, or float64 where float32 would lose digits.
        bounds: Where to compare; within two scales of the means if not given.

    Raises:
        UnsupportedError: something cannot be exact, or the values differ.
    """
    if dtype not in {None, *BOUNDS}:
        raise ShapeError(f"dtype must be torch.float32 or torch.float64, got {dtype!r:.60}")
    if source.width > MAX_WIDTH:
        raise UnsupportedError(f"the network must have at most {MAX_WIDTH} inputs, got {source.width}")
    region = _region(source, scaling, bounds)
    x = _points(region)
    _, inner = scaled_input(scaling, source.width)
    read = source.read(inner)
    if not read.width:
        raise UnsupportedError("the network must have at least one output, got none")
    output = resolve(scaled_output(scaling, read), x)
    if not allow_kinks:
        _refuse_kinks(output)
    lowered = lower(output)
    network, error = _in_dtype(source, scaling, lowered, x, dtype)
    _expect_own_derivatives(source, scaling, lowered, x)
    return Imported(network, source.runtime, error, POINTS, region)


def _points(region: tuple[list[float], list[float]]) -> Tensor:
    """Return the points of the comparison."""
    generator = torch.Generator().manual_seed(0)
    lower, upper = (torch.tensor(bound, dtype=torch.float64) for bound in region)
    return lower + (upper - lower) * torch.rand(POINTS, len(lower), dtype=torch.float64, generator=generator)


def _region(
    source: Source, scaling: Scaling, bounds: tuple[Sequence[float], Sequence[float]] | None
) -> tuple[list[float], list[float]]:
    """Return the bounds within which to compare.

    Raises:
        ShapeError: the given ones do not fit.
    """
    mean, scale = scaling.input(source.width)
    given = (mean - 2 * scale.abs(), mean + 2 * scale.abs()) if bounds is None else bounds
    try:
        lower, upper = (torch.as_tensor(bound, dtype=torch.float64) for bound in given)
    except (TypeError, ValueError, RuntimeError):
        raise ShapeError(
            f"bounds must be a pair of {source.width} lower and {source.width} upper numbers, got {given!r:.100}"
        ) from None
    if lower.shape != (source.width,) or upper.shape != (source.width,) or not bool((lower < upper).all()):
        raise ShapeError(
            f"bounds must be {source.width} lower and {source.width} upper numbers, each lower one below its upper "
            f"one, got {lower.tolist()} and {upper.tolist()}"[:300]
        )
    return lower.tolist(), upper.tolist()


def _refuse_kinks(output: Node) -> None:
    """Refuse the first function whose first derivative jumps, by the name of its node."""
    for node in ordered([output]):
        function = node.function if isinstance(node, Pointwise) else None
        if isinstance(function, hessQuikActivationFunction) and function.continuous_derivatives < 1:
            raise refuse(
                node.place,
                f"is linear in pieces or has a kink ({type(function).__name__}): {KINKS[0]}, so that Hessians of the "
                "network are zero almost everywhere or say nothing about it",
                "train with a smooth activation such as softplus, SiLU or tanh, or pass allow_kinks=True "
                "(--allow-kinks) to serve it with that fact in its metadata",
            )


def _in_dtype(
    source: Source, scaling: Scaling, network: NN, x: Tensor, dtype: torch.dtype | None
) -> tuple[NN, float]:
    """Return a float64 network in the wanted dtype, and its error in it.

    If no dtype is wanted, weights of a float32 source remain in float64 where float32 would lose digits, as a scale
    that is small beside its mean does when it is folded into them.

    Raises:
        UnsupportedError: the network differs from its source, or loses digits in the wanted dtype.
    """
    rounding = _rounding(source, scaling, network.dim_output())
    bound = max(BOUNDS[source.dtype], source.precision, min(rounding, BOUNDS[torch.float32]))
    exact = _error(source, scaling, network, x)
    if bound < exact <= rounding:
        raise UnsupportedError(
            "scales of inputs and outputs must not be so small beside their means that float64 rounds them away, got "
            f"a difference of {exact:.1e} from the values of {source.runtime}; give the network units of its own"
        )
    if not exact <= bound:
        raise UnsupportedError(
            f"the network's values must be those of {source.runtime} to {bound:.0e}, got a difference of "
            f"{exact:.1e}; give it weights in float64 if it cancels its digits; else this is a fault of the import: "
            "please report it with the file"
        )
    wanted = dtype or source.dtype
    rounded = copy.deepcopy(network).to(wanted)
    error = _error(source, scaling, rounded, x)
    if error <= max(bound, BOUNDS[wanted]):
        return rounded, error
    if dtype is None:
        return network, exact
    raise UnsupportedError(
        f"weights in {str(dtype).removeprefix('torch.')} lose too many digits of this network: its values differ "
        f"from those of {source.runtime} by {error:.1e}; pass dtype=torch.float64 (--dtype float64)"
    )


def _expect_own_derivatives(source: Source, scaling: Scaling, network: NN, x: Tensor) -> None:
    """Refuse a source whose own derivatives are not those of its values, at any but a few points.

    Rounding may move a kink past a few points.
    """
    mean, scale = scaling.input(source.width)
    out_mean, out_scale = scaling.output(network.dim_output())
    weights = torch.cos(torch.arange(len(out_scale), dtype=torch.float64))
    inner = (x - mean) / scale
    own = source.differentiate(inner.to(source.dtype), weights)
    if own is None:
        return
    with torch.no_grad():
        value, gradient, *_ = network(x, do_gradient=True)
    found = scale * (gradient @ (weights / out_scale))
    precision = max(BOUNDS[source.dtype], source.precision)
    size = ((value - out_mean) / out_scale).abs().max() / (inner.amax(0) - inner.amin(0))
    excess = (own.double() - found).abs() - precision * size - torch.finfo(source.dtype).tiny
    error = float(excess.amax(1).kthvalue(POINTS - KINKED_POINTS).values)
    if error > math.sqrt(precision) * float(found.abs().max()):
        raise UnsupportedError(
            f"the derivatives of the network's values must be those that {source.runtime} has, got a difference of "
            f"{error:.1e}; take out what changes derivatives alone: a torch.autograd.Function with a backward "
            "of its own, hooks on gradients, torch.inference_mode"
        )


def _rounding(source: Source, scaling: Scaling, outputs: int) -> float:
    """Return the relative size of what float64 rounds of physical units, where scales are small beside the means."""
    sides = (scaling.input(source.width), scaling.output(outputs))
    return ROUNDING * torch.finfo(torch.float64).eps * max(float((mean / scale).abs().max()) for mean, scale in sides)


def _error(source: Source, scaling: Scaling, network: NN, x: Tensor) -> float:
    """Return the largest difference from the source's values at points, relative to the largest value.

    Both take the points as the network's dtype has them; values are compared in the source's own units, so that a
    large mean of the outputs hides nothing.

    Raises:
        UnsupportedError: the source has no finite values there, or values that depend on other points.
    """
    x = x.to(next(network.parameters()).dtype)
    mean, scale = scaling.input(source.width)
    inner = ((x.double() - mean) / scale).to(source.dtype)
    expected = _values(source, inner)
    if not bool(torch.isfinite(expected).all()):
        raise UnsupportedError(
            f"{source.runtime} gives NaN or infinity at points between {x.amin(0).tolist()} and {x.amax(0).tolist()}"[
                :300
            ]
            + "; pass bounds (--bounds) within which the network is defined"
        )
    part = slice(ALONE)
    alone = _difference(source, _values(source, inner[part]), expected[part])
    if not alone <= max(BOUNDS[source.dtype], source.precision):
        raise UnsupportedError(
            f"{source.runtime} gives a point other values when it is evaluated with other points, so that they "
            "depend on those points or on their number; write the network such that each row is computed alone"
        )
    out_mean, out_scale = scaling.output(expected.shape[1])
    with torch.no_grad():
        return _difference(source, (network(x)[0].double() - out_mean) / out_scale, expected)


def _values(source: Source, inner: Tensor) -> Tensor:
    """Return the source's own values (n, m), without its warnings."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return source.evaluate(inner).double().reshape(len(inner), -1)


def _difference(source: Source, got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number that is expected."""
    smallest = torch.finfo(source.dtype).tiny
    return float((got - expected).abs().max() / max(float(expected.abs().max()), smallest))
