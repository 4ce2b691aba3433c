"""Building of requests and parsing of replies: the client's side of the HTTP interface.

Replies are not trusted: sizes, types, names and shapes are compared with the request, and a reply that does not fit
raises :class:`~hessquik_client.errors.UnexpectedReply`.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from hessquik_client.domain import OUTSIDE, Domain
from hessquik_client.errors import BY_CODE, ServiceError, UnexpectedReply
from hessquik_client.quantities import DIRECTIONAL, QUANTITIES, floats_per_row, row_shapes

__all__ = [
    "Answer",
    "Array",
    "ArrayLike",
    "Facts",
    "Question",
    "Reply",
    "Request",
    "ask",
    "build_request",
    "error_in",
    "file_request",
    "parse_answer",
    "parse_document",
    "parse_facts",
    "parse_file",
    "unexpected",
]

Array = npt.NDArray[np.floating[Any]]
#: Anything numpy turns into an array, and torch tensors.
ArrayLike = Any

SAFETENSORS = "application/x-safetensors"
DTYPES = ("float32", "float64")
#: Bytes of a safetensors header, for a few tensors and the model's name.
HEADER_BYTES = 4096
#: Bytes of a description, which repeats the header of a model's file, and of an error.
DOCUMENT_BYTES = 4 << 20
#: Bytes of a saved network.
FILE_BYTES = 512 << 20
#: Bytes of an answer by a model whose sizes are not known, since it is being loaded.
UNSEEN_BYTES = 1 << 20
#: Directions per point where the service does not say how many it takes.
MAX_DIRECTIONS = 1024
#: A field's shapes by their number of axes: the same for all points, or a batch's with a row per point.
_SHAPES = {
    "inputs": {1: "(d,)", 2: "(n, d)"},
    "weights": {1: "(m,)", 2: "(n, m)"},
    "directions": {2: "(k, d)", 3: "(n, k, d)"},
}


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Attributes:
        method: ``GET`` or ``POST``.
        target: Path and query.
        body: The bytes.
        headers: Headers of this request; the key and the deadline are added when it is sent.
        most_bytes: Most bytes of the body of a reply with status 200.
    """

    method: str
    target: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    most_bytes: int = DOCUMENT_BYTES


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP reply; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Facts:
    """The part of a model's description with which replies are checked.

    Attributes:
        version: The version described.
        d: Number of inputs; ``None`` while the model is not ready.
        m: Number of outputs, or ``None``.
        dtype: The model's own dtype, or ``None``.
        rows: Most points n in a request; with k directions, n·k is at most this.
        directions: Most directions per point in a request.
        body_bytes: Largest request body.
        reply_bytes: Largest reply.
        domain: The bounds within which the model was fitted, if it has any.
    """

    version: str
    d: int | None
    m: int | None
    dtype: str | None
    rows: int
    directions: int
    body_bytes: int
    reply_bytes: int
    domain: Domain | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """The arguments of a call, after the checks that need no server.

    Attributes:
        inputs: The points (n, d).
        quantities: Names of the quantities.
        weights: Weights (m,) or (n, m), or ``None``.
        directions: Directions (k, d) or (n, k, d), or ``None``.
        dtype: ``float32`` or ``float64``; ``None`` means the model's own.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; ``None`` means the service's setting.
        is_single: Whether one point was given without an n axis, so that its answer has none.
    """

    inputs: Array
    quantities: tuple[str, ...]
    weights: Array | None = None
    directions: Array | None = None
    dtype: str | None = None
    outside: str | None = None
    is_single: bool = False

    @property
    def rows(self) -> int:
        """Return the number n of points."""
        return len(self.inputs)

    @property
    def k(self) -> int:
        """Return the number k of directions per point."""
        return 0 if self.directions is None else self.directions.shape[-2]

    def floats(self, m: int, k: int | None = None) -> int:
        """Return the number of floats per point in an answer of a model with m outputs."""
        d = self.inputs.shape[-1]
        return floats_per_row(self.quantities, d, m, self.k if k is None else k, self.weights is not None)

    def shape(self, quantity: str, m: int) -> tuple[int, ...]:
        """Return the shape of a quantity, n axis included, for a model of m outputs."""
        (row,) = row_shapes((quantity,), self.inputs.shape[-1], m, self.k, self.weights is not None)
        return (self.rows, *row)


