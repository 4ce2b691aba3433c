"""What is counted, as Prometheus reads it. Label values come from fixed sets only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Metrics"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_POWERS = tuple(float(1 << power) for power in range(13))

#: Gauges that are read off when Prometheus asks: a number, or a label and a number for each of its values.
Gauges = Callable[[], Mapping[str, float | tuple[str, Mapping[str, float]]]]


class _ReadOff(Collector):
    """Gauges that have their value elsewhere."""

    def __init__(self, read: Gauges) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """The gauges now; a mapping becomes one sample per label value."""
        for name, value in self._read().items():
            if isinstance(value, tuple):
                label, samples = value
                family = GaugeMetricFamily(name, name, labels=[label])
                for label_value, sample in samples.items():
                    family.add_metric([label_value], sample)
                yield family
            elif name.endswith("_total"):
                yield CounterMetricFamily(name.removesuffix("_total"), name, value=value)
            else:
                yield GaugeMetricFamily(name, name, value=value)


class Metrics:
    """The service's counters and histograms."""

    def __init__(self) -> None:
        """Start at zero."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "hessquik_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "hessquik_request_seconds",
            "Time from head to reply.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._queue_seconds = Histogram(
            "hessquik_queue_seconds", "Time in the queue.", buckets=_SECONDS, registry=self._registry
        )
        self._batch_rows = Histogram(
            "hessquik_batch_rows", "Points per batch.", ["quantities"], buckets=_POWERS, registry=self._registry
        )
        self._batch_requests = Histogram(
            "hessquik_batch_requests", "Requests per batch.", ["quantities"], buckets=_POWERS, registry=self._registry
        )
        self._rows = Counter("hessquik_rows", "Points computed.", registry=self._registry)
        self._children: dict[tuple[str, str], tuple[Counter, Histogram]] = {}

    def read_off(self, gauges: Gauges) -> None:
        """Add gauges that are read off when asked for."""
        self._registry.register(_ReadOff(gauges))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        key = (route, str(status))
        if key not in self._children:
            self._children[key] = (self._requests.labels(*key), self._seconds.labels(route))
        requests, histogram = self._children[key]
        requests.inc()
        histogram.observe(seconds)

    def refused(self, status: int) -> None:
        """Something was refused before it was a request."""
        self._requests.labels("refused", str(status)).inc()

    def queued(self, seconds: float) -> None:
        """A request left the queue."""
        self._queue_seconds.observe(seconds)

    def computed(self, quantities: Sequence[str], rows: int, requests: int) -> None:
        """A batch was computed; of the many sets of quantities that may be asked together, all have one label."""
        label = quantities[0] if len(quantities) == 1 else "several"
        self._batch_rows.labels(label).observe(rows)
        self._batch_requests.labels(label).observe(requests)
        self._rows.inc(rows)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
