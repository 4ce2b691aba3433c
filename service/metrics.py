"""Prometheus metrics of the service. Label values come from fixed sets only.

The front and the scheduler append to the lists of :class:`Metrics` what happens, which takes no call; it is counted
several times a second, and when the metrics are read.
"""

from __future__ import annotations

import asyncio
import operator
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .versions import versions

__all__ = ["REFUSED", "Gauge", "Histogram", "Metrics", "Snapshot"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
#: Route label of input that was refused before it was a complete request.
REFUSED = "refused"
_POWERS = tuple(float(1 << power) for power in range(13))


class Gauge(NamedTuple):
    """A metric whose values are computed when Prometheus scrapes.

    Attributes:
        name: Name of the metric; one that ends in ``_total`` is a counter.
        text: Help text.
        samples: The values by the values of the labels.
        labels: Names of the labels.
    """

    name: str
    text: str
    samples: Mapping[Any, float]
    labels: tuple[str, ...] = ()

    def family(self) -> Metric:
        """Return the metric in the form of Prometheus' client."""
        kind = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        family = kind(self.name.removesuffix("_total"), self.text, labels=self.labels)
        for values, sample in self.samples.items():
            family.add_metric(list(map(str, values)), sample)
        return family


class Histogram:
    """Numbers of values by bucket, and their sums, for each combination of labels.

    Args:
        bounds: Upper bounds of the buckets.

    Attributes:
        series: By the values of the labels, the number of values in each bucket, and at the end their sum.

    Examples:
        >>> rows = Histogram((1.0, 2.0))
        >>> rows.count(("peaks", 200), [2.0, 1.0])
        >>> rows.count(("peaks", 503), [4.0])
        >>> rows.by(0).series, rows.by(1).totals()
        ({('peaks',): [1.0, 1.0, 1.0, 7.0]}, {(200,): 2.0, (503,): 1.0})
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        """Start without series."""
        self._bounds = bounds
        self.series: dict[tuple[Any, ...], list[float]] = {}

    def count(self, labels: tuple[Any, ...], values: Iterable[float]) -> None:
        """Count values with the same labels."""
        series = self._of(labels)
        for value in values:
            series[bisect_left(self._bounds, value)] += 1.0
            series[-1] += value

    def by(self, *axes: int, among: Callable[[tuple[Any, ...]], object] = lambda labels: True) -> Histogram:
        """Return the sums over all labels but some, of those series that fulfil a condition.

        Args:
            axes: The positions of the labels that stay; if there are none, there is one series, even without values.
            among: Tells by its labels whether a series is included.
        """
        whole = Histogram(self._bounds)
        if not axes:
            whole._of(())
        for labels, series in self.series.items():
            if among(labels):
                sums = whole._of(tuple(labels[axis] for axis in axes))
                sums[:] = map(operator.add, sums, series)
        return whole

    def totals(self) -> dict[tuple[Any, ...], float]:
        """Return the number of values of each series."""
        return {labels: sum(series[:-1]) for labels, series in self.series.items()}

    def family(self, name: str, text: str, *labels: str) -> Metric:
        """Return the histogram in the form of Prometheus' client."""
        family = HistogramMetricFamily(name, text, labels=labels)
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        for values, (*counts, total) in self.series.items():
            family.add_metric(list(map(str, values)), list(zip(ends, accumulate(counts), strict=True)), total)
        return family

    def copy(self) -> Histogram:
        """Return a copy that is not counted on."""
        same = Histogram(self._bounds)
        same.series = {labels: [*series] for labels, series in self.series.items()}
        return same

    def _of(self, labels: tuple[Any, ...]) -> list[float]:
        return self.series.setdefault(labels, [0.0] * (len(self._bounds) + 2))


class Snapshot(Collector):
    """All metrics at one moment, which any thread may write as text.

    Args:
        request_seconds: Seconds from the head to the reply of each request, by route, model and status.
        queue_seconds: Seconds in the queue of each job, by model.
        batch_rows: Rows of each batch, by quantities.
        batch_requests: Requests of each batch, likewise.
        gauges: The metrics that are computed for each snapshot.
        process: The metrics of the process.
    """

    def __init__(
        self,
        request_seconds: Histogram,
        queue_seconds: Histogram,
        batch_rows: Histogram,
        batch_requests: Histogram,
        gauges: Iterable[Gauge],
        process: Collector,
    ) -> None:
        """Copy what goes on being counted."""
        self._request_seconds, self._queue_seconds = request_seconds.copy(), queue_seconds.copy()
        self._batch_rows, self._batch_requests = batch_rows.copy(), batch_requests.copy()
        self._gauges, self._process = list(gauges), process

    def collect(self) -> Iterable[Metric]:
        """Return all metrics in the form of Prometheus' client."""
        answered, queued, rows = self._request_seconds, self._queue_seconds, self._batch_rows
        routes = answered.by(0, among=lambda labels: labels[0] != REFUSED)
        of_models = answered.by(1, 2, among=operator.itemgetter(1))
        points = sum(series[-1] for series in rows.series.values())
        counters = (
            Gauge("hessquik_requests_total", "Requests answered.", answered.by(0, 2).totals(), ("route", "status")),
            Gauge(
                "hessquik_model_requests_total", "Requests for an evaluation answered.", of_models.totals(),
                ("model", "status"),
            ),
            Gauge("hessquik_rows_total", "Points computed.", {(): points}),
        )  # fmt: skip
        yield from self._process.collect()
        for gauge in (*counters, *self._gauges):
            yield gauge.family()
        yield routes.family("hessquik_request_seconds", "Time from head to reply.", "route")
        yield of_models.by(0).family(
            "hessquik_model_request_seconds", "Time from head to reply of an evaluation.", "model"
        )
        yield queued.by().family("hessquik_queue_seconds", "Time in the queue.")
        yield queued.family("hessquik_model_queue_seconds", "Time in the queue, by model.", "model")
        yield rows.family("hessquik_batch_rows", "Points per batch.", "quantities")
        yield self._batch_requests.family("hessquik_batch_requests", "Requests per batch.", "quantities")

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self)


