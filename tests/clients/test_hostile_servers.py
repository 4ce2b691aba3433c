"""Calls to hostile servers end in time, within their memory, with right numbers or a typed error."""

from __future__ import annotations

import asyncio
import socket
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hessquik_client import (
    AsyncClient,
    Client,
    ClientError,
    ConnectionLost,
    DeadlineExceeded,
    NotReady,
    Overloaded,
    UnexpectedReply,
)
from tests.clients.hostile import FACTS, HostileServer, Script, document, facts, header, nested, reply, tensors
from tests.unpaused import UnpausedClock
from tests.whole import choose

#: Of the tests that wait for it; all others end long before theirs.
DEADLINE_S = 0.2
PATIENT_S = 5.0
#: Time beyond the deadline that a busy machine may take, not counting for how long it takes the processor away.
SLACK_S = 1.0
POINT = np.zeros(2)
BATCH = np.zeros((5, 2))
MUCH = np.zeros((300_000, 2))
RIGHT = reply(tensors(gradient=np.ones((1, 2, 1))))
RIGHT_BATCH = reply(tensors(gradient=np.ones((5, 2, 1))))
Kind = type[Client] | type[AsyncClient]
both = pytest.mark.parametrize("kind", [Client, AsyncClient])


def call(kind: Kind, url: str, ask: Callable[[Any], Any], **options: Any) -> Any:
    """Return the answer of the blocking or the asynchronous client."""
    options = {"deadline_s": PATIENT_S, "retries": 0, **options}
    if kind is Client:
        with Client(url, **options) as client:
            return ask(client)

    async def call_async() -> Any:
        async with AsyncClient(url, **options) as client:
            return await ask(client)

    return asyncio.run(call_async())


def ask_point(client: Any) -> Any:
    return client.model("toy").gradient(POINT)


def ask_batch(client: Any) -> Any:
    return client.model("toy").gradient(BATCH)


def ask_much(client: Any) -> Any:
    return client.model("toy").value(MUCH)


def describe(client: Any) -> Any:
    return client.model("toy").describe()


@both
@pytest.mark.parametrize(("ask", "right"), [(ask_point, RIGHT), (ask_batch, RIGHT_BATCH)], ids=["point", "batch"])
def test_the_control_answers(kind: Kind, ask: Callable[[Any], Any], right: bytes) -> None:
    with HostileServer(right) as server:
        assert (call(kind, server.url, ask) == 1).all()


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
SLOW: dict[str, Callable[[HostileServer], Script]] = {
    "silence": lambda server: server.silence,
    "status line": lambda server: server.drip(b"HTTP/1.1 200 O"),
    "head": lambda server: server.drip(b"HTTP/1.1 200 OK\r\nx: "),
    "fields": lambda server: server.drip(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
    "chunk size": lambda server: server.drip(CHUNKED + b"1", b"0"),
    "chunk extension": lambda server: server.drip(CHUNKED + b"1;", b"x"),
    "chunks": lambda server: server.drip(CHUNKED, b"1\r\nx\r\n"),
    "body": lambda server: server.drip(b"HTTP/1.1 200 OK\r\ncontent-length: 4000\r\n\r\n"),
    "body to the end": lambda server: server.drip(b"HTTP/1.1 200 OK\r\n\r\n"),
    "trailers": lambda server: server.drip(CHUNKED + b"0\r\n", b"x"),
    "100, slowly": lambda server: server.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103, a flood": lambda server: server.flood(b"", b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" * 100),
}


@both
@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_deadline_is_kept(kind: Kind, script: Callable[[HostileServer], Script]) -> None:
    with HostileServer(b"") as server:
        server._scripts["POST"] = script(server)
        began = time.monotonic()
        # Some parsers take what they cannot parse for broken before the time is over.
        with UnpausedClock() as clock, pytest.raises((DeadlineExceeded, ConnectionLost)) as caught:
            call(kind, server.url, ask_point, deadline_s=DEADLINE_S)
        assert clock.seconds < DEADLINE_S + SLACK_S
        if isinstance(caught.value, DeadlineExceeded):
            assert time.monotonic() - began >= 0.95 * DEADLINE_S
            assert caught.value.status == 0


