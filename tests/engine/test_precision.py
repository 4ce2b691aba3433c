"""Float64 results have float64 accuracy, also if the weights are stored in float32."""

import pytest
import torch

from hessquik import Evaluator, networks
from hessquik import layers as lay
from hessquik.activations import sinActivation
from hessquik.layers.base import hessQuikLayer
from hessquik.layers.form import Form
from hessquik.proof import backends
from tests import oracle

CONVEX = {
    "ICNN": lambda: networks.ICNN(4, [None, 12, 9, 2]),
    "quadratic head": lambda: networks.NN(networks.ICNN(4, [None, 12]), lay.quadraticICNNLayer(4, 12, 3)),
    "nested": lambda: networks.NN(lay.singleLayer(4, 5), networks.NN(networks.ICNN(5, [None, 7, 3]))),
}


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", CONVEX)
def test_a_float32_convex_network_in_float64(name, backend):
    """softplus(L) is computed in float64; in float32 it would be off by 1e-8."""
    torch.manual_seed(0)
    f = CONVEX[name]()
    x = torch.randn(20, 4, dtype=torch.float64)
    found = Evaluator(f, dtype=torch.float64, **backends()[backend])(x, ("value", "gradient", "hessian"))
    expected = oracle.derivatives(f.double(), x, f.dim_output())
    for got, right in zip((found.value, found.gradient, found.hessian), expected, strict=True):
        assert oracle.difference(got, right) <= 1e-15 * (1 + right.abs().max())


def test_the_network_keeps_its_dtype():
    f = CONVEX["ICNN"]()
    Evaluator(f, dtype=torch.float64)
    assert {parameter.dtype for parameter in f.parameters()} == {torch.float32}


class waveLayer(hessQuikLayer):
    """The layer y = u + sin(2u), which has no weights."""

    def form(self):
        return Form(sinActivation(), (3,), into=(2.0,), skip=(1.0,))

    def input_widths(self):
        return (3,)

    output_widths = input_widths


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
def test_a_network_without_weights(dtype):
    f = networks.NN(waveLayer(), waveLayer())
    evaluate = Evaluator(f, dtype=dtype)
    assert evaluate.dtype is (dtype or torch.get_default_dtype())
    x = torch.randn(5, 3, dtype=evaluate.dtype)
    found = evaluate(x, ("value", "gradient", "hessian"))
    for got, right in zip((found.value, found.gradient, found.hessian), f(x, True, True), strict=True):
        torch.testing.assert_close(got, right)
