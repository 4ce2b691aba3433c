"""Requests and replies, which connections exchange with the application."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from time import monotonic
from typing import Any, NamedTuple, Protocol

import orjson

from hessquik_client.errors import Overloaded, ServiceError

__all__ = ["JSON", "LARGE_BYTES", "Application", "Budget", "Cancel", "Head", "Reply", "Request", "Stream"]

JSON = b"application/json"
#: Bodies and replies over this size count against the budget, and are not copied to be joined.
LARGE_BYTES = 64 << 10
#: New request ids: an iterator takes less time than a function.
_ids = map(b"%b-%x".__mod__, zip(repeat(secrets.token_hex(6).encode()), count(1)))
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(slots=True, eq=False)
class Head:
    """A parsed request head. Many requests may share one, since clients often repeat the same head.

    Attributes:
        method: The method in upper case.
        path: The path, percent-decoded, without the query.
        query: The query as sent.
        headers: The first value of each field, by its name in lower case.
        length: Length of the body in bytes; ``None`` if it is chunked.
        keep_alive: Whether the connection is kept after the reply.
        version: ``1.1`` or ``1.0``.
        target: The route that the application found for the head; set by :meth:`Application.admit`.
    """

    method: str
    path: str
    query: bytes
    headers: dict[bytes, bytes]
    length: int | None = 0
    keep_alive: bool = True
    version: str = "1.1"
    target: Any = None


@dataclass(slots=True, eq=False)
class Request:
    """One request, from its head to the end of its reply.

    Attributes:
        head: The parsed head.
        respond: Called once with the request and its reply; returns whether the reply could be sent.
        began_s: Time when the head was complete, on the monotonic clock.
        stream: Sends parts of a large reply before the rest is computed; ``None`` where that is not possible.
        body: The whole body, once it has arrived.
        id: The client's ``X-Request-Id``, see :meth:`of`, or a new one.
        model: Name of the served model, for the metrics.
        rows: Number of points in the request.
        refusal: The error with which the request is refused before its body is read, if any.
        cancel: Stops the work that the reply waits for, with an error.
        held_bytes: Bytes that the request holds of the budget.
        job: The job of the request in the scheduler, if any.
    """

    head: Head
    respond: Callable[[Request, Reply], bool]
    began_s: float
    stream: Stream | None = None
    body: bytes = b""
    id: bytes = field(default_factory=_ids.__next__)
    model: str = ""
    rows: int = 0
    refusal: Exception | None = None
    cancel: Cancel | None = None
    held_bytes: int = 0
    job: Any = None

    @classmethod
    def of(cls, head: Head, respond: Callable[[Request, Reply], bool], stream: Stream | None = None) -> Request:
        """Return a request whose head is complete now, with the id that the client chose, if it is usable."""
        request = cls(head, respond, monotonic(), stream)
        chosen = head.headers.get(b"x-request-id", b"")
        if _REQUEST_ID.fullmatch(chosen):
            request.id = chosen
        return request


class Reply(NamedTuple):
    """A reply.

    Attributes:
        status: HTTP status code.
        media_type: Media type of the body.
        body: The pieces of the body.
        headers: Header fields besides type, length and request id.
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

    ``respond`` sends the last part. If its status is not 200, or its length is not that announced, the connection is
    aborted.
    """

    def begin(self, request: Request, reply: Reply, rest_bytes: int) -> None:
        """Send the head and the first part of the body of a reply, of which ``rest_bytes`` bytes follow."""

    def send(self, request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        """Send the next part of the body."""


#: Stops pending work with an error, which becomes the reply; does nothing if the work has ended.
Cancel = Callable[[ServiceError], None]


class Budget:
    """A limit on the bytes of large requests and replies that are held in memory at once.

    Args:
        limit_bytes: The limit; a single request may exceed it while nothing else is held.

    Examples:
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

    def take(self, size: int) -> None:
        """Count bytes as held.

        Raises:
            Overloaded: the limit would be exceeded.
        """
        held_bytes = self.held_bytes + size
        if self.held_bytes and held_bytes > self.limit_bytes:
            raise Overloaded(
                f"expected at most {self.limit_bytes} bytes held for clients, got {held_bytes}; try again later"
            )
        self.held_bytes = held_bytes

    def give(self, size: int) -> None:
        """Count bytes as released."""
        self.held_bytes -= size


class Application(Protocol):
    """An application, which answers requests."""

    budget: Budget

    def admit(self, head: Head) -> None:
        """Set the target of a head, and refuse the request if its body need not be read.

        Raises:
            ServiceError: the request is refused.
        """

    def handle(self, request: Request) -> None:
        """Answer a complete request by calling its ``respond``, now or later; never raise."""

    def fail(self, request: Request, error: Exception) -> None:
        """Answer a request with an error."""

    def abandon(self, request: Request, error: ServiceError) -> None:
        """Cancel the work on a request, and answer it with an error unless it has been answered."""
