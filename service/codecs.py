"""Bodies ↔ arrays, checked at this one place: JSON and safetensors, in and out.

Whatever comes is turned into a :class:`Question` that fits the model, or into an error that names the field, the row,
what was expected and what came.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson
import safetensors.numpy

from service.domain import OUTSIDE, Domain
from service.errors import InvalidInput, MalformedBody, NotAcceptable, OutsideDomain, UnsupportedMediaType
from service.http.negotiation import best
from service.json_reader import expect_object, numbers
from service.quantities import DIRECTIONAL, QUANTITIES
from service.wire import Array

__all__ = [
    "JSON",
    "MAX_DIRECTIONS",
    "SAFETENSORS",
    "Piece",
    "Question",
    "Shape",
    "accepted_type",
    "content_type",
    "encode_json",
    "encode_safetensors",
    "json_rows",
    "make_question",
    "parse_json",
    "parse_safetensors",
    "refuse_bombs",
]

JSON, SAFETENSORS = "application/json", "application/x-safetensors"
DTYPES = {name: np.dtype(name) for name in ("float32", "float64")}
_FIELDS = dict.fromkeys(("inputs", "quantities", "weights", "directions", "dtype", "outside")).keys()
_MAX_SAFETENSORS_HEADER_BYTES = 4096
#: Most directions per point, so that a tile's tangents stay small.
MAX_DIRECTIONS = 1024

#: A stretch of a reply's body.
Piece = bytes | memoryview


class Shape(NamedTuple):
    """What a question has to fit.

    Attributes:
        d: Inputs of the model.
        m: Outputs.
        dtype: The model's own.
        max_rows: Most points.
        domain: Where the model was fitted, if it says so.
        outside: What is done about points outside where the request does not say.
    """

    d: int
    m: int
    dtype: str
    max_rows: int
    domain: Domain | None = None
    outside: str = "allow"


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


@lru_cache(maxsize=32)
def content_type(header: bytes) -> str:
    """The media type of a body; JSON if none is named.

    Raises:
        UnsupportedMediaType: it is neither JSON nor safetensors.
    """
    media_type = header.decode("latin-1").partition(";")[0].strip().lower() or JSON
    if media_type not in (JSON, SAFETENSORS):
        raise UnsupportedMediaType(f"expected a body of {JSON} or {SAFETENSORS}")
    return media_type


def accepted_type(header: bytes) -> str:
    """Return the media type to reply in: the one that the header prefers, JSON if there is no preference.

    Raises:
        NotAcceptable: it accepts neither JSON nor safetensors.
    """
    if not header:
        return JSON
    chosen = best(header, (JSON, SAFETENSORS))
    if chosen is None:
        raise NotAcceptable(f"expected to be asked for {JSON} or {SAFETENSORS}")
    return chosen


def parse_json(document: Any, may_be_booleans: bool, fixed: str | None, shape: Shape) -> Question:
    """Check a parsed JSON body.

    Args:
        document: The body; long lists may be arrays already.
        may_be_booleans: Whether it may hold any, which numpy would take for numbers.
        fixed: The quantity that the path names; ``None`` if the body may name several.
        shape: What it has to fit.

    Raises:
        MalformedBody: it is not a JSON object.
        InvalidInput: it does not fit.
    """
    if not isinstance(document, dict):
        expect_object(document)
    if not document.keys() <= _FIELDS:
        raise _invalid("body", f"only the fields {', '.join(_FIELDS)}", "another one")
    arrays = {}
    for name in ("inputs", "weights", "directions"):
        value = document.get(name)
        if value is not None:
            arrays[name] = numbers(name, value, may_be_booleans)
    given = document.get
    return make_question(arrays, given("quantities"), fixed, given("dtype"), shape, given("outside"))


def parse_safetensors(body: bytes | bytearray, fixed: str | None, query: Mapping[str, str], shape: Shape) -> Question:
    """Read a safetensors body, its quantities and dtype from the query.

    Raises:
        MalformedBody: it is not a safetensors file of the documented tensors.
        InvalidInput: it does not fit.
    """
    if len(body) < 8 or struct.unpack("<Q", body[:8])[0] > min(_MAX_SAFETENSORS_HEADER_BYTES, len(body) - 8):
        raise MalformedBody(
            f"expected a safetensors body with a header of at most {_MAX_SAFETENSORS_HEADER_BYTES} bytes"
        )
    try:
        arrays = safetensors.numpy.load(bytes(body))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise MalformedBody("expected a safetensors body, got one that does not parse") from None
    for name, array in arrays.items():
        if name not in ("inputs", "weights", "directions"):
            raise _invalid("body", "only the tensors inputs, weights, directions", "another one")
        if array.dtype.name not in DTYPES:
            raise _invalid(name, "a tensor of F32 or F64", "another dtype")
    listed = query.get("quantities")
    names = listed.split(",") if listed else None
    return make_question(arrays, names, fixed, query.get("dtype"), shape, query.get("outside"))


def json_rows(array: Array) -> bytes:
    """The text of the rows of a contiguous float64 array, to be joined by commas with that of others.

    Every number has the shortest form that reads back as the same double; non-finite ones are null.

    Example:
        >>> json_rows(np.array([[1.0, 0.5], [2.0, float("nan")]]))
        b'[1.0,0.5],[2.0,null]'
    """
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def encode_json(model: str, version: str, answers: Mapping[str, Sequence[Piece]], is_single: bool) -> list[Piece]:
    """The reply as JSON, from the texts of each quantity's rows in their order."""
    pieces: list[Piece] = [b'{"model":"%s","version":"%s"' % (model.encode(), version.encode())]
    opening, closing = (b'":', b"") if is_single else (b'":[', b"]")
    for name, rows in answers.items():
        pieces.append(b',"' + name.encode() + opening)
        for piece in rows[:-1]:
            pieces += (piece, b",")
        pieces += (rows[-1], closing)
    pieces.append(b"}")
    return pieces


def encode_safetensors(
    model: str, version: str, answers: Mapping[str, Sequence[Array]], is_single: bool
) -> list[Piece]:
    """The reply as safetensors, one tensor per quantity: a header and the arrays' own memory, which is not copied."""
    header: dict[str, Any] = {"__metadata__": {"model": model, "version": version}}
    pieces: list[Piece] = []
    start = 0
    for name, rows in answers.items():
        first = rows[0]
        shape = first.shape[1:] if is_single else (sum(map(len, rows)), *first.shape[1:])
        size = sum(part.nbytes for part in rows)
        header[name] = {"dtype": f"F{8 * first.itemsize}", "shape": shape, "data_offsets": [start, start + size]}
        pieces += [np.ascontiguousarray(part).reshape(-1).view(np.uint8).data for part in rows]
        start += size
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *pieces]


def refuse_bombs(body: bytes, shape: Shape) -> None:
    """Refuse, before it is parsed, JSON of more lists or numbers than any request that fits the model has.

    Raises:
        InvalidInput: it has more.
    """
    lists, numbers = 4 * shape.max_rows + 4, (2 * shape.d + shape.m) * shape.max_rows + 16
    if body.count(b"[") > lists or body.count(b",") > numbers or body.count(b"{") > 1:
        raise _invalid("body", f"one object of at most {numbers} numbers in {lists} lists", "more")


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
    """What is asked, in canonical order."""
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
        raise _invalid("quantities", f"a list of different names out of {', '.join(QUANTITIES)}", "something else")
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
