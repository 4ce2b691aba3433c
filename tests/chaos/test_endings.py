"""The front end keeps nothing of requests, however they end, each on its own connection."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable

import psutil
import pytest

from tests.chaos.conftest import Start
from tests.live import LiveServer
from tests.raw import post, receive_all
from tests.whole import Note, choose

#: Requests that end in each way, and the growth that they may cause together.
REQUESTS = choose(12, 10_000)
GROWTH_BYTES = choose(12, 32) << 20
WARM_UP = choose(8, 40)
#: So much of every request is kept by the control.
LEAK_BYTES = 1 << 10
PATH, KEEP = "/v1/models/peaks/evaluate", {"Connection": "keep-alive"}


def body(rows: int) -> bytes:
    document = {"inputs": [[0.123456789, -0.2]] * rows, "quantities": ["value", "gradient", "hessian"]}
    return json.dumps(document).encode()


#: Most requests are small, as in life; every fourth is read slice by slice; the large ones have replies of megabytes.
SMALL, LONG, LARGE = body(1), body(3_000), body(6_000)


def closed(connection: socket.socket, given: bytes) -> None:
    """Take the reply, and leave."""
    connection.sendall(post(PATH, given))
    assert receive_all(connection).startswith(b"HTTP/1.1 200")


def reset(connection: socket.socket, given: bytes) -> None:
    """Reset the connection instead of reading the reply."""
    connection.sendall(post(PATH, given, **KEEP))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def late(connection: socket.socket, given: bytes) -> None:
    """Send a request with a deadline that cannot be met."""
    connection.sendall(post(PATH, given, X_Deadline_Ms="1"))
    assert receive_all(connection)[9:12] in (b"504", b"200")


def refused(connection: socket.socket, given: bytes) -> None:
    """Ask what there is not, which the head says already."""
    connection.sendall(post("/v1/models/peaks/nothing", given))
    assert receive_all(connection).startswith(b"HTTP/1.1 404")


def malformed(connection: socket.socket, given: bytes) -> None:
    """Send a body that is not JSON, or a valid request followed by bytes that are not HTTP."""
    if given is LONG:
        connection.sendall(post(PATH, given[:-40]))
        assert receive_all(connection).startswith((b"HTTP/1.1 400", b"HTTP/1.1 422"))
        return
    connection.sendall(post(PATH, given, **KEEP) + b"nonsense " + bytes(5000) + b"\r\n\r\n")
    assert receive_all(connection).count(b"x-request-id") == 2


def disconnected(connection: socket.socket, given: bytes) -> None:
    """Leave in the middle of a body."""
    connection.sendall(post(PATH, given, **KEEP)[:-9])


def pipelined(connection: socket.socket, given: bytes) -> None:
    """Send several requests at once, and leave after a part of the replies."""
    connection.sendall(post(PATH, given, **KEEP) * 3)
    connection.recv(100)


def large(connection: socket.socket, given: bytes) -> None:
    """Take a reply of megabytes, or a part of it."""
    connection.sendall(post(PATH, LARGE))
    if given is LONG:
        receive_all(connection)
    else:
        connection.recv(1 << 16)


ENDINGS = (closed, reset, late, refused, malformed, disconnected, pipelined, large)


def end(server: LiveServer, ending: Callable[[socket.socket, bytes], None], times: int) -> None:
    """Send requests that end in one way."""
    for number in range(times):
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            ending(connection, SMALL if number % 4 else LONG)


def growth(server: LiveServer, note: Note) -> int:
    """Return by how many bytes the front grows; say after which endings."""
    front = psutil.Process(server.process.pid)

    def resident() -> int:
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s and any(
            one.laddr.port == server.port and one.raddr for one in front.net_connections("tcp")
        ):
            time.sleep(0.05)
        return int(front.memory_info().rss)

    for ending in ENDINGS:
        end(server, ending, WARM_UP)
    first = last = resident()
    shares = []
    for ending in ENDINGS:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            end(server, ending, REQUESTS)
        last, before = resident(), last
        shares.append(f"{ending.__name__} {(last - before) / 2**20:+.1f}")
    note(f"{REQUESTS} of each: {(last - first) / 2**20:+.1f} MiB ({', '.join(shares)})")
    return last - first


def test_requests_leave_no_memory_behind_however_they_end(start: Start, note: Note) -> None:
    assert growth(start(), note) <= GROWTH_BYTES


@pytest.mark.whole
def test_what_is_left_behind_is_seen(start: Start, note: Note, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a front end with a planted leak per request is found."""
    monkeypatch.setenv("CHAOS_LEAK_BYTES", str(LEAK_BYTES))
    assert growth(start("leaky"), note) > GROWTH_BYTES
