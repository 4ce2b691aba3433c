"""What the pool makes of its workers' deaths, without any processes."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import numpy as np
import pytest
import torch

from service import wire
from service import worker as worker_module
from service.pool import MAX_LOAD_STRIKES, LoadError, Pool, State, Worker
from service.settings import Settings
from tests.live import ROOT

HEAD = {"op": "evaluate", "model": 1, "dtype": "float64", "quantities": ["hessian"]}


class Owner:
    """Takes nothing and gives nothing."""

    def on_idle(self) -> None:
        pass

    def on_answer(self, *answer: Any) -> None:
        pass

    def on_lost_work(self, work: Any) -> None:
        pass

    def on_given_up(self) -> None:
        pass


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """A pool that starts no process."""

    async def replace(self: Pool, worker: Worker) -> None:
        pass

    monkeypatch.setattr(Pool, "_replace", replace)
    return Pool(Owner(), ["cpu"], Settings(start_timeout_s=1, batch_timeout_s=1))


def die_while_loading(pool: Pool, model: int, times: int) -> None:
    for _ in range(times):
        worker = Worker(pool, "cpu")
        worker.loading = [model]
        pool.on_lost(worker)


def test_a_model_that_was_loaded_is_not_blamed_for_deaths(pool: Pool) -> None:
    """Otherwise two workers that are killed at a bad moment would take a model away from all later ones."""

    async def work() -> list[int]:
        loading = asyncio.create_task(pool.load(7, b"file"))
        await asyncio.sleep(0)
        pool.on_loaded(7, {"d": 1})
        await loading
        die_while_loading(pool, 7, MAX_LOAD_STRIKES + 1)
        successor = Worker(pool, "cpu")
        pool.on_greeting(successor)
        return successor.loading

    assert asyncio.run(work()) == [7]


def test_a_model_that_ends_whoever_loads_it_is_given_up(pool: Pool) -> None:
    """The control."""

    async def work() -> list[int]:
        loading = asyncio.create_task(pool.load(7, b"file"))
        await asyncio.sleep(0)
        die_while_loading(pool, 7, MAX_LOAD_STRIKES)
        with pytest.raises(LoadError, match="ends its worker"):
            await loading
        successor = Worker(pool, "cpu")
        pool.on_greeting(successor)
        return successor.loading

    assert asyncio.run(work()) == []


def test_a_worker_is_well_only_when_it_can_compute(pool: Pool) -> None:
    """One that is up and still loads its models cannot."""

    async def work() -> list[bool]:
        worker = Worker(pool, "cpu")
        pool.workers, pool._models = [worker], {7: b"file"}
        seen = []
        for head in ({"op": "ready"}, {"op": "loaded", "model": 7}):
            worker._on_frame(head, {})
            seen.append(pool.is_fresh())
        assert worker.state is State.READY
        return seen

    assert asyncio.run(work()) == [False, True]


def test_a_worker_computes_with_the_threads_it_is_given() -> None:
    """And gives the same bits with all of them."""
    file = (ROOT / "models" / "peaks.safetensors").read_bytes()
    points = np.random.default_rng(0).uniform(-1, 1, (20_000, 2))
    found = []
    for threads in (1, 3):
        worker = worker_module.Worker(torch.device("cpu"), threads, spin_s=0.0)
        worker.answer({"op": "load", "model": 1}, {"file": file})
        answer = worker.answer({**HEAD, "form": "arrays", "number": 1, "sizes": [len(points)]}, {"inputs": points})
        assert answer is not None
        found.append(answer[1]["hessian"])
        started = [thread for thread in threading.enumerate() if thread.name.startswith("evaluator")]
        assert bool(started) == (threads > 1)
    assert np.array_equal(*found)


@pytest.mark.parametrize("form", ["arrays", "json"])
def test_a_worker_answers_a_small_batch_between_the_tiles_of_a_large_one(form: str) -> None:
    """And both have the bits that they have alone."""
    points = np.random.default_rng(0).uniform(-1, 1, (30_000, 2))
    load = ({"op": "load", "model": 1}, {"file": (ROOT / "models" / "peaks.safetensors").read_bytes()})
    host = ({**HEAD, "form": form, "number": 1, "sizes": [20_000, 10_000]}, {"inputs": points})
    guests = [
        ({**HEAD, "form": form, "number": number, "sizes": [1]}, {"inputs": points[number : number + 1]})
        for number in (2, 3)
    ]
    ours, theirs = socket.socketpair()
    worker = worker_module.Worker(torch.device("cpu"), threads=1, spin_s=0.0)
    serving = threading.Thread(target=worker.serve, args=(theirs,))
    serving.start()
    with ours, theirs:
        for frame in (load, host, *guests):
            wire.send(ours, *frame)
        receiver, found = wire.Receiver(ours), []
        while len(found) < 4:
            found += receiver.wait() or ()
        ours.shutdown(socket.SHUT_RDWR)
        serving.join()
    assert [head.get("number") for head, _ in found] == [None, 2, 3, 1]
    alone = worker_module.Worker(torch.device("cpu"), threads=1, spin_s=0.0)
    alone.answer(*load)
    for (head, fields), asked in zip(found[1:], (*guests, host), strict=True):
        expected = alone.answer(*asked)
        assert expected is not None
        assert head == expected[0]
        assert {name: bytes(field) for name, field in fields.items()} == {
            name: bytes(field) for name, field in expected[1].items()
        }


class Process:
    """Takes what a worker is sent."""

    class transport:
        @staticmethod
        def abort() -> None:
            pass

    def write(self, *_: Any) -> None:
        pass


def test_a_lost_worker_gives_back_all_that_it_computed(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    monkeypatch.setattr(Owner, "on_lost_work", lambda self, work: lost.append(work))

    async def lose() -> None:
        worker = Worker(pool, "cpu")
        pool.workers = [worker]
        worker._protocol = Process()  # type: ignore[assignment]
        worker.state = State.READY
        assert pool.host() is None
        worker.run("host", {}, {}, is_host=True)
        assert (pool.idle_worker(), pool.host()) == (None, worker)
        worker.run("guest", {}, {})
        assert (pool.idle_worker(), pool.host()) == (None, None)
        worker._on_frame({"op": "done", "number": 2}, {})
        assert (pool.idle_worker(), pool.host()) == (None, worker)
        worker.run("other guest", {}, {})
        worker._on_lost()
        await asyncio.sleep(0)

    asyncio.run(lose())
    assert lost == ["host", "other guest"]


def test_an_answer_to_nothing_ends_a_worker(pool: Pool) -> None:
    worker = Worker(pool, "cpu")
    worker._protocol = Process()  # type: ignore[assignment]
    worker.state = State.READY
    worker.run("work", {}, {})
    for number in (2, None, "1"):
        with pytest.raises(wire.WireError, match="answer to what was asked"):
            worker._on_frame({"op": "done", "number": number}, {})
