"""POST /v1/models/{model}/value, /gradient, /hessian, /laplacian and /evaluate."""

from __future__ import annotations

from urllib.parse import parse_qsl

from service import codecs
from service.codecs import JSON, Shape
from service.core import Core
from service.door import Receive, Scope, Send, header, read_body, send_reply
from service.errors import InvalidInput, MethodNotAllowed

__all__ = ["Derivatives"]

#: Most parameters of a query.
MAX_PARAMETERS = 16


class Derivatives:
    """Answers questions about models.

    Args:
        core: The service.
    """

    #: The last part of the path: a quantity, or ``evaluate`` for any set of them.
    ACTIONS = frozenset({"value", "gradient", "hessian", "laplacian", "evaluate"})

    def __init__(self, core: Core) -> None:
        """Keep the service."""
        self._core = core

    async def __call__(self, model: str, action: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Read, check, compute, reply.

        Raises:
            ServiceError: any that a client may see.
        """
        scope["hessquik.route"] = f"/v1/models/{{model}}/{action}"
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"expected POST here, got {scope['method']}")
        self._core.dispatcher.batcher.expect_room()
        deadline_s = self._core.deadline_s(header(scope, b"x-deadline-ms"))
        media_type = codecs.content_type(header(scope, b"content-type").decode("latin-1"))
        reply_type = codecs.accepted_type(header(scope, b"accept").decode("latin-1"))
        query = parse_query(scope)
        with self._core.repository.holding(self._core.repository.ready(model, query.get("version"))) as served:
            body = await read_body(scope, receive, self._core.settings.max_body_bytes)
            fixed = None if action == "evaluate" else action
            shape = Shape(served.d, served.m, served.facts["dtype"], self._core.settings.max_rows)
            if media_type == JSON:
                question = codecs.parse_json(body, fixed, shape)
            else:
                question = codecs.parse_safetensors(body, fixed, query, shape)
            answers = await self._core.answer(served, question, deadline_s, scope)
        encode = codecs.encode_json if reply_type == JSON else codecs.encode_safetensors
        reply = encode(served.file.name, str(served.file.version), answers, question.is_single)
        await send_reply(send, 200, reply_type.encode(), reply)


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
