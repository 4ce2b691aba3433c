"""Questions → requests, replies → answers: all that the clients know of the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from service.client.errors import BY_CODE, ServiceError, UnexpectedReply
from service.quantities import QUANTITIES

__all__ = [
    "Answer",
    "Array",
    "ArrayLike",
    "Question",
    "Reply",
    "Request",
    "ask",
    "build_request",
    "error_in",
    "join",
    "parse_answer",
    "parse_document",
    "split",
]

Array = npt.NDArray[np.floating[Any]]
#: Anything numpy turns into an array, and torch tensors.
ArrayLike = Any

SAFETENSORS = "application/x-safetensors"
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
        headers: What belongs to this request; keys and deadlines are added where it is sent.
    """

    method: str
    target: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP reply; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Question:
    """What a call asks.

    Attributes:
        inputs: (d,) or (n, d).
        quantities: Their names.
        weights: (m,) or (n, m) or ``None``.
        directions: (k, d) or (n, k, d) or ``None``.
        dtype: ``float32`` or ``float64``; ``None`` is the model's own.
    """

    inputs: Array
    quantities: tuple[str, ...]
    weights: Array | None = None
    directions: Array | None = None
    dtype: str | None = None

    @property
    def is_single(self) -> bool:
        """Whether it is one point, whose answer has no n axis."""
        return self.inputs.ndim == 1

    @property
    def rows(self) -> int:
        """How many points."""
        return 1 if self.is_single else len(self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(array.nbytes for array in (self.inputs, self.weights, self.directions) if array is not None)

    def arrays_per_row(self) -> list[Array]:
        """Those arrays of a batch that have a row per point: always the inputs."""
        own = ((self.inputs, 2), (self.weights, 2), (self.directions, 3))
        return [array for array, ndim in own if array is not None and array.ndim == ndim]

    def part(self, start: int, stop: int) -> Question:
        """Some rows of a batch; weights and directions go along where each row has its own."""
        weights, directions = self.weights, self.directions
        if weights is not None and weights.ndim == 2:
            weights = weights[start:stop]
        if directions is not None and directions.ndim == 3:
            directions = directions[start:stop]
        return Question(self.inputs[start:stop], self.quantities, weights, directions, self.dtype)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service answered; a quantity that was not asked for is ``None``.

    Shapes for a batch; a single point's have no n axis. With weights, m is 1.

    Attributes:
        model: The model's name.
        version: The version that answered.
        value: (n, m).
        gradient: (n, d, m).
        hessian: (n, d, d, m).
        laplacian: (n, m).
        hessian_diagonal: (n, d, m).
        jvp: (n, k, m), derivatives along directions.
        hvp: (n, k, d, m), Hessians times directions.
        curvature: (n, k, m), vᵀHv.
    """

    model: str
    version: str
    value: Array | None = None
    gradient: Array | None = None
    hessian: Array | None = None
    laplacian: Array | None = None
    hessian_diagonal: Array | None = None
    jvp: Array | None = None
    hvp: Array | None = None
    curvature: Array | None = None

    def __getitem__(self, quantity: str) -> Array:
        """A quantity by name.

        Raises:
            KeyError: it was not asked for.
        """
        array = getattr(self, quantity, None)
        if not isinstance(array, np.ndarray):
            raise KeyError(quantity)
        return array


def ask(
    inputs: ArrayLike,
    quantities: Sequence[str],
    weights: ArrayLike | None = None,
    directions: ArrayLike | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Question:
    """A question about numbers of any kind.

    Raises:
        TypeError: something is no array of numbers, or quantities is a string.
        ValueError: a quantity has another name, or an array another number of axes or rows.
    """
    if isinstance(quantities, str):
        raise TypeError("quantities: expected a list of names, got a string")
    unknown = [name for name in quantities if name not in QUANTITIES]
    if unknown or not quantities:
        raise ValueError(f"quantities: expected names out of {', '.join(QUANTITIES)}, got {unknown or 'none'}")
    question = Question(
        _array("inputs", inputs),
        tuple(quantities),
        None if weights is None else _array("weights", weights),
        None if directions is None else _array("directions", directions),
        None if dtype is None else np.dtype(dtype).name,
    )
    for array in question.arrays_per_row():
        if len(array) != question.rows:
            raise ValueError(f"expected {question.rows} rows, as many as points, got shape {array.shape}")
    return question


def build_request(model: str, version: str | None, question: Question) -> Request:
    """The request that asks a question."""
    tensors = {"inputs": question.inputs, "weights": question.weights, "directions": question.directions}
    body = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}
    )
    query = {"quantities": ",".join(question.quantities), "dtype": question.dtype, "version": version}
    target = f"/v1/models/{quote(model, safe='')}/evaluate?{_encode(query)}"
    return Request("POST", target, body, {"content-type": SAFETENSORS, "accept": SAFETENSORS})


def parse_answer(reply: Reply, question: Question) -> Answer:
    """The numbers in a reply.

    Raises:
        UnexpectedReply: it does not answer the question.
    """
    try:
        arrays = safetensors.numpy.load(reply.body)
        head = json.loads(reply.body[8 : 8 + int.from_bytes(reply.body[:8], "little")])
        model, version = head["__metadata__"]["model"], head["__metadata__"]["version"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
        raise _unexpected(reply) from None
    is_complete = arrays.keys() == set(question.quantities)
    if not is_complete or not (question.is_single or all(len(a) == question.rows for a in arrays.values())):
        raise _unexpected(reply)
    return Answer(model, version, **arrays)


def parse_document(reply: Reply) -> dict[str, Any]:
    """The JSON object in a reply.

    Raises:
        UnexpectedReply: there is none.
    """
    try:
        document = json.loads(reply.body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise _unexpected(reply)
    return document


def error_in(reply: Reply) -> ServiceError | None:
    """The error that a reply is, if it is one."""
    if reply.status == 200:
        return None
    try:
        problem = json.loads(reply.body)
        kind = BY_CODE[problem.pop("code")]
        detail, request_id = str(problem.pop("detail")), str(problem.pop("request_id"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _unexpected(reply)
    extra = {name: value for name, value in problem.items() if name not in {"type", "title", "status"}}
    error = kind(detail, status=reply.status, request_id=request_id, retry_after_s=_retry_after_s(reply))
    error.extra = extra
    return error


def split(question: Question, rows: int) -> list[Question]:
    """A batch's parts of at most so many rows, as even as they get."""
    count = max(1, -(-question.rows // rows))
    if count == 1:
        return [question]
    ends = [question.rows * part // count for part in range(count + 1)]
    return [question.part(start, stop) for start, stop in pairwise(ends)]


def join(answers: Sequence[Answer]) -> Answer:
    """The parts' answers as one."""
    first = answers[0]
    if len(answers) == 1:
        return first
    names = [name for name in Answer.__dataclass_fields__ if isinstance(getattr(first, name), np.ndarray)]
    joined = {name: np.concatenate([answer[name] for answer in answers]) for name in names}
    return Answer(first.model, first.version, **joined)


def _array(field: str, given: ArrayLike) -> Array:
    """Numbers of any kind as float32, if they are, or float64, with as many axes as the field may have."""
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


def _unexpected(reply: Reply) -> UnexpectedReply:
    kind = reply.headers.get("content-type", "no type")
    detail = f"expected a reply of the service, got status {reply.status} and {len(reply.body)} bytes of {kind}"
    request_id = reply.headers.get("x-request-id", "")
    return UnexpectedReply(detail, status=reply.status, request_id=request_id, retry_after_s=_retry_after_s(reply))


def _retry_after_s(reply: Reply) -> float | None:
    given = reply.headers.get("retry-after", "")
    return float(given) if given.isdigit() and len(given) < 6 else None
