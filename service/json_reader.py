"""Parsing of JSON bodies of all dialects, with bounded memory and without blocking the event loop.

A short body is parsed at once. In a long one, long lists of numbers are cut out and converted to arrays slice by
slice, and the event loop runs in between; the remaining JSON is short::

    {"inputs": [[0.5, 1.5], [2.0, …], …], "dtype": "float64"}   ─▶   {"inputs": "#0", "dtype": "float64"},  #0 = array
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from typing import Any

import numpy as np
import orjson

from hessquik_client.errors import InvalidInput, MalformedBody
from hessquik_client.question import MAX_NESTING, kind, numbers

from .wire import Array

__all__ = ["SHORT_BYTES", "expect_object", "has_booleans", "read_json", "read_long_json"]

#: JSON that is shorter takes a few milliseconds to parse, whatever it holds.
SHORT_BYTES = 1 << 16
#: Bytes of a long list that are parsed at once, and the longest row.
SLICE_BYTES = 1 << 16
MAX_ROW_BYTES = 1 << 22
#: Most strings in a long body.
MAX_STRINGS = 256
#: Deepest object, inside others and lists, that has a long list.
MAX_DEPTH = 4
#: Deepest nesting that a JSON parser accepts.
MAX_PARSED_NESTING = 1000
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OPENING = re.compile(rb"(?:\s*\[)+")
#: Patterns of places at which a list may be cut, by its nesting: behind group 1 and before group 2.
_CUTS = {2: re.compile(rb"(\])\s*,\s*(?=(\[))"), 3: re.compile(rb"(\]\s*\])\s*,\s*(?=(\[\s*\[))")}
#: Names of long lists in the dialects, as errors may repeat them.
_FIELDS = {
    b'"%b"' % name.encode(): name
    for name in ("inputs", "weights", "directions", "input", "sens", "vec", "data", "x", "buffer")
}
#: Placeholder of a list that was cut out; no client can know it.
_MARK = f"{secrets.token_hex(16)}#"

_invalid = InvalidInput.of


def has_booleans(text: bytes) -> bool:
    """Return whether JSON may hold booleans, which numpy would convert to numbers."""
    return b"true" in text or b"false" in text


def expect_object(document: Any) -> dict[str, Any]:
    """Check that a JSON value is an object, and return it.

    Raises:
        MalformedBody: the value is not an object.
    """
    if not isinstance(document, dict):
        raise MalformedBody(f"expected a JSON object, got {kind(document)}")
    return document


def read_json(body: bytes) -> Any:
    """Parse JSON. NaN and 1e999, which are not JSON, are accepted here, so that an error can name their row.

    Raises:
        MalformedBody: the body is not JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError):
        raise MalformedBody("expected a JSON object, got something that does not parse") from None


async def read_long_json(body: bytes, max_rows: int, may_have_text: bool = False) -> tuple[Any, bool]:
    """Parse JSON whose long lists of numbers become arrays, one slice at a time.

    Args:
        body: The JSON text.
        max_rows: Most rows of a list of lists.
        may_have_text: Whether long strings, such as base64, are accepted; they must have no escapes and become bytes.

    Returns:
        The document, and whether its parts that are not arrays may hold booleans.

    Raises:
        MalformedBody: the body is not JSON.
        InvalidInput: a long part is not a list of numbers, or its lists have different lengths.
    """
    body = body.strip()
    short: list[bytes] = []
    arrays: list[Array | bytes] = []
    position = 0
    for _ in range(MAX_STRINGS):
        quote = body.find(b'"', position)
        end = len(body) if quote < 0 else quote
        if end - position > SHORT_BYTES:
            field = _FIELDS.get(short[-1], "body") if short else "body"
            await asyncio.sleep(0)  # each look at all of a long body takes tens of milliseconds
            first, before = _find_start(body, position, end)
            await asyncio.sleep(0)
            start, stop = _find_list(body, position, end, first, before)
            await asyncio.sleep(0)
            arrays.append(await _read_list(field, body, start, stop, max_rows))
            short += [body[position:start], b'"%b%d"' % (_MARK.encode(), len(arrays) - 1), body[stop:end]]
        else:
            short.append(body[position:end])
        if quote < 0:
            text = b"".join(short)
            return _put_back(read_json(text), arrays), has_booleans(text)
        string = _STRING.match(body, quote, quote + SHORT_BYTES)
        if string is None and may_have_text:
            position = body.find(b'"', quote + 1) + 1
            text = body[quote + 1 : position - 1] if position else b"\\"
            if b"\\" in text:
                raise MalformedBody("expected long strings without escapes that end, got another one")
            short.append(b'"%b%d"' % (_MARK.encode(), len(arrays)))
            arrays.append(text)
            await asyncio.sleep(0)
            continue
        if string is None:
            if body.find(b'"', quote + 1) - quote >= SHORT_BYTES:
                raise _invalid("body", f"strings of at most {SHORT_BYTES} bytes in a long body", "a longer one")
            raise MalformedBody("expected a JSON object, got something that does not parse")
        short.append(string[0])
        position = string.end()
    raise _invalid("body", f"at most {MAX_STRINGS} strings in a long body", "more")


