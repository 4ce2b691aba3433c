"""The Open Inference Protocol v2."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from tests.security.vectors.vector import ABSENT, NO_BODIES, NO_OBJECTS, Vector, as_json, shown, without_absent

NAN, INFINITY = float("nan"), float("inf")
PATHS = ("/v2/models/peaks/infer", "/v2/models/peaks/versions/1/infer")
#: A good tensor, and values of its members that are not.
TENSOR: dict[str, Any] = {"name": "inputs", "datatype": "FP64", "shape": [1, 2], "data": [0, 0]}
MEMBERS: dict[str, list[Any]] = {
    "name": [ABSENT, None, 1, "x", "Inputs", [], {}, True],
    "datatype": [ABSENT, None, 1, "x", "fp64", "BOOL", "BYTES", "BF16", "TYPE_FP64", [], {}, True, ""],
    "shape": [
        ABSENT, None, 1, "12", {}, [], [1, 1, 1, 2], [-1, 2], [1.5, 2], ["1", 2], [True, 2], [2, 2], [1, 3], [0, 2],
        [1 << 62, 1 << 62], [1 << 31, 1 << 33], [None, 2], [[1, 2]],
    ],
    "data": [
        ABSENT, None, 1, True, "x", {}, [], [0], [0, 0, 0], [None, 0], ["0", 0], [True, 0], [NAN, 0], [0, INFINITY],
        [[0], [0, 0]], [{}, 0], [10**400, 0],
    ],
    "parameters": [
        1, "x", [], True, {"binary_data_size": 16}, {"binary_data_size": 0}, {"binary_data_size": -1},
        {"binary_data_size": True}, {"binary_data_size": "16"}, {"binary_data_size": 1 << 63},
        {"shared_memory_region": "x"}, {"shared_memory_offset": 0},
    ],
}  # fmt: skip
VALUE_OUTPUT: dict[str, Any] = {"name": "value"}
TOP: dict[str, list[Any]] = {
    "inputs": [ABSENT, None, 1, "x", {}, [], [1], [None], [[]], [TENSOR, TENSOR], [TENSOR, TENSOR | {"name": "x"}]],
    "outputs": [
        1, "x", {}, [1], [None], [{}], [{"name": None}], [{"name": []}], [{"name": "x"}],
        [VALUE_OUTPUT, VALUE_OUTPUT],
    ],
    "id": [1, True, [], {}, 1.5],
    "parameters": [1, "x", [], True],
    "timeout": [{"timeout": -1}, {"timeout": 1.5}, {"timeout": True}, {"timeout": "1"}, {"timeout": []}],
    "dtype": [{"dtype": "x"}, {"dtype": 1}, {"dtype": []}, {"dtype": "FP64"}],
    "binary_data_output": [{"binary_data_output": 1}, {"binary_data_output": "true"}, {"binary_data_output": []}],
    "binary_data": [[VALUE_OUTPUT | {"parameters": {"binary_data": 1}}]],
    "value": [
        [VALUE_OUTPUT | {"parameters": {"classification": 1}}],
        [VALUE_OUTPUT | {"parameters": {"shared_memory_region": "x"}}],
    ],
    "directions": [[{"name": "jvp"}], [{"name": "hvp"}, VALUE_OUTPUT]],
}  # fmt: skip
#: Under which member what is at fault is sent, where they differ.
UNDER = {
    "timeout": "parameters", "dtype": "parameters", "binary_data_output": "parameters", "binary_data": "outputs",
    "value": "outputs", "directions": "outputs",
}  # fmt: skip


def every() -> Iterator[Vector]:
    """Yield all vectors."""
    good = {"inputs": [TENSOR]}
    for path in PATHS:
        yield Vector("good", path, as_json(good), 200)
        for member, values in MEMBERS.items():
            about = {"name": "inputs", "parameters": ""}.get(member, "inputs")
            for value in values:
                body = as_json({"inputs": [without_absent(TENSOR | {member: value})]})
                yield Vector(f"{member} {shown(value)}", path, body, 400, about)
        for about, values in TOP.items():
            for value in values:
                yield Vector(
                    f"{about} {shown(value)}", path, as_json(good | {UNDER.get(about, about): value}), 400, about
                )
        for text in NO_OBJECTS:
            yield Vector(f"{text} for an object", path, text.encode(), 400)
        for kind, body in NO_BODIES.items():
            yield Vector(kind, path, body, 400)
        binary = as_json(
            {"inputs": [without_absent(TENSOR | {"data": ABSENT, "parameters": {"binary_data_size": 16}})]}
        )
        header = {"Inference-Header-Content-Length": str(len(binary))}
        yield Vector("good, binary", path, binary + bytes(16), 200, headers=header)
        yield Vector("bytes missing", path, binary + bytes(15), 400, "inputs", header)
        yield Vector("bytes too many", path, binary + bytes(17), 400, "body", header)
        yield Vector("NaN in bytes", path, binary + struct.pack("<2d", 0, NAN), 400, "inputs", header)
        for text in ("-1", "+1", "x", "1e3", "0x10", "99999", "9" * 30, "1.5", "²"):
            yield Vector(
                f"length {text}", path, binary + bytes(16), 400, headers={"Inference-Header-Content-Length": text}
            )
        for length in (0, 1, 15, 17):
            yield Vector(
                f"{length} raw bytes", path, bytes(length), 400, "inputs", {"Inference-Header-Content-Length": "0"}
            )
