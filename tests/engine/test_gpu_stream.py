"""Staging with a fake driver that runs queued work as late as the events allow, or at once: results are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hessquik.backends import gpu_stream
from hessquik.backends.gpu_stream import Stages


@dataclass
class Stream:
    """A queue of work, and how much of it is done."""

    work: list[Callable[[], object]] = field(default_factory=list)
    done: int = 0

    def advance(self, until: int) -> None:
        while self.done < until:
            work = self.work[self.done]
            self.done += 1
            work()


@dataclass
class Event:
    """An event, recorded at a place in a stream."""

    stream: Stream | None = None
    place: int = 0

    def happen(self) -> None:
        if self.stream is not None:
            self.stream.advance(self.place)


class FakeDriver:
    """A driver whose streams run their work when an event of theirs is waited for or, if eager, at once."""

    def __init__(self, is_eager: bool) -> None:
        self.is_eager, self.own, self.pinned_bytes = is_eager, Stream(), 0
        self.current = self.own
        self.streams: list[Stream] = []
        #: Arrays of the device; the others are the host's.
        self.there: list[Tensor] = []

    def queue(self, stream: Stream, work: Callable[[], object]) -> None:
        stream.work.append(work)
        if self.is_eager:
            stream.advance(len(stream.work))

    def stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def event(self) -> Event:
        return Event()

    def caller(self) -> Stream:
        return self.current

    def record(self, event: Event, stream: Stream) -> None:
        event.stream, event.place = stream, len(stream.work)

    def wait(self, stream: Stream, event: Event) -> None:
        now = Event(event.stream, event.place)
        self.queue(stream, now.happen)

    def synchronize(self, event: Event) -> None:
        event.happen()

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def copy(self, out: Tensor, source: Tensor) -> None:
        self.queue(self.current, lambda: out.copy_(source))

    def pinned(self, count: int) -> Tensor:
        self.pinned_bytes += count
        return torch.full((count,), 255, dtype=torch.uint8)

    def memory(self, count: int) -> Tensor:
        """Return memory that work queued before on the stream, for which it was allocated, still writes."""
        memory = torch.zeros(count, dtype=torch.uint8)
        self.queue(self.current, lambda: memory.fill_(255))
        return memory

    def free_memory(self) -> None:
        pass

    def is_host(self, array: Tensor) -> bool:
        return not any(array is one for one in self.there)


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def driver(request: pytest.FixtureRequest) -> FakeDriver:
    return FakeDriver(request.param)


def launch_on(driver: FakeDriver) -> gpu_stream.Launch:
    """Return a launch function that queues the computation of y = 2 x + s."""

    def launch(arrays: Mapping[str, Tensor], n: int) -> None:
        given = {name: array[:n] if name != "s" else array for name, array in arrays.items()}

        def work() -> None:
            assert given["y"].any(), "what used this memory before is done"
            given["y"].copy_(2 * given["x"] + given["s"])

        driver.queue(driver.current, work)

    return launch


def run(stages: Stages, driver: FakeDriver, n: int, stop: int | None = None) -> tuple[Tensor, Tensor]:
    x, s = torch.randn(n, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    y = torch.full_like(x, float("nan"))
    stages.run({"x": x, "s": s, "y": y}, frozenset("y"), frozenset("s"), stop or n, launch_on(driver))
    return y, 2 * x + s


@pytest.mark.parametrize("n", [1, 4, 5, 23])
def test_results_are_in_place_on_return(driver: FakeDriver, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stream, "CHUNK_BYTES", 4 * 24)
    monkeypatch.setattr(gpu_stream, "DIRECT_BYTES", 0)
    stages = Stages(driver)
    for _ in range(3):  # the memory of the call before is used again
        found, expected = run(stages, driver, n)
        assert torch.equal(found, expected)


def test_small_calls_use_the_pinned_memory_itself(driver: FakeDriver) -> None:
    found, expected = run(Stages(driver), driver, 4)
    assert torch.equal(found, expected)
    inward, compute, outward = driver.streams
    assert not inward.work
    assert not outward.work
    assert len(compute.work) == 1, "the launch waits for nothing"
    assert not driver.own.work, "the caller's stream has nothing to do with arrays of the host"


def test_arrays_of_the_device_are_ready_before_and_after(driver: FakeDriver) -> None:
    stages, wanted, found = Stages(driver), [], []
    for _ in range(2):  # the second call uses the first one's memory, and may not be early
        x, s, given = torch.full((6, 3), float("nan")), torch.randn(3), torch.randn(6, 3)
        y = torch.full_like(x, float("nan"))
        driver.there = [x, y]
        driver.queue(driver.own, lambda x=x, given=given: x.copy_(given))
        stages.run({"x": x, "s": s, "y": y}, frozenset("y"), frozenset("s"), 6, launch_on(driver))
        wanted.append(2 * given + s)
        found.append(y)
    driver.own.advance(len(driver.own.work))
    assert all(map(torch.equal, found, wanted))


def test_other_rows_are_left_alone(driver: FakeDriver) -> None:
    found, expected = run(Stages(driver), driver, 9, 7)
    assert torch.equal(found[:7], expected[:7])
    assert found[7:].isnan().all()


def test_memory_is_bounded(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stream, "CHUNK_BYTES", 8 << 10)
    run(Stages(driver), driver, 4000)
    # x, s and y, each of the smallest size or a chunk, in two slots.
    assert driver.pinned_bytes <= 2 * (2 * (8 << 10) + 4096)


def test_a_failed_call_leaves_nothing_behind(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stream, "CHUNK_BYTES", 4 * 24)
    monkeypatch.setattr(gpu_stream, "DIRECT_BYTES", 0)
    stages, good, turns = Stages(driver), launch_on(driver), []

    def launch(*arguments: Any) -> None:
        turns.append(1)
        if len(turns) == 3:
            raise torch.OutOfMemoryError("no memory")
        good(*arguments)

    x = torch.randn(20, 3, dtype=torch.float64)
    arrays = {"x": x, "s": torch.zeros(3, dtype=torch.float64), "y": torch.zeros_like(x)}
    with pytest.raises(torch.OutOfMemoryError):
        stages.run(arrays, frozenset("y"), frozenset("s"), 20, launch)
    assert all(stream.done == len(stream.work) for stream in driver.streams)
    found, expected = run(stages, driver, 20)
    assert torch.equal(found, expected)
