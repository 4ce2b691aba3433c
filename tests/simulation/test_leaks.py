"""No request leaks memory, however it ends: objects are counted with the garbage collector off."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from hessquik_client.errors import NotReady
from service.http.connection import Connection
from tests.simulation.front import Front, Transport

Ending = Callable[[Front], Transport]
#: Times that an ending is repeated while objects are counted, and rounds after which memory has settled.
TIMES, ROUNDS = 10, 3
LIMITS: dict[str, Any] = {
    "max_body_bytes": 200_000, "max_rows": 4000, "max_queue_rows": 3000, "max_queue_requests": 4, "max_headers": 8,
    "max_queue_bytes": 48_000, "max_reply_bytes": 90_000, "max_header_bytes": 1024, "max_connections": 8,
    "max_held_bytes": 1 << 20, "receive_timeout_s": 3.0, "send_timeout_s": 2.0, "keep_alive_s": 5.0,
}  # fmt: skip


def post(path: str = "/v1/models/a/evaluate", body: Any = None, rows: int = 2, **fields: str) -> bytes:
    """Return a POST request with a JSON body."""
    body = {"inputs": [[0.25, 0.5]] * rows, "quantities": ["value", "gradient"]} if body is None else body
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{lines}"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


def get(path: str, **fields: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"GET {path} HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode()


def expect(transport: Transport, status: int, code: str = "") -> Transport:
    """Check what a client got, and close its connection."""
    got = bytes(transport.sent)
    assert got.startswith(b"HTTP/1.1 %d " % status), got[:300]
    assert code.encode() in got, got[:500]
    transport.close()
    transport.front.settle()
    return transport


def answered(front: Front) -> Transport:
    client = front.connect(post())
    front.answer()
    return expect(client, 200, "gradient")


def answered_to_many(front: Front) -> Transport:
    clients = [front.connect(post()) for _ in range(3)]
    front.answer()
    front.answer()
    for client in clients[1:]:
        expect(client, 200)
    return expect(clients[0], 200)


def pipelined(front: Front) -> Transport:
    client = front.connect(post() * 3)
    for _ in range(3):
        front.answer()
    assert client.sent.count(b"HTTP/1.1 200") == 3
    return expect(client, 200)


def closed(front: Front) -> Transport:
    client = front.connect(post())
    client.close()
    front.settle()
    front.answer()
    return client


def reset(front: Front) -> Transport:
    client = front.connect(post())
    client.lose(ConnectionResetError())
    front.settle()
    front.answer()
    return client


def reset_in_a_queue(front: Front) -> Transport:
    client = front.connect(post() * 3)
    client.lose(ConnectionResetError())
    front.settle()
    front.answer()
    return client


def reset_in_a_head(front: Front) -> Transport:
    client = front.connect(post()[:60])
    client.lose(ConnectionResetError())
    front.settle()
    return client


def reset_in_a_body(front: Front) -> Transport:
    client = front.connect(post(rows=50)[:300])
    client.lose(ConnectionResetError())
    front.settle()
    return client


def half_closed(front: Front) -> Transport:
    client = front.connect(post())
    assert client.connection is not None
    front.call(client.connection.eof_received)
    front.answer()
    return expect(client, 200)


def late(front: Front) -> Transport:
    client = front.connect(post(x_deadline_ms="50"))
    front.pass_time(1.0)
    front.answer()
    return expect(client, 504, "deadline_exceeded")


def late_in_line(front: Front) -> Transport:
    first = front.connect(post())
    client = front.connect(post(x_deadline_ms="50"))
    front.pass_time(1.0)
    front.answer()
    expect(first, 200)
    return expect(client, 504, "deadline_exceeded")


def body_too_large(front: Front) -> Transport:
    return expect(front.connect(post(body=b"x" * 200_001)), 413, "body_too_large")


def chunks_too_large(front: Front) -> Transport:
    head = b"POST /v1/models/a/value HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    client = front.connect(head)
    for _ in range(5):
        front.send(client, b"c350\r\n" + b"x" * 50_000 + b"\r\n")
    return expect(client, 413, "body_too_large")


def head_too_large(front: Front) -> Transport:
    return expect(front.connect(get("/livez", x="y" * 2000)), 400)


def too_many_fields(front: Front) -> Transport:
    return expect(front.connect(get("/livez", **{f"x{number}": "y" for number in range(20)})), 400)


def too_many_rows(front: Front) -> Transport:
    return expect(front.connect(post(rows=4001)), 422)


def reply_too_large(front: Front) -> Transport:
    body = {"inputs": [[0.25, 0.5]] * 2900, "quantities": ["value", "gradient", "hessian"]}
    return expect(front.connect(post(body=body)), 413, "reply_too_large")


def queue_of_requests_full(front: Front) -> Transport:
    waiting = [front.connect(post()) for _ in range(4)]
    client = expect(front.connect(post()), 503, "overloaded")
    front.answer()
    front.answer()
    for one in waiting:
        expect(one, 200)
    return client


def full(front: Front, rows: tuple[int, int], refused: bytes, reason: str) -> Transport:
    """Refuse a request while two others wait, which are answered afterwards."""
    waiting = [front.connect(post(rows=count)) for count in rows]
    client = expect(front.connect(refused), 503, reason)
    for _ in range(4):
        front.answer()
    for one in waiting:
        expect(one, 200)
    return client


def queue_of_rows_full(front: Front) -> Transport:
    return full(front, (1400, 1400), post(body={"inputs": [[0.5, 1]] * 3001}, path="/v1/models/a/value"), "rows")


def queue_of_bytes_full(front: Front) -> Transport:
    return full(front, (1500, 1400), post(rows=400), "bytes")


def too_much_held(front: Front) -> Transport:
    waiting = [front.connect(post(body=b"x" * 199_000)[:-10]) for _ in range(5)]
    client = expect(front.connect(post(body=b"x" * 199_000)), 503, "overloaded")
    for one in waiting:
        one.close()
    front.settle()
    return client


def too_many_connections(front: Front) -> Transport:
    others = [front.connect() for _ in range(8)]
    client = expect(front.connect(post()), 503, "connections")
    for one in others:
        one.close()
    front.settle()
    return client


def no_http(front: Front) -> Transport:
    return expect(front.connect(b"nonsense\r\n\r\n"), 400)


def no_json(front: Front) -> Transport:
    return expect(front.connect(post(body=b'{"inputs": [[1, 2')), 400)


def wrong_shape(front: Front) -> Transport:
    return expect(front.connect(post(body={"inputs": [[1, 2, 3]]})), 422)


def unknown_field(front: Front) -> Transport:
    return expect(front.connect(post(body={"input": [[1, 2]]})), 422)


def unknown_model(front: Front) -> Transport:
    return expect(front.connect(post("/v1/models/b/value")), 404)


def unknown_path(front: Front) -> Transport:
    return expect(front.connect(get("/none")), 404)


def wrong_method(front: Front) -> Transport:
    return expect(front.connect(get("/v1/models/a/value")), 405)


def other_dialect(front: Front) -> Transport:
    client = front.connect(post("/Evaluate", {"name": "a", "input": [[0.5, 1.0]], "config": {}}))
    front.answer()
    return expect(client, 200)


def other_dialect_refused(front: Front) -> Transport:
    return expect(front.connect(post("/v2/models/a/infer", {"inputs": []})), 400)


def drained(front: Front) -> Transport:
    client = front.connect(post())
    assert client.connection is not None
    front.call(client.connection.shutdown)
    front.answer()
    assert client.connection is None, "it is closed after its last reply"
    return expect(client, 200, "connection: close")


def given_up_while_drained(front: Front) -> Transport:
    client = front.connect(post())
    front.abandon_all(NotReady("expected to have time, the service is stopping"))
    front.answer()
    return expect(client, 503, "not_ready")


def worker_lost(front: Front) -> Transport:
    client = front.connect(post(rows=1))
    front.lose_worker()
    front.answer()
    return expect(client, 200)


def worker_lost_twice(front: Front) -> Transport:
    client = front.connect(post(rows=1))
    front.lose_worker()
    front.lose_worker()
    return expect(client, 500, "evaluation_failed")


def out_of_memory(front: Front) -> Transport:
    client = front.connect(post(rows=1))
    front.answer("memory")
    front.answer("memory")
    return expect(client, 503, "overloaded")


def evaluation_failed(front: Front) -> Transport:
    client = front.connect(post(rows=1))
    front.answer("ValueError")
    front.answer("ValueError")
    return expect(client, 500, "evaluation_failed")


def model_reloaded(front: Front) -> Transport:
    client = front.connect(post())
    front.node.load("a")
    front.answer()
    return expect(client, 200)


def model_unloaded(front: Front) -> Transport:
    client = front.connect(post())
    front.node.unload("a")
    front.answer()
    front.node.load("a")
    return expect(client, 200)


def body_not_sent(front: Front) -> Transport:
    client = front.connect(post(rows=50)[:300])
    front.pass_time(4.0)
    assert client.connection is None
    return client


def reply_not_taken(front: Front) -> Transport:
    client = front.connect(post(rows=1300), takes=False)
    front.answer()
    front.pass_time(12.0)
    assert client.connection is None
    return client


def idle(front: Front) -> Transport:
    client = front.connect(post())
    front.answer()
    front.pass_time(12.0)
    assert client.connection is None
    return client


ENDINGS = [
    *(answered, answered_to_many, pipelined, closed, reset, reset_in_a_queue, reset_in_a_head, reset_in_a_body),
    *(half_closed, late, late_in_line, body_too_large, chunks_too_large, head_too_large, too_many_fields),
    *(too_many_rows, reply_too_large, queue_of_requests_full, queue_of_rows_full, queue_of_bytes_full, too_much_held),
    *(too_many_connections, no_http, no_json, wrong_shape, unknown_field, unknown_model, unknown_path, wrong_method),
    *(other_dialect, other_dialect_refused, drained, given_up_while_drained, worker_lost, worker_lost_twice),
    *(out_of_memory, evaluation_failed, model_reloaded, model_unloaded, body_not_sent, reply_not_taken, idle),
]


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    """Return a front end that has answered 300 requests, so that its counters and caches no longer grow."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("service.front._return_memory", lambda: None)
        made = Front(monkeypatch, **LIMITS)
        for _ in range(300):
            answered(made)
        gc.collect()
        gc.freeze()
        gc.disable()
        yield made
        gc.enable()
        gc.unfreeze()


