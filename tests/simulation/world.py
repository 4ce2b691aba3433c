"""Simulation of the scheduler: requests, disconnects, workers and times are drawn from one seed.

After every event the invariants (the ledger) are checked. Each accepted job ends exactly once, by its deadline, with
its own results or with an error that has a cause. The queue's counters equal what waits. Jobs that have ended hold
nothing. For everything that waits there is a worker or a timer.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from heapq import heappop
from typing import Any

import numpy as np

from hessquik_client.errors import ClientGone, ServiceError
from service import scheduler as scheduler_module
from service.scheduler import CLOCK_S, MAX_FAILURES, Batch, BatchKey, Job, Limits
from tests.service.simulated import SPEED, Observer, SimulatedClock

BATCH_S = 1.0
LIMITS = Limits(requests=12, rows=600, payload_bytes=40_000, batch_cost=1e8, batch_bytes=1 << 14, batch_s=BATCH_S)
#: Failures of a batch, and their shares.
FAILURES = {"lost": 0.02, "late": 0.01, "memory": 0.02, "error": 0.02}


class Fault(AssertionError):
    """An invariant is violated."""


def expect(holds: bool, sentence: str) -> None:
    """Raise a :class:`Fault` with a sentence unless a condition holds."""
    if not holds:
        raise Fault(sentence)


class Worker:
    """A simulated worker with a fixed speed; it dies, hangs or fails at random, and restarts after a delay."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_alive = True
        self.running: list[Batch] = []
        self.free_s = 0.0

    @property
    def has_only_preemptible(self) -> bool:
        """True if a small batch may be given to it besides those that run."""
        return bool(self.running) and all(batch.is_preemptible for batch in self.running)

    def run(self, batch: Batch) -> None:
        world = self.world
        expect(self.is_alive, "a batch is given to a worker that is alive")
        expect(not any(job.is_closed for job, _, _ in batch.slices), "no batch has a job that has ended")
        expect(batch.rows <= 1 or batch.cost <= 1.5 * LIMITS.batch_cost, "a batch of several rows is cut at its cost")
        expect(
            batch.rows <= 1 or batch.rows * batch.key.row_bytes <= LIMITS.batch_bytes,
            "a batch of several rows is cut at its bytes",
        )
        expect(
            not self.running or (self.has_only_preemptible and len(self.running) <= 2),
            "a worker has one batch, or preemptible ones and one more",
        )
        self.running.append(batch)
        reason = world.fate(batch)
        took_s = 2 * BATCH_S if reason == "late" else max(batch.cost / SPEED, 1e-5)
        began_s = world.clock.now if not batch.is_preemptible else max(world.clock.now, self.free_s)
        self.free_s = max(self.free_s, began_s + took_s)
        # Results are computed from the arrays that were sent, whatever happens to the job meanwhile.
        sent = [None if job.inputs is None else job.inputs[start:stop].copy() for job, start, stop in batch.slices]
        world.clock.call_at(began_s + took_s, lambda: self.end(batch, reason, sent))

    def end(self, batch: Batch, reason: str | None, sent: list[Any]) -> None:
        if batch not in self.running:
            return  # it died meanwhile, and may have restarted
        if reason in {"lost", "late"}:
            self.die(reason)
            return
        self.running.remove(batch)
        if reason is None:
            self.world.scheduler.finish(batch, [{"value": 2 * inputs + 1} for inputs in sent])
        else:
            self.world.fail(batch, reason)
        self.world.scheduler.dispatch()

    def die(self, reason: str) -> None:
        """Lose all running batches, and restart after a delay."""
        world = self.world
        self.is_alive = False
        lost, self.running = self.running, []
        for batch in lost:
            world.fail(batch, reason)
        world.clock.call_at(world.clock.now + world.random.uniform(0, 0.3), self.start)

    def start(self) -> None:
        self.is_alive, self.free_s = True, 0.0
        self.world.scheduler.dispatch()

    def plan(self, key: BatchKey) -> None:
        world = self.world
        expect(self.is_alive, "a plan is asked of a worker that is alive")
        fails = world.random.random() < 0.1
        row_cost = world.row_costs[key]
        world.planning[key] += 1

        def end() -> None:
            world.planning[key] -= 1
            if fails or not self.is_alive:
                world.plan_failures[key] += 1
                world.scheduler.fail_plan(key, world.random.choice(["memory", "error", "lost"]))
            else:
                world.scheduler.learn_cost(key, row_cost, row_cost / SPEED)

        world.clock.call_at(world.clock.now + world.random.uniform(0, 0.01), end)


