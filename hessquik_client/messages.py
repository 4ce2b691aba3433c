"""Questions → requests, replies → answers: all that the client knows of the wire.

Nothing in a reply is believed: sizes, types, names and shapes are compared with what was asked, and what does not fit
is an :class:`~hessquik_client.errors.UnexpectedReply`.
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
        headers: Headers of this request; keys and deadlines are added where it is sent.
        most_bytes: The largest body that a reply with status 200 may have.
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
    """The part of a model's description that its answers are held against.

    Attributes:
        version: The version described.
        d: Inputs; ``None`` while the model is not ready.
        m: Outputs; the same.
        dtype: The model's own; the same.
        rows: Most points n in a request; with k directions, n·k is at most this.
        directions: Most directions per point in a request.
        body_bytes: Largest request body.
        reply_bytes: Largest reply.
        domain: Where the model was fitted, if its file says so.
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
    """The arguments of a call, checked as far as that needs no server.

    Attributes:
        inputs: (n, d).
        quantities: Their names.
        weights: (m,) or (n, m) or ``None``.
        directions: (k, d) or (n, k, d) or ``None``.
        dtype: ``float32`` or ``float64``; ``None`` is the model's own.
        outside: ``allow`` or ``refuse`` points outside the model's bounds; ``None`` is the service's own choice.
        is_single: One point was given without an n axis, and its answer has none.
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
        """The number of points n."""
        return len(self.inputs)

    @property
    def k(self) -> int:
        """The number of directions per point."""
        return 0 if self.directions is None else self.directions.shape[-2]

    def floats(self, m: int, k: int | None = None) -> int:
        """Return how many numbers an answer has per point, for a model of m outputs."""
        d = self.inputs.shape[-1]
        return floats_per_row(self.quantities, d, m, self.k if k is None else k, self.weights is not None)

    def shape(self, quantity: str, m: int) -> tuple[int, ...]:
        """Return the shape of a quantity, n axis included, for a model of m outputs."""
        (row,) = row_shapes((quantity,), self.inputs.shape[-1], m, self.k, self.weights is not None)
        return (self.rows, *row)


class Answer:
    """The service's answer: an attribute per quantity that was asked for, also by name, ``answer["hessian"]``.

    The shapes are those of :func:`hessquik_client.quantities.describe_shape`, such as (n, d, m) for the gradient of a
    batch; a single point's have no n axis. With weights, m is 1.

    Args:
        model: The model's name.
        version: The version that answered.
        arrays: The quantities.

    Example:
        >>> answer = Answer("peaks", "1", {"value": np.zeros((5, 1))})
        >>> answer
        Answer(model='peaks', version='1', value=(5, 1))
        >>> answer.hessian
        Traceback (most recent call last):
        AttributeError: hessian: expected a quantity that was asked for: value
    """

    def __init__(self, model: str, version: str, arrays: Mapping[str, Array]) -> None:
        """Hold the arrays, which belong to the caller."""
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
            KeyError: it was not asked for.
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
    """Return a question about numbers of any kind.

    Raises:
        TypeError: something is no array of numbers, or quantities is a string.
        ValueError: a quantity has another name, or an array another number of axes or rows.
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
    """Return the request that asks a question."""
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
    """Return the numbers in a reply, with their n axis. Numbers that are not finite come as they were computed.

    Args:
        reply: A reply with status 200.
        model: The model that was asked.
        version: The version that was asked, if one was.
        question: The question.
        facts: The model's sizes and dtype, if they are known.

    Raises:
        UnexpectedReply: it does not answer the question.
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
    """Return a file whose digest is the one that the reply states.

    Raises:
        UnexpectedReply: it is not.
    """
    digest = b64encode(hashlib.sha256(reply.body).digest()).decode()
    if reply.headers.get("repr-digest") != f"sha-256=:{digest}:":
        raise unexpected(reply, "a file with the SHA-256 that Repr-Digest states")
    return reply.body


def parse_document(reply: Reply) -> dict[str, Any]:
    """Return the JSON object in a reply.

    Raises:
        UnexpectedReply: there is none.
    """
    document = _load_json(reply.body)
    if not isinstance(document, dict):
        raise unexpected(reply, "a JSON object")
    return document


def parse_facts(reply: Reply, model: str, version: str | None) -> tuple[dict[str, Any], Facts]:
    """Return a model's description, and the facts in it.

    Raises:
        UnexpectedReply: it is none, or one of another model.
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
    """Return whether the bounds in a model's metadata are numbers for its inputs, or there are none."""
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
    """Return the error that a reply is, if it is one."""
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
    """Return the error for a reply that is not what was wanted."""
    kind = reply.headers.get("content-type", "no type")[:100]
    request_id = reply.headers.get("x-request-id", "")
    detail = f"expected {wanted}; this is status {reply.status} with {len(reply.body)} bytes of {kind}"
    return UnexpectedReply(detail, status=reply.status, request_id=request_id, retry_after_s=_retry_after_s(reply))


def _array(field: str, given: ArrayLike) -> Array:
    """Return numbers of any kind as float32, if they are, or float64, with as many axes as the field may have."""
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
    """Return a JSON value, or ``None`` for what is none: neither NaN nor lists nested without end."""
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
