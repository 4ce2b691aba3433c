"""Overload is refused at once, and does not keep the service from its work, or from saying that it is alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import hessquik
from hessquik.activations import tanhActivation
from hessquik.layers import singleLayer
from hessquik.networks import NN, resnetNN
from tests.chaos.conftest import Start
from tests.chaos.traffic import Connection, Ledger, Traffic, flood, questions, run
from tests.live import LiveServer
from tests.whole import Note

GOODPUT = 0.7
REFUSED_WITHIN_S = 0.25
LIVE_WITHIN_S = 0.05
BACK_WITHIN_S = 5.0
#: What /livez takes at capacity on two cores that do nothing else, 99th percentile.
USUAL_LIVE_S = 0.025
MEMORY_BYTES = 64 << 20
LIVE = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


def save_wide_network(folder: Path) -> None:
    """Save a network whose derivatives take long to compute but not to write."""
    torch.manual_seed(0)
    act, double = tanhActivation(), torch.float64
    first, last = singleLayer(10, 256, act, dtype=double), singleLayer(256, 1, dtype=double)
    network = NN(first, resnetNN(256, 6, 0.5, act, dtype=double), last)
    hessquik.save(network, folder / "wide.safetensors", lower_bounds=[-1.0] * 10, upper_bounds=[1.0] * 10)


async def watch_life(port: int, until: asyncio.Event) -> list[float]:
    """Ask /livez again and again; return what each answer took."""
    waited = []
    connection = await Connection.open(port)
    while not until.is_set():
        began = time.perf_counter()
        status, _, _ = await connection.ask(LIVE, 10)
        waited.append(time.perf_counter() - began)
        assert status == 200
        await asyncio.sleep(0.02)
    connection.abort()
    return waited


@pytest.mark.whole
def test_overload_is_refused_not_suffered(start: Start, tmp_path: Path, note: Note) -> None:
    save_wide_network(tmp_path)
    # The flood opens its connections at once; those that wait longest for a request are not to be closed as slow.
    server = start(folder=tmp_path, max_queue_requests=64, receive_timeout_s=60)
    # So heavy to compute that the driver, at three times the capacity, leaves the service its share of the cores.
    heavy = questions(tmp_path, 24, seed=8, rows=(16,))
    seconds = 30.0
    # The latency of a service on the same machine at the same time that was never overloaded.
    control = start(folder=tmp_path, max_queue_requests=64)
    front = psutil.Process(server.process.pid)

    async def closed_loop(seconds: float, server: LiveServer = server) -> Ledger:
        end = time.perf_counter() + seconds
        traffic = Traffic(server.port, heavy, is_over=lambda: time.perf_counter() > end)
        return await traffic.run(clients=32, requests=10**9)  # more than fit one batch: the most there is

    async def watch(work: Coroutine[Any, Any, Any]) -> list[float]:
        until = asyncio.Event()
        watching = asyncio.create_task(watch_life(server.port, until))
        await work
        until.set()
        return await watching

    async def work() -> tuple[Ledger, Ledger, list[float], list[float], int, float]:
        await closed_loop(1.0)
        await closed_loop(1.0, control)
        normal = await closed_loop(5.0)
        usual = await watch(closed_loop(5.0))
        before = front.memory_info().rss
        ledger = Ledger()
        waited = await watch(flood(server.port, heavy, 3 * normal.right / 5.0, seconds, ledger))
        grown = front.memory_info().rss - before
        began = time.monotonic()
        while True:
            back_s = time.monotonic() - began
            if (await closed_loop(0.5)).p(50) <= 1.5 * (await closed_loop(0.5, control)).p(50):
                return normal, ledger, usual, waited, grown, back_s
            assert back_s < 60

    normal, ledger, usual, waited, grown, back_s = run(work())
    capacity, goodput = normal.right / 5.0, ledger.right / seconds
    refusal_s = float(np.percentile(ledger.refusal_seconds, 99))
    live_s, usual_live_s = float(np.percentile(waited, 99)), float(np.percentile(usual, 99))
    # Where other things keep the machine busy, all waits for a processor: what counts is what overload adds.
    slowness = max(1.0, usual_live_s / USUAL_LIVE_S)
    note(
        f"capacity {capacity:.0f}/s, goodput at 3 times {goodput:.0f}/s, refusals p99 {1e3 * refusal_s:.0f} ms, "
        f"livez p99 {1e3 * live_s:.0f} ms (at capacity {1e3 * usual_live_s:.0f} ms), "
        f"memory +{grown / 2**20:.1f} MiB, back to normal in {back_s:.1f} s; {ledger}"
    )
    assert (ledger.wrong, ledger.lost, ledger.failed, ledger.closed) == (0, 0, 0, 0), ledger
    assert ledger.refused > 0.3 * ledger.sent, "the control: this was no overload"
    assert goodput >= GOODPUT * capacity
    assert refusal_s <= REFUSED_WITHIN_S * slowness
    assert live_s <= LIVE_WITHIN_S * slowness
    assert grown <= MEMORY_BYTES
    assert back_s <= BACK_WITHIN_S
