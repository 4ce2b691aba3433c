"""Bytes that are no HTTP, or nearly: one answer or a close, nothing smuggled, and the server goes on."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections import Counter

import psutil
import pytest

from tests.live import LiveServer
from tests.raw import DECLARED, check_error, exchange, post, receive_all, replies, request
from tests.whole import Note, choose

VALUE = "/v1/models/peaks/value"
BODY = b'{"inputs":[1,2]}'
#: What a smuggled request would be answered with; it must never be.
SMUGGLED = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: smuggled\r\n\r\n"


def vector(*fields: bytes, body: bytes = b"", line: bytes = b"POST /v1/models/peaks/value HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"Host: x", *fields]) + b"\r\n\r\n" + body


TE, CL = b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(SMUGGLED)
EMPTY = b"0\r\n\r\n"
#: Requests that two readers may end at different places, each followed by a smuggled one.
VECTORS: dict[str, bytes] = {
    "both": vector(TE, b"Content-Length: 5", body=EMPTY),
    "both, other order": vector(b"Content-Length: 5", TE, body=EMPTY),
    "both, zero": vector(b"Content-Length: 0", TE, body=EMPTY),
    "two lengths": vector(b"Content-Length: 0", CL),
    "two lengths, listed": vector(b"Content-Length: 0, %d" % len(SMUGGLED)),
    "two equal lengths": vector(CL, CL),
    "length with plus": vector(b"Content-Length: +0"),
    "length with minus": vector(b"Content-Length: -1"),
    "length in hex": vector(b"Content-Length: 0x10"),
    "length with space": vector(b"Content-Length: 1 0"),
    "length with letters": vector(b"Content-Length: 0a"),
    "length empty": vector(b"Content-Length: "),
    "length huge": vector(b"Content-Length: " + b"9" * 40),
    "length with underscore": vector(b"Content-Length: 1_0"),
    "length with point": vector(b"Content-Length: 0.0"),
    "length folded": vector(b"Content-Length:\r\n 0"),
    "length, space before colon": vector(b"Content-Length : 0"),
    "length, tab before colon": vector(b"Content-Length\t: 0"),
    "length, vertical tab": vector(b"Content-Length: \x0b0"),
    "coding, space before colon": vector(b"Transfer-Encoding : chunked", body=EMPTY),
    "coding twice": vector(TE, TE, body=EMPTY),
    "coding unknown": vector(b"Transfer-Encoding: xchunked", body=EMPTY),
    "coding identity": vector(b"Transfer-Encoding: identity", body=EMPTY),
    "coding list": vector(b"Transfer-Encoding: chunked, identity", body=EMPTY),
    "coding list, gzip": vector(b"Transfer-Encoding: gzip, chunked", body=EMPTY),
    "coding quoted": vector(b'Transfer-Encoding: "chunked"', body=EMPTY),
    "coding folded": vector(b"Transfer-Encoding:\r\n chunked", body=EMPTY),
    "coding, vertical tab": vector(b"Transfer-Encoding: \x0bchunked", body=EMPTY),
    "coding, nul": vector(b"Transfer-Encoding: chunked\x00", body=EMPTY),
    "coding in 1.0": vector(TE, body=EMPTY, line=b"POST /v1/models/peaks/value HTTP/1.0"),
    "chunk size negative": vector(TE, body=b"-1\r\n\r\n"),
    "chunk size plus": vector(TE, body=b"+1\r\na\r\n" + EMPTY),
    "chunk size 0x": vector(TE, body=b"0x1\r\na\r\n" + EMPTY),
    "chunk size huge": vector(TE, body=b"f" * 17 + b"\r\na\r\n" + EMPTY),
    "chunk size underscore": vector(TE, body=b"1_0\r\na\r\n" + EMPTY),
    "chunk size space": vector(TE, body=b"1 \r\na\r\n" + EMPTY),
    "chunk size empty": vector(TE, body=b"\r\n\r\n"),
    "chunk too short": vector(TE, body=b"5\r\na\r\n" + EMPTY),
    "chunk too long": vector(TE, body=b"1\r\naaaa\r\n" + EMPTY),
    "chunk without end": vector(TE, body=b"1\r\na" + EMPTY),
    "chunk, bare line feeds": vector(TE, body=b"1\na\n0\n\n"),
    "chunk, bare returns": vector(TE, body=b"1\ra\r0\r\r"),
    "chunk extension": vector(TE, body=b"1;a=b\r\na\r\n" + EMPTY),
    "chunk extension, line feed": vector(TE, body=b"1;a\nb\r\na\r\n" + EMPTY),
    "trailer length": vector(TE, body=b"0\r\nContent-Length: 99\r\n\r\n"),
    "trailer coding": vector(TE, body=b"0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "bare line feeds": b"GET /readyz HTTP/1.1\nHost: x\n\n",
    "bare returns": b"GET /readyz HTTP/1.1\rHost: x\r\r",
    "field without colon": vector(b"Hello"),
    "field without name": vector(b": a"),
    "field with nul": vector(b"X: a\x00b"),
    "field name with space": vector(b"X Y: a"),
    "first field folded": b"GET /readyz HTTP/1.1\r\n Host: x\r\n\r\n",
    "spaces in the line": b"GET  /readyz  HTTP/1.1\r\nHost: x\r\n\r\n",
    "version 2.0": b"GET /readyz HTTP/2.0\r\nHost: x\r\n\r\n",
    "version 9.9": b"GET /readyz HTTP/9.9\r\nHost: x\r\n\r\n",
    "version 0.9": b"GET /readyz\r\n",
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown verb": b"BREW /readyz HTTP/1.1\r\nHost: x\r\n\r\n",
    "lower verb": b"get /readyz HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect": b"CONNECT localhost:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "upgrade with a body": vector(b"Connection: upgrade", b"Upgrade: h2c", CL),
    "upgrade": b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303") + bytes(100),
}


@pytest.mark.parametrize("data", VECTORS.values(), ids=VECTORS.keys())
def test_a_desync_vector_smuggles_nothing(server: LiveServer, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 1.0) as connection:
        connection.sendall(data + SMUGGLED)
        answered = replies(receive_all(connection))
    statuses = [reply.status for reply in answered]
    # Either it was taken for one request, and the next one is the next one; or it was refused, and nothing follows.
    assert len(answered) <= 2, statuses
    if len(answered) == 2:
        assert answered[0].headers["x-request-id"] != "smuggled"
        assert answered[1].headers["x-request-id"] == "smuggled"
        assert data.count(b"Content-Length") + data.count(b"Transfer-Encoding") <= 1 or "trailer" in str(data), (
            statuses
        )
    elif statuses and answered[0].status == 200:
        assert answered[0].headers.get("connection") == "close"
    for reply in answered:
        if reply.status >= 400:
            check_error(reply)


def test_a_request_that_follows_is_seen(server: LiveServer) -> None:
    """Control: were a vector taken for less than it is, the rest would be answered like this."""
    with socket.create_connection(("127.0.0.1", server.port), 1.0) as connection:
        connection.sendall(vector(b"Content-Length: 0") + SMUGGLED)
        answered = replies(receive_all(connection))
    assert [reply.headers["x-request-id"] == "smuggled" for reply in answered] == [False, True]


def mutations(seed: int, count: int) -> list[bytes]:
    """Return well-formed requests with bytes changed, cut, doubled or moved."""
    random_ = random.Random(seed)
    seeds = [
        post(VALUE, BODY),
        post("/v1/models/borehole/evaluate", b'{"inputs":[[0.1,100,63070,990,63.1,700,1120,9855]]}'),
        request("GET", "/v1/models/peaks?version=1", Accept="application/json", X_Request_Id="a"),
        vector(TE, b"Connection: close", body=b"8\r\n" + BODY[:8] + b"\r\n8\r\n" + BODY[8:] + b"\r\n0\r\n\r\n"),
        post(VALUE, BODY, X_Deadline_Ms="1000", Accept="application/x-safetensors;q=0.5, */*;q=0.1"),
    ]
    words = [b"\r\n", b"\n", b"\x00", b" ", b":", b"[", b"{", b'"', b"NaN", b"1e999", b"-", b"%", b"\xff", b"chunked"]
    found = []
    for _ in range(count):
        head, end, body = random_.choice(seeds).partition(b"\r\n\r\n")
        is_body = random_.random() < 0.5  # then the head is right and says how long the body became
        data = bytearray(body if is_body else head + end + body)
        for _ in range(random_.choice((1, 1, 2, 4, 16))):
            at = random_.randrange(len(data) + 1)
            match random_.randrange(5):
                case 0 if at < len(data):
                    data[at] = random_.randrange(256)
                case 1:
                    del data[at : at + random_.randrange(1, 9)]
                case 2:
                    data[at:at] = random_.choice(words)
                case 3:
                    data[at:at] = data[at : at + random_.randrange(1, 33)]
                case _:
                    data[at:at] = random_.randbytes(random_.randrange(1, 5))
        if is_body and b"chunked" not in head:
            head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(data), head)
        found.append(head + end + bytes(data) if is_body else bytes(data))
    return found


def test_mutated_requests_get_declared_answers(server: LiveServer, note: Note) -> None:
    count, clients = choose(1500, 20_000), 4
    worker_pids = {worker.pid for worker in server.workers()}
    statuses: Counter[str] = Counter()
    faults: list[object] = []

    def client(number: int) -> None:
        for data in mutations(number, count // clients):
            with socket.create_connection(("127.0.0.1", server.port), 0.1) as connection:
                connection.sendall(data)
                answer = receive_all(connection)  # none if it is not whole, and will not get so
            try:
                answered = replies(answer)
                for reply in answered:
                    if reply.status >= 400:
                        assert reply.status in DECLARED
                        if reply.body:
                            check_error(reply)
                statuses["+".join(str(reply.status) for reply in answered) or "none"] += 1
            except (AssertionError, KeyError, ValueError) as error:
                faults.append((data, answer, error))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    note(f"{count} mutated requests, {len(faults)} undeclared answers; {dict(statuses.most_common(6))}")
    assert faults == []
    assert sum(statuses.values()) == count
    assert statuses["200"] > 0, "no mutation was harmless: the test checks too little"
    assert {worker.pid for worker in server.workers()} == worker_pids
    assert server.is_ready()


def test_an_endless_head_is_not_kept(server: LiveServer) -> None:
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    for start in (b"GET /livez HTTP/1.1\r\nX: ", b"GET /livez HTTP/1.1\r\n", b"GET /", b"GET /livez HTTP/1.1\r\nX"):
        sent = 0
        with socket.create_connection(("127.0.0.1", server.port), 5) as connection:
            try:
                connection.sendall(start)
                while sent < 64 << 20:
                    connection.sendall(b"a" * 65536)
                    sent += 65536
            except OSError:
                pass
        assert sent < 64 << 20, start
    assert process.memory_info().rss - before <= 8 << 20


def test_a_flood_of_chunks_is_cut_off(server: LiveServer) -> None:
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    began = time.monotonic()
    answer = exchange(server.port, vector(TE, body=b"1\r\n \r\n" * 10**6 + b"0\r\n\r\n"))
    assert answer == b"" or replies(answer)[0].status == 400
    assert time.monotonic() - began <= 5
    whole = vector(TE, b"Connection: close", body=b"1\r\n \r\n" * 60_000 + b"10\r\n" + BODY + b"\r\n0\r\n\r\n")
    assert replies(exchange(server.port, whole))[0].status == 200
    assert process.memory_info().rss - before <= 8 << 20


def test_one_port_is_listening(server: LiveServer) -> None:
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    listening = [
        (process.pid, connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    ]
    assert listening == [(server.process.pid, "127.0.0.1", server.port)]
    assert not [other for other in processes[1:] if other.net_connections("inet")], "a worker holds a network socket"
