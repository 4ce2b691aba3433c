"""Kernels of scikit-learn as functions of a point and fixed points.

Distances are taken from the middle of the fixed points, so that ‖x − c‖² = ‖x‖² − 2 x·c + ‖c‖² keeps its digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessquik.activations import expActivation, tanhActivation
from hessquik.expressions import Formula
from hessquik.importing.graph import Node, Pointwise, Product, affine, refuse
from hessquik.importing.sklearn_parts import constant, diagonal, found_for, numbers, tensor, unsupported
from hessquik.importing.torch_operations import POINTWISE as TORCH

__all__ = ["KERNELS", "KERNEL_NUMBERS", "PROCESSES", "kernel", "process_kernel"]

_INSTEAD = "use the kernel rbf, poly, sigmoid or linear"


def _squared_distances(place: str, x: Node, points: Tensor) -> Node:
    """Return ‖x − c‖² for each point c."""
    middle = points.mean(0)
    centred, rest = affine(place, [(x, 1.0)], -middle), points - middle
    squares = TORCH["square"](place, centred)
    ones = torch.ones(x.width, len(points), dtype=torch.float64)
    return affine(place, [(squares, ones), (centred, -2 * rest.T)], (rest * rest).sum(1))


def _products(place: str, x: Node, points: Tensor, factor: float, offset: float) -> Node:
    """Return γ x·c + c₀ for each point c."""
    return affine(place, [(x, factor * points.T)], torch.full((len(points),), float(offset), dtype=torch.float64))


def _polynomial(place: str, x: Node, points: Tensor, gamma: float, degree: float, coef0: float) -> Node:
    if degree != int(degree) or degree < 1:
        raise refuse(place, f"has a polynomial kernel of degree {degree}", "use a whole degree")
    return TORCH["pow"](place, _products(place, x, points, gamma, coef0), int(degree))


def _apply(place: str, z: Node, function: Any) -> Node:
    return Pointwise(place, z.width, z, function)


#: Numbers of kernels that are given by their names.
KERNEL_NUMBERS = ("gamma", "degree", "coef0")
#: Kernels by their names, from the place, the point, the fixed points, γ, the degree and c₀.
KERNELS: dict[str, Callable[..., Node]] = {
    "linear": lambda place, x, points, gamma, degree, coef0: _products(place, x, points, 1.0, 0.0),
    "poly": _polynomial,
    "polynomial": _polynomial,
    "rbf": lambda place, x, points, gamma, degree, coef0: _apply(
        place, affine(place, [(_squared_distances(place, x, points), -gamma)]), expActivation()
    ),
    "sigmoid": lambda place, x, points, gamma, degree, coef0: _apply(
        place, _products(place, x, points, gamma, coef0), tanhActivation()
    ),
}


def kernel(place: str, x: Node, points: Any, name: Any, gamma: float | None, degree: Any, coef0: Any) -> Node:
    """Return k(x, c) for each fixed point c, of a kernel that is given by its name and its numbers.

    Raises:
        UnsupportedError: the kernel has kinks, or is not known.
    """
    if not isinstance(name, str) or name not in KERNELS:
        does = "has kinks where coordinates are equal" if name == "laplacian" else "is not among what can be imported"
        raise refuse(place, f"has a kernel ({str(name)[:60]}) that {does}", _INSTEAD)
    gamma = 1 / x.width if gamma is None else float(gamma)
    return KERNELS[name](
        place, x, tensor(points), gamma, 3 if degree is None else degree, 1 if coef0 is None else float(coef0)
    )


def process_kernel(part: Any, place: str, x: Node, points: Tensor) -> Node | None:
    """Return k(x, c) for each fixed point c, of a kernel of Gaussian processes; ``None`` stands for 0.

    Raises:
        UnsupportedError: the kernel is not known.
    """
    reader = found_for(part, PROCESSES)
    if reader is None:
        raise unsupported(f"{place} with {part}"[:200], part, _REASONS, "use RBF, RationalQuadratic or DotProduct")
    return reader(part, place, x, points)


def _scaled_distances(part: Any, place: str, x: Node, points: Tensor) -> Node:
    """Return ‖(x − c) / ℓ‖² for each point c."""
    scales = numbers(part.length_scale, x.width)
    return _squared_distances(place, affine(place, [(x, diagonal(1 / scales))]), points / scales)


def _rbf(part: Any, place: str, x: Node, points: Tensor) -> Node:
    return _apply(place, affine(place, [(_scaled_distances(part, place, x, points), -0.5)]), expActivation())


def _rational(part: Any, place: str, x: Node, points: Tensor) -> Node:
    """Return (1 + s / 2α)^−α, as exp(−α log(1 + s / 2α))."""
    argument = affine(place, [(_scaled_distances(part, place, x, points), 1 / (2 * part.alpha))])
    formula: Formula = ["exp", ["mul", -float(part.alpha), ["log1p", "z"]]]
    return _apply(place, argument, formula)


def _dot(part: Any, place: str, x: Node, points: Tensor) -> Node:
    return _products(place, x, points, 1.0, part.sigma_0**2)


def _sum(part: Any, place: str, x: Node, points: Tensor) -> Node | None:
    terms = [process_kernel(each, place, x, points) for each in (part.k1, part.k2)]
    present = [(term, 1.0) for term in terms if term is not None]
    return affine(place, present) if present else None


def _product(part: Any, place: str, x: Node, points: Tensor) -> Node | None:
    """Return the product of two kernels; a constant one scales the other."""
    for factor, other in ((part.k1, part.k2), (part.k2, part.k1)):
        if type(factor).__name__ == "ConstantKernel":
            value = process_kernel(other, place, x, points)
            return None if value is None else affine(place, [(value, float(factor.constant_value))])
    left, right = (process_kernel(each, place, x, points) for each in (part.k1, part.k2))
    return None if left is None or right is None else Product(place, left.width, left, right)


def _exponentiation(part: Any, place: str, x: Node, points: Tensor) -> Node | None:
    value = process_kernel(part.kernel, place, x, points)
    if part.exponent != int(part.exponent):
        raise refuse(place, f"raises a kernel to the power {part.exponent}", "use a whole power")
    return None if value is None else TORCH["pow"](place, value, part.exponent)


#: Kernels of Gaussian processes by the names of their classes.
PROCESSES: dict[str, Callable[[Any, str, Node, Tensor], Node | None]] = {
    "ConstantKernel": lambda part, place, x, points: constant(
        place, x, torch.full((len(points),), float(part.constant_value), dtype=torch.float64)
    ),
    "DotProduct": _dot,
    "Exponentiation": _exponentiation,
    "Product": _product,
    "RBF": _rbf,
    "RationalQuadratic": _rational,
    "Sum": _sum,
    "WhiteKernel": lambda part, place, x, points: None,  # noise of the data, which no other point has
}
_REASONS = {
    "Matern": (
        "takes the square root of a squared distance, so that its formula has no derivatives at the fitted points",
        "use RBF or RationalQuadratic",
    )
}
