"""The class of all vectors, bodies that no dialect takes, and names that do not exist."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VALUE, EVALUATE = "/v1/models/peaks/value", "/v1/models/peaks/evaluate"
ROUTES = (VALUE, "/v1/models/peaks/gradient", "/v1/models/peaks/hessian", "/v1/models/peaks/laplacian", EVALUATE)
#: A member that is left out.
ABSENT = object()


@dataclass(frozen=True)
class Vector:
    """A request and its answer.

    Attributes:
        name: What is wrong, and where.
        path: Where to.
        body: What.
        status: Of the answer; 200 for what must be let pass.
        about: The field that the error has to name; empty if it is about the whole request.
        headers: Instead of the usual ones.
        row: The row that it has to name.
    """

    name: str
    path: str
    body: bytes
    status: int
    about: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    row: int | None = None


#: Bodies that are JSON, but no object.
NO_OBJECTS = ("null", "true", "1", "1.5", '"x"', "[]", "[[0,0]]", '[{"inputs":[0,0]}]', '"{}"', "-0", "NaN")
#: Bodies that are not JSON in UTF-8.
NO_BODIES = {
    "empty": b"",
    "space": b" ",
    "byte order mark": b'\xef\xbb\xbf{"inputs":[0,0]}',
    "UTF-16": '{"inputs":[0,0]}'.encode("utf-16"),
    "UTF-32": '{"inputs":[0,0]}'.encode("utf-32"),
    "UTF-7": b"+AHsAfQ-",
    "bad UTF-8": b'{"inputs":[0,0],"\xff":1}',
    "overlong UTF-8": b'{"inputs":[0,0],"\xc0\x80":1}',
    "control character": b'{"inputs":[0,0],"a\nb":1}',
    "two documents": b'{"inputs":[0,0]}{"inputs":[0,0]}',
    "comma at the end": b'{"inputs":[0,0],}',
    "comma in the list": b'{"inputs":[0,0,]}',
    "no colon": b'{"inputs"[0,0]}',
    "no quotes": b"{inputs:[0,0]}",
    "comment": b'{"inputs":[0,0]} // x',
    "form": b"inputs=0&inputs=0",
    "XML": b"<inputs/>",
    "YAML": b"inputs: [0, 0]",
    "pickle": b"\x80\x04]\x94.",
    "gzip": b"\x1f\x8b\x08\x00",
    "zeros": bytes(100),
    "deep lists": b"[" * 250_000,
    "deep lists, closed": b'{"inputs":' + b"[" * 250_000 + b"]" * 250_000 + b"}",
    "deep objects": b'{"a":' * 10_000,
}


def without_absent(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not ABSENT}


def as_json(document: dict[str, Any]) -> bytes:
    return json.dumps(without_absent(document)).encode()


def shown(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value)[:40]
