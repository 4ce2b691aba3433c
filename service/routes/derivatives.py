"""POST /v1/models/{model}/value, /gradient, /hessian, /laplacian and /evaluate."""

from __future__ import annotations

import time
from typing import ClassVar, NamedTuple
from urllib.parse import parse_qsl

from service import codecs
from service.codecs import JSON, Piece, Question, Shape
from service.core import Core
from service.dispatcher import Answers, End, Job
from service.door import Receive, Reply, Scope, Send, read_body, send_reply
from service.errors import InvalidInput, MethodNotAllowed, ServiceError
from service.repository import Served

__all__ = ["Asked", "Derivatives", "Head"]

#: Most parameters of a query.
MAX_PARAMETERS = 16


class Head(NamedTuple):
    """What a request's head asks for: its bytes decide on all of it, so that it may be remembered.

    Attributes:
        model: From the path.
        fixed: The quantity that the path names, ``None`` if the body may name several.
        query: Parameters.
        media_type: Of the body.
        reply_type: Of the reply.
        time_s: For the whole request.
    """

    model: str
    fixed: str | None
    query: dict[str, str]
    media_type: str
    reply_type: str
    time_s: float

    @property
    def form(self) -> str:
        """What the workers are to answer."""
        return "json" if self.reply_type == JSON else "arrays"


class Derivatives:
    """Answers questions about models.

    Args:
        core: The service.
    """

    #: The last part of the path: a quantity, or ``evaluate`` for any set of them; and how it is counted.
    ACTIONS: ClassVar = {
        action: f"/v1/models/{{model}}/{action}"
        for action in ("value", "gradient", "hessian", "laplacian", "evaluate")
    }

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core
        self._max_rows = core.settings.max_rows

    async def __call__(self, model: str, action: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, check, compute, reply.

        Raises:
            ServiceError: any that a client may see.
        """
        head = self.read_head(model, action, scope)
        deadline_s = time.monotonic() + head.time_s
        served = self._ready(head)
        with self._core.repository.holding(served):
            body = await read_body(scope, receive, self._core.settings.max_body_bytes)
            question = self._read_body(head, served, body)
            answers = await self._core.answer(served, question, deadline_s, scope, head.form)
        await send_reply(send, _reply(head, served, question, answers))

    @classmethod
    def target(cls, path: str) -> tuple[str, str] | None:
        """Model and action, if this is a path for derivatives."""
        _, *parts = path.split("/")
        if len(parts) == 4 and parts[:2] == ["v1", "models"] and parts[3] in cls.ACTIONS:
            return parts[2], parts[3]
        return None

    def ask(self, head: Head, body: bytes, end: End) -> Asked:
        """The same without waiting, for a body that was read.

        Args:
            head: What is asked for.
            body: All of it.
            end: Called with the job when it has ended.

        Raises:
            ServiceError: any that a client may see.
        """
        deadline_s = time.monotonic() + head.time_s
        served = self._ready(head)
        question = self._read_body(head, served, body)
        return Asked(head, served, question, self._core.ask(served, question, head.form, deadline_s, end))

    def reply(self, asked: Asked) -> Reply:
        """The reply to what was asked, once its job has ended.

        Raises:
            ServiceError: the job has ended with it.
        """
        head, served, question, job = asked
        if job.error is not None:
            raise job.error
        return _reply(head, served, question, job.answers)

    def abandon(self, asked: Asked, error: ServiceError) -> None:
        """End what was asked with an error, unless it has ended."""
        self._core.abandon(asked.job, error)

    def read_head(self, model: str, action: str, scope: Scope) -> Head:
        """What a request asks for.

        Raises:
            ServiceError: any that a client may see.
        """
        scope["hessquik.route"] = self.ACTIONS[action]
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"expected POST here, got {scope['method']}")
        given = scope["hessquik.headers"].get
        time_s = self._core.time_ms(given(b"x-deadline-ms", b"")) / 1000
        media_type = codecs.content_type(given(b"content-type", b""))
        reply_type = codecs.accepted_type(given(b"accept", b""))
        fixed = None if action == "evaluate" else action
        return Head(model, fixed, parse_query(scope), media_type, reply_type, time_s)

    def _ready(self, head: Head) -> Served:
        """The model, if there is room for a request."""
        self._core.expect_room()
        return self._core.repository.ready(head.model, head.query.get("version"))

    def _read_body(self, head: Head, served: Served, body: bytes) -> Question:
        facts = served.facts
        shape = Shape(facts["d"], facts["m"], facts["dtype"], self._max_rows)
        if head.media_type == JSON:
            return codecs.parse_json(body, head.fixed, shape)
        return codecs.parse_safetensors(body, head.fixed, head.query, shape)


class Asked(NamedTuple):
    """A question that was asked, and its job."""

    head: Head
    served: Served
    question: Question
    job: Job


def _reply(head: Head, served: Served, question: Question, answers: Answers) -> Reply:
    encode = codecs.encode_json if head.reply_type == JSON else codecs.encode_safetensors
    pieces: list[Piece] = encode(served.file.name, str(served.file.version), answers, question.is_single)
    return Reply(200, head.reply_type.encode(), pieces)


def parse_query(scope: Scope) -> dict[str, str]:
    """The query's parameters, each given once at most.

    Raises:
        InvalidInput: one is given twice, or there are too many.
    """
    if not scope["query_string"]:
        return {}
    try:
        pairs = parse_qsl(
            scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_PARAMETERS
        )
    except ValueError:
        raise InvalidInput.of("query", f"at most {MAX_PARAMETERS} parameters", "more") from None
    if len(dict(pairs)) != len(pairs):
        raise InvalidInput.of("query", "each parameter once", "one twice")
    return dict(pairs)
