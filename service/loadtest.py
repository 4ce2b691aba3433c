"""Load on a running service: lean clients in a closed loop, each sending its next request when it has its answer."""

from __future__ import annotations

import asyncio
import ssl
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast
from urllib.parse import quote, urlsplit

import httptools
import numpy as np
import orjson
import safetensors.numpy

from service.codecs import JSON, SAFETENSORS
from service.quantities import DIRECTIONAL
from service.wire import Array

__all__ = ["Load", "Tally", "build_load", "run"]

#: Different bodies that the clients take in turns, so that no answer can be remembered: many, but no more bytes.
MAX_BODIES, MAX_BODIES_BYTES = 256, 32 << 20
#: Time after the end for answers that are still to come, and for a connection to be made.
LINGER_S = 10.0
#: What a client waits after a failure: it shows the failure, and is no attack.
PAUSE_S = 0.1
#: Time between looks at the tally.
TICK_S = 0.25


@dataclass(frozen=True)
class Load:
    """What is sent where.

    Attributes:
        url: Scheme, host and port.
        requests: Whole requests as they go over the wire, taken in turns.
        rows: Points in each.
        clients: Connections.
        seconds: How long requests are begun.
    """

    url: str
    requests: Sequence[bytes]
    rows: int
    clients: int
    seconds: float


@dataclass
class Tally:
    """What came back.

    Attributes:
        latencies_s: From the first byte sent to the last received, of every right answer.
        errors: How often each: a code of the service, ``status_…``, ``connection_lost`` or ``no_answer``.
        received_bytes: Of bodies.
        began_s: When the first request was sent, on :func:`time.perf_counter`'s clock.
        ended_s: When the last answer came.
    """

    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    received_bytes: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        """From the first request to the last answer."""
        return max(self.ended_s - self.began_s, 1e-9)

    @property
    def answers(self) -> int:
        """Right answers."""
        return len(self.latencies_s)

    def percentile_ms(self, percent: float) -> float:
        """The latency that ``percent`` of the answers did not exceed; NaN if there are none."""
        return float(np.percentile(self.latencies_s, percent)) * 1e3 if self.latencies_s else float("nan")


