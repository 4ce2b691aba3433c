"""Calls of one tile, which one call of the kernel checks, gives new results and computes."""

import ctypes
import gc
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from hessquik import Evaluator, ShapeError, evaluator, memory
from hessquik.backends import cpu
from hessquik.networks import fullyConnectedNN

pytestmark = pytest.mark.skipif(
    not cpu.is_available(), reason="needs the CPU kernel: install where there is a C compiler"
)
ALL = ("value", "gradient", "hessian")


def small_evaluator(dtype=torch.float32):
    return Evaluator(fullyConnectedNN([3, 9, 2]), dtype=dtype)


def places(evaluate, n, quantities, m=2):
    """Return arrays to write results to, which the general way fills."""
    shapes = {"value": (m,), "gradient": (3, m), "hessian": (3, 3, m), "hvp": (4, 3, m)}
    return {name: torch.full((n, *shapes[name]), torch.nan, dtype=evaluate.dtype) for name in quantities}


class Counts:
    """Counts the calls that an evaluator's bound functions took and refused."""

    def __init__(self, evaluate):
        self.taken = self.refused = 0
        for key, (runner, bound) in evaluate._known.items():
            evaluate._known[key] = runner, self.counted(bound)

    def counted(self, bound):
        def call(*arguments):
            found = bound(*arguments)
            self.taken += found is not None
            self.refused += found is None
            return found

        return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("weights", [None, "shared", "each"])
@pytest.mark.parametrize("directions", [None, "shared", "each"])
def test_results_are_those_of_the_general_way_to_the_bit(dtype, n, weights, directions):
    evaluate = small_evaluator(dtype)
    x = torch.randn(n, 3, dtype=dtype)
    w = {None: None, "shared": torch.randn(2, dtype=dtype), "each": torch.randn(n, 2, dtype=dtype)}[weights]
    v = {None: None, "shared": torch.randn(4, 3, dtype=dtype), "each": torch.randn(n, 4, 3, dtype=dtype)}[directions]
    quantities = ALL if v is None else ("hvp", "value")
    evaluate(x, quantities, w, v)
    counts = Counts(evaluate)
    found = evaluate(x, quantities, w, v)
    assert (counts.taken, counts.refused) == (1, 0)
    out = places(evaluate, n, quantities, 2 if w is None else 1)
    evaluate(x, quantities, w, v, out=out)
    for name, place in out.items():
        result = getattr(found, name)
        assert torch.equal(result, place)
        assert (result.dtype, result.shape, result.stride()) == (dtype, place.shape, place.stride())
        assert not result.requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: torch._neg_view(-x),
        torch.nn.Parameter,
        lambda x: torch.stack([x, x], -1)[..., 0],
    ],
    ids=["float64", "columns first", "lazily negated", "parameter", "strided"],
)
def test_other_tensors_take_the_general_way(change):
    evaluate = small_evaluator()
    x = torch.randn(5, 3)
    wanted = evaluate(x, ALL)
    counts = Counts(evaluate)
    found = evaluate(change(x), ALL)
    assert (counts.taken, counts.refused) == (0, 1)
    assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in ALL)


def test_a_negated_number_that_looks_dense_is_not_mistaken():
    evaluate = Evaluator(fullyConnectedNN([1, 4, 1]), dtype=torch.float32)
    x = torch.tensor(1 + 2j, dtype=torch.complex64).conj().imag.view(1, 1)
    assert x.is_neg()
    assert torch.equal(evaluate(x).value, evaluate(torch.tensor([[-2.0]])).value)
    assert torch.equal(evaluate(x).value, evaluate(torch.tensor([[-2.0]])).value)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 2, 3)])
def test_points_of_another_shape_are_refused_by_name(shape):
    evaluate = small_evaluator()
    evaluate(torch.zeros(1, 3), ALL)
    with pytest.raises(ShapeError, match=r"expected points of shape \(n, 3\)"):
        evaluate(torch.zeros(shape), ALL)


