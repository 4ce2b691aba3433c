"""No caller gets another caller's numbers, and every request ends exactly once, whatever fails."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.conftest import Start, all_ready
from tests.chaos.traffic import Ledger, Question, Traffic, run
from tests.live import LiveServer
from tests.whole import Note, choose

KILL_EVERY_S = choose(1.0, 10.0)
#: At least so many requests are sent, and so many workers killed, within so many seconds.
REQUESTS, KILLS, LIMIT_S = choose((2000, 1, 60), (50_000, 10, 900))


async def kill_workers(server: LiveServer, killed: list[int], until: asyncio.Event) -> None:
    """Kill a random worker repeatedly, each time after all are ready again, and record its pid."""
    random_ = random.Random(4)
    while not until.is_set():
        try:
            await asyncio.wait_for(until.wait(), KILL_EVERY_S)
        except TimeoutError:
            if await asyncio.to_thread(all_ready, server):
                victim = random_.choice(await asyncio.to_thread(server.workers))
                victim.send_signal(signal.SIGKILL)
                killed.append(victim.pid)


def test_every_answer_is_right_while_workers_are_killed(busy: LiveServer, asked: list[Question], note: Note) -> None:
    killed: list[int] = []

    async def work() -> Ledger:
        until, ledger = asyncio.Event(), Ledger()
        killing = asyncio.create_task(kill_workers(busy, killed, until))
        end = time.monotonic() + LIMIT_S

        def is_over() -> bool:
            return time.monotonic() > end or (ledger.sent >= REQUESTS and len(killed) >= KILLS)

        traffic = Traffic(
            busy.port, asked, ledger, disconnects=0.2, malformed=0.05, retries=6, seed=2, is_over=is_over
        )
        await traffic.run(clients=16, requests=10**9)
        until.set()
        await killing
        return ledger

    ledger = run(work())
    note(f"{ledger}; {len(killed)} workers killed")
    assert len(killed) >= KILLS
    assert ledger.sent >= REQUESTS
    assert (ledger.wrong, ledger.lost, ledger.failed, ledger.closed, ledger.refused) == (0, 0, 0, 0, 0), ledger
    assert ledger.cancelled > 0.15 * ledger.sent
    assert ledger.malformed > 0.03 * ledger.sent
    assert ledger.balances()


@pytest.mark.whole
def test_rows_that_change_places_are_caught(start: Start, asked: list[Question], note: Note) -> None:
    """Control: a worker that sometimes answers with another row's numbers is found."""
    server = start("mixed")
    ledger = run(Traffic(server.port, asked, seed=3).run(clients=8, requests=500))
    note(f"control: {ledger}")
    assert ledger.wrong > 0
    assert ledger.right > 0
    assert ledger.balances()


@asynccontextmanager
async def bad_network(port: int, swaps: int, drops: int) -> AsyncIterator[int]:
    """Yield the port of a proxy that changes a digit of some answers, and drops others."""
    seen = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while request := await reader.read(1 << 20):
                up_writer.write(request)
                answer = await up_reader.readuntil(b"\r\n\r\n")
                answer += await up_reader.readexactly(
                    int(answer.lower().split(b"content-length: ")[1].split(b"\r")[0])
                )
                seen += 1
                if seen % swaps == 0:
                    answer = answer[:-6] + bytes([(answer[-6] - 47) % 10 + 48]) + answer[-5:]
                if seen % drops:
                    writer.write(answer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            up_writer.close()
            writer.close()

    proxy = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        proxy.close()


@pytest.mark.whole
def test_changed_and_swallowed_answers_are_caught(busy: LiveServer, asked: list[Question], note: Note) -> None:
    """Control: a proxy that changes a digit of one answer in 50, and drops one in 80, is found."""

    async def work() -> Ledger:
        async with bad_network(busy.port, swaps=50, drops=80) as port:
            return await Traffic(port, asked, timeout_s=1.0, seed=4).run(clients=8, requests=400)

    ledger = run(work())
    note(f"control: {ledger}")
    assert ledger.wrong >= 7
    assert ledger.lost == 5
    assert ledger.balances()
