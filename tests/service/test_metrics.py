"""Events are counted when metrics are read, and no list of them grows longer than the time between two counts."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.metrics import REFUSED, Gauge, Metrics, Snapshot


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.snapshot().text().decode().splitlines() if line.startswith("hessquik_")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_each_event_is_counted_once_and_read_at_once() -> None:
    metrics = Metrics(lambda: [Gauge("hessquik_models", "Models.", {("ready",): 2}, ("state",))])
    metrics.answered["/value", "peaks", 200] += [0.0004, 0.0005, 0.3]
    metrics.answered["/value", "peaks", 503].append(40.0)
    metrics.answered["/livez", "", 200].append(0.001)
    metrics.answered[REFUSED, "", 400].append(0.0)
    metrics.queued["peaks"] += [0.002, 0.002]
    metrics.computed["value",].append((3, 2))
    metrics.computed["value", "hessian"].append((5000, 1))
    metrics.settle()
    assert metrics.answered == metrics.queued == metrics.computed == {}
    metrics.computed["value",].append((1, 1))  # counted, too, when it is read
    found = samples(metrics)
    expected = {
        'hessquik_models{state="ready"}': 2,
        'hessquik_requests_total{route="/value",status="200"}': 3,
        'hessquik_requests_total{route="/value",status="503"}': 1,
        'hessquik_requests_total{route="refused",status="400"}': 1,
        'hessquik_model_requests_total{model="peaks",status="200"}': 3,
        'hessquik_request_seconds_bucket{le="0.0005",route="/value"}': 2,
        'hessquik_request_seconds_bucket{le="0.25",route="/value"}': 2,
        'hessquik_request_seconds_bucket{le="0.5",route="/value"}': 3,
        'hessquik_request_seconds_bucket{le="30.0",route="/value"}': 3,
        'hessquik_request_seconds_bucket{le="+Inf",route="/value"}': 4,
        'hessquik_request_seconds_count{route="/value"}': 4,
        'hessquik_request_seconds_sum{route="/livez"}': 0.001,
        'hessquik_model_request_seconds_count{model="peaks"}': 4,
        "hessquik_queue_seconds_count": 2,
        'hessquik_model_queue_seconds_sum{model="peaks"}': 0.004,
        "hessquik_rows_total": 5004,
        'hessquik_batch_rows_count{quantities="value"}': 2,
        'hessquik_batch_rows_bucket{le="4096.0",quantities="several"}': 0,
        'hessquik_batch_rows_sum{quantities="several"}': 5000,
        'hessquik_batch_requests_sum{quantities="value"}': 3,
    }
    assert {name: found[name] for name in expected} == expected
    assert not any('route="refused"' in name and "seconds" in name for name in found)
    assert not any('model=""' in name for name in found)
    assert samples(metrics) == found, "reading counts nothing"


def test_a_snapshot_is_of_its_moment() -> None:
    models: dict[tuple[str, ...], float] = {("ready",): 1.0}
    metrics = Metrics(lambda: [Gauge("hessquik_models", "Models.", models, ("state",))])
    metrics.answered["/value", "peaks", 200].append(0.001)
    snapshot = metrics.snapshot()
    metrics.answered["/value", "peaks", 200].append(0.001)
    metrics.settle()
    assert b'hessquik_requests_total{route="/value",status="200"} 1.0\n' in snapshot.text()
    assert b'hessquik_requests_total{route="/value",status="200"} 2.0\n' in metrics.snapshot().text()


def test_no_request_waits_until_the_metrics_of_many_models_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written by a thread, which the event loop does not wait for."""
    metrics, may_write = Metrics(list), threading.Event()
    right = Snapshot.text

    def text(self: Snapshot) -> bytes:
        assert may_write.wait(10), "the event loop waits"
        return right(self)

    monkeypatch.setattr(Snapshot, "text", text)

    async def read() -> bytes:
        reading = asyncio.create_task(metrics.text())
        for _ in range(3):
            await asyncio.sleep(0)
        assert not reading.done()
        may_write.set()
        return await reading

    assert b"hessquik_rows_total 0.0" in asyncio.run(read())


def test_what_has_no_labels_is_there_before_the_first_event() -> None:
    found = samples(Metrics(list))
    assert found["hessquik_queue_seconds_count"] == found["hessquik_rows_total"] == 0
