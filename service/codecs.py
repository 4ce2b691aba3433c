"""Media types, the safetensors format of requests and replies, shapes in requests, and numbers as JSON text."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
import safetensors.numpy

from hessquik_client.errors import InvalidInput, MalformedBody, NotAcceptable, UnsupportedMediaType
from hessquik_client.question import DTYPES, MAX_NESTING, Question, Shape, make_question

from .http.negotiation import best
from .wire import Array

__all__ = [
    "JSON",
    "SAFETENSORS",
    "Piece",
    "accepted_type",
    "content_type",
    "encode_safetensors",
    "json_rows",
    "parse_safetensors",
    "raw",
    "read_shape",
    "safetensors_header",
    "shaped",
]

JSON, SAFETENSORS = "application/json", "application/x-safetensors"
_MAX_SAFETENSORS_HEADER_BYTES = 4096

#: A piece of a reply's body.
Piece = bytes | memoryview


@lru_cache(maxsize=32)
def content_type(header: bytes) -> str:
    """Return the media type of a body; JSON if the header is empty.

    Raises:
        UnsupportedMediaType: the header names neither JSON nor safetensors.
    """
    media_type = header.decode("latin-1").partition(";")[0].strip().lower() or JSON
    if media_type not in (JSON, SAFETENSORS):
        raise UnsupportedMediaType(f"expected a body of {JSON} or {SAFETENSORS}")
    return media_type


def accepted_type(header: bytes) -> str:
    """Return the media type of the reply: the one that the header prefers, JSON if there is no preference.

    Raises:
        NotAcceptable: the header accepts neither JSON nor safetensors.
    """
    if not header:
        return JSON
    chosen = best(header, (JSON, SAFETENSORS))
    if chosen is None:
        raise NotAcceptable(f"expected an Accept header that allows {JSON} or {SAFETENSORS}")
    return chosen


def parse_safetensors(body: bytes | bytearray, fixed: str | None, query: Mapping[str, str], shape: Shape) -> Question:
    """Parse a request whose arrays are a safetensors body and whose quantities and dtype are in the query.

    Raises:
        MalformedBody: the body is not a safetensors file.
        InvalidInput: a tensor or a parameter is unknown or does not fit the model.
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


def read_shape(field: str, listed: Any, least_axes: int = 0) -> tuple[int, ...]:
    """Return the shape that a request gives for an array.

    Raises:
        InvalidInput: it is not a list of as many whole numbers as an array of a request may have axes.
    """
    is_shape = isinstance(listed, list) and least_axes <= len(listed) <= MAX_NESTING
    if not is_shape or not all(type(size) is int and 0 <= size < 1 << 63 for size in listed):
        raise _invalid(field, f"a shape of {least_axes} to {MAX_NESTING} whole numbers", "something else")
    return tuple(listed)


def shaped(field: str, numbers: Array, shape: tuple[int, ...]) -> Array:
    """Return numbers as an array of the shape that a request gives.

    Raises:
        InvalidInput: there are more or fewer numbers, or no array can have this shape.
    """
    size = math.prod(shape)
    if numbers.size != size:
        raise _invalid(field, f"{size} numbers for its shape", f"{numbers.size}")
    try:
        return numbers.reshape(shape)
    except ValueError:  # such as 0 × 2⁶²
        raise _invalid(field, "a shape that an array can have", "another one") from None


def json_rows(array: Array) -> bytes:
    """Return the rows of a contiguous float64 array as JSON without the outer brackets.

    Every number has the shortest form that reads back as the same double; NaN and infinity become null.

    Examples:
        >>> json_rows(np.array([[1.0, 0.5], [2.0, float("nan")]]))
        b'[1.0,0.5],[2.0,null]'
    """
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def encode_safetensors(
    model: str, version: int, answers: Mapping[str, Sequence[Array]], is_single: bool
) -> list[Piece]:
    """Return a reply as safetensors with one tensor per quantity; the arrays are not copied."""
    tensors = {
        name: (rows[0].dtype, rows[0].shape[1:] if is_single else (sum(map(len, rows)), *rows[0].shape[1:]))
        for name, rows in answers.items()
    }
    return [safetensors_header(model, version, tensors), *(raw(part) for rows in answers.values() for part in rows)]


def safetensors_header(
    model: str, version: int, tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
) -> bytes:
    """Return the header of a reply as safetensors."""
    header: dict[str, Any] = {"__metadata__": {"model": model, "version": str(version)}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": f"F{8 * dtype.itemsize}", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def raw(array: Array) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


#: The error for a field that does not fit.
_invalid = InvalidInput.of
