"""The Evaluator gives what the network gives, for any number of rows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hessquik import Evaluator
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import softplusActivation, tanhActivation
from hessquik.calculus import QUANTITIES
from hessquik.errors import ShapeError
from tests import oracle
from tests.engine.random_networks import tame
from tests.engine.test_calculus import expected_quantities, randn

TOLERANCE = 1e-10  # rounding in float64
T = tanhActivation()
NETWORKS = {
    "resnet": lambda: net.NN(lay.singleLayer(4, 6, T), net.resnetNN(6, 2, 0.5, T), lay.singleLayer(6, 3)),
    "convex": lambda: net.NN(net.ICNN(4, [None, 5, 7], softplusActivation()), lay.quadraticICNNLayer(4, 7, 2)),
    "convex open": lambda: net.ICNN(4, [None, 5, 7]),
    "linear": lambda: net.NN(lay.singleLayer(4, 3)),
}


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 300])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_quantities_for_any_number_of_rows(name, n):
    f = tame(NETWORKS[name](), 0)
    x, v, weights = randn(n, 4, seed=0), randn(n, 2, 4, seed=1), randn(n, f.dim_output(), seed=2)
    parts = oracle.derivatives(f, x, f.dim_output())
    found = Evaluator(f)(x, QUANTITIES, weights=weights, directions=v)
    for quantity, expected in expected_quantities(*parts, weights, v).items():
        assert oracle.difference(getattr(found, quantity), expected) <= TOLERANCE, quantity
    found = Evaluator(f)(x, QUANTITIES, directions=v[0] if n else randn(2, 4, seed=1))
    for quantity in ("value", "gradient", "hessian"):
        expected = dict(zip(("value", "gradient", "hessian"), parts, strict=True))[quantity]
        assert oracle.difference(getattr(found, quantity), expected) <= TOLERANCE


def test_what_was_not_asked_for_is_none():
    found = Evaluator(NETWORKS["resnet"]())(torch.zeros(2, 4), ("gradient",))
    assert [name for name in QUANTITIES if getattr(found, name) is not None] == ["gradient"]


def test_the_weights_are_those_of_when_it_was_made():
    f = NETWORKS["resnet"]()
    evaluate, x = Evaluator(f), torch.ones(2, 4)
    before = evaluate(x).value
    with torch.no_grad():
        for parameter in f.parameters():
            parameter.zero_()
    assert torch.equal(evaluate(x).value, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_dtype_is_the_one_asked_for(dtype):
    evaluate = Evaluator(NETWORKS["resnet"](), dtype=dtype)
    for given in (torch.float32, torch.float64):
        assert evaluate(torch.ones(2, 4, dtype=given), ("hessian",)).hessian.dtype is dtype


def test_threads_may_share_it():
    evaluate = Evaluator(tame(NETWORKS["convex"](), 0))
    points = [randn(n, 4, seed=n) for n in (1, 9, 33, 70)]
    alone = [evaluate(x, ("hessian",)).hessian for x in points]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            found = threads.map(lambda x: evaluate(x, ("hessian",)).hessian, points)
            assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"expected points of shape \(n, 4\), got \(2, 3\)"),
        ({"x": torch.zeros(4)}, r"got \(4,\)"),
        ({"quantities": ("jacobian",)}, "expected quantities out of value, gradient"),
        ({"quantities": ()}, "expected quantities"),
        ({"weights": torch.zeros(2)}, r"weights of shape \(3,\) or \(2, 3\), got \(2,\)"),
        ({"quantities": ("hvp",)}, r"directions of shape \(k, 4\) or \(2, k, 4\), got none"),
        ({"quantities": ("hvp",), "directions": torch.zeros(3, 1, 4)}, r"got \(3, 1, 4\)"),
    ],
    ids=["width", "axes", "unknown", "nothing", "weights", "no directions", "directions"],
)
def test_what_does_not_fit_is_refused(arguments, message):
    evaluate = Evaluator(NETWORKS["resnet"]())
    with pytest.raises(ShapeError, match=message):
        evaluate(**{"x": torch.zeros(2, 4), **arguments})