def _find_start(body: bytes, start: int, end: int) -> tuple[int, int]:
    """Find where the long list between two strings begins, and what it ends before."""
    first = body.find(b"[", start, end)
    braces = (body.find(brace, max(first, start), end) for brace in (b"{", b"}"))
    return first, min((at for at in braces if at >= 0), default=end)


def _find_list(body: bytes, start: int, end: int, first: int, before: int) -> tuple[int, int]:
    """Find the long list between two strings, given where it begins and what it ends before."""
    last = body.rfind(b"]", start, before) + 1
    surplus = body.count(b"]", start, last) - body.count(b"[", start, last)
    while surplus > 0 and last > 0:  # of lists around this one
        last = body.rfind(b"]", start, last - 1) + 1
        surplus -= 1
    if surplus < 0 or (first >= 0 and b"]" not in body[-SHORT_BYTES:]):
        raise MalformedBody("expected a JSON object, got something that does not parse")
    if first < 0 or last <= first or surplus or end - last > SHORT_BYTES or first - start > SHORT_BYTES:
        raise _invalid("body", "an object that is long because of its lists of numbers only", "something else")
    return first, last


async def _read_list(field: str, text: bytes, start: int, end: int, max_rows: int) -> Array:
    """Make an array of a long list, slice by slice."""
    opening = _OPENING.match(text, start, start + SHORT_BYTES)
    assert opening is not None
    nesting = opening[0].count(b"[")
    if nesting > MAX_PARSED_NESTING:
        raise MalformedBody("expected a JSON object, got something that does not parse")
    if nesting > MAX_NESTING:
        raise _invalid(field, f"lists nested at most {MAX_NESTING} deep", "deeper ones")
    rows = 0
    parts: list[Array] = []
    start, last = start + 1, end - 1
    while start < last:
        stop, next_start = _next_cut(text, nesting, start + SLICE_BYTES, min(last, start + MAX_ROW_BYTES), last)
        if stop - start > MAX_ROW_BYTES:
            raise _invalid(field, f"rows of at most {MAX_ROW_BYTES} bytes of JSON", "a longer one", row=rows)
        piece = b"[%b]" % text[start:stop]
        part = numbers(field, read_json(piece), has_booleans(piece), rows)
        if part.ndim != nesting or (parts and part.shape[1:] != parts[0].shape[1:]):
            width = "rows before" if parts else f"{nesting} levels of lists"
            raise _invalid(field, f"lists of numbers, all as long as each other ({width})", "others", row=rows)
        parts.append(part)
        rows += len(part)
        if part.size == 0:
            raise _invalid(field, "rows of at least one number", "empty ones")
        if nesting > 1 and rows > max_rows:
            raise _invalid(field, f"1 to {max_rows} rows", f"{rows}" if next_start == last else f"{rows} and more")
        start = next_start
        await asyncio.sleep(0)
    if not parts:
        raise _invalid(field, "rows of at least one number", "none")
    return np.concatenate(parts)


def _next_cut(text: bytes, nesting: int, start: int, stop: int, last: int) -> tuple[int, int]:
    """Return where the next slice of a list ends, and where the one after it begins."""
    if nesting == 1:
        comma = text.find(b",", start, stop)
        return (last, last) if comma < 0 else (comma, comma + 1)
    found = _CUTS[nesting].search(text, start, stop)
    return (last, last) if found is None else (found.end(1), found.start(2))


def _put_back(value: Any, arrays: list[Array | bytes], depth: int = MAX_DEPTH) -> Any:
    """Put the arrays in their places: in all dialects, members of objects, which are not very deep in others."""
    if isinstance(value, dict):
        for name, member in value.items():
            if isinstance(member, str) and member.startswith(_MARK):
                value[name] = arrays[int(member[len(_MARK) :])]
            elif depth:
                _put_back(member, arrays, depth - 1)
    elif isinstance(value, list) and depth:
        for item in value:
            _put_back(item, arrays, depth - 1)
    return value
