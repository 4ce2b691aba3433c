"""No answer is lost when workers are killed, are stopped, crash, run out of memory or break their device."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import pytest

from tests.chaos.conftest import Start, all_ready
from tests.chaos.traffic import Ledger, Question, Traffic, run
from tests.live import LiveServer
from tests.whole import Note, choose

#: How often each signal is sent.
SIGNALS = choose(
    {signal.SIGKILL: 1},
    {signal.SIGKILL: 20, signal.SIGSTOP: 10, signal.SIGSEGV: 5},
)
READY_AGAIN_S = 15.0
#: What a worker takes to start on two free cores; where all else is slower, so is this.
USUAL_START_S = 5.0


def test_a_dying_worker_is_invisible(busy: LiveServer, asked: list[Question], note: Note) -> None:
    """Every worker is ready again before the next one is hit; the load is that of a few clients."""
    slowest_s, started_s = 0.0, busy.started_s

    async def hit_workers() -> None:
        nonlocal slowest_s
        random_ = random.Random(5)
        faults = [number for number, count in SIGNALS.items() for _ in range(count)]
        random_.shuffle(faults)
        for fault in faults:
            victim = random_.choice(await asyncio.to_thread(busy.workers))
            victim.send_signal(fault)
            began = time.monotonic()
            while True:
                await asyncio.sleep(0.1)
                pids = [worker.pid for worker in await asyncio.to_thread(busy.workers)]
                if victim.pid not in pids and await asyncio.to_thread(all_ready, busy):
                    break
                assert time.monotonic() - began < 60, f"no new worker after {fault!r}"
            slowest_s = max(slowest_s, time.monotonic() - began)

    async def work() -> Ledger:
        hitting = asyncio.create_task(hit_workers())
        traffic = Traffic(busy.port, asked, retries=6, seed=6, is_over=hitting.done)
        ledger = await traffic.run(clients=4, requests=10**9)
        await hitting
        return ledger

    ledger = run(work())
    note(f"{ledger}; {sum(SIGNALS.values())} workers hit, ready again within {slowest_s:.1f} s")
    assert ledger.right == ledger.sent, ledger
    assert slowest_s <= READY_AGAIN_S * max(1.0, started_s / USUAL_START_S)


@pytest.mark.whole
def test_a_worker_killed_at_any_moment_takes_nothing_with_it(start: Start, asked: list[Question], note: Note) -> None:
    """Also while it starts, or loads its models: the next one has them all the same."""
    server, times = start(workers=2), 20

    async def kill_the_youngest() -> None:
        random_ = random.Random(15)
        for _ in range(times):
            await asyncio.sleep(random_.uniform(0.1, 4.0))
            found = await asyncio.to_thread(server.workers)
            max(found, key=lambda worker: worker.create_time()).kill()

    async def work() -> Ledger:
        killing = asyncio.create_task(kill_the_youngest())
        traffic = Traffic(server.port, asked, retries=6, seed=16, is_over=killing.done)
        ledger = await traffic.run(clients=2, requests=10**9)
        await killing
        while not await asyncio.to_thread(all_ready, server):
            await asyncio.sleep(0.1)
        return await Traffic(server.port, asked, ledger=ledger, seed=17).run(clients=16, requests=500)

    ledger = run(work())
    note(f"{times} times the younger worker killed at a random moment: {ledger}")
    assert ledger.right == ledger.sent, ledger


def test_out_of_memory_ends_in_a_right_answer_or_a_refusal(start: Start, asked: list[Question], note: Note) -> None:
    server = start("oom")
    ledger = run(Traffic(server.port, asked, seed=7).run(clients=4, requests=choose(400, 4000)))
    times = server.log.count("out of memory")
    note(f"{times} batches out of memory: {ledger}")
    assert times >= 20
    assert ledger.right + ledger.refused == ledger.sent, ledger
    assert ledger.right > 0.9 * ledger.sent
    assert server.metric("hessquik_worker_restarts_total") == 0


@pytest.mark.whole
def test_a_spoiled_worker_never_answers_again(start: Start, asked: list[Question], note: Note) -> None:
    """The fault is a sticky device error, after which the worker would answer every batch wrongly."""
    server = start("spoiled")
    spoilings = 20
    ledger = Ledger()

    async def work() -> None:
        while server.metric("hessquik_worker_restarts_total") < spoilings:
            await Traffic(server.port, asked, ledger=ledger, retries=6, seed=ledger.sent).run(clients=4, requests=100)

    run(work())
    note(f"{spoilings} spoiled workers: {ledger}")
    assert ledger.right == ledger.sent, ledger
