"""One HTTP/1.1 connection: requests are parsed within limits and answered in order.

The body of a request is collected whole; the application gets a :class:`Request` and answers with a :class:`Reply`,
at once or later. A connection answers one request at a time; pipelined requests are parsed and wait.

::

    data_received ─▶ head ─admit▶ body ─▶ queue ─▶ application.handle ─▶ respond ─▶ transport
                      └─ refused: answered before the body, which is discarded
"""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus
from time import monotonic
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import httptools

from hessquik_client.errors import BodyTooLarge, ClientGone, MalformedBody, Overloaded, ServiceError

from ..http.messages import LARGE_BYTES, Application, Head, Reply, Request

__all__ = ["Connection", "Limits", "Listener"]

#: Most chunks of a chunked body: parsing more chunks takes longer than computing.
MAX_CHUNKS = 1 << 16
#: Most parsed requests, and bytes of them, that wait on a connection; beyond these, reading is paused.
MAX_PIPELINED, MAX_PIPELINED_BYTES = 32, 1 << 20
#: Most heads in the cache, and most bytes of one.
MAX_HEADS, MAX_HEAD_BYTES = 1024, 1024
#: Fields that differ from request to request, or that need the parser.
NOT_REMEMBERED = frozenset({b"x-request-id", b"traceparent", b"expect", b"transfer-encoding"})
#: The event loop's timers are this exact.
CLOCK_S = 0.001
#: A check of the timeouts that is later than this was held up, by a pause of the process, say. Clients get that time
#: back, so that what they sent and took meanwhile is seen before one is closed.
LATE_S = 0.25
#: Seconds after a client has closed its sending side until the connection is probed, and between probes.
PROBE_S = 0.03
#: Seconds and bytes for which input after a malformed request is read and discarded.
MALFORMED_LINGER_S, MALFORMED_LINGER_BYTES = 2.0, 1 << 20
#: Bodies up to this size are discarded after a refusal, so that the connection can be kept.
DISCARDED_BYTES = LARGE_BYTES
#: The status whose replies have no body.
NOT_MODIFIED = 304
#: Bytes of a large reply that are written in one turn of the event loop.
TURN_BYTES = 256 << 10
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}


class Limits(NamedTuple):
    """The limits of every connection; the settings of the same names document them."""

    max_body_bytes: int
    max_header_bytes: int
    max_headers: int
    max_connections: int
    receive_timeout_s: float
    send_timeout_s: float
    keep_alive_s: float


