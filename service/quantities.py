"""The quantities that can be asked for, and their sizes: shared by service and client, and free of packages."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Literal, get_args

__all__ = ["AXES", "DIRECTIONAL", "QUANTITIES", "Quantity", "floats_per_row", "row_shapes"]

#: Everything that can be asked for, in the order of replies.
Quantity = Literal["value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature"]
QUANTITIES: tuple[str, ...] = get_args(Quantity)
#: The axes of each quantity at one point: d inputs, k directions, m outputs.
AXES: dict[str, str] = {
    "value": "m",
    "gradient": "dm",
    "hessian": "ddm",
    "laplacian": "m",
    "hessian_diagonal": "dm",
    "jvp": "km",
    "hvp": "kdm",
    "curvature": "km",
}
#: The quantities that need directions.
DIRECTIONAL = frozenset(name for name, axes in AXES.items() if "k" in axes)


@lru_cache(maxsize=1024)
def row_shapes(quantities: tuple[str, ...], d: int, m: int, k: int, is_weighted: bool) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each quantity at one point.

    Example:
        >>> row_shapes(("value", "hvp"), d=3, m=2, k=5, is_weighted=False)
        ((2,), (5, 3, 2))
    """
    sizes = {"d": d, "k": k, "m": 1 if is_weighted else m}
    return tuple(tuple(sizes[axis] for axis in AXES[quantity]) for quantity in quantities)


def floats_per_row(quantities: tuple[str, ...], d: int, m: int, k: int, is_weighted: bool) -> int:
    """Return how many numbers a reply has per point.

    Example:
        >>> floats_per_row(("value", "hvp"), d=3, m=2, k=5, is_weighted=False)
        32
    """
    return sum(prod(shape) for shape in row_shapes(quantities, d, m, k, is_weighted))
