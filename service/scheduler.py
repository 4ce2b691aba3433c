"""Scheduling of jobs into batches: queue, batches, retries, deadlines.

Continuous batching: an idle worker takes the waiting jobs immediately; while all workers are busy, jobs accumulate.
Jobs with the same :class:`BatchKey` share a batch; the cost and the bytes of a batch are limited, so that a bulk
request occupies a worker for one batch at a time. The job that has received least goes first (start-time fair
queueing; P. Goyal, H. M. Vin and H. Cheng, doi:10.1109/90.649569): the virtual start of a job advances by the cost
that it receives, and the virtual clock by that cost divided by the number of waiting jobs.

A failed batch is cut into halves, and a small one into rows. These are computed alone and queued like other jobs; a
row fails when it has failed alone twice. Repeating is safe, since evaluation is a pure function.

The cost of a row comes from the worker's plan, which is requested before the first batch of a key. The scheduler
handles rows and costs, not numbers; its clock and workers are arguments, so that tests can simulate both.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from hessquik_client.errors import (
    DeadlineExceeded,
    EvaluationFailed,
    Failure,
    NotReady,
    Overloaded,
    ServiceError,
    TooExpensive,
    WorkerLost,
)

from .wire import Array

__all__ = [
    "Answers",
    "Batch",
    "BatchKey",
    "Clock",
    "End",
    "Job",
    "Limits",
    "LoopClock",
    "Observer",
    "OnRows",
    "Queue",
    "Reason",
    "Scheduler",
    "Slice",
    "Statistics",
    "Worker",
    "Workers",
]

logger = logging.getLogger(__name__)

#: Failures of a row that was computed alone, after which its job fails; and of a plan.
MAX_FAILURES = 2
#: A failed batch of at most so many rows is cut into single rows: a row that kills workers then kills fewer.
SINGLE_ROWS = 32
#: Jobs submitted in one turn of the event loop after which idle workers get work at once, not at the turn's end.
EAGER_JOBS = 8
#: Highest cost of a batch that may preempt another between two tiles, and lowest of one that may be preempted.
PREEMPTING_COST, PREEMPTIBLE_COST = 1e7, 4e7
#: Share of the time limit that a row must be predicted to need for its failure to be blamed on its cost.
HEAVY_SHARE = 0.1
#: Resolution of the event loop's timers.
CLOCK_S = 0.001

#: A job's results by quantity: pieces in the order of the rows.
Answers = dict[str, list[Any]]
#: Called once with a job that has ended.
End = Callable[["Job"], None]
#: Called with the results of a job's next rows, by quantity.
OnRows = Callable[[Mapping[str, Any]], None]


class Clock(Protocol):
    """Time and timers."""

    def time(self) -> float:
        """Return the time in seconds, on any monotonic scale."""

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Any:
        """Call a function at a time; the result has a method ``cancel``."""

    def call_soon(self, callback: Callable[[], None]) -> Any:
        """Call a function after the current callback."""


class LoopClock:
    """The monotonic clock and the running event loop's timers."""

    time = staticmethod(time.monotonic)

    def call_at(self, when_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call a function at a time of the monotonic clock."""
        return asyncio.get_running_loop().call_later(max(0.0, when_s - time.monotonic()), callback)

    def call_soon(self, callback: Callable[[], None]) -> asyncio.Handle:
        """Call a function in the next iteration of the event loop."""
        return asyncio.get_running_loop().call_soon(callback)


@dataclass(slots=True, eq=False)
class _Line:
    """Waiting jobs of one key: those not started, in order of arrival, and those answered in part."""

    fresh: dict[Job, None] = field(default_factory=dict)
    begun: dict[Job, None] = field(default_factory=dict)

    def first(self) -> Job | None:
        """Return the job that is next."""
        fresh = next(iter(self.fresh), None)
        if not self.begun:
            return fresh
        begun = min(self.begun, key=lambda job: job.place)
        return begun if fresh is None or begun.place < fresh.place else fresh

    def remove(self, job: Job) -> None:
        """Remove a job, if it waits here."""
        self.fresh.pop(job, None)
        self.begun.pop(job, None)


@dataclass(slots=True)
class Statistics:
    """Counts of the jobs of one version of a model since it was loaded, and their times.

    Attributes:
        rows: Points answered.
        batches: Batches computed.
        answered: Jobs that ended with results.
        queue_s: Time that these waited in the queue.
        compute_s: Time from then to their ends.
        last_answer_ms: When the last of them ended, in milliseconds since 1970; 0 if none did.
        failed: Jobs that ended with an error, and requests that were refused before they became jobs.
        failed_s: Time from their submission to their ends.
    """

    rows: int = 0
    batches: int = 0
    answered: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    last_answer_ms: int = 0
    failed: int = 0
    failed_s: float = 0.0

    def count(self, job: Job, now_s: float) -> None:
        """Count a job that has ended."""
        if job.failure is not None:
            self.failed += 1
            self.failed_s += now_s - job.queued_at
            return
        self.rows += job.rows
        self.answered += 1
        self.queue_s += job.started_at - job.queued_at
        self.compute_s += now_s - job.started_at
        self.last_answer_ms = time.time_ns() // 1_000_000


@dataclass(slots=True, eq=False)
class BatchKey:
    """The common properties of jobs that may share a batch; one object per combination, compared by identity.

    Attributes:
        model: Number of the version in the workers.
        name: Name of the model.
        dtype: ``float32`` or ``float64``.
        quantities: Names of the quantities, in the order of replies.
        form: Form of the results: ``arrays``, or the format of their text: ``json``; ``flat``, without brackets;
            ``vectors``, a list of numbers for each row; ``transposed``, with the last two axes swapped.
        shapes: Shape of one row of each quantity.
        row_bytes: Bytes of a row's results as arrays.
        is_weighted: Whether jobs have weights.
        k: Number of directions, 0 without.
        statistics: Statistics of the version.
        row_cost: Operations per row, from the worker's plan; ``None`` until it is known.
        row_s: Time per row at the measured speed of the worker; 0 until it is known.
        refusal: Reason why its jobs cannot be computed, once it is known.
        line: Its waiting jobs.
    """

    model: int
    name: str
    dtype: str
    quantities: tuple[str, ...]
    form: str
    shapes: tuple[tuple[int, ...], ...]
    row_bytes: int
    is_weighted: bool
    k: int
    statistics: Statistics
    row_cost: float | None = None
    row_s: float = 0.0
    refusal: Failure | None = None
    plan_failures: int = 0
    line: _Line = field(default_factory=_Line, init=False)


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits or runs. After its end it holds no arrays.

    Attributes:
        key: The key; jobs with the same key may share a batch.
        rows: Number of points.
        inputs: The points (n, d).
        weights: Weights (1, m) or (n, m), or ``None``.
        directions: Directions (1, k, d) or (n, k, d), or ``None``.
        payload_bytes: Bytes of these arrays.
        deadline_s: Deadline on the scheduler's clock.
        end: Called once when the job has ended; ``answers`` and ``error`` are valid until it returns.
        on_rows: If set, called with results as soon as they arrive, in the order of the rows, before ``end``;
            ``answers`` then stays empty.
        answers: The results, if the job succeeded.
        failure: The error, if it failed.
    """

    key: BatchKey
    rows: int
    inputs: Array | None
    weights: Array | None
    directions: Array | None
    payload_bytes: int
    deadline_s: float
    end: End | None
    on_rows: OnRows | None = None
    answers: Answers = field(default_factory=dict, init=False)
    failure: Failure | None = field(default=None, init=False)
    is_closed: bool = field(default=False, init=False)
    queued_at: float = field(default=0.0, init=False)
    started_at: float = field(default=0.0, init=False)
    taken: int = field(default=0, init=False)
    start: float = field(default=0.0, init=False)
    order: int = field(default=0, init=False)
    missing_rows: int = field(default=0, init=False)
    next_row: int = field(default=0, init=False)
    parts: list[tuple[int, int, Mapping[str, Any]]] = field(default_factory=list, init=False)

    @property
    def error(self) -> ServiceError | None:
        """Return a new exception if the job has failed, else ``None``."""
        return None if self.failure is None else self.failure.error()

    @property
    def place(self) -> tuple[float, int, int]:
        """Return the job's order in the queue: by virtual start, then jobs not served yet, then by arrival."""
        return self.start, self.taken, self.order

    def receive(self, start: int, rows: int, part: Mapping[str, Any]) -> bool:
        """Store the results of some rows; return whether all rows have results."""
        parts = self.parts
        parts.append((start, rows, part))
        self.missing_rows -= rows
        if self.on_rows is not None:
            parts.sort(key=itemgetter(0))
            while parts and parts[0][0] == self.next_row:
                _, rows, part = parts.pop(0)
                self.next_row += rows
                self.on_rows(part)
        elif self.missing_rows == 0:
            parts.sort(key=itemgetter(0))
            for name in self.key.quantities:
                pieces = self.answers[name] = []
                for _, _, part in parts:
                    pieces.append(part[name])
        return self.missing_rows == 0


#: A job, and the rows of it from a first one to before another.
Slice = tuple[Job, int, int]


class Batch:
    """Rows of jobs that a worker computes in one call.

    Args:
        key: The key that its jobs share.
        slices: Rows of jobs with this key.
        is_retry: Whether these rows failed before, in this or a larger batch.
        failures: Number of times that exactly these rows failed.

    Attributes:
        sizes: Number of rows of each slice.
        rows: Number of rows in total.
        cost: Floating-point operations.
        is_preemptible: Whether small batches may run between its tiles; ``False`` for a batch that failed before, so
            that another failure does not affect other batches.
        buffer: Shared memory for the results, if they are not sent over the socket.
        sent_s: Time when it was sent to a worker, on the monotonic clock.
    """

    __slots__ = (
        "buffer",
        "cost",
        "failures",
        "is_preemptible",
        "is_retry",
        "key",
        "rows",
        "sent_s",
        "sizes",
        "slices",
    )

    def __init__(self, key: BatchKey, slices: list[Slice], is_retry: bool = False, failures: int = 0) -> None:
        """Count the rows."""
        self.key, self.slices, self.is_retry, self.failures = key, slices, is_retry, failures
        self.sizes: list[int] = []
        for _, start, stop in slices:
            self.sizes.append(stop - start)
        self.rows = sum(self.sizes)
        self.cost = self.rows * (key.row_cost or 1.0)
        self.is_preemptible = not is_retry and self.cost > PREEMPTIBLE_COST
        self.buffer: Any = None
        self.sent_s = 0.0

    @property
    def place(self) -> tuple[float, int, int]:
        """Return the order of a retry in the queue: that of the last of its jobs."""
        return max(job.place for job, _, _ in self.slices)

    def without_closed(self) -> Batch | None:
        """Return the batch without the jobs that have ended, or ``None`` if no job is left."""
        slices = [part for part in self.slices if not part[0].is_closed]
        return Batch(self.key, slices, self.is_retry, self.failures) if slices else None

    def pieces(self) -> list[Batch]:
        """Cut a failed batch of several rows into halves, or into rows if it is small."""
        if self.rows <= SINGLE_ROWS:
            rows = [(job, row, row + 1) for job, start, stop in self.slices for row in range(start, stop)]
            return [Batch(self.key, [row], is_retry=True) for row in rows]
        middle = self.rows // 2
        first: list[Slice] = []
        second: list[Slice] = []
        for job, start, stop in self.slices:
            cut = min(stop, start + max(0, middle))
            middle -= stop - start
            first += [(job, start, cut)] if start < cut else []
            second += [(job, cut, stop)] if cut < stop else []
        return [Batch(self.key, first, is_retry=True), Batch(self.key, second, is_retry=True)]


#: Reasons of a failed batch: its worker is gone, it passed the time limit, memory ran out, or it cannot be computed.
Reason = str


class Worker(Protocol):
    """A worker, which computes batches. It answers with :meth:`Scheduler.finish` or :meth:`Scheduler.fail`."""

    def run(self, batch: Batch) -> None:
        """Compute a batch, now or after the preemptible one in progress."""

    def plan(self, key: BatchKey) -> None:
        """Compute the cost of a row; answered with :meth:`Scheduler.learn_cost` or :meth:`Scheduler.fail_plan`."""


class Workers(Protocol):
    """The pool that the scheduler takes workers from."""

    def idle(self) -> Worker | None:
        """Return an idle worker, or ``None``."""

    def preemptible(self) -> Worker | None:
        """Return a worker whose batches are all preemptible, or ``None``."""

    def unsupplied(self) -> Worker | None:
        """Return a worker that computes a preemptible batch and has no next batch, or ``None``."""

    def alive(self) -> Worker | None:
        """Return any worker, or ``None`` if there is none."""


class Observer(Protocol):
    """The lists that the scheduler appends to what happens, for metrics."""

    @property
    def queued(self) -> Mapping[str, list[float]]:
        """Return the lists of seconds in the queue, by model; an unknown model gets an empty one."""

    @property
    def computed(self) -> Mapping[tuple[str, ...], list[tuple[int, int]]]:
        """Return the lists of rows and requests of batches, by quantities; likewise."""


class Limits(NamedTuple):
    """Limits of the queue and of batches.

    Attributes:
        requests: Most jobs that have not ended.
        rows: Most rows that no worker has taken.
        payload_bytes: Most bytes of the arrays of jobs that have not ended.
        batch_cost: Most operations of a batch of several rows.
        batch_bytes: Most bytes of results of a batch of several rows.
        batch_s: Time limit of a batch.
    """

    requests: int
    rows: int
    payload_bytes: int
    batch_cost: float
    batch_bytes: int
    batch_s: float


class Queue:
    """Waiting jobs and failed batches in fair order; jobs that have ended are removed immediately."""

    def __init__(self, limits: Limits) -> None:
        """Start with an empty queue."""
        self.limits = limits
        self.requests = 0
        self.rows = 0
        self.payload_bytes = 0
        self._clock = 0.0
        self._order = count()
        self._lines: dict[BatchKey, _Line] = {}
        self._retries: list[Batch] = []

    def expect_room(self) -> None:
        """Check that there is room for one more request; called before its body is read.

        Raises:
            Overloaded: the queue is full.
        """
        if self.requests >= self.limits.requests:
            raise _overloaded("requests", self.requests + 1, self.limits.requests)

    def oldest(self) -> float | None:
        """Return the time when the oldest waiting job was queued, on its clock; ``None`` if none waits."""
        return min((next(iter(line.fresh)).queued_at for line in self._lines.values() if line.fresh), default=None)

    def put(self, job: Job) -> None:
        """Add a job.

        Raises:
            Overloaded: a limit would be exceeded.
        """
        limits = self.limits
        requests, rows, held = self.requests + 1, self.rows + job.rows, self.payload_bytes + job.payload_bytes
        if requests > limits.requests:
            raise _overloaded("requests", requests, limits.requests)
        if rows > limits.rows:
            raise _overloaded("rows", rows, limits.rows)
        if held > limits.payload_bytes:
            raise _overloaded("bytes", held, limits.payload_bytes)
        self.requests, self.rows, self.payload_bytes = requests, rows, held
        job.start, job.order, job.missing_rows = self._clock, next(self._order), job.rows
        line = self._lines[job.key] = job.key.line
        line.fresh[job] = None

    def put_again(self, batches: Iterable[Batch]) -> None:
        """Queue failed batches again."""
        self._retries += batches

    def close(self, job: Job) -> None:
        """Remove a job that has ended, and release its arrays."""
        self.requests -= 1
        self.rows -= job.rows - job.taken
        self.payload_bytes -= job.payload_bytes
        line = self._lines.get(job.key)
        if line is not None and job.taken < job.rows:
            line.remove(job)
            if not line.fresh and not line.begun:
                del self._lines[job.key]
        job.is_closed = True
        job.inputs = job.weights = job.directions = None
        job.parts = []
        if self._retries:
            self._retries = [rest for batch in self._retries if (rest := batch.without_closed())]

    def take(self) -> Batch | None:
        """Remove and return the next batch; ``None`` if no job of known cost waits."""
        first = self._first()
        if self._retries:
            retry = min(self._retries, key=lambda batch: batch.place)
            if first is None or retry.place < first.place:
                self._retries.remove(retry)
                for job, start, stop in retry.slices:
                    self._charge(job, (stop - start) * (retry.key.row_cost or 1.0))
                return retry
        return None if first is None else self._cut(first.key, self.limits.batch_cost)

    def take_small(self, most_cost: float) -> Batch | None:
        """Remove and return a batch of at most ``most_cost`` that never failed; ``None`` if the next costs more."""
        first = self._first()
        if first is None or first.rows * (first.key.row_cost or 1.0) > most_cost:
            return None
        return self._cut(first.key, most_cost)

    def take_large(self, least_cost: float) -> Batch | None:
        """Remove and return the next batch if it has several rows and costs more than ``least_cost``."""
        first, most_cost = self._first(), self.limits.batch_cost
        if first is None or self._retries:
            return None
        row_cost = first.key.row_cost or 1.0
        if (first.rows - first.taken) * row_cost <= least_cost or 2 * row_cost > most_cost:
            return None
        return self._cut(first.key, most_cost)

    @property
    def has_work(self) -> bool:
        """Return whether jobs or failed batches wait."""
        return self.rows > 0 or bool(self._retries)

    def waiting(self, key: BatchKey) -> list[Job]:
        """Return the waiting jobs of a key."""
        line = self._lines.get(key)
        return [] if line is None else [*line.fresh, *line.begun]

    def _first(self) -> Job | None:
        """Return the next job among those whose cost is known, or ``None``."""
        best: Job | None = None
        for key, line in self._lines.items():
            if key.row_cost is not None:
                job = line.first()
                if job is not None and (best is None or job.place < best.place):
                    best = job
        return best

    def _cut(self, key: BatchKey, most_cost: float) -> Batch:
        line, most_bytes = self._lines[key], self.limits.batch_bytes
        row_cost, row_bytes = key.row_cost or 1.0, key.row_bytes or 1
        cost, reply_bytes = 0.0, 0
        slices: list[Slice] = []
        while cost < most_cost and reply_bytes < most_bytes and (job := line.first()) is not None:
            room = min((most_cost - cost) / row_cost, (most_bytes - reply_bytes) / row_bytes)
            rows = min(job.rows - job.taken, max(int(room), int(not slices)))
            if rows == 0:
                break
            slices.append((job, job.taken, job.taken + rows))
            if job.taken:
                del line.begun[job]
            else:
                del line.fresh[job]
            job.taken += rows
            self.rows -= rows
            self._charge(job, rows * row_cost)
            cost += rows * row_cost
            reply_bytes += rows * row_bytes
            if job.taken < job.rows:
                line.begun[job] = None
                break
        if not line.fresh and not line.begun:
            del self._lines[key]
        return Batch(key, slices)

    def _charge(self, job: Job, cost: float) -> None:
        """Advance the virtual start of a job and the virtual clock by a cost that the job receives."""
        job.start += cost
        self._clock += cost / max(1, self.requests)


class Scheduler:
    """Runs jobs on workers. Every job ends exactly once: answered, failed, abandoned or late.

    Args:
        limits: Limits of the queue and of batches.
        workers: The pool of workers.
        clock: Time and timers.
        observer: Gets what happens, for metrics.
    """

    def __init__(self, limits: Limits, workers: Workers, clock: Clock, observer: Observer) -> None:
        """Start with an empty queue."""
        self.queue = Queue(limits)
        self.is_given_up = False
        self._workers, self._clock, self._observer = workers, clock, observer
        self._open: set[Job] = set()
        self._unplanned: dict[BatchKey, None] = {}
        self._submitted = 0
        self._alarm: Any = None
        self._alarm_s = math.inf

    def submit(self, job: Job) -> None:
        """Queue a job; its ``end`` is called exactly once, never before this method returns.

        Raises:
            Overloaded: a limit of the queue would be exceeded.
            NotReady: workers cannot be kept alive.
            TooExpensive: one row takes longer than the time limit of a batch.
        """
        key = job.key
        if self.is_given_up:
            raise NotReady("expected a worker that is alive, there is none")
        if key.refusal is not None:
            raise key.refusal.error()
        self.queue.put(job)
        job.queued_at = self._clock.time()
        self._open.add(job)
        if job.deadline_s < self._alarm_s:
            self._set_alarm(job.deadline_s)
        if key.row_cost is None and len(self.queue.waiting(key)) == 1:
            self._unplanned[key] = None
        # Jobs that come in one turn of the loop share batches; of many, workers begin with the first ones, so that
        # they do not wait while the rest is read.
        self._submitted += 1
        if self._submitted == 1:
            self._clock.call_soon(self._end_turn)
        elif self._submitted % EAGER_JOBS == 0:
            self.dispatch()

    def abandon(self, job: Job, error: ServiceError) -> None:
        """End a job with an error; do nothing if it has ended."""
        if not job.is_closed:
            job.failure = error.failure
            self._close(job)

    def dispatch(self) -> None:
        """Give batches to idle workers, small batches to preemptible workers, and those also their next large batch.

        A worker that already has its next batch does not idle while the results of the last one are sent.
        """
        while self._unplanned and (worker := self._workers.alive()) is not None:
            key = next(iter(self._unplanned))
            del self._unplanned[key]
            worker.plan(key)
        queue, workers = self.queue, self._workers
        while queue.rows or queue.has_work:
            batch = None
            if (worker := workers.idle()) is not None:
                batch = queue.take()
            elif (worker := workers.preemptible()) is not None:
                batch = queue.take_small(PREEMPTING_COST)
                if batch is None and (worker := workers.unsupplied()) is not None:
                    batch = queue.take_large(PREEMPTIBLE_COST)
            if worker is None or batch is None:
                return
            self._note_queueing(batch)
            worker.run(batch)

    def finish(self, batch: Batch, parts: Sequence[Mapping[str, Any]]) -> None:
        """Pass the results of a batch, one part per slice, to its jobs."""
        key = batch.key
        self._observer.computed[key.quantities].append((batch.rows, len(batch.slices)))
        key.statistics.batches += 1
        for (job, start, stop), part in zip(batch.slices, parts, strict=True):
            if not job.is_closed and job.receive(start, stop - start, part) and not job.is_closed:
                self._close(job)

    def fail(self, batch: Batch, reason: Reason) -> None:
        """Compute a failed batch again: in pieces if it has several rows, else once more."""
        rest = batch.without_closed()
        if rest is None:
            return
        if batch.rows > 1:  # also if one row is left: it has not failed alone
            self.queue.put_again(rest.pieces())
        elif rest.failures + 1 < MAX_FAILURES:
            self.queue.put_again([Batch(rest.key, rest.slices, is_retry=True, failures=rest.failures + 1)])
        else:
            self._give_up_row(rest, reason)
        self._clock.call_soon(self.dispatch)

    def learn_cost(self, key: BatchKey, row_cost: float, row_s: float) -> None:
        """Set the cost of a key's rows; refuse its jobs if a row takes longer than the time limit of a batch."""
        key.row_cost, key.row_s = max(1.0, row_cost), row_s
        limit_s = self.queue.limits.batch_s
        if row_s > limit_s:
            self._refuse(key, _too_expensive(limit_s, row_s))
        self.dispatch()

    def fail_plan(self, key: BatchKey, reason: Reason) -> None:
        """Plan again, at most :data:`MAX_FAILURES` times."""
        key.plan_failures += 1
        if key.plan_failures < MAX_FAILURES:
            self._unplanned[key] = None
        elif reason == "memory":
            key.plan_failures = 0
            self._end_all(key, Overloaded("expected enough memory to plan, there is not; try again later"))
        else:
            self._refuse(key, EvaluationFailed("expected quantities that can be evaluated, these cannot"))
        self._clock.call_soon(self.dispatch)

    def give_up(self) -> None:
        """Fail all jobs, because workers cannot be kept alive, and refuse new ones."""
        self.is_given_up = True
        for job in list(self._open):
            self.abandon(job, WorkerLost("expected a worker to take over, none can be kept alive"))

    def _refuse(self, key: BatchKey, error: ServiceError) -> None:
        key.refusal = error.failure
        self._end_all(key, error)

    def _end_all(self, key: BatchKey, error: ServiceError) -> None:
        for job in self.queue.waiting(key):
            self.abandon(job, error)

    def _give_up_row(self, batch: Batch, reason: Reason) -> None:
        (job, row, _), key, limit_s = batch.slices[0], batch.key, self.queue.limits.batch_s
        logger.error("row %d of a request for model %d fails alone (%s)", row, key.model, reason)
        if reason == "memory":
            self.abandon(job, Overloaded("expected enough memory for one row, there is not; try again later"))
        elif reason == "late" and key.row_s > HEAVY_SHARE * limit_s:
            self.abandon(job, _too_expensive(limit_s, key.row_s))
        else:
            self.abandon(job, EvaluationFailed(f"expected a row that can be evaluated, row {row} cannot"))

    def _close(self, job: Job) -> None:
        self.queue.close(job)
        self._open.discard(job)
        job.key.statistics.count(job, self._clock.time())
        end, job.end, job.on_rows = job.end, None, None
        assert end is not None
        end(job)
        job.answers = {}

    def _end_turn(self) -> None:
        self._submitted = 0
        self.dispatch()

    def _set_alarm(self, deadline_s: float) -> None:
        """Set the only timer of the scheduler to the earliest deadline."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = deadline_s
        self._alarm = self._clock.call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        now = self._clock.time() + CLOCK_S
        for job in [job for job in self._open if job.deadline_s <= now]:
            self.abandon(job, DeadlineExceeded("expected an answer before the deadline, there was none"))
        self._alarm, self._alarm_s = None, math.inf
        if self._open:
            self._set_alarm(min(job.deadline_s for job in self._open))

    def _note_queueing(self, batch: Batch) -> None:
        now = self._clock.time()
        for job, start, _ in batch.slices:
            if start == 0 and not batch.is_retry:
                job.started_at = now
                self._observer.queued[job.key.name].append(now - job.queued_at)


def _overloaded(what: str, now: int, limit: int) -> Overloaded:
    return Overloaded(f"expected at most {limit} {what} waiting, got {now}; try again later")


def _too_expensive(limit_s: float, row_s: float) -> TooExpensive:
    detail = f"expected rows that take at most {limit_s:g} s each, got rows of about {row_s:.2g} s"
    return TooExpensive(detail, limit_s=limit_s, row_s=round(row_s, 3))
