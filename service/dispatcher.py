"""From a checked request to its numbers: jobs wait in the batcher, run on the pool, and end exactly once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.batcher import Batch, Batcher, Entry, Slice
from service.errors import DeadlineExceeded, EvaluationFailed, NotReady, Overloaded, ServiceError, WorkerLost
from service.metrics import Metrics
from service.pool import Pool
from service.statistics import ModelStatistics
from service.wire import Array

__all__ = ["Dispatcher", "Job"]

logger = logging.getLogger(__name__)

#: Failures of a batch before it is cut into rows, and of a row before it is given up.
MAX_FAILURES = 2
#: Kinds of question whose cost is kept for a model.
MAX_ROW_COSTS = 1024
#: What a worker calls it when memory ran out.
OUT_OF_MEMORY = frozenset({"OutOfMemoryError", "MemoryError"})


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Entry):
    """A request's points and what becomes of them.

    Attributes:
        model: The workers' number of the network.
        dtype: ``float32`` or ``float64``.
        quantities: What is asked.
        inputs: (n, d).
        weights: (1 or n, m) or ``None``.
        directions: (1 or n, k, d) or ``None``.
        statistics: The model's.
        row_costs: The model's, by key.
    """

    model: int
    dtype: str
    quantities: tuple[str, ...]
    inputs: Array
    statistics: ModelStatistics
    row_costs: dict[Hashable, float]
    weights: Array | None = None
    directions: Array | None = None
    _answers: dict[str, Array] = field(default_factory=dict, init=False)
    _missing_rows: int = field(default=0, init=False)
    _future: asyncio.Future[dict[str, Array]] | None = field(default=None, init=False)
    queued_at: float = field(default=0.0, init=False)
    started_at: float = field(default=0.0, init=False)

    def wait(self) -> asyncio.Future[dict[str, Array]]:
        """The future that the answer will be put into."""
        # The loop's clock has whole milliseconds only.
        self._missing_rows, self.queued_at = self.rows, time.perf_counter()
        self._future = asyncio.get_running_loop().create_future()
        return self._future

    def receive(self, start: int, answers: dict[str, Array]) -> None:
        """Take the answers for some rows; the last ones complete the job."""
        rows = len(next(iter(answers.values())))
        if rows == self.rows:
            self._answers = answers
        else:
            for name, part in answers.items():
                if name not in self._answers:
                    self._answers[name] = np.empty((self.rows, *part.shape[1:]), part.dtype)
                self._answers[name][start : start + rows] = part
        self._missing_rows -= rows
        if self._missing_rows == 0 and self._future is not None and not self._future.done():
            self._future.set_result(self._answers)

    def fail(self, error: ServiceError) -> None:
        """End the job without an answer."""
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)


class Dispatcher:
    """Runs jobs on a pool of workers.

    Args:
        batcher: Where jobs wait.
        metrics: Where it is written down.
        devices: One per worker.
        threads: Threads that a CPU worker computes with.
        start_timeout_s: Time for a worker to start.
        batch_timeout_s: Time for a batch.
    """

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        devices: list[str],
        threads: int,
        start_timeout_s: float,
        batch_timeout_s: float,
    ) -> None:
        """Make the pool, which is not started yet."""
        self.batcher = batcher
        self.pool = Pool(self, devices, threads, start_timeout_s, batch_timeout_s)
        self.given_up = asyncio.Event()
        self._metrics = metrics
        self._open: set[Job] = set()

    async def evaluate(self, job: Job, deadline_s: float) -> dict[str, Array]:
        """Wait for a job's answer until the loop's clock shows ``deadline_s``.

        Returns:
            One array per quantity, its rows in the order of the points.

        Raises:
            Overloaded: too much is waiting.
            NotReady: workers cannot be kept alive.
            DeadlineExceeded: there was no answer in time.
            EvaluationFailed: a point ends whatever evaluates it.
            WorkerLost: no worker could take over.
        """
        if self.given_up.is_set():
            raise NotReady("expected a worker that is alive, there is none")
        self.batcher.put(job)
        answer = job.wait()
        timer = asyncio.get_running_loop().call_at(deadline_s, self._expire, job)
        self._open.add(job)
        self.on_idle()
        try:
            return await answer
        finally:
            timer.cancel()
            self._open.discard(job)
            self.batcher.close(job)

    def abandon(self, job: Job, error: ServiceError) -> None:
        """End a job that nobody waits for any more."""
        self.batcher.close(job)
        job.fail(error)

    def on_idle(self) -> None:
        """Give idle workers what waits."""
        while (worker := self.pool.idle_worker()) is not None and (batch := self.batcher.take()) is not None:
            self._note_queueing(batch)
            worker.run(batch, *_frame(batch))

    def on_answer(self, batch: Batch, head: dict[str, Any], arrays: dict[str, Array]) -> None:
        """Split a batch's answers among its jobs."""
        first = batch.slices[0].entry
        assert isinstance(first, Job)
        if "error" in head or not _fits(batch, first, arrays):
            self._try_again(batch, is_out_of_memory=head.get("error") in OUT_OF_MEMORY)
            return
        self._metrics.computed(first.quantities, batch.rows, len(batch.slices))
        first.statistics.batches += 1
        if len(first.row_costs) < MAX_ROW_COSTS:
            first.row_costs[batch.key] = head["row_cost"]
        offset = 0
        for job, start, stop in batch.slices:
            rows = stop - start
            if not job.is_closed:
                assert isinstance(job, Job)
                job.receive(start, {name: arrays[name][offset : offset + rows] for name in first.quantities})
            offset += rows

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
                self.on_idle()
                return
            logger.error("row %d of a request for model %d fails wherever it is computed", row, job.model)
            self.abandon(job, EvaluationFailed(f"expected a row that can be evaluated, row {row} cannot"))
        self.on_idle()

    def on_given_up(self) -> None:
        """Workers cannot be kept alive: nobody waits in vain."""
        self.given_up.set()
        for job in list(self._open):
            self.abandon(job, WorkerLost("expected a worker to take over, none can be kept alive"))

    def _expire(self, job: Job) -> None:
        self.abandon(job, DeadlineExceeded("expected an answer before the deadline, there was none"))

    def _note_queueing(self, batch: Batch) -> None:
        now = time.perf_counter()
        for job, start, _ in batch.slices:
            assert isinstance(job, Job)
            if start == 0 and batch.failures == 0:
                job.started_at = now
                self._metrics.queued(now - job.queued_at)


def _fits(batch: Batch, job: Job, arrays: dict[str, Array]) -> bool:
    """Whether a worker's answer is one: every quantity, every row, and all of their bytes."""
    answers = [arrays[name] for name in job.quantities if name in arrays]
    return (
        len(answers) == len(job.quantities)
        and all(array.shape[:1] == (batch.rows,) and array.dtype == job.inputs.dtype for array in answers)
        and sum(array.nbytes for array in answers) == batch.rows * job.row_bytes
    )


def _frame(batch: Batch) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a worker is sent for a batch."""
    first = batch.slices[0].entry
    assert isinstance(first, Job)
    head = {"op": "evaluate", "model": first.model, "dtype": first.dtype, "quantities": first.quantities}
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
