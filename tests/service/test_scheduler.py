"""The scheduler under simulated time, with simulated workers: no tensors, no processes, no sleeping."""

from __future__ import annotations

import gc
import math
import random
import weakref
from typing import Any

import numpy as np
import pytest

from hessquik_client.errors import (
    ClientGone,
    EvaluationFailed,
    Failure,
    NotReady,
    Overloaded,
    ServiceError,
    TooExpensive,
)
from service.scheduler import PREEMPTING_COST, SINGLE_ROWS, Batch, Job
from tests.service.simulated import SPEED, SimulatedWorkers


def rows_of(batch: Batch) -> list[tuple[Job, int, int]]:
    return [tuple(part) for part in batch.slices]


# Batches.


def test_requests_that_wait_share_a_batch() -> None:
    sim = SimulatedWorkers()
    key = sim.key()
    jobs = [sim.submit(key) for _ in range(4)]
    sim.clock.run()
    assert [rows_of(batch) for batch in sim.batches] == [[(job, 0, 1) for job in jobs]]


def test_a_lone_request_waits_for_nobody() -> None:
    sim = SimulatedWorkers()
    job = sim.submit(sim.key())
    sim.clock.run()
    assert sim.ended[job][0] == pytest.approx(1e5 / SPEED)


def test_of_many_that_come_at_once_workers_begin_with_the_first() -> None:
    sim = SimulatedWorkers()
    key = sim.key()
    for _ in range(20):
        sim.submit(key)
    assert len(sim.batches) == 1
    sim.clock.run()
    assert [batch.rows for batch in sim.batches] == [8, 12]


def test_a_batch_is_cut_at_its_cost_and_a_bulk_request_goes_on_later() -> None:
    sim = SimulatedWorkers(batch_cost=1e6)
    job = sim.submit(sim.key(), 25)
    sim.clock.run()
    assert [rows_of(batch) for batch in sim.batches] == [[(job, 0, 10)], [(job, 10, 20)], [(job, 20, 25)]]


def test_a_worker_has_its_next_large_batch_in_time() -> None:
    sim = SimulatedWorkers(batch_cost=1e8, looks_ahead=True)
    job = sim.submit(sim.key(1e6), 350)
    sim.clock.run(0.001)
    assert [rows_of(batch) for batch in sim.batches] == [[(job, 0, 100)], [(job, 100, 200)]]
    sim.clock.run()
    assert [batch.rows for batch in sim.batches] == [100, 100, 100, 50]
    assert sim.code(job) == "ok"


def test_a_small_request_goes_before_the_large_batch_that_waits_at_the_worker() -> None:
    sim = SimulatedWorkers(batch_cost=1e8, looks_ahead=True)
    bulk = sim.submit(sim.key(1e6), 1000)
    sim.clock.run(0.001)
    small = sim.submit(sim.key(1e6, model=2), 1)
    sim.clock.run()
    assert sim.ended[small][0] < 0.002 < sim.ended[bulk][0]


@pytest.mark.parametrize(("rows", "row_cost"), [(30, 1e6), (100, 6e7)], ids=["too small", "one row a batch"])
def test_no_other_batch_waits_at_a_worker(rows: int, row_cost: float) -> None:
    """A batch that could share with what comes, or one whose failure would be blamed on a row."""
    sim = SimulatedWorkers(batch_cost=1e8, looks_ahead=True)
    sim.submit(sim.key(1e6), 100)
    sim.clock.run(0.0)
    sim.submit(sim.key(row_cost, model=2), rows)
    sim.clock.run(0.001)
    assert [batch.rows for batch in sim.batches] == [100]


def test_results_are_handed_on_in_the_order_of_the_rows() -> None:
    """Results are handed on as they come, with several workers of which one fails; and not again at the end."""
    sim = SimulatedWorkers(workers=3, batch_cost=1e8, looks_ahead=True)
    failures = iter([None, "lost", None, "error"])
    sim.fails = lambda batch: next(failures, None)
    job, seen = sim.job(sim.key(1e6), 1000), []
    job.on_rows = lambda part: seen.append(part["value"])
    sim.scheduler.submit(job)
    sim.clock.run(0.025)
    assert len(seen) > 0
    assert job not in sim.ended
    sim.clock.run()
    assert sim.code(job) == "ok"
    assert np.array_equal(np.concatenate(seen)[:, 0], np.arange(1000.0))
    assert job.answers == {}
    assert job.parts == []


