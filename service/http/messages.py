"""Requests and replies, as values: what a connection hands to the application, and what it gets back."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from itertools import count
from time import monotonic
from typing import Any, NamedTuple, Protocol

import orjson

from hessquik_client.errors import Overloaded, ServiceError

__all__ = ["JSON", "LARGE_BYTES", "Application", "Budget", "Cancel", "Head", "Reply", "Request", "Stream"]

JSON = b"application/json"
#: Bodies and replies over this size count against the budget, and are not copied to be joined.
LARGE_BYTES = 64 << 10
_PROCESS, _numbers = secrets.token_hex(6).encode(), count(1)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class Head:
    """A parsed request head. It may serve many requests: clients send the same head again and again.

    Args:
        method: In upper case.
        path: Percent-decoded, without the query.
        query: As sent.
        headers: The first value of each field, by its name in lower case.
        length: Of the body; ``None`` if it is chunked.
        keep_alive: Whether the connection is kept after the reply.
        version: ``1.1`` or ``1.0``.

    Attributes:
        target: What the application resolved the head to.
    """

    __slots__ = ("headers", "keep_alive", "length", "method", "path", "query", "target", "version")

    def __init__(
        self,
        method: str,
        path: str,
        query: bytes,
        headers: dict[bytes, bytes],
        length: int | None = 0,
        keep_alive: bool = True,
        version: str = "1.1",
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.length = length
        self.keep_alive = keep_alive
        self.version = version
        self.target: Any = None


class Request:
    """One request, from its head to the end of its reply.

    Args:
        head: The parsed head.
        respond: Called once with the request and its reply; returns whether the reply could be sent.
        stream: Sends parts of a large reply before the rest is known, where that can be done.

    Attributes:
        body: All of it, once it has arrived.
        id: The client's ``X-Request-Id``, or a new one.
        began_s: When the head was complete, on the monotonic clock.
        model: The served model that is asked, for the metrics.
        rows: Points that it is asked for.
        refusal: Why the request is refused before its body is read.
        cancel: Stops the work that the reply waits for, with an error.
        held_bytes: What the request holds of the budget.
        job: What was asked of the workers for it.
    """

    __slots__ = (
        "began_s", "body", "cancel", "head", "held_bytes", "id", "job", "model", "refusal", "respond", "rows",
        "stream",
    )  # fmt: skip

    def __init__(self, head: Head, respond: Callable[[Request, Reply], bool], stream: Stream | None = None) -> None:
        self.head = head
        self.respond = respond
        self.stream = stream
        self.body: bytes = b""
        given = head.headers.get(b"x-request-id")
        is_usable = given is not None and _REQUEST_ID.fullmatch(given)
        self.id: bytes = given if given and is_usable else b"%b-%x" % (_PROCESS, next(_numbers))
        self.began_s = monotonic()
        self.model = ""
        self.rows = 0
        self.refusal: Exception | None = None
        self.cancel: Cancel | None = None
        self.held_bytes = 0
        self.job: Any = None


class Reply(NamedTuple):
    """A reply, whose body may come in pieces.

    Attributes:
        status: HTTP's.
        media_type: Of the body.
        body: Its pieces.
        headers: Those besides type, length and request id.
    """

    status: int
    media_type: bytes
    body: Sequence[bytes | memoryview]
    headers: Sequence[tuple[bytes, bytes]] = ()

    @classmethod
    def of(cls, document: Any, status: int = 200) -> Reply:
        """Return a reply with a JSON document."""
        return cls(status, JSON, [orjson.dumps(document)])


class Stream(Protocol):
    """A connection that may send a reply in parts.

    ``respond`` sends the last one, if it has the status of the first and as many bytes as are missing; else the reply
    is broken off.
    """

    def begin(self, request: Request, reply: Reply, rest_bytes: int) -> None:
        """Send a reply's head and the first of its body, of which so many bytes follow."""

    def send(self, request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        """Send more of its body."""


#: Stops pending work with an error, which becomes the reply; does nothing if the work has ended.
Cancel = Callable[[ServiceError], None]


class Budget:
    """A bound on the bytes of large requests and replies that are held at once.

    Args:
        limit_bytes: The bound; a single request may pass it while nothing else is held.

    Example:
        >>> budget = Budget(100)
        >>> budget.take(60)
        >>> budget.take(60)
        Traceback (most recent call last):
        hessquik_client.errors.Overloaded: expected at most 100 bytes held for clients, got 120; try again later
        >>> budget.give(60)
        >>> budget.held_bytes
        0
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.job: Any = None

    def take(self, size: int) -> None:
        """Count some bytes as held.

        Raises:
            Overloaded: they would be over the bound.
        """
        held_bytes = self.held_bytes + size
        if self.held_bytes and held_bytes > self.limit_bytes:
            raise Overloaded(
                f"expected at most {self.limit_bytes} bytes held for clients, got {held_bytes}; try again later"
            )
        self.held_bytes = held_bytes

    def give(self, size: int) -> None:
        """Count some bytes as held no longer."""
        self.held_bytes -= size


class Application(Protocol):
    """An application, which answers requests."""

    budget: Budget

    def admit(self, head: Head) -> None:
        """Set a head's target, and decide whether the body is read.

        Raises:
            ServiceError: the request is refused.
        """

    def handle(self, request: Request) -> None:
        """Answer a request whose body has arrived: now, or later, by its ``respond``; never by an exception."""

    def fail(self, request: Request, error: Exception) -> None:
        """Answer a request with an error."""

    def abandon(self, request: Request, error: ServiceError) -> None:
        """Stop working on a request, if that has begun, and answer with an error, if that has not been done."""