class Answer:
    """The requested quantities, as attributes and by name, ``answer["hessian"]``.

    The shapes are those of :func:`hessquik_client.quantities.describe_shape`, such as (n, d, m) for the gradient of a
    batch; for a single point there is no n axis. With weights, m is 1.

    Args:
        model: Name of the model.
        version: The version that was evaluated.
        arrays: The quantities by name.

    Examples:
        >>> answer = Answer("peaks", "1", {"value": np.zeros((5, 1))})
        >>> answer
        Answer(model='peaks', version='1', value=(5, 1))
        >>> answer.hessian
        Traceback (most recent call last):
        AttributeError: hessian: expected a quantity that was asked for: value
    """

    def __init__(self, model: str, version: str, arrays: Mapping[str, Array]) -> None:
        """Store the arrays without copying them."""
        self.model = model
        self.version = version
        self.arrays = dict(arrays)

    def __getattr__(self, quantity: str) -> Array:
        """Return a quantity; called for names that are not attributes."""
        arrays: dict[str, Array] = self.__dict__.get("arrays", {})
        if quantity in arrays:
            return arrays[quantity]
        if quantity in QUANTITIES:
            raise AttributeError(f"{quantity}: expected a quantity that was asked for: {', '.join(arrays)}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {quantity!r}")

    def __getitem__(self, quantity: str) -> Array:
        """Return a quantity by name.

        Raises:
            KeyError: the quantity was not requested.
        """
        if quantity not in self.arrays:
            raise KeyError(f"{quantity}: expected a quantity that was asked for: {', '.join(self.arrays)}")
        return self.arrays[quantity]

    def __repr__(self) -> str:
        shapes = "".join(f", {name}={array.shape}" for name, array in self.arrays.items())
        return f"Answer(model={self.model!r}, version={self.version!r}{shapes})"


def ask(
    inputs: ArrayLike,
    quantities: Sequence[str],
    weights: ArrayLike | None = None,
    directions: ArrayLike | None = None,
    dtype: npt.DTypeLike | None = None,
    outside: str | None = None,
) -> Question:
    """Check and convert the arguments of a call.

    Raises:
        TypeError: an argument is not an array of numbers, or ``quantities`` is a string.
        ValueError: a quantity is unknown, or an array has a wrong number of axes or rows.
    """
    if isinstance(quantities, str):
        raise TypeError("quantities: expected a list of names, got a string")
    names = tuple(quantities)
    unknown = [name for name in names if name not in QUANTITIES]
    if unknown or not names:
        raise ValueError(f"quantities: expected names out of {', '.join(QUANTITIES)}, got {unknown or 'none'}")
    wanted = None if dtype is None else np.dtype(dtype).name
    if wanted not in (None, *DTYPES):
        raise ValueError(f"dtype: expected float32 or float64, got {wanted}")
    if outside not in (None, *OUTSIDE):
        raise ValueError(f"outside: expected {' or '.join(OUTSIDE)}, got {outside!r}")
    points = _array("inputs", inputs)
    is_directional = directions is not None and not DIRECTIONAL.isdisjoint(names)
    question = Question(
        np.atleast_2d(points),
        names,
        None if weights is None else _array("weights", weights),
        _array("directions", directions) if is_directional else None,
        wanted,
        outside,
        points.ndim == 1,
    )
    for name, array, own in (("weights", question.weights, 2), ("directions", question.directions, 3)):
        if array is not None and array.ndim == own and len(array) != question.rows:
            raise ValueError(f"{name}: expected {question.rows} rows, as many as points, got shape {array.shape}")
    return question