def test_a_batch_is_cut_at_its_bytes() -> None:
    sim = SimulatedWorkers()
    sim.submit(sim.key(row_cost=1.0, row_bytes=1 << 28), 9)
    sim.clock.run()
    assert [batch.rows for batch in sim.batches] == [4, 4, 1]


def test_a_row_that_costs_more_than_a_batch_runs_alone() -> None:
    sim = SimulatedWorkers(batch_cost=1e6)
    key = sim.key(row_cost=1e9)
    for _ in range(3):
        sim.submit(key)
    sim.clock.run()
    assert [batch.rows for batch in sim.batches] == [1, 1, 1]


def test_different_keys_do_not_share_a_batch() -> None:
    sim = SimulatedWorkers()
    sim.submit(sim.key())
    sim.submit(sim.key())
    sim.clock.run()
    assert [batch.rows for batch in sim.batches] == [1, 1]


def test_results_are_put_together_in_the_order_of_rows() -> None:
    sim = SimulatedWorkers(workers=3, batch_cost=7e5)
    jobs = [sim.submit(sim.key(), rows) for rows in (50, 3, 21)]
    sim.clock.run()
    for job in jobs:
        assert np.concatenate(sim.answers[job])[:, 0].tolist() == list(range(job.rows))


# Fairness.


def test_a_small_request_overtakes_a_bulk_one_that_was_served() -> None:
    sim = SimulatedWorkers(batch_cost=1e6)
    bulk = sim.submit(sim.key(), 100)
    sim.clock.run(1e-9)
    small = sim.submit(sim.key(row_cost=2e7))  # too large to preempt
    sim.clock.run()
    assert [batch.slices[0][0] for batch in sim.batches[:3]] == [bulk, small, bulk]


def test_a_bulk_request_moves_on_although_small_ones_keep_coming() -> None:
    sim = SimulatedWorkers(batch_cost=1e6)
    bulk, small = sim.submit(sim.key(), 100), sim.key()
    rounds = 0

    def again() -> None:
        nonlocal rounds
        if bulk.is_closed:
            return
        rounds += 1
        sim.submit(small)
        sim.clock.call_at(sim.clock.now + 2e5 / SPEED, again)

    again()
    sim.clock.run()
    # It gets the half that the small ones leave: 100 rows of it, and about 100 small requests.
    assert 50 < rounds < 200


def test_small_requests_go_between_the_tiles_of_a_large_batch() -> None:
    sim = SimulatedWorkers()
    bulk = sim.submit(sim.key(), 1000)
    sim.clock.run(1e-9)
    small = sim.submit(sim.key())
    sim.clock.run()
    assert sim.ended[small][0] < 1e-3 < sim.ended[bulk][0]


def test_what_is_large_does_not_preempt() -> None:
    sim = SimulatedWorkers()
    sim.submit(sim.key(), 1000)
    sim.clock.run(1e-9)
    sim.submit(sim.key(row_cost=2 * PREEMPTING_COST))
    sim.clock.run(2e-9)
    assert len(sim.batches) == 1


# Limits.


@pytest.mark.parametrize(
    ("limits", "load"),
    [
        ({"requests": 3}, {"rows": 1}),
        ({"rows": 6}, {"rows": 2}),
        ({"payload_bytes": 30}, {"rows": 1, "payload_bytes": 10}),
    ],
    ids=["requests", "rows", "bytes"],
)
def test_exactly_what_is_over_a_limit_is_refused(limits: dict[str, int], load: dict[str, int]) -> None:
    sim = SimulatedWorkers(**limits)
    key = sim.key()
    jobs = [sim.submit(key, **load) for _ in range(3)]
    with pytest.raises(Overloaded, match="try again later"):
        sim.submit(key, **load)
    sim.scheduler.abandon(jobs[0], ClientGone("gone"))
    sim.submit(key, **load)


