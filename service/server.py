"""The server: uvicorn with the connections of :mod:`service.http`, draining and exit codes."""

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

from hessquik_client.errors import NotReady, StartUpError

from .app import Application
from .http.connection import Connection, Limits, Listener
from .settings import Settings

__all__ = ["EXIT_GIVEN_UP", "EXIT_START_UP", "serve"]

logger = logging.getLogger(__name__)

EXIT_DRAINED = 0
EXIT_FORCED = 1
EXIT_START_UP = 3
EXIT_GIVEN_UP = 70
#: Descriptors that are needed for anything but connections.
OTHER_DESCRIPTORS = 256
#: uvicorn's.
TICKS_A_SECOND = 10
#: Models that are listed when the service has started.
SHOWN_MODELS = 20


class Server(uvicorn.Server):
    """A server that listens while the service starts, drains at the first signal, and exits at the second.

    Attributes:
        start_error: The error with which the service could not start, if any.
    """

    def __init__(self, config: uvicorn.Config, app: Application) -> None:
        """Set up a server for the application, which it starts and stops."""
        super().__init__(config)
        self._app = app
        self._starting: asyncio.Task[None] | None = None
        self._is_hung_up = False
        self.start_error: StartUpError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and start the service; until it has started, its routes answer 503.

        One of several front ends listens only when it has started, so that the others get the connections until then.
        """
        if sockets is not None:
            await self._app.start()
            await super().startup(sockets)
            logger.info("the front end serves")
            return
        self._app.core.is_starting = True
        await super().startup(sockets)
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        try:
            await self._app.start()
        except StartUpError as error:
            self.start_error, self.should_exit = error, True
            return
        except Exception:
            self.should_exit = True
            raise
        port = self.servers[0].sockets[0].getsockname()[1]
        for line in describe(self._app, port):
            logger.info(line)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM without raising them again at the end; read the keys again at SIGHUP."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        original = {number: signal.signal(number, self.handle_exit) for number in numbers}
        original[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_hangup)
        try:
            yield
        finally:
            for number, handler in original.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; exit at the second."""
        if self.should_exit:
            self.force_exit = True
        self._app.core.is_draining = True
        self.should_exit = True

    def _on_hangup(self, sig: int, frame: FrameType | None) -> None:
        self._is_hung_up = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain; answer requests that are not finished within the time limit with an error."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.config.timeout_graceful_shutdown or 0, self._give_up)
        await super().shutdown(sockets)
        timer.cancel()
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._starting
        if not self.force_exit:
            await self._app.stop()

    def _give_up(self) -> None:
        for connection in list(self.server_state.connections):
            cast(Connection, connection).give_up(NotReady("expected to have time, the service is stopping"))

    async def on_tick(self, counter: int) -> bool:
        """Stop if workers cannot be kept alive, and check the files of keys once a second; return whether to stop."""
        core = self._app.core
        if core.scheduler.is_given_up:
            self.should_exit = True
        if self._is_hung_up:
            self._is_hung_up = False
            core.keys.reload()
        elif counter % TICKS_A_SECOND == 0:
            core.keys.follow()
        return await super().on_tick(counter)


def describe(app: Application, port: int) -> Iterator[str]:
    """Yield lines for the log: the served models, the devices and the address of the explorer."""
    core, settings = app.core, app.core.settings
    names = core.repository.names()
    if not names:
        yield f"no model: expected NAME.safetensors in {settings.models}"
    for name in names[:SHOWN_MODELS]:
        for version, served in sorted(core.repository.versions(name).items()):
            facts = served.facts
            sizes = f"d = {facts['d']}, m = {facts['m']}, {facts['dtype']}" if facts else served.reason or ""
            yield f"model {name} version {version}: {served.state}, {sizes}"
    if len(names) > SHOWN_MODELS:
        yield f"and {len(names) - SHOWN_MODELS} models more"
    devices = core.node.health().devices
    yield f"{len(devices)} worker{'s' * (len(devices) > 1)} on {', '.join(devices)}"
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    yield f"explorer: {url}/   interface: {url}/docs   ready: {url}/readyz"


def _allow_connections(count: int) -> None:
    """Raise the limit of open descriptors to the number that ``count`` connections need, as far as allowed."""
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
        settings: Settings of the service.
        sockets: Bound sockets to use in place of the settings' host and port.

    Returns:
        The process's exit status.

    Raises:
        StartUpError: the service cannot start.
    """
    core = app.core
    listener = Listener(app.front, Limits(**{name: getattr(settings, name) for name in Limits._fields}))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=cast("type[asyncio.Protocol]", listener.connect),
        ws="none",
        lifespan="off",  # the service is started beside it, see Server
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=None,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    _allow_connections(settings.max_connections)
    core.keys.on_change.append(listener.heads.clear)  # remembered heads were let in by the keys before
    server = Server(config, app)
    try:
        server.run(sockets)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    if server.start_error is not None:
        raise server.start_error
    if core.scheduler.is_given_up:
        return EXIT_GIVEN_UP
    return EXIT_FORCED if server.force_exit else EXIT_DRAINED
