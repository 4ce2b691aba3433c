"""The door: what every HTTP request passes first. Request ids, keys, sizes, and the last word on errors."""

from __future__ import annotations

import asyncio
import ctypes
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from service.assets import ASSETS
from service.errors import (
    BodyTooLarge,
    ClientGone,
    Forbidden,
    InternalError,
    MalformedBody,
    NotReady,
    ServiceError,
    Unauthorized,
    UnsupportedMediaType,
)
from service.metrics import Metrics
from service.settings import Settings

__all__ = [
    "JOINED_BYTES",
    "NO_STATUS",
    "Dialect",
    "Door",
    "Reply",
    "header",
    "read_body",
    "read_headers",
    "request_id",
    "send_reply",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

#: The only paths that never need a key: probes, and the pages' files, which hold no data.
OPEN_PATHS = frozenset({"/livez", "/readyz", *ASSETS})
#: Made-up request ids: one part for the process, one for the request.
_PROCESS, _numbers = secrets.token_hex(6).encode(), count(1)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
#: After refusing a larger body, the memory that it took is returned to the system.
KEPT_BYTES = 1 << 20
#: What is counted when no reply was begun.
NO_STATUS = 499
#: Bytes up to which a body's pieces are joined: copying them costs less than sending each.
JOINED_BYTES = 64 << 10
_ADMIN_ACTIONS = ("/load", "/unload")


class Dialect(NamedTuple):
    """How errors are written on the paths of one dialect.

    Attributes:
        media_type: Of the bodies.
        owns: Whether a path is one of the dialect's.
        write: Status and body of an error, for a request id.
    """

    media_type: bytes
    owns: Callable[[str], bool]
    write: Callable[[ServiceError, str], tuple[int, bytes]]


#: The service's own: problem details, on all paths that no other dialect owns.
NATIVE = Dialect(
    b"application/problem+json",
    lambda path: True,
    lambda error, request_id: (error.status, error.problem(request_id)),
)


class Reply(NamedTuple):
    """A reply, whose body may come in pieces.

    Attributes:
        status: HTTP's.
        media_type: Of the body.
        body: Its pieces.
        headers: Those besides the body's type and length.
    """

    status: int
    media_type: bytes
    body: Sequence[bytes | memoryview]
    headers: Sequence[tuple[bytes, bytes]] = ()

    def head(self) -> list[tuple[bytes, bytes]]:
        """All headers."""
        length = b"%d" % sum(map(len, self.body))
        return [(b"content-type", self.media_type), (b"content-length", length), *self.headers]


class Door:
    """Wraps the application.

    Args:
        app: What is behind the door.
        settings: Keys.
        metrics: Where requests are counted.
        dialects: Those with error bodies of their own.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics, dialects: Sequence[Dialect] = ()) -> None:
        """Take the keys out of their wrappers once."""
        self._app = app
        self._metrics = metrics
        self._dialects = (*dialects, NATIVE)
        self._admin_keys = [key.get_secret_value().encode() for key in settings.admin_keys]
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys] + self._admin_keys
        self._needs_key = bool(settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or not, and count how it ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        read_headers(scope)
        id_ = scope["hessquik.request_id"] = request_id(scope)
        status = NO_STATUS

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_)]
            await send(message)

        try:
            self.check_key(scope)
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the time to drain is over, and with it this request's
            if status != NO_STATUS:
                raise
            stopping = NotReady("expected to have time, the service is stopping")
            await send_reply(send_with_id, self.refusal(scope, stopping))
        except Exception as error:
            refusal = self.refusal(scope, error)
            if status != NO_STATUS:
                raise
            await send_reply(send_with_id, refusal)
            if scope.get("hessquik.body_bytes", 0) > KEPT_BYTES:
                asyncio.get_running_loop().call_soon(_return_memory)  # when the body is gone
        finally:
            self.count(scope, status, began)

    def count(self, scope: Scope, status: int, began: float) -> None:
        """Count how a request ended that began when the performance counter showed this."""
        self._metrics.answered(scope.get("hessquik.route", "unmatched"), status, time.perf_counter() - began)

    def check_key(self, scope: Scope) -> None:
        """Decide on the path that will be routed: every path needs a key, but for a short list."""
        path: str = scope["path"]
        is_admin = scope["method"] == "POST" and path.endswith(_ADMIN_ACTIONS)
        if path in OPEN_PATHS or not (self._needs_key or is_admin):
            return
        scheme, _, key = header(scope, b"authorization").partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        if self._needs_key and not _is_among(given, self._keys):
            raise Unauthorized("expected Authorization: Bearer and a valid key")
        if is_admin and not _is_among(given, self._admin_keys):
            raise Forbidden("expected an admin key")

    def refusal(self, scope: Scope, error: Exception) -> Reply:
        """An error as a reply in the path's dialect; what is nobody's fault but ours goes to the log."""
        id_ = scope["hessquik.request_id"].decode()
        if not isinstance(error, ServiceError):
            logger.error("request %s failed", id_, exc_info=error)
            error = InternalError("something went wrong; the log has it under this request id")
        elif error.status >= 500 and error.retry_after_s is None:
            logger.error("%s %s: %s", id_, error.code, error.detail)
        dialect = next(dialect for dialect in self._dialects if dialect.owns(scope["path"]))
        headers = error.headers()
        if isinstance(error, BodyTooLarge | UnsupportedMediaType):
            headers.append((b"connection", b"close"))  # large bodies that were not read are not waited for
        status, body = dialect.write(error, id_)
        return Reply(status, dialect.media_type, [body], headers)


def _return_memory() -> None:
    """Have the allocator return what is free, which it would keep for long; nothing where it cannot be told."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _is_among(given: bytes, keys: list[bytes]) -> bool:
    """Compare with every key, in a time that tells nothing of them."""
    return any([hmac.compare_digest(given, key) for key in keys])


def read_headers(scope: Scope) -> dict[bytes, bytes]:
    """Give a request its headers by name, of a name's values the first, and return them."""
    scope["hessquik.headers"] = headers = dict(reversed(scope["headers"]))
    return headers


def request_id(scope: Scope) -> bytes:
    """The client's, if it is a decent one, or a new one."""
    given = scope["hessquik.headers"].get(b"x-request-id")
    is_decent = given is not None and _REQUEST_ID.fullmatch(given)
    return given if given and is_decent else b"%s-%x" % (_PROCESS, next(_numbers))


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of a name, given in lower case; empty if there is none."""
    value: bytes = scope["hessquik.headers"].get(name, b"")
    return value


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body.

    Raises:
        UnsupportedMediaType: it is encoded.
        BodyTooLarge: it is over the limit; what is known from its head is not read.
        ClientGone: it broke off.
    """
    encoding = header(scope, b"content-encoding")
    if encoding.lower() not in (b"", b"identity"):
        raise UnsupportedMediaType("expected a body without Content-Encoding")
    length = header(scope, b"content-length")
    if length and not (length.isdigit() and len(length) < 19):
        raise MalformedBody("expected a Content-Length in digits")
    if length and int(length) > limit:
        raise BodyTooLarge(f"expected a body of at most {limit} bytes, got {int(length)}")
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed its connection")
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(f"expected a body of at most {limit} bytes, got more")
        scope["hessquik.body_bytes"] = size
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def send_reply(send: Send, reply: Reply) -> None:
    """Send a reply; a large body's pieces are not joined."""
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.head()})
    *pieces, last = reply.body if sum(map(len, reply.body)) > JOINED_BYTES else [b"".join(reply.body)]
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": last})
