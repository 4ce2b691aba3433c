"""The client's additions to httpx: a time limit for a whole exchange, and a limit on the bytes of a reply.

httpx limits each read separately, so that a server that sends a byte now and then could block a caller for ever; and
it reads and decompresses replies of any size. What it is made of, httpcore, leaves a socket open when a call is
cancelled while TLS is agreed on.
"""

from __future__ import annotations

import math
import selectors
import socket
import ssl
import time
import urllib.request
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

from hessquik_client.errors import ClientError, ConnectionLost, DeadlineExceeded
from hessquik_client.messages import DOCUMENT_BYTES, Reply, unexpected
from hessquik_client.steps import Send

__all__ = ["AsyncTransport", "Body", "DeadlineTransport", "options", "too_late", "translate"]

#: Connections that are held, for as many threads or tasks as share a client.
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=5.0)
#: Seconds to connect; after that another try is better than more patience.
CONNECT_S = 5.0


def options(step: Send) -> dict[str, Any]:
    """Return the arguments of ``stream`` of httpx's clients for a step."""
    request, within_s = step.request, step.within_s
    # Rounded up: the service, which starts to count later, ends no reply before the client does.
    deadline_ms = math.ceil(within_s * 1000)
    return {
        "method": request.method,
        "url": request.target,
        "content": request.body or None,
        "headers": {**request.headers, "x-deadline-ms": str(deadline_ms)},
        "timeout": httpx.Timeout(within_s, connect=min(CONNECT_S, within_s)),
    }


class Body:
    """Collects the body of a reply, within a limit.

    Args:
        step: The step, whose request limits the size of the body.
        response: The head of the reply.

    Raises:
        UnexpectedReply: the reply is compressed, which was not requested, or too large.
    """

    def __init__(self, step: Send, response: httpx.Response) -> None:
        """Check the head."""
        self._reply = Reply(
            response.status_code, {name.lower(): text for name, text in response.headers.items()}, b""
        )
        self._most_bytes = step.request.most_bytes if response.status_code == 200 else DOCUMENT_BYTES
        self._chunks: list[bytes] = []
        self._left = self._most_bytes
        encoding = self._reply.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise unexpected(self._reply, f"a reply without compression, got {encoding[:100]}")
        length = self._reply.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self._most_bytes):
            self._refuse()

    def add(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            UnexpectedReply: the reply is too large.
        """
        self._chunks.append(chunk)
        self._left -= len(chunk)
        if self._left < 0:
            self._refuse()

    def reply(self) -> Reply:
        """Return the complete reply."""
        return Reply(self._reply.status, self._reply.headers, b"".join(self._chunks))

    def _refuse(self) -> None:
        raise unexpected(self._reply, f"a reply of at most {self._most_bytes} bytes, got more")


def translate(error: httpx.RequestError, step: Send) -> ClientError:
    """Return the client's error for one of httpx: retryable for a lost connection, final for a timeout."""
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return too_late(step)
    return ConnectionLost(f"expected a whole reply, the connection broke: {type(error).__name__}: {error}")


def too_late(step: Send) -> DeadlineExceeded:
    """Return the error for a reply that was not received within the time limit."""
    return DeadlineExceeded(f"expected an answer within {step.within_s:.3f} s, there was none", status=0)


def _trusted(url: httpx.URL) -> ssl.SSLContext:
    """Return the certificates to trust at an address: none without TLS, because reading them takes 40 ms."""
    return httpx.create_ssl_context() if url.scheme == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class DeadlineTransport(httpx.BaseTransport):
    """A connection pool whose timeouts limit a whole exchange instead of each read and write.

    Args:
        url: Address of the service; a proxy that the environment sets for it is used, as httpx does.
    """

    def __init__(self, url: httpx.URL) -> None:
        """Open no connection yet."""
        self._pool = httpcore.ConnectionPool(network_backend=_Backend(), **_pool_options(url))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its response, whose body is not read yet."""
        now = time.monotonic()
        # Points in time, for our streams; the pool itself still waits for seconds.
        ends = {name: now + seconds for name, seconds in request.extensions["timeout"].items() if name != "pool"}
        timeouts = {**ends, "pool": request.extensions["timeout"]["pool"]}
        with _errors_of_httpx():
            response = self._pool.handle_request(_request_of_httpcore(request, {"timeout": timeouts}))
        assert isinstance(response.stream, Iterable)
        return httpx.Response(response.status, headers=response.headers, stream=_Chunks(response))

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()


class _Chunks(httpx.SyncByteStream):
    """The body of a reply as a stream."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _errors_of_httpx():
            yield from self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


class _Backend(httpcore.NetworkBackend):
    """Opens connections; timeouts are deadlines on the monotonic clock, also those of the streams."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers; each address gets a share of the remaining time."""
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        for left in range(len(addresses), 0, -1):
            family, kind, protocol, _, address = addresses[-left]
            connection = socket.socket(family, kind, protocol)
            try:
                with _time_for(connection, timeout, httpcore.ConnectTimeout, httpcore.ConnectError, share=left):
                    connection.connect(address)
            except (httpcore.ConnectTimeout, httpcore.ConnectError):
                connection.close()
                if left == 1:
                    raise
            else:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _Stream(connection)
        raise httpcore.ConnectError(f"{host} has no address")


class _Stream(httpcore.NetworkStream):
    """A connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _time_for(self._socket, timeout, httpcore.ReadTimeout, httpcore.ReadError):
            return self._socket.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        while rest:
            with _time_for(self._socket, timeout, httpcore.WriteTimeout, httpcore.WriteError):
                rest = rest[self._socket.send(rest) :]

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        with _time_for(self._socket, timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
            return _Stream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname))

    def get_extra_info(self, info: str) -> Any:
        """Return ``is_readable``: data on an idle connection means that it was closed."""
        if info != "is_readable":
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return bool(selector.select(0))


class AsyncTransport(httpx.AsyncBaseTransport):
    """A connection pool for asyncio that leaves no socket open when a call is cancelled.

    Args:
        url: Address of the service; a proxy that the environment sets for it is used, as httpx does.
    """

    def __init__(self, url: httpx.URL) -> None:
        """Open no connection yet."""
        self._pool = httpcore.AsyncConnectionPool(network_backend=_AsyncBackend(), **_pool_options(url))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return its response, whose body is not read yet."""
        with _errors_of_httpx():
            response = await self._pool.handle_async_request(_request_of_httpcore(request, request.extensions))
        return httpx.Response(response.status, headers=response.headers, stream=_AsyncChunks(response))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


class _AsyncChunks(httpx.AsyncByteStream):
    """The body of a reply as a stream."""

    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, AsyncIterable)
        with _errors_of_httpx():
            async for chunk in self._response.stream:
                yield chunk

    async def aclose(self) -> None:
        await self._response.aclose()


