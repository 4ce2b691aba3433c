"""Small requests for derivatives go a short way: what they get, and in what order, is what the long way gives."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.app import Application, create_app
from service.exchange import MAX_HEAD_BYTES, SHORT_BYTES, Exchange
from service.server import bounded_protocol
from service.settings import Settings
from tests.live import ROOT, LiveServer
from tests.raw import ask, exchange, post, receive_all, replies
from tests.service.faulty_worker import SLOW

BODY = b'{"inputs":[[0.5,0.25],[-1,1]],"quantities":["value","gradient","hessian"],"dtype":"float64"}'
EVALUATE, VALUE = "/v1/models/peaks/evaluate", "/v1/models/peaks/value"
KEEP = {"Connection": "keep-alive"}


@pytest.fixture(scope="module")
def server() -> Any:
    with LiveServer(ROOT / "models") as live:
        yield live.wait_until_ready()


def chunked(path: str, body: bytes) -> bytes:
    """The same request the long way."""
    head = post(path, b"", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
    return head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def without(headers: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EVALUATE, BODY),
        (EVALUATE + "?version=1", BODY),
        (VALUE, b'{"inputs":[0.5,0.25]}'),
        (VALUE, b'{"inputs":[[0.5]]}'),
        (VALUE, b'{"inputs":'),
        (VALUE + "?version=77", b'{"inputs":[0.5,0.25]}'),
        ("/v1/models/none/value", b'{"inputs":[0.5,0.25]}'),
    ],
    ids=["batch", "version", "point", "short row", "no JSON", "no version", "no model"],
)
def test_both_ways_lead_to_the_same_reply(server: LiveServer, path: str, body: bytes) -> None:
    short, long = ask(server.port, post(path, body)), ask(server.port, chunked(path, body))
    assert short.status == long.status
    assert without(short.headers, "date", "x-request-id", "content-length") == without(
        long.headers, "date", "x-request-id", "content-length"
    )
    if short.status == 200:
        assert short.body == long.body
    else:
        assert without(short.json(), "request_id") == without(long.json(), "request_id")


def test_pipelined_replies_come_in_the_order_of_requests(server: LiveServer) -> None:
    ways = [post(EVALUATE, BODY, **KEEP), b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n", post(VALUE, BODY, **KEEP)] * 5
    found = replies(exchange(server.port, b"".join(ways) + post(EVALUATE, BODY)))
    assert [reply.status for reply in found] == [200, 200, 422] * 5 + [200]
    assert {reply.body for reply in found[::3]} == {found[0].body}
    assert found[1].json() == {"live": True}


def test_a_body_that_comes_byte_by_byte_is_read(server: LiveServer) -> None:
    whole = ask(server.port, post(EVALUATE, BODY))
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post(EVALUATE, BODY):
            connection.sendall(bytes([byte]))
        data = b""
        while part := connection.recv(1 << 16):
            data += part
    assert replies(data)[0].body == whole.body


def test_longest_short_body_and_the_next(server: LiveServer) -> None:
    for size in (SHORT_BYTES, SHORT_BYTES + 1):
        reply = ask(server.port, post(EVALUATE, BODY.ljust(size)))
        assert reply.status == 200
        assert reply.json()["value"] == ask(server.port, post(EVALUATE, BODY)).json()["value"]


def test_a_client_that_leaves_is_counted_and_its_rows_are_not_computed(tmp_path: Path) -> None:
    faulty = ("-m", "tests.service.faulty_serve")
    (tmp_path / "peaks.safetensors").write_bytes((ROOT / "models" / "peaks.safetensors").read_bytes())
    with LiveServer(tmp_path, command=faulty) as live:
        live.wait_until_ready()
        slow = b'{"inputs":[%g,0]}' % SLOW
        with socket.create_connection(("127.0.0.1", live.port), 30) as busy:
            busy.sendall(post(VALUE, slow, **KEEP))
            time.sleep(0.1)
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", live.port), 30) as leaving:
                    leaving.sendall(post(VALUE, slow, **KEEP))
                    time.sleep(0.02)
            with socket.create_connection(("127.0.0.1", live.port), 30) as leaving:
                leaving.sendall(post(VALUE, slow, **KEEP)[:-3])
                time.sleep(0.05)
            assert busy.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert ask(live.port, post(VALUE, b'{"inputs":[0.5,0.25]}')).status == 200
        left = 'hessquik_requests_total{route="/v1/models/{model}/value",status="499"}'
        assert live.metric(left) == 6
        assert live.metric("hessquik_rows_total") == 2


OTHER_BODY = BODY.replace(b"0.25", b"0.75")
LONGER_BODY = BODY.replace(b"0.25", b"0.125")


def test_a_head_that_was_read_before_means_what_it_meant(server: LiveServer) -> None:
    """Under the same head come other bodies, in pieces, one behind the other, and other requests in between."""
    first, other, longer = (post(EVALUATE, body, **KEEP) for body in (BODY, OTHER_BODY, LONGER_BODY))
    live = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    short_row = post(EVALUATE, BODY.replace(b",0.25]", b"     ]"), **KEEP)
    sent = [
        first,
        other,
        first,
        first[:-9],
        first[-9:],
        other,
        first + other + longer,
        live,
        longer,
        short_row,
        other,
    ]
    last = ask(server.port, post(EVALUATE, BODY))
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        for data in sent:
            connection.sendall(data)
            time.sleep(0.05)
        connection.sendall(post(EVALUATE, BODY))
        found = replies(receive_all(connection))
    by_body = {body: ask(server.port, chunked(EVALUATE, body)).body for body in (BODY, OTHER_BODY, LONGER_BODY)}
    assert len(set(by_body.values())) == 3
    a, b, c = by_body.values()
    bodies = [reply.body if reply.status == 200 else reply.status for reply in found]
    assert bodies == [a, b, a, a, b, a, b, c, b'{"live":true}', c, 422, b, last.body]


def test_a_head_that_was_read_before_still_needs_its_key(tmp_path: Path) -> None:
    (tmp_path / "peaks.safetensors").write_bytes((ROOT / "models" / "peaks.safetensors").read_bytes())
    with LiveServer(tmp_path, settings={"api_keys": "right"}) as live:
        right, wrong = ({"Authorization": f"Bearer {key}", **KEEP} for key in ("right", "wrong"))
        requests = [post(VALUE, b'{"inputs":[0.5,0.25]}', **headers) for headers in (right, wrong, KEEP)]
        with socket.create_connection(("127.0.0.1", live.port), 30) as connection:
            for request in requests * 3:
                connection.sendall(request)
                time.sleep(0.05)
            connection.shutdown(socket.SHUT_WR)
            assert [reply.status for reply in replies(receive_all(connection))] == [200, 401, 401] * 3


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted_at = 0.0

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.aborted_at > 0

    def abort(self) -> None:
        self.aborted_at = time.monotonic()


def _connect() -> tuple[Application, Any, Transport]:
    """A connection without a network; its loop has to run."""
    settings = Settings(models=ROOT / "models", device="cpu", workers=1)
    app = create_app(settings)
    config = uvicorn.Config(app, http="httptools", log_config=None)
    config.load()
    connection: Any = bounded_protocol(settings, app.state.core.metrics, app.short_way)(
        config=config,  # type: ignore[call-arg]
        server_state=ServerState(),  # type: ignore[call-arg]
        app_state={},  # type: ignore[call-arg]
    )
    connection.connection_made(transport := Transport())
    return app, connection, transport


USUAL = post(EVALUATE, BODY, **KEEP)


@pytest.mark.parametrize(
    ("request_", "is_remembered"),
    [
        (USUAL, True),
        (USUAL.replace(b"Content-Type", b"CONTENT-type"), True),
        (USUAL.replace(b"Host: x", b"Host:   x"), False),
        (b"\r\n" + USUAL, False),
        (post(EVALUATE, BODY, X_Request_Id="mine", **KEEP), False),
        (post(EVALUATE, BODY, Accept="text/html", **KEEP), False),
        (post(EVALUATE, BODY, X_Long="x" * MAX_HEAD_BYTES, **KEEP), False),
        (chunked(EVALUATE, BODY), False),
        (USUAL.replace(b"POST", b"PUT"), False),
    ],
    ids=["usual", "case", "blanks", "empty line", "own id", "refused", "long", "chunked", "PUT"],
)
def test_which_heads_are_remembered(request_: bytes, is_remembered: bool) -> None:
    async def send() -> tuple[bool, bool]:
        app, connection, _ = _connect()
        before = app.short_way.recall(request_)
        connection.data_received(request_)  # no model is loaded, so that it is answered with an error
        await asyncio.sleep(0)
        after = app.short_way.recall(request_)
        assert after is None or after[1] == BODY
        assert app.short_way.recall(request_ + b" ") is None
        assert app.short_way.recall(request_[:-1]) is None
        return before is not None, after is not None

    assert asyncio.run(send()) == (False, is_remembered)


def test_a_request_cannot_have_a_head_remembered_as_what_follows_it() -> None:
    """Heads may differ in nothing but the case of a model's name or of a key."""
    first, second = (post(path, BODY, **KEEP) for path in ("/v1/models/PEAKS/evaluate", EVALUATE))

    async def send() -> list[tuple[str, str] | None]:
        app, connection, _ = _connect()
        connection.data_received(first + second)
        await asyncio.sleep(0)
        found = [app.short_way.recall(request) for request in (first, second)]
        return [None if recalled is None else recalled[0].target for recalled in found]

    assert asyncio.run(send()) == [("PEAKS", "evaluate"), None]


