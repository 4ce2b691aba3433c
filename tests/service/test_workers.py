"""Workers that die, hang, refuse or are slow: real processes, real signals."""

from __future__ import annotations

import atexit
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch

from hessquik.networks import NN
from service.workers import FRESH_S, TICK_S
from tests.live import ROOT, LiveServer, wait_until
from tests.raw import check_error, post, receive_all, replies
from tests.service import seeded
from tests.service.conftest import FAULTY_GROUP
from tests.service.faulty_worker import DIFFERS, HANGS, HELD, KILLED, RAISES, SHORT
from tests.service.gate import Gate
from tests.whole import choose

#: One client for all threads: making one takes longer than most of what is measured here.
HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=64, max_keepalive_connections=64))
atexit.register(HTTP.close)
FAULTY = ("-m", "tests.service.faulty_serve")

#: Longer than the faulty server's workers may be silent.
PAUSE_S = FRESH_S + 1.5

pytestmark = FAULTY_GROUP


@pytest.fixture(scope="module")
def network() -> NN:
    return seeded.network(3)


@pytest.fixture
def server(faulty: LiveServer) -> LiveServer:
    return faulty


@pytest.fixture(scope="module")
def checked(faulty_server: LiveServer) -> Iterator[LiveServer]:
    """Yield a server that computes every batch twice, does not look for work, and replaces dead workers quickly."""
    settings = {"self_check": 1, "spin_us": 0}
    with LiveServer(faulty_server.models, settings=settings, command=(*FAULTY, "quick")) as live:
        yield live


def ask(server: LiveServer, point: list[float], **options: Any) -> httpx.Response:
    return HTTP.post(f"{server.url}/v1/models/small/value", json={"inputs": point}, **options)


def queued(server: LiveServer) -> float:
    """Return the number of requests that are accepted and not answered."""
    return server.metric("hessquik_queue_requests")


def expected(network: NN, point: list[float]) -> float:
    return float(network(torch.tensor([point], dtype=torch.float64))[0].detach())


def answers_all(server: LiveServer, network: NN) -> None:
    """Ask often enough that the worker waits for work, and seldom enough that it sleeps."""
    for pause_s in (0.0, 0.005, 0.02):
        for number in range(20):
            time.sleep(pause_s)
            point = [number / 10, 1.0]
            assert ask(server, point).json()["value"] == pytest.approx([expected(network, point)], abs=1e-12)


def test_a_worker_that_looks_for_work_answers_all_of_it(server: LiveServer, network: NN) -> None:
    answers_all(server, network)


@pytest.mark.parametrize("poison", [KILLED, RAISES, SHORT], ids=["kills", "raises", "answers too few rows"])
def test_only_the_poison_row_among_good_ones_fails(gated: LiveServer, gate: Gate, network: NN, poison: float) -> None:
    """A row that is held keeps the worker busy while good points and one poison gather into one batch."""
    points = [[0.1 * number, -1.0] for number in range(choose(7, 15))]
    points.insert(3, [poison, 0.0])
    with ThreadPoolExecutor(17) as threads:
        held = threads.submit(ask, gated, [HELD, 0.0])
        with gate.held():
            asked = [threads.submit(ask, gated, point) for point in points]
            wait_until(lambda: queued(gated) == 1 + len(points))
        replies = [one.result() for one in asked]
        assert held.result().status_code == 200
    for point, reply in zip(points, replies, strict=True):
        if point[0] == poison:
            assert (reply.status_code, reply.json()["code"]) == (500, "evaluation_failed")
        else:
            assert reply.status_code == 200, reply.text
            assert reply.json()["value"] == [pytest.approx(expected(network, point), rel=1e-12)]


def test_a_hanging_worker_is_replaced_and_only_its_row_fails(server: LiveServer, network: NN) -> None:
    before = {worker.pid for worker in server.workers()}
    reply = ask(server, [HANGS, 0.0])
    assert (reply.status_code, reply.json()["code"]) == (500, "evaluation_failed")
    assert ask(server, [1.0, 2.0]).json()["value"] == [pytest.approx(expected(network, [1.0, 2.0]), rel=1e-12)]
    assert before.isdisjoint(worker.pid for worker in server.workers())


