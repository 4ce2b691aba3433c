"""The quantities that can be asked for: name, shape, order and formula, each in one place.

This module imports nothing of torch, so that servers' front ends and clients can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["QUANTITIES", "SPREADS", "Quantity", "highest_order", "needs_directions", "register"]


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something that can be asked about a network at a point.

    Attributes:
        name: Its name, in requests and replies.
        axes: Of its array at one point, a letter each: ``d`` inputs, ``m`` outputs, ``k`` directions, ``p`` entries
            of a triangle, d(d+1)/2.
        order: Of the highest derivative that it contains.
        formula: How it follows from :class:`hessquik.calculus.Backward` or :class:`hessquik.calculus.Forward`.
        text: The formula for readers.
    """

    name: str
    axes: str
    order: int
    formula: Callable[[Any], Any]
    text: str = ""

    @property
    def is_whole(self) -> bool:
        """Return whether it has the second derivatives of all pairs of inputs."""
        return self.order == 2 and ("dd" in self.axes or "p" in self.axes)

    @property
    def is_directional(self) -> bool:
        """Return whether it needs directions."""
        return "k" in self.axes

    def shape(self, d: int, m: int, k: int = 0) -> tuple[int, ...]:
        """Return the shape at one point.

        Examples:
            >>> QUANTITIES["hvp"].shape(d=10, m=1, k=3)
            (3, 10, 1)
        """
        extents = {"d": d, "m": m, "k": k, "p": d * (d + 1) // 2}
        return tuple(extents[axis] for axis in self.axes)

    def size(self, d: int, m: int, k: int = 0) -> int:
        """Return how many numbers it has at one point."""
        return prod(self.shape(d, m, k))


#: Every quantity by its name, in the order of replies.
QUANTITIES: dict[str, Quantity] = {}


def register(quantity: Quantity) -> None:
    """Make a quantity known to everything that evaluates or describes quantities.

    Examples:
        >>> from hessquik.quantities import QUANTITIES, Quantity, register
        >>> register(Quantity("slope", "m", 1, lambda at: (at.gradient * at.gradient).sum(-2, keepdim=True) ** 0.5))
        >>> del QUANTITIES["slope"]
    """
    QUANTITIES[quantity.name] = quantity


for _quantity in (
    Quantity("value", "m", 0, lambda at: at.value, "f"),
    Quantity("gradient", "dm", 1, lambda at: at.gradient, "∂f / ∂x"),
    Quantity("hessian", "ddm", 2, lambda at: at.hessian, "∂²f / ∂x²"),
    Quantity("laplacian", "m", 2, lambda at: at.laplacian, "Σ_a ∂²f / ∂x_a²"),
    Quantity("hessian_diagonal", "dm", 2, lambda at: at.hessian_diagonal, "∂²f / ∂x_a²"),
    Quantity("jvp", "km", 1, lambda at: at.jvp, "J v"),
    Quantity("hvp", "kdm", 2, lambda at: at.hvp, "H v"),
    Quantity("curvature", "km", 2, lambda at: at.curvature, "vᵀ H v"),
    Quantity("hessian_packed", "pm", 2, lambda at: at.hessian_packed, "∂²f / ∂x_a ∂x_b for b ≤ a, row by row"),
):
    register(_quantity)


#: Standard deviations over an ensemble's members, by name, with the quantity that each is of.
SPREADS = {f"{name}_std": name for name in ("value", "gradient", "hessian")}


def needs_directions(names: Collection[str]) -> bool:
    """Return whether one of the named quantities needs directions."""
    return any(QUANTITIES[name].is_directional for name in names)


def highest_order(names: Collection[str]) -> int:
    """Return the order of the highest derivative among the named quantities."""
    return max((QUANTITIES[name].order for name in names), default=0)
