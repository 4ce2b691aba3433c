"""Requests and replies over ASGI, in both directions.

``answer`` passes the request of an ASGI server to the application; ``call`` passes a request to an ASGI application,
such as FastAPI with its own routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from hessquik_client.errors import BodyTooLarge, ClientGone, MalformedBody

from ..http.messages import LARGE_BYTES, Application, Head, Reply, Request

__all__ = ["ASGI", "Message", "Receive", "Scope", "Send", "answer", "call"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGI = Callable[[Scope, Receive, Send], Awaitable[None]]


async def answer(application: Application, max_body_bytes: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer the request of an ASGI server."""
    replied: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def respond(request: Request, reply: Reply) -> bool:
        is_there = not replied.done()
        if is_there:
            replied.set_result(reply)
        return is_there

    request = Request.of(_read_head(scope), respond)
    try:
        application.admit(request.head)
        request.body = await _read_body(request, max_body_bytes, receive)
    except ClientGone as error:
        application.abandon(request, error)
        return
    except Exception as error:
        application.fail(request, error)
    else:
        application.handle(request)
    leaving = asyncio.ensure_future(_wait_until_gone(receive)) if not replied.done() else None
    try:
        if leaving is not None:
            await asyncio.wait((replied, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not replied.done():
            replied.cancel()
            application.abandon(request, ClientGone("the client closed its connection"))
            return
        await _send_reply(send, request, replied.result())
    except asyncio.CancelledError:
        replied.cancel()
        application.abandon(request, ClientGone("the server gave the request up"))
        raise
    finally:
        if leaving is not None:
            leaving.cancel()
        application.budget.give(request.held_bytes)


async def call(app: ASGI, request: Request, state: object = None) -> Reply:
    """Pass a request to an ASGI application, and return its reply."""
    head, body = request.head, [request.body]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET" if head.method == "HEAD" else head.method,  # the sender of the reply omits the body
        "scheme": "http",
        "path": head.path,
        "raw_path": head.path.encode("utf-8", "surrogatepass"),
        "query_string": head.query,
        "root_path": "",
        "headers": list(head.headers.items()),
        "server": None,
        "client": None,
        "state": {},
    }
    started: Message = {}
    pieces: list[bytes] = []

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop()}
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    headers = dict(started["headers"])
    media_type, _ = headers.pop(b"content-type", b"application/octet-stream"), headers.pop(b"content-length", None)
    return Reply(started["status"], media_type, pieces, list(headers.items()))


def _read_head(scope: Scope) -> Head:
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.lower(), value)
    given = headers.get(b"content-length", b"0")
    # An invalid length is refused when the body is read.
    length = int(given) if given.isdigit() and len(given) < 19 else None
    return Head(scope["method"], scope["path"], scope["query_string"], headers, length)


async def _read_body(request: Request, most: int, receive: Receive) -> bytes:
    length = request.head.headers.get(b"content-length", b"")
    if length and not (length.isdigit() and len(length) < 19):
        raise MalformedBody("expected a Content-Length in digits")
    if length and int(length) > most:
        raise BodyTooLarge(f"expected a body of at most {most} bytes, got {int(length)}")
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed its connection")
        piece: bytes = message.get("body", b"")
        size += len(piece)
        if size > most:
            raise BodyTooLarge(f"expected a body of at most {most} bytes, got more")
        pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_reply(send: Send, request: Request, reply: Reply) -> None:
    """Send a reply; the pieces of a large body are not joined."""
    status, media_type, body, headers = reply
    size = sum(map(len, body))
    fields = [*headers, (b"x-request-id", request.id)]
    if status != 304:
        fields += [(b"content-type", media_type), (b"content-length", b"%d" % size)]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    *pieces, last = body if size > LARGE_BYTES else [b"".join(body)]
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if request.head.method == "HEAD" else last})