def build_load(
    url: str,
    facts: Mapping[str, Any],
    *,
    quantities: Sequence[str],
    clients: int,
    rows: int,
    seconds: float,
    is_binary: bool,
    api_key: str | None = None,
) -> Load:
    """Requests at random points within the model's bounds, or within ±1 if it has none.

    Args:
        url: Where the service is.
        facts: What ``GET /v1/models/{model}`` says of it.
        quantities: What is asked.
        clients: Connections.
        rows: Points in a request.
        seconds: How long requests are begun.
        is_binary: Whether bodies are safetensors, both ways.
        api_key: Sent with each request.
    """
    d = facts["d"]
    metadata = facts.get("metadata") or {}
    lower, upper = (
        np.broadcast_to(np.asarray(metadata.get(name) or default, dtype=np.float64), (d,))
        for name, default in (("lower_bounds", -1.0), ("upper_bounds", 1.0))
    )
    random = np.random.default_rng(0)
    bodies = min(MAX_BODIES, max(2, MAX_BODIES_BYTES // (rows * d * 20)))
    requests = []
    for _ in range(bodies):
        arrays = {"inputs": lower + random.random((rows, d)) * (upper - lower)}
        if not DIRECTIONAL.isdisjoint(quantities):
            arrays["directions"] = random.standard_normal((1, d))
        requests.append(_request(url, facts["name"], facts["dtype"], quantities, arrays, is_binary, api_key))
    return Load(url, requests, rows, clients, seconds)


async def run(load: Load, on_tick: Callable[[Tally], None] | None = None) -> Tally:
    """Send the load and count what comes back.

    Args:
        load: What is sent.
        on_tick: Called now and then with the tally so far.
    """
    tally = Tally(began_s=time.perf_counter())
    tally.ended_s = tally.began_s
    stop_s = tally.began_s + load.seconds
    numbers = count()
    clients = [_Client(load, tally, numbers, stop_s) for _ in range(load.clients)]
    work = asyncio.gather(*(client.run() for client in clients))
    while not work.done():
        await asyncio.wait([work], timeout=TICK_S)
        if on_tick is not None:
            on_tick(tally)
    await work
    return tally


def _request(
    url: str,
    model: str,
    dtype: str,
    quantities: Sequence[str],
    arrays: dict[str, Array],
    is_binary: bool,
    api_key: str | None,
) -> bytes:
    """One request, head and body."""
    path = f"{urlsplit(url).path.rstrip('/')}/v1/models/{quote(model, safe='')}/evaluate"
    if is_binary:
        path += f"?quantities={','.join(quantities)}"
        body = safetensors.numpy.save({name: value.astype(dtype) for name, value in arrays.items()})
    else:
        body = orjson.dumps({**arrays, "quantities": list(quantities)}, option=orjson.OPT_SERIALIZE_NUMPY)
    media_type = SAFETENSORS if is_binary else JSON
    authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\ncontent-type: {media_type}\r\n"
        f"accept: {media_type}\r\n{authorization}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Client(asyncio.Protocol):
    """One connection, made again when it is lost; also what its parser of replies tells."""

    def __init__(self, load: Load, tally: Tally, numbers: count[int], stop_s: float) -> None:
        self._load = load
        self._tally = tally
        self._numbers = numbers
        self._stop_s = stop_s
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[None] | None = None
        self._problem = b""

    async def run(self) -> None:
        """Send until it is time to stop, and wait for the last answer."""
        self._loop = asyncio.get_running_loop()
        while time.perf_counter() < self._stop_s:
            try:
                async with asyncio.timeout(max(self._stop_s - time.perf_counter(), 0.0) + LINGER_S):
                    await self._converse()
            except TimeoutError:
                self._tally.errors["no_answer"] += 1
            except OSError:
                self._tally.errors["connection_lost"] += 1
            finally:
                self._close()
            if time.perf_counter() < self._stop_s:
                await asyncio.sleep(PAUSE_S)

    async def _converse(self) -> None:
        """Connect and take turns; returns at the end, or after a failure."""
        parts = urlsplit(self._load.url)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if context else 80)
        self._answer = self._loop.create_future()
        await self._loop.create_connection(lambda: self, parts.hostname or "", port, ssl=context)
        await self._answer

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def _send(self) -> None:
        requests = self._load.requests
        self._problem = b""
        self._sent_s = time.perf_counter()
        assert self._transport is not None
        self._transport.write(requests[next(self._numbers) % len(requests)])

    def _finish(self, error: Exception | None = None) -> None:
        """End the conversation."""
        if self._answer is not None and not self._answer.done():
            if error is None:
                self._answer.set_result(None)
            else:
                self._answer.set_exception(error)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser: Any = httptools.HttpResponseParser(self)
        self._send()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._finish(ConnectionError("expected an HTTP reply"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(ConnectionError("the connection was lost"))

    # What the parser calls.

    def on_body(self, body: bytes) -> None:
        self._tally.received_bytes += len(body)
        if self._parser.get_status_code() != 200:
            self._problem += body

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self._tally.ended_s = now
        status = self._parser.get_status_code()
        if status != 200:
            self._tally.errors[_code(status, self._problem)] += 1
            self._finish()
            return
        self._tally.latencies_s.append(now - self._sent_s)
        if now < self._stop_s and self._parser.should_keep_alive():
            self._send()
        else:
            self._finish()


def _code(status: int, problem: bytes) -> str:
    """The code in a reply's problem details, or its status."""
    try:
        return str(orjson.loads(problem)["code"])
    except (ValueError, KeyError, TypeError):
        return f"status_{status}"
