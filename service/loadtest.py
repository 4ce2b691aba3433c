"""``hessquik bench``: a closed-loop load test of a running service with fast clients.

Each client sends its next request when it has received the reply. Only the client's packages are needed; httptools
and uvloop, if they are installed, make the clients faster.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import re
import ssl
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast
from urllib.parse import quote, urlsplit

import h11
import httpx
import numpy as np
import safetensors.numpy

from hessquik_client import Client, ClientError
from hessquik_client.messages import SAFETENSORS
from hessquik_client.quantities import DIRECTIONAL, QUANTITIES

try:
    import httptools
except ImportError:
    httptools = None  # type: ignore[assignment]

__all__ = ["Load", "Tally", "arguments", "build_load", "main", "run"]

#: Most different requests, sent in turn so that replies cannot be cached, and most bytes of them.
MAX_BODIES, MAX_BODIES_BYTES = 256, 32 << 20
#: Time after the end for answers that are still to come, and for a connection to be made.
LINGER_S = 10.0
#: Seconds that a client waits after a failure before it reconnects.
PAUSE_S = 0.1
#: Time after which the metrics have the batches that are answered.
REPORTED_S = 0.75
#: Time between looks at the tally.
TICK_S = 0.25


@dataclass(frozen=True)
class Load:
    """The requests of a load test, and their address.

    Attributes:
        url: Scheme, host and port.
        requests: The bytes of whole requests, sent in turn.
        rows: Points in each request.
        clients: Number of connections.
        seconds: Time during which requests are started.
    """

    url: str
    requests: Sequence[bytes]
    rows: int
    clients: int
    seconds: float


@dataclass
class Tally:
    """The results of a load test.

    Attributes:
        latencies_s: Time from the first byte sent to the last received, of every successful request.
        errors: Number of each error: a code of the service, ``status_…``, ``connection_lost`` or ``no_answer``.
        received_bytes: Bytes of the bodies received.
        began_s: Time of the first request, on the clock of :func:`time.perf_counter`.
        ended_s: Time of the last reply.
    """

    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    received_bytes: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        """Return the time from the first request to the last reply."""
        return max(self.ended_s - self.began_s, 1e-9)

    @property
    def answers(self) -> int:
        """Return the number of successful requests."""
        return len(self.latencies_s)

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the latencies in milliseconds; NaN if there are none."""
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
    """Return a load of requests at random points within the model's bounds, or within ±1 if it has none.

    Args:
        url: Address of the service.
        facts: The reply of ``GET /v1/models/{model}``.
        quantities: The quantities to request.
        clients: Number of connections.
        rows: Points in each request.
        seconds: Time during which requests are started.
        is_binary: Whether request and reply bodies are safetensors.
        api_key: API key that is sent with each request.
    """
    d = facts["d"]
    metadata = facts.get("metadata") or {}
    lower, upper = (
        np.broadcast_to(np.asarray(metadata.get(name) or default, dtype=np.float64), (d,))
        for name, default in (("lower_bounds", -1.0), ("upper_bounds", 1.0))
    )
    parts, media_type = urlsplit(url), SAFETENSORS if is_binary else "application/json"
    path = f"{parts.path.rstrip('/')}/v1/models/{quote(facts['name'], safe='')}/evaluate"
    path += f"?quantities={','.join(quantities)}" if is_binary else ""
    authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: {media_type}\r\n"
        f"accept: {media_type}\r\n{authorization}content-length: "
    )
    random = np.random.default_rng(0)
    requests = []
    for _ in range(min(MAX_BODIES, max(2, MAX_BODIES_BYTES // (rows * d * 20)))):
        arrays = {"inputs": lower + random.random((rows, d)) * (upper - lower)}
        if not DIRECTIONAL.isdisjoint(quantities):
            arrays["directions"] = random.standard_normal((1, d))
        if is_binary:
            body = safetensors.numpy.save({name: array.astype(facts["dtype"]) for name, array in arrays.items()})
        else:
            lists = {name: array.tolist() for name, array in arrays.items()}
            body = json.dumps({**lists, "quantities": list(quantities)}).encode()
        requests.append(f"{head}{len(body)}\r\n\r\n".encode() + body)
    return Load(url, requests, rows, clients, seconds)


async def run(load: Load, on_tick: Callable[[Tally], None] | None = None) -> Tally:
    """Run a load test and return its results.

    Args:
        load: The requests.
        on_tick: Called periodically with the results so far.
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


class _Client(asyncio.Protocol):
    """One client: a connection, renewed when it is lost, and the callbacks of its parser of replies."""

    def __init__(self, load: Load, tally: Tally, numbers: count[int], stop_s: float) -> None:
        self._load = load
        self._tally = tally
        self._numbers = numbers
        self._stop_s = stop_s
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[None] | None = None
        self._problem = b""

    async def run(self) -> None:
        """Send requests until the time is over, and wait for the last reply."""
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
        """Connect and send requests, until the time is over or the connection fails."""
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
        """End the current connection, with an error if it failed."""
        if self._answer is not None and not self._answer.done():
            if error is None:
                self._answer.set_result(None)
            else:
                self._answer.set_exception(error)

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser: Any = _SlowParser(self) if httptools is None else httptools.HttpResponseParser(self)
        self._send()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except _PARSE_ERRORS:
            self._finish(ConnectionError("expected an HTTP reply"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(ConnectionError("the connection was lost"))

    # Called by the parser.

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


class _SlowParser:
    """A parser of replies by h11, with the interface of httptools' parser.

    Args:
        client: The client, whose callbacks are called with bodies and at the end of a reply.
    """

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._begin()

    def _begin(self) -> None:
        """Prepare for the reply to a new request."""
        self._connection = h11.Connection(h11.CLIENT)
        self._connection.send(h11.Request(method="POST", target="/", headers=[("host", "any")]))
        self._connection.send(h11.EndOfMessage())
        self._status = 0

    def feed_data(self, data: bytes) -> None:
        """Parse bytes of a reply."""
        self._connection.receive_data(data)
        while True:
            match event := self._connection.next_event():
                case h11.Response():
                    self._status = event.status_code
                case h11.Data():
                    self._client.on_body(bytes(event.data))
                case h11.EndOfMessage():
                    self._client.on_message_complete()
                    self._begin()
                    return
                case h11.NEED_DATA | h11.PAUSED | h11.ConnectionClosed():
                    return

    def get_status_code(self) -> int:
        """Return the status of the reply."""
        return self._status

    def should_keep_alive(self) -> bool:
        """Return whether the connection may be used again."""
        return self._connection.their_state is h11.DONE


#: The errors of a parser for bytes that are no reply.
_PARSE_ERRORS = (h11.RemoteProtocolError, *(() if httptools is None else (httptools.HttpParserError,)))


def _code(status: int, problem: bytes) -> str:
    """Return the error code in a reply's problem details, or its status."""
    try:
        return str(json.loads(problem)["code"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"status_{status}"


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        "hessquik bench", description="Put load on a running service and show how it bears it."
    )
    parser.add_argument("url", help="where the service is, such as http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="name of the model to ask")
    parser.add_argument(
        "--quantities",
        type=_quantities,
        default="value,gradient,hessian",
        help="quantities to ask for, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--clients", type=_from(1, int), default=1, help="connections, each with one request at a time (1)"
    )
    parser.add_argument("--rows", type=_from(1, int), default=1, help="points in a request (1)")
    parser.add_argument("--seconds", type=_from(0.1, float), default=10.0, help="how long requests are sent (10)")
    parser.add_argument("--binary", action="store_true", help="safetensors instead of JSON, both ways")
    key = os.environ.get("HESSQUIK_API_KEY") or os.environ.get("HESSQUIK_KEY")
    parser.add_argument("--api-key", default=key, help="key to send; HESSQUIK_API_KEY, or HESSQUIK_KEY, if not given")
    return parser


def main(given: Sequence[str]) -> int:
    """Run the command, and return its exit status: 1 if anything failed."""
    options = arguments().parse_args(given)
    try:
        with Client(options.url, api_key=options.api_key) as client:
            facts = client.model(options.model).describe()
    except (ClientError, ValueError) as error:
        sys.stderr.write(f"hessquik: {error}\n")
        return 1
    load = build_load(
        options.url,
        facts,
        quantities=options.quantities,
        clients=options.clients,
        rows=options.rows,
        seconds=options.seconds,
        is_binary=options.binary,
        api_key=options.api_key,
    )
    on_tick = _show if sys.stderr.isatty() else None
    before = _busy_s(options.url, options.api_key)
    try:
        import uvloop
    except ImportError:
        tally = asyncio.run(run(load, on_tick))
    else:
        tally = uvloop.run(run(load, on_tick))
    time.sleep(REPORTED_S)
    after = _busy_s(options.url, options.api_key)
    busy_s = [after[worker] - before[worker] for worker in after if after[worker] >= before.get(worker, math.inf)]
    shown = {
        "requests": f"{tally.answers} answered, {tally.errors.total()} failed",
        "requests/s": f"{tally.answers / tally.elapsed_s:.1f}",
        "rows/s": f"{tally.answers * options.rows / tally.elapsed_s:.1f}",
        "received": f"{tally.received_bytes / tally.elapsed_s / 1e6:.2f} MB/s",
        **{f"p{percent}": f"{tally.percentile_ms(percent):.3f} ms" for percent in (50, 90, 99)},
        **({"devices busy": f"{sum(busy_s) / len(busy_s) / tally.elapsed_s:.0%}"} if busy_s else {}),
        **{f"error {code}": str(times) for code, times in tally.errors.most_common()},
    }
    if on_tick is not None:
        sys.stderr.write("\r\033[K")
    width = max(map(len, shown))
    sys.stdout.write("".join(f"{name:<{width}} │ {text}\n" for name, text in shown.items()))
    return 1 if tally.errors or not tally.answers else 0


def _busy_s(url: str, api_key: str | None) -> dict[tuple[str, str], float]:
    """Return the time that each worker's device has computed; nothing if the metrics cannot be read.

    A worker is known by its number and the start of its front end, which behind a balancer may be another each time.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        text = httpx.get(f"{url.rstrip('/')}/metrics", headers=headers).raise_for_status().text
    except httpx.HTTPError:
        return {}
    (start,) = re.findall(r"^process_start_time_seconds (\S+)$", text, flags=re.M) or [""]
    busy_s = re.findall(r'^hessquik_device_busy_seconds_total{worker="(\d+)"} (\S+)$', text, flags=re.M)
    return {(start, worker): float(seconds) for worker, seconds in busy_s}


def _show(tally: Tally) -> None:
    """Print the progress of a load test on one line, which overwrites the last."""
    elapsed_s = time.perf_counter() - tally.began_s
    rate, p50_ms, failed = tally.answers / tally.elapsed_s, tally.percentile_ms(50), tally.errors.total()
    sys.stderr.write(f"\r\033[K{elapsed_s:.0f} s   {rate:.0f} requests/s   p50 {p50_ms:.2f} ms   {failed} failed")


def _quantities(listed: str) -> list[str]:
    names = [name.strip() for name in listed.split(",")]
    if not set(names) <= set(QUANTITIES):
        raise argparse.ArgumentTypeError(f"expected names out of {', '.join(QUANTITIES)}, got {listed}")
    return names


def _from(least: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """Return a parser of command-line numbers that are at least ``least``."""

    def number(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"expected a number greater than or equal to {least}, got {text}")
        return value

    return number
