"""SIGTERM or SIGINT at any moment: what was accepted is answered, and the status is 0; a second one ends at once."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import socket
import time

import psutil
import pytest

from tests.chaos.conftest import Start
from tests.chaos.traffic import Ledger, Question, Traffic, run
from tests.live import LiveServer, wait_until
from tests.raw import post
from tests.whole import Note, choose


def accepted_and_answered(server: LiveServer) -> tuple[int, int]:
    """Return what the server counted until it ended."""
    (match,) = filter(None, (re.fullmatch(r"accepted (\d+), answered (\d+)", line) for line in server.log))
    return int(match[1]), int(match[2])


def test_stopping_loses_nothing(start: Start, asked: list[Question], note: Note) -> None:
    times = choose(1, 50)
    random_ = random.Random(9)
    total, closed = Ledger(), 0
    for number in range(times):
        server = start("counting")
        end = (signal.SIGTERM, signal.SIGINT)[number % 2]

        async def work(server: LiveServer = server, end: signal.Signals = end) -> Ledger:
            stopped = asyncio.Event()
            traffic = Traffic(server.port, asked, seed=random_.randrange(1000), is_over=stopped.is_set)
            asking = asyncio.create_task(traffic.run(clients=16, requests=10**9))
            await asyncio.sleep(random_.uniform(0.05, 1.0))
            server.process.send_signal(end)
            await asyncio.sleep(0.5)
            stopped.set()
            return await asking

        ledger = run(work())
        assert server.process.wait(60) == 0
        server.stop()  # collects the last lines of its log
        accepted, answered = accepted_and_answered(server)
        assert accepted == answered, (accepted, answered)
        assert (ledger.wrong, ledger.failed, ledger.lost) == (0, 0, 0), ledger
        assert ledger.right + ledger.refused == accepted, (str(ledger), accepted)
        assert accepted > 0, "stopped before anything was asked"
        total.sent += accepted
        total.right += ledger.right
        closed += ledger.closed
    note(f"{times} signals: {total.sent} accepted, {total.right} answered right; {closed} never accepted")


def test_the_second_signal_ends_at_once(start: Start) -> None:
    """The first waits for a request that is not whole yet; the second does not, and leaves no worker."""
    server = start()
    workers = server.workers()
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(post("/v1/models/peaks/value", b'{"inputs":[1,2]}', Expect="100-continue")[:-3])
        assert connection.recv(100).startswith(b"HTTP/1.1 100"), "it waits for the body"
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: not server.is_listening())
        time.sleep(0.3)
        assert server.process.poll() is None, "it drains"
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 1
        assert time.monotonic() - began < 5
    assert psutil.wait_procs(workers, 5)[1] == []
    server.stop()
    assert not any("Traceback" in line for line in server.log), server.log


@pytest.mark.whole
def test_what_a_killed_server_loses_is_seen(start: Start, asked: list[Question]) -> None:
    """Control: SIGKILL loses accepted requests."""
    server = start("counting")

    async def work() -> Ledger:
        killed = asyncio.Event()
        traffic = Traffic(server.port, asked, is_over=killed.is_set)
        asking = asyncio.create_task(traffic.run(clients=16, requests=10**9))
        await asyncio.sleep(0.5)
        server.process.kill()
        await asyncio.sleep(0.2)
        killed.set()
        return await asking

    ledger = run(work())
    assert ledger.closed >= 16
    assert ledger.balances()