def test_a_killed_worker_under_load_loses_nothing(server: LiveServer, network: NN) -> None:
    points = np.random.default_rng(0).uniform(-2, 2, (150, 2)).tolist()
    killed = threading.Timer(0.3, lambda: server.workers()[0].send_signal(signal.SIGKILL))
    killed.start()
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda point: ask(server, point), points))
    killed.join()
    assert [reply.status_code for reply in replies] == [200] * len(points)
    got = [reply.json()["value"][0] for reply in replies]
    assert got == pytest.approx([expected(network, point) for point in points], rel=1e-12)


def test_a_deadline_is_kept_and_what_is_late_is_not_computed(gated: LiveServer, gate: Gate) -> None:
    rows = gated.metric("hessquik_rows_total")
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(ask, gated, [HELD, 0.0])
        with gate.held():
            reply = ask(gated, [0.0, 0.0], headers={"X-Deadline-Ms": "20"})
        assert (reply.status_code, reply.json()["code"]) == (504, "deadline_exceeded")
        assert held.result().status_code == 200
    assert ask(gated, [0.0, 0.0]).status_code == 200  # the worker would have come to the late row before
    assert gated.metric("hessquik_rows_total") == rows + 2


def test_what_a_client_no_longer_waits_for_is_not_computed(gated: LiveServer, gate: Gate) -> None:
    body = b'{"inputs":[0.5,0.5]}'
    head = (
        "POST /v1/models/small/value HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    gone = 'hessquik_requests_total{route="/v1/models/{model}/value",status="499"}'
    rows, left = gated.metric("hessquik_rows_total"), gated.metric(gone)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(ask, gated, [HELD, 0.0])
        with gate.held():
            for number in range(5):
                with socket.create_connection(("127.0.0.1", gated.port)) as connection:
                    connection.sendall(head.encode() + body)
                    wait_until(lambda: queued(gated) == 2)
                wait_until(lambda number=number: gated.metric(gone) == left + number + 1)
        assert held.result().status_code == 200
    assert ask(gated, [0.0, 0.0]).status_code == 200
    assert queued(gated) == 0
    assert gated.metric("hessquik_rows_total") == rows + 2


def test_exactly_what_is_over_the_queue_is_refused_at_once(gated: LiveServer, gate: Gate) -> None:
    """The worker is busy with a row, which counts until it is answered: of 30 more, 19 find a place."""
    with ThreadPoolExecutor(31) as threads:
        held = threads.submit(ask, gated, [HELD, 0.0])
        with gate.held():
            asked = [threads.submit(ask, gated, [0.0, 1.0]) for _ in range(30)]
            wait_until(lambda: queued(gated) == 20 and sum(one.done() for one in asked) == 11)
            refused = [one.result() for one in asked if one.done()]
        replies = [one.result() for one in asked]
        assert held.result().status_code == 200
    assert {reply.status_code for reply in refused} == {503}
    assert {reply.json()["code"] for reply in refused} == {"overloaded"}
    assert {reply.headers["retry-after"] for reply in refused} == {"1"}
    assert sum(reply.status_code == 503 for reply in replies) == 11
    assert sum(reply.status_code == 200 for reply in replies) == 19


def test_metrics_add_up_to_what_was_sent(server: LiveServer) -> None:
    sample = 'hessquik_requests_total{route="/v1/models/{model}/value",status="%d"}'
    before = {status: server.metric(sample % status) for status in (200, 422)}
    rows = server.metric("hessquik_rows_total")
    for number in range(10):
        ask(server, [number, 0.0])
    for _ in range(3):
        ask(server, [1.0, 2.0, 3.0])
    assert server.metric(sample % 200) == before[200] + 10
    assert server.metric(sample % 422) == before[422] + 3
    assert server.metric("hessquik_rows_total") == rows + 10


def test_a_worker_that_disagrees_with_itself_answers_no_more(checked: LiveServer, network: NN) -> None:
    live, before = checked, checked.workers()
    answers_all(live, network)  # also without looking for work
    reply = ask(live, [DIFFERS, 0.0])
    assert (reply.status_code, reply.json()["code"]) == (500, "evaluation_failed")
    assert live.metric("hessquik_self_check_failures_total") >= 1
    live.wait_until_ready()
    assert not {*before} & {*live.workers()}
    value = ask(live, [0.5, 0.0]).json()["value"]
    assert value == pytest.approx([expected(network, [0.5, 0.0])], abs=1e-12)
    deadline = time.monotonic() + 10
    while live.metric("hessquik_self_check_rows_total") < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert live.metric("hessquik_self_check_rows_total") >= 1


def test_workers_that_cannot_be_kept_alive_end_the_service_with_70(checked: LiveServer) -> None:
    """Last of the server's tests."""
    deadline = time.monotonic() + 60
    while checked.process.poll() is None and time.monotonic() < deadline:
        for worker in checked.workers():
            worker.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert checked.stop() == 70


def test_a_pause_of_all_processes_ends_no_worker(server: LiveServer, network: NN) -> None:
    """A container or a virtual machine may be paused for longer than a worker may be silent."""
    restarts = server.metric("hessquik_worker_restarts_total")
    processes = [psutil.Process(server.process.pid), *server.workers()]
    for process in processes:
        process.suspend()
    time.sleep(PAUSE_S)
    for process in processes:  # the front end first, as it is the one that would draw the wrong conclusion
        process.resume()
    point = [0.25, -0.5]
    assert ask(server, point).json()["value"][0] == pytest.approx(expected(network, point), rel=1e-12)
    time.sleep(3 * TICK_S)
    assert server.metric("hessquik_worker_restarts_total") == restarts


def test_a_stop_answers_what_was_accepted_and_tells_the_others_so(faulty_server: LiveServer, gate: Gate) -> None:
    """One request hangs in the worker, another never arrives whole; both outlast the time to drain."""
    settings = {"drain_s": 4, "batch_timeout_s": 60}
    live = LiveServer(faulty_server.models, settings=settings, command=FAULTY).wait_until_ready()
    half = post("/v1/models/small/value", b'{"inputs":', Content_Length="99", Connection="keep-alive")
    with ThreadPoolExecutor(6) as threads, socket.create_connection(("127.0.0.1", live.port), 30) as connection:
        connection.sendall(half)
        first = threads.submit(ask, live, [HELD, 0.0])
        with gate.held():
            accepted = [first, *(threads.submit(ask, live, [HELD, float(number)]) for number in range(3))]
            wait_until(lambda: queued(live) == 4)
            gradient = f"{live.url}/v1/models/small/gradient"  # in a batch of its own
            hanging = threads.submit(HTTP.post, gradient, json={"inputs": [HANGS, 0.0]})
            wait_until(lambda: queued(live) == 5)
            stopped = threads.submit(live.stop)
            wait_until(lambda: not live.is_listening())
        gate.let_go()  # the other three, which share a batch
        assert stopped.result() == 0
        (cut_short,) = replies(receive_all(connection))
        reply = hanging.result()
        assert [reply.result().status_code for reply in accepted] == [200] * 4
    assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "not_ready", "1")
    assert (cut_short.status, cut_short.json()["code"]) == (503, "not_ready")
    check_error(cut_short)
    assert not any("Traceback" in line for line in live.log)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--device", "cuda"], 3, "CUDA"),
        (["--device", "tpu"], 3, "expected auto, cpu, cuda"),
    ],
    ids=["absent device", "unknown device"],
)
def test_a_start_that_cannot_be_is_one_clear_line(arguments: list[str], status: int, words: str) -> None:
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("this machine has the device that the test expects to be absent")
    command = [sys.executable, "-m", "service", "serve", "models", "--port", "0", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status, ended.stderr
    assert words in ended.stderr
