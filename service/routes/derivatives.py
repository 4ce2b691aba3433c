"""POST /v1/models/{model}/evaluate, and a path for each quantity, such as /v1/models/{model}/value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Query

from hessquik_client.domain import Outside
from hessquik_client.errors import InvalidInput
from hessquik_client.quantities import QUANTITIES, Quantity
from hessquik_client.question import Question, make_question, misspelt, numbers

from .. import codecs
from ..codecs import JSON
from ..front import Call
from ..http.messages import Cancel, Head, Reply, Request
from ..repository import ModelFile
from ..routes.operation import (
    ANY,
    ASKED,
    NAMED,
    Deadline,
    Direct,
    ModelName,
    VersionQuery,
    refusals,
)
from ..scheduler import Answers
from ..schemas import Answer, EvaluateRequest, QuantityRequest

__all__ = ["encode_json", "router"]

_JSON, _SAFETENSORS = codecs.JSON.encode(), codecs.SAFETENSORS.encode()
_FIELDS = dict.fromkeys(("inputs", "quantities", "weights", "directions", "dtype", "outside")).keys()


class Encoding(NamedTuple):
    """The encodings of a request and its reply, and the quantity in the path.

    Attributes:
        fixed: The quantity that the path names, ``None`` if the body may name several.
        is_json: Whether the body is JSON; otherwise it is safetensors.
        wants_json: Whether the reply is JSON; otherwise it is safetensors.
    """

    fixed: str | None
    is_json: bool
    wants_json: bool


def read_head(head: Head, known: frozenset[str], fixed: str | None) -> tuple[Encoding, frozenset[str]]:
    """Return the encodings of a request, and the query parameters that are allowed with them.

    Options of a JSON body are fields of the body, so they are refused as query parameters.

    Raises:
        ServiceError: a media type is not supported.
    """
    given = head.headers.get
    is_json = codecs.content_type(given(b"content-type", b"")) == JSON
    encoding = Encoding(fixed, is_json, codecs.accepted_type(given(b"accept", b"")) == JSON)
    return encoding, known & {"version"} if is_json else known


def answer(call: Call) -> Reply | Cancel:
    """Parse and check the request, and queue it for the workers."""
    target = call.target
    call.find(target.model, target.version)
    if target.encoding.is_json:
        return call.read(_ask_json)
    return _ask(call, codecs.parse_safetensors(call.request.body, target.encoding.fixed, target.query, call.shape))


def _ask_json(call: Call) -> Cancel:
    document = call.document
    if not document.keys() <= _FIELDS:
        expected = f"only the fields {', '.join(_FIELDS)}"
        raise InvalidInput.of("body", expected, misspelt(document, _FIELDS) or "another one")
    given = document.get
    arrays = {}
    for name in ("inputs", "weights", "directions"):
        value = given(name)
        if value is not None:
            arrays[name] = numbers(name, value, call.may_be_booleans)
    question = make_question(
        arrays, given("quantities"), call.target.encoding.fixed, given("dtype"), call.shape, given("outside")
    )
    return _ask(call, question)


def _ask(call: Call, question: Question) -> Cancel:
    if call.target.encoding.wants_json:
        return call.ask(question, "json", _write_json)
    rows = _Rows(call.request, call.served.file, len(question.inputs), question.is_single)
    return call.ask(question, "arrays", rows.write, rows.send)


def _write_json(call: Call, answers: Answers) -> Reply:
    file = call.served.file
    return Reply(200, _JSON, encode_json(file.name, file.version, answers, call.question.is_single))


def encode_json(
    model: str, version: int, answers: Mapping[str, Sequence[codecs.Piece]], is_single: bool
) -> list[codecs.Piece]:
    """Return the reply as JSON, from the text of each quantity's rows."""
    pieces: list[codecs.Piece] = [b'{"model":"%b","version":"%d"' % (model.encode(), version)]
    opening, closing = (b'":', b"") if is_single else (b'":[', b"]")
    for name, rows in answers.items():
        pieces.append(b',"' + name.encode() + opening)
        for piece in rows[:-1]:
            pieces += (piece, b",")
        pieces += (rows[-1], closing)
    pieces.append(b"}")
    return pieces


class _Rows:
    """Writer of a reply as safetensors. A large one is sent while rows arrive: the first tensor, then the others."""

    __slots__ = ("_file", "_is_begun", "_is_single", "_n", "_others", "_request")

    def __init__(self, request: Request, file: ModelFile, n: int, is_single: bool) -> None:
        self._request, self._file, self._n, self._is_single = request, file, n, is_single
        self._is_begun = False
        self._others: list[list[Any]] = []

    def send(self, part: Mapping[str, Any]) -> None:
        """Send the bytes that can be sent after the next rows have arrived."""
        stream = self._request.stream
        assert stream is not None
        if not self._is_begun:
            self._is_begun = True
            shapes = {
                name: array.shape[1:] if self._is_single else (self._n, *array.shape[1:])
                for name, array in part.items()
            }
            tensors = {name: (array.dtype, shapes[name]) for name, array in part.items()}
            header = codecs.safetensors_header(self._file.name, self._file.version, tensors)
            rest_bytes = self._n * sum(array.nbytes // len(array) for array in part.values())
            stream.begin(self._request, Reply(200, _SAFETENSORS, [header]), rest_bytes)
        first, *others = part.values()
        self._others.append(others)
        stream.send(self._request, [codecs.raw(first)])

    def write(self, _: Call, answers: Answers) -> Reply:
        """Return the reply, or the part of it that was not sent yet."""
        if self._is_begun:
            pieces: list[codecs.Piece] = [
                codecs.raw(array) for rows in zip(*self._others, strict=True) for array in rows
            ]
        else:
            pieces = codecs.encode_safetensors(self._file.name, self._file.version, answers, self._is_single)
        return Reply(200, _SAFETENSORS, pieces)


_FOR_BINARY = "For a binary body; a JSON body has a field for it."
_PARAMETERS: dict[str, Any] = {
    "model": ModelName,
    "version": VersionQuery,
    "dtype": Annotated[Literal["float32", "float64"] | None, Query(description=_FOR_BINARY)],
    "quantities": Annotated[
        list[Quantity] | None, Query(description="For a binary body: names separated by commas.")
    ],
    "outside": Annotated[Outside | None, Query(description=_FOR_BINARY)],
    "x_deadline_ms": Deadline,
}
_BINARY = {"application/x-safetensors": {"schema": {"type": "string", "format": "binary"}}}


def _route(action: str, fixed: str | None, body: Any, text: str) -> Direct:
    parameters = {name: kind for name, kind in _PARAMETERS.items() if fixed is None or name != "quantities"}
    return Direct(
        f"/v1/models/{{model}}/{action}",
        answer,
        partial(read_head, fixed=fixed),
        body,
        parameters,
        methods=["POST"],
        name=action,
        summary=text,
        text=text + ".",
        tags=["derivatives"],
        response_model=Answer,
        response_description="One key per quantity.",
        responses={200: {"content": _BINARY}, **refusals(*ANY, *NAMED, *ASKED)},
        openapi_extra={"requestBody": {"content": _BINARY}},
    )


router = APIRouter()
router.routes += [
    *(_route(quantity, quantity, QuantityRequest, f"The {quantity}") for quantity in QUANTITIES),
    _route("evaluate", None, EvaluateRequest, "Any set of quantities in one pass"),
]
