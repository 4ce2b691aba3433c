"""The service does not leak memory, descriptors, threads or processes under load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psutil
import pytest

from tests.chaos.conftest import Start, all_ready
from tests.chaos.traffic import Question, Traffic, run
from tests.live import START_S, LiveServer
from tests.whole import Note

DRIFT_BYTES = 16 << 20
REQUESTS = 100_000
#: So much of every request is kept by the control, which has to pass the limit in half of the requests.
LEAK_BYTES = 1 << 10
#: Time for the service to note that clients are gone; what it still holds of them then, it has kept.
GONE_WITHIN_S = 10.0


def sizes(server: LiveServer) -> tuple[int, int, int, int]:
    """Return resident bytes, descriptors, threads and processes of the service."""
    processes = [psutil.Process(server.process.pid), *server.workers()]
    return (
        sum(process.memory_info().rss for process in processes),
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
        len(processes),
    )


def wait_for(condition: Callable[[], bool], within_s: float = GONE_WITHIN_S) -> None:
    """Wait until a condition holds or the time is over; do not fail, since the caller measures afterwards."""
    until_s = time.monotonic() + within_s
    while not condition() and time.monotonic() < until_s:
        time.sleep(0.05)


def soak(server: LiveServer, asked: list[Question]) -> tuple[int, int, int, int]:
    """Return the growth of each size over the second half of the requests.

    The sizes are those of a service that is whole and that nobody is connected to: a worker that comes up between
    the two measurements, or a connection that is still being closed, is no growth.
    """

    def is_unconnected() -> bool:
        return not any(one.laddr.port == server.port and one.raddr for one in front.net_connections("tcp"))

    async def half(seed: int) -> None:
        traffic = Traffic(server.port, asked, disconnects=0.05, malformed=0.05, seed=seed)
        ledger = await traffic.run(clients=8, requests=REQUESTS // 2)
        assert ledger.wrong + ledger.lost + ledger.failed + ledger.closed == 0, ledger
        await asyncio.sleep(0.5)
        wait_for(is_unconnected)

    front = psutil.Process(server.process.pid)
    wait_for(lambda: all_ready(server), START_S)

    run(half(13))
    before = sizes(server)
    run(half(14))
    bytes_, descriptors, threads, processes = (now - then for now, then in zip(sizes(server), before, strict=True))
    return bytes_, descriptors, threads, processes


@pytest.mark.whole
def test_nothing_grows(busy: LiveServer, asked: list[Question], note: Note) -> None:
    bytes_, *others = soak(busy, asked)
    note(
        f"{REQUESTS} requests: {bytes_ / 2**20:+.1f} MiB in the second half, descriptors, threads, processes {others}"
    )
    assert bytes_ <= DRIFT_BYTES
    assert max(others) <= 0


@pytest.mark.whole
def test_a_leak_is_caught(start: Start, asked: list[Question], note: Note, monkeypatch: pytest.MonkeyPatch) -> None:
    """A front end with a planted leak per request makes the test fail."""
    monkeypatch.setenv("CHAOS_LEAK_BYTES", str(LEAK_BYTES))
    bytes_, *_ = soak(start("leaky"), asked)
    note(f"control: {bytes_ / 2**20:+.1f} MiB in the second half")
    assert bytes_ > DRIFT_BYTES
