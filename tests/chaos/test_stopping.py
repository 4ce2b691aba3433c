"""SIGTERM at any moment: what was accepted is answered, and the exit status is 0."""

from __future__ import annotations

import asyncio
import random
import re
import signal

import pytest

from tests.chaos.conftest import Start
from tests.chaos.traffic import Ledger, Question, Traffic, run
from tests.live import LiveServer
from tests.whole import Note, choose


def accepted_and_answered(server: LiveServer) -> tuple[int, int]:
    """Return what the server counted until it ended."""
    (match,) = filter(None, (re.fullmatch(r"accepted (\d+), answered (\d+)", line) for line in server.log))
    return int(match[1]), int(match[2])


def test_stopping_loses_nothing(start: Start, asked: list[Question], note: Note) -> None:
    times = choose(1, 50)
    random_ = random.Random(9)
    total, closed = Ledger(), 0
    for _ in range(times):
        server = start("counting")

        async def work(server: LiveServer = server) -> Ledger:
            stopped = asyncio.Event()
            traffic = Traffic(server.port, asked, seed=random_.randrange(1000), is_over=stopped.is_set)
            asking = asyncio.create_task(traffic.run(clients=16, requests=10**9))
            await asyncio.sleep(random_.uniform(0.05, 1.0))
            server.process.send_signal(signal.SIGTERM)
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
    note(f"{times} SIGTERMs: {total.sent} accepted, {total.right} answered right; {closed} never accepted")


@pytest.mark.whole
def test_what_a_killed_server_loses_is_seen(start: Start, asked: list[Question]) -> None:
    """The control: SIGKILL loses what was accepted."""
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
