"""The short way of a small request for derivatives: from its connection to the workers and back, without a task.

Most requests are of this kind, and a task, an application's messages and their checks cost several times what a small
network does. All that is decided about a request is decided where it is decided for those that go the long way: at
the door, in the codecs, in the route. And what its head's bytes decide is decided once: clients send the same heads
again and again, and a head that was read means what it meant then.
"""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.dispatcher import Job
from service.door import JOINED_BYTES, NO_STATUS, Door, Reply, read_headers, request_id
from service.errors import ServiceError
from service.routes.derivatives import Asked, Derivatives, Head

__all__ = ["SHORT_BYTES", "Exchange", "ShortHead", "ShortWay"]

#: Longest body that goes the short way.
SHORT_BYTES = 16 << 10
#: Request targets that are read as they are.
SIMPLE_TARGET = re.compile(rb"/[A-Za-z0-9._/-]{1,127}(\?[A-Za-z0-9._=&,-]{0,127})?")
#: Headers of requests that go the long way.
LONG_HEADERS = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"})
#: Heads that are remembered, and how long each may be.
MAX_HEADS = 1024
MAX_HEAD_BYTES = 1024


class ShortHead(NamedTuple):
    """A head that was read.

    Attributes:
        scope: What the door wants to know of it.
        target: Model and action.
        body_bytes: Length of the body.
        keep_alive: Whether the connection stays open.
        head: What is asked for; ``None`` if that will be refused.
    """

    scope: dict[str, Any]
    target: tuple[str, str]
    body_bytes: int
    keep_alive: bool
    head: Head | None


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
        self._heads: dict[bytes, ShortHead] = {}
        self._defaults: tuple[object, bytes] = None, b""

    def read(self, url: bytes, headers: list[tuple[bytes, bytes]], keep_alive: bool) -> ShortHead | None:
        """A POST's head, or ``None`` if the request has to go the long way."""
        if SIMPLE_TARGET.fullmatch(url) is None:
            return None
        path, _, query = url.decode("ascii").partition("?")
        target = Derivatives.target(path)
        if target is None:
            return None
        scope = {"method": "POST", "path": path, "query_string": query.encode(), "headers": headers}
        named = read_headers(scope)
        length = named.get(b"content-length", b"")
        if not LONG_HEADERS.isdisjoint(named) or not 0 < len(length) < 6 or int(length) > self._longest:
            return None
        head = None
        with contextlib.suppress(ServiceError):
            head = self.derivatives.read_head(*target, scope)
        return ShortHead(scope, target, int(length), keep_alive, head)

    def remember(self, data: bytes, head: ShortHead, url: bytes) -> None:
        """Remember a head that was read from the beginning of some data.

        Only one that is written as most are, so that what was read tells where it ends, and that may come again.
        """
        if head.head is None or b"x-request-id" in head.scope["hessquik.headers"]:
            return
        size = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        first, *lines = data[: max(0, size - 4)].split(b"\r\n")
        written = [(name.lower(), value) for name, _, value in (line.partition(b": ") for line in lines)]
        if first == b"POST %b HTTP/1.1" % url and written == head.scope["headers"]:
            if len(self._heads) >= MAX_HEADS:
                del self._heads[next(iter(self._heads))]
            self._heads[data[:size]] = head

    def recall(self, data: bytes) -> tuple[ShortHead, bytes] | None:
        """Head and body of data that is one whole request whose head is remembered."""
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        head = self._heads.get(data[:end])
        if head is None or len(data) - end != head.body_bytes:
            return None
        return head, data[end:]

    def default_head(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Headers that every reply has, such as the date: they change once a second."""
        if self._defaults[0] is not headers:
            self._defaults = headers, b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._defaults[1]


class Exchange:
    """One request and its reply; stands where uvicorn has its own cycle of request and response.

    Args:
        way: What answers.
        connection: Whose request it is.
        head: The request's head.
    """

    __slots__ = (
        "_asked", "_began", "_connection", "_head", "_way", "body", "disconnected", "keep_alive", "more_body",
        "response_complete", "scope",
    )  # fmt: skip

    def __init__(self, way: ShortWay, connection: HttpToolsProtocol, head: ShortHead) -> None:
        """Wait for the body."""
        self._began = time.perf_counter()
        self.scope = head.scope.copy()
        self.scope["hessquik.request_id"] = request_id(self.scope)
        self.keep_alive = head.keep_alive
        self.body = b""
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self._way = way
        self._connection = connection
        self._head = head
        self._asked: Asked | None = None

    @property
    def message_event(self) -> Exchange:
        """What uvicorn wakes a request's task by."""
        return self

    def set(self) -> None:
        """Called where a request's task would be woken: the only news here is a client that left too early."""
        if self.disconnected and self.more_body:
            self.response_complete = True
            self._count(NO_STATUS)

    def begin(self) -> None:
        """The body is there: check and ask, or refuse."""
        way, known = self._way, self._head
        try:
            way.door.check_key(self.scope)
            head = known.head or way.derivatives.read_head(*known.target, self.scope)
            self._asked = way.derivatives.ask(head, self.body, self._end)
        except Exception as error:
            self._reply(way.door.refusal(self.scope, error))

    def abandon(self, error: ServiceError) -> None:
        """End what was asked, with an error; nothing if nothing was, or if it has ended."""
        if self._asked is not None:
            self._way.derivatives.abandon(self._asked, error)

    def give_up(self, error: ServiceError) -> None:
        """Answer now, with an error."""
        if self._asked is None:
            self._reply(self._way.door.refusal(self.scope, error))
        else:
            self.abandon(error)

    def _end(self, _: Job) -> None:
        """The job has ended: reply."""
        assert self._asked is not None
        try:
            reply = self._way.derivatives.reply(self._asked)
        except Exception as error:
            reply = self._way.door.refusal(self.scope, error)
        self._reply(reply)

    def _reply(self, reply: Reply) -> None:
        """Write all of it at once, unless it is large."""
        self.response_complete = True
        connection, transport = self._connection, self._connection.transport
        if self.disconnected or transport.is_closing():
            self._count(NO_STATUS)
            return
        status, media_type, body, headers = reply
        size = sum(map(len, body))
        more = b"".join([b"%b: %b\r\n" % header for header in headers])
        if (b"connection", b"close") in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            more += b"connection: close\r\n"
        head = b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%bx-request-id: %b\r\n\r\n" % (
            STATUS_LINE[status],
            self._way.default_head(connection.server_state.default_headers),
            media_type,
            size,
            more,
            self.scope["hessquik.request_id"],
        )
        if size <= JOINED_BYTES:
            transport.write(b"".join((head, *body)))
        else:
            transport.writelines([head, *body])
        self._count(status)
        if not self.keep_alive:
            transport.close()
        connection.on_response_complete()

    def _count(self, status: int) -> None:
        self._way.door.count(self.scope, status, self._began)