def build_request(model: str, version: str | None, question: Question, facts: Facts | None) -> Request:
    """Return the HTTP request of a call."""
    tensors = {"inputs": question.inputs, "weights": question.weights, "directions": question.directions}
    body = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    )
    query = {"quantities": ",".join(question.quantities), "dtype": question.dtype, "version": version}
    query["outside"] = question.outside
    target = f"/v1/models/{quote(model, safe='')}/evaluate?{_encode(query)}"
    headers = {"content-type": SAFETENSORS, "accept": SAFETENSORS}
    if facts is None or facts.m is None:
        return Request("POST", target, body, headers, UNSEEN_BYTES)
    itemsize = np.dtype(question.dtype or facts.dtype).itemsize
    return Request("POST", target, body, headers, HEADER_BYTES + question.rows * question.floats(facts.m) * itemsize)


def parse_answer(reply: Reply, model: str, version: str | None, question: Question, facts: Facts | None) -> Answer:
    """Return the answer in a reply; its arrays have the n axis. NaN and infinity are kept.

    Args:
        reply: A reply with status 200.
        model: Name of the requested model.
        version: The requested version, if any.
        question: The arguments of the call.
        facts: The model's sizes and dtype, if known.

    Raises:
        UnexpectedReply: the reply does not fit the request.
    """
    try:
        arrays = safetensors.numpy.load(reply.body)
        head = json.loads(reply.body[8 : 8 + int.from_bytes(reply.body[:8], "little")])
        answered = head["__metadata__"]["model"], head["__metadata__"]["version"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise unexpected(reply, "an answer in safetensors") from None
    if answered != (model, version or answered[1]):
        raise unexpected(reply, f"an answer by model {model}, version {version or 'any'}, got {answered}")
    if arrays.keys() != set(question.quantities):
        raise unexpected(reply, f"{', '.join(question.quantities)}, got {', '.join(arrays) or 'nothing'}")
    some = arrays[question.quantities[0]]
    m = (facts and facts.m) or (some.shape[-1] if some.ndim else 0)
    dtype = question.dtype or (facts and facts.dtype) or some.dtype.name
    for name, array in arrays.items():
        if (array.shape, array.dtype.name) != (question.shape(name, m), dtype) or dtype not in DTYPES or m < 1:
            wanted = f"{name} as {dtype} {question.shape(name, m)}"
            raise unexpected(reply, f"{wanted}, got {array.dtype} {array.shape}")
    return Answer(model, answered[1], {name: arrays[name] for name in question.quantities})


def file_request(model: str, version: str | None) -> Request:
    """Return the request for a model's file."""
    target = f"/v1/models/{quote(model, safe='')}/file?{_encode({'version': version})}".rstrip("?")
    return Request("GET", target, headers={"accept": SAFETENSORS}, most_bytes=FILE_BYTES)


def parse_file(reply: Reply) -> bytes:
    """Return the file in a reply, after a check of its digest.

    Raises:
        UnexpectedReply: the digest is missing or differs.
    """
    digest = b64encode(hashlib.sha256(reply.body).digest()).decode()
    if reply.headers.get("repr-digest") != f"sha-256=:{digest}:":
        raise unexpected(reply, "a file with the SHA-256 that Repr-Digest states")
    return reply.body


def parse_document(reply: Reply) -> dict[str, Any]:
    """Return the JSON object in a reply.

    Raises:
        UnexpectedReply: the body is not a JSON object.
    """
    document = _load_json(reply.body)
    if not isinstance(document, dict):
        raise unexpected(reply, "a JSON object")
    return document


def parse_facts(reply: Reply, model: str, version: str | None) -> tuple[dict[str, Any], Facts]:
    """Return the description of a model in a reply, as it is and as :class:`Facts`.

    Raises:
        UnexpectedReply: the reply is not a description of this model.
    """
    document = parse_document(reply)
    limits = document.get("limits")
    limits = limits if isinstance(limits, dict) else {}
    answered, dtype, metadata = document.get("version"), document.get("dtype"), document.get("metadata")
    sizes = [document.get("d"), document.get("m")]
    most = [
        limits.get("rows"),
        limits.get("directions", MAX_DIRECTIONS),
        *map(limits.get, ("body_bytes", "reply_bytes")),
    ]
    faults = {
        "name": document.get("name") != model,
        "version": not isinstance(answered, str) or answered != (version or answered),
        "d and m": not all(size is None or _is_count(size) for size in sizes),
        "dtype": dtype is not None and dtype not in DTYPES,
        "metadata": metadata is not None and not isinstance(metadata, dict),
        "limits": not all(map(_is_count, most)),
        "bounds": not _has_bounds(metadata, sizes[0]),
    }
    if any(faults.values()):
        fault = next(name for name, is_fault in faults.items() if is_fault)
        raise unexpected(reply, f"a description of model {model}, version {version or 'any'}, got a wrong {fault}")
    d, m = sizes
    rows, directions, body_bytes, reply_bytes = most
    domain = _domain(metadata, d)
    return document, Facts(str(answered), d, m, dtype, rows, directions, body_bytes, reply_bytes, domain)


def _has_bounds(metadata: Any, d: Any) -> bool:
    """Return whether the bounds in a model's metadata are valid or absent."""
    given = metadata if isinstance(metadata, dict) else {}
    bounds = [given[name] for name in ("lower_bounds", "upper_bounds") if given.get(name) is not None]
    return len(bounds) != 1 and all(
        isinstance(listed, list) and len(listed) == d and all(type(one) in (int, float) for one in listed)
        for listed in bounds
    )


def _domain(metadata: Mapping[str, Any] | None, d: int | None) -> Domain | None:
    names = (metadata or {}).get("input_names")
    is_named = isinstance(names, list) and len(names) == d and all(isinstance(name, str) for name in names)
    return Domain.of(metadata if is_named or metadata is None else {**metadata, "input_names": None})


def error_in(reply: Reply) -> ServiceError | None:
    """Return the error that a reply describes, or ``None`` for status 200."""
    if reply.status == 200:
        return None
    problem = _load_json(reply.body)
    code, detail = (problem.get("code"), problem.get("detail")) if isinstance(problem, dict) else (None, None)
    kind = BY_CODE.get(code) if isinstance(code, str) else None
    if kind is None or not isinstance(detail, str):
        return unexpected(reply, "a reply of the service")
    error = kind(
        detail,
        status=reply.status,
        request_id=str(problem.get("request_id", "")),
        retry_after_s=_retry_after_s(reply),
    )
    own = {"type", "title", "status", "detail", "code", "request_id"}
    error.extra = {name: value for name, value in problem.items() if name not in own}
    return error


def unexpected(reply: Reply, wanted: str) -> UnexpectedReply:
    """Return the error for a reply that does not fit the request."""
    kind = reply.headers.get("content-type", "no type")[:100]
    request_id = reply.headers.get("x-request-id", "")
    detail = f"expected {wanted}; this is status {reply.status} with {len(reply.body)} bytes of {kind}"
    return UnexpectedReply(detail, status=reply.status, request_id=request_id, retry_after_s=_retry_after_s(reply))


def _array(field: str, given: ArrayLike) -> Array:
    """Convert numbers to an array: float32 stays float32, other dtypes become float64; check the number of axes."""
    detach = getattr(given, "detach", None)
    array = np.asarray(given if detach is None else detach().cpu().numpy())
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{field}: expected real numbers, got {array.dtype}")
    shapes = _SHAPES[field]
    if array.ndim not in shapes:
        raise ValueError(f"{field}: expected shape {' or '.join(shapes.values())}, got {array.shape}")
    return array if array.dtype == np.float32 else array.astype(np.float64, copy=False)


def _encode(query: Mapping[str, str | None]) -> str:
    return urlencode({name: value for name, value in query.items() if value is not None}, safe=",")


def _load_json(body: bytes) -> Any:
    """Parse JSON strictly; return ``None`` for invalid JSON, such as NaN or too deep nesting."""
    try:
        return json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"expected JSON, got {constant}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _retry_after_s(reply: Reply) -> float | None:
    given = reply.headers.get("retry-after", "")
    return float(given) if given.isascii() and given.isdigit() and len(given) < 6 else None
