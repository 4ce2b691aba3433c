"""The service's own interface, in safetensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from tests.security.vectors.vector import EVALUATE, VALUE, Vector

BINARY = {"Content-Type": "application/x-safetensors"}


def every() -> Iterator[Vector]:
    """Yield all vectors."""
    point = ("F64", [1, 2], struct.pack("<2d", 0, 0))
    yield Vector("good", VALUE, _file(inputs=point), 200, headers=BINARY)
    weights, direction = ("F64", [1], struct.pack("<d", 1)), ("F32", [1, 2], struct.pack("<2f", 1, 0))
    yield Vector(
        "good",
        f"{EVALUATE}?quantities=jvp",
        _file(inputs=point, weights=weights, directions=direction),
        200,
        headers=BINARY,
    )
    special = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}
    for kind, number in special.items():
        for dtype, code in (("F64", "d"), ("F32", "f")):
            spoiled = (dtype, [2, 2], struct.pack(f"<4{code}", 0, 0, number, 0))
            yield Vector(f"{kind} in {dtype}", VALUE, _file(inputs=spoiled), 422, "inputs", BINARY, row=1)
            body = _file(inputs=point, weights=(dtype, [1], struct.pack(f"<{code}", number)))
            yield Vector(f"{kind} in {dtype} weights", VALUE, body, 422, "weights", BINARY)
    shapes = ([], [2], [0, 2], [2, 0], [1, 3], [1, 1, 2], [1] * 9 + [2], [3, 1])
    for shape in shapes[:1] + shapes[2:]:
        size = 8
        for length in shape:
            size *= length
        yield Vector(
            f"inputs of shape {shape}", VALUE, _file(inputs=("F64", shape, bytes(size))), 422, "inputs", BINARY
        )
    for dtype, size in (("F16", 2), ("I64", 8), ("I32", 4), ("U8", 1), ("BOOL", 1)):
        yield Vector(
            f"inputs of {dtype}", VALUE, _file(inputs=(dtype, [1, 2], bytes(2 * size))), 422, "inputs", BINARY
        )
    for name in ("x", "Inputs", "", "inputs.0", "__metadata"):
        yield Vector(f"a tensor {name!r}", VALUE, _file(**{"inputs": point, name: point}), 422, "body", BINARY)
    yield Vector("no inputs", VALUE, _file(weights=weights), 422, "inputs", BINARY)
    yield Vector("no tensors", VALUE, _file(), 422, "inputs", BINARY)
    yield Vector("no directions", f"{EVALUATE}?quantities=jvp", _file(inputs=point), 422, "directions", BINARY)
    for kind, query in {
        "unknown": "jacobian",
        "twice": "value,value",
        "empty names": ",",
        "spaces": "value,%20jvp",
    }.items():
        yield Vector(
            f"quantities {kind}", f"{EVALUATE}?quantities={query}", _file(inputs=point), 422, "quantities", BINARY
        )
    yield Vector(
        "quantities, which the path has", f"{VALUE}?quantities=value", _file(inputs=point), 422, "query", BINARY
    )
    for text in ("float16", "", "F64", "FLOAT32"):
        yield Vector(f"dtype {text!r}", f"{VALUE}?dtype={text}", _file(inputs=point), 422, "dtype", BINARY)
    whole = _file(inputs=point)
    (size,) = struct.unpack("<Q", whole[:8])
    for length in (0, 1, 7, 8, 9, 8 + size - 1, 8 + size, len(whole) - 1):
        yield Vector(f"cut after {length} bytes", VALUE, whole[:length], 400, headers=BINARY)
    yield Vector("bytes after", VALUE, whole + b"\0", 400, headers=BINARY)
    for length in (0, 1, size - 1, size + 1, 4097, 1 << 32, 1 << 63, (1 << 64) - 1):
        yield Vector(f"a header of {length} bytes", VALUE, struct.pack("<Q", length) + whole[8:], 400, headers=BINARY)
    entry = {"dtype": "F64", "shape": [1, 2], "data_offsets": [0, 16]}
    wrong: dict[str, Any] = {
        "no dtype": {"shape": [1, 2], "data_offsets": [0, 16]}, "unknown dtype": entry | {"dtype": "F65"},
        "dtype a number": entry | {"dtype": 1}, "negative shape": entry | {"shape": [-1, 2]},
        "fraction of a shape": entry | {"shape": [1.5, 2]}, "shape a string": entry | {"shape": "12"},
        "huge shape": entry | {"shape": [1 << 62, 2]}, "overflowing shape": entry | {"shape": [1 << 32, 1 << 32]},
        "zero of a huge shape": entry | {"shape": [0, 1 << 63]}, "too large a shape": entry | {"shape": [2, 2]},
        "offsets the wrong way": entry | {"data_offsets": [16, 0]},
        "negative offsets": entry | {"data_offsets": [-16, 0]},
        "offsets after the end": entry | {"data_offsets": [0, 1 << 40]}, "a hole": entry | {"data_offsets": [8, 24]},
        "one offset": entry | {"data_offsets": [0]}, "a list": [], "null": None, "a string": "x",
    }  # fmt: skip
    for kind, value in wrong.items():
        yield Vector(kind, VALUE, _raw({"inputs": value}, bytes(16)), 400, headers=BINARY)
    yield Vector("overlap", VALUE, _raw({"inputs": entry, "weights": entry}, bytes(16)), 400, headers=BINARY)
    yield Vector(
        "metadata of numbers",
        VALUE,
        _raw({"__metadata__": {"a": 1}, "inputs": entry}, bytes(16)),
        400,
        headers=BINARY,
    )
    for text in (b"[]", b"null", b"{", b"{}x", b"\xff\xff", b"[" * 4000):
        yield Vector(f"the header {text[:9]!r}", VALUE, struct.pack("<Q", len(text)) + text, 400, headers=BINARY)


def _raw(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _file(**tensors: tuple[str, list[int], bytes]) -> bytes:
    """Return a safetensors body."""
    header, data = {}, b""
    for name, (dtype, shape, bytes_) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(bytes_)]}
        data += bytes_
    return _raw(header, data)
