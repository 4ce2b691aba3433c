"""Memory of large results is reused, but never while a result is alive; a call's other memory is bounded."""

import gc
import subprocess
import sys

import pytest
import torch

from hessquik import Evaluator, backends, memory
from hessquik.activations import tanhActivation
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN
from tests.whole import choose

CPU = torch.device("cpu")
#: 8 MiB, which is large.
SHAPE = (2, 1024, 1024)
ACT = tanhActivation()


def large(value):
    return memory.empty(SHAPE, torch.float32, CPU).fill_(value)


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory._cache.clear()


def test_free_memory_is_used_again():
    place = large(1.0).data_ptr()
    assert large(2.0).data_ptr() == place


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda array: array[1, 5:7], id="view"),
        pytest.param(lambda array: array.numpy()[0, 0], id="numpy"),
        pytest.param(lambda array: memoryview(array.view(-1).numpy())[5:9], id="buffer"),
    ],
)
def test_memory_of_which_somebody_holds_a_part_is_left_alone(part):
    array = large(3.0)
    place = array.data_ptr()
    held = part(array)
    del array
    other = large(4.0)
    assert other.data_ptr() != place
    assert (torch.tensor(held.tolist()) == 3.0).all()
    del held, other
    assert memory._cache


def test_what_is_kept_is_bounded_and_makes_room_for_another_size():
    arrays = [large(float(i)) for i in range(12)]
    del arrays
    assert 0 < sum(map(len, memory._cache)) <= memory.CACHE_BYTES
    memory.empty((3, *SHAPE), torch.float32, CPU)
    assert len(memory._cache) == 1


def test_an_arena_gives_every_array_its_own_place():
    arena = memory.Arena()
    arrays = [arena.empty((300 + i, 100), dtype) for i in range(40) for dtype in (torch.float32, torch.float64)]
    for i, array in enumerate(arrays):
        array.fill_(i)
    assert all((array == i).all() for i, array in enumerate(arrays))
    assert all(array.data_ptr() % 64 == 0 for array in arrays)


def test_results_of_one_call_are_not_those_of_the_next():
    evaluate = Evaluator(NN(singleLayer(64, 8, ACT), resnetLayer(8, 0.5, ACT), singleLayer(8, 1)))
    x = torch.randn(600, 64)
    first = evaluate(x, ("hessian",)).hessian
    kept = first.clone()
    for _ in range(3):
        evaluate(x + 1.0, ("hessian",))
    assert torch.equal(first, kept)


PEAK = """
import torch
from hessquik import Evaluator
from hessquik.activations import tanhActivation
from hessquik.layers import resnetLayer, singleLayer
from hessquik.networks import NN
from tests.whole import choose

ACT = tanhActivation()
network = NN(singleLayer(10, 256, ACT), *(resnetLayer(256, 0.5, ACT) for _ in range(6)), singleLayer(256, 1))
evaluate = Evaluator(network, backend={backend!r})
def peak():  # of this program; getrusage's would begin with that of the process which started it
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
def run(n):
    x = torch.randn(n, 10)
    {call}
run(8)
before = peak()
run({n})
# Inputs and results: x, value, gradient, Hessian.
print((peak() - before) / 1024 - {n} * 4 * (10 + 1 + 10 + 100) / 2**20)
"""
OURS = "evaluate(x, ('value', 'gradient', 'hessian'))"
UNTILED = "network(x, do_gradient=True, do_Hessian=True)"


def test_a_system_without_huge_pages_has_large_arrays_too(monkeypatch):
    class Refusing(memory.mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    array = memory.empty((memory.LARGE_BYTES,), torch.float32, torch.device("cpu")).fill_(3.0)
    assert float(array.mean()) == 3.0


def mebibytes_beyond_inputs_and_results(n, call, backend):
    run = subprocess.run(
        [sys.executable, "-c", PEAK.format(n=n, call=call, backend=backend)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc: run on Linux")
@pytest.mark.parametrize("backend", backends.names())
@pytest.mark.parametrize("n", choose([2048], [2048, 16384]))
def test_memory_beyond_inputs_and_results_does_not_grow_with_the_rows(n, backend):
    assert mebibytes_beyond_inputs_and_results(n, OURS, backend) <= 64


@pytest.mark.whole
def test_the_measurement_of_memory_sees_what_is_not_bounded():
    assert mebibytes_beyond_inputs_and_results(2048, UNTILED, backends.names()[0]) > 100
