"""The domain of a model: its bounds, and the distances of points from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = ["OUTSIDE", "Domain", "Outside"]

Array = npt.NDArray[np.floating[Any]]
#: Treatment of points outside: they are allowed, or the request is refused.
Outside = Literal["allow", "refuse"]
OUTSIDE: tuple[str, ...] = get_args(Outside)
#: An excess of this many units of rounding of the larger bound is none.
ROUNDINGS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """The box between a model's bounds.

    Attributes:
        lower: Lower bounds (d,), float64.
        upper: Upper bounds (d,), float64.
        names: Names of the inputs.

    Examples:
        >>> domain = Domain.of({"lower_bounds": [0.0, -1.0], "upper_bounds": [2.0, 1.0]})
        >>> domain.distance(np.array([[1.0, 1.0], [3.0, 1.1], [0.0, -5.0]]))
        array([0. , 0.5, 2. ])
        >>> domain.first_outside(np.array([[1.0, 1.0], [3.0, 1.1]]))
        (1, 0)
    """

    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    names: tuple[str, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, Any] | None) -> Domain | None:
        """Return the domain in a model's metadata, or ``None`` if it has no bounds.

        Args:
            metadata: Metadata with ``lower_bounds``, ``upper_bounds`` and optionally ``input_names``.
        """
        lower, upper = ((metadata or {}).get(name) for name in ("lower_bounds", "upper_bounds"))
        if lower is None or upper is None:
            return None
        names = (metadata or {}).get("input_names") or [f"x{a}" for a in range(len(lower))]
        return cls(np.array(lower, np.float64), np.array(upper, np.float64), tuple(names))

    def distance(self, x: Array) -> Array:
        """Return the largest excess over a bound in units of the input's range, (n,); 0 for points within the bounds.

        Bounds are rounded to the dtype of the points, and an excess of a few rounding errors counts as 0, so that a
        point computed to lie on a bound is inside.

        Args:
            x: Points (n, d).
        """
        width = np.where(self.upper > self.lower, self.upper - self.lower, 1.0)
        with np.errstate(over="ignore"):
            distance: Array = (self._excess(x) / width).max(axis=-1).astype(x.dtype)
        return distance

    def first_outside(self, x: Array) -> tuple[int, int] | None:
        """Return the row and the input of the first number outside the bounds, or ``None``.

        Args:
            x: Points (n, d).
        """
        is_outside = self._excess(x) > 0
        if not is_outside.any():
            return None
        row, a = np.argwhere(is_outside)[0]
        return int(row), int(a)

    def _excess(self, x: Array) -> Array:
        """Return the excess of each number over its bounds, (n, d); 0 within them."""
        lower, upper = self.lower.astype(x.dtype), self.upper.astype(x.dtype)
        rounding = ROUNDINGS * np.finfo(x.dtype).eps * np.maximum(np.abs(lower), np.abs(upper))
        with np.errstate(over="ignore"):
            excess: Array = np.maximum(lower - x, x - upper)
        return np.where(excess > rounding, excess, 0)