def test_room_is_known_before_a_request_is_read() -> None:
    sim = SimulatedWorkers(requests=2)
    jobs = []
    for _ in range(2):
        sim.scheduler.queue.expect_room()
        jobs.append(sim.submit(sim.key()))
    with pytest.raises(Overloaded):
        sim.scheduler.queue.expect_room()
    sim.scheduler.abandon(jobs[0], ClientGone("gone"))
    sim.scheduler.queue.expect_room()


def held(sim: SimulatedWorkers) -> list[int]:
    """Return what the queue counts, and what it holds."""
    queue = sim.scheduler.queue
    lines = [job for line in queue._lines.values() for job in (*line.fresh, *line.begun)]
    return [queue.requests, queue.rows, queue.payload_bytes, len(lines), len(queue._retries)]


def test_counts_and_memory_are_zero_when_all_is_done() -> None:
    sim = SimulatedWorkers(workers=2, batch_cost=1e6)
    for rows in (1, 30, 7):
        sim.submit(sim.key(), rows)
    sim.clock.run()
    assert held(sim) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("when_s", [0.0, 1e-9, 2.5e-4], ids=["waiting", "running", "served in part"])
def test_what_was_abandoned_leaves_the_queue_at_once(when_s: float) -> None:
    sim = SimulatedWorkers(batch_cost=1e6)
    job = sim.submit(sim.key(), 50)
    if when_s:
        sim.clock.run(when_s)
    inputs = weakref.ref(job.inputs)
    sim.scheduler.abandon(job, ClientGone("gone"))
    sim.scheduler.abandon(job, ClientGone("gone"))
    assert held(sim) == [0, 0, 0, 0, 0]
    assert inputs() is None, "arrays are freed at once"
    batches = len(sim.batches)
    sim.clock.run()
    assert len(sim.batches) == batches
    assert sim.code(job) == "client_gone"


# How jobs end.


def test_a_deadline_is_kept_by_one_timer_and_what_is_late_is_not_computed() -> None:
    sim = SimulatedWorkers()
    sim.submit(sim.key(row_cost=1e10))
    sim.clock.run(0.1)
    key = sim.key(row_cost=2 * PREEMPTING_COST)
    late = [sim.submit(key, deadline_s=0.2 + 0.1 * number) for number in range(5)]
    timers = [event for event in sim.clock._events if not event[2].is_cancelled and event[0] == 0.2]
    assert len(timers) == 1
    sim.clock.run()
    assert [sim.code(job) for job in late] == ["deadline_exceeded"] * 5
    assert [sim.ended[job][0] for job in late] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6], abs=2e-3)
    assert len(sim.batches) == 1


class Name(str):
    """A name that can be referred to weakly, which shows when what has it is freed."""


@pytest.mark.parametrize("how", ["answered", "late", "abandoned", "failed"])
def test_a_closed_job_holds_no_arrays_and_no_traceback(how: str) -> None:
    """Also when whoever asked raises its error: the exception is not the job's, and so there is no cycle."""
    sim = SimulatedWorkers()
    if how == "failed":
        sim.fails = lambda batch: "error"
    key = sim.key(row_cost=1e10)
    key.name = Name("a")
    gone = weakref.ref(key.name)
    job = sim.submit(key, deadline_s=0.5 if how == "late" else 1e6)
    arrays = weakref.ref(job.inputs)
    gc.disable()
    try:
        if how == "abandoned":
            try:
                raise ClientGone("gone")
            except ClientGone as error:
                sim.scheduler.abandon(job, error)
        sim.clock.run()
        assert (job.inputs, job.weights, job.directions, job.parts, job.answers, job.end) == (
            *(None, None, None, [], {}, None),
        )
        assert arrays() is None
        if how != "answered":
            assert job.error is not job.error
            assert isinstance(job.failure, Failure)
            with pytest.raises(ServiceError):
                raise job.error or AssertionError
        sim.answers.clear()
        sim.ended.clear()
        sim.batches.clear()
        del job, key
        assert gone() is None, "freed by counting references"
    finally:
        gc.enable()


def test_when_workers_cannot_be_kept_alive_every_job_ends() -> None:
    sim = SimulatedWorkers()
    jobs = [sim.submit(sim.key(row_cost=1e9)) for _ in range(3)]
    sim.scheduler.give_up()
    assert [sim.code(job) for job in jobs] == ["worker_lost"] * 3
    with pytest.raises(NotReady):
        sim.submit(sim.key())


