"""Every limit holds exactly: one below and the limit itself pass, one above is refused by name."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.live import LiveServer, wait_until
from tests.raw import ask, check_error, exchange, post, receive_all, replies, request
from tests.security.conftest import LIMITS

VALUE = "/v1/models/peaks/value"
EVALUATE = "/v1/models/peaks/evaluate"
#: Of the server with the usual limits; whoever waits for a body answers no sooner.
RECEIVE_TIMEOUT_S = Settings().receive_timeout_s
#: Steps around a limit, with whether the request passes.
AROUND = [pytest.param(-1, True, id="below"), pytest.param(0, True, id="at"), pytest.param(1, False, id="above")]


def body_of(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def chunked(path: str, body: bytes, chunk_bytes: int) -> bytes:
    pieces = [body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)]
    coded = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + coded


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize(("step", "passes"), AROUND)
def test_the_body_limit_is_exact(narrow: LiveServer, step: int, passes: bool, is_chunked: bool) -> None:
    body = body_of(inputs=[0.5, 0.25]).ljust(LIMITS["max_body_bytes"] + step)
    reply = ask(narrow.port, chunked(VALUE, body, 100) if is_chunked else post(VALUE, body))
    assert reply.status == (200 if passes else 413), reply
    if not passes:
        check_error(reply)
        assert str(LIMITS["max_body_bytes"]) in reply.json()["detail"]


@pytest.mark.parametrize(("step", "passes"), AROUND)
@pytest.mark.parametrize("place", ["value", "name", "url", "many"])
def test_the_head_limit_is_exact(narrow: LiveServer, step: int, passes: bool, place: str) -> None:
    size = LIMITS["max_header_bytes"] + step
    filler = size - len("/livez?") - len("Host: x\r\n") - len("Connection: close\r\n")
    url, fields = "/livez?", b""
    if place == "url":
        url += "a" * filler
    elif place == "value":
        fields = b"X: " + b"a" * (filler - 5) + b"\r\n"
    elif place == "name":
        fields = b"X" * (filler - 5) + b": a\r\n"
    else:
        fields = b"X: aaa\r\n" * (10) + b"X: " + b"a" * (filler - 85) + b"\r\n"
    data = f"GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode() + fields + b"\r\n"
    reply = ask(narrow.port, data)
    assert reply.status == (200 if passes else 400), reply
    if not passes:
        check_error(reply)


@pytest.mark.parametrize(("step", "passes"), AROUND)
def test_the_limit_of_fields_is_exact(narrow: LiveServer, step: int, passes: bool) -> None:
    more = {f"X{number}": "1" for number in range(LIMITS["max_headers"] + step - 3)}
    reply = ask(narrow.port, request("GET", "/livez", **more))
    assert reply.status == (200 if passes else 400), reply


@pytest.mark.parametrize(("step", "passes"), AROUND)
def test_the_limit_of_rows_is_exact(narrow: LiveServer, step: int, passes: bool) -> None:
    reply = ask(narrow.port, post(VALUE, body_of(inputs=[[0, 0]] * (LIMITS["max_rows"] + step))))
    assert reply.status == (200 if passes else 422), reply


@pytest.mark.parametrize(("rows", "passes"), [(31, True), (32, True), (33, False)], ids=["below", "at", "above"])
def test_the_reply_limit_is_exact(narrow: LiveServer, rows: int, passes: bool) -> None:
    # A Hessian of 2 inputs is 4 float64, 32 bytes, and 32 of them are 1024.
    reply = ask(narrow.port, post("/v1/models/peaks/hessian", body_of(inputs=[[0, 0]] * rows, dtype="float64")))
    assert reply.status == (200 if passes else 413), reply
    if not passes:
        check_error(reply)
        assert reply.json()["reply_bytes"] == 33 * 32


@pytest.mark.parametrize(("step", "passes"), AROUND)
def test_the_limit_of_directions_is_exact(narrow: LiveServer, step: int, passes: bool) -> None:
    points = 10
    k = LIMITS["max_rows"] // points + step
    reply = ask(
        narrow.port,
        post(EVALUATE, body_of(inputs=[[0, 0]] * points, quantities=["jvp"], directions=[[1, 0]] * k)),
    )
    assert reply.status == (200 if passes else 422), reply


@pytest.mark.parametrize(("depth", "passes"), [(1, True), (2, True), (3, False), (8, False), (9, False)])
def test_the_depth_of_inputs_is_limited(narrow: LiveServer, depth: int, passes: bool) -> None:
    body = b'{"inputs":' + b"[" * depth + b"0.5,0.25" + b"]" * depth + b"}"
    reply = ask(narrow.port, post(VALUE, body))
    assert reply.status == (200 if passes else 422), reply


@pytest.mark.parametrize("count", [1, 16, 17, 400])
def test_unknown_query_parameters_are_refused(narrow: LiveServer, count: int) -> None:
    query = "&".join(f"p{number}=1" for number in range(count))[:800]
    for path in (VALUE, "/v1/models/peaks", "/v1/models"):
        data = post(f"{path}?{query}", body_of(inputs=[0, 0])) if path == VALUE else request("GET", f"{path}?{query}")
        reply = ask(narrow.port, data)
        assert reply.status == 422, reply
        check_error(reply)
        assert b"p0" not in reply.body


@pytest.mark.parametrize(("deadline", "status"), [("1", {200, 504}), ("120000", {200}), ("120001", {422})])
def test_the_limit_of_deadlines_is_exact(narrow: LiveServer, deadline: str, status: set[int]) -> None:
    assert ask(narrow.port, post(VALUE, body_of(inputs=[0, 0]), X_Deadline_Ms=deadline)).status in status


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate", "gzip, gzip"])
def test_encoded_bodies_are_refused_unread(server: LiveServer, encoding: str) -> None:
    head = post(VALUE, b"", Content_Encoding=encoding, Content_Length="4096")
    began = time.monotonic()
    reply = ask(server.port, head)  # the body never comes
    assert reply.status == 415
    assert time.monotonic() - began < RECEIVE_TIMEOUT_S


def test_a_body_said_to_be_too_large_is_refused_unread(server: LiveServer) -> None:
    began = time.monotonic()
    reply = ask(server.port, post(VALUE, b"", Content_Length=str(10**15)))
    assert reply.status == 413
    check_error(reply)
    assert time.monotonic() - began < RECEIVE_TIMEOUT_S


@pytest.fixture
def small(shipped_models: Path) -> Iterator[LiveServer]:
    """Yield a server of few connections, which closes none that sends nothing while the test runs."""
    settings = {"max_connections": LIMITS["max_connections"], "receive_timeout_s": 600}
    with LiveServer(shipped_models, settings=settings) as live:
        yield live


def test_surplus_connections_are_refused(small: LiveServer) -> None:
    held = [socket.create_connection(("127.0.0.1", small.port), 30) for _ in range(LIMITS["max_connections"])]
    try:
        reply = ask(small.port, request("GET", "/livez"))
        assert (reply.status, reply.json()["code"]) == (503, "overloaded")
        assert reply.headers["retry-after"] == "1"
        check_error(reply)
        held[-1].sendall(request("GET", "/livez"))  # those that were let in are served
        assert replies(receive_all(held[-1]))[0].status == 200
    finally:
        for connection in held:
            connection.close()
    wait_until(lambda: exchange(small.port, request("GET", "/livez"))[9:12] == b"200")
    assert small.metric('hessquik_requests_total{route="refused",status="503"}') >= 1


#: What a slow client sends, at once and then every tenth of a second.
SLOW: dict[str, tuple[bytes, bytes]] = {
    "nothing": (b"", b""),
    "empty lines": (b"", b"\r\n"),
    "head": (b"GET /livez HTTP/1.1\r\nX: ", b"a"),
    "url": (b"GET /", b"a"),
    "body": (post(VALUE, b"", Content_Length="4000"), b" "),
    "chunks": (post(VALUE, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"), b"1\r\n \r\n"),
    "empty lines after a request": (b"GET /livez HTTP/1.1\r\n\r\n", b"\r\n"),
    "head after a request": (b"GET /livez HTTP/1.1\r\n\r\nGET /livez HTTP/1.1\r\nX: ", b"a"),
}


@pytest.mark.parametrize(("first", "next_"), SLOW.values(), ids=SLOW.keys())
def test_a_slow_request_is_cut_off(narrow: LiveServer, first: bytes, next_: bytes) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", narrow.port), 0.1) as connection:
        connection.sendall(first)
        while time.monotonic() - began < 10:
            try:
                connection.sendall(next_)
                if not connection.recv(1 << 16):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began <= LIMITS["receive_timeout_s"] + 2


def test_pipelined_requests_are_answered_in_order(narrow: LiveServer) -> None:
    bodies = [body_of(inputs=[[number, 0]] * (number + 1)) for number in range(8)]
    data = b"".join(post(VALUE, body, Connection="keep-alive") for body in bodies) + request("GET", "/livez")
    answered = replies(exchange(narrow.port, data))
    assert [reply.status for reply in answered] == [200] * 9
    assert [len(reply.json()["value"]) for reply in answered[:8]] == list(range(1, 9))
