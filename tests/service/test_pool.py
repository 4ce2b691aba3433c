"""What the pool makes of its workers' deaths, without any processes."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

from service import worker as worker_module
from service.pool import MAX_LOAD_STRIKES, LoadError, Pool, State, Worker
from service.settings import Settings
from tests.live import ROOT


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
    head = {"op": "evaluate", "model": 1, "dtype": "float64", "quantities": ["hessian"], "form": "arrays"}
    points = np.random.default_rng(0).uniform(-1, 1, (20_000, 2))
    found = []
    for threads in (1, 3):
        worker = worker_module.Worker(torch.device("cpu"), threads, spin_s=0.0)
        worker.answer({"op": "load", "model": 1}, {"file": file})
        answer = worker.answer({**head, "sizes": [len(points)]}, {"inputs": points})
        assert answer is not None
        found.append(answer[1]["hessian"])
        started = [thread for thread in threading.enumerate() if thread.name.startswith("evaluator")]
        assert bool(started) == (threads > 1)
    assert np.array_equal(*found)