def test_weights_and_directions_of_another_number_of_rows_are_refused():
    evaluate = small_evaluator()
    x, w, v = torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 4, 3)
    evaluate(x, ("hvp",), w, v)
    with pytest.raises(ShapeError, match="weights"):
        evaluate(x, ("hvp",), torch.zeros(3, 2), v)
    with pytest.raises(ShapeError, match="directions"):
        evaluate(x, ("hvp",), w, torch.zeros(3, 4, 3))
    with pytest.raises(ShapeError, match="directions"):
        evaluate(x, ("value",), None, torch.zeros(4, 2))
    evaluate(x, ("value",), None, torch.zeros(4, 3))
    with pytest.raises(ShapeError, match="directions"):
        evaluate(x, ("value",), None, torch.zeros(4, 2))


def test_results_of_several_tiles_or_many_bytes_take_the_general_way(monkeypatch):
    evaluate = small_evaluator()
    evaluate(torch.zeros(1, 3), ALL)
    rows = evaluate.tile_rows[-1]
    counts = Counts(evaluate)
    evaluate(torch.zeros(rows, 3), ALL)
    evaluate(torch.zeros(rows + 1, 3), ALL)
    assert (counts.taken, counts.refused) == (1, 1)
    monkeypatch.setattr(memory, "LARGE_BYTES", 4 * 26 * 8)  # 26 numbers a row: eight rows are large
    evaluate = small_evaluator()
    evaluate(torch.zeros(1, 3), ALL)
    counts = Counts(evaluate)
    evaluate(torch.zeros(7, 3), ALL)
    evaluate(torch.zeros(8, 3), ALL)
    assert (counts.taken, counts.refused) == (1, 1)


def test_the_order_asked_for_is_that_of_the_results():
    evaluate = small_evaluator()
    for quantities in (ALL, ALL[::-1], (*ALL, "value")):
        for _ in range(2):
            found = evaluate(torch.zeros(2, 3), list(quantities))
            assert list(found._found) == list(dict.fromkeys(quantities))


def test_each_result_has_its_own_memory_that_outlives_the_evaluator():
    evaluate = small_evaluator(torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    evaluate(x, ALL)
    found = evaluate(x, ALL)
    wanted = {name: getattr(found, name).clone() for name in ALL}
    kept = {name: getattr(found, name) for name in ALL}
    assert kept["value"].untyped_storage().nbytes() == kept["value"].nbytes
    assert all(array.data_ptr() % 64 == 0 for array in kept.values())
    kept["value"].fill_(7.0)
    assert torch.equal(kept["gradient"], wanted["gradient"])
    bound = next(bound for key, (_, bound) in evaluate._known.items() if key == ALL)
    del evaluate, found
    gc.collect()
    again = bound(x, None, None)
    assert all(torch.equal(again[name], wanted[name]) for name in ALL)
    del bound
    gc.collect()
    assert torch.equal(kept["hessian"], wanted["hessian"])
    kept["hessian"].share_memory_().requires_grad_()
    (kept["hessian"] * 2).sum().backward()


def test_threads_share_a_bound_call():
    evaluate = small_evaluator()
    points = torch.randn(64, 3)
    wanted = evaluate(points, ALL).hessian

    def agrees(first):
        rows = [slice(i % 64, i % 64 + 1) for i in range(first, first + 400)]
        return all(torch.equal(evaluate(points[row], ALL).hessian, wanted[row]) for row in rows)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(agrees, range(4)))


