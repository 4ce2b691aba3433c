"""Hostile bodies leak no memory: the service's memory is compared before and after."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.live import LiveServer
from tests.raw import exchange, post, replies, request
from tests.whole import Note, choose

VALUE = "/v1/models/peaks/value"
MEMORY_BYTES = 8 << 20
BODIES = choose(60, 500)
#: So much of every request is kept by the control.
LEAK_BYTES = 8 * MEMORY_BYTES // BODIES
MIB = 1 << 20


def chunked(body: bytes, size: int) -> bytes:
    """Return a body in chunks of one size."""
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def hostile(random_: random.Random) -> tuple[bytes, set[int]]:
    """Return an invalid request of up to some megabytes, and the statuses that it may get."""
    size = random_.randrange(1, choose(2, 12)) * MIB + random_.randrange(MIB)
    coded = post(VALUE, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    kinds: list[Callable[[], tuple[bytes, set[int]]]] = [
        lambda: (post(VALUE, b"[" * size), {400, 422}),
        lambda: (post(VALUE, b'{"inputs":' + b"[" * 250_000 + b"]" * 250_000 + b"}"), {400, 422}),
        lambda: (post(VALUE, b'{"a":' * (size // 5)), {400, 422}),
        lambda: (post(VALUE, b'{"inputs":[' + b"0," * (size // 2) + b"0]}"), {422}),
        lambda: (post(VALUE, b'{"inputs":[' + b"[]," * (size // 3) + b"[]]}"), {422}),
        lambda: (post(VALUE, b'{"inputs":[[0,' + b"1" * size + b"]]}"), {400, 422}),
        lambda: (post(VALUE, b'{"inputs":"' + b"a" * size + b'"}'), {422}),
        lambda: (post(VALUE, b'{"' + b"a" * size + b'":1}'), {422}),
        lambda: (post(VALUE, b'{"inputs":[0,0],"dtype":"' + b"\\u0000" * (size // 6) + b'"}'), {422}),
        lambda: (post(VALUE, b" " * size), {400}),
        lambda: (post(VALUE, random_.randbytes(size)), {400, 422}),
        lambda: (post(VALUE, b'{"inputs":[[0,0]' + b",[0,null]" * (size // 9) + b"]}"), {422}),
        lambda: (post(VALUE, b'{"inputs":[[0,0]' + b",[0,NaN]" * (size // 16) + b"]}"), {422}),
        lambda: (post(VALUE, random_.randbytes(size), Content_Type="application/x-safetensors"), {400}),
        lambda: (post(VALUE, b"\xff\x0f" + bytes(6) + b"{" * size, Content_Type="application/x-safetensors"), {400}),
        lambda: (post("/v2/models/peaks/infer", b'{"inputs":[' + b"{}," * (size // 3) + b"{}]}"), {400}),
        lambda: (post("/Evaluate", b'{"name":"peaks","input":[[' + b"0," * (size // 2) + b"0]]}"), {400}),
        lambda: (coded + chunked(b" " * (17 * MIB), 65536), {413}),
        lambda: (coded + b"1\r\n \r\n" * choose(100_000, 10**6) + b"0\r\n\r\n", {400}),
        lambda: (coded + chunked(b"[" * (size // 8), 16), {400, 422}),
        lambda: (post(VALUE, b"", Content_Length=str(10**15)), {413}),
        lambda: (post(VALUE, b"\x1f\x8b" + bytes(size), Content_Encoding="gzip"), {415}),
    ]
    return random_.choice(kinds)()


def memory(server: LiveServer) -> int:
    """Return the resident bytes of the front end and the workers."""
    processes = [psutil.Process(server.process.pid), *server.workers()]
    return sum(process.memory_info().rss for process in processes)


def growth(server: LiveServer) -> int:
    """Return the growth of the service over the hostile bodies, each of which has to be refused."""
    random_, refused = random.Random(18), 0
    good = post(VALUE, b'{"inputs":[0.5,0.5]}')
    for _ in range(20):
        assert replies(exchange(server.port, good))[0].status == 200
    before = memory(server)
    for number in range(BODIES):
        data, statuses = hostile(random_)
        if number % 5 == 0:  # broken off
            with (
                socket.create_connection(("127.0.0.1", server.port), 10) as connection,
                contextlib.suppress(ConnectionError),  # refused already
            ):
                connection.sendall(data[: len(data) // 2])
            continue
        answered = replies(exchange(server.port, data))  # none if it was cut off while it was sent
        refused += len(answered)
        assert {reply.status for reply in answered} <= statuses, data[:200]
    assert refused > 0.6 * BODIES
    assert replies(exchange(server.port, good))[0].status == 200
    return memory(server) - before


def test_hostile_bodies_leave_no_memory_behind(server: LiveServer, note: Note) -> None:
    grown = growth(server)
    note(f"{BODIES} hostile bodies: {grown / MIB:+.1f} MiB")
    assert grown <= MEMORY_BYTES
    assert replies(exchange(server.port, request("GET", "/readyz")))[0].status == 200


@pytest.mark.whole
def test_memory_that_is_left_behind_is_caught(
    shipped_models: Path, note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a front end with a planted leak per request is found."""
    monkeypatch.setenv("CHAOS_LEAK_BYTES", str(LEAK_BYTES))
    with LiveServer(shipped_models, command=("-m", "tests.chaos.faulty_serve", "leaky")) as leaky:
        grown = growth(leaky)
    note(f"control: {grown / MIB:+.1f} MiB")
    assert grown > MEMORY_BYTES
