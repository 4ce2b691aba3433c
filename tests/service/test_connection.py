"""A connection over real sockets: every way to send a request, to leave, to be slow and to end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import json
import math
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hessquik_client.errors import InvalidInput, ServiceError
from service.http.connection import MAX_PIPELINED, Connection, Limits, Listener
from service.http.messages import JSON, Budget, Head, Reply, Request
from service.json_reader import read_long_json
from tests.live import ROOT, LiveServer, wait_until
from tests.raw import ask, check_error, exchange, post, receive_all, replies, request
from tests.service.conftest import FAULTY_GROUP
from tests.service.faulty_worker import HELD, SLOW
from tests.service.gate import Gate
from tests.simulation.loop import SimulatedLoop
from tests.whole import IS_WHOLE

VALUE, EVALUATE = "/v1/models/peaks/value", "/v1/models/peaks/evaluate"
BODY = b'{"inputs":[[0.5,0.25],[-1,1]],"quantities":["value","gradient","hessian"],"dtype":"float64"}'
POINT = b'{"inputs":[0.5,0.25]}'
KEEP = {"Connection": "keep-alive"}

pytestmark = FAULTY_GROUP
LIMITS = {"send_timeout_s": 1, "receive_timeout_s": 2, "max_held_bytes": 24 << 20}


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    """Yield a server with short time limits."""
    with LiveServer(ROOT / "models", settings=LIMITS) as live:
        yield live


def connect(live: LiveServer, timeout_s: float = 10.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout_s)


def final(data: bytes) -> list[Any]:
    """Return the replies without interim ones."""
    return replies(data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""))


def chunked(path: str, body: bytes, size: int = 7, *fields: bytes) -> bytes:
    head = post(path, b"", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    trailer = b"".join(field + b"\r\n" for field in fields)
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailer + b"\r\n"


# Parsing.


@pytest.mark.parametrize(
    "data", [post(EVALUATE, BODY), chunked(EVALUATE, BODY, 40, b"X: y")], ids=["length", "chunks"]
)
def test_every_split_of_a_request_gives_the_same_reply(data: bytes) -> None:
    """In process, as there are hundreds: the parts of a request, cut at each of its bytes."""

    async def run() -> list[tuple[bytes, bytes]]:
        seen = []
        for cut in range(1, len(data)):
            application = Echo()
            connection, transport = connected(application)
            connection.data_received(data[:cut])
            connection.data_received(data[cut:])
            (body,) = application.bodies
            seen.append((body, strip(transport.written)))
            connection.connection_lost(None)
        return seen

    seen = asyncio.run(run())
    assert len(seen) == len(data) - 1
    assert {body for body, _ in seen} == {BODY}
    assert len({written for _, written in seen}) == 1


def test_a_request_that_comes_byte_by_byte_is_read(live: LiveServer) -> None:
    whole = ask(live.port, post(EVALUATE, BODY))
    for data in (post(EVALUATE, BODY), chunked(EVALUATE, BODY)):
        with connect(live) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in data:
                connection.sendall(bytes([byte]))
            assert replies(receive_all(connection))[0].body == whole.body


@pytest.mark.parametrize("count", [2, MAX_PIPELINED, 3 * MAX_PIPELINED])
def test_pipelined_requests_are_answered_in_order(live: LiveServer, count: int) -> None:
    bodies = [json.dumps({"inputs": [[0.1 * n, 0.0]] * (1 + n % 5)}).encode() for n in range(count)]
    requests = [post(VALUE, body, **KEEP) for body in bodies]
    found = replies(exchange(live.port, b"".join(requests) + request("GET", "/livez"), 3))
    assert [reply.status for reply in found] == [200] * (count + 1)
    assert [len(reply.json()["value"]) for reply in found[:-1]] == [1 + n % 5 for n in range(count)]


def test_a_body_and_half_of_the_next_head_are_two_requests(live: LiveServer) -> None:
    """The head's limit does not count the body before it."""
    large = post(EVALUATE, BODY.ljust(40_000), **KEEP)
    next_ = post(VALUE, POINT)
    for cut in (1, 20, 60):
        with connect(live) as connection:
            connection.sendall(large + next_[:cut])
            time.sleep(0.1)
            connection.sendall(next_[cut:])
            assert [reply.status for reply in replies(receive_all(connection))] == [200, 200]


