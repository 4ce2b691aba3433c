"""uvicorn with what it lacks: bounds on the head and on the time to receive and to send, a drain, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.core import Core
from service.errors import MalformedBody
from service.settings import Settings

__all__ = ["EXIT_GIVEN_UP", "EXIT_START_UP", "serve"]

logger = logging.getLogger(__name__)

EXIT_DRAINED = 0
EXIT_FORCED = 1
EXIT_START_UP = 3
EXIT_GIVEN_UP = 70


def _nothing() -> None:
    """What is done for a client that nothing was begun for."""


def bounded_protocol(settings: Settings) -> type[asyncio.Protocol]:  # noqa: C901 - a class with short methods
    """The protocol class for connections within the settings' bounds."""

    class BoundedProtocol(HttpToolsProtocol):
        """One connection."""

        _head_bytes = 0
        _is_receiving = False
        _receive_timer: asyncio.TimerHandle | None = None
        _send_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._is_receiving = True
            self._watch_receiving()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._receive_timer, self._send_timer):
                if timer is not None:
                    timer.cancel()
            scope = self.cycle.scope if self.cycle is not None and not self.cycle.response_complete else None
            super().connection_lost(exc)
            if scope is not None:
                cast("Callable[[], None]", scope.get("hessquik.abandon", _nothing))()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_receiving()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = 0
            self._is_receiving = True

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._count_head(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            self._count_head(len(name) + len(value) + 4)
            if len(self.headers) > settings.max_headers:
                raise ValueError("too many header fields")

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._is_receiving = False

        def pause_writing(self) -> None:
            super().pause_writing()
            self._send_timer = self.loop.call_later(settings.send_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._send_timer is not None:
                self._send_timer.cancel()
                self._send_timer = None

        def send_400_response(self, msg: str) -> None:
            """Refuse what is no HTTP, or too much of it, as problem details."""
            error = MalformedBody(
                f"expected an HTTP request with a head of at most {settings.max_header_bytes} bytes "
                f"and {settings.max_headers} fields"
            )
            body = error.problem("")
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
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

    async def on_tick(self, counter: int) -> bool:
        """Also stop when no worker can be kept alive."""
        if self._core.dispatcher.given_up.is_set():
            self.should_exit = True
        return await super().on_tick(counter)


def serve(app: FastAPI, settings: Settings) -> int:
    """Serve until told to stop.

    Returns:
        The process's exit status.
    """
    core: Core = app.state.core
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=bounded_protocol(settings),
        ws="none",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=None,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    server = Server(config, core)
    try:
        server.run()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    if core.dispatcher.given_up.is_set():
        return EXIT_GIVEN_UP
    return EXIT_FORCED if server.force_exit else EXIT_DRAINED