@both
def test_deadline_is_kept_while_the_request_is_sent(kind: Kind) -> None:
    large = {**FACTS, "limits": {**FACTS["limits"], "body_bytes": 64 << 20, "rows": 1 << 30}}  # type: ignore[dict-item]
    with HostileServer(b"", reply(document(large)), reads_body=False) as server:
        server._scripts["POST"] = server.silence
        with UnpausedClock() as clock, pytest.raises(DeadlineExceeded):
            call(kind, server.url, ask_much, deadline_s=DEADLINE_S)
        assert clock.seconds < DEADLINE_S + SLACK_S


@both
def test_deadline_is_kept_by_all_steps_of_a_call_together(kind: Kind) -> None:
    def slowly(body: bytes) -> Script:
        def script(connection: Any) -> None:
            time.sleep(0.8 * DEADLINE_S)
            # The connection is closed then; a client that was not told would send the next request into it.
            connection.sendall(body.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))

        return script

    with HostileServer(slowly(RIGHT_BATCH), slowly(reply(facts()))) as server:
        with UnpausedClock() as clock, pytest.raises(DeadlineExceeded):
            call(kind, server.url, ask_batch, deadline_s=DEADLINE_S)
        assert clock.seconds < DEADLINE_S + SLACK_S


@both
def test_deadline_is_kept_while_tls_is_agreed_on(kind: Kind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with UnpausedClock() as clock, pytest.raises(DeadlineExceeded):
            call(kind, url, ask_point, deadline_s=DEADLINE_S)
        assert clock.seconds < DEADLINE_S + SLACK_S


def test_a_call_that_is_cancelled_while_tls_is_agreed_on_leaves_no_socket() -> None:
    async def work(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(60), AsyncClient(f"https://127.0.0.1:{listener.getsockname()[1]}") as client:
            asking = asyncio.ensure_future(ask_point(client))
            connection, _ = await loop.sock_accept(listener)
            with connection:
                assert await loop.sock_recv(connection, 1)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                while await loop.sock_recv(connection, 1 << 16):
                    pass  # until the client closes

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        asyncio.run(work(listener))


BOMB = zlib.compress(b"\0" * (100 << 20))
MEBIBYTE = b"\0" * (1 << 20)
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "chunked": (CHUNKED, b"100000\r\n" + MEBIBYTE + b"\r\n"),
    "to the end": (b"HTTP/1.1 200 OK\r\n\r\n", MEBIBYTE),
    "announced": (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n", MEBIBYTE),
    "an error": (b"HTTP/1.1 503 Busy\r\n\r\n", MEBIBYTE),
    "compressed": (
        b"HTTP/1.1 200 OK\r\ncontent-encoding: deflate\r\ncontent-length: %d\r\n\r\n" % len(BOMB) + BOMB,
        b"",
    ),
    "compressed twice": (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip, gzip\r\n\r\n", MEBIBYTE),
}


@both
@pytest.mark.parametrize("ask", [ask_point, ask_batch, describe, lambda client: client.models()])
@pytest.mark.parametrize(("head", "piece"), ENDLESS.values(), ids=ENDLESS)
def test_no_more_is_read_than_was_asked_for(kind: Kind, ask: Callable[[Any], Any], head: bytes, piece: bytes) -> None:
    """An answer to these questions is under a kilobyte; the list of all models may have 64 MiB."""
    most_bytes = (70 << 20) if ask not in (ask_point, ask_batch, describe) else (12 << 20)
    with HostileServer(b"") as server:
        script = server.flood(head, piece) if piece else head
        server._scripts["POST"] = script
        if ask is not ask_batch:
            server._scripts["GET"] = script
        tracemalloc.start()
        try:
            with pytest.raises(UnexpectedReply):
                call(kind, server.url, ask, deadline_s=20)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < most_bytes
        # The sockets of both sides hold some megabytes more, for each of two requests.
        assert server.sent_bytes < most_bytes + (24 << 20)


ANSWERS = {
    "html": b"<html>",
    "nothing": b"",
    "a header longer than the body": header(b"{}")[:9],
    "a nested header": header(nested(10_000)),
    "no metadata": header(b'{"gradient":{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}'),
    "another model": tensors({"model": "other", "version": "1"}, gradient=np.ones((1, 2, 1))),
    "no version": tensors({"model": "toy"}, gradient=np.ones((1, 2, 1))),
    "another quantity": tensors(hessian=np.ones((1, 2, 1))),
    "one more quantity": tensors(gradient=np.ones((1, 2, 1)), value=np.ones((1, 1))),
    "no quantity": tensors(),
    "whole numbers": tensors(gradient=np.ones((1, 2, 1), np.int64)),
    "booleans": tensors(gradient=np.ones((1, 2, 1), bool)),
    "half precision": tensors(gradient=np.ones((1, 2, 1), np.float16)),
    "no axes": tensors(gradient=np.ones(())),
    "no n axis": tensors(gradient=np.ones((2, 1))),
    "more points": tensors(gradient=np.ones((2, 2, 1))),
    "more inputs": tensors(gradient=np.ones((1, 3, 1))),
    "no outputs": tensors(gradient=np.ones((1, 2, 0))),
    "one more axis": tensors(gradient=np.ones((1, 2, 1, 1))),
    "axes exchanged": tensors(gradient=np.ones((1, 1, 2))),
}
#: What only a description tells: a model's outputs and dtype.
KNOWN = {
    "more outputs": tensors(gradient=np.ones((5, 2, 2))),
    "fewer points": tensors(gradient=np.ones((4, 2, 1))),
    "float32": tensors(gradient=np.ones((5, 2, 1), np.float32)),
}


@both
@pytest.mark.parametrize("body", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_does_not_fit_is_refused(kind: Kind, body: bytes) -> None:
    with HostileServer(reply(body)) as server, pytest.raises(UnexpectedReply, match="expected"):
        call(kind, server.url, ask_point)


@both
@pytest.mark.parametrize("body", KNOWN.values(), ids=KNOWN)
def test_an_answer_that_contradicts_the_description_is_refused(kind: Kind, body: bytes) -> None:
    with HostileServer(reply(body)) as server:
        with pytest.raises(UnexpectedReply, match="gradient"):
            call(kind, server.url, ask_batch)
        # Asked again once, since the model might have been replaced.
        assert [line.split()[0] for line in server.requests] == ["GET", "POST", "GET"]


@both
def test_an_answer_in_another_dtype_than_asked_for_is_refused(kind: Kind) -> None:
    with HostileServer(RIGHT) as server, pytest.raises(UnexpectedReply, match="float32"):
        call(kind, server.url, lambda client: client.model("toy").gradient(POINT, dtype="float32"))


@both
def test_an_answer_by_another_version_than_asked_for_is_refused(kind: Kind) -> None:
    with HostileServer(RIGHT, reply(facts(version="2"))) as server, pytest.raises(UnexpectedReply, match="version 2"):
        call(kind, server.url, lambda client: client.model("toy", version=2).gradient(POINT))


@both
def test_an_answer_with_weights_has_one_output(kind: Kind) -> None:
    body = tensors(value=np.ones((1, 3)))
    with HostileServer(reply(body), reply(facts(m=3))) as server, pytest.raises(UnexpectedReply, match=r"\(1, 1\)"):
        call(kind, server.url, lambda client: client.model("toy").value(POINT, weights=[1.0, 2.0, 3.0]))


@both
def test_numbers_that_are_not_finite_come_as_they_are(kind: Kind) -> None:
    gradient = np.array([[[np.nan], [np.inf]]])
    with HostileServer(reply(tensors(gradient=gradient))) as server:
        np.testing.assert_array_equal(call(kind, server.url, ask_point), gradient[0])


@both
def test_a_model_replaced_by_one_of_another_size_is_described_again(kind: Kind) -> None:
    """The first answer does not fit the first description; the second description fits it."""
    sizes = iter([1, 3, 3])
    with HostileServer(reply(tensors({"model": "toy", "version": "2"}, gradient=np.ones((5, 2, 3))))) as server:
        server._scripts["GET"] = lambda connection: connection.sendall(
            reply(facts(version="2", m=next(sizes)), "200 OK", "connection: close")
        )
        assert call(kind, server.url, ask_batch).shape == (5, 2, 3)


@both
def test_an_unusual_number_of_outputs_is_read(kind: Kind) -> None:
    """The answer is over what is read about one point of a model that was not described."""
    body = tensors(gradient=np.ones((1, 2, 200_000)))
    with HostileServer(reply(body), reply(facts(m=200_000))) as server:
        assert call(kind, server.url, ask_point).shape == (2, 200_000)


DESCRIPTIONS = {
    "nothing": b"",
    "a list": b"[]",
    "nested": nested(100_000),
    "no JSON": b"{",
    "no numbers": facts(d=2, metadata={"x": float("nan")}),
    "an endless number": b'{"d": 1' + b"0" * 5000 + b"}",
    "no UTF-8": b'{"name": "\xff"}',
    "no name": facts(name=...),
    "another name": facts(name="other"),
    "no version": facts(version=...),
    "a number as version": facts(version=1),
    "text as d": facts(d="2"),
    "a fraction as d": facts(d=2.5),
    "true as m": facts(m=True),
    "nothing as m": facts(m=0),
    "another dtype": facts(dtype="int64"),
    "a list as dtype": facts(dtype=[]),
    "metadata": facts(metadata=[]),
    "no limits": facts(limits=...),
    "limits": facts(limits=[1, 2]),
    "a limit too few": facts(limits={"rows": 10}),
    "a limit below 1": facts(limits={**FACTS["limits"], "rows": 0}),  # type: ignore[dict-item]
    "directions": facts(limits={**FACTS["limits"], "directions": "many"}),  # type: ignore[dict-item]
}


@both
@pytest.mark.parametrize("ask", [describe, ask_batch])
@pytest.mark.parametrize("body", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_faulty_description_is_refused(kind: Kind, ask: Callable[[Any], Any], body: bytes) -> None:
    with HostileServer(RIGHT_BATCH, reply(body)) as server, pytest.raises(UnexpectedReply, match="expected"):
        call(kind, server.url, ask)


@both
def test_a_model_that_is_not_ready_may_have_no_sizes(kind: Kind) -> None:
    body = facts(state="loading", d=None, m=None, dtype=None, metadata=None)
    refusal = document({"code": "not_ready", "detail": "still loading", "request_id": "x"})
    with HostileServer(reply(refusal, "503 Busy"), reply(body)) as server:
        assert call(kind, server.url, describe)["d"] is None
        with pytest.raises(NotReady, match="still loading"):
            call(kind, server.url, ask_batch)


LISTS = {"nothing": b"{}", "text": b'{"models": "x"}', "numbers": b'{"models": [1]}', "nested": nested(100_000)}


@both
@pytest.mark.parametrize("body", LISTS.values(), ids=LISTS)
def test_a_faulty_list_is_refused(kind: Kind, body: bytes) -> None:
    with HostileServer(b"", reply(body)) as server, pytest.raises(UnexpectedReply):
        call(kind, server.url, lambda client: client.models())


@both
@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"name": "other"}'])
def test_a_faulty_word_about_loading_is_refused(kind: Kind, action: str, body: bytes) -> None:
    with HostileServer(reply(body)) as server, pytest.raises(UnexpectedReply):
        call(kind, server.url, lambda client: getattr(client, action)("toy"))


PROBLEM = {"code": "overloaded", "detail": "busy", "request_id": "x"}
PROBLEMS = {
    "nothing": reply(b"", "503 Busy"),
    "nested": reply(nested(100_000), "503 Busy"),
    "a list": reply(b"[]", "503 Busy"),
    "an unknown code": reply(document({**PROBLEM, "code": "new"}), "503 Busy"),
    "a list as code": reply(document({**PROBLEM, "code": []}), "503 Busy"),
    "a number as detail": reply(document({**PROBLEM, "detail": 1}), "503 Busy"),
    "no detail": reply(document({"code": "overloaded"}), "503 Busy"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "elsewhere": reply(b"", "301 Moved", "location: http://127.0.0.1:9/"),
    "no status": reply(b"", "999 ?"),
}


@both
@pytest.mark.parametrize("whole", PROBLEMS.values(), ids=PROBLEMS)
def test_an_error_that_is_none_of_the_service_is_unexpected(kind: Kind, whole: bytes) -> None:
    with HostileServer(whole) as server, pytest.raises(UnexpectedReply):
        call(kind, server.url, ask_point)


@both
@pytest.mark.parametrize("asked", ["²", "-1", "1e9", "1" * 400, "Wed, 21 Oct 2015 07:28:00 GMT", "٣"])
def test_a_time_to_retry_that_is_none_is_left_out(kind: Kind, asked: str) -> None:
    whole = reply(document(PROBLEM), "503 Busy", f"retry-after: {asked}")
    with HostileServer(whole) as server, pytest.raises(Overloaded) as caught:
        call(kind, server.url, ask_point)
    assert caught.value.retry_after_s == 1  # the code's own


@both
def test_members_of_an_error_cannot_take_the_place_of_its_parts(kind: Kind) -> None:
    body = document({**PROBLEM, "status": 200, "self": 1, "extra": {"x": 2}, "request_id": [1]})
    with HostileServer(reply(body, "503 Busy", "retry-after: 7")) as server, pytest.raises(Overloaded) as caught:
        call(kind, server.url, ask_point)
    assert (caught.value.status, caught.value.detail, caught.value.retry_after_s) == (503, "busy", 7)
    assert caught.value.extra == {"self": 1, "extra": {"x": 2}}


BROKEN = {
    "no HTTP": b"hello\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "101": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "HTTP/3": b"HTTP/3 200 OK\r\n\r\n",
    "nothing": b"",
    "half a head": RIGHT[:20],
    "half a body": RIGHT[:-10],
    "a length that is none": b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "an endless field": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 300_000,
    "endless fields": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 60_000,
    "a chunk size that is none": CHUNKED + b"zz\r\n",
    "an endless chunk size": CHUNKED + b"1" * 300_000,
    "an encoding that is none": b"HTTP/1.1 200 OK\r\ntransfer-encoding: x\r\n\r\n",
}


@both
@pytest.mark.parametrize("whole", BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_reply_is_a_lost_connection(kind: Kind, whole: bytes) -> None:
    def script(connection: Any) -> None:
        connection.sendall(whole)

    with HostileServer(script) as server, pytest.raises(ConnectionLost):
        call(kind, server.url, ask_point)


@both
def test_no_cookies_are_kept(kind: Kind) -> None:
    whole = RIGHT.replace(b"\r\n\r\n", b"\r\nset-cookie: a=b; Max-Age=999\r\n\r\n", 1)
    seen: list[bytes] = []

    def script(connection: Any) -> None:
        connection.sendall(whole)
        seen.append(connection.recv(10_000))
        connection.sendall(whole)

    def twice(client: Any) -> Any:
        model = client.model("toy")
        if kind is Client:
            return [model.gradient(POINT), model.gradient(POINT)]

        async def ask() -> Any:
            return [await model.gradient(POINT), await model.gradient(POINT)]

        return ask()

    with HostileServer(script) as server:
        call(kind, server.url, twice)
    assert seen[0].startswith(b"POST")
    assert b"cookie" not in seen[0].lower()


def test_a_right_reply_in_single_bytes_is_understood() -> None:
    def script(connection: Any) -> None:
        for byte in RIGHT:
            connection.sendall(bytes([byte]))

    with HostileServer(script) as server, Client(server.url) as client:
        assert (ask_point(client) == 1).all()


@pytest.mark.slow
def test_damaged_replies_are_right_or_typed() -> None:
    """One byte of a right reply is another one, anywhere in it."""
    random = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()

    def script(connection: Any) -> None:
        damaged = bytearray(RIGHT)
        damaged[random.integers(len(damaged))] = random.integers(256)
        connection.sendall(damaged)

    with HostileServer(script) as server, Client(server.url, deadline_s=5, retries=0) as client:
        for _ in range(choose(200, 400)):
            try:
                outcomes["answer"] += ask_point(client).shape[0] == 2
            except ClientError as error:
                outcomes[type(error).__name__] += 1
    assert outcomes["answer"] > 0
    assert outcomes["UnexpectedReply"] > 0
