"""The service's own interface, in JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.security.vectors.vector import ABSENT, EVALUATE, NO_BODIES, NO_OBJECTS, ROUTES, VALUE, Vector, as_json

GOOD_BODY: dict[str, Any] = {"inputs": [[0, 0]]}
#: Good requests, which the others are one step away from.
GOOD = [
    *(Vector("good", path, b'{"inputs":[[0,0]]}', 200) for path in ROUTES),
    Vector("weights", EVALUATE, b'{"inputs":[[0,0],[0,1]],"weights":[[1],[2]]}', 200),
    Vector("directions", EVALUATE, b'{"inputs":[0,0],"quantities":["jvp"],"directions":[[1,0]]}', 200),
    Vector(
        "directions of each point", EVALUATE, b'{"inputs":[0,0],"quantities":["hvp"],"directions":[[[1,0]]]}', 200
    ),
    Vector("nulls", VALUE, b'{"inputs":[0,0],"weights":null,"directions":null,"dtype":null}', 200),
]

#: What is not a finite number, as it stands in JSON.
NO_NUMBERS = (
    "null", "true", "false", '"1"', '""', '"NaN"', "{}", '{"a":1}', "NaN", "Infinity", "-Infinity", "1e999", "-1e999",
    "1" + "0" * 400, "[]", "[1]", "[[1]]",
)  # fmt: skip
#: Places of a number: the request, the field, and the row if there are several.
NUMBERS = (
    (VALUE, '{"inputs":[%s,0]}', "inputs", None),
    (VALUE, '{"inputs":[[0,%s]]}', "inputs", 0),
    (EVALUATE, '{"inputs":[[0,0],[%s,0]]}', "inputs", 1),
    (VALUE, '{"inputs":[0,0],"weights":[%s]}', "weights", None),
    (EVALUATE, '{"inputs":[[0,0],[0,0]],"weights":[[1],[%s]]}', "weights", 1),
    (EVALUATE, '{"inputs":[0,0],"quantities":["jvp"],"directions":[[0,0],[%s,0]]}', "directions", None),
    (EVALUATE, '{"inputs":[0,0],"quantities":["hvp"],"directions":[[[0,%s]]]}', "directions", None),
)
#: What is no JSON at all.
NO_JSON = (
    "01", "+1", ".5", "1.", "1e", "--1", "1_0", "nan", "undefined", "None", "True", "'1'", "0x10", "1e5.5", "½",
    "1/**/", "1//", '"', "1 2", "1,,2", "-", "\x00", "(1)", "[1", "1]", "#", "1;", "\\u0031",
)  # fmt: skip

#: Values of whole fields, by what they are.
SCALARS = {"true": True, "number": 1, "fraction": 1.5, "string": "x", "object": {}, "list in a string": "[[0,0]]"}
WRONG: dict[str, dict[str, Any]] = {
    "inputs": SCALARS
    | {
        "absent": ABSENT, "null": None, "empty": [], "an empty row": [[]], "two empty rows": [[], []], "short": [1],
        "long": [1, 2, 3], "a short row": [[1]], "a long row": [[1, 2, 3]], "ragged": [[1, 2], [3]],
        "a row, a number": [[1, 2], 3], "a number, a row": [1, [2]], "three deep": [[[1, 2]]],
        "four deep": [[[[1, 2]]]], "nine deep": [[[[[[[[[1]]]]]]]]], "a row, an empty one": [[1, 2], []],
        "a row, null": [[1, 2], None], "an object for a row": [{"0": 1, "1": 2}], "a string for a row": ["12"],
    },
    "weights": SCALARS
    | {
        "empty": [], "an empty row": [[]], "two": [1, 2], "a row of two": [[1, 2]], "two rows": [[1], [1]],
        "three deep": [[[1]]], "ragged": [[1], [1, 2]], "nested unevenly": [[1], 1],
    },
    "directions": SCALARS
    | {
        "absent": ABSENT, "null": None, "empty": [], "an empty row": [[]], "a row alone": [1, 0], "short": [[1]],
        "long": [[1, 0, 0]], "for two points": [[[1, 0]], [[1, 0]]],
        "four deep": [[[[1, 0]]]], "ragged": [[1, 0], [1]], "nested unevenly": [[1, 0], 1],
    },
    "dtype": SCALARS
    | {
        "other": "float16", "capitals": "FLOAT64", "empty": "", "space": "float64 ", "numpy": "<f8",
        "list": ["float64"], "zero": 0, "OIP": "FP64", "long": "f" * 1000, "nul": "float64\x00",
    },
    "quantities": {name: value for name, value in SCALARS.items() if name != "list in a string"}
    | {
        "empty": [], "unknown": ["jacobian"], "capitals": ["Value"], "twice": ["value", "value"], "null": [None],
        "numbers": [1], "nested": [["value"]], "space": ["value "], "empty name": [""],
        "a good and a bad": ["value", 1], "an action": ["evaluate"], "objects": [{"name": "value"}],
        "many": ["value"] * 100, "name": "value",
        "long": ["v" * 1000],
    },
}  # fmt: skip
UNKNOWN = (
    "x",
    "Inputs",
    "inputs ",
    "",
    "input",
    "__proto__",
    "constructor",
    "__class__",
    "model",
    "version",
    "\ud800",
    "\x00",
)
MEDIA_TYPES = (
    "text/plain", "text/html", "text/json", "application/xml", "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x", "application/octet-stream", "application/vnd.bentoml+pickle",
    "application/pickle", "application/x-pickle", "application/x-python-serialize", "application/msgpack",
    "application/x-msgpack",
    "application/cbor", "application/bson", "application/x-ndjson", "application/jsonl", "application/json-seq",
    "application/protobuf", "application/grpc", "application/x-numpy", "application/vnd.apache.arrow.stream",
    "application/yaml", "application/javascript", "application/java-serialized-object", "application/zip",
    "application/json+x", "application/jsonx", "application", "/", "json", "*/*", "application/*", "image/png",
    "application/x-safetensors2", "application/ json", "application/json, text/plain", "\"application/json\"", "é",
    "application/x-tar",
)  # fmt: skip
ACCEPTED = (
    "text/html",
    "text/*",
    "image/png",
    "application/xml",
    "json",
    "application/json;q=0",
    "*/*;q=0",
    ",",
    ";",
    "é",
)
ENCODINGS = (
    "gzip",
    "br",
    "zstd",
    "deflate",
    "compress",
    "x-gzip",
    "gzip, identity",
    "identity, gzip",
    "aes128gcm",
    "é",
)
DEADLINES = (
    "0", "-1", "+1", "1.5", "1e3", "0x10", "1_000", "120001", "9" * 30, "x", "1 000", "1,000", "NaN", "inf", "null",
    "²", "-0",
)  # fmt: skip
VERSIONS = (
    "0",
    "2",
    "-1",
    "+1",
    "1.0",
    "01",
    "1e0",
    "a",
    "9" * 9,
    "9" * 30,
    "null",
    "None",
    "latest",
    "%20",
    "1%00",
    "*",
    "%2e",
)
QUERIES = {
    "version twice": "version=1&version=1",
    "dtype twice": "dtype=float32&dtype=float64",
    "seventeen": "&".join(f"p{number}=1" for number in range(17)),
    "thousands": "&".join(f"p{number}=1" for number in range(2000)),
    "separators": "&" * 17,
}


def _numbers() -> Iterator[Vector]:
    """Yield vectors in which one number is not a number."""
    for path, template, about, row in NUMBERS:
        for text in NO_NUMBERS:
            if about == "weights" and row is None and text == "[1]":
                continue  # one row of weights, given as such
            is_list = text.startswith("[")
            yield Vector(
                f"{text[:9]} in {template}",
                path,
                (template % text).encode(),
                422,
                about,
                row=None if is_list else row,
            )
        for text in NO_JSON:
            yield Vector(f"{text!r} in {template}", path, (template % text).encode(), 400)


def _fields() -> Iterator[Vector]:
    """Yield vectors in which one field is wrong."""
    for about, wrong in WRONG.items():
        for path in (
            ROUTES
            if about == "inputs"
            else (EVALUATE,)
            if about in ("directions", "quantities")
            else (VALUE, EVALUATE)
        ):
            for kind, value in wrong.items():
                for asked in ("jvp", "hvp", "curvature") if about == "directions" else (None,):
                    document = GOOD_BODY | ({"quantities": [asked]} if asked else {}) | {about: value}
                    yield Vector(f"{about} {kind} {asked or ''}", path, as_json(document), 422, about)
    for path in ROUTES[:4]:
        for listed in (["value"], [], "value", ["gradient"]):
            yield Vector(
                f"quantities {listed}, which the path has",
                path,
                as_json(GOOD_BODY | {"quantities": listed}),
                422,
                "quantities",
            )
    for name in UNKNOWN:
        for path in (VALUE, EVALUATE):
            yield Vector(f"the field {name!r}", path, as_json(GOOD_BODY | {name: 1}), 422, "body")


def _bodies() -> Iterator[Vector]:
    """Yield vectors whose body is not a JSON object."""
    for text in NO_OBJECTS:
        yield Vector(f"{text} for an object", VALUE, text.encode(), 400)
    for kind, body in NO_BODIES.items():
        yield Vector(kind, VALUE, body, 400)
    whole = b'{"inputs":[[0.5,-1e-3]],"dtype":"float64"}'
    for length in range(1, len(whole)):
        yield Vector(f"cut after {length} bytes", VALUE, whole[:length], 400)


def _heads() -> Iterator[Vector]:
    """Yield vectors in which a header or the query is wrong."""
    body = as_json(GOOD_BODY)
    for text in MEDIA_TYPES:
        yield Vector(f"type {text}", VALUE, body, 415, headers={"Content-Type": text})
    for text in ACCEPTED:
        yield Vector(f"accept {text}", VALUE, body, 406, headers={"Accept": text})
    for text in ENCODINGS:
        yield Vector(f"encoding {text}", VALUE, body, 415, headers={"Content-Encoding": text})
    for text in DEADLINES:
        yield Vector(f"deadline {text}", VALUE, body, 422, "X-Deadline-Ms", headers={"X-Deadline-Ms": text})
    for text in VERSIONS:
        yield Vector(f"version {text}", f"{VALUE}?version={text}", body, 404)
    for kind, text in QUERIES.items():
        yield Vector(f"query, {kind}", f"{VALUE}?{text}", body, 422, "query")


def every() -> Iterator[Vector]:
    """Yield all vectors."""
    yield from GOOD
    yield from _numbers()
    yield from _fields()
    yield from _bodies()
    yield from _heads()