# Failures.


def poisoned(*points: int) -> Any:
    return lambda batch: (
        "error" if any(start <= row < stop for _, start, stop in batch.slices for row in points) else None
    )


def test_a_poisoned_row_of_a_bulk_request_is_found_by_bisection() -> None:
    """And meanwhile everybody else is served: the halves take their turn."""
    rows = 1 << 16
    sim = SimulatedWorkers(batch_cost=1e9)
    bulk = sim.key(row_cost=1e4)
    sim.fails = lambda batch: poisoned(12_345)(batch) if batch.key is bulk else None
    job = sim.submit(bulk, rows)
    small = sim.key(row_cost=2e7)
    waits: list[float] = []

    def ask() -> None:
        if not job.is_closed:
            one = sim.submit(small)
            began = sim.clock.now
            end = one.end
            assert end is not None
            one.end = lambda ended: (waits.append(sim.clock.now - began), end(ended))  # type: ignore[func-returns-value]
            sim.clock.call_at(began + 0.01, ask)

    ask()
    sim.clock.run()
    assert sim.code(job) == "evaluation_failed"
    assert sim.failures == math.log2(rows / SINGLE_ROWS) + 3
    assert len(sim.batches) <= len(waits) + 2 * math.log2(rows) + SINGLE_ROWS + 2
    assert len(waits) > 5
    assert max(waits) <= 2 * 1e4 * rows / SPEED


def test_a_poisoned_row_costs_its_caller_only() -> None:
    sim = SimulatedWorkers()
    key = sim.key()
    good = [sim.submit(key) for _ in range(3)]
    bad = sim.submit(key, 5)
    good += [sim.submit(key) for _ in range(3)]
    sim.fails = lambda batch: "error" if any(part[0] is bad and part[2] > 3 for part in batch.slices) else None
    sim.clock.run()
    assert [sim.code(job) for job in good] == ["ok"] * 6
    assert sim.code(bad) == "evaluation_failed"
    assert sim.failures <= 8
    assert held(sim) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("reason", ["lost", "memory", "late", "error"])
def test_a_failure_that_is_over_costs_nobody_an_answer(reason: str) -> None:
    sim = SimulatedWorkers()
    key, times = sim.key(), 0

    def fail_once(batch: Batch) -> str | None:
        nonlocal times
        times += 1
        return reason if times == 1 else None

    sim.fails = fail_once
    jobs = [sim.submit(key, rows) for rows in (1, 7, 1)]
    sim.clock.run()
    assert [sim.code(job) for job in jobs] == ["ok"] * 3
    for job in jobs:
        assert np.concatenate(sim.answers[job])[:, 0].tolist() == list(range(job.rows))


def test_what_failed_before_is_computed_alone_and_is_not_preempted() -> None:
    sim = SimulatedWorkers()
    key = sim.key()
    sim.fails = poisoned(0)
    sim.submit(key, 2000)
    sim.clock.run(0.02)
    sim.fails = lambda batch: None
    retries = [batch for batch in sim.batches if batch.is_retry]
    assert retries
    sim.submit(key)
    sim.clock.run()
    assert all(len({part[0] for part in batch.slices}) == 1 for batch in sim.batches if batch.is_retry)


@pytest.mark.parametrize(
    ("reason", "row_cost", "code"),
    [
        ("error", 1e5, "evaluation_failed"),
        ("lost", 1e5, "evaluation_failed"),
        ("memory", 1e5, "overloaded"),
        ("late", 1e5, "evaluation_failed"),
        ("late", 5e10, "too_expensive"),
    ],
)
def test_a_row_that_fails_alone_twice_fails_with_a_reason(reason: str, row_cost: float, code: str) -> None:
    sim = SimulatedWorkers(row_cost=row_cost)
    sim.fails = lambda batch: reason
    job = sim.submit(sim.key(row_cost=None))
    sim.clock.run()
    assert (sim.code(job), len(sim.batches)) == (code, 2)


# Costs.


def test_a_cost_is_learnt_before_the_first_batch() -> None:
    """Heavy requests never share a batch by ignorance."""
    sim = SimulatedWorkers(workers=2, row_cost=2e9)
    key = sim.key(row_cost=None)
    jobs = [sim.submit(key) for _ in range(20)]
    assert sim.batches == []
    sim.clock.run()
    assert sim.plans == [key]
    assert [batch.rows for batch in sim.batches] == [1] * 20
    assert {sim.code(job) for job in jobs} == {"ok"}


