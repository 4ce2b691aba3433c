"""Prometheus metrics of the service. Label values come from fixed sets only."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from time import monotonic, time_ns
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Info, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .versions import versions

__all__ = ["REFUSED", "Distribution", "Gauge", "Metrics", "ModelStatistics", "Tally", "Total"]

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


class _ReadOff(Collector):
    """Collector of gauges whose values are computed at each scrape."""

    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Return the current gauges."""
        for gauge in self._read():
            kind = CounterMetricFamily if gauge.name.endswith("_total") else GaugeMetricFamily
            family = kind(gauge.name.removesuffix("_total"), gauge.text, labels=gauge.labels)
            for values, sample in gauge.samples.items():
                family.add_metric(values, sample)
            yield family


class Tally(Collector):
    """A counter that is fast enough for thousands of events a second.

    Args:
        name: Name of the metric, without ``_total``.
        text: Help text.
        labels: Names of the labels.

    Examples:
        >>> requests = Tally("requests", "Requests.", ("route", "status"))
        >>> requests.add("/livez", 200)
        >>> [(sample.name, sample.labels, sample.value) for family in requests.collect() for sample in family.samples]
        [('requests_total', {'route': '/livez', 'status': '200'}, 1)]
    """

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        """Start with no series."""
        self._name, self._text, self._labels = name, text, labels
        self._counts: dict[tuple[object, ...], int] = {}

    def add(self, *labels: object, times: int = 1) -> None:
        """Increment the series with these labels."""
        self._counts[labels] = self._counts.get(labels, 0) + times

    def collect(self) -> Iterable[Metric]:
        """Return the current counter."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, total in self._counts.items():
            family.add_metric(list(map(str, labels)), total)
        yield family


class Distribution(Collector):
    """A histogram that is fast enough for thousands of observations a second.

    Args:
        name: Name of the metric.
        text: Help text.
        bounds: Upper bounds of the buckets.
        label: Name of the label; empty for a histogram without labels.

    Examples:
        >>> rows = Distribution("rows", "Points.", (1.0, 2.0), "kind")
        >>> rows.observe("even", 2.0)
        >>> [(sample.labels["le"], sample.value) for family in rows.collect() for sample in family.samples[:3]]
        [('1.0', 0.0), ('2.0', 1.0), ('+Inf', 1.0)]
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], label: str = "") -> None:
        """Start without series; a histogram without labels has its only one from the start."""
        self._name, self._text, self._bounds, self._label = name, text, bounds, label
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        if not label:
            self._begin("")

    def observe(self, label: str, value: float) -> None:
        """Count a value in the series with this label."""
        counts = self._counts.get(label)
        if counts is None:
            counts = self._begin(label)
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[label] += value

    def add(self, label: str, counts: Sequence[int], total: float) -> None:
        """Add the counts of the buckets, and the sum, of values that were observed elsewhere."""
        mine = self._counts.get(label) or self._begin(label)
        mine[:] = map(operator.add, mine, counts)
        self._sums[label] += total

    def merged(self, name: str, text: str) -> Distribution:
        """Return the sum of all series as a histogram without labels."""
        whole = Distribution(name, text, self._bounds)
        for label, counts in self._counts.items():
            whole.add("", counts, self._sums[label])
        return whole

    def _begin(self, label: str) -> list[int]:
        self._sums[label] = 0.0
        return self._counts.setdefault(label, [0] * (len(self._bounds) + 1))

    def collect(self) -> Iterable[Metric]:
        """Return the current histogram."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        for label, counts in self._counts.items():
            buckets = list(zip(ends, map(float, accumulate(counts)), strict=True))
            family.add_metric([label] if self._label else [], buckets, self._sums[label])
        yield family


class _Answers(Collector):
    """Requests by route and by model, counted once and summed into one family for each at a scrape."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, int], int] = {}
        self._buckets: dict[tuple[str, str], list[int]] = {}
        self._sums: dict[tuple[str, str], float] = {}

    def add(self, route: str, model: str, status: int, seconds: float) -> None:
        """Count a request."""
        counts, key, pair = self._counts, (route, model, status), (route, model)
        counts[key] = counts.get(key, 0) + 1
        buckets = self._buckets.get(pair)
        if buckets is None:
            buckets, self._sums[pair] = self._buckets.setdefault(pair, [0] * (len(_SECONDS) + 1)), 0.0
        buckets[bisect_left(_SECONDS, seconds)] += 1
        self._sums[pair] += seconds

    def collect(self) -> Iterable[Metric]:
        """Return the families by route and by model."""
        for axis, prefix, text in ((0, "hessquik", ""), (1, "hessquik_model", " for a model")):
            label = ("route", "model")[axis]
            requests = Tally(f"{prefix}_requests", f"Requests answered{text}.", (label, "status"))
            for key, total in self._counts.items():
                if key[axis]:
                    requests.add(key[axis], key[2], times=total)
            seconds = Distribution(f"{prefix}_request_seconds", f"Time from head to reply{text}.", _SECONDS, label)
            for pair, buckets in self._buckets.items():
                if pair[axis] and pair[0] != REFUSED:
                    seconds.add(pair[axis], buckets, self._sums[pair])
            yield from requests.collect()
            yield from seconds.collect()


