"""Tiles and lanes: what is staged, what a full memory does, what tiles that disagree do; and all of it on a GPU."""

import threading

import pytest
import torch

from hessquik import Evaluator, runners
from hessquik.activations import tanhActivation
from hessquik.calculus import QUANTITIES
from hessquik.layers import resnetLayer, singleLayer
from hessquik.machine import Machine, full_precision
from hessquik.networks import NN
from hessquik.runners import Lane
from tests.engine.test_evaluator import DTYPES, NETWORKS, TOLERANCE, agree, assert_threads_agree, expected

ACT = tanhActivation()
CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(test):
    for mark in gpu:
        test = mark(test)
    return test


def network(d=4, w=16, m=3):
    torch.manual_seed(0)
    return NN(singleLayer(d, w, ACT), resnetLayer(w, 0.5, ACT), singleLayer(w, m))


def given(evaluate, n, dtype=torch.float32):
    """Points, weights of each and directions of each."""
    shapes = (n, evaluate.d), (n, evaluate.m), (n, 2, evaluate.d)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def same(left, right):
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in QUANTITIES)


# ---- A full memory. ----


def full_above(rows):
    """A machine for which memory does not suffice above some rows, when it is made or when it runs."""

    class Full(Machine):
        def __init__(self, program, dtype, device, count):
            super().__init__(program, dtype, device, count)
            if count > 4 * rows:
                raise torch.OutOfMemoryError("no memory to make it")

        def run(self):
            if self.rows > rows:
                raise torch.OutOfMemoryError("no memory to run")
            super().run()

    return Full


def test_without_memory_tiles_are_halved_until_they_fit(monkeypatch):
    evaluate = Evaluator(network(), native=False)
    assert evaluate.ladder[-1] >= 128
    x, weights, v = given(evaluate, 300)
    before = evaluate(x, QUANTITIES, weights, v)
    monkeypatch.setattr(runners, "Machine", full_above(16))
    starved = Evaluator(network(), native=False)
    assert same(starved(x, QUANTITIES, weights, v), before)
    assert starved._runner(starved._ask(QUANTITIES, weights, v)).ladder == (8, 16)
    assert same(starved(x, QUANTITIES, weights, v), before)


def test_without_memory_for_the_smallest_tile_the_error_goes_to_the_caller(monkeypatch):
    monkeypatch.setattr(runners, "Machine", full_above(4))
    evaluate = Evaluator(network(), native=False)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(torch.zeros(300, 4))
    monkeypatch.setattr(runners, "Machine", Machine)
    assert torch.equal(
        evaluate(torch.zeros(300, 4)).value, Evaluator(network(), native=False)(torch.zeros(300, 4)).value
    )


def test_threads_that_run_out_of_memory_at_once_all_get_their_answers(monkeypatch):
    plain = Evaluator(network(), native=False)
    monkeypatch.setattr(runners, "Machine", full_above(16))
    evaluate = Evaluator(network(), native=False)
    points = [torch.randn(200, 4) for _ in range(6)]
    found = [None] * len(points)

    def work(i):
        found[i] = evaluate(points[i], ("value", "hessian")).hessian

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(points))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, plain(x, ("value", "hessian")).hessian) for got, x in zip(found, points, strict=True))


# ---- Lanes. ----


@pytest.mark.parametrize("weights_of", ["each", "shared"])
def test_buffers_and_lanes_in_turn_change_nothing(weights_of, monkeypatch):
    """What a GPU does with the computer's memory, done without one: staged, and two lanes in turn."""
    evaluate = Evaluator(network(), native=False)
    x, weights, v = given(evaluate, 117)
    weights, v = (weights, v) if weights_of == "each" else (weights[0], v[0])
    wanted = evaluate(x, QUANTITIES, weights, v)
    runner, arrays = evaluate._prepare(x, QUANTITIES, weights, v)
    results = {name: torch.full_like(getattr(wanted, name), float("nan")) for name in QUANTITIES}
    with torch.inference_mode():
        lanes = [Lane(Machine(runner.plan.program, torch.float32, CPU, 16), is_staged=True) for _ in range(2)]
        for i, start in enumerate(range(0, 117, 16)):
            lanes[i % 2].start({**arrays, **results}, start, min(117, start + 16), runner.shared)
        assert results["value"][-5:].isnan().all(), "the last tile waits in a buffer"
        for lane in lanes:
            lane.finish()
    assert all(torch.equal(results[name], getattr(wanted, name)) for name in QUANTITIES)


def test_a_lane_that_is_dropped_writes_no_results():
    evaluate = Evaluator(network(), native=False)
    runner, arrays = evaluate._prepare(torch.randn(16, 4), ("value",), None, None)
    value = torch.full((16, 3), 7.0)
    for end, written in ((Lane.drop, False), (Lane.finish, True)):
        with torch.inference_mode():
            lane = Lane(Machine(runner.plan.program, torch.float32, CPU, 16), is_staged=True)
            lane.start({**arrays, "value": value}, 0, 16, runner.shared)
            end(lane)
            lane.finish()
        assert bool((value != 7.0).all()) is written