@pytest.mark.parametrize("fields", [{}, {"HTTP2_Settings": "AAMAAABkAAQCAAAAAAIAAAAA"}], ids=["plain", "settings"])
@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_an_offer_of_another_protocol_is_ignored(live: LiveServer, protocol: str, fields: dict[str, str]) -> None:
    data = post(VALUE, POINT, Connection="Upgrade, HTTP2-Settings, close", Upgrade=protocol, **fields)
    for pieces in ([data], [data[:50], data[50:]], [data[:-5], data[-5:]]):
        with connect(live) as connection:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.02)
            assert [reply.status for reply in replies(receive_all(connection))] == [200]


def test_an_offer_of_another_protocol_does_not_end_the_connection(live: LiveServer) -> None:
    offer = post(VALUE, POINT, Connection="Upgrade", Upgrade="h2c")
    found = replies(exchange(live.port, offer + post(VALUE, POINT), 3))
    assert [reply.status for reply in found] == [200, 200]


@pytest.mark.parametrize(
    "data",
    [
        post(VALUE, b"", Transfer_Encoding="gzip, chunked").replace(b"Content-Length: 0\r\n", b"") + b"0\r\n\r\n",
        b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET http://x/livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=["gzip, chunked", "HTTP/2.0", "absolute", "CONNECT", "long field", "nonsense"],
)
def test_what_is_not_read_here_is_refused_with_an_id(live: LiveServer, data: bytes) -> None:
    (reply,) = replies(exchange(live.port, data, 3))
    assert (reply.status, reply.headers["connection"]) == (400, "close")
    check_error(reply)
    assert reply.json()["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("filler", [b"a" * (1 << 16), b"X: y\r\n" * 5000], ids=["one field", "many fields"])
def test_an_endless_trailer_is_cut_off(live: LiveServer, filler: bytes) -> None:
    front = psutil.Process(live.process.pid)
    before = front.memory_info().rss

    def send() -> None:
        sent = 0
        with connect(live) as connection, contextlib.suppress(OSError):
            connection.sendall(chunked(VALUE, POINT)[:-2] + b"X: ")
            while sent < 128 << 20:
                connection.sendall(filler)
                sent += len(filler)
        assert sent < 16 << 20

    assert is_smooth(live, send)
    assert front.memory_info().rss - before < 8 << 20


def test_expect_is_answered_before_the_body_is_sent(live: LiveServer) -> None:
    with connect(live) as connection:
        head, _, body = post(VALUE, POINT, Expect="100-continue").partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert replies(receive_all(connection))[0].status == 200
    refused = post("/v1/models/none/nothing", POINT, Expect="100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    (reply,) = replies(exchange(live.port, refused, 3))
    assert (reply.status, reply.headers["connection"]) == (404, "close")


def test_head_has_the_headers_of_get_and_no_body(live: LiveServer) -> None:
    get = replies(exchange(live.port, request("GET", "/v1/models")))[0]
    head = exchange(live.port, request("HEAD", "/v1/models"))
    assert head.endswith(b"\r\n\r\n")
    assert f"content-length: {len(get.body)}\r\n".encode() in head
    assert exchange(live.port, request("HEAD", "/")).startswith(b"HTTP/1.1 200")


def test_http_1_0_closes_unless_asked_to_keep(live: LiveServer) -> None:
    plain = b"GET /livez HTTP/1.0\r\n\r\n"
    assert [reply.headers["connection"] for reply in replies(exchange(live.port, plain * 2, 3))] == ["close"]
    kept = b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    found = replies(exchange(live.port, kept + plain, 3))
    assert [reply.headers["connection"] for reply in found] == ["keep-alive", "close"]


def test_a_wrong_method_is_told_the_right_ones(live: LiveServer) -> None:
    paths = {"/livez": "GET, HEAD", VALUE: "POST", "/v1/models": "GET, HEAD", "/Evaluate": "POST"}
    for path, allowed in paths.items():
        reply = ask(live.port, request("DELETE", path))
        assert (reply.status, reply.headers["allow"]) == (405, allowed)


def test_a_copy_that_is_still_good_has_no_length(live: LiveServer) -> None:
    etag = ask(live.port, request("GET", "/docs")).headers["etag"]
    reply = ask(live.port, request("GET", "/docs", If_None_Match=f'"x", W/{etag}'))
    assert (reply.status, reply.headers.get("content-length"), reply.body) == (304, None, b"")


def test_what_is_accepted_with_quality_zero_is_not_sent(live: LiveServer) -> None:
    plain = ask(live.port, request("GET", "/docs", Accept_Encoding="gzip;q=0, *"))
    assert "content-encoding" not in plain.headers
    packed = ask(live.port, request("GET", "/docs", Accept_Encoding="gzip;q=0.1, identity;q=0"))
    assert packed.headers["content-encoding"] == "gzip"
    assert ask(live.port, post(VALUE, POINT, Accept="application/json;q=0")).status == 406
    assert ask(live.port, post(VALUE, POINT, Accept="*/*, application/json;q=0")).headers["content-type"] == (
        "application/x-safetensors"
    )


def test_parameters_that_would_be_ignored_are_refused(live: LiveServer) -> None:
    for query in ("quantities=hessian", "dtype=float32", "Version=1", "versoin=1"):
        reply = ask(live.port, post(f"{EVALUATE}?{query}", BODY))
        assert reply.status == 422
        check_error(reply)
    assert ask(live.port, post(f"{EVALUATE}?version=1", BODY)).status == 200


# Leaving.


def test_a_client_that_leaves_is_noticed_whatever_the_size_of_its_body(gated: LiveServer, gate: Gate) -> None:
    rows = gated.metric("hessquik_rows_total")
    left = 'hessquik_requests_total{route="/v1/models/{model}/value",status="499"}'
    before = gated.metric(left)
    held, point = b'{"inputs":[%g,0]}' % HELD, POINT
    with connect(gated, 60) as busy, connect(gated) as busier, connect(gated) as busiest:
        busy.sendall(post("/v1/models/peaks/gradient", held, **KEEP))
        with gate.held():
            for connection, action in ((busier, "hessian"), (busiest, "laplacian")):  # a batch each
                connection.sendall(post(f"/v1/models/peaks/{action}", point, **KEEP))
            wait_until(lambda: gated.metric("hessquik_queue_requests") == 3)
            for size in (0, 10_000, 70_000, 300_000, 5_000_000):
                with connect(gated) as leaving:
                    leaving.sendall(post(VALUE, point.ljust(size), **KEEP))
                    wait_until(lambda: gated.metric("hessquik_queue_requests") == 4)
                wait_until(lambda: gated.metric("hessquik_queue_requests") == 3)
            with connect(gated) as leaving:  # before its body is whole
                leaving.sendall(post(VALUE, POINT, **KEEP)[:-3])
            with connect(gated) as leaving:  # with a reset
                leaving.sendall(post(VALUE, point, **KEEP))
                wait_until(lambda: gated.metric("hessquik_queue_requests") == 4)
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wait_until(lambda: gated.metric(left) - before == 7)
        for connection in (busy, busier, busiest):
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert ask(gated.port, post(VALUE, POINT)).status == 200
    assert gated.metric(left) - before == 7
    assert gated.metric("hessquik_rows_total") - rows == 4
    assert gated.metric("hessquik_queue_requests") == 0


def test_a_client_that_only_closes_its_sending_side_is_answered(faulty: LiveServer) -> None:
    for body, count in ((POINT, 1), (b'{"inputs":[%g,0]}' % SLOW, 1), (POINT, 3)):
        with connect(faulty) as connection:
            connection.sendall(post(VALUE, body, **KEEP) * count)
            connection.shutdown(socket.SHUT_WR)
            data = receive_all(connection)
        assert [reply.status for reply in final(data)] == [200] * count


def test_a_pipelining_client_that_leaves_costs_one_request(gated: LiveServer, gate: Gate) -> None:
    rows = gated.metric("hessquik_rows_total")
    left = 'hessquik_requests_total{route="/v1/models/{model}/value",status="499"}'
    before = gated.metric(left)
    with connect(gated) as leaving:
        leaving.sendall(post(VALUE, b'{"inputs":[%g,0]}' % HELD, **KEEP) * 20)
        with gate.held():
            leaving.close()
            wait_until(lambda: gated.metric(left) > before)
    assert ask(gated.port, post(VALUE, POINT)).status == 200
    assert gated.metric("hessquik_rows_total") - rows == 2


# Limits that are met early, and slowness.


def test_a_refusal_before_the_body_is_seen_by_a_client_that_sends_it_whole(live: LiveServer) -> None:
    for _ in range(20):
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
        connection.request("POST", VALUE, bytes(20 << 20), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["code"]) == (413, "body_too_large")
        connection.close()


def test_a_small_body_of_a_refused_request_is_discarded_and_the_connection_kept(live: LiveServer) -> None:
    with connect(live) as connection:
        refused = post("/v1/models/peaks/nothing", b"x" * 5000, **KEEP)
        connection.sendall(refused[:200])
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404")
        connection.sendall(refused[200:] + post(VALUE, POINT))
        assert [reply.status for reply in replies(receive_all(connection))] == [200]


def test_a_request_that_was_refused_early_has_to_become_whole_too(live: LiveServer) -> None:
    """The connection is never without a timer."""
    began = time.monotonic()
    with connect(live) as connection:
        data = post("/v1/models/peaks/nothing", b"x" * 5000, **KEEP)
        connection.sendall(data[:-100])
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404")
        connection.sendall(data[-100:-50])
        assert connection.recv(1) == b""
    assert LIMITS["receive_timeout_s"] - 0.5 < time.monotonic() - began < LIMITS["receive_timeout_s"] + 2


LARGE = json.dumps({"inputs": [[0.1, 0.2]] * 40_000, "quantities": ["value", "gradient", "hessian"]}).encode()


def test_a_steady_slow_reader_gets_all_of_its_reply(live: LiveServer) -> None:
    """It takes several times as long as a client may take nothing."""

    def read() -> bytes:
        with connect(live, 30) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.sendall(post(EVALUATE, LARGE))
            data, began = bytearray(), time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(1 << 16):
                    data += piece
                    if time.monotonic() - began < 2.5 * LIMITS["send_timeout_s"]:
                        time.sleep(0.03)
        assert time.monotonic() - began > 2 * LIMITS["send_timeout_s"]
        return bytes(data)

    # One of a few tries: a machine that is paused for longer than that makes it an unsteady reader.
    data = next(data for data in (read() for _ in range(TRIES)) if is_whole(data))
    (reply,) = replies(data)
    assert len(reply.json()["hessian"]) == 40_000


def is_whole(data: bytes) -> bool:
    """Return whether a reply has all its bytes."""
    head, _, body = data.partition(b"\r\n\r\n")
    return len(body) == int(head.lower().split(b"content-length: ")[1].split(b"\r")[0])


def test_a_reader_that_takes_nothing_is_cut_off(live: LiveServer) -> None:
    before = psutil.Process(live.process.pid).num_fds()
    with connect(live, 30) as connection:
        connection.sendall(post(EVALUATE, LARGE, **KEEP))
        assert connection.recv(12) == b"HTTP/1.1 200"
        end = time.monotonic() + 3 * LIMITS["send_timeout_s"]
        while psutil.Process(live.process.pid).num_fds() > before:
            assert time.monotonic() < end
            time.sleep(0.05)
        data = receive_all(connection)
    assert len(data) < 8 << 20


def test_replies_that_are_not_taken_are_bounded_in_total(live: LiveServer) -> None:
    held = []
    front = psutil.Process(live.process.pid)
    before = front.memory_info().rss
    try:
        for _ in range(12):
            connection = connect(live, 30)
            connection.sendall(post(EVALUATE, LARGE, **KEEP))
            held.append(connection)
        statuses = [connection.recv(12)[9:] for connection in held]
        assert ask(live.port, post(VALUE, POINT)).status == 200, "small requests are answered all the same"
        assert statuses.count(b"200") >= 2
        assert statuses.count(b"503") >= 4
        assert front.memory_info().rss - before < LIMITS["max_held_bytes"] + (64 << 20)
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: ask(live.port, post(EVALUATE, LARGE)).status == 200)  # what was held is given back


@pytest.mark.whole
def test_memory_does_not_grow_with_connections_that_end(live: LiveServer) -> None:
    """Large replies, each on its own connection, ended in each possible way."""
    front = psutil.Process(live.process.pid)

    def work(times: int) -> None:
        for number in range(times):
            with connect(live, 10) as connection:
                match number % 5:
                    case 0:
                        connection.sendall(post(EVALUATE, LARGE))
                        receive_all(connection)
                    case 1:
                        connection.sendall(post(EVALUATE, LARGE, **KEEP))
                        connection.recv(1 << 16)
                    case 2:
                        connection.sendall(post(EVALUATE, LARGE, X_Deadline_Ms="1"))
                        receive_all(connection)
                    case 3:
                        connection.sendall(post(EVALUATE, LARGE, **KEEP)[:-9])
                    case _:
                        small = json.dumps({"inputs": [0.1, 0.2], "directions": [[1, 2]] * 1000}).encode()
                        connection.sendall(post(EVALUATE, small[:-1] + b',"quantities":["hvp"]}'))
                        receive_all(connection)

    work(20)
    before = front.memory_info().rss
    work(60)
    time.sleep(1.2)
    assert front.memory_info().rss - before < 32 << 20


def test_an_idle_connection_holds_nothing_of_its_last_reply(live: LiveServer) -> None:
    front = psutil.Process(live.process.pid)
    ask(live.port, post(EVALUATE, LARGE))
    before, held = front.memory_info().rss, []
    for _ in range(10):
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
        connection.request("POST", EVALUATE, LARGE, {"Content-Type": "application/json"})
        assert connection.getresponse().read()
        held.append(connection)
    assert front.memory_info().rss - before < 48 << 20
    for connection in held:
        connection.close()


# The event loop.


def queued_s(process: int, thread: int) -> float:
    """Return for how long a thread could have run and had no processor; 0 where the system does not count this."""
    try:
        return int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


class Stalls:
    """Asks /livez again and again, and notes the longest time that an answer took.

    The time for which other processes had the processor is none of the service's.
    """

    def __init__(self, live: LiveServer) -> None:
        self._live, self.seconds, self.usual_s, self._count = live, 0.0, 0.0, 0
        self._is_over = threading.Event()

    @property
    def bound_s(self) -> float:
        """100 ms, and what the machine itself takes."""
        return 0.1 + 2 * self.usual_s

    def __enter__(self) -> Stalls:
        self._watch(0.5)
        self.usual_s, self.seconds = self.seconds, 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def until_now(self) -> float:
        """Return the longest time since the last call, the question that is under way included."""
        count = self._count
        while self._count < count + 2:
            time.sleep(0.001)
        longest, self.seconds = self.seconds, 0.0
        return longest

    def _running_s(self) -> float:
        """Return the time, without that in which the front end or this thread waited for a processor."""
        front = self._live.process.pid
        return time.monotonic() - queued_s(front, front) - queued_s(os.getpid(), threading.get_native_id())

    def _watch(self, seconds: float = math.inf) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._live.port, timeout=20)
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._is_over.is_set():
            began = self._running_s()
            connection.request("GET", "/livez")
            connection.getresponse().read()
            self.seconds = max(self.seconds, self._running_s() - began)
            self._count += 1
            time.sleep(0.005)
        connection.close()


SIZE = 15 << 20
TRIES = 5
BOMBS = {
    "objects": b"[" + b"{}," * (SIZE // 3) + b"{}]",
    "lists": b"[" + b"[]," * (SIZE // 3) + b"NaN]",
    "nested": b"[" * (SIZE // 2) + b"]" * (SIZE // 2),
    "rows": b"[" + b"[0,0]," * (SIZE // 6) + b"[0,NaN]]",
    "numbers": b"[" + b"0," * (SIZE // 2) + b"NaN]",
    "strings": b"[" + b'"",' * (SIZE // 3) + b"0]",
    "one string": b'"' + b"a" * SIZE + b'"',
    "escapes": b'"' + b"\\n" * (SIZE // 2) + b'"',
    "blanks": b" " * SIZE,
    "digits": b"[" + b"1" * SIZE + b"]",
    "unclosed": b"[" + b"[0,0]," * (SIZE // 6),
}
FEW = ("nested", "numbers", "strings")
PLACES = {
    "native": (VALUE, b'{"inputs":%b}'),
    "UM-Bridge": ("/Evaluate", b'{"name":"peaks","input":%b}'),
    "inference": (
        "/v2/models/peaks/infer",
        b'{"inputs":[{"name":"inputs","shape":[2,2],"datatype":"FP64","data":%b}]}',
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_body_stalls_the_service(live: LiveServer, place: str) -> None:
    """All dialects read JSON with one reader: the native one is tried with all bodies, the others with a few."""
    path, form = PLACES[place]
    front = psutil.Process(live.process.pid)

    def send(bomb: str) -> None:
        reply = ask(live.port, post(path, form % BOMBS[bomb]), 30)
        assert 400 <= reply.status < 500, reply
        check_error(reply)

    slow = []
    with Stalls(live) as stalls:
        for bomb in BOMBS if place == "native" or IS_WHOLE else FEW:
            before = front.memory_info().rss
            send(bomb)
            if stalls.until_now() > stalls.bound_s:
                slow.append(bomb)
            assert front.memory_info().rss - before < 8 * SIZE, bomb
    for bomb in slow:  # other processes hold the service up, too
        assert is_smooth(live, partial(send, bomb)), bomb


def test_a_large_good_body_stalls_nobody_and_is_read_right(live: LiveServer) -> None:
    rows = 65_000
    body = json.dumps({"inputs": [[0.1 + n / rows, -0.123456789012345] for n in range(rows)]}).encode()
    few = json.dumps({"inputs": [[0.1 + n / rows, -0.123456789012345] for n in (0, 1, 40_000, rows - 1)]}).encode()
    tensor = {"name": "inputs", "shape": [rows, 2], "datatype": "FP64", "data": json.loads(body)["inputs"]}
    asked = [post(VALUE, body), post("/v2/models/peaks/infer", json.dumps({"inputs": [tensor]}).encode())]
    found: list[Any] = []
    assert is_smooth(live, lambda: found.extend(ask(live.port, data, 30) for data in asked))
    whole, inferred = found[-2:]
    assert whole.status == inferred.status == 200
    value = whole.json()["value"]
    assert [value[n] for n in (0, 1, 40_000, rows - 1)] == ask(live.port, post(VALUE, few)).json()["value"]
    assert inferred.json()["outputs"][0]["data"] == [number for (number,) in value]


def is_smooth(live: LiveServer, action: Callable[[], None]) -> bool:
    """Return whether /livez is answered in time meanwhile, in one of a few tries: other processes hold it up too."""
    for _ in range(TRIES):
        stalls = Stalls(live)
        with stalls:
            action()
        if stalls.seconds <= stalls.bound_s:
            return True
    return False


# In process: nothing is left to the collector, and timers.


@pytest.mark.parametrize("form", [b'{"x":%b}', b'{"inputs":{"x":{"data":%b}}}', b'[{"a":[{"x":%b}]}]'])
def test_a_long_body_leaves_nothing_to_the_collector(form: bytes) -> None:
    body = form % json.dumps([[0.5, number] for number in range(20_000)]).encode()
    gc.disable()
    try:
        document, _ = asyncio.run(read_long_json(body, 100_000))
        while not isinstance(document, np.ndarray):
            document = document[0] if isinstance(document, list) else next(iter(document.values()))
        assert document.shape == (20_000, 2)
        held = weakref.ref(document)
        del document
        assert held() is None
    finally:
        gc.enable()


def test_an_empty_list_in_a_long_body_is_refused() -> None:
    blanks = b" " * 40_000
    with pytest.raises(InvalidInput, match="inputs: expected rows of at least one number"):
        asyncio.run(read_long_json(b'{"inputs": %b[]%b}' % (blanks, blanks), 1000))


class Transport(asyncio.Transport):
    """Stores the data that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.ended_at = 0.0

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def writelines(self, list_of_data: Any) -> None:
        self.written += b"".join(map(bytes, list_of_data))

    def is_closing(self) -> bool:
        return self.ended_at > 0

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.ended_at = asyncio.get_running_loop().time()

    close = write_eof = abort


class State:
    """The state that uvicorn's servers share with their connections."""

    def __init__(self) -> None:
        self.connections: set[Any] = set()
        self.default_headers: list[tuple[bytes, bytes]] = []


class Echo:
    """An application that sends back what it gets."""

    def __init__(self) -> None:
        self.budget = Budget(1 << 30)
        self.bodies: list[bytes] = []

    def admit(self, head: Head) -> None:
        """Admit every request."""

    def handle(self, request: Request) -> None:
        self.bodies.append(request.body)
        request.respond(request, Reply(200, JSON, [request.body]))

    def fail(self, request: Request, error: Exception) -> None:
        status = error.status if isinstance(error, ServiceError) else 500
        request.respond(request, Reply(status, JSON, [b"{}"]))

    abandon = fail


def connected(application: Any, **changes: Any) -> tuple[Connection, Transport]:
    limits = Limits(16 << 20, 16 << 10, 64, 4096, 30.0, 30.0, 75.0)._replace(**changes)
    connection = Listener(application, limits).connect(State())
    transport = Transport()
    connection.connection_made(transport)
    return connection, transport


def strip(written: bytes) -> bytes:
    """Return the bytes written, without the request's id."""
    return b"\r\n".join(line for line in written.split(b"\r\n") if not line.startswith(b"x-request-id"))


USUAL = post(EVALUATE, BODY, **KEEP)


@pytest.mark.parametrize(
    ("data", "is_remembered"),
    [
        (USUAL, True),
        (USUAL.replace(b"Content-Type", b"CONTENT-type"), True),
        (USUAL.replace(b"Host: x", b"Host:   x"), False),
        (b"\r\n" + USUAL, False),
        (post(EVALUATE, BODY, X_Request_Id="mine", **KEEP), False),
        (post(EVALUATE, BODY, X_Long="x" * 1024, **KEEP), False),
        (post(EVALUATE, BODY, Expect="100-continue", **KEEP), False),
        (chunked(EVALUATE, BODY).replace(b"Connection: close", b"Connection: keep-alive"), False),
    ],
    ids=["usual", "case", "blanks", "empty line", "own id", "long", "expect", "chunked"],
)
def test_which_heads_are_remembered(data: bytes, is_remembered: bool) -> None:
    async def run() -> tuple[list[bytes], list[bytes]]:
        application = Echo()
        connection, transport = connected(application)
        for _ in range(3):
            connection.data_received(data)
        heads = list(connection._listener.heads)
        connection.data_received(data[:-1])
        connection.data_received(data[-1:])
        connection.data_received(data + data)
        assert strip(transport.written).count(b"HTTP/1.1 200") == len(application.bodies) == 6
        connection.connection_lost(None)
        return heads, application.bodies

    heads, bodies = asyncio.run(run())
    assert bodies == [BODY] * 6
    assert heads == ([data[: -len(BODY)]] if is_remembered else [])


@pytest.mark.parametrize("is_planted", [False, True], ids=["as it is", "with a cycle"])
def test_connections_leave_nothing_to_the_collector(is_planted: bool) -> None:
    """Cycles would make the collector stop the service for milliseconds, or leak where it seldom runs."""
    endings = [USUAL, USUAL[:-3], USUAL + USUAL[:30], b"nonsense\r\n\r\n", chunked(EVALUATE, BODY), USUAL * 3]
    upgrade = post(EVALUATE, BODY, Connection="Upgrade", Upgrade="h2c")

    async def run() -> int:
        for number in range(110):
            if number == 10:
                gc.collect()
                gc.disable()
            for data in (*endings, upgrade):
                application = Echo()
                connection, _ = connected(application)
                connection.data_received(data)
                connection.connection_lost(None)
                if is_planted:
                    application.cycle = connection  # type: ignore[attr-defined]
                del connection, application
        found = gc.collect()
        gc.enable()
        return found

    found = asyncio.run(run())
    assert found > 1000 if is_planted else found < 50


def test_a_connection_is_closed_when_it_was_idle_for_long_enough_and_not_before() -> None:
    loop = SimulatedLoop(lambda: 0.0)
    connection, transport = loop.run(lambda: connected(Echo(), keep_alive_s=0.3))
    for _ in range(4):
        loop.run(connection.data_received, USUAL)
        last_s = loop.now
        while (due_s := loop.next_s()) is not None and due_s < last_s + 0.2:
            loop.step()
        loop.now = last_s + 0.2
    assert transport.written.count(b"HTTP/1.1 200") == 4
    assert not transport.ended_at
    while not transport.ended_at:
        assert loop.step()
    loop.run(connection.connection_lost, None)
    assert 0.29 < transport.ended_at - last_s < 0.35
    assert not loop.errors


@pytest.mark.parametrize("is_steady", [True, False], ids=["steady", "silent"])
@pytest.mark.parametrize("side", ["sends", "takes"])
def test_a_pause_of_the_process_is_no_pause_of_its_clients(side: str, is_steady: bool) -> None:
    """Input that comes during a pause is seen after it; a client that does nothing even then is closed."""
    loop, application = SimulatedLoop(lambda: 0.0), Echo()
    limits = {"receive_timeout_s": 2.0, "send_timeout_s": 2.0}
    connection, transport = loop.run(lambda: connected(application, **limits))
    if side == "takes":
        transport.get_write_buffer_size = lambda: unsent  # type: ignore[method-assign]
        unsent = 100
        loop.run(connection.data_received, post(EVALUATE, BODY))
        loop.step()  # the first check of what it has taken
    else:
        loop.run(connection.data_received, USUAL[:-3])
    loop.now = resumed_at = loop.now + 3600.0
    loop.step()
    assert loop.now == resumed_at
    assert not transport.ended_at
    if is_steady and side == "sends":
        loop.run(connection.data_received, USUAL[-3:])
        assert transport.written.startswith(b"HTTP/1.1 200")
    elif is_steady:
        unsent = 50
        loop.step()
    else:
        while not transport.ended_at:
            loop.step()
        assert transport.ended_at - resumed_at < limits["send_timeout_s"] + 1
    assert bool(transport.ended_at) != is_steady
    loop.run(connection.connection_lost, None)
    assert not loop.errors


def test_starting_is_answered_with_the_reason_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for name in ("peaks", "borehole"):
        (tmp_path / f"{name}.safetensors").write_bytes((ROOT / "models" / f"{name}.safetensors").read_bytes())
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense, not a network")
    server = LiveServer(tmp_path).wait_until_listening()
    try:
        reply = ask(server.port, post(VALUE, POINT))
        if reply.status != 200:  # it may have been quick
            assert (reply.status, reply.json()["code"], reply.headers["retry-after"]) == (503, "not_ready", "1")
            assert "loading" in reply.json()["detail"]
            assert ask(server.port, request("GET", "/livez")).status == 200
            assert b"\nhessquik_ready 0.0\n" in ask(server.port, request("GET", "/metrics")).body
        server.wait_until_ready()
        assert ask(server.port, post(VALUE, POINT)).status == 200
        lines = "\n".join(server.log)
        assert "model peaks version 1: ready, d = 2, m = 1, float64" in lines
        assert f"http://127.0.0.1:{server.port}/docs" in lines
        assert "bad.safetensors is refused" in lines
        listed = {model["name"]: model for model in ask(server.port, request("GET", "/v1/models")).json()["models"]}
        assert listed["bad"]["state"] == "failed"
        assert "safetensors" in listed["bad"]["reason"]
        reply = ask(server.port, post("/v1/models/bad/value", POINT))
        assert (reply.status, reply.json()["code"]) == (503, "not_ready")
    finally:
        server.stop()