class World:
    """A scheduler with simulated workers and clients.

    Args:
        seed: Seed of everything random.
        module: ``service.scheduler``, or a copy of it with a planted bug.
    """

    def __init__(self, seed: int, module: Any = scheduler_module) -> None:
        self.module = module
        self.random = random.Random(seed)
        self.clock = SimulatedClock()
        self.workers = [Worker(self) for _ in range(self.random.randint(1, 3))]
        self.looks_ahead = self.random.random() < 0.5
        self.rate = self.random.choice([0.02, 0.06, 0.2])
        self.scheduler = module.Scheduler(LIMITS, self, self.clock, Observer())
        self.row_costs: dict[BatchKey, float] = {}
        self.plan_failures: Counter[BatchKey] = Counter()
        self.planning: Counter[BatchKey] = Counter()
        self.lately_ended: deque[Job] = deque(maxlen=16)
        self.open: dict[Job, np.ndarray] = {}
        self.streamed: dict[Job, list[Any]] = {}
        self.is_poisoned: dict[Job, set[int]] = {}
        self.failed_alone: Counter[tuple[Job, int]] = Counter()
        self.abandoned: set[Job] = set()
        self.ends: Counter[str] = Counter()
        self.events = 0
        self.accepted = 0
        self.keys = [self.new_key() for _ in range(3)]

    def new_key(self) -> BatchKey:
        row_cost = 10 ** self.random.uniform(3, 8.2) if self.random.random() > 0.03 else 1e12
        row_bytes = self.random.choice([8, 64, 4096])
        key = self.module.BatchKey(
            *(1, "a", "float64", ("value",), "arrays", ((1,),), row_bytes, False, 0, self.module.Statistics()),
        )
        self.row_costs[key] = row_cost
        return key

    # The pool that the scheduler takes workers from.

    def idle(self) -> Worker | None:
        return next((one for one in self.workers if one.is_alive and not one.running), None)

    def preemptible(self) -> Worker | None:
        return next((one for one in self.workers if one.is_alive and one.has_only_preemptible), None)

    def unsupplied(self) -> Worker | None:
        if not self.looks_ahead:
            return None
        able = (one for one in self.workers if one.is_alive and one.has_only_preemptible)
        return next((one for one in able if len(one.running) == 1), None)

    def alive(self) -> Worker | None:
        return next((one for one in self.workers if one.is_alive), None)

    # Events.

    def fate(self, batch: Batch) -> str | None:
        """Return the reason why a batch will fail, or ``None``; a batch with a poisoned row always fails."""
        for job, start, stop in batch.slices:
            if any(start <= row < stop for row in self.is_poisoned[job]):
                return "error"
        drawn = self.random.random()
        for reason, share in FAILURES.items():
            if drawn < share:
                return reason
            drawn -= share
        return None

    def fail(self, batch: Batch, reason: str) -> None:
        if batch.rows == 1:
            job, row, _ = batch.slices[0]
            self.failed_alone[job, row] += 1
        self.scheduler.fail(batch, reason)

    def submit(self) -> None:
        """Submit a random request, which may be refused."""
        draw = self.random
        if draw.random() < 0.02:
            self.keys[draw.randrange(len(self.keys))] = self.new_key()
        rows = draw.choice([1, 1, 1, 2, 7, 40, draw.randint(1, 300)])
        inputs = (float(self.accepted) * 1024 + np.arange(rows, dtype=np.float64)).reshape(rows, 1)
        deadline_s = self.clock.now + draw.choice([1e-4, 0.01, 0.5, 5.0, 30.0])
        job = self.module.Job(draw.choice(self.keys), rows, inputs, None, None, 8 * rows, deadline_s, self.ended)
        if draw.random() < 0.3:
            job.on_rows = lambda part: self.streamed[job].append(part["value"])
        self.streamed[job] = []
        self.is_poisoned[job] = {draw.randrange(rows)} if draw.random() < 0.05 else set()
        queue = self.scheduler.queue
        fits = (
            queue.requests < LIMITS.requests
            and queue.rows + rows <= LIMITS.rows
            and queue.payload_bytes + 8 * rows <= LIMITS.payload_bytes
        )
        try:
            self.scheduler.submit(job)
        except ServiceError as error:
            self.ends["refused: " + error.code] += 1
            expect(error.code != "overloaded" or not fits, "a request is refused only when a limit would be passed")
            expect(error.code in {"overloaded", "too_expensive", "evaluation_failed"}, f"no refusal by {error.code}")
            return
        expect(fits, "a request that passes a limit is refused")
        self.accepted += 1
        self.open[job] = inputs

    def depart(self) -> None:
        """Close the connection of a client."""
        if self.open:
            job = self.random.choice(list(self.open))
            self.abandoned.add(job)
            self.scheduler.abandon(job, ClientGone("the client left"))

    def ended(self, job: Job) -> None:
        """Check the result or error of a job when it ends."""
        expect(job in self.open, "a job ends once")
        inputs = self.open.pop(job)
        error = job.error
        code = "ok" if error is None else error.code
        self.ends[code] += 1
        now = self.clock.now
        expect(now <= job.deadline_s + CLOCK_S + 1e-9, "a job ends by its deadline")
        if code == "ok":
            pieces = self.streamed[job] if self.streamed[job] else job.answers["value"]
            got = np.concatenate(pieces)
            expect(np.array_equal(got, 2 * inputs + 1), "an answer has the request's own numbers, in order")
            expect(not self.is_poisoned[job], "a poisoned row is not answered")
        elif code == "deadline_exceeded":
            expect(now >= job.deadline_s - CLOCK_S - 1e-9, "no deadline passes early")
        elif code == "client_gone" or job in self.abandoned:
            expect(job in self.abandoned, "only a client that left is gone")
        elif code == "too_expensive":
            late = self.failed_alone_of(job) >= MAX_FAILURES
            expect(
                late or self.row_costs[job.key] / SPEED > BATCH_S, "only rows that take too long are too expensive"
            )
        elif self.plan_failures[job.key] < MAX_FAILURES:
            expect(code in {"evaluation_failed", "overloaded"}, f"no job fails by {code}")
            expect(self.failed_alone_of(job) >= MAX_FAILURES, "a job fails when a row of it has failed alone twice")
        del self.streamed[job], self.is_poisoned[job]
        self.lately_ended.append(job)

    def failed_alone_of(self, job: Job) -> int:
        """Return the largest number of failures that a row of a job has had alone."""
        return max((count for (one, _), count in self.failed_alone.items() if one is job), default=0)

    # Time.

    def step(self) -> None:
        """Run the next event, and check the invariants."""
        self.events += 1
        clock, drawn = self.clock, self.random.random()
        if drawn < self.rate:
            for _ in range(self.random.choice([1, 1, 2, 9])):
                self.submit()
        elif drawn < self.rate + 0.02:
            self.depart()
        elif drawn < self.rate + 0.03:
            victim = self.random.choice(self.workers)
            if victim.is_alive:
                victim.die("lost")
        elif clock._events:
            when_s = clock._events[0][0]
            if drawn < 0.4 and when_s > clock.now:
                clock.now = self.random.uniform(clock.now, when_s)
            else:
                clock.now, _, timer, callback = heappop(clock._events)
                if not timer.is_cancelled:
                    callback()
        self.check()

    def drain(self) -> None:
        """Run until no event is left; all jobs must have ended then."""
        while self.clock._events:
            self.events += 1
            self.clock.now, _, timer, callback = heappop(self.clock._events)
            if not timer.is_cancelled:
                callback()
            self.check()
        expect(not self.open, "every job ends")

    def check(self) -> None:
        """Check the scheduler's state against what was observed from outside."""
        scheduler, queue = self.scheduler, self.scheduler.queue
        expect(scheduler._open == self.open.keys(), "open jobs are those that were accepted and have not ended")
        expect(queue.requests == len(self.open), "the queue counts the jobs that have not ended")
        expect(queue.rows == sum(job.rows - job.taken for job in self.open), "the queue counts the rows that wait")
        expect(queue.payload_bytes == sum(job.payload_bytes for job in self.open), "the queue counts the bytes held")
        waiting = {job for line in queue._lines.values() for job in (*line.fresh, *line.begun)}
        expect(
            waiting == {job for job in self.open if job.taken < job.rows}, "what waits is in line, and nothing else"
        )
        expect(all(line.fresh or line.begun for line in queue._lines.values()), "no line is kept empty")
        again = {job for batch in queue._retries for job, _, _ in batch.slices}
        expect(again <= self.open.keys(), "no failed batch is kept for a job that has ended")
        self.check_rows()
        if self.open:
            first_s = min(job.deadline_s for job in self.open)
            alarm = scheduler._alarm
            expect(alarm is not None and not alarm.is_cancelled, "a timer is set while jobs are open")
            expect(scheduler._alarm_s <= first_s, "the timer is set for the earliest deadline")
        wakes = any(not timer.is_cancelled and when_s <= self.clock.now for when_s, _, timer, _ in self.clock._events)
        able = self.idle() is not None and not wakes
        planned = any(job.key.row_cost is not None for job in waiting) or again
        expect(not (able and planned), "nothing waits while a worker is idle")
        for key in {job.key for job in waiting if job.key.row_cost is None}:
            expect(bool(self.planning[key]) or key in scheduler._unplanned, "what has no plan will get one")
        for job in self.lately_ended:
            held = [job.inputs, job.weights, job.directions, job.end, job.on_rows]
            expect(all(one is None for one in held), "a job that has ended holds no arrays and calls nobody")
            expect(not job.parts and not job.answers, "a job that has ended holds no results")

    def check_rows(self) -> None:
        """Check that every row of an open job is in one state: waiting, running, to be retried, or answered."""
        places: Counter[Job] = Counter()
        batches = [*self.scheduler.queue._retries, *(batch for one in self.workers for batch in one.running)]
        for batch in batches:
            for job, start, stop in batch.slices:
                places[job] += stop - start
        for job in self.open:
            done = job.rows - job.missing_rows
            expect(places[job] + done + job.rows - job.taken == job.rows, "a row is in one place")


def play(world: Any, steps: int, replays: str) -> Any:
    """Run a simulation to its end; an error gets a note with the event's number and the call that replays it."""
    try:
        for _ in range(steps):
            world.step()
        world.drain()
    except Exception as error:
        error.add_note(f"event {world.events}: {replays} replays it")
        error.events = world.events  # type: ignore[attr-defined]
        raise
    return world


def run(seed: int, steps: int, module: Any = scheduler_module) -> World:
    """Run the simulation of the scheduler with a seed."""
    world: World = play(World(seed, module), steps, f"tests.simulation.world.run({seed}, {steps})")
    return world
