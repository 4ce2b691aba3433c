"""A front end does not sleep while the only request that it has is computed."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from service import wire
from service.core import Core
from service.link import Links
from service.scheduler import Batch, BatchKey, Job, Statistics
from service.settings import Settings

LONG_S, SHORT_S = 10.0, 0.02


class Selector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """A selector that counts how often the event loop may sleep."""

    sleeps = 0

    def select(self, timeout: float | None = None) -> Any:
        self.sleeps += timeout is None or timeout > 0
        return super().select(timeout)

    async def is_asleep(self) -> bool:
        """Return whether the event loop sleeps while nothing happens, several times for a short time.

        Once may be too little: a process that is paused has nothing to sleep for afterwards.
        """
        before = self.sleeps
        for _ in range(5):
            await asyncio.sleep(SHORT_S)
        return self.sleeps > before


def run(scene: Callable[[Selector], Coroutine[Any, Any, None]]) -> None:
    selector = Selector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(scene(selector))


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_the_loop_does_not_sleep_until_the_answer_and_then_does(sockets: tuple[socket.socket, socket.socket]) -> None:
    async def scene(selector: Selector) -> None:
        answered = asyncio.Event()
        channel = wire.Channel(sockets[0], lambda head, fields: answered.set(), lambda: None)
        threading.Timer(SHORT_S, wire.send, (sockets[1], {"op": "done"}, {})).start()
        slept = selector.sleeps
        channel.stay_awake(LONG_S)
        await answered.wait()
        assert selector.sleeps == slept
        assert await selector.is_asleep()
        channel.close()

    run(scene)


@pytest.mark.parametrize("is_closed", [False, True])
def test_the_loop_sleeps_after_the_time_or_the_end(
    sockets: tuple[socket.socket, socket.socket], is_closed: bool
) -> None:
    async def scene(selector: Selector) -> None:
        channel = wire.Channel(sockets[0], lambda head, fields: None, lambda: None)
        channel.stay_awake(LONG_S)
        assert not await selector.is_asleep()
        if is_closed:
            channel.close()
        else:
            channel.stay_awake(SHORT_S)
        await asyncio.sleep(2 * SHORT_S)
        assert await selector.is_asleep()
        channel.close()

    run(scene)


@pytest.mark.parametrize(("requests", "spin_s"), [(1, LONG_S), (2, LONG_S), (1, 0.0)])
def test_only_for_the_only_request(
    sockets: tuple[socket.socket, socket.socket], requests: int, spin_s: float
) -> None:
    async def scene(selector: Selector) -> None:
        links = Links(LONG_S, spin_s)
        links.scheduler = SimpleNamespace(  # type: ignore[assignment]
            queue=SimpleNamespace(requests=requests), dispatch=lambda: None
        )
        links.add(sockets[0])
        key = BatchKey(1, "m", "float64", ("value",), "json", ((1,),), 8, False, 0, Statistics())
        job = Job(key, 1, np.zeros((1, 2)), None, None, 16, LONG_S, None)
        worker = links.idle()
        assert worker is not None
        worker.run(Batch(key, [(job, 0, 1)]))
        assert await selector.is_asleep() == (requests != 1 or spin_s == 0)
        links.close()

    run(scene)


@pytest.mark.parametrize(("processors", "spin_s"), [({0}, 0.0), ({0, 1}, 0.0005)])
def test_not_with_a_single_processor(monkeypatch: pytest.MonkeyPatch, processors: set[int], spin_s: float) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: processors)
    core = Core(Settings(device="cpu", spin_us=500), SimpleNamespace(repository=None))  # type: ignore[arg-type]
    assert core.links.spin_s == spin_s
