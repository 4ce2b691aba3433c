"""An activation, a layer and a quantity from a user's own file, without touching the package, on all backends."""

import pytest
import torch

from hessquik import Evaluator, networks
from hessquik.activations import tanhActivation
from hessquik.errors import DerivativeError, ShapeError
from hessquik.layers import singleLayer
from hessquik.layers.base import hessQuikLayer
from hessquik.layers.form import Form
from hessquik.networks import NN, fullyConnectedNN
from hessquik.proof import backends, prove, prove_quickly
from tests.engine.extensions import mishActivation


class bottleneckLayer(hessQuikLayer):
    """y = u + σ(uK) M."""

    def __init__(self, width, rank, act):
        super().__init__()
        self.width, self.act = width, act
        self.K = torch.nn.Parameter(torch.randn(width, rank) / width)
        self.M = torch.nn.Parameter(torch.randn(rank, width) / rank)

    def form(self):
        return Form(self.act, (self.width,), into=(self.K,), skip=(1.0,), out=self.M)

    def input_widths(self):
        return (self.width,)

    output_widths = input_widths


def network():
    torch.manual_seed(0)
    return networks.NN(
        singleLayer(3, 6, mishActivation()), bottleneckLayer(6, 4, tanhActivation()), singleLayer(6, 2)
    ).double()


@pytest.mark.slow
def test_a_users_activation_and_layer_are_proven_on_every_backend():
    rows = prove(network())
    assert [row for row in rows if not row.passed] == []
    assert {row.computed_by.split(",")[0] for row in rows} >= set(backends())
    assert {row.reference for row in rows if "float64" in row.computed_by} == {
        "autograd of the own forward of bottleneckLayer, mishActivation",
        "the same rows alone",
    }


@pytest.mark.parametrize("backend", backends())
def test_a_users_activation_runs_in_the_backend_that_was_asked_for(backend):
    """No backend falls back to another one because of a user's activation."""
    evaluate = Evaluator(network(), backend=backend)
    assert evaluate.backend == backend
    x = torch.randn(40, 3, dtype=torch.float64)
    expected = network()(x, do_gradient=True, do_Hessian=True)
    found = evaluate(x, ("value", "gradient", "hessian"))
    for got, right in zip((found.value, found.gradient, found.hessian), expected, strict=True):
        torch.testing.assert_close(got, right.detach(), rtol=1e-12, atol=1e-12)


@pytest.fixture
def squared_slope(registered):
    """Register the quantity ‖∇f‖² of every output."""
    registered("squared_slope", "m", 1, lambda at: (at.gradient * at.gradient).sum(-2, keepdim=True))


@pytest.mark.usefixtures("squared_slope")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_users_quantity_on_every_backend(backend, dtype):
    evaluate = Evaluator(network(), dtype=dtype, backend=backend)
    x = torch.randn(40, 3, dtype=dtype)
    found = evaluate(x, ("squared_slope", "gradient"))
    expected = network()(x.double(), do_gradient=True)[1].square().sum(1).detach()
    assert found.squared_slope.shape == (40, 2)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.squared_slope.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_users_quantities_are_proven_on_every_backend(registered):
    """The quantities are of first and second order, and one is along directions."""
    registered("squared_slope", "m", 1, lambda at: (at.gradient * at.gradient).sum(-2, keepdim=True))
    registered("trace", "m", 2, lambda at: at.hessian_diagonal.sum(-2, keepdim=True))
    registered("twice_bent", "km", 2, lambda at: 2.0 * at.curvature)
    f = NN(singleLayer(3, 6, tanhActivation()), singleLayer(6, 2)).double()
    rows = [row for row in prove(f) if row.reference == "its formula on autograd"]
    assert all(row.passed for row in rows)
    assert {(row.quantity, row.computed_by) for row in rows} == {
        (name, f"{backend}, {dtype}")
        for name in ("squared_slope", "trace", "twice_bent")
        for backend in backends()
        for dtype in ("float32", "float64")
    }


@pytest.mark.usefixtures("squared_slope")
def test_a_users_quantity_that_a_backend_computes_wrongly_is_refused(monkeypatch):
    right = Evaluator.__call__

    def wrong(self, *arguments, **keywords):
        found = right(self, *arguments, **keywords)
        if found.squared_slope is not None:
            found.squared_slope.mul_(1.001)
        return found

    prove_quickly(network())
    monkeypatch.setattr(Evaluator, "__call__", wrong)
    with pytest.raises(DerivativeError, match="squared_slope"):
        prove_quickly(network())


def test_a_formula_that_only_the_calculus_can_compute_has_no_independent_reference(registered):
    """The formula reads attributes that the automatic differentiation does not have."""
    registered("curved", "m", 2, lambda at: at.laplacian * at._question.x.shape[-1])
    f = NN(singleLayer(3, 6, tanhActivation()), singleLayer(6, 2)).double()
    assert {row.reference for row in prove(f) if row.quantity == "curved"} == {
        "its formula on the layers' forms, which is no independent reference"
    }


def test_a_formula_of_another_shape_than_its_axes_is_refused(registered):
    registered("squeezed", "dm", 1, lambda at: at.value)
    with pytest.raises(ShapeError, match=r"squeezed must give one array of shape \(3, 2\) per point.*got \(1, 2\)"):
        Evaluator(network())(torch.zeros(2, 3).double(), ("squeezed",))


@pytest.mark.slow
def test_second_derivatives_in_every_mode_are_what_a_users_formula_reads(registered):
    """Forward mode propagates all pairs of tangents that a formula may read."""
    registered("mean_curvature", "m", 2, lambda at: at.laplacian - at.hessian_diagonal.sum(-2, keepdim=True) / 2)
    registered("along_and_across", "km", 2, lambda at: at.curvature + at.laplacian)
    f = fullyConnectedNN([2, 4, 30], tanhActivation(), dtype=torch.float64)
    assert Evaluator(f).plan(("mean_curvature",)).mode == "forward"
    rows = [row for row in prove(f) if row.quantity in {"mean_curvature", "along_and_across"}]
    assert rows
    assert all(row.passed for row in rows)
