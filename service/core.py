"""The service without HTTP: repository, scheduler, workers and limits."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from functools import partial

from hessquik_client.domain import Domain
from hessquik_client.errors import InvalidInput
from hessquik_client.quantities import floats_per_row, row_shapes
from hessquik_client.question import Question, Shape

from .child import SWITCH_S
from .keys import Keys
from .link import Links
from .metrics import Gauge, Metrics
from .node import NodeLike
from .periodic import repeat
from .repository import Served
from .scheduler import BatchKey, Limits, LoopClock, Scheduler
from .settings import Settings
from .workers import WorkerProcess

__all__ = ["Core"]

#: Most floating-point operations of a batch: a few milliseconds on one core.
BATCH_COST = 1e8
#: Most bytes of a batch's results.
BATCH_BYTES = 8 << 20
#: Batch keys that are kept for a model.
MAX_KEYS = 1024
#: Interval at which metrics are counted, unused shared memory is freed and the files of keys are looked at.
TIDY_S = 0.25


class Core:
    """The parts that answer requests, independent of HTTP.

    Args:
        settings: Settings of the service.
        node: The workers and models, of this process or of the supervisor.
    """

    def __init__(self, settings: Settings, node: NodeLike) -> None:
        """Connect the parts; :meth:`start` starts them."""
        self.settings = settings
        self.metrics = Metrics(self._gauges)
        self.keys = Keys(settings)
        self.is_starting = self.is_draining = False
        self.node = node
        self.repository = node.repository
        # With one processor, polling delays the worker that is polled for.
        spin_s = settings.spin_us / 1e6 if len(os.sched_getaffinity(0)) > 1 else 0.0
        self.links = Links(settings.batch_timeout_s, spin_s)
        limits = Limits(
            *(settings.max_queue_requests, settings.max_queue_rows, settings.max_queue_bytes),
            *(BATCH_COST, BATCH_BYTES, settings.batch_timeout_s),
        )
        self.scheduler = self.links.scheduler = Scheduler(limits, self.links, LoopClock(), self.metrics)
        self._tidying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the workers and load the models; do nothing if they are started.

        Raises:
            StartUpError: the folder does not exist, or no worker starts.
        """
        if self._tidying is None:
            sys.setswitchinterval(SWITCH_S)
            tidy = repeat(TIDY_S, self.metrics.settle, self.links.drop_idle_buffers, self.keys.follow)
            self._tidying = asyncio.get_running_loop().create_task(tidy)
        await self.node.start(self)

    async def stop(self) -> None:
        """Stop the workers and close their connections."""
        if self._tidying is not None:
            self._tidying.cancel()
        await self.node.stop()
        self.links.close()

    def attach(self, worker: WorkerProcess) -> None:
        """Connect to a worker of this process that has become ready."""
        self.links.add(worker.connect(), partial(worker.kill, "its connection ended"))

    def give_up(self) -> None:
        """Fail all jobs, now and later, because workers cannot be kept alive."""
        self.scheduler.give_up()

    def time_ms(self, header: bytes) -> int:
        """Return the time limit of a request in milliseconds.

        Args:
            header: Value of ``X-Deadline-Ms``; if empty, the default of the settings applies.

        Raises:
            InvalidInput: the header is not a whole number within the limit.
        """
        milliseconds = self.settings.deadline_ms
        if header:
            limit = self.settings.max_deadline_ms
            if not (header.isdigit() and len(header) < 10 and 0 < int(header) <= limit):
                raise InvalidInput.of("X-Deadline-Ms", f"a whole number from 1 to {limit}", "something else")
            milliseconds = int(header)
        return milliseconds

    def shape(self, served: Served) -> Shape:
        """Return the sizes and limits for requests to a model."""
        shape: Shape | None = served.cache.get("shape")
        if shape is None:
            facts, settings = served.facts, self.settings
            domain = Domain.of(facts["metadata"])
            sizes = (facts["d"], facts["m"], facts["dtype"], settings.max_rows)
            shape = Shape(*sizes, domain, settings.outside, facts["members"])
            served.cache["shape"] = shape
        return shape

    def why_not_ready(self) -> list[str]:
        """Return the reasons why the service is not ready; an empty list if it is."""
        reasons, health = [], self.node.health()
        if self.is_draining:
            reasons.append("the service is stopping")
        if self.is_starting or not health.is_loaded:
            reasons.append("the service is still loading its models")
        if not health.is_fresh:
            reasons.append("no worker answered lately")
        if not any(self.repository.default(name).state == "ready" for name in self.repository.names()):
            reasons.append("no model is ready")
        return reasons

    def key(self, served: Served, question: Question, form: str) -> BatchKey:
        """Create the key that requests of the same batch share, and cache it with the version."""
        is_weighted = question.weights is not None
        k = 0 if question.directions is None else question.directions.shape[1]
        sizes = (question.quantities, served.d, served.m, k, is_weighted)
        key = BatchKey(
            served.id,
            served.file.name,
            question.dtype,
            question.quantities,
            form,
            row_shapes(*sizes),
            floats_per_row(*sizes) * question.inputs.dtype.itemsize,
            is_weighted,
            k,
            served.statistics,
        )
        if len(served.cache) >= MAX_KEYS:
            del served.cache[next(iter(served.cache))]
        served.cache[question.dtype, question.quantities, is_weighted, k, form] = key
        return key

    def _gauges(self) -> Iterator[Gauge]:
        """Yield the gauges, computed when metrics are requested."""
        queue, health, repository = self.scheduler.queue, self.node.health(), self.repository
        served = [one for name in repository.names() for one in repository.versions(name).values()]
        is_ready = {(one.file.name, str(one.file.version)): float(one.state == "ready") for one in served}
        is_outdated = {(one.file.name, str(one.file.version)): float(one.is_outdated) for one in served}
        states = dict.fromkeys((("ready",), ("loading",), ("failed",)), 0.0)
        for one in served:
            states[one.state,] += 1
        oldest = queue.oldest()
        age_s = 0.0 if oldest is None else max(0.0, time.monotonic() - oldest)
        memory_bytes = {(str(slot),): float(size) for slot, size in enumerate(health.memory_bytes)}
        busy_s = {(str(slot),): seconds for slot, seconds in enumerate(health.busy_total_s)}
        workers = {(state,): float(count) for state, count in health.states.items()}
        yield Gauge("hessquik_ready", "1 while /readyz answers 200, else 0.", {(): float(not self.why_not_ready())})
        yield Gauge("hessquik_models", "Versions of models, by state.", states, ("state",))
        yield Gauge("hessquik_model_ready", "1 while a version is served, else 0.", is_ready, ("model", "version"))
        yield Gauge(
            "hessquik_model_outdated", "1 while a newer file of a version is refused.", is_outdated,
            ("model", "version"),
        )  # fmt: skip
        yield Gauge("hessquik_queue_requests", "Requests waiting or computed.", {(): queue.requests})
        yield Gauge("hessquik_queue_rows", "Points waiting.", {(): queue.rows})
        yield Gauge("hessquik_queue_age_seconds", "Time that the oldest request has waited.", {(): age_s})
        yield Gauge("hessquik_workers", "Workers, by state.", workers, ("state",))
        yield Gauge(
            "hessquik_device_memory_bytes",
            "Memory of a worker: reserved on its GPU, or the most that its process had.",
            memory_bytes,
            ("worker",),
        )
        yield Gauge("hessquik_device_busy_seconds_total", "Time spent on batches by a worker.", busy_s, ("worker",))
        yield Gauge("hessquik_start_time_seconds", "Start of the service, since 1970.", {(): health.began_s})
        yield Gauge("hessquik_worker_restarts_total", "Workers that were replaced.", {(): health.restarts})
        yield Gauge("hessquik_front_restarts_total", "Front ends that were replaced.", {(): health.front_restarts})
        yield Gauge(
            "hessquik_self_check_rows_total", "Points computed again by self-checks.", {(): health.checked_rows}
        )
        yield Gauge("hessquik_self_check_failures_total", "Self-checks that failed.", {(): health.mismatches})
