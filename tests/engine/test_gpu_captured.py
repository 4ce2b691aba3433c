"""Captured tiles with a fake driver, whose streams run queued work as late as the events allow, or at once."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from hessquik.backends import gpu_captured
from hessquik.backends.gpu_captured import CapturedProgram, Captures
from hessquik.backends.gpu_stream import Stages
from hessquik.backends.torch import TorchProgram
from hessquik.device import GPU
from hessquik.networks import fullyConnectedNN
from hessquik.plan import Ask, choose, exact_forms
from tests.engine.test_gpu_stream import FakeDriver, Stream

CPU = torch.device("cpu")
D, M = 3, 2
SHAPES = {"value": (M,), "gradient": (D, M), "hessian": (D, D, M)}
ASKED = tuple(SHAPES)
ROWS = 32


class Pool:
    """A pool of memory, for which there must be a captured tile once it was used."""

    def __init__(self) -> None:
        self.captured = 0


class FakeCapturing(FakeDriver):
    """A driver whose captured work runs again when its replay is due."""

    def __init__(self, is_eager: bool) -> None:
        super().__init__(is_eager)
        self.pools: list[Pool] = []
        self.captures = self.replays = self.freed = 0
        #: Arrays that work on each stream reads, by their numbers.
        self.held: dict[int, set[int]] = {}
        #: Errors of the next captures.
        self.errors: list[Exception | None] = []

    def queue(self, stream: Stream, work: Callable[[], object]) -> None:
        super().queue(stream, torch.inference_mode()(work))  # type: ignore[no-untyped-call]

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pool(self) -> Pool:
        self.pools.append(Pool())
        return self.pools[-1]

    def capture(self, work: Callable[[], dict[str, Tensor]], pool: Pool) -> tuple[dict[str, Tensor], Any]:
        self.captures += 1
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        # The results of captured work have no numbers before the first replay.
        results = {name: torch.full_like(array, float("nan")) for name, array in work().items()}

        def again() -> None:
            for name, array in work().items():
                results[name].copy_(array)

        return results, again

    def replay(self, captured: Callable[[], None]) -> None:
        self.replays += 1
        self.queue(self.current, captured)

    def hold(self, arrays: Iterable[Tensor], streams: set[int]) -> None:
        if id(self.current) not in streams:
            self.held.setdefault(id(self.current), set()).update(map(id, arrays))
            streams.add(id(self.current))

    def free_memory(self) -> None:
        self.freed += 1

    def finish(self) -> None:
        """Run all that is queued on the caller's stream."""
        self.own.advance(len(self.own.work))


@pytest.fixture(params=[False, True], ids=["lazy", "eager"])
def driver(request: pytest.FixtureRequest) -> FakeCapturing:
    return FakeCapturing(request.param)


def captures_on(driver: FakeCapturing) -> Captures:
    return Captures(driver, Stages(driver))


def graph_of(seed: int = 0, weights: str | None = None) -> Any:
    torch.manual_seed(seed)
    network = fullyConnectedNN([D, 16, 16, M]).double()
    ask = Ask(frozenset(ASKED), weights=weights)
    return choose(exact_forms(network.layers()), ask, torch.float64, M, GPU).graph


def made(captures: Captures, seed: int = 0) -> CapturedProgram:
    return CapturedProgram(graph_of(seed), torch.float64, CPU, ROWS, captures)


def call(n: int) -> dict[str, Tensor]:
    x = torch.randn(n, D, dtype=torch.float64)
    return {"x": x, **{name: torch.full((n, *SHAPES[name]), float("nan"), dtype=torch.float64) for name in ASKED}}


