"""The common part of all imports: scaling, kinks, lowering to layers, and a comparison with the source."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessquik.activations import KINKS, hessQuikActivationFunction
from hessquik.errors import ShapeError, UnsupportedError
from hessquik.importing.graph import Node, Pointwise, ordered, refuse
from hessquik.importing.lowering import lower
from hessquik.importing.scaling import Scaling, scaled_input, scaled_output
from hessquik.importing.univariate import resolve
from hessquik.networks import NN

__all__ = ["BOUNDS", "Imported", "Source", "import_source"]

#: Bound of the difference between the source's own runtime and the network, relative to the largest value.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
POINTS = 7


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
    """

    width: int
    dtype: torch.dtype
    runtime: str
    read: Callable[[Node], Node]
    evaluate: Callable[[Tensor], Tensor]
    precision: float = 0.0


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
        dtype: Of the weights; the source's own if not given.
        bounds: Where to compare; within two scales of the means if not given.

    Raises:
        UnsupportedError: something cannot be exact, or the values differ.
    """
    _, inner = scaled_input(scaling, source.width)
    output = resolve(scaled_output(scaling, source.read(inner)))
    if not allow_kinks:
        _refuse_kinks(output)
    network = lower(output)
    region = _region(source, scaling, bounds)
    error = _compare(source, scaling, network, region)
    return Imported(network.to(dtype or source.dtype), source.runtime, error, POINTS, region)


def _region(
    source: Source, scaling: Scaling, bounds: tuple[Sequence[float], Sequence[float]] | None
) -> tuple[list[float], list[float]]:
    """Return the bounds within which to compare.

    Raises:
        ShapeError: the given ones do not fit.
    """
    mean, scale = scaling.input(source.width)
    given = (mean - 2 * scale.abs(), mean + 2 * scale.abs()) if bounds is None else bounds
    lower, upper = (torch.as_tensor(bound, dtype=torch.float64) for bound in given)
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


def _compare(source: Source, scaling: Scaling, network: NN, region: tuple[list[float], list[float]]) -> float:
    """Return the largest difference from the source's values, relative to the largest value.

    Raises:
        UnsupportedError: the difference is larger than rounding errors.
    """
    generator = torch.Generator().manual_seed(0)
    mean, scale = scaling.input(source.width)
    lower, upper = (torch.tensor(bound, dtype=torch.float64) for bound in region)
    x = lower + (upper - lower) * torch.rand(POINTS, source.width, dtype=torch.float64, generator=generator)
    inner = ((x - mean) / scale).to(source.dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = source.evaluate(inner).double().reshape(POINTS, -1)
        got = network(inner.double() * scale + mean)[0]
    if not bool(torch.isfinite(expected).all()):
        raise UnsupportedError(
            f"{source.runtime} gives NaN or infinity at points between {region[0]} and {region[1]}"[:300]
            + "; pass bounds (--bounds) within which the network is defined"
        )
    out_mean, out_scale = scaling.output(expected.shape[1])
    expected = expected * out_scale + out_mean
    error = float((got - expected).abs().max() / max(float(expected.abs().max()), 1e-30))
    bound = max(BOUNDS[source.dtype], source.precision)
    if not error <= bound:
        raise UnsupportedError(
            f"the network's values must be those of {source.runtime} to {bound:.0e}, got a "
            f"difference of {error:.1e}; this is a fault of the import: please report it with the file"
        )
    return error
