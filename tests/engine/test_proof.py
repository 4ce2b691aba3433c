"""The proof of a network's derivatives passes what is right and refuses every wrong quantity."""

import random

import pytest
import torch

from hessquik import calculus, load, proof
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import softplusActivation, tanhActivation
from hessquik.errors import DerivativeError
from hessquik.layers.form import Linearization
from hessquik.proof import Row, prove, prove_quickly
from tests.engine import random_networks as draws
from tests.test_layering import ROOT

QUANTITIES = tuple(name for name in calculus.QUANTITIES if name != "value")


def network():
    torch.manual_seed(0)
    return net.NN(lay.singleLayer(4, 6, tanhActivation()), net.resnetNN(6, 2, 0.5), lay.singleLayer(6, 3))


def failed(rows):
    return {(row.quantity, row.reference) for row in rows if not row.passed}


@pytest.mark.parametrize("part", range(2))
def test_right_networks_pass(part):
    for seed in range(part, 24, 2):
        draw = random.Random(seed)
        f = draws.tame(draws.network(draw, *draws.shapes()[seed % 16]), seed, scale=0.3)
        assert failed(prove(f, seed=seed)) == set(), seed
        prove_quickly(f)


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("**/*.safetensors")), ids=lambda path: path.stem)
def test_shipped_models_pass(path):
    assert failed(prove(load(path))) == set()


def test_bounds_say_where_points_and_steps_are():
    """A network for inputs of about 10⁶ is bent there and nowhere near 0; with its bounds it passes all the same."""
    f = net.fullyConnectedNN([2, 8, 1], tanhActivation(), dtype=torch.float64)
    with torch.no_grad():
        f[0].K.div_(1e6)
    rows = prove(f, [1e6, -3e6], [5e6, 2e6])
    assert failed(rows) == set()
    prove_quickly(f, [1e6, -3e6], [5e6, 2e6])


def test_the_network_is_left_as_it_was():
    f = network()
    before = {name: tensor.clone() for name, tensor in f.state_dict().items()}
    prove(f)
    assert all(torch.equal(tensor, before[name]) for name, tensor in f.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in f.parameters())
    assert all(parameter.dtype is torch.float32 for parameter in f.parameters())


def test_the_rows_are_the_same_every_time():
    f = network()
    assert prove(f) == prove(f)
    assert prove(f) != prove(f, seed=1)


def test_networks_in_inference_mode_are_proven_too():
    with torch.inference_mode():
        prove_quickly(network())


@pytest.mark.parametrize(
    "change", [lambda t: 1.0001 * t, lambda t: -t, lambda t: t * torch.nan], ids=["off", "negative", "nan"]
)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_each_wrong_quantity_is_refused(quantity, change, monkeypatch):
    right = calculus.evaluate

    def wrong(*arguments, **keywords):
        found = right(*arguments, **keywords)
        changed = {name: getattr(found, name) for name in calculus.QUANTITIES}
        if changed[quantity] is not None:
            changed[quantity] = change(changed[quantity])
        return calculus.Derivatives(**changed)

    monkeypatch.setattr(proof.calculus, "evaluate", wrong)
    f = network()
    assert quantity in {name for name, _ in failed(prove(f))}
    with pytest.raises(DerivativeError, match=rf"{quantity} \(relative error"):
        prove_quickly(f)


class wrongSlope(tanhActivation):
    def compute_derivatives(self, *args, do_Hessian=False):
        dsigma, d2sigma = super().compute_derivatives(*args, do_Hessian=do_Hessian)
        return 1.001 * dsigma, d2sigma


class wrongCurvature(tanhActivation):
    def compute_derivatives(self, *args, do_Hessian=False):
        dsigma, d2sigma = super().compute_derivatives(*args, do_Hessian=do_Hessian)
        return dsigma, None if d2sigma is None else 1.001 * d2sigma


@pytest.mark.parametrize(
    ("act", "first_order_too"), [(wrongSlope, True), (wrongCurvature, False)], ids=["slope", "curvature"]
)
def test_a_wrong_activation_is_refused_by_every_reference(act, first_order_too):
    f = net.fullyConnectedNN([3, 6, 2], act(), dtype=torch.float64)
    torch.manual_seed(0)
    rows = failed(prove(f))
    assert ("hessian", "autograd") in rows
    assert ("hessian", "Taylor, forward mode") in rows
    assert ("hessian", "Taylor, backward mode") in rows
    assert ("curvature", "finite differences") in rows
    assert (("gradient", "autograd") in rows) is first_order_too
    assert (("jvp", "finite differences") in rows) is first_order_too
    with pytest.raises(DerivativeError, match=r"within 1e-08 of automatic differentiation, got .*hessian"):
        prove_quickly(f)


def test_a_layer_that_carries_derivatives_wrongly_is_refused(monkeypatch):
    right = Linearization.push

    def push(self, du):
        dz, dy = right(self, du)
        return 1.01 * dz, dy

    monkeypatch.setattr(Linearization, "push", push)
    with pytest.raises(DerivativeError):
        prove_quickly(network())


def test_what_is_not_finite_is_refused():
    f = net.fullyConnectedNN([2, 4, 1], softplusActivation(), dtype=torch.float64)
    with torch.no_grad():
        f[1].K.fill_(1e300)
        f[0].K.fill_(1e300)
    with pytest.raises(DerivativeError, match="nan"):
        prove_quickly(f)


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (Row("gradient", "autograd", "relative error", 1e-9, 1e-8), True),
        (Row("gradient", "autograd", "relative error", 1e-7, 1e-8), False),
        (Row("gradient", "autograd", "relative error", float("nan"), 1e-8), False),
        (Row("gradient", "Taylor", "order", 2.0, 1.9), True),
        (Row("gradient", "Taylor", "order", 1.0, 1.9), False),
        (Row("gradient", "Taylor", "order", float("nan"), 1.9), False),
    ],
)
def test_rows_judge_by_their_measure(row, passed):
    assert row.passed is passed