def test_a_connection_is_closed_when_it_was_idle_for_long_enough_and_not_before() -> None:
    async def send() -> float:
        _, connection, transport = _connect()
        connection.timeout_keep_alive = 0.3
        for _ in range(4):
            connection.data_received(USUAL)
            last = time.monotonic()
            await asyncio.sleep(0.2)
        assert len(transport.written) == 4
        while not transport.aborted_at:
            await asyncio.sleep(0.01)
        return transport.aborted_at - last

    assert 0.29 < asyncio.run(send()) < 0.6


async def _garbage(request: bytes, plant: bool) -> int:
    """Objects that only the collector frees, after 50 requests."""
    app, connection, transport = _connect()
    core = app.state.core
    await core.start()
    try:
        for number in range(60):
            if number == 10:
                gc.collect()
                gc.disable()
            connection.data_received(request)
            cycle = connection.cycle
            assert isinstance(cycle, Exchange)
            if plant:
                cycle.scope["circle"] = cycle
            del cycle
            while len(transport.written) == number:
                await asyncio.sleep(0.001)
        assert all(reply.startswith(b"HTTP/1.1 200") for reply in transport.written)
        found = gc.collect()
    finally:
        gc.enable()
        await core.stop()
    return found


@pytest.mark.parametrize("plant", [False, True], ids=["as it is", "with a circle"])
def test_requests_leave_nothing_to_the_collector(plant: bool) -> None:
    """Circles would make the collector stop the service for milliseconds, again and again."""
    found = asyncio.run(_garbage(post(EVALUATE, BODY, **KEEP), plant))
    assert found > 200 if plant else found < 50