def expected(x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    arrays = {**call(len(x)), "x": x}
    TorchProgram(graph_of(seed), torch.float64, CPU, ROWS).run(arrays, 0, len(x))
    return arrays


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in ASKED:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.parametrize("n", [1, 8, 9, 100])
@pytest.mark.parametrize("where", ["host", "device"])
def test_results_are_those_of_torch(driver: FakeCapturing, where: str, n: int) -> None:
    program = made(captures_on(driver))
    for _ in range(2):
        arrays = call(n)
        driver.there = list(arrays.values()) if where == "device" else []
        program.run(arrays, 0, n)
        if where == "device":
            driver.finish()
        assert_same(arrays, expected(arrays["x"]))


def test_other_rows_are_left_alone(driver: FakeCapturing) -> None:
    program, arrays = made(captures_on(driver)), call(9)
    program.run(arrays, 2, 7)
    wanted = expected(arrays["x"])
    for name in ASKED:
        assert torch.equal(arrays[name][2:7], wanted[name][2:7])
        assert arrays[name][:2].isnan().all()
        assert arrays[name][7:].isnan().all()


def test_a_tile_is_captured_once(driver: FakeCapturing) -> None:
    program = made(captures_on(driver))
    captures = driver.captures
    assert captures == len(program.tile_rows)
    for n in (1, 9, 100):
        program.run(call(n), 0, n)
    assert driver.captures == captures


def test_programs_on_different_streams_take_turns(driver: FakeCapturing) -> None:
    """Both have one memory: what was queued later is not run earlier, whichever stream is waited for first."""
    captures = captures_on(driver)
    programs = [made(captures, seed) for seed in (0, 1)]
    calls, streams = [call(8), call(8)], [driver.stream(), driver.stream()]
    driver.there = [array for arrays in calls for array in arrays.values()]
    order: list[int] = []
    for i, (program, arrays, stream) in enumerate(zip(programs, calls, streams, strict=True)):
        with driver.on(stream):
            program.run(arrays, 0, 8)
            driver.queue(stream, lambda i=i: order.append(i))
    streams[1].advance(len(streams[1].work))
    first, second = calls
    assert_same(first, expected(first["x"], 0))
    assert_same(second, expected(second["x"], 1))
    streams[0].advance(len(streams[0].work))
    assert sorted(order) == [0, 1]


def test_a_tile_is_not_filled_again_before_it_is_read(driver: FakeCapturing) -> None:
    program, calls = made(captures_on(driver)), [call(8), call(8)]
    streams = [driver.stream(), driver.stream()]
    driver.there = [array for arrays in calls for array in arrays.values()]
    for arrays, stream in zip(calls, streams, strict=True):
        with driver.on(stream):
            program.run(arrays, 0, 8)
    streams[0].advance(1 if driver.is_eager else 2)  # the tile is filled
    for stream in reversed(streams):
        stream.advance(len(stream.work))
    for arrays in calls:
        assert_same(arrays, expected(arrays["x"]))


def test_memory_is_held_for_every_stream_that_reads_it(driver: FakeCapturing) -> None:
    program, streams = made(captures_on(driver)), [driver.stream(), driver.stream()]
    for stream in streams:
        arrays = call(8)
        driver.there = list(arrays.values())
        with driver.on(stream):
            program.run(arrays, 0, 8)
        read = {id(array) for array in (*program._constants.values(), *program._tiles[8].inputs.values())}
        assert driver.held[id(stream)] == read


def test_shared_inputs_are_copied_once_for_all_rows(driver: FakeCapturing) -> None:
    graph = graph_of(weights="shared")
    arrays = call(20) | {"weights": torch.randn(1, M, dtype=torch.float64)}
    for name, shape in SHAPES.items():
        arrays[name] = torch.zeros(20, *shape[:-1], 1, dtype=torch.float64)
    wanted = {name: array.clone() for name, array in arrays.items()}
    CapturedProgram(graph, torch.float64, CPU, ROWS, captures_on(driver)).run(arrays, 0, 20)
    TorchProgram(graph, torch.float64, CPU, ROWS).run(wanted, 0, 20)
    assert_same(arrays, wanted)
    assert wanted["value"].any()


def test_memory_is_bounded_and_lost_tiles_are_captured_again(
    driver: FakeCapturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = captures_on(driver)
    first = made(captures)
    size = max(tile.size for tile in first._tiles.values())
    monkeypatch.setattr(gpu_captured, "MAX_TILE_BYTES", 2 * size)
    second = made(captures, 1)
    kept = [tile for program in (first, second) for tile in program._tiles.values() if not tile.is_dropped]
    assert kept
    assert sum(tile.size for tile in kept) <= 2 * size
    assert first._tiles[max(first.tile_rows)].is_dropped, "it was not used for longest"
    before = driver.captures
    arrays = call(20)
    first.run(arrays, 0, 20)
    assert driver.captures > before
    assert_same(arrays, expected(arrays["x"]))


def test_a_dropped_program_holds_no_memory(driver: FakeCapturing) -> None:
    captures = captures_on(driver)
    program = made(captures)
    assert len(driver.pools) == 1
    del program
    driver.own.work.clear()
    gc.collect()
    assert not captures._tiles
    made(captures)
    assert len(driver.pools) == 2, "a pool that no graph uses any more must not be used again"


def test_out_of_memory_frees_all_and_gives_smaller_tiles(driver: FakeCapturing) -> None:
    captures, error = captures_on(driver), torch.OutOfMemoryError("no memory")
    other = made(captures)
    driver.errors = [error]
    program = made(captures, 1)
    assert program.tile_rows == other.tile_rows[:-1]
    assert driver.freed == 1
    assert all(tile.is_dropped for tile in other._tiles.values())
    for one, seed in ((program, 1), (other, 0)):
        arrays = call(50)
        one.run(arrays, 0, 50)
        assert_same(arrays, expected(arrays["x"], seed))
    driver.errors = [error] * 10
    with pytest.raises(torch.OutOfMemoryError):
        made(captures, 2)


def test_work_that_cannot_be_captured_is_launched_each_time(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeCapturing(is_eager=True)
    driver.errors = [RuntimeError("operation not permitted when stream is capturing")] * 10
    with caplog.at_level(logging.WARNING):
        program = made(captures_on(driver))
    assert "not permitted" in caplog.text
    captures = driver.captures
    for _ in range(2):
        arrays = call(20)
        program.run(arrays, 0, 20)
        assert_same(arrays, expected(arrays["x"]))
    assert driver.captures == captures
    assert driver.replays == 0


def test_a_failed_call_does_not_stop_the_next(driver: FakeCapturing, monkeypatch: pytest.MonkeyPatch) -> None:
    program, arrays = made(captures_on(driver)), call(20)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "replay", lambda captured: (_ for _ in ()).throw(RuntimeError("the device is lost")))
        with pytest.raises(RuntimeError, match="device is lost"):
            program.run(arrays, 0, 20)
    program.run(arrays, 0, 20)
    assert_same(arrays, expected(arrays["x"]))
