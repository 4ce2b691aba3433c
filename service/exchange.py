"""The short way of a small request for derivatives: from its connection to the workers and back, without a task.

Most requests are of this kind, and a task, an application's messages and their checks cost several times what a small
network does. All that is decided about a request is decided where it is decided for those that go the long way: at
the door, in the codecs, in the route.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.dispatcher import Job
from service.door import JOINED_BYTES, NO_STATUS, Door, Reply, Scope
from service.errors import ServiceError
from service.routes.derivatives import Derivatives

__all__ = ["SHORT_BYTES", "Exchange", "ShortWay"]

#: Longest body that goes the short way.
SHORT_BYTES = 16 << 10
#: Request targets that are read as they are, of a length that may be remembered.
SIMPLE_TARGET = re.compile(rb"/[A-Za-z0-9._/-]{1,127}(\?[A-Za-z0-9._=&,-]{0,127})?")
#: Headers of requests that go the long way.
LONG_HEADERS = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"})


@lru_cache(maxsize=1024)
def _target(url: bytes) -> tuple[str, bytes, str, str] | None:
    """Path, query, model and action, if the target is one for derivatives and means what it looks like."""
    if SIMPLE_TARGET.fullmatch(url) is None:
        return None
    path, _, query = url.partition(b"?")
    target = Derivatives.target(path.decode("ascii"))
    return None if target is None else (path.decode("ascii"), query, *target)


class ShortWay:
    """Takes small requests for derivatives.

    Args:
        door: What every request passes.
        derivatives: What answers them.
        max_body_bytes: Longest body there may be.
    """

    def __init__(self, door: Door, derivatives: Derivatives, max_body_bytes: int) -> None:
        """Keep them."""
        self.door = door
        self.derivatives = derivatives
        self._longest = min(SHORT_BYTES, max_body_bytes)

    def take(self, connection: HttpToolsProtocol, scope: Scope, url: bytes, keep_alive: bool) -> Exchange | None:
        """An exchange for a POST whose head was read, or ``None`` if it has to go the long way."""
        target = _target(url)
        if target is None:
            return None
        headers = self.door.register(scope)
        length = headers.get(b"content-length", b"")
        if not LONG_HEADERS.isdisjoint(headers) or not 0 < len(length) < 6 or int(length) > self._longest:
            return None
        scope["method"] = "POST"
        scope["path"], scope["query_string"], model, action = target
        return Exchange(self, connection, scope, (model, action), keep_alive)


class Exchange:
    """One request and its reply; stands where uvicorn has its own cycle of request and response.

    Args:
        way: What answers.
        connection: Whose request it is.
        scope: The request's head, as in ASGI.
        target: Model and action.
        keep_alive: Whether the connection stays open.
    """

    def __init__(
        self,
        way: ShortWay,
        connection: HttpToolsProtocol,
        scope: Scope,
        target: tuple[str, str],
        keep_alive: bool,
    ) -> None:
        """Wait for the body."""
        self.scope = scope
        self.keep_alive = keep_alive
        self.body = b""
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self._door, self._derivatives = way.door, way.derivatives
        self._connection = connection
        self._target = target
        self._began = time.perf_counter()
        self._finish: Callable[[Job], Reply] | None = None

    @property
    def message_event(self) -> Exchange:
        """What uvicorn wakes a request's task by."""
        return self

    def set(self) -> None:
        """Called where a request's task would be woken: the only news here is a client that left too early."""
        if self.disconnected and self.more_body:
            self.response_complete = True
            self.scope["hessquik.route"] = Derivatives.ACTIONS[self._target[1]]
            self._door.count(self.scope, NO_STATUS, self._began)

    def begin(self) -> None:
        """The body is there: check and ask, or refuse."""
        try:
            self._door.check_key(self.scope)
            self._finish = self._derivatives.ask(*self._target, self.scope, self.body, self._end)
        except Exception as error:
            self._reply(self._door.refusal(self.scope, error))

    def give_up(self, error: ServiceError) -> None:
        """Answer now, with an error."""
        if self._finish is None:
            self._reply(self._door.refusal(self.scope, error))
        else:
            self.scope["hessquik.abandon"](error)

    def _end(self, job: Job) -> None:
        """The job has ended: reply."""
        assert self._finish is not None
        try:
            reply = self._finish(job)
        except Exception as error:
            reply = self._door.refusal(self.scope, error)
        self._reply(reply)

    def _reply(self, reply: Reply) -> None:
        """Write all of it at once, unless it is large."""
        self.response_complete = True
        connection, transport = self._connection, self._connection.transport
        if self.disconnected or transport.is_closing():
            self._door.count(self.scope, NO_STATUS, self._began)
            return
        headers: list[tuple[bytes, bytes]] = [*connection.server_state.default_headers, *reply.head()]
        headers.append((b"x-request-id", self.scope["hessquik.request_id"]))
        if (b"connection", b"close") in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            headers.append((b"connection", b"close"))
        pieces: list[Any] = [STATUS_LINE[reply.status]]
        for name, value in headers:
            pieces += (name, b": ", value, b"\r\n")
        pieces.append(b"\r\n")
        if sum(map(len, reply.body)) <= JOINED_BYTES:
            transport.write(b"".join((*pieces, *reply.body)))
        else:
            transport.writelines([b"".join(pieces), *reply.body])
        self._door.count(self.scope, reply.status, self._began)
        if not self.keep_alive:
            transport.close()
        connection.on_response_complete()
