"""Nothing grows: memory, descriptors, threads, processes."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from tests.chaos.conftest import Start
from tests.chaos.traffic import Question, Traffic, run
from tests.live import LiveServer
from tests.whole import Note, choose

DRIFT_BYTES = 16 << 20
REQUESTS = choose(1600, 100_000)
#: So much of every request is kept by the control, which has to pass the limit in half of the requests.
LEAK_BYTES = choose(48 << 10, 1 << 10)


def sizes(server: LiveServer) -> tuple[int, int, int, int]:
    """Resident bytes, descriptors, threads and processes of the service."""
    processes = [psutil.Process(server.process.pid), *server.workers()]
    return (
        sum(process.memory_info().rss for process in processes),
        sum(process.num_fds() for process in processes),
        sum(process.num_threads() for process in processes),
        len(processes),
    )


def soak(server: LiveServer, asked: list[Question]) -> tuple[int, int, int, int]:
    """How much each size grew over the second half of the requests."""

    async def half(seed: int) -> None:
        traffic = Traffic(server.port, asked, disconnects=0.05, malformed=0.05, seed=seed)
        ledger = await traffic.run(clients=8, requests=REQUESTS // 2)
        assert ledger.wrong + ledger.lost + ledger.failed + ledger.closed == 0, ledger
        await asyncio.sleep(0.5)

    run(half(13))
    before = sizes(server)
    run(half(14))
    bytes_, descriptors, threads, processes = (now - then for now, then in zip(sizes(server), before, strict=True))
    return bytes_, descriptors, threads, processes


def test_nothing_grows(busy: LiveServer, asked: list[Question], note: Note) -> None:
    bytes_, *others = soak(busy, asked)
    note(
        f"{REQUESTS} requests: {bytes_ / 2**20:+.1f} MiB in the second half, descriptors, threads, processes {others}"
    )
    assert bytes_ <= DRIFT_BYTES
    assert max(others) <= 0


def test_a_leak_is_caught(start: Start, asked: list[Question], note: Note, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a front that keeps a little of every request."""
    monkeypatch.setenv("CHAOS_LEAK_BYTES", str(LEAK_BYTES))
    bytes_, *_ = soak(start("leaky"), asked)
    note(f"control: {bytes_ / 2**20:+.1f} MiB in the second half")
    assert bytes_ > DRIFT_BYTES
