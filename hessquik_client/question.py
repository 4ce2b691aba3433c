"""Validation of a request's lists or arrays against a model.

The service checks the requests that it receives here, and the client those to a local model. An error names the field
and, for an array, the row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from hessquik_client.domain import OUTSIDE, Domain
from hessquik_client.errors import InvalidInput, OutsideDomain
from hessquik_client.quantities import DIRECTIONAL, QUANTITIES, SPREADS

__all__ = [
    "DTYPES",
    "MAX_DIRECTIONS",
    "MAX_NESTING",
    "Question",
    "Shape",
    "kind",
    "make_question",
    "misspelt",
    "numbers",
]

Array: TypeAlias = npt.NDArray[Any]
DTYPES = {name: np.dtype(name) for name in ("float32", "float64")}
#: Most directions per point, so that a tile's tangents stay small.
MAX_DIRECTIONS = 1024
#: Dimensions of the largest array: directions, (n, k, d).
MAX_NESTING = 3
#: Longest unknown name for which a similar known name is searched.
MAX_NAME = 32


class Shape(NamedTuple):
    """The sizes and limits that a question must fit.

    Attributes:
        d: Inputs of the model.
        m: Outputs.
        dtype: The model's own dtype, used if the request names none.
        max_rows: Most points per request.
        domain: The bounds within which the model was fitted, if it has any.
        outside: Default for points outside the bounds: ``allow`` or ``refuse``.
        members: Number of networks; 1 if the model is not an ensemble.
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
        inputs: The points, shape (n, d).
        is_single: Whether the request had one point of shape (d,), so that the reply has no n axis.
        quantities: The quantities to compute, in the order of :data:`QUANTITIES`.
        dtype: Dtype to compute in.
        weights: Shape (1, m) or (n, m), or ``None``.
        directions: Shape (1, k, d) or (n, k, d), or ``None``.
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
    """Check the fields of a request against a model, and convert its arrays to the dtype to compute in.

    Args:
        arrays: ``inputs`` (d,) or (n, d); optionally ``weights`` (m,) or (n, m), and ``directions`` (k, d) or
            (n, k, d).
        quantities: A list of names; ``None`` means ``value`` alone.
        fixed: The quantity that the path names, if it names one; ``quantities`` must then be ``None``.
        dtype: ``"float32"``, ``"float64"`` or ``None`` for the model's own.
        shape: The sizes and limits of the model.
        outside: ``"allow"``, ``"refuse"`` or ``None`` for the default of ``shape``.

    Raises:
        InvalidInput: a field is missing, has a wrong shape or holds a number that is not finite.
        OutsideDomain: a point is outside the model's bounds, and ``outside`` is ``"refuse"``.
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
    """Return a hint at the known name that the first unknown one resembles, or ``None``.

    The hint does not repeat the given name, which is untrusted.

    Examples:
        >>> misspelt(["value", "hesian"], QUANTITIES)
        'one like hessian'
    """
    unknown = next((name for name in given if name not in known), None)
    if unknown is None or len(unknown) > MAX_NAME:
        return None
    alike = get_close_matches(unknown, known, n=1)
    return f"one like {alike[0]}" if alike else None


def _check_domain(inputs: Array, outside: Any, shape: Shape) -> None:
    """Refuse points outside the model's bounds if the request, or else the service, asks for it."""
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
    """Return the requested quantities in canonical order."""
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
def _in_order(names: tuple[object, ...]) -> tuple[str, ...]:
    """Check that names are known and different, and return them in canonical order."""
    if not set(names) <= set(QUANTITIES) or len(set(names)) != len(names):
        got = misspelt([name for name in names if isinstance(name, str)], QUANTITIES) or "something else"
        raise _invalid("quantities", f"a list of different names out of {', '.join(QUANTITIES)}", got)
    return tuple(name for name in QUANTITIES if name in names)


def _converted(field: str, array: Array, dtype: str) -> Array:
    """Convert an array to a dtype; refuse it if a number is not finite in that dtype."""
    wanted = DTYPES[dtype]
    if array.dtype == wanted:
        converted = np.ascontiguousarray(array)
    else:
        with np.errstate(over="ignore"):
            converted = np.ascontiguousarray(array, dtype=wanted)
    # Fast check: if the sum of squares is finite, so is every number. The sum may also overflow by itself.
    numbers = converted.reshape(-1)
    if not math.isfinite(numbers.dot(numbers)):
        finite = np.isfinite(converted)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise _invalid(field, f"finite numbers in {dtype}", "one that is not", row=row)
    return converted


def _describe(array: Array) -> str:
    return f"shape ({', '.join(map(str, array.shape))})"


def numbers(field: str, value: Any, may_be_booleans: bool, first_row: int = 0) -> Array:
    """Make an array of a nested list of numbers; an array is returned as it is.

    Args:
        field: The field's name, for errors.
        value: The parsed list.
        may_be_booleans: Whether there may be booleans, which numpy would take for numbers.
        first_row: The number of the list's first row, for errors.

    Raises:
        InvalidInput: there is something else in it, at the row that is named.
    """
    if isinstance(value, np.ndarray):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.ndim == 0 or may_be_booleans:
        _find_fault(field, value, first_row)
    if array.ndim > MAX_NESTING:
        raise _invalid(field, f"lists nested at most {MAX_NESTING} deep", "deeper ones")
    if array.dtype.kind in "iuf":
        return array
    try:
        return np.asarray(value, dtype=np.float64)  # whole numbers of more than 64 bits
    except OverflowError:
        row = next(row for row, entry in enumerate(value) if not _fits_float64(entry))
        raise _invalid(field, "finite numbers in float64", "one that is not", row=first_row + row) from None
    except (ValueError, TypeError):
        raise _invalid(field, "lists of numbers, all as long as each other", "something else") from None


def _fits_float64(entry: Any) -> bool:
    """Return whether no whole number of an entry is over the largest float64."""
    try:
        np.asarray(entry, dtype=np.float64)
    except OverflowError:
        return False
    return True


def _find_fault(field: str, value: Any, first_row: int) -> None:
    """Refuse the first row that is not numbers, or not as long as the first."""
    if not isinstance(value, list):
        raise _invalid(field, "a list", kind(value))
    width: int | None = None
    for row, entry in enumerate(value, first_row):
        if isinstance(entry, list):
            if width is None:
                width = len(entry)
            if len(entry) != width:
                raise _invalid(field, f"{width} numbers, as in the rows before", f"{len(entry)}", row=row)
        elif width is not None:
            raise _invalid(field, "a list of numbers, as in the rows before", kind(entry), row=row)
        got = _fault(entry, MAX_NESTING - 1)
        if got is not None:
            raise _invalid(field, "numbers", got, row=row)


def _fault(entry: Any, nesting: int) -> str | None:
    """Return the kind of the first thing that is neither a number nor a list of them nested as deep as may be."""
    if not isinstance(entry, list):
        is_number = isinstance(entry, int | float) and not isinstance(entry, bool)
        return None if is_number else kind(entry)
    if set(map(type, entry)) <= {int, float}:
        return None
    if nesting == 0:
        return "a list"
    return next((got for item in entry if (got := _fault(item, nesting - 1)) is not None), None)


def kind(value: Any) -> str:
    """Return a JSON value's kind, without the value."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


#: The error for a field that does not fit.
_invalid = InvalidInput.of
