"""The service without HTTP: repository, dispatcher, limits. What routes of every dialect call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

import numpy as np

from service.batcher import Batcher
from service.codecs import Question
from service.dispatcher import Answers, Dispatcher, End, Job, Kind
from service.errors import ClientGone, InvalidInput, ReplyTooLarge, ServiceError, StartUpError
from service.metrics import Metrics
from service.quantities import floats_per_row
from service.repository import Repository, Served
from service.settings import Settings
from service.wire import Array

__all__ = ["Core"]

Scope = MutableMapping[str, Any]

logger = logging.getLogger(__name__)

#: Operations after which a batch is cut: a few milliseconds on one core.
BATCH_COST = 1e8
#: Bytes to bring back after which a batch is cut.
BATCH_BYTES = 8 << 20
#: Kinds of question that are kept for a model.
MAX_KINDS = 1024


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
        self.dispatcher = Dispatcher(batcher, self.metrics, devices, settings)
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

    def time_ms(self, header: bytes) -> int:
        """The time for a request, whose ``X-Deadline-Ms`` this is.

        Raises:
            InvalidInput: the header is not a number of milliseconds within the limit.
        """
        milliseconds = self.settings.deadline_ms
        if header:
            limit = self.settings.max_deadline_ms
            if not (header.isdigit() and len(header) < 10 and 0 < int(header) <= limit):
                raise InvalidInput.of("X-Deadline-Ms", f"a whole number from 1 to {limit}", "something else")
            milliseconds = int(header)
        return milliseconds

    def deadline_s(self, header: bytes) -> float:
        """When a request has to be answered that came now, on the monotonic clock.

        Raises:
            InvalidInput: the header is not a number of milliseconds within the limit.
        """
        return time.monotonic() + self.time_ms(header) / 1000

    def ask(self, served: Served, question: Question, form: str, deadline_s: float, end: End) -> Job:
        """Have a question answered; the model is held until it is.

        Args:
            served: The model. Who awaits anything between looking it up and this call has to hold it too, see
                :meth:`Repository.holding`.
            question: What is asked.
            form: ``arrays`` or ``json``, see :class:`~service.dispatcher.Job`.
            deadline_s: On the monotonic clock.
            end: Called once, with the job that has ended, never before this returns.

        Raises:
            ReplyTooLarge: the reply would be over its limit.
            Overloaded: too much is waiting.
            NotReady: workers cannot be kept alive.
        """
        inputs, _, _, _, weights, directions = question
        try:
            kind = self._kind(served, question, form)
            reply_bytes, most = len(inputs) * kind.row_bytes, self.settings.max_reply_bytes
            if reply_bytes > most:
                raise ReplyTooLarge(
                    f"expected a reply of at most {most} bytes, got {reply_bytes}",
                    limit_bytes=most,
                    reply_bytes=reply_bytes,
                )
            payload_bytes = inputs.nbytes
            if weights is not None:
                payload_bytes += weights.nbytes
            if directions is not None:
                payload_bytes += directions.nbytes
            job = Job(
                kind, len(inputs), kind.row_cost, kind.row_bytes, payload_bytes,
                inputs, weights, directions, deadline_s, end,
            )  # fmt: skip
            self.dispatcher.submit(job)
        except ServiceError:
            served.statistics.fail.add(0.0)
            raise
        self.repository.hold(served)
        return job

    async def answer(
        self, served: Served, question: Question, deadline_s: float, scope: Scope, form: str = "arrays"
    ) -> Answers:
        """Wait for what :meth:`ask` brings; give up when the scope's client is gone.

        Returns:
            Per quantity, stretches of rows in their order.

        Raises:
            ServiceError: as :meth:`ask`, or what the job has ended with.
        """
        answer: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()

        def end(job: Job) -> None:
            if answer.done():
                return
            if job.error is None:
                answer.set_result(job.answers)
            else:
                answer.set_exception(job.error)

        job = self.ask(served, question, form, deadline_s, end)
        scope["hessquik.abandon"] = partial(self.dispatcher.abandon, job)
        try:
            return await answer
        finally:
            self.dispatcher.abandon(job, ClientGone("nobody waits any more"))

    async def arrays(self, served: Served, question: Question, deadline_s: float, scope: Scope) -> dict[str, Array]:
        """The same with one array per quantity."""
        answers = await self.answer(served, question, deadline_s, scope)
        return {name: rows[0] if len(rows) == 1 else np.concatenate(rows) for name, rows in answers.items()}

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

    def _kind(self, served: Served, question: Question, form: str) -> Kind:
        """What a question has in common with those that may share its batch."""
        k = 0 if question.directions is None else question.directions.shape[1]
        key = (question.dtype, question.quantities, question.weights is None, k, form)
        kind: Kind | None = served.kinds.get(key)
        if kind is not None:
            return kind
        repository, statistics = self.repository, served.statistics

        def ended(job: Job) -> None:
            repository.release(served)
            now = time.perf_counter()
            if job.error is None:
                statistics.answered(job.rows, job.started_at - job.queued_at, now - job.started_at)
            else:
                statistics.fail.add(now - job.queued_at)

        floats = floats_per_row(question.quantities, served.d, served.m, k, question.weights is not None)
        row_bytes = floats * question.inputs.dtype.itemsize
        # What a row costs is known from the worker's plan, which comes with the first answer; a guess till then.
        row_cost = BATCH_COST / served.facts["tile_rows"]
        kind = Kind(served.id, question.dtype, question.quantities, form, row_bytes, row_cost, statistics, ended)
        if len(served.kinds) >= MAX_KINDS:
            del served.kinds[next(iter(served.kinds))]
        served.kinds[key] = kind
        return kind

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
