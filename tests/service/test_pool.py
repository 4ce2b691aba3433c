"""What the pool makes of its workers' deaths, without any processes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.pool import MAX_LOAD_STRIKES, LoadError, Pool, State, Worker


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
    return Pool(Owner(), ["cpu"], threads=1, start_timeout_s=1, batch_timeout_s=1)


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