def test_memory_of_results_is_freed():
    evaluate = Evaluator(fullyConnectedNN([32, 8, 32]))
    x = torch.randn(4, 32)
    for _ in range(20):
        evaluate(x, ("hessian",))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):  # a gigabyte of results
        evaluate(x, ("hessian",))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_torch_without_the_functions_is_served_the_general_way(monkeypatch):
    class OtherTensor:
        """Has no functions of DLPack."""

    x = torch.randn(2, 3)
    evaluate = small_evaluator()
    wanted = evaluate(x, ALL)
    monkeypatch.setattr(cpu, "Tensor", OtherTensor)
    evaluate._known.clear()
    evaluate(x, ALL)
    counts = Counts(evaluate)
    found = evaluate(x, ALL)
    assert (counts.taken, counts.refused) == (0, 1)
    assert torch.equal(found.hessian, wanted.hessian)


def test_the_first_call_takes_the_same_way(monkeypatch):
    taken = []
    bind = cpu.CpuProgram.bind

    def counting(self, *arguments):
        bound = bind(self, *arguments)
        return lambda *tensors: taken.append(bound(*tensors)) or taken[-1]

    monkeypatch.setattr(cpu.CpuProgram, "bind", counting)
    found = small_evaluator()(torch.zeros(1, 3), ALL)
    assert len(taken) == 1
    assert taken[0]["hessian"] is found.hessian


class Failing(ctypes.Structure):
    """Functions of DLPack of which the import fails, after it has freed the memory or before."""

    IMPORT = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("before", ctypes.c_void_p * 3),
        ("import_tensor", IMPORT),
        ("describe", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )

    def __init__(self, frees):
        def import_tensor(managed, out):
            deleter = ctypes.c_void_p.from_address(managed + 16).value
            if frees:
                ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(deleter)(managed)
            return -1

        super().__init__((1, 0), (0, 0, 0), Failing.IMPORT(import_tensor), 1)


def capsule_of(functions):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(functions), NAME, None)


NAME = b"dlpack_exchange_api"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc: run on Linux")
@pytest.mark.parametrize("frees", [False, True])
def test_results_that_torch_does_not_take_are_freed_once(frees):
    functions = Failing(frees)
    tensor = type("OtherTensor", (), {"__dlpack_c_exchange_api__": capsule_of(functions)})
    program = small_evaluator()._runner(evaluator._SECOND_ORDER).run.__self__
    results = cpu._slots([(-1, (4 << 20,))])
    bound = cpu.KERNEL.bind(program, program._words, program._addresses, tensor, 1, b"", ("value",), results)

    def mapped_bytes():
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    before = mapped_bytes()
    for _ in range(64):  # a gibibyte
        with pytest.raises(SystemError, match="exception"):
            bound()
    assert mapped_bytes() - before < 128 << 20


@pytest.mark.parametrize(
    ("inputs", "names", "results", "error"),
    [
        ([(0, (1,) * 7)], (), [], ValueError),
        ([], ("value",), [(0, (1,) * 7)], ValueError),
        ([(99, (-1, 3))], (), [], ValueError),
        ([(-2, (-1, 3))], (), [], ValueError),
        ([(0, (-1, 3))] * 4, (), [], ValueError),
        ([(0, (-1, 3))], ("value",) * 17, [(1, (-1, 2))] * 17, ValueError),
        ([(0, (-1, 3))], ("value", "value"), [(1, (-1, 2))], ValueError),
        ([(0, (-1, 3))], ["value"], [(1, (-1, 2))], TypeError),
    ],
)
def test_the_kernel_refuses_what_it_could_not_hold(inputs, names, results, error):
    program = small_evaluator()._runner(evaluator._SECOND_ORDER).run.__self__
    bind = partial(cpu.KERNEL.bind, program, program._words, program._addresses, torch.Tensor, 1)
    with pytest.raises(error):
        bind(cpu._slots(inputs), names, cpu._slots(results))


def test_slots_that_are_no_bytes_are_refused():
    program = small_evaluator()._runner(evaluator._SECOND_ORDER).run.__self__
    bind = partial(cpu.KERNEL.bind, program, program._words, program._addresses, torch.Tensor, 1)
    for inputs, results in ((None, b""), (b"", None)):
        with pytest.raises(TypeError, match="bytes"):
            bind(inputs, (), results)
