"""POST /v1/models/{model}/evaluate, and a path for each quantity, such as /v1/models/{model}/value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import orjson
from fastapi import APIRouter, Query

from hessquik_client.domain import Outside
from hessquik_client.quantities import QUANTITIES, Quantity
from hessquik_client.question import Question, Shape
from service import codecs
from service.codecs import JSON
from service.http.messages import Cancel, Head, Reply, Request
from service.json_reader import SHORT_BYTES, read_json, read_long_json
from service.repository import Served
from service.routes.operation import (
    ANY,
    ASKED,
    NAMED,
    Deadline,
    Direct,
    ModelName,
    VersionQuery,
    read_query,
    refusals,
)
from service.scheduler import Answers, OnRows
from service.schemas import Answer, EvaluateRequest, QuantityRequest

if TYPE_CHECKING:
    from service.app import Application

__all__ = ["router"]

_JSON, _SAFETENSORS = codecs.JSON.encode(), codecs.SAFETENSORS.encode()


class Asked(NamedTuple):
    """The question in a request's head.

    Attributes:
        model: From the path.
        fixed: The quantity that the path names, ``None`` if the body may name several.
        query: Parameters.
        media_type: Of the body.
        reply_type: Of the reply.
        form: What the workers are to answer.
        time_s: For the whole request.
    """

    model: str
    fixed: str | None
    query: dict[str, str]
    media_type: str
    reply_type: str
    form: str
    time_s: float


def read_head(application: Application, head: Head, names: Mapping[str, str], fixed: str | None) -> Asked:
    """Read what a request asks for; refuse what will be refused whatever the body is.

    Raises:
        ServiceError: any that a client may see.
    """
    given = head.headers.get
    time_s = application.core.time_ms(given(b"x-deadline-ms", b"")) / 1000
    media_type = codecs.content_type(given(b"content-type", b""))
    reply_type = codecs.accepted_type(given(b"accept", b""))
    # The fields of a JSON body are not parameters, and would be ignored there.
    known = (
        {"version"} if media_type == JSON else {"version", "dtype", "outside", *(() if fixed else ("quantities",))}
    )
    query = read_query(head.query, known)
    asked = Asked(
        names["model"], fixed, query, media_type, reply_type, "json" if reply_type == JSON else "arrays", time_s
    )
    if head.length is None or head.length > SHORT_BYTES:
        application.core.expect_room()  # or the body need not be sent
        application.core.repository.ready(asked.model, query.get("version"))
    return asked


def answer(application: Application, request: Request) -> Reply | Cancel:
    """Read, check, and ask the workers."""
    asked: Asked = request.head.target.asked
    core = application.core
    core.scheduler.queue.expect_room()
    served = core.repository.ready(asked.model, asked.query.get("version"))
    request.model = served.file.name
    body = request.body
    shape = core.shape(served)
    if asked.media_type != JSON:
        return _ask(application, request, served, codecs.parse_safetensors(body, asked.fixed, asked.query, shape))
    if len(body) > SHORT_BYTES:
        return application.run(request, _answer_long(application, request, served, shape))
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = read_json(body)
    may_be_booleans = b"true" in body or b"false" in body
    return _ask(application, request, served, codecs.parse_json(document, may_be_booleans, asked.fixed, shape))


async def _answer_long(application: Application, request: Request, served: Served, shape: Shape) -> Cancel:
    """Read a long body a slice at a time, and ask the workers."""
    body = request.body
    await asyncio.sleep(0)  # each look at all of a long body takes tens of milliseconds
    codecs.refuse_bombs(body, shape)
    with application.core.repository.holding(served):
        document, may_be_booleans = await read_long_json(body, shape.max_rows)
        question = codecs.parse_json(document, may_be_booleans, request.head.target.asked.fixed, shape)
        return _ask(application, request, served, question)


def _ask(application: Application, request: Request, served: Served, question: Question) -> Cancel:
    asked: Asked = request.head.target.asked
    name, version, is_single = served.file.name, str(served.file.version), question.is_single
    write: Callable[[Answers], Reply] = partial(_write_json, name, version, is_single)
    on_rows: OnRows | None = None
    if asked.reply_type != JSON:
        rows = _Rows(request, name, version, len(question.inputs), is_single)
        write, on_rows = rows.write, rows.send
    return application.ask(request, served, question, asked.form, request.began_s + asked.time_s, write, on_rows)


def _write_json(model: str, version: str, is_single: bool, answers: Answers) -> Reply:
    return Reply(200, _JSON, codecs.encode_json(model, version, answers, is_single))


class _Rows:
    """A reply as safetensors. A large one is sent as its rows come: those of the first tensor, then the others."""

    __slots__ = ("is_begun", "is_single", "model", "n", "others", "request", "version")

    def __init__(self, request: Request, model: str, version: str, n: int, is_single: bool) -> None:
        self.request, self.model, self.version, self.n, self.is_single = request, model, version, n, is_single
        self.is_begun = False
        self.others: list[list[Any]] = []

    def send(self, part: Mapping[str, Any]) -> None:
        """Send what can be sent when the next rows are there."""
        stream = self.request.stream
        assert stream is not None
        if not self.is_begun:
            self.is_begun = True
            shapes = {
                name: array.shape[1:] if self.is_single else (self.n, *array.shape[1:])
                for name, array in part.items()
            }
            tensors = {name: (array.dtype, shapes[name]) for name, array in part.items()}
            header = codecs.safetensors_header(self.model, self.version, tensors)
            rest_bytes = self.n * sum(array.nbytes // len(array) for array in part.values())
            stream.begin(self.request, Reply(200, _SAFETENSORS, [header]), rest_bytes)
        first, *others = part.values()
        self.others.append(others)
        stream.send(self.request, [codecs.raw(first)])

    def write(self, answers: Answers) -> Reply:
        """Return the reply, or what of it was not sent."""
        if self.is_begun:
            pieces: list[codecs.Piece] = [
                codecs.raw(array) for rows in zip(*self.others, strict=True) for array in rows
            ]
        else:
            pieces = codecs.encode_safetensors(self.model, self.version, answers, self.is_single)
        return Reply(200, _SAFETENSORS, pieces)


OutsideQuery = Annotated[Outside | None, Query(description="For a binary body; a JSON body has a field for it.")]


def _parameters(
    model: ModelName,
    version: VersionQuery = None,
    dtype: Annotated[
        Literal["float32", "float64"] | None, Query(description="For a binary body; a JSON body has a field for it.")
    ] = None,
    outside: OutsideQuery = None,
    x_deadline_ms: Deadline = None,
) -> None:
    """The parameters of a quantity."""


def _evaluate_parameters(
    model: ModelName,
    version: VersionQuery = None,
    dtype: Annotated[
        Literal["float32", "float64"] | None, Query(description="For a binary body; a JSON body has a field for it.")
    ] = None,
    quantities: Annotated[
        list[Quantity] | None, Query(description="For a binary body: names separated by commas.")
    ] = None,
    outside: OutsideQuery = None,
    x_deadline_ms: Deadline = None,
) -> None:
    """The parameters of any set of quantities."""


_BINARY = {"application/x-safetensors": {"schema": {"type": "string", "format": "binary"}}}


def _route(action: str, fixed: str | None, body: Any, parameters: Any, text: str) -> Direct:
    return Direct(
        f"/v1/models/{{model}}/{action}",
        answer,
        partial(read_head, fixed=fixed),
        body,
        parameters,
        methods=["POST"],
        name=action,
        operation_id=action,
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
    *(_route(quantity, quantity, QuantityRequest, _parameters, f"The {quantity}") for quantity in QUANTITIES),
    _route("evaluate", None, EvaluateRequest, _evaluate_parameters, "Any set of quantities in one pass"),
]
