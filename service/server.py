"""uvicorn with what it lacks: bounds on the head and on the time to receive and to send, a drain, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.app import Application
from service.core import Core
from service.door import Scope
from service.errors import ClientGone, MalformedBody, NotReady, Overloaded, ServiceError, StartUpError
from service.exchange import Exchange, ShortHead, ShortWay
from service.metrics import Metrics
from service.settings import Settings

__all__ = ["EXIT_GIVEN_UP", "EXIT_START_UP", "serve"]

logger = logging.getLogger(__name__)

EXIT_DRAINED = 0
EXIT_FORCED = 1
EXIT_START_UP = 3
EXIT_GIVEN_UP = 70
#: Most chunks of a chunked body: a body in more of them costs more to take apart than to compute.
MAX_CHUNKS = 1 << 16
#: The loop's timers are this exact.
CLOCK_S = 0.001
#: Descriptors that are needed for anything but connections.
OTHER_DESCRIPTORS = 256
#: Fields that announce a body.
BODY_FIELDS = frozenset({b"content-length", b"transfer-encoding"})


def _nothing(_: ServiceError) -> None:
    """What is done for a client that nothing was begun for."""


def bounded_protocol(  # noqa: C901 - a class
    settings: Settings, metrics: Metrics, short_way: ShortWay
) -> type[asyncio.Protocol]:
    """The protocol class for connections within the settings' bounds.

    What is refused here is counted; small requests for derivatives go the short way.
    """

    class BoundedProtocol(HttpToolsProtocol):
        """One connection."""

        _head_bytes = 0
        _unparsed_bytes = 0
        _chunks = 0
        _is_in_head = False
        _is_receiving = False
        _is_between = True
        _arrived = b""
        _idle_since_s = 0.0
        _receive_timer: asyncio.TimerHandle | None = None
        _send_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._refuse(Overloaded(f"expected at most {settings.max_connections} connections; try again later"))
                return
            self._is_receiving = True
            self._watch_receiving()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._receive_timer, self._send_timer):
                if timer is not None:
                    timer.cancel()
            cycle: object = self.cycle if self.cycle is not None and not self.cycle.response_complete else None
            super().connection_lost(exc)
            self._unset_keepalive_if_required()
            gone = ClientGone("the client is gone")
            if isinstance(cycle, Exchange):
                cycle.abandon(gone)
            elif isinstance(cycle, RequestResponseCycle):
                cast("Scope", cycle.scope).get("hessquik.abandon", _nothing)(gone)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete:
                if self._is_between and (known := short_way.recall(data)) and not self.flow.write_paused:
                    self._take_whole(*known)
                    return
                self._is_receiving = True  # whatever comes now has to become a request in time
            self._arrived = data if self._is_between else b""
            super().data_received(data)
            self._arrived = b""
            if self._is_in_head:
                # The parser hands a field over when it is whole; until then it keeps it, however long.
                self._unparsed_bytes += len(data)
                if self._unparsed_bytes > settings.max_header_bytes and not self.transport.is_closing():
                    self.send_400_response("")
            self._watch_receiving()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._is_between = False
            self._head_bytes = self._unparsed_bytes = self._chunks = 0
            self._is_receiving = self._is_in_head = True

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._count_head(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count_head(len(name) + len(value) + 4)
            if not self._is_in_head:
                return  # the trailer's fields are nobody's
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))
            if len(self.headers) > settings.max_headers:
                raise ValueError("too many header fields")

        def on_headers_complete(self) -> None:
            self._is_in_head = False
            is_upgrade = self.parser.should_upgrade()
            if is_upgrade and any(name in BODY_FIELDS for name, _ in self.headers):
                raise ValueError("a body is not read beside an offer of another protocol")
            if not self._take_short_way():
                super().on_headers_complete()
            if is_upgrade:
                self.cycle.keep_alive = False  # what follows would be in the other protocol

        def on_chunk_header(self) -> None:
            self._chunks += 1
            if self._chunks > MAX_CHUNKS:
                raise ValueError("too many chunks")

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._is_receiving, self._is_between = False, True
            cycle: object = self.cycle
            if isinstance(cycle, Exchange):
                cycle.begin()

        def _unsupported_upgrade_warning(self) -> None:
            """Say nothing: offers of other protocols are ignored, as they may be."""

        def on_response_complete(self) -> None:
            self._idle_since_s = self.loop.time()
            if self.pipeline or self.timeout_keep_alive_task is None or self.transport.is_closing():
                super().on_response_complete()
            else:  # the timer is left running: it looks at the time when it is over, so that a request needs none
                self.server_state.total_requests += 1
                self.flow.resume_reading()

        def timeout_keep_alive_handler(self) -> None:
            self.timeout_keep_alive_task = None
            if self.cycle is not None and not self.cycle.response_complete:
                return
            rest_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
            if rest_s > CLOCK_S:
                self.timeout_keep_alive_task = self.loop.call_later(rest_s, self.timeout_keep_alive_handler)
            else:
                self.transport.abort()  # a close would wait, for ever, for a client that takes nothing of its reply

        def pause_writing(self) -> None:
            super().pause_writing()
            self._send_timer = self.loop.call_later(settings.send_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._send_timer is not None:
                self._send_timer.cancel()
                self._send_timer = None

        def _take_short_way(self) -> bool:
            """Have this request answered without a task, if it is one for that, and the only one under way."""
            is_busy = self.cycle is not None and not self.cycle.response_complete
            if is_busy or self.flow.write_paused or self.transport.is_closing():
                return False
            parser = self.parser
            if parser.get_method() != b"POST" or parser.get_http_version() != "1.1":
                return False
            head = short_way.read(self.url, self.headers, parser.should_keep_alive())
            if head is None:
                return False
            short_way.remember(self._arrived, head, self.url)
            self.cycle = cast("RequestResponseCycle", Exchange(short_way, self, head))
            return True

        def _take_whole(self, head: ShortHead, body: bytes) -> None:
            """Answer a request that came in one piece and whose head was read before."""
            self._is_receiving = False
            self._watch_receiving()
            exchange = Exchange(short_way, self, head)
            self.cycle = cast("RequestResponseCycle", exchange)
            exchange.body, exchange.more_body = body, False
            exchange.begin()

        def send_400_response(self, msg: str) -> None:
            """Refuse what is no HTTP, or too much of it, as problem details."""
            self._refuse(
                MalformedBody(
                    f"expected an HTTP/1.1 request with a head of at most {settings.max_header_bytes} bytes and "
                    f"{settings.max_headers} fields and a body in at most {MAX_CHUNKS} chunks"
                )
            )

        def _refuse(self, error: ServiceError) -> None:
            """Answer without a request, and close."""
            metrics.refused(error.status)
            body = error.problem("")
            headers = [
                (b"content-type", b"application/problem+json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
                *error.headers(),
            ]
            head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
            self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)
            self.transport.close()

        def _count_head(self, size: int) -> None:
            self._head_bytes += size
            if self._head_bytes > settings.max_header_bytes:
                raise ValueError("too large a head")

        def _watch_receiving(self) -> None:
            """A request that has begun has to be whole in time, measured from its first byte."""
            if self._is_receiving and self._receive_timer is None:
                self._receive_timer = self.loop.call_later(settings.receive_timeout_s, self.transport.abort)
            elif not self._is_receiving and self._receive_timer is not None:
                self._receive_timer.cancel()
                self._receive_timer = None

    return BoundedProtocol


class Server(uvicorn.Server):
    """A server whose first signal drains and whose second ends at once; it keeps the exit status to itself."""

    def __init__(self, config: uvicorn.Config, core: Core) -> None:
        """Keep the service, to tell it."""
        super().__init__(config)
        self._core = core

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the service, so that what prevents it is one line, and then listen."""
        try:
            await self._core.start()
        except StartUpError:
            await self._core.stop()
            raise
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM, and do not raise them again at the end."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        original = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in original.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; or, if that was asked for before, end."""
        if self.should_exit:
            self.force_exit = True
        self._core.is_draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain; what has no task to be cancelled when the time for it is over is ended by us."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.config.timeout_graceful_shutdown or 0, self._end_exchanges)
        await super().shutdown(sockets)
        timer.cancel()

    def _end_exchanges(self) -> None:
        for connection in list(self.server_state.connections):
            cycle: object = getattr(connection, "cycle", None)
            if isinstance(cycle, Exchange) and not cycle.response_complete:
                cycle.give_up(NotReady("expected to have time, the service is stopping"))

    async def on_tick(self, counter: int) -> bool:
        """Also stop when no worker can be kept alive."""
        if self._core.is_given_up:
            self.should_exit = True
        return await super().on_tick(counter)


def _allow_connections(count: int) -> None:
    """Raise the limit of open descriptors as far as that many connections need, if it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < wanted:
            logger.warning("expected %d descriptors for the connections, the system allows %d", wanted, limit)


def serve(app: Application, settings: Settings, sockets: list[socket.socket] | None = None) -> int:
    """Serve until told to stop.

    Args:
        app: The application.
        settings: Limits and places.
        sockets: Bound already, in place of the settings' host and port.

    Returns:
        The process's exit status.

    Raises:
        StartUpError: the service cannot start.
    """
    core: Core = app.state.core
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=bounded_protocol(settings, core.metrics, app.short_way),
        ws="none",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=None,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    _allow_connections(settings.max_connections)
    server = Server(config, core)
    try:
        server.run(sockets)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    if core.is_given_up:
        return EXIT_GIVEN_UP
    return EXIT_FORCED if server.force_exit else EXIT_DRAINED
