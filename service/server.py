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

__all__ = ["EXIT_GIVEN_UP", "EXIT_START_UP", "bind", "listen", "serve", "url"]

logger = logging.getLogger(__name__)

EXIT_DRAINED = 0
EXIT_FORCED = 1
EXIT_START_UP = 3
EXIT_GIVEN_UP = 70
#: Descriptors that are needed for anything but connections.
OTHER_DESCRIPTORS = 256
#: Models that are listed when the service has started.
SHOWN_MODELS = 20


class Server(uvicorn.Server):
    """A server that listens while the service starts, drains at the first signal, and exits at the second.

    Args:
        config: uvicorn's configuration.
        app: The application, which is started and stopped.
        is_alone: Whether it is the only front end.

    Attributes:
        start_error: The error with which the service could not start, if any.
    """

    def __init__(self, config: uvicorn.Config, app: Application, is_alone: bool) -> None:
        """Set up a server."""
        super().__init__(config)
        self._app, self._is_alone = app, is_alone
        self._starting: asyncio.Task[None] | None = None
        self.start_error: StartUpError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and start the service; until it has started, its routes answer 503.

        One of several front ends listens only when it has started, so that the others get the connections until then.
        """
        if not self._is_alone:
            await self._app.start()
            await super().startup(sockets)
            logger.info("the front end serves")
            return
        self._app.core.is_starting = True
        await super().startup(sockets)
        address = url(self.servers[0].sockets[0])
        logger.info("running on %s", address)
        self._starting = asyncio.get_running_loop().create_task(self._start(address))

    async def _start(self, address: str) -> None:
        try:
            await self._app.start()
        except StartUpError as error:
            self.start_error, self.should_exit = error, True
            return
        except Exception:
            self.should_exit = True
            raise
        for line in describe(self._app, address):
            logger.info(line)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM without raising them again at the end; read the keys again at SIGHUP."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        original = {number: signal.signal(number, self.handle_exit) for number in numbers}
        original[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._app.core.keys.ask)
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain; answer requests that are not finished within the time limit with an error."""
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._starting
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.config.timeout_graceful_shutdown or 0, self._give_up)
        await super().shutdown(sockets)
        timer.cancel()
        if not self.force_exit:
            await self._app.stop()

    def _give_up(self) -> None:
        for connection in list(self.server_state.connections):
            cast(Connection, connection).give_up(NotReady("expected to have time, the service is stopping"))

    async def on_tick(self, counter: int) -> bool:
        """Stop if workers cannot be kept alive; return whether to stop."""
        if self._app.core.scheduler.is_given_up:
            self.should_exit = True
        return await super().on_tick(counter)


def describe(app: Application, address: str) -> Iterator[str]:
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
    yield f"explorer: {address}/   interface: {address}/docs   ready: {address}/readyz"


def bind(host: str, port: int, is_shared: bool = False) -> socket.socket:
    """Return a bound socket; that of ``::`` takes IPv4, too.

    Args:
        host: An address, or a name for one; IPv4 is preferred.
        port: The port; 0 for a free one.
        is_shared: Whether this user's other sockets may have the same address (SO_REUSEPORT). If not, the socket
            listens: only then the system refuses an address that another socket has which does not listen yet.

    Raises:
        OSError: the address is invalid or in use.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, is_shared)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        if not is_shared:
            sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address, and shares it with nobody.

    Raises:
        StartUpError: the address is invalid or in use.
    """
    try:
        return bind(host, port)
    except (OSError, UnicodeError) as error:  # of names that are none
        why = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise StartUpError(
            f"expected an address of this machine and a free port, got host {host} and port {port}: {why}"
        ) from None


def url(sock: socket.socket) -> str:
    """Return the URL at which a socket is reached from this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _allow_connections(count: int) -> None:
    """Raise the limit of open descriptors to the number that ``count`` connections need, as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        if limit < wanted:
            logger.warning("expected %d descriptors for the connections, the system allows %d", wanted, limit)


def serve(app: Application, settings: Settings, sock: socket.socket | None = None) -> int:
    """Serve until told to stop.

    Args:
        app: The application.
        settings: Settings of the service.
        sock: For one of several front ends, a socket that is bound.

    Returns:
        The process's exit status.

    Raises:
        StartUpError: the service cannot start.
    """
    core = app.core
    listener = Listener(app.front, Limits(**{name: getattr(settings, name) for name in Limits._fields}))
    config = uvicorn.Config(
        app,
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
    server = Server(config, app, is_alone=sock is None)
    server.run([sock or listen(settings.host, settings.port)])
    if server.start_error is not None:
        raise server.start_error
    if core.scheduler.is_given_up:
        return EXIT_GIVEN_UP
    return EXIT_FORCED if server.force_exit else EXIT_DRAINED
