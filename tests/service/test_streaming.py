"""Large binary replies, which are sent while their last rows are computed: every way to end, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.numpy
import torch

import hessquik
from service.front import STREAMED_BYTES
from tests.live import ROOT, LiveServer, wait_until
from tests.raw import ask, post, receive_all, replies
from tests.service.conftest import FAULTY_GROUP
from tests.service.faulty_worker import HELD, RAISES
from tests.service.gate import Gate

SAFETENSORS = "application/x-safetensors"
ROWS = 60_000
HESSIAN = "/v1/models/peaks/hessian"
KEEP = {"Connection": "keep-alive"}

pytestmark = FAULTY_GROUP


def points(**special: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    x = np.random.default_rng(0).uniform(-1, 1, (ROWS, 2))
    for row, value in special.items():
        x[int(row.removeprefix("row")), 0] = value
    return x


def bulk(path: str = HESSIAN, x: Any = None, **fields: str) -> bytes:
    body = safetensors.numpy.save({"inputs": points() if x is None else x})
    return post(path, body, Content_Type=SAFETENSORS, Accept=SAFETENSORS, **fields)


def connect(live: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), 30)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    evaluate = hessquik.Evaluator(hessquik.load(ROOT / "models" / "peaks.safetensors"))
    assert ROWS * evaluate.dtype.itemsize * 4 > STREAMED_BYTES
    names = ("value", "gradient", "hessian")
    found = evaluate(torch.from_numpy(points()).to(evaluate.dtype), names)
    alone = evaluate(torch.from_numpy(points()).to(evaluate.dtype), ("hessian",))
    return {name: getattr(found, name).numpy() for name in names} | {"alone": alone.hessian.numpy()}


def test_replies_one_after_the_other_have_every_row_to_the_last_bit(
    faulty: LiveServer, expected: dict[str, Any]
) -> None:
    several = "/v1/models/peaks/evaluate?quantities=value,gradient,hessian"
    with connect(faulty) as connection:
        small = post("/v1/models/peaks/value", b'{"inputs":[0.5,0.25]}', **KEEP)
        connection.sendall(bulk(**KEEP) + small + bulk(several))
        first, middle, last = replies(receive_all(connection))
    assert (first.status, middle.status, last.status) == (200, 200, 200)
    assert np.array_equal(safetensors.numpy.load(first.body)["hessian"], expected["alone"])
    assert len(middle.body) < 200
    found = safetensors.numpy.load(last.body)
    assert sorted(found) == ["gradient", "hessian", "value"]
    for name, array in found.items():
        assert np.array_equal(array, expected[name]), name


def test_the_first_rows_come_before_the_last_are_computed(gated: LiveServer, gate: Gate) -> None:
    with connect(gated) as connection:
        connection.sendall(bulk(x=points(**{f"row{ROWS - 1}": HELD})))
        with gate.held():
            data = connection.recv(1 << 16)
            size = int(data.lower().split(b"content-length: ")[1].split(b"\r")[0])
            while len(data) < ROWS * 16:
                data += connection.recv(1 << 20)
            assert len(data) < size
        (reply,) = replies(data + receive_all(connection))
    assert (reply.status, len(reply.body)) == (200, size)


def test_a_reply_whose_last_row_fails_is_broken_off_and_not_made_up(faulty: LiveServer) -> None:
    status = 'hessquik_requests_total{route="/v1/models/{model}/hessian",status="499"}'
    before = faulty.metric(status)
    with connect(faulty) as connection:
        connection.sendall(bulk(x=points(**{f"row{ROWS - 1}": RAISES}), **KEEP))
        data = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(1 << 20):
                data += piece
    assert data.startswith(b"HTTP/1.1 200")
    announced = int(data.lower().split(b"content-length: ")[1].split(b"\r")[0])
    assert announced > len(data) - data.index(b"\r\n\r\n") - 4
    assert faulty.metric(status) == before + 1, "it is counted once"
    assert ask(faulty.port, post(HESSIAN, b'{"inputs":[0.5,0.25]}')).status == 200


def test_a_first_row_that_fails_is_an_error_as_ever(faulty: LiveServer) -> None:
    (reply,) = replies(_all(faulty, bulk(x=points(row0=RAISES))))
    assert (reply.status, reply.json()["code"]) == (500, "evaluation_failed")


def test_clients_that_leave_or_read_slowly_in_the_middle_leave_nothing(faulty: LiveServer) -> None:
    front = psutil.Process(faulty.process.pid)
    for _ in range(2):
        for how in ("leaves", "waits"):
            with connect(faulty) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                connection.sendall(bulk(**KEEP))
                connection.recv(1 << 16)
                if how == "waits":
                    time.sleep(0.3)
        time.sleep(0.5)
    before = front.num_fds()
    (reply,) = replies(_all(faulty, bulk()))
    assert len(reply.body) > ROWS * 16
    assert front.num_fds() <= before + 8, "buffers of those who left are lent again"
    wait_until(lambda: faulty.metric("hessquik_queue_requests") == 0)


def test_a_client_that_closes_its_sending_side_gets_every_byte(faulty: LiveServer, expected: dict[str, Any]) -> None:
    """No interim reply is mixed into the body."""
    with connect(faulty) as connection:
        connection.sendall(bulk(**KEEP))
        connection.shutdown(socket.SHUT_WR)
        data = receive_all(connection)
    data = data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"", 1) if data.startswith(b"HTTP/1.1 100") else data
    (reply,) = replies(data)
    assert np.array_equal(safetensors.numpy.load(reply.body)["hessian"], expected["alone"])


def _all(live: LiveServer, data: bytes) -> bytes:
    with connect(live) as connection:
        connection.sendall(data)
        return receive_all(connection)