def test_tiles_that_disagree_are_noticed(monkeypatch):
    evaluate = Evaluator(network(), native=False)
    runner = evaluate._runner(evaluate._ask(("value", "hessian"), None, None))
    assert runner.is_same_in_all_tiles()

    class Odd(Machine):
        def run(self):
            super().run()
            if self.rows > 8:
                self.arrays["value"].add_(2.0**-20)

    monkeypatch.setattr(runners, "Machine", Odd)
    runner._idle.clear()
    assert not runner.is_same_in_all_tiles()


def test_full_precision_is_for_a_while_only():
    chosen = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = chosen


# ---- The same on a GPU. ----


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu_every_quantity_is_that_of_torch_func(name, dtype):
    torch.manual_seed(0)
    net = NETWORKS[name]().to(dtype)
    evaluate = Evaluator(net, "cuda")
    x, weights, v = given(evaluate, 11, dtype)
    found = expected(net.double(), x, weights, v)
    for place in ("cpu", "cuda"):
        out = evaluate(x.to(place), QUANTITIES, weights.to(place), v.to(place))
        assert out.value.device.type == place
        agree(type(out)(*(getattr(out, quantity).cpu() for quantity in QUANTITIES)), found, QUANTITIES)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_a_row_has_the_same_bits_in_any_company(dtype):
    evaluate = Evaluator(network(10, 37, 3), "cuda", dtype)
    tile = evaluate.ladder[-1]
    x, _, v = given(evaluate, 2 * tile + 3, dtype)
    whole = evaluate(x, QUANTITIES, None, v)
    for count in (1, 7, 8, 9, tile, tile + 1):
        some = evaluate(x[-count:], QUANTITIES, None, v[-count:])
        assert all(torch.equal(getattr(some, name), getattr(whole, name)[-count:]) for name in QUANTITIES), count
    x[:-1] = float("nan")
    last = evaluate(x, QUANTITIES, None, v)
    assert all(torch.equal(getattr(last, name)[-1], getattr(whole, name)[-1]) for name in QUANTITIES)


@on_gpu
def test_a_graph_replays_what_its_steps_compute():
    evaluate = Evaluator(network(), "cuda")
    runner = evaluate._runner(evaluate._ask(("value", "hessian"), None, None))
    with torch.inference_mode():
        machine = Machine(runner.plan.program, torch.float32, torch.device("cuda"), 16)
        machine.arrays["x"].copy_(torch.randn(machine.arrays["x"].shape))
        machine.run()
        replayed = machine.arrays["hessian"].clone()
        machine.arrays["hessian"].zero_()
        assert machine._graph is not None
        machine._graph = None
        machine.run()
    assert torch.equal(machine.arrays["hessian"], replayed)
    assert float(replayed.abs().max()) > 0


@on_gpu
def test_on_a_gpu_buffers_are_pinned_and_results_are_whole_on_return():
    evaluate = Evaluator(network(64, 16, 1), "cuda")
    x = torch.randn(20 * evaluate.ladder[-1] + 1, 64)
    there = evaluate(x.cuda(), ("value", "hessian")).hessian.cpu()
    for _ in range(3):
        assert torch.equal(evaluate(x, ("value", "hessian")).hessian, there)
    lanes = [
        lane
        for lanes in evaluate._runner(evaluate._ask(("value", "hessian"), None, None))._idle.values()
        for lane in lanes
    ]
    assert any(lane._buffers for lane in lanes)
    assert all(buffer.is_pinned() for lane in lanes for buffer in lane._buffers.values())


@on_gpu
def test_on_a_gpu_products_are_of_full_precision_whatever_is_set():
    net = network(64, 512, 1)
    x = torch.randn(64, 64)
    wanted = Evaluator(net, dtype=torch.float64)(x, ("hessian",)).hessian
    chosen = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        got = Evaluator(net, "cuda")(x, ("hessian",)).hessian
    finally:
        torch.backends.cuda.matmul.fp32_precision = chosen
    assert float((got - wanted).abs().max()) <= TOLERANCE[torch.float32] / 20 * float(wanted.abs().max())


@on_gpu
def test_on_a_full_gpu_tiles_are_halved():
    evaluate = Evaluator(network(256, 16, 1), "cuda")
    x = torch.randn(512, 256, device="cuda")
    wanted = evaluate(x, ("hessian",)).hessian.cpu()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(runners, "Machine", full_above(16))
    try:
        starved = Evaluator(network(256, 16, 1), "cuda")
        got = starved(x, ("hessian",)).hessian.cpu()
    finally:
        monkey.undo()
    assert float((got - wanted).abs().max()) <= TOLERANCE[torch.float32] * float(wanted.abs().max())


@on_gpu
def test_on_a_gpu_threads_may_share_it():
    assert_threads_agree(Evaluator(network(), "cuda"), 500)
