"""Every vector gets its own answer, which names the fault, and the server continues."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import pytest

from tests.live import LiveServer
from tests.raw import Reply, check_error, send_over
from tests.security.vectors import VECTORS, Vector
from tests.whole import Note


@pytest.fixture(scope="module")
def connection(server: LiveServer) -> Iterator[http.client.HTTPConnection]:
    """Yield one connection for all tests, so that leftovers of one request break the next."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    yield connection
    connection.close()


def send(connection: http.client.HTTPConnection, vector: Vector) -> Reply:
    headers = {"Content-Type": "application/json", **vector.headers}
    return send_over(
        connection, "POST", vector.path, vector.body, {name: text.encode() for name, text in headers.items()}
    )


def check(vector: Vector, reply: Reply) -> None:
    """Assert that the answer is the vector's, and names the field, the expected value and the received one."""
    assert reply.status == vector.status, reply
    if vector.status == 200:
        return
    check_error(reply)
    problem = reply.json()
    if "error" in problem:
        error = problem["error"]
        detail = error if isinstance(error, str) else error["message"]
        assert vector.about in detail.partition(":")[0] or not vector.about, detail
    else:
        detail = problem["detail"]
        assert problem.get("field", "") == vector.about, problem
        if vector.about:
            assert problem["expected"], problem
            assert problem["got"], problem
        if vector.row is not None:
            assert problem["row"] == vector.row, problem
    assert "expected " in detail, detail
    assert not vector.about or "got " in detail, detail


@pytest.mark.parametrize(
    "vector", VECTORS, ids=[f"{number} {vector.path} {vector.name}" for number, vector in enumerate(VECTORS)]
)
def test_a_vector_gets_its_answer(connection: http.client.HTTPConnection, vector: Vector) -> None:
    check(vector, send(connection, vector))


def test_the_server_goes_on(server: LiveServer, connection: http.client.HTTPConnection, note: Note) -> None:
    bad = [vector for vector in VECTORS if vector.status != 200]
    distinct = {(vector.path, vector.body, tuple(vector.headers.items())) for vector in bad}
    note(f"{len(bad)} vectors, {len(distinct)} of them distinct, and {len(VECTORS) - len(bad)} good requests")
    assert len(distinct) == len(bad) >= 500
    assert server.metric("hessquik_worker_restarts_total") == 0
    assert not any("Traceback" in line for line in server.log)
    good = Vector("good", "/v1/models/peaks/value", b'{"inputs":[0,0]}', 200)
    assert send(connection, good).status == 200
