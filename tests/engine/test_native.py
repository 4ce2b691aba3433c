"""The CPU kernel on every kind of vector, and how it treats the smallest numbers."""

from dataclasses import replace

import pytest
import torch

from hessquik import Evaluator, native
from hessquik.native import Native, Packed
from tests.engine.test_evaluator import DTYPES, NETWORKS, TOLERANCE

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no kernel was built")
QUANTITIES = ("value", "gradient", "hessian", "laplacian")


@pytest.mark.parametrize("vector_bytes", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_narrower_vectors_give_the_same_numbers(name, dtype, vector_bytes):
    if vector_bytes > native.vector_bytes():
        pytest.skip("this processor has no such vectors")
    torch.manual_seed(0)
    network = NETWORKS[name]()
    evaluate = Evaluator(network, dtype=dtype)
    plan = evaluate.plan(QUANTITIES)
    x = torch.randn(7, evaluate.d, dtype=dtype)
    widest = evaluate(x, QUANTITIES)
    results = {name: torch.full_like(getattr(widest, name), float("nan")) for name in QUANTITIES}
    Native(plan.program, dtype, 3, Packed(), vector_bytes).run({"x": x, **results}, 7)
    for quantity, got in results.items():
        expected = getattr(widest, quantity)
        assert float((got - expected).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_done_at_once_gives_the_bits_of_one_after_the_other(name, dtype, vector_bytes):
    if vector_bytes > native.vector_bytes():
        pytest.skip("this processor has no such vectors")
    torch.manual_seed(0)
    evaluate = Evaluator(NETWORKS[name](), dtype=dtype)
    d, n = evaluate.d, 11
    inputs = {"x": torch.randn(n, d, dtype=dtype), "directions": torch.randn(3, d, dtype=dtype)}
    for quantities in (("value", "gradient", "hessian"), ("laplacian",), ("jvp",), ("hvp", "curvature")):
        plan = evaluate.plan(quantities, None, inputs["directions"])
        apart = [replace(step, follows=False, is_read=True) for step in plan.program.steps]
        found = []
        for program in (plan.program, replace(plan.program, steps=tuple(apart))):
            results = {name: torch.full((n, *plan.shapes[name]), float("nan"), dtype=dtype) for name in quantities}
            Native(program, dtype, 4, Packed(), vector_bytes).run({**inputs, **results}, n)
            found.append(results)
        for quantity, got in found[0].items():
            assert torch.equal(got, found[1][quantity]), quantity
            assert got.isfinite().all()


def test_rows_beside_the_wanted_ones_are_left_alone():
    evaluate = Evaluator(NETWORKS["residual"]())
    plan = evaluate.plan(("value", "hessian"))
    x = torch.randn(9, 4)
    results = {"value": torch.full((9, 3), 7.0), "hessian": torch.full((9, 4, 4, 3), 7.0)}
    Native(plan.program, torch.float32, 2, Packed()).run({"x": x, **results}, 4, 3)
    whole = evaluate(x, ("value", "hessian"))
    for name, got in results.items():
        assert torch.equal(got[3:7], getattr(whole, name)[3:7])
        assert (got[[0, 1, 2, 7, 8]] == 7.0).all()


def test_the_smallest_numbers_count_as_zero_whatever_the_thread_is_set_to():
    evaluate = Evaluator(NETWORKS["residual"]())
    tiny, zero = torch.full((1, 4), 1e-40), torch.zeros(1, 4)
    expected = evaluate(zero, ("value", "hessian"))
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            out = evaluate(tiny, ("value", "hessian"))
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(out.value, expected.value)
        assert torch.equal(out.hessian, expected.hessian)
    assert float(torch.full((1,), 1e-40) * 0.5) > 0, "the thread's own setting is as it was"


def test_a_kernel_of_other_sources_is_not_used(monkeypatch):
    """It would compute other numbers without a word."""
    assert native._library() is not None
    monkeypatch.setattr(native, "_REVISION", 0)
    with pytest.warns(RuntimeWarning, match="expected a CPU kernel of revision 0, got 3"):
        assert native._library() is None
