"""The quantities of the service, and their sizes, for server and client.

These are the quantities of :mod:`hessquik.quantities`, which is imported without torch; the standard deviations over
an ensemble's members; and ``domain_distance``, which depends on a model's bounds only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Literal

from hessquik import quantities as engine

__all__ = [
    "AXES",
    "DIRECTIONAL",
    "DOMAIN_DISTANCE",
    "QUANTITIES",
    "SPREADS",
    "TEXTS",
    "Quantity",
    "describe_shape",
    "floats_per_row",
    "quantities_of",
    "row_shapes",
]

DOMAIN_DISTANCE = "domain_distance"
_DISTANCE = engine.Quantity(
    DOMAIN_DISTANCE, "", 0, lambda at: None, "0 within the bounds, else the largest excess over an input's range"
)
#: Standard deviations over an ensemble's members, by name, with the quantity that each is of.
SPREADS = engine.SPREADS
_SPREADS = {
    name: replace(engine.QUANTITIES[of], name=name, text=f"standard deviation of the {of} over an ensemble's members")
    for name, of in SPREADS.items()
}
REGISTERED = {**engine.QUANTITIES, DOMAIN_DISTANCE: _DISTANCE, **_SPREADS}
#: Everything that can be asked for, in the order of replies.
QUANTITIES: tuple[str, ...] = tuple(REGISTERED)
#: The axes of each quantity at one point: d inputs, k directions, m outputs, p entries of a triangle.
AXES: dict[str, str] = {name: quantity.axes for name, quantity in REGISTERED.items()}
#: The quantities that need directions.
DIRECTIONAL = frozenset(name for name, quantity in REGISTERED.items() if quantity.is_directional)
#: The formula of each quantity, for readers.
TEXTS: dict[str, str] = {name: quantity.text for name, quantity in REGISTERED.items()}
if TYPE_CHECKING:
    Quantity = str
else:
    Quantity = Literal[QUANTITIES]


def quantities_of(members: int) -> tuple[str, ...]:
    """Return the names of the quantities of a model.

    Args:
        members: Number of its networks; 1 if it is not an ensemble.

    Examples:
        >>> "value_std" in quantities_of(5), "value_std" in quantities_of(1)
        (True, False)
    """
    return QUANTITIES if members > 1 else tuple(name for name in QUANTITIES if name not in SPREADS)


def describe_shape(quantity: str) -> str:
    """Return the shape of a quantity of a batch as text with the letters n, d, k and m.

    Examples:
        >>> describe_shape("hessian_packed")
        '(n, d(d+1)/2, m)'
    """
    return f"({', '.join(['n', *('d(d+1)/2' if axis == 'p' else axis for axis in AXES[quantity])])})"


@lru_cache(maxsize=1024)
def row_shapes(quantities: tuple[str, ...], d: int, m: int, k: int, is_weighted: bool) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each quantity at one point.

    Examples:
        >>> row_shapes(("value", "hvp"), d=3, m=2, k=5, is_weighted=False)
        ((2,), (5, 3, 2))
    """
    return tuple(REGISTERED[name].shape(d, 1 if is_weighted else m, k) for name in quantities)


def floats_per_row(quantities: tuple[str, ...], d: int, m: int, k: int, is_weighted: bool) -> int:
    """Return the number of floats per point in a reply.

    Examples:
        >>> floats_per_row(("value", "hvp"), d=3, m=2, k=5, is_weighted=False)
        32
    """
    return sum(prod(shape) for shape in row_shapes(quantities, d, m, k, is_weighted))