class _Queueing(Distribution):
    """Histograms of the times in the queue, by model and of all models together."""

    def collect(self) -> Iterable[Metric]:
        """Return both families."""
        yield from self.merged("hessquik_queue_seconds", "Time in the queue.").collect()
        yield from super().collect()


@dataclass(slots=True)
class Total:
    """Number of events and their total duration in seconds."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one event."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class ModelStatistics:
    """Statistics of one version of a model since it was loaded.

    Attributes:
        rows: Points answered.
        batches: Batches computed.
        last_answer_ms: When the last request was answered, in milliseconds since 1970; 0 if none was.
        success: Requests that were answered with results.
        fail: Requests that failed.
        queue: Times in the queue of successful requests.
        compute: Times after the queue of successful requests.
    """

    rows: int = 0
    batches: int = 0
    last_answer_ms: int = 0
    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)

    def answered(self, rows: int, queue_s: float, compute_s: float) -> None:
        """Count a request that was answered with results."""
        self.rows += rows
        self.last_answer_ms = time_ns() // 1_000_000
        for total, seconds in ((self.success, queue_s + compute_s), (self.queue, queue_s), (self.compute, compute_s)):
            total.count += 1
            total.seconds += seconds


class Metrics:
    """The service's counters and histograms."""

    def __init__(self) -> None:
        """Start at zero."""
        self._registry = CollectorRegistry()
        self._answers = _Answers()
        self._queue_seconds = _Queueing(
            "hessquik_model_queue_seconds", "Time in the queue of requests for a model.", _SECONDS, "model"
        )
        self._batch_rows = Distribution("hessquik_batch_rows", "Points per batch.", _POWERS, "quantities")
        self._batch_requests = Distribution("hessquik_batch_requests", "Requests per batch.", _POWERS, "quantities")
        self._rows = Tally("hessquik_rows", "Points computed.", ())
        self._rows.add(times=0)
        for collector in vars(self).copy().values():
            if isinstance(collector, _Answers | Distribution | Tally):
                self._registry.register(collector)
        ProcessCollector(registry=self._registry)
        Info("hessquik_build", "What runs here.", registry=self._registry).info(versions())

    def read_off(self, gauges: Callable[[], Iterable[Gauge]]) -> None:
        """Add gauges that are computed at each scrape."""
        self._registry.register(_ReadOff(gauges))

    def answered(self, route: str, model: str, status: int, began_s: float) -> None:
        """Count a request that was answered.

        Args:
            route: Path of the route, with placeholders.
            model: Name of the served model, or empty.
            status: Status of the reply.
            began_s: Time when the head was complete, on the monotonic clock.
        """
        self._answers.add(route, model, status, monotonic() - began_s)

    def queued(self, model: str, seconds: float) -> None:
        """Count a request that left the queue."""
        self._queue_seconds.observe(model, seconds)

    def computed(self, quantities: Sequence[str], rows: int, requests: int) -> None:
        """Count a batch; all sets of several quantities share one label, so that labels stay few."""
        label = quantities[0] if len(quantities) == 1 else "several"
        self._batch_rows.observe(label, rows)
        self._batch_requests.observe(label, requests)
        self._rows.add(times=rows)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
