"""Metrics, as Prometheus reads them. Label values come from fixed sets only."""

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

from service.versions import versions

__all__ = ["REFUSED", "Distribution", "Gauge", "Metrics", "ModelStatistics", "Tally", "Total"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
#: Route label of what was refused before it was a request.
REFUSED = "refused"
_POWERS = tuple(float(1 << power) for power in range(13))


class Gauge(NamedTuple):
    """A number that is read off when Prometheus asks, or several, told apart by labels.

    Attributes:
        name: As Prometheus shows it; one that ends in ``_total`` is a counter.
        text: What it is.
        samples: By the labels' values.
        labels: Their names.
    """

    name: str
    text: str
    samples: Mapping[Any, float]
    labels: tuple[str, ...] = ()


class _ReadOff(Collector):
    """Gauges that have their value elsewhere."""

    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """The gauges now."""
        for gauge in self._read():
            kind = CounterMetricFamily if gauge.name.endswith("_total") else GaugeMetricFamily
            family = kind(gauge.name.removesuffix("_total"), gauge.text, labels=gauge.labels)
            for values, sample in gauge.samples.items():
                family.add_metric(values, sample)
            yield family


class Tally(Collector):
    """A counter of what takes place thousands of times a second.

    Args:
        name: As Prometheus shows it.
        text: What it is.
        labels: Names of the labels.

    Example:
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
        """The counter now."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, total in self._counts.items():
            family.add_metric(list(map(str, labels)), total)
        yield family


class Distribution(Collector):
    """A histogram for what is observed thousands of times a second: one search and two additions each time.

    Args:
        name: As Prometheus shows it.
        text: What it is.
        bounds: Upper ends of the buckets.
        label: Name of the label.

    Example:
        >>> rows = Distribution("rows", "Points.", (1.0, 2.0), "kind")
        >>> rows.observe("even", 2.0)
        >>> [(sample.labels["le"], sample.value) for family in rows.collect() for sample in family.samples[:3]]
        [('1.0', 0.0), ('2.0', 1.0), ('+Inf', 1.0)]
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], label: str = "") -> None:
        """Start with no series, or with the only one."""
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
        """Add values that were counted elsewhere, by bucket, and their sum."""
        mine = self._counts.get(label) or self._begin(label)
        mine[:] = map(operator.add, mine, counts)
        self._sums[label] += total

    def merged(self, name: str, text: str) -> Distribution:
        """Return the same values without their label."""
        whole = Distribution(name, text, self._bounds)
        for label, counts in self._counts.items():
            whole.add("", counts, self._sums[label])
        return whole

    def _begin(self, label: str) -> list[int]:
        self._sums[label] = 0.0
        return self._counts.setdefault(label, [0] * (len(self._bounds) + 1))

    def collect(self) -> Iterable[Metric]:
        """The histogram now."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label] if self._label else [])
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        for label, counts in self._counts.items():
            buckets = list(zip(ends, map(float, accumulate(counts)), strict=True))
            family.add_metric([label] if self._label else [], buckets, self._sums[label])
        yield family


class _Answers(Collector):
    """Requests by route and by model, counted in one step: each family adds up what it does not tell apart."""

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
    """Times in the queue by model, and those of all models together."""

    def collect(self) -> Iterable[Metric]:
        """Return both families."""
        yield from self.merged("hessquik_queue_seconds", "Time in the queue.").collect()
        yield from super().collect()


@dataclass(slots=True)
class Total:
    """A number of events, and their total duration."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """It took place again."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class ModelStatistics:
    """Counts since the version was loaded.

    Attributes:
        rows: Points answered.
        batches: Batches computed.
        last_answer_ms: When the last request was answered, in milliseconds since 1970; 0 if none was.
        success: Requests that got numbers.
        fail: Requests that did not.
        queue: Their time in the queue.
        compute: Their time after it.
    """

    rows: int = 0
    batches: int = 0
    last_answer_ms: int = 0
    success: Total = field(default_factory=Total)
    fail: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)

    def answered(self, rows: int, queue_s: float, compute_s: float) -> None:
        """A request got its numbers."""
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
        """Add gauges that are read off when asked for."""
        self._registry.register(_ReadOff(gauges))

    def answered(self, route: str, model: str, status: int, began_s: float) -> None:
        """Count a request that was answered.

        Args:
            route: Its path with placeholders.
            model: The served model that was asked, empty if none was.
            status: Of the reply.
            began_s: When its head was complete, on the monotonic clock.
        """
        self._answers.add(route, model, status, monotonic() - began_s)

    def queued(self, model: str, seconds: float) -> None:
        """Count a request that left the queue."""
        self._queue_seconds.observe(model, seconds)

    def computed(self, quantities: Sequence[str], rows: int, requests: int) -> None:
        """Count a batch; of the many sets of quantities that may be asked together, all have one label."""
        label = quantities[0] if len(quantities) == 1 else "several"
        self._batch_rows.observe(label, rows)
        self._batch_requests.observe(label, requests)
        self._rows.add(times=rows)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)
