"""Health tells the truth: what cannot answer is not ready within 3 s, and says so."""

from __future__ import annotations

import signal
import time

import httpx
import pytest

from tests.chaos.conftest import Start
from tests.chaos.faulty_serve import HANG_S
from tests.live import LiveServer
from tests.service.faulty_worker import HANGS
from tests.whole import Note

KNOWN_WITHIN_S = 3.0
TIMES = 5


def probe(server: LiveServer, path: str) -> int:
    """Return the status, or 0 if there is none within a second."""
    try:
        return httpx.get(server.url + path, timeout=1).status_code
    except httpx.TransportError:
        return 0


def answers(server: LiveServer) -> bool:
    """Return whether a question is answered."""
    try:
        return (
            httpx.post(f"{server.url}/v1/models/peaks/value", json={"inputs": [0, 0]}, timeout=1).status_code == 200
        )
    except httpx.TransportError:
        return False


def break_worker(server: LiveServer, fault: str) -> None:
    """Bring the fault about."""
    match fault:
        case "dead":
            server.workers()[0].send_signal(signal.SIGKILL)
        case "stopped":
            server.workers()[0].send_signal(signal.SIGSTOP)
        case "hung worker":
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/models/peaks/value", json={"inputs": [HANGS, 0]}, timeout=0.2)
        case _:
            server.process.send_signal(signal.SIGUSR1)


@pytest.fixture(scope="module")
def server(start: Start) -> LiveServer:
    """Return a server with one worker, which is not replaced quickly."""
    return start("hanging-worker", batch_timeout_s=6)


@pytest.mark.whole
@pytest.mark.parametrize("fault", ["dead", "stopped", "hung worker"])
def test_ready_is_false_while_no_worker_answers(server: LiveServer, fault: str, note: Note) -> None:
    slowest_s = 0.0
    for _ in range(TIMES):
        server.wait_until_ready()
        break_worker(server, fault)
        began = time.monotonic()
        while probe(server, "/readyz") == 200:
            known_s = time.monotonic() - began
            if known_s > KNOWN_WITHIN_S:  # it may say so only if it is so
                assert fault == "dead", f"ready {known_s:.1f} s after the worker was {fault}"
                assert answers(server)
                break
            time.sleep(0.05)
        slowest_s = max(slowest_s, time.monotonic() - began)
        assert probe(server, "/livez") == 200, "the front is alive all the while"
    server.wait_until_ready()
    assert answers(server)
    note(f"{TIMES} times {fault}: not ready within {slowest_s:.1f} s, ready again afterwards")
    assert slowest_s <= KNOWN_WITHIN_S + 0.5


@pytest.mark.whole
def test_a_hung_loop_is_not_alive(start: Start, note: Note) -> None:
    server = start("hanging")
    for _ in range(TIMES):
        server.wait_until_ready()
        assert probe(server, "/livez") == 200
        break_worker(server, "hung loop")
        time.sleep(0.2)
        assert probe(server, "/livez") == 0
        assert probe(server, "/readyz") == 0
        time.sleep(HANG_S)
    server.wait_until_ready()
    note(f"{TIMES} hung loops: livez and readyz silent {TIMES} times, ready again afterwards")


def test_load_alone_makes_nothing_unready(busy: LiveServer) -> None:
    """Control: bulk work does not turn readiness off."""
    busy.wait_until_ready()
    inputs = [[0.1, 0.2]] * 60_000
    for _ in range(3):
        httpx.post(f"{busy.url}/v1/models/peaks/hessian", json={"inputs": inputs}, timeout=60).raise_for_status()
        assert probe(busy, "/readyz") == 200