class Listener:
    """The state that the connections of a server share.

    Args:
        application: The application that answers requests.
        limits: The limits.

    Attributes:
        heads: Cache of parsed heads by their bytes.
    """

    def __init__(self, application: Application, limits: Limits) -> None:
        self.application = application
        self.limits = limits
        self.heads: dict[bytes, Head] = {}
        self._defaults: tuple[object, bytes] = None, b""

    def connect(self, server_state: Any, **_: Any) -> Connection:
        """Create the protocol of a new connection; :class:`uvicorn.Server` calls this."""
        return Connection(self, server_state)

    def default_fields(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Return the encoded header fields of every reply, such as the date, which uvicorn renews every second."""
        if self._defaults[0] is not headers:
            self._defaults = headers, b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._defaults[1]


class _Refused(Exception):
    """Stops the parser; the rest of the input is not read."""


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        listener: The state shared by all connections.
        server_state: uvicorn's state: the set of connections, and the header fields of every reply.
    """

    # So many that objects with a dictionary could not share its keys.
    __slots__ = (
        "_application", "_arrived", "_body_bytes", "_chunks", "_current", "_discard_left", "_fields",
        "_fields_seen", "_has_event", "_head_bytes", "_idle_since_s", "_ignores_input", "_incoming",
        "_is_advancing", "_is_begun", "_is_between", "_is_closing_after", "_is_continue_due", "_is_half_closed",
        "_is_in_head", "_is_last", "_is_lingering_after", "_is_probed", "_is_reading_paused", "_is_slice_scheduled",
        "_is_upgrade", "_is_writing_paused", "_limits", "_linger_s", "_linger_until_s", "_listener", "_loop",
        "_outgoing", "_owed_bytes", "_parser", "_pieces", "_progress_s", "_queue", "_queued_bytes", "_receive_by_s",
        "_sending_bytes", "_server_state", "_silent_bytes", "_taken_bytes", "_timer", "_timer_s", "_transport",
        "_url", "_written_bytes",
    )  # fmt: skip

    def __init__(self, listener: Listener, server_state: Any) -> None:
        self._listener, self._application, self._limits = listener, listener.application, listener.limits
        self._server_state = server_state
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        # The request that arrives.
        self._is_between = True
        self._is_in_head = self._is_upgrade = False
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._head_bytes = self._silent_bytes = self._chunks = self._fields_seen = 0
        self._has_event = False
        self._arrived = b""
        self._incoming: Request | None = None
        self._pieces: list[bytes] = []
        self._body_bytes = 0
        # The request that is answered, and those that wait.
        self._current: Request | None = None
        self._queue: deque[Request] = deque()
        self._queued_bytes = 0
        self._is_advancing = self._is_reading_paused = False
        # The reply that is being sent, and how the connection ends.
        self._is_writing_paused = self._is_last = self._is_half_closed = self._is_probed = False
        self._outgoing: deque[memoryview] = deque()
        self._is_begun = self._is_slice_scheduled = self._is_closing_after = self._is_lingering_after = False
        self._owed_bytes = self._sending_bytes = self._written_bytes = self._taken_bytes = 0
        self._ignores_input = self._is_continue_due = False
        self._discard_left = sys.maxsize
        self._linger_s = listener.limits.receive_timeout_s
        self._progress_s = self._idle_since_s = 0.0
        self._receive_by_s = self._linger_until_s = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start waiting for a request."""
        self._transport = cast(asyncio.Transport, transport)
        connections = self._server_state.connections
        connections.add(self)
        self._receive_by_s = self._loop.time() + self._limits.receive_timeout_s
        self._check_within(min(self._limits.receive_timeout_s, self._limits.keep_alive_s))
        most = self._limits.max_connections
        if len(connections) > most:
            self._stop_parsing(Overloaded(f"expected at most {most} connections; try again later"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the requests of the client, and release all buffers."""
        self._server_state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._transport = self._parser = None
        self._release()
        waiting = [request for request in (self._current, *self._queue, self._incoming) if request is not None]
        self._current = self._incoming = None
        self._queue.clear()
        self._outgoing.clear()
        self._pieces, self._fields, self._arrived = [], [], b""
        for request in waiting:
            self._application.abandon(request, ClientGone("the client closed its connection"))

    def data_received(self, data: bytes) -> None:
        """Process bytes of the client: a part of a request, or one or several requests."""
        if self._ignores_input:
            self._discard(len(data))
            return
        is_free = self._current is None and not self._queue and self._is_between
        if is_free and not self._is_writing_paused and not self._outgoing:
            end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
            head = self._listener.heads.get(data[:end])
            if head is not None and len(data) - end == head.length:
                self._receive_by_s = math.inf
                request = self._current = Request(head, self.respond, monotonic(), self, data[end:])
                self._application.handle(request)
                return
        if self._receive_by_s == math.inf and self._is_between:
            # Whatever comes has to become a request in time, be it only empty lines.
            self._receive_by_s = self._loop.time() + self._limits.receive_timeout_s
        self._arrived = data if self._is_between else b""
        self._feed(data)
        self._arrived = b""
        if self._receive_by_s < self._timer_s:
            self._check_within(self._receive_by_s - self._loop.time())

    def eof_received(self) -> bool:
        """Handle the end of the client's input: answer the requests received before, then close."""
        self._is_half_closed = True
        if self._linger_until_s < math.inf or self._is_idle():
            return False
        self._check_within(PROBE_S)
        return True

    def pause_writing(self) -> None:
        """Start the timeout for a client that does not read its reply."""
        self._is_writing_paused = True
        self._watch_sending()

    def resume_writing(self) -> None:
        """Go on with the next request, now that the client has read enough of the last reply."""
        self._is_writing_paused = False
        if self._outgoing:
            self._write_next_slice()
        elif not self._is_begun:
            self._release()
            self._idle_since_s = self._loop.time()
            self._advance()

    # Called by the server.

    def shutdown(self) -> None:
        """Close the connection once the requests in progress are answered."""
        self._is_last = True
        is_free = self._is_idle() and self._incoming is None
        if is_free and self._transport is not None and not self._transport.is_closing():
            self._close()

    def give_up(self, error: ServiceError) -> None:
        """Answer the requests in progress with an error, because the time to drain is over."""
        for request in self._queue:
            request.refusal = error
        if self._incoming is not None:
            self._incoming.refusal, self._incoming.head.keep_alive = error, False
        if self._current is not None:
            self._application.abandon(self._current, error)
        self._advance()

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Start a new request."""
        self._has_event = True
        self._is_between, self._is_in_head, self._is_upgrade = False, True, False
        self._url, self._fields = b"", []
        self._head_bytes = self._fields_seen = self._chunks = 0
        if self._receive_by_s == math.inf:
            self._receive_by_s = self._loop.time() + self._limits.receive_timeout_s

    def on_url(self, url: bytes) -> None:
        """Append a part of the request target."""
        self._has_event = True
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header field; fields of a trailer are counted and dropped."""
        self._has_event = True
        self._count_head(len(name) + len(value) + 4)
        self._fields_seen += 1
        if self._fields_seen > self._limits.max_headers:
            raise _Refused
        if self._is_in_head:
            self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        """Ask the application whether it admits the request, before its body is read."""
        self._has_event = True
        parser = self._parser
        if parser.should_upgrade():
            self._is_upgrade = True  # parsed once more without the offer, see _feed
            return
        head = self._read_head(parser.get_method().decode("ascii"), parser.get_http_version())
        self._is_in_head = False
        request = self._incoming = Request.of(head, self.respond, self)
        self._pieces, self._body_bytes = [], 0
        try:
            self._application.admit(head)
            if head.length is not None:
                self._expect_body(request, head.length)
        except Exception as error:
            self._refuse_early(request, error)
            return
        if self._arrived and head.length is not None and head.length <= LARGE_BYTES:
            self._remember(head)
        if head.length != 0 and head.headers.get(b"expect", b"").lower() == b"100-continue":
            self._is_continue_due = head.version == "1.1"
            self._advance()

    def on_chunk_header(self) -> None:
        """Count the chunks of the body, whose number is limited."""
        self._has_event = True
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise _Refused

    def on_body(self, data: bytes) -> None:
        """Append a part of the body."""
        self._has_event = True
        request = self._incoming
        if request is None or request.refusal is not None:
            return
        self._body_bytes += len(data)
        self._pieces.append(data)
        if request.head.length is None:
            try:
                self._expect_body(request, self._body_bytes)
            except ServiceError as error:
                self._refuse_early(request, error)

    def on_message_complete(self) -> None:
        """Queue the complete request; answer it now if none is before it."""
        self._has_event = True
        if self._is_upgrade:
            return
        self._is_between = True
        self._receive_by_s = math.inf
        request, self._incoming = self._incoming, None
        self._is_continue_due = False
        if request is None:  # it was refused and answered before it was whole
            self._idle_since_s = self._loop.time()
            return
        request.body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        self._queue.append(request)
        self._queued_bytes += len(request.body)
        self._advance()

    # Parsing.

    def _feed(self, data: bytes) -> None:
        """Parse data; answer malformed or too large input with an error."""
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        self._has_event = False
        rest_at = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest_at = upgrade.args[0]
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, Exception) and not isinstance(error.__context__, _Refused):
                raise
            self._stop_parsing()
            return
        if rest_at is not None:
            if self._incoming is None and self._is_upgrade and self._transport is not None:
                self._parse_without_upgrade(data[rest_at:])
            return
        # The parser hands over a field, a chunk's extension or a trailer when it is whole, and keeps it until then.
        self._silent_bytes = 0 if self._has_event else self._silent_bytes + len(data)
        if self._silent_bytes > self._limits.max_header_bytes:
            self._stop_parsing()
        is_full = len(self._queue) > MAX_PIPELINED or self._queued_bytes > MAX_PIPELINED_BYTES
        if is_full and not self._is_reading_paused and self._transport is not None:
            self._is_reading_paused = True
            self._receive_by_s = math.inf  # what the client may not send is not waited for
            self._transport.pause_reading()

    def _parse_without_upgrade(self, rest: bytes) -> None:
        """Parse a head again without its Upgrade field, which a server may ignore (RFC 9110, 7.8)."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._stop_parsing()
            return
        kept = []
        for name, value in self._fields:
            if name.lower() == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() != b"upgrade")  # noqa: PLW2901
            if name.lower() != b"upgrade":
                kept.append(b"%b: %b\r\n" % (name, value))
        line = b"%b %b HTTP/%b\r\n" % (method, self._url, self._parser.get_http_version().encode())
        self._parser, self._arrived = None, b""
        self._feed(line + b"".join(kept) + b"\r\n" + rest)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.max_header_bytes:
            raise _Refused

    def _read_head(self, method: str, version: str) -> Head:
        """Create a head from the parsed fields.

        Raises:
            _Refused: the version is not HTTP/1.0 or 1.1, or the body has an unsupported transfer coding.
        """
        headers: dict[bytes, bytes] = {}
        for name, value in self._fields:
            headers.setdefault(name.lower(), value)
        length: int | None = int(headers.get(b"content-length", b"0"))
        coding = headers.get(b"transfer-encoding")
        if coding is not None:
            # A list of codings may end in chunked, but this server does not decode the other codings.
            if coding.lower() != b"chunked" or version == "1.0":
                raise _Refused
            length = None
        path, _, query = self._url.partition(b"?")
        if version not in ("1.0", "1.1") or not path.startswith((b"/", b"*")):
            raise _Refused
        text = path.decode("latin-1")
        if "%" in text:
            text = unquote(text)
        return Head(method, text, query, headers, length, self._parser.should_keep_alive(), version)

    def _remember(self, head: Head) -> None:
        """Cache a head under the exact bytes that it was parsed from, if they have the common form."""
        if not NOT_REMEMBERED.isdisjoint(head.headers):
            return
        lines = b"".join([b"%b: %b\r\n" % field for field in self._fields])
        text = b"%b %b HTTP/1.1\r\n%b\r\n" % (head.method.encode(), self._url, lines)
        if len(text) <= MAX_HEAD_BYTES and self._arrived.startswith(text):
            heads = self._listener.heads
            if len(heads) >= MAX_HEADS:
                del heads[next(iter(heads))]
            heads[text] = head

    def _expect_body(self, request: Request, size: int) -> None:
        """Check the size of a body, and count a large one against the budget.

        Raises:
            BodyTooLarge: the body exceeds the limit.
            Overloaded: the budget is exhausted.
        """
        most = self._limits.max_body_bytes
        if size > most:
            raise BodyTooLarge(f"expected a body of at most {most} bytes, got {size}")
        if size > LARGE_BYTES and size > request.held_bytes:
            self._application.budget.take(size - request.held_bytes)
            request.held_bytes = size

    # Answering.

    def _advance(self) -> None:
        """Answer the next requests, as long as each is answered immediately."""
        if self._is_advancing:
            return
        self._is_advancing = True
        while (
            self._current is None
            and not self._is_writing_paused
            and not self._outgoing
            and (request := self._next()) is not None
        ):
            self._current = request
            if request.refusal is None:
                self._application.handle(request)
            else:
                self._application.fail(request, request.refusal)
        self._is_advancing = False
        if self._is_reading_paused and len(self._queue) <= MAX_PIPELINED // 2 and self._transport is not None:
            self._is_reading_paused = False
            if not self._is_between:
                self._receive_by_s = self._loop.time() + self._limits.receive_timeout_s
                self._check_within(self._limits.receive_timeout_s)
            self._transport.resume_reading()

    def _next(self) -> Request | None:
        """Remove and return the next request, or ``None`` if there is none or the connection is closing."""
        if self._transport is None or self._transport.is_closing() or self._linger_until_s < math.inf:
            return None
        if self._queue:
            self._queued_bytes -= len(self._queue[0].body)
            return self._queue.popleft()
        incoming = self._incoming
        if incoming is None:
            return None
        if incoming.refusal is not None:  # without waiting for its body, which is discarded
            self._incoming = None
            return incoming
        if self._is_continue_due:
            self._is_continue_due = False
            self._transport.write(_CONTINUE)
        return None

    def _refuse_early(self, request: Request, error: Exception) -> None:
        """Refuse a request before its body arrives: immediately if it is next, else in its turn."""
        request.refusal = error.with_traceback(None)
        self._pieces = []
        head = request.head
        if head.length is None or head.length > DISCARDED_BYTES or b"expect" in head.headers:
            head.keep_alive = False
        self._advance()

    def _stop_parsing(self, error: ServiceError | None = None) -> None:
        """Stop parsing: answer the requests received so far, then the malformed one; discard the rest."""
        if self._ignores_input:
            return
        self._ignores_input = True
        self._receive_by_s = math.inf
        request, self._incoming = self._incoming, None
        if request is None:
            if not (self._is_between or self._is_in_head):  # in the body of a request that was refused and answered
                self._is_last = True
                if self._is_idle():
                    self._close(lingers=True)
                return
            request = Request.of(Head("GET", "", b"", {}, keep_alive=False), self.respond, self)
        limits = self._limits
        request.head.keep_alive = False
        request.refusal = error or MalformedBody(
            f"expected an HTTP/1.1 request with a head of at most {limits.max_header_bytes} bytes and "
            f"{limits.max_headers} fields and a body in at most {MAX_CHUNKS} chunks"
        )
        self._discard_left, self._linger_s = MALFORMED_LINGER_BYTES, MALFORMED_LINGER_S
        self._queue.append(request)
        self._advance()

    def respond(self, request: Request, reply: Reply) -> bool:
        """Send the reply to the current request; return whether the client is still connected."""
        transport = self._transport
        if request.held_bytes:
            self._give_back(request)
        if transport is None or request is not self._current or transport.is_closing():
            return False
        if self._is_begun:
            return self._end_stream(request, reply)
        self._current = None
        is_last = self._write(transport, request, reply, 0)
        # The rest of a refused request is discarded, or the client would get a reset and not the reply.
        self._end_reply(is_last, request.refusal is not None)
        return True

    def begin(self, request: Request, reply: Reply, rest_bytes: int) -> None:
        """Send the head and the first part of the body of a reply; ``send`` and ``respond`` send the rest."""
        transport = self._transport
        if transport is not None and request is self._current and not transport.is_closing():
            self._give_back(request)
            self._is_begun, self._owed_bytes = True, rest_bytes
            self._is_closing_after = self._write(transport, request, reply, rest_bytes)

    def send(self, request: Request, pieces: Sequence[bytes | memoryview]) -> None:
        """Send the next part of the body of a reply."""
        if request is self._current and self._is_begun:
            self._send(pieces)

    def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        self._owed_bytes -= sum(map(len, pieces))
        self._outgoing.extend(memoryview(piece) for piece in pieces if len(piece))
        self._write_slice()

    def _write(self, transport: asyncio.Transport, request: Request, reply: Reply, rest_bytes: int) -> bool:
        """Write a reply, of whose body ``rest_bytes`` bytes follow; return whether the connection closes after it."""
        status, media_type, body, headers = reply
        head = request.head
        size = sum(map(len, body)) + rest_bytes
        more = b"".join([b"%b: %b\r\n" % header for header in headers]) if headers else b""
        is_leaving = self._is_last or self._is_half_closed
        is_last = not head.keep_alive or (is_leaving and not self._queue and self._incoming is None)
        if is_last:
            more += b"connection: close\r\n"
        elif head.version == "1.0":
            more += b"connection: keep-alive\r\n"
        if status != NOT_MODIFIED:
            more = b"content-type: %b\r\ncontent-length: %d\r\n%b" % (media_type, size, more)
        text = b"%b%b%bx-request-id: %b\r\n\r\n" % (
            _STATUS_LINES[status],
            self._listener.default_fields(self._server_state.default_headers),
            more,
            request.id,
        )
        if head.method == "HEAD":
            transport.write(text)
        elif size <= LARGE_BYTES:
            text = b"".join((text, *body))
            self._written_bytes += len(text)
            transport.write(text)
        else:
            self._release()
            self._sending_bytes = size  # held until the client has taken them
            self._application.budget.held_bytes += size
            self._outgoing.extend(memoryview(piece) for piece in (text, *body) if len(piece))
            self._write_slice()
        return is_last

    def _end_stream(self, request: Request, reply: Reply) -> bool:
        """Send the last part of a reply; abort the connection if it is not as long as announced."""
        assert self._transport is not None
        self._current, self._is_begun = None, False
        if reply.status != HTTPStatus.OK or sum(map(len, reply.body)) != self._owed_bytes:
            self._transport.abort()
            return False
        self._send(reply.body)
        if not self._outgoing and not self._is_writing_paused:
            self._release()
        self._end_reply(self._is_closing_after, lingers=False)
        return True

    def _end_reply(self, is_last: bool, lingers: bool) -> None:
        """Finish a reply that is written: close the connection, or answer the next request."""
        if self._outgoing:
            self._is_closing_after, self._is_lingering_after = is_last, lingers
            return
        self._idle_since_s = self._loop.time()
        if is_last:
            self._close(lingers)
        elif self._queue or self._incoming is not None:
            self._advance()
        elif self._is_last or self._is_half_closed:
            self._close()

    def _is_idle(self) -> bool:
        """Return whether no request waits for its reply and no reply is being written."""
        return self._current is None and not self._queue and not self._outgoing

    def _write_slice(self) -> None:
        """Write a large reply in slices, one per turn of the event loop, so that it does not block the loop."""
        transport = self._transport
        if not self._outgoing or self._is_writing_paused or self._is_slice_scheduled or transport is None:
            return
        pieces, size = [], 0
        while self._outgoing and size < TURN_BYTES:
            piece = self._outgoing.popleft()
            if len(piece) > TURN_BYTES - size:
                self._outgoing.appendleft(piece[TURN_BYTES - size :])
                piece = piece[: TURN_BYTES - size]
            pieces.append(piece)
            size += len(piece)
        self._written_bytes += size
        transport.writelines(pieces)
        if self._outgoing:
            if not self._is_writing_paused:
                self._is_slice_scheduled = True
                self._loop.call_soon(self._write_next_slice)
        elif not self._is_begun and not self._is_writing_paused:
            self._release()

    def _write_next_slice(self) -> None:
        """Write the next slice of a large reply, and finish the reply after the last."""
        self._is_slice_scheduled = False
        self._write_slice()
        if not self._outgoing and self._current is None and self._transport is not None:
            self._end_reply(self._is_closing_after, self._is_lingering_after)

    def _give_back(self, request: Request) -> None:
        """Release the request's bytes of the budget; those of its reply are counted from now on."""
        self._application.budget.give(request.held_bytes)
        request.held_bytes = 0

    def _release(self) -> None:
        """Release the bytes of the last reply from the budget."""
        if self._sending_bytes:
            self._application.budget.give(self._sending_bytes)
            self._sending_bytes = 0

    # Time, and the end.

    def _close(self, lingers: bool = False) -> None:
        """Close once the replies are sent; with ``lingers``, wait a limited time for the client to close too."""
        transport = self._transport
        assert transport is not None
        self._ignores_input = True
        self._receive_by_s = math.inf
        self._watch_sending()
        if not lingers or self._is_half_closed:
            transport.close()
            return
        transport.write_eof()
        self._linger_until_s = self._loop.time() + self._linger_s
        self._check_within(self._linger_s)

    def _discard(self, size: int) -> None:
        self._discard_left -= size
        if self._discard_left < 0 and self._transport is not None:
            self._transport.abort()

    def _watch_sending(self) -> None:
        """Start checking periodically that the client reads its reply."""
        self._progress_s = self._loop.time()
        self._check_within(self._limits.send_timeout_s / 4)

    def _check_within(self, seconds: float) -> None:
        """Schedule a check of the timeouts within ``seconds``, unless an earlier one is scheduled."""
        due_s = self._loop.time() + seconds
        if due_s < self._timer_s - CLOCK_S:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_s, self._timer = due_s, self._loop.call_later(max(seconds, 0.0), self._check_timeouts)

    def _check_timeouts(self) -> None:
        """Close the connection if a timeout has passed, or schedule the next check."""
        late_s = self._loop.time() - self._timer_s
        self._timer_s, self._timer = math.inf, None
        transport, limits = self._transport, self._limits
        if transport is None:
            return
        if late_s > LATE_S:
            self._move_timeouts(late_s + LATE_S)
        now_s = self._loop.time() + CLOCK_S
        due_s = min(self._receive_by_s, self._linger_until_s)
        next_s = limits.keep_alive_s
        unsent = transport.get_write_buffer_size()
        is_answering = not self._is_idle()
        if unsent:
            if self._written_bytes - unsent != self._taken_bytes:
                self._progress_s, self._taken_bytes = now_s, self._written_bytes - unsent
            due_s = min(due_s, self._progress_s + limits.send_timeout_s)
            next_s = limits.send_timeout_s / 4
        elif due_s == math.inf and not is_answering:
            self._release()
            due_s = self._idle_since_s + limits.keep_alive_s
        if due_s <= now_s or (self._is_half_closed and is_answering and self._has_left(transport)):
            transport.abort()
            return
        if self._is_half_closed and is_answering:
            next_s = PROBE_S
        self._check_within(min(next_s, due_s - now_s))

    def _move_timeouts(self, seconds: float) -> None:
        """Leave out a time in which the process did not run."""
        self._receive_by_s += seconds
        self._linger_until_s += seconds
        self._progress_s += seconds
        self._idle_since_s += seconds

    def _has_left(self, transport: asyncio.Transport) -> bool:
        """Return whether a client that closed its sending side has closed its receiving side too.

        The two cases look alike until something is sent. So an interim reply is sent, which clients must ignore
        (RFC 9110, 15.2); the system of a client that is gone answers it with a reset.
        """
        current = self._current
        if current is None or self._is_begun or current.head.version == "1.0":
            return False
        if not self._is_probed:
            self._is_probed = True
            transport.write(_CONTINUE)
            return False
        sock = transport.get_extra_info("socket")
        return sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
