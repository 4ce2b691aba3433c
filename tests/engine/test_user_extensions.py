"""An activation, a layer and a quantity from a user's own file, without touching the package, on all backends."""

import pytest
import torch

from hessquik import Evaluator, networks
from hessquik.activations import hessQuikActivationFunction, tanhActivation
from hessquik.layers import singleLayer
from hessquik.layers.base import hessQuikLayer
from hessquik.layers.form import Form
from hessquik.proof import backends, prove
from hessquik.quantities import QUANTITIES, Quantity, register


class mishActivation(hessQuikActivationFunction):
    """σ(x) = x tanh(log(1 + eˣ))."""

    def evaluate(self, x):
        t = torch.tanh(torch.nn.functional.softplus(x))
        return x * t, (x, t)

    def compute_derivatives(self, *args, do_Hessian=False):
        x, t = args
        s = torch.sigmoid(x)
        dt = (1 - t * t) * s
        d2t = dt * (1 - s) - 2 * t * dt * s
        return t + x * dt, 2 * dt + x * d2t if do_Hessian else None


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


def test_a_users_activation_and_layer_are_proven_on_every_backend():
    rows = prove(network())
    assert [row for row in rows if not row.passed] == []
    assert {row.computed_by.split(",")[0] for row in rows} >= set(backends())
    assert {row.reference for row in rows if "float64" in row.computed_by} == {
        "autograd of the own forward of bottleneckLayer, mishActivation"
    }


@pytest.mark.parametrize("backend", backends())
def test_a_users_activation_runs_in_the_backend_that_was_asked_for(backend):
    """No backend hands a user's activation to another one."""
    evaluate = Evaluator(network(), backend=backend)
    assert evaluate.backend == backend
    x = torch.randn(40, 3, dtype=torch.float64)
    expected = network()(x, do_gradient=True, do_Hessian=True)
    found = evaluate(x, ("value", "gradient", "hessian"))
    for got, right in zip((found.value, found.gradient, found.hessian), expected, strict=True):
        torch.testing.assert_close(got, right.detach(), rtol=1e-12, atol=1e-12)


@pytest.fixture
def squared_slope():
    """A quantity: ‖∇f‖² of every output."""
    register(Quantity("squared_slope", "m", 1, lambda at: (at.gradient * at.gradient).sum(-2, keepdim=True)))
    yield
    del QUANTITIES["squared_slope"]


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


@pytest.mark.usefixtures("squared_slope")
def test_a_users_quantity_does_not_disturb_the_proof():
    assert all(row.passed for row in prove(network()))
