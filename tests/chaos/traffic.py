"""A load generator that checks every number and counts how each request ends.

Every request has an expected reply, computed in this process. The bits of a row do not depend on the other rows, so
every reply with status 200 must equal the expected one byte for byte. The expected replies are compared with
automatic differentiation when they are created.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import uvloop

from hessquik import storage
from hessquik.ensemble import evaluator_of
from service.codecs import json_rows
from service.routes.derivatives import encode_json
from tests.oracle import derivatives

#: float64 leaves 1e-16 per operation, and a network has some hundreds in a row.
TOLERANCE = 1e-10
#: More than the queue of the overloaded server holds, so that the surplus is refused.
FLOOD_CONNECTIONS = 200
QUANTITIES = ("value", "gradient", "hessian", "laplacian")


@dataclass(frozen=True)
class Question:
    """The bytes of a request, and the body of its expected reply."""

    request: bytes
    answer: bytes


def http_post(path: str, body: bytes, deadline_ms: int = 30_000) -> bytes:
    """Return the bytes of a POST request on a keep-alive connection."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nX-Deadline-Ms: {deadline_ms}\r\n\r\n"
    )
    return head.encode() + body


def questions(folder: Path, count: int, seed: int, rows: tuple[int, ...] = (1, 1, 1, 2, 7, 20)) -> list[Question]:
    """Return random requests to the models of a folder, with their expected replies.

    Raises:
        AssertionError: an expected reply does not agree with automatic differentiation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers
    found = []
    try:
        for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
            saved = storage.parse(path.read_bytes())
            random_ = np.random.default_rng([seed, number])
            lower, upper = (np.array(saved.metadata[key]) for key in ("lower_bounds", "upper_bounds"))
            evaluate = evaluator_of(saved.network, dtype=torch.float64)
            x = random_.uniform(lower, upper, (64, len(lower)))
            value, gradient, hessian = derivatives(saved.network.double(), torch.from_numpy(x))
            laplacian = hessian.diagonal(dim1=1, dim2=2).sum(-1)
            truth = dict(zip(QUANTITIES, (value, gradient, hessian, laplacian), strict=True))
            # Each asked alone, as the questions do: beside a Hessian, a Laplacian may be summed in another order.
            stored = {name: getattr(evaluate(torch.from_numpy(x), (name,)), name) for name in QUANTITIES}
            for name in QUANTITIES:
                error = (stored[name] - truth[name]).abs().max() / truth[name].abs().max()
                assert float(error) <= TOLERANCE, (path.stem, name, float(error))
            for index in range(count):
                quantity = QUANTITIES[index % len(QUANTITIES)]
                chosen = random_.integers(0, len(x), rows[index // len(QUANTITIES) % len(rows)])
                answers = {quantity: [json_rows(stored[quantity].numpy()[chosen])]}
                body = json.dumps({"inputs": x[chosen].tolist(), "dtype": "float64"}).encode()
                request = http_post(f"/v1/models/{path.stem}/{quantity}", body)
                found.append(Question(request, b"".join(encode_json(path.stem, 1, answers, is_single=False))))
    finally:
        torch.set_num_threads(threads)
    random.Random(seed).shuffle(found)
    return found


@dataclass
class Ledger:
    """Counts of requests by outcome; each request is counted once."""

    sent: int = 0
    right: int = 0
    wrong: int = 0
    refused: int = 0
    failed: int = 0
    expired: int = 0
    malformed: int = 0
    cancelled: int = 0
    closed: int = 0
    lost: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    refusal_seconds: list[float] = field(default_factory=list)
    wrong_answers: list[bytes] = field(default_factory=list)

    def balances(self) -> bool:
        """Return whether every request that was sent has one end."""
        ends = self.right + self.wrong + self.refused + self.failed + self.expired
        return self.sent == ends + self.malformed + self.cancelled + self.closed + self.lost

    def note(self, status: int, body: bytes, question: Question | None, seconds: float) -> None:
        """Count an answer."""
        if status == 200:
            if question is not None and body == question.answer:
                self.right += 1
                self.seconds.append(seconds)
            else:
                self.wrong += 1
                self.wrong_answers.append(body)
        elif status == 503:
            self.refused += 1
            self.refusal_seconds.append(seconds)
        elif status == 504:
            self.expired += 1
        elif status < 500 and question is None:
            self.malformed += 1
        else:
            self.failed += 1
        if status != 200:
            self.codes[f"{status} {json.loads(body).get('code')}" if body else str(status)] += 1

    def __str__(self) -> str:
        """Return the result as one line."""
        names = ("sent", "right", "wrong", "refused", "failed", "expired", "malformed", "cancelled", "closed", "lost")
        counts = ", ".join(
            f"{name} {getattr(self, name)}" for name in names if getattr(self, name) or name == "wrong"
        )
        return counts + (f"; p50 {1e3 * self.p(50):.1f} ms, p99 {1e3 * self.p(99):.1f} ms" if self.seconds else "")

    def p(self, percentile: float) -> float:
        """Return a percentile of the latencies of right answers, in seconds."""
        return float(np.percentile(self.seconds, percentile)) if self.seconds else 0.0


class Connection(asyncio.Protocol):
    """A client's connection: one request at a time, no library in between."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._waiter: asyncio.Future[tuple[int, dict[bytes, bytes], bytes]] | None = None
        self.transport: asyncio.Transport

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Open a new connection."""
        _, protocol = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        stop = end + 4 + int(headers[b"content-length"])
        if len(self._buffer) >= stop and self._waiter is not None and not self._waiter.done():
            answer = int(lines[0][9:12]), headers, bytes(self._buffer[end + 4 : stop])
            del self._buffer[:stop]
            self._waiter.set_result(answer)
            if headers.get(b"connection") == b"close":
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionResetError())

    async def ask(self, request: bytes, timeout_s: float) -> tuple[int, dict[bytes, bytes], bytes]:
        """Send a request and wait for its answer."""
        if self.transport.is_closing():
            raise ConnectionResetError
        self._waiter = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await asyncio.wait_for(self._waiter, timeout_s)

    def abort(self) -> None:
        """Break the connection off."""
        self.transport.abort()


@dataclass
class Traffic:
    """Closed-loop clients: each sends the next request when it has received the reply.

    Attributes:
        port: Port of the service.
        questions: The requests, which are sent in random order.
        ledger: Counts of the outcomes.
        disconnects: Share of requests whose connection is closed before the reply.
        malformed: Share of requests that are malformed.
        retries: Number of retries of a refused request before it counts as refused.
        timeout_s: Time after which a reply counts as lost: the deadline and a second.
    """

    port: int
    questions: list[Question]
    ledger: Ledger = field(default_factory=Ledger)
    disconnects: float = 0.0
    malformed: float = 0.0
    retries: int = 0
    timeout_s: float = 31.0
    seed: int = 0
    is_over: Callable[[], bool] = lambda: False

    async def run(self, clients: int, requests: int) -> Ledger:
        """Send ``requests`` requests from ``clients`` concurrent clients, and return the counts."""
        self._left = requests
        await asyncio.gather(*(self._client(random.Random(self.seed * 1000 + number)) for number in range(clients)))
        return self.ledger

    async def _client(self, random_: random.Random) -> None:
        connection: Connection | None = None
        while self._left > 0 and not self.is_over():
            self._left -= 1
            question = random_.choice(self.questions)
            self.ledger.sent += 1
            try:
                connection = connection or await Connection.open(self.port)
                chance = random_.random()
                if chance < self.disconnects:
                    connection.transport.write(question.request)
                    await asyncio.sleep(random_.random() * 0.01)
                    connection.abort()
                    connection = None
                    self.ledger.cancelled += 1
                elif chance < self.disconnects + self.malformed:
                    await self._ask(connection, _spoil(question.request, random_), None)
                else:
                    await self._ask(connection, question.request, question)
            except TimeoutError:
                self.ledger.lost += 1
                if connection is not None:
                    connection.abort()
            except OSError:
                self.ledger.closed += 1
                connection = None
            if connection is not None and connection.transport.is_closing():
                connection = None
        if connection is not None:
            connection.abort()

    async def _ask(self, connection: Connection, request: bytes, question: Question | None) -> None:
        began = time.perf_counter()
        for attempt in range(self.retries + 1):
            status, headers, body = await connection.ask(request, self.timeout_s)
            if status != 503 or attempt == self.retries:
                break
            assert headers[b"retry-after"] == b"1"
            await asyncio.sleep(0.05 * 2**attempt)
        self.ledger.note(status, body, question, time.perf_counter() - began)


def _spoil(request: bytes, random_: random.Random) -> bytes:
    """Return a request with a malformed body."""
    return request.replace(b"[", random_.choice([b"(", b'"', b"{", b"]"]), 1)


async def flood(port: int, asked: list[Question], rate: float, seconds: float, ledger: Ledger) -> None:
    """Send requests at a constant rate without waiting for replies, over at most :data:`FLOOD_CONNECTIONS`."""
    idle = [await Connection.open(port) for _ in range(FLOOD_CONNECTIONS)]
    tasks: set[asyncio.Task[None]] = set()

    async def one(question: Question) -> None:
        ledger.sent += 1
        try:
            connection = idle.pop()
            began = time.perf_counter()
            status, headers, body = await connection.ask(question.request, 31)
            if status == 503:
                assert headers[b"retry-after"] == b"1"
            ledger.note(status, body, question, time.perf_counter() - began)
            if not connection.transport.is_closing():
                idle.append(connection)
        except TimeoutError:
            ledger.lost += 1
        except OSError:
            ledger.closed += 1

    loop = asyncio.get_running_loop()
    start, number = loop.time(), 0
    while (now := loop.time()) < start + seconds:
        while number < (now - start) * rate:
            number += 1
            if idle:
                task = loop.create_task(one(asked[number % len(asked)]))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(0)  # it takes its connection
        await asyncio.sleep(0.002)
    while tasks:
        await asyncio.sleep(0.01)
    for connection in idle:
        connection.abort()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end on a fast loop."""

    async def to_its_end() -> Any:
        try:
            return await work
        finally:
            await asyncio.sleep(0.1)  # connections that were broken off are closed in the next turns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(to_its_end())
