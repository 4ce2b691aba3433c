"""Requests generated from the OpenAPI document: such as it allows, such as fit a model, and such as are spoiled.

Strategies are made from the document's own schemas, so that what is added there is tried here; unlike a general
tool's, many of these requests fit a model, so that there are numbers to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import safetensors.numpy
from hypothesis import strategies as st

Schema = Mapping[str, Any]
JSON, SAFETENSORS = "application/json", "application/x-safetensors"
KEYS = ("user-key-1", "admin-key")
#: Longest generated lists; the limits themselves are tried elsewhere.
MAX_ITEMS = 4
#: Numbers that float32 holds, the extreme ones among them.
FLOATS = st.floats(-1e4, 1e4).map(np.float32) | st.sampled_from(
    [np.float32(number) for number in (0.0, -0.0, 1.0, 1e-45, -1e-38, 1e30, -3.4e38)]
)
#: Every value that JSON can have, and some that it should not.
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


class Document(dict[str, Any]):
    """An OpenAPI document that is not written out in full wherever a strategy is."""

    def __repr__(self) -> str:
        return "Document()"


@dataclass(frozen=True)
class Model:
    """The sizes that a request must fit.

    Attributes:
        name: The model's.
        d: Inputs.
        m: Outputs.
        points: Some that it was made for, (n, d).
        quantities: Those that it has.
    """

    name: str
    d: int
    m: int
    points: np.ndarray[Any, Any] = field(repr=False)
    quantities: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        method: Verb.
        path: Path and query.
        headers: Header fields.
        body: Body.
        given: What it asks, if it fits a model and has to be answered.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    given: Mapping[str, Any] | None = None


def allowed(schema: Schema, document: Document) -> st.SearchStrategy[Any]:  # noqa: PLR0911 - one per kind
    """Return values that a schema allows."""
    match schema:
        case {"$ref": str(reference)}:
            return allowed(document["components"]["schemas"][reference.rsplit("/", 1)[1]], document)
        case {"enum": values}:
            return st.sampled_from(values)
        case {"anyOf": schemas}:
            return st.one_of([allowed(one, document) for one in schemas])
        case {"type": "array", "items": items}:
            most = min(schema.get("maxItems", MAX_ITEMS), MAX_ITEMS)
            is_unique = schema.get("uniqueItems", False)
            return st.lists(
                allowed(items, document), min_size=schema.get("minItems", 0), max_size=most, unique=is_unique
            )
        case {"type": "object"}:
            members = {name: allowed(member, document) for name, member in schema["properties"].items()}
            needed = {name: members.pop(name) for name in schema.get("required", ())}
            return st.fixed_dictionaries(needed, optional=members)
        case {"type": "number"}:
            return st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
        case {"type": "integer"}:
            return st.integers(schema.get("minimum"), schema.get("maximum"))
        case {"type": "string", "pattern": pattern}:
            return st.from_regex(pattern, fullmatch=True).map(str.strip)
        case {"type": "string"}:
            return st.text(min_size=1, max_size=12)
        case {"type": "null"}:
            return st.none()
    raise AssertionError(f"expected a schema of a known kind, got {schema}")


@st.composite
def spoiled(draw: st.DrawFn, good: st.SearchStrategy[Any]) -> Any:
    """Return a valid value with one part, at any depth, replaced, removed, repeated or extended."""
    whole = [draw(good)]
    at: Any = whole
    key: Any = 0
    while isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
        at = at[key]
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
    match draw(st.sampled_from(("replace", "leave out", "add", "nest"))):
        case "leave out" if at is not whole:
            del at[key]
        case "add" if isinstance(at, dict):
            at[draw(st.text(max_size=8))] = draw(ANY)
        case "add" if isinstance(at, list) and at is not whole:
            at.append(draw(ANY))
        case "nest":
            at[key] = [at[key]]
        case _:
            at[key] = draw(ANY)
    return whole[0]


@st.composite
def fitting(draw: st.DrawFn, models: list[Model], action: str) -> tuple[Model, dict[str, Any]]:
    """Return a model, and a question that fits it: arrays in float32, which both dtypes hold."""
    model = draw(st.sampled_from([one for one in models if action in ("evaluate", *one.quantities)]))

    def array(*shape: int) -> Any:
        count = int(np.prod(shape))
        return np.array(draw(st.lists(FLOATS, min_size=count, max_size=count)), np.float32).reshape(shape)

    n, k = draw(st.integers(1, MAX_ITEMS)), draw(st.integers(1, 3))
    if draw(st.integers(0, 4)):
        rows = draw(st.lists(st.integers(0, len(model.points) - 1), min_size=n, max_size=n))
        inputs = model.points[rows].astype(np.float32)
    else:
        inputs = array(n, model.d)
    given: dict[str, Any] = {"inputs": inputs[0] if n == 1 and draw(st.booleans()) else inputs}
    if draw(st.integers(0, 2)) == 0:
        given["weights"] = array(*draw(st.sampled_from([(model.m,), (n, model.m)])))
    asked = [action]
    if action == "evaluate":
        asked = draw(st.lists(st.sampled_from(model.quantities), min_size=1, unique=True))
        given["quantities"] = asked
    if not {"jvp", "hvp", "curvature"}.isdisjoint(asked):
        given["directions"] = array(*draw(st.sampled_from([(k, model.d), (n, k, model.d)])))
    if draw(st.integers(0, 3)) == 0:
        given["outside"] = "allow"
    if draw(st.booleans()):
        given["dtype"] = draw(st.sampled_from(["float32", "float64"]))
    return model, given


@st.composite
def questions(draw: st.DrawFn, document: Document, path: str, models: list[Model]) -> Request:
    """Return a request for derivatives."""
    action = path.rsplit("/", 1)[1]
    operation = document["paths"][path]["post"]
    schema = operation["requestBody"]["content"][JSON]["schema"]
    kind = draw(st.sampled_from(("fitting", "fitting", "allowed", "spoiled", "spoiled")))
    is_binary = draw(st.integers(0, 3)) == 0
    headers = {"Authorization": f"Bearer {draw(st.sampled_from(KEYS))}"}
    headers["Accept"] = draw(st.sampled_from(sorted(operation["responses"]["200"]["content"])))
    model, given = draw(fitting(models, action))
    query, name = {}, model.name
    if is_binary:
        arrays = {key: value for key, value in given.items() if isinstance(value, np.ndarray)}
        query = {
            key: value if key in {"dtype", "outside"} else ",".join(value)
            for key, value in given.items()
            if key not in arrays
        }
        body = safetensors.numpy.save(arrays)
    elif kind == "allowed":
        body = draw(allowed(schema, document).map(_text))
    else:
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in given.items()}
        body = draw(spoiled(st.just(plain)).map(_text)) if kind == "spoiled" else _text(plain)
    if kind != "fitting":
        found = draw(parameters(document, operation))
        query |= found["query"]
        headers |= found["header"]
        name = draw(st.sampled_from((name, name, name, found["path"]["model"])))
        if is_binary or draw(st.integers(0, 9)) == 0:
            body = draw(damaged(body))
        if draw(st.integers(0, 9)) == 0:
            headers["Authorization"] = draw(st.sampled_from(("Bearer x", "Basic user", "")))
    headers["Content-Type"] = SAFETENSORS if is_binary else JSON
    target = path.replace("{model}", quote(name, safe="")) + ("?" + urlencode(query) if query else "")
    return Request("POST", target, headers, body, given | {"model": model} if kind == "fitting" else None)


@st.composite
def other_requests(draw: st.DrawFn, document: Document, path: str, method: str, names: list[str]) -> Request:
    """Return a request that has no body; ``names`` are those of models that it may name."""
    found = draw(parameters(document, document["paths"][path][method]))
    name = draw(st.sampled_from([*names, found["path"].get("model", "")]))
    key = draw(st.sampled_from((*KEYS, *KEYS, "x", "")))
    target = path.replace("{model}", quote(name, safe=""))
    target += "?" + urlencode(found["query"]) if found["query"] else ""
    return Request(method.upper(), target, {"Authorization": f"Bearer {key}", **found["header"]})


@st.composite
def parameters(draw: st.DrawFn, document: Document, operation: Schema) -> dict[str, dict[str, str]]:
    """Return an operation's parameters by location, allowed ones and others."""
    found: dict[str, dict[str, str]] = {"path": {}, "query": {}, "header": {}}
    for parameter in operation["parameters"]:
        if not parameter.get("required") and draw(st.booleans()):
            continue
        value = draw(allowed(parameter["schema"], document))
        if parameter["in"] != "path" and draw(st.integers(0, 3)) == 0:
            value = draw(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=8))
        found[parameter["in"]][parameter["name"]] = ",".join(value) if isinstance(value, list) else str(value)
    return found


@st.composite
def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """Return bytes with a few changed, inserted or removed."""
    at = draw(st.integers(0, max(0, len(body) - 1)))
    gone, new = draw(st.integers(0, 4)), draw(st.binary(max_size=4))
    return body[:at] + new + body[at + gone :]


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()