class _AsyncBackend(httpcore.AsyncNetworkBackend):
    """Opens connections as httpcore does."""

    def __init__(self) -> None:
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(self, *address: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return _AsyncStream(await self._backend.connect_tcp(*address, **options))

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


class _AsyncStream(httpcore.AsyncNetworkStream):
    """A connected socket, which is closed when agreeing on TLS fails or is cancelled."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _AsyncStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        except BaseException:
            await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _pool_options(url: httpx.URL) -> dict[str, Any]:
    """Return the arguments of httpcore's connection pools."""
    return {
        "ssl_context": _trusted(url),
        "proxy": _proxy(url),
        "max_connections": LIMITS.max_connections,
        "max_keepalive_connections": LIMITS.max_keepalive_connections,
        "keepalive_expiry": LIMITS.keepalive_expiry,
    }


def _request_of_httpcore(request: httpx.Request, extensions: dict[str, Any]) -> httpcore.Request:
    """Return a request in the form of httpcore."""
    url = request.url
    return httpcore.Request(
        request.method,
        httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions=extensions,
    )


@contextmanager
def _time_for(
    connection: socket.socket, end_s: float | None, late: type[Exception], broken: type[Exception], share: int = 1
) -> Iterator[None]:
    """Limit a socket operation to the time until ``end_s``, or a share of it, and raise httpcore's errors."""
    seconds = None if end_s is None else (end_s - time.monotonic()) / share
    if seconds is not None and seconds <= 0:
        raise late("the time is over")
    try:
        connection.settimeout(seconds)
        yield
    except TimeoutError as error:
        raise late(str(error)) from error
    except OSError as error:
        raise broken(str(error)) from error


@contextmanager
def _errors_of_httpx() -> Iterator[None]:
    """Raise httpcore's errors as those of httpx, which have the same names."""
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
        kind: type[httpx.RequestError] = getattr(httpx, type(error).__name__)
        raise kind(str(error)) from error


def _proxy(url: httpx.URL) -> httpcore.Proxy | None:
    """Return the proxy that the environment sets for a URL, or ``None``."""
    address = urllib.request.getproxies().get(url.scheme)
    if address is None or urllib.request.proxy_bypass(url.host):
        return None
    proxy = httpx.Proxy(address)
    return httpcore.Proxy(str(proxy.url), proxy.raw_auth)
