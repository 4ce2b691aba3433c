"""Simulated time and simulated workers for the scheduler."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import Any

import numpy as np

from hessquik_client.errors import ServiceError
from service.scheduler import Batch, BatchKey, Job, Limits, Scheduler, Statistics

#: Operations that a simulated worker does in a second.
SPEED = 1e10


class Timer:
    """The handle that a clock's ``call_at`` returns."""

    is_cancelled = False

    def cancel(self) -> None:
        """Cancel the callback."""
        self.is_cancelled = True


class SimulatedClock:
    """A clock that advances from one scheduled event to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._events: list[tuple[float, int, Timer, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer()
        heappush(self._events, (max(when_s, self.now), next(self._order), timer, callback))
        return timer

    def call_soon(self, callback: Callable[[], None]) -> Timer:
        return self.call_at(self.now, callback)

    def run(self, until_s: float = 1e9) -> None:
        """Run all events up to a time."""
        while self._events and self._events[0][0] <= until_s:
            self.now, _, timer, callback = heappop(self._events)
            if not timer.is_cancelled:
                callback()
        if until_s < 1e9:
            self.now = max(self.now, until_s)


class Observer:
    """An observer that drops what it gets."""

    queued: Mapping[str, Any] = defaultdict(lambda: deque(maxlen=0))
    computed: Mapping[tuple[str, ...], Any] = defaultdict(lambda: deque(maxlen=0))


class SimulatedWorker:
    """A worker with a fixed speed, which can be told to fail."""

    def __init__(self, pool: SimulatedWorkers) -> None:
        self.pool = pool
        self.running: list[tuple[Batch, bool]] = []
        self.free_s = 0.0

    def run(self, batch: Batch) -> None:
        pool = self.pool
        others = sum(not is_preemptible for _, is_preemptible in self.running)
        assert len(self.running) <= 2, "at most one batch, one that preempts it, and the next"
        assert others == 0 or (not pool.looks_ahead and len(self.running) <= 1) or batch.is_preemptible
        pool.batches.append(batch)
        self.running.append((batch, batch.is_preemptible))
        reason = pool.fails(batch)
        took_s = pool.limit_s if reason == "late" else batch.cost / SPEED
        began_s = max(pool.clock.now, self.free_s) if batch.is_preemptible else pool.clock.now
        self.free_s = max(self.free_s, began_s + took_s)
        pool.clock.call_at(began_s + took_s, lambda: self.end(batch, reason))

    def end(self, batch: Batch, reason: str | None) -> None:
        self.running = [one for one in self.running if one[0] is not batch]
        scheduler = self.pool.scheduler
        if reason is None:
            names = batch.key.quantities
            parts = [
                {name: (id(job), start, stop) for name in names} if job.inputs is None else
                {name: job.inputs[start:stop].copy() for name in names}
                for job, start, stop in batch.slices
            ]  # fmt: skip
            scheduler.finish(batch, parts)
        else:
            self.pool.failures += 1
            scheduler.fail(batch, reason)
        scheduler.dispatch()

    def plan(self, key: BatchKey) -> None:
        self.pool.plans.append(key)
        self.pool.clock.call_soon(lambda: self.pool.planned(key))


class SimulatedWorkers:
    """A scheduler under simulated time, with some workers."""

    def __init__(
        self,
        workers: int = 1,
        requests: int = 100_000,
        rows: int = 1 << 20,
        payload_bytes: int = 1 << 40,
        batch_cost: float = 1e8,
        limit_s: float = 10.0,
        row_cost: float = 1e5,
        looks_ahead: bool = False,
    ) -> None:
        self.clock = SimulatedClock()
        self.limit_s = limit_s
        self.row_cost = row_cost
        self.looks_ahead = looks_ahead
        self.batches: list[Batch] = []
        self.plans: list[BatchKey] = []
        self.failures = 0
        self.fails: Callable[[Batch], str | None] = lambda batch: None
        self.plan_fails: Callable[[BatchKey], str | None] = lambda key: None
        self.workers = [SimulatedWorker(self) for _ in range(workers)]
        limits = Limits(requests, rows, payload_bytes, batch_cost, 1 << 30, limit_s)
        self.scheduler = Scheduler(limits, self, self.clock, Observer())
        self.ended: dict[Job, tuple[float, str]] = {}
        self.answers: dict[Job, Any] = {}

    def planned(self, key: BatchKey) -> None:
        reason = self.plan_fails(key)
        if reason is None:
            self.scheduler.learn_cost(key, self.row_cost, self.row_cost / SPEED)
        else:
            self.scheduler.fail_plan(key, reason)

    def idle(self) -> SimulatedWorker | None:
        return next((worker for worker in self.workers if not worker.running), None)

    def preemptible(self) -> SimulatedWorker | None:
        return next((one for one in self.workers if one.running and all(large for _, large in one.running)), None)

    def unsupplied(self) -> SimulatedWorker | None:
        if not self.looks_ahead:
            return None
        return next((one for one in self.workers if len(one.running) == 1 and one.running[0][1]), None)

    def alive(self) -> SimulatedWorker | None:
        return next(iter(self.workers), None)

    def key(self, row_cost: float | None = 1e5, row_bytes: int = 8, model: int = 1) -> BatchKey:
        return BatchKey(
            *(model, "a", "float64", ("value",), "arrays", ((1,),), row_bytes, False, 0),
            *(Statistics(), row_cost),
        )

    def job(self, key: BatchKey, rows: int = 1, deadline_s: float = 1e6, payload_bytes: int = 8) -> Job:
        inputs = np.arange(rows, dtype=np.float64).reshape(rows, 1)
        return Job(key, rows, inputs, None, None, payload_bytes, deadline_s, self._end)

    def submit(self, key: BatchKey, rows: int = 1, **options: Any) -> Job:
        job = self.job(key, rows, **options)
        self.scheduler.submit(job)
        return job

    def code(self, job: Job) -> str:
        return self.ended[job][1]

    def _end(self, job: Job) -> None:
        assert job not in self.ended, "a job ended twice"
        error: ServiceError | None = job.error
        self.ended[job] = self.clock.now, "ok" if error is None else error.code
        self.answers[job] = None if error is not None else job.answers.get("value")