def test_what_has_a_cost_does_not_wait_for_what_has_none() -> None:
    sim = SimulatedWorkers()
    sim.planned = lambda key: None  # type: ignore[method-assign]
    unknown = sim.submit(sim.key(row_cost=None), deadline_s=5.0)
    known = sim.submit(sim.key())
    sim.clock.run()
    assert (sim.code(known), sim.code(unknown)) == ("ok", "deadline_exceeded")


def test_a_row_that_takes_longer_than_a_batch_may_is_refused_before_it_runs() -> None:
    sim = SimulatedWorkers(row_cost=2 * SPEED, limit_s=1.0)
    key = sim.key(row_cost=None)
    jobs = [sim.submit(key, deadline_s=30.0) for _ in range(4)]
    sim.clock.run()
    assert {sim.code(job) for job in jobs} == {"too_expensive"}
    assert (sim.batches, held(sim)) == ([], [0, 0, 0, 0, 0])
    with pytest.raises(TooExpensive, match="at most 1 s each, got rows of about 2 s"):
        sim.submit(key)


@pytest.mark.parametrize(("reason", "code"), [("error", "evaluation_failed"), ("memory", "overloaded")])
def test_a_plan_that_fails_is_tried_again_and_then_given_up(reason: str, code: str) -> None:
    sim = SimulatedWorkers()
    sim.plan_fails = lambda key: reason
    key = sim.key(row_cost=None)
    job = sim.submit(key)
    sim.clock.run()
    assert (sim.code(job), len(sim.plans)) == (code, 2)
    sim.plan_fails = lambda key: None
    if reason == "error":
        with pytest.raises(EvaluationFailed):
            sim.submit(key)
    else:
        again = sim.submit(key, deadline_s=1e8)
        sim.clock.run()
        assert sim.code(again) == "ok"


def test_a_plan_waits_for_a_worker() -> None:
    sim = SimulatedWorkers()
    workers, sim.workers = sim.workers, []
    job = sim.submit(sim.key(row_cost=None))
    sim.clock.run(1.0)
    sim.workers = workers
    sim.scheduler.dispatch()
    sim.clock.run()
    assert sim.code(job) == "ok"


# Everything at once.


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_job_ends_once_and_right(seed: int) -> None:
    random_ = random.Random(seed)
    sim = SimulatedWorkers(workers=random_.choice((1, 2, 4)), batch_cost=1e7, requests=60, rows=5000)
    keys = [sim.key(row_cost=random_.choice((None, 1e3, 1e5, 1e7)), model=number) for number in range(5)]
    bad: set[Job] = set()
    sim.fails = lambda batch: (
        "error"
        if any(part[0] in bad and part[1] == 0 for part in batch.slices)
        else random_.choices((None, "lost", "memory"), (97, 2, 1))[0]
    )
    jobs: list[Job] = []
    refused = 0

    def come() -> None:
        nonlocal refused
        try:
            job = sim.submit(
                random_.choice(keys),
                random_.choice((1, 1, 2, 300)),
                deadline_s=sim.clock.now + random_.uniform(0, 0.3),
            )
        except Overloaded:
            refused += 1
            return
        jobs.append(job)
        if random_.random() < 0.05:
            bad.add(job)
        if random_.random() < 0.2:
            sim.clock.call_at(
                sim.clock.now + random_.uniform(0, 0.05), lambda: sim.scheduler.abandon(job, ClientGone("gone"))
            )

    for _ in range(400):
        sim.clock.call_at(random_.uniform(0, 0.5), come)
    sim.clock.run()
    assert len(sim.ended) == len(jobs) == 400 - refused
    for job in jobs:
        code = sim.code(job)
        assert code != "ok" or job not in bad
        if code == "ok":
            assert np.concatenate(sim.answers[job])[:, 0].tolist() == list(range(job.rows))
    assert any(sim.code(job) == "ok" for job in jobs)
    assert held(sim) == [0, 0, 0, 0, 0]
    assert not sim.scheduler._open