def objects() -> Counter[str]:
    """Return the number of live objects that the garbage collector tracks, by type."""
    return Counter(type(one).__name__ for one in gc.get_objects())


def blocks() -> int:
    """Return the number of allocated blocks of memory after a garbage collection, which also clears free lists."""
    gc.collect()
    return sys.getallocatedblocks()


def ended(front: Front, ending: Ending) -> None:
    """End a request, and count it in the metrics, which the service does a few times a second."""
    ending(front)
    front.core.metrics.settle()


def growth(work: Callable[[], object]) -> tuple[dict[str, int], float]:
    """Return the tracked objects, by type, and the blocks of memory that each repetition of a call leaves.

    Several rounds are measured: counters and tables grow at first, but a leak grows in every round.
    """
    objects()
    for _ in range(ROUNDS):
        held, alive = blocks(), objects()
        for _ in range(TIMES):
            work()
        kept = {name: count for name, count in (objects() - alive).items() if count >= TIMES}
        del alive
        left = (blocks() - held) / TIMES
        if not kept and left < 1:
            break
    return kept, left


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_nothing_is_left_of_a_request(front: Front, ending: Ending) -> None:
    kept, left = growth(lambda: ended(front, ending))
    assert kept == {}
    assert left < 1
    assert not front.state.connections
    assert front.app.front.budget.held_bytes == 0
    queue = front.core.scheduler.queue
    assert (queue.requests, queue.rows, queue.payload_bytes) == (0, 0, 0)
    assert all(one.users == 0 for one in front.node.repository.versions("a").values())


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_what_is_left_is_seen(front: Front, ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: connections with planted reference cycles, and a few bytes kept of each, are found."""
    kept_bytes: list[bytes] = []

    class CyclicConnection(Connection):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.itself = self
            kept_bytes.extend((bytes(32), bytes(33)))

    monkeypatch.setattr(front.listener, "connect", partial(CyclicConnection, front.listener))
    kept, left = growth(lambda: ended(front, ending))
    assert kept["CyclicConnection"] >= TIMES
    assert left >= 1
