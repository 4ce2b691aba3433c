"""Arrays → a question that fits a model, checked at this one place; or an error that names field and row.

Servers check what was posted here, and a client what it asks of a local model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hessquik_client.domain import OUTSIDE, Domain
from hessquik_client.errors import InvalidInput, OutsideDomain
from hessquik_client.quantities import DIRECTIONAL, QUANTITIES, SPREADS

__all__ = ["DTYPES", "MAX_DIRECTIONS", "Question", "Shape", "make_question", "misspelt"]

Array = npt.NDArray[Any]
DTYPES = {name: np.dtype(name) for name in ("float32", "float64")}
#: Most directions per point, so that a tile's tangents stay small.
MAX_DIRECTIONS = 1024
#: Longest name that is compared with those that are known.
MAX_NAME = 32


class Shape(NamedTuple):
    """The sizes and limits that a question must fit.

    Attributes:
        d: Inputs of the model.
        m: Outputs.
        dtype: The model's own.
        max_rows: Most points.
        domain: Where the model was fitted, if it says so.
        outside: What is done about points outside where the request does not say.
        members: Networks in it; 1 if it is not an ensemble.
    """

    d: int
    m: int
    dtype: str
    max_rows: int
    domain: Domain | None = None
    outside: str = "allow"
    members: int = 1


class Question(NamedTuple):
    """A checked request.

    Attributes:
        inputs: (n, d).
        is_single: Whether one point was posted flat, so that the reply has no n axis.
        quantities: What is asked, in the order of :data:`QUANTITIES`.
        dtype: What to compute in.
        weights: (1 or n, m) or ``None``.
        directions: (1 or n, k, d) or ``None``.
    """

    inputs: Array
    is_single: bool
    quantities: tuple[str, ...]
    dtype: str
    weights: Array | None
    directions: Array | None


def make_question(
    arrays: Mapping[str, Array], quantities: Any, fixed: str | None, dtype: Any, shape: Shape, outside: Any = None
) -> Question:
    """Check that everything fits the model.

    Raises:
        InvalidInput: something does not.
        OutsideDomain: a point is outside the model's bounds, and that is refused.
    """
    if dtype is None:
        dtype = shape.dtype
    elif not isinstance(dtype, str) or dtype not in DTYPES:
        raise _invalid("dtype", "float32 or float64", "something else")
    asked = _quantities(quantities, fixed)
    if shape.members == 1 and not SPREADS.keys().isdisjoint(asked):
        raise _invalid("quantities", f"{', '.join(SPREADS)} of ensembles only", "a model of one network")
    inputs = arrays.get("inputs")
    if inputs is None:
        raise _invalid("inputs", f"a list of points of {shape.d} numbers each", "none")
    is_single = inputs.ndim == 1 and inputs.size > 0
    if is_single:
        inputs = inputs[None]
    n = len(inputs) if inputs.ndim else 0
    if not 0 < n <= shape.max_rows:
        raise _invalid("inputs", f"1 to {shape.max_rows} points", f"{n}")
    if inputs.shape != (n, shape.d):
        raise _invalid("inputs", f"points of {shape.d} numbers each", _describe(inputs), row=0)
    weights, directions = arrays.get("weights"), arrays.get("directions")
    if weights is not None:
        if weights.shape not in ((shape.m,), (n, shape.m)):
            raise _invalid("weights", f"shape ({shape.m}) or ({n}, {shape.m})", _describe(weights))
        weights = _converted("weights", np.atleast_2d(weights), dtype)
    if DIRECTIONAL.isdisjoint(asked):
        directions = None
    elif directions is None:
        raise _invalid("directions", f"shape (k, {shape.d}) or ({n}, k, {shape.d})", "none")
    else:
        fits = directions.ndim in (2, 3) and directions.shape[-1] == shape.d and directions.shape[-2] > 0
        if not fits or (directions.ndim == 3 and len(directions) != n):
            raise _invalid("directions", f"shape (k, {shape.d}) or ({n}, k, {shape.d})", _describe(directions))
        k, most = directions.shape[-2], min(MAX_DIRECTIONS, shape.max_rows // n)
        if k > most:
            raise _invalid("directions", f"at most {most} for {n} points", f"{k}")
        directions = _converted("directions", directions if directions.ndim == 3 else directions[None], dtype)
    inputs = _converted("inputs", inputs, dtype)
    _check_domain(inputs, outside, shape)
    return Question(inputs, is_single, asked, dtype, weights, directions)


def misspelt(given: Iterable[str], known: Collection[str]) -> str | None:
    """Return which known name the first unknown one resembles; what was given is not repeated.

    Example:
        >>> misspelt(["value", "hesian"], QUANTITIES)
        'one like hessian'
    """
    unknown = next((name for name in given if name not in known), None)
    if unknown is None or len(unknown) > MAX_NAME:
        return None
    alike = get_close_matches(unknown, known, n=1)
    return f"one like {alike[0]}" if alike else None


def _check_domain(inputs: Array, outside: Any, shape: Shape) -> None:
    """Refuse points outside the model's bounds, if the request or the service wants that."""
    if outside is None:
        outside = shape.outside
    elif not isinstance(outside, str) or outside not in OUTSIDE:
        raise _invalid("outside", " or ".join(OUTSIDE), "something else")
    domain = shape.domain
    if outside == "allow" or domain is None or (found := domain.first_outside(inputs)) is None:
        return
    row, a = found
    lower, upper, name = float(domain.lower[a]), float(domain.upper[a]), domain.names[a]
    raise OutsideDomain(
        f"inputs, row {row}: expected {name} from {lower:g} to {upper:g}, got a number outside",
        field="inputs",
        row=row,
        input=a,
        name=name,
        lower=lower,
        upper=upper,
    )


def _quantities(listed: Any, fixed: str | None) -> tuple[str, ...]:
    """The quantities asked for, in canonical order."""
    if fixed is not None:
        if listed is not None:
            raise _invalid("quantities", "none, the path names one", "some")
        return (fixed,)
    if listed is None:
        return ("value",)
    if not isinstance(listed, list) or not listed:
        raise _invalid("quantities", "a list of names", "something else")
    try:
        return _in_order(tuple(listed))
    except TypeError:  # some of what is listed cannot be a name
        raise _invalid("quantities", "a list of names", "something else") from None


@lru_cache(maxsize=1024)
def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """Different known names in canonical order."""
    if not set(names) <= set(QUANTITIES) or len(set(names)) != len(names):
        got = misspelt([name for name in names if isinstance(name, str)], QUANTITIES) or "something else"
        raise _invalid("quantities", f"a list of different names out of {', '.join(QUANTITIES)}", got)
    return tuple(name for name in QUANTITIES if name in names)


def _converted(field: str, array: Array, dtype: str) -> Array:
    """The array in the dtype to compute in, refused where that is not finite."""
    wanted = DTYPES[dtype]
    if array.dtype == wanted:
        converted = np.ascontiguousarray(array)
    else:
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(array, dtype=wanted)
    # No sum of squares is finite that has one that is not; the sum alone may be too large.
    numbers = converted.reshape(-1)
    if not math.isfinite(numbers.dot(numbers)):
        finite = np.isfinite(converted)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise _invalid(field, f"finite numbers in {dtype}", "one that is not", row=row)
    return converted


def _describe(array: Array) -> str:
    return f"shape ({', '.join(map(str, array.shape))})"


#: The error for a field that does not fit.
_invalid = InvalidInput.of
