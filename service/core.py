"""The service without HTTP: repository, dispatcher, limits. What routes of every dialect call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from service.batcher import Batcher
from service.codecs import Question
from service.dispatcher import Dispatcher, Job
from service.errors import ClientGone, InvalidInput, ReplyTooLarge, ServiceError, StartUpError
from service.metrics import Metrics
from service.quantities import floats_per_row
from service.repository import Repository, Served
from service.settings import Settings
from service.wire import Array

__all__ = ["Core"]

logger = logging.getLogger(__name__)

#: Operations after which a batch is cut: a few milliseconds on one core.
BATCH_COST = 1e8
#: Bytes to bring back after which a batch is cut.
BATCH_BYTES = 8 << 20


class Core:
    """Everything that answers a question, once started.

    Args:
        settings: Limits and places.
        devices: One per worker.
    """

    def __init__(self, settings: Settings, devices: list[str]) -> None:
        """Wire the parts together; nothing runs yet."""
        self.settings = settings
        self.metrics = Metrics()
        self.is_draining = False
        self._is_started = False
        batcher = Batcher(
            settings.max_queue_requests, settings.max_queue_rows, settings.max_queue_bytes, BATCH_COST, BATCH_BYTES
        )
        self.dispatcher = Dispatcher(
            batcher, self.metrics, devices, settings.threads, settings.start_timeout_s, settings.batch_timeout_s
        )
        self.repository = Repository(settings.models, self.dispatcher.pool)
        self.metrics.read_off(self._gauges)
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the workers and load the models, unless that is done.

        Raises:
            StartUpError: there is no folder, or no worker becomes ready.
        """
        if self._is_started:
            return
        self._is_started = True
        if not self.settings.models.is_dir():
            raise StartUpError("expected a folder of models, there is none at the given place")
        await self.dispatcher.pool.start()
        await self.repository.load_all()
        if self.settings.watch_s > 0:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """End the workers."""
        if self._watching is not None:
            self._watching.cancel()
        await self.dispatcher.pool.close()

    def deadline_s(self, header: bytes) -> float:
        """When a request has to be answered, on the loop's clock.

        Raises:
            InvalidInput: the header is not a number of milliseconds within the limit.
        """
        milliseconds = self.settings.deadline_ms
        if header:
            limit = self.settings.max_deadline_ms
            if not (header.isdigit() and len(header) < 10 and 0 < int(header) <= limit):
                raise InvalidInput.of("X-Deadline-Ms", f"a whole number from 1 to {limit}", "something else")
            milliseconds = int(header)
        return self.now() + milliseconds / 1000

    def now(self) -> float:
        """The loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    async def answer(
        self, served: Served, question: Question, deadline_s: float, scope: Any = None
    ) -> Mapping[str, Array]:
        """Compute what a question asks; if ``scope`` is given, give up when its client is gone.

        The model is held until it has answered; who awaits anything between looking it up and this call has to hold
        it too, see :meth:`Repository.holding`.

        Raises:
            ReplyTooLarge: the reply would be over its limit.
            ServiceError: as :meth:`Dispatcher.evaluate` raises.
        """
        job = self._job(served, question)
        if scope is not None:
            scope["hessquik.abandon"] = lambda: self.dispatcher.abandon(job, ClientGone("the client is gone"))
        began_s = time.perf_counter()
        try:
            with self.repository.holding(served):
                answers = await self.dispatcher.evaluate(job, deadline_s)
        except ServiceError:
            served.statistics.fail.add(time.perf_counter() - began_s)
            raise
        served.statistics.answered(job.rows, job.started_at - job.queued_at, time.perf_counter() - job.started_at)
        return answers

    def why_not_ready(self) -> list[str]:
        """The reasons why the service is not ready; none if it is."""
        reasons = []
        if self.is_draining:
            reasons.append("the service is stopping")
        if not self.dispatcher.pool.is_fresh():
            reasons.append("no worker answered lately")
        if not any(self.repository.default(name).state == "ready" for name in self.repository.names()):
            reasons.append("no model is ready")
        return reasons

    def _job(self, served: Served, question: Question) -> Job:
        """The job for a question, with its cost.

        Raises:
            ReplyTooLarge: the reply would be over its limit.
        """
        n = len(question.inputs)
        k = 0 if question.directions is None else question.directions.shape[1]
        is_weighted = question.weights is not None
        key = (served.id, question.dtype, question.quantities, is_weighted, k)
        # What a row costs is known from the worker's plan, which comes with the first answer; a guess till then.
        row_cost = served.row_costs.get(key) or BATCH_COST / served.facts["tile_rows"]
        floats = floats_per_row(question.quantities, served.d, served.m, k, is_weighted)
        row_bytes = floats * question.inputs.dtype.itemsize
        if n * row_bytes > self.settings.max_reply_bytes:
            raise ReplyTooLarge(
                f"expected a reply of at most {self.settings.max_reply_bytes} bytes, got {n * row_bytes}",
                limit_bytes=self.settings.max_reply_bytes,
                reply_bytes=n * row_bytes,
            )
        arrays = (question.inputs, question.weights, question.directions)
        return Job(
            key=key,
            rows=n,
            row_cost=row_cost,
            row_bytes=row_bytes,
            payload_bytes=sum(array.nbytes for array in arrays if array is not None),
            model=served.id,
            dtype=question.dtype,
            quantities=question.quantities,
            inputs=question.inputs,
            weights=question.weights,
            directions=question.directions,
            statistics=served.statistics,
            row_costs=served.row_costs,
        )

    async def _watch(self) -> None:
        """Reload what changes in the folder, for ever."""
        while True:
            await asyncio.sleep(self.settings.watch_s)
            for name in self.repository.changed():
                try:
                    await self.repository.load(name)
                except ServiceError:
                    self.repository.unload(name)

    def _gauges(self) -> Mapping[str, float | tuple[str, Mapping[str, float]]]:
        """What is read off when Prometheus asks."""
        batcher, pool = self.dispatcher.batcher, self.dispatcher.pool
        return {
            "hessquik_queue_requests": batcher.requests,
            "hessquik_queue_rows": batcher.rows,
            "hessquik_workers": ("state", {state.value: count for state, count in pool.states().items()}),
            "hessquik_device_memory_bytes": (
                "worker",
                {str(slot): worker.memory_bytes for slot, worker in enumerate(pool.workers)},
            ),
            "hessquik_worker_restarts_total": pool.restarts,
        }
