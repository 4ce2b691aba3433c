"""From a checked request to its numbers: jobs wait in the batcher, run on the pool, and end exactly once."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np

from service.batcher import Batch, Batcher, Entry, Slice
from service.errors import DeadlineExceeded, EvaluationFailed, NotReady, Overloaded, ServiceError, WorkerLost
from service.metrics import Metrics
from service.pool import Pool
from service.settings import Settings
from service.statistics import ModelStatistics
from service.wire import Array, cut

__all__ = ["Answers", "Dispatcher", "End", "Job", "Kind"]

logger = logging.getLogger(__name__)

#: Failures of a batch before it is cut into rows, and of a row before it is given up.
MAX_FAILURES = 2
#: What a worker calls it when memory ran out.
OUT_OF_MEMORY = frozenset({"OutOfMemoryError", "MemoryError"})
#: The loop's timers are this exact.
CLOCK_S = 0.001
#: Requests within one turn of the loop after which idle workers are given work at once, and not at the turn's end.
EAGER_REQUESTS = 8
#: Operations of a batch that a worker takes in between the tiles of another, and of one that has room for that.
GUEST_COST, HOST_COST = 1e7, 4e7
#: What a worker answered, per quantity: stretches of rows in their order.
Answers = dict[str, list[Any]]
#: What is done when a job has ended: with its answers, or with the error.
End = Callable[["Job"], None]


@dataclass(slots=True, eq=False)
class Kind:
    """What requests that may share a batch have in common.

    Attributes:
        model: The workers' number of the network.
        dtype: ``float32`` or ``float64``.
        quantities: What is asked.
        form: What the answers are wanted as: ``arrays``, or the text of their rows in ``json``.
        row_bytes: What a row brings back, as binary.
        row_cost: What it costs to compute.
        statistics: The model's.
        ended: Called with each of its jobs that has ended, before whoever waits for it.
    """

    model: int
    dtype: str
    quantities: tuple[str, ...]
    form: str
    row_bytes: int
    row_cost: float
    statistics: ModelStatistics
    ended: End


@dataclass(slots=True, eq=False)
class Job(Entry):
    """A request's points and what becomes of them; its key is its :class:`Kind`.

    Attributes:
        inputs: (n, d).
        weights: (1 or n, m) or ``None``.
        directions: (1 or n, k, d) or ``None``.
        deadline_s: On the monotonic clock.
        end: Called once when it has ended.
        answers: Once it has ended well.
        error: Once it has ended otherwise.
    """

    key: Kind
    inputs: Array
    weights: Array | None
    directions: Array | None
    deadline_s: float
    end: End | None
    answers: Answers = field(default_factory=dict, init=False)
    error: ServiceError | None = field(default=None, init=False)
    queued_at: float = field(default=0.0, init=False)
    started_at: float = field(default=0.0, init=False)
    _parts: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list, init=False)
    _missing_rows: int = field(default=0, init=False)

    def receive(self, start: int, rows: int, part: Mapping[str, Any]) -> bool:
        """Take the answers for some rows; return whether they are all there now."""
        self._parts.append((start, part))
        self._missing_rows -= rows
        if self._missing_rows > 0:
            return False
        self._parts.sort(key=itemgetter(0))
        self.answers = {name: [part[name] for _, part in self._parts] for name in self.key.quantities}
        return True

    def wait(self) -> None:
        """Begin to wait."""
        self._missing_rows, self.queued_at = self.rows, time.perf_counter()


class Dispatcher:
    """Runs jobs on a pool of workers.

    Args:
        batcher: Where jobs wait.
        metrics: Where it is written down.
        devices: One per worker.
        settings: The workers'.
    """

    def __init__(self, batcher: Batcher, metrics: Metrics, devices: list[str], settings: Settings) -> None:
        """Make the pool, which is not started yet."""
        self.batcher = batcher
        self.pool = Pool(self, devices, settings)
        self.given_up = asyncio.Event()
        self._metrics = metrics
        self._open: set[Job] = set()
        self._came = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = math.inf

    def submit(self, job: Job) -> None:
        """Run a job; its ``end`` is called exactly once, never before this returns.

        It ends when it is answered, given up, or not answered by its deadline.

        Raises:
            Overloaded: too much is waiting.
            NotReady: workers cannot be kept alive.
        """
        if self.given_up.is_set():
            raise NotReady("expected a worker that is alive, there is none")
        self.batcher.put(job)
        job.wait()
        self._open.add(job)
        if job.deadline_s < self._alarm_s:
            self._set_alarm(job.deadline_s)
        # What came in one turn of the loop shares batches; but of many, workers begin with the first ones, so that
        # they do not wait while the rest is read.
        self._came += 1
        if self._came == 1:
            asyncio.get_running_loop().call_soon(self._end_turn)
        elif self._came % EAGER_REQUESTS == 0:
            self.on_idle()

    def abandon(self, job: Job, error: ServiceError) -> None:
        """End a job that nobody waits for any more, or that cannot be answered; does nothing if it has ended."""
        if not job.is_closed:
            job.error = error
            self._close(job)

    def _close(self, job: Job) -> None:
        self.batcher.close(job)
        self._open.discard(job)
        job.key.ended(job)
        end, job.end = job.end, None  # whoever waits may hold the job: no circle for the collector
        assert end is not None
        end(job)

    def _end_turn(self) -> None:
        self._came = 0
        self.on_idle()

    def on_idle(self) -> None:
        """Give idle workers what waits, and those that compute a large batch what is small."""
        while True:
            if (worker := self.pool.idle_worker()) is not None:
                batch = self.batcher.take()
            elif (worker := self.pool.host()) is not None:
                batch = self.batcher.take_small(GUEST_COST)
            else:
                return
            if batch is None:
                return
            self._note_queueing(batch)
            # A batch that failed before may fail again, and nobody is to fail with it.
            worker.run(batch, *_frame(batch), is_host=batch.failures == 0 and batch.cost > HOST_COST)

    def on_answer(self, batch: Batch, head: dict[str, Any], fields: dict[str, Any]) -> None:
        """Split a batch's answers among its jobs."""
        kind: Kind = batch.key
        stretches = None if "error" in head else _stretches(batch, kind, head, fields)
        if stretches is None:
            self._try_again(batch, is_out_of_memory=head.get("error") in OUT_OF_MEMORY)
            return
        self._metrics.computed(kind.quantities, batch.rows, len(batch.slices))
        kind.statistics.batches += 1
        kind.row_cost = head["row_cost"]
        for (job, start, stop), part in zip(batch.slices, stretches, strict=True):
            assert isinstance(job, Job)
            if not job.is_closed and job.receive(start, stop - start, part):
                self._close(job)

    def on_lost_work(self, batch: Batch) -> None:
        """A worker died over a batch."""
        self._try_again(batch, is_out_of_memory=False)

    def _try_again(self, batch: Batch, is_out_of_memory: bool) -> None:
        """Run a failed batch once more, then row by row, so that only a row that fails alone fails."""
        failures = batch.failures + 1
        if failures < MAX_FAILURES:
            self.batcher.put_again(Batch(batch.key, batch.slices, failures))
        elif batch.rows > 1:
            for entry, start, stop in batch.slices:
                for row in range(start, stop):
                    self.batcher.put_again(Batch(batch.key, [Slice(entry, row, row + 1)], MAX_FAILURES - 1))
        else:
            job, row, _ = batch.slices[0]
            assert isinstance(job, Job)
            if is_out_of_memory:
                self.abandon(job, Overloaded("expected enough memory for one row, there is not; try again later"))
            else:
                logger.error("row %d of a request for model %d fails wherever it is computed", row, job.key.model)
                self.abandon(job, EvaluationFailed(f"expected a row that can be evaluated, row {row} cannot"))
        self.on_idle()

    def on_given_up(self) -> None:
        """Workers cannot be kept alive: nobody waits in vain."""
        self.given_up.set()
        for job in list(self._open):
            self.abandon(job, WorkerLost("expected a worker to take over, none can be kept alive"))

    def _set_alarm(self, deadline_s: float) -> None:
        """Look at the open jobs when the earliest of their deadlines is over: one timer for all of them."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = deadline_s
        self._alarm = asyncio.get_running_loop().call_later(max(0.0, deadline_s - time.monotonic()), self._expire)

    def _expire(self) -> None:
        now = time.monotonic() + CLOCK_S
        for job in [job for job in self._open if job.deadline_s <= now]:
            self.abandon(job, DeadlineExceeded("expected an answer before the deadline, there was none"))
        self._alarm, self._alarm_s = None, math.inf
        if self._open:
            self._set_alarm(min(job.deadline_s for job in self._open))

    def _note_queueing(self, batch: Batch) -> None:
        now = time.perf_counter()
        for job, start, _ in batch.slices:
            assert isinstance(job, Job)
            if start == 0 and batch.failures == 0:
                job.started_at = now
                self._metrics.queued(now - job.queued_at)


def _stretches(
    batch: Batch, kind: Kind, head: Mapping[str, Any], fields: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """A worker's answers for each slice of a batch, or ``None`` if a quantity, a row or a byte of them is missing."""
    names, count = kind.quantities, len(batch.slices)
    if kind.form == "json":
        lengths, text = head.get("lengths", ()), fields.get("text", b"")
        if len(lengths) != count * len(names) or sum(lengths) != len(text):
            return None
        pieces = cut(text, lengths)
        return [dict(zip(names, pieces[i::count], strict=True)) for i in range(count)]
    arrays = [fields[name] for name in names if name in fields]
    rows, nbytes = batch.rows, sum(array.nbytes for array in arrays)
    fits = all(array.shape[:1] == (rows,) and array.dtype.name == kind.dtype for array in arrays)
    if not fits or len(arrays) < len(names) or nbytes != rows * kind.row_bytes:
        return None
    parts = [cut(array, batch.sizes) for array in arrays]
    return [dict(zip(names, part, strict=True)) for part in zip(*parts, strict=True)]


def _frame(batch: Batch) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a worker is sent for a batch."""
    kind: Kind = batch.key
    head = {
        "op": "evaluate",
        "model": kind.model,
        "dtype": kind.dtype,
        "quantities": kind.quantities,
        "form": kind.form,
        "sizes": batch.sizes,
    }
    arrays = {}
    for name in ("inputs", "weights", "directions"):
        parts = [_rows(getattr(job, name), start, stop) for job, start, stop in batch.slices]
        if parts[0] is not None:
            arrays[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return head, arrays


def _rows(array: Array | None, start: int, stop: int) -> Any:
    """Rows of an array that has one row per point, or one for all of them."""
    if array is None:
        return None
    if len(array) == 1 < stop - start:
        return np.broadcast_to(array, (stop - start, *array.shape[1:]))
    return array if len(array) == 1 else array[start:stop]