class Metrics:
    """The service's counters and histograms.

    Args:
        gauges: Returns the metrics that are computed for each snapshot.

    Attributes:
        answered: Seconds from the head to the reply of each request, by route, model that it asks to evaluate (or
            empty) and status.
        queued: Seconds in the queue of each job, by model.
        computed: Rows and requests of each batch, by quantities.
    """

    def __init__(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        """Start at zero."""
        self.answered: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
        self.queued: defaultdict[str, list[float]] = defaultdict(list)
        self.computed: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        self._gauges = gauges
        self._request_seconds, self._queue_seconds = Histogram(_SECONDS), Histogram(_SECONDS)
        self._batch_rows, self._batch_requests = Histogram(_POWERS), Histogram(_POWERS)
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        Info("hessquik_build", "Versions that run, and kind of modules.", registry=self._process).info(versions())

    def settle(self) -> None:
        """Count what has happened since the last call, and empty the lists."""
        for labels, seconds in self.answered.items():
            self._request_seconds.count(labels, seconds)
        for model, seconds in self.queued.items():
            self._queue_seconds.count((model,), seconds)
        for quantities, batches in self.computed.items():
            rows, requests = zip(*batches, strict=True)
            # All sets of several quantities share one label, so that labels stay few.
            label = quantities[0] if len(quantities) == 1 else "several"
            self._batch_rows.count((label,), rows)
            self._batch_requests.count((label,), requests)
        for events in (self.answered, self.queued, self.computed):
            events.clear()

    def snapshot(self) -> Snapshot:
        """Return all metrics as they are now."""
        self.settle()
        counted = (self._request_seconds, self._queue_seconds, self._batch_rows, self._batch_requests)
        return Snapshot(*counted, self._gauges(), self._process)

    async def text(self) -> bytes:
        """Return all metrics in Prometheus' text format.

        They are written by a thread: with a thousand models that takes a quarter of a second or more, for which no
        request may wait.
        """
        return await asyncio.get_running_loop().run_in_executor(None, self.snapshot().text)
