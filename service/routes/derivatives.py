"""POST /v1/models/{model}/value, /gradient, /hessian, /laplacian and /evaluate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple
from urllib.parse import parse_qsl

from service import codecs
from service.codecs import JSON, Piece, Question, Shape
from service.core import Core
from service.dispatcher import Answers, End, Job
from service.door import Receive, Reply, Scope, Send, read_body, send_reply
from service.errors import InvalidInput, MethodNotAllowed
from service.repository import Served

__all__ = ["Derivatives"]

#: Most parameters of a query.
MAX_PARAMETERS = 16


class Head(NamedTuple):
    """What is known of a request before its body is read.

    Attributes:
        served: The model.
        fixed: The quantity that the path names, ``None`` if the body may name several.
        query: Parameters.
        media_type: Of the body.
        reply_type: Of the reply.
        deadline_s: On the loop's clock.
    """

    served: Served
    fixed: str | None
    query: dict[str, str]
    media_type: str
    reply_type: str
    deadline_s: float

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
        head = self._read_head(model, action, scope)
        with self._core.repository.holding(head.served):
            body = await read_body(scope, receive, self._core.settings.max_body_bytes)
            question = self._read_body(head, body)
            answers = await self._core.answer(head.served, question, head.deadline_s, scope, head.form)
        await send_reply(send, _reply(head, question, answers))

    @classmethod
    def target(cls, path: str) -> tuple[str, str] | None:
        """Model and action, if this is a path for derivatives."""
        _, *parts = path.split("/")
        if len(parts) == 4 and parts[:2] == ["v1", "models"] and parts[3] in cls.ACTIONS:
            return parts[2], parts[3]
        return None

    def ask(self, model: str, action: str, scope: Scope, body: bytes, end: End) -> Callable[[Job], Reply]:
        """The same without waiting, for a body that was read.

        Args:
            model: From the path.
            action: From the path.
            scope: The request's head.
            body: All of it.
            end: Called with the job when it has ended.

        Returns:
            What makes the reply of that job, or raises the error that it has ended with.

        Raises:
            ServiceError: any that a client may see.
        """
        head = self._read_head(model, action, scope)
        question = self._read_body(head, body)
        job = self._core.ask(head.served, question, head.form, head.deadline_s, end)
        scope["hessquik.abandon"] = partial(self._core.dispatcher.abandon, job)

        def finish(job: Job) -> Reply:
            if job.error is not None:
                raise job.error
            return _reply(head, question, job.answers)

        return finish

    def _read_head(self, model: str, action: str, scope: Scope) -> Head:
        scope["hessquik.route"] = self.ACTIONS[action]
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"expected POST here, got {scope['method']}")
        self._core.dispatcher.batcher.expect_room()
        given = scope["hessquik.headers"].get
        deadline_s = self._core.deadline_s(given(b"x-deadline-ms", b""))
        media_type = codecs.content_type(given(b"content-type", b""))
        reply_type = codecs.accepted_type(given(b"accept", b""))
        query = parse_query(scope)
        served = self._core.repository.ready(model, query.get("version"))
        return Head(served, None if action == "evaluate" else action, query, media_type, reply_type, deadline_s)

    def _read_body(self, head: Head, body: bytes) -> Question:
        facts = head.served.facts
        shape = Shape(facts["d"], facts["m"], facts["dtype"], self._max_rows)
        if head.media_type == JSON:
            return codecs.parse_json(body, head.fixed, shape)
        return codecs.parse_safetensors(body, head.fixed, head.query, shape)


def _reply(head: Head, question: Question, answers: Answers) -> Reply:
    encode = codecs.encode_json if head.reply_type == JSON else codecs.encode_safetensors
    file = head.served.file
    pieces: list[Piece] = encode(file.name, str(file.version), answers, question.is_single)
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
