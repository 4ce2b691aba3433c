"""Each layer's documented interface, one layer at a time and two by hand."""

import pytest
import torch

from hessquik import layers as lay
from hessquik.activations import identityActivation, quadraticActivation, softplusActivation, tanhActivation
from hessquik.errors import OrderError, ShapeError
from hessquik.layers.base import hessQuikLayer
from hessquik.networks import NN
from tests import oracle
from tests.engine.random_networks import tame

TOLERANCE = 1e-12  # rounding in float64
LAYERS = {
    "single": lambda: lay.singleLayer(4, 7, tanhActivation()),
    "single without bias": lambda: lay.singleLayer(4, 7, tanhActivation(), bias=False),
    "single linear": lambda: lay.singleLayer(4, 3, identityActivation()),
    "single of one": lambda: lay.singleLayer(1, 1, softplusActivation(2.0)),
    "resnet": lambda: lay.resnetLayer(4, 0.25, softplusActivation()),
    "resnet without bias": lambda: lay.resnetLayer(4, 0.25, tanhActivation(), bias=False),
    "ICNN first": lambda: lay.ICNNLayer(4, None, 7),
    "ICNN first of one": lambda: lay.ICNNLayer(1, None, 1),
    "ICNN next": lambda: lay.ICNNLayer(4, 3, 7, tanhActivation()),
    "ICNN without bias": lambda: lay.ICNNLayer(4, 3, 2, quadraticActivation(), bias=False),
    "skip": lambda: lay.skipLayer(4, 6, 3, tanhActivation()),
    "skip without weights beside K": lambda: lay.skipLayer(
        4, 4, 4, tanhActivation(), bias=False, skip="identity", mix=False, offset=False
    ),
    "skip of none": lambda: lay.skipLayer(4, 6, 2, softplusActivation(), skip=None),
    "skip that carries": lambda: lay.skipLayer(5, 6, 3, tanhActivation(), carried=2),
    "skip by the identity that carries": lambda: lay.skipLayer(5, 6, 3, tanhActivation(), skip="identity", carried=2),
    "skip that carries all": lambda: lay.skipLayer(4, 3, 3, tanhActivation(), skip=None, mix=False, carried=4),
    "quadratic": lambda: lay.quadraticLayer(4, 2),
    "quadratic of one": lambda: lay.quadraticLayer(1, 3),
    "quadraticICNN alone": lambda: lay.quadraticICNNLayer(4, None, 2),
    "quadraticICNN": lambda: lay.quadraticICNNLayer(4, 3, 2),
    "quadraticICNN of one": lambda: lay.quadraticICNNLayer(1, None, 2),
}
DIMENSIONS = {
    "ICNN next": (7, 11),
    "quadraticICNN": (7, 1),
    "ICNN first": (4, 11),
    "skip that carries": (5, 5),
    "quadraticICNN alone": (4, 1),
}
SAMPLES = (0, 1, 5)


def case(name, n, seed=0):
    layer = tame(LAYERS[name](), seed)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, layer.dim_input(), dtype=torch.float64, generator=generator)
    return layer, u, oracle.derivatives(layer, u)


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got, expected):
    return oracle.difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("n", SAMPLES)
@pytest.mark.parametrize("name", LAYERS)
def test_value_gradient_and_hessian(name, n, forward_mode):
    layer, u, expected = case(name, n)
    got = layer(u, do_gradient=True, do_Hessian=True, forward_mode=forward_mode)
    assert all(map(close, got, expected))
    assert torch.equal(layer(u)[0], got[0])


@pytest.mark.parametrize("name", LAYERS)
def test_the_two_steps_give_what_the_one_does(name):
    layer, u, expected = case(name, 3)
    value, *none = layer(u, forward_mode=None)
    assert none == [None, None]
    assert close(value, expected[0])
    for _ in range(2):  # the state stays
        assert all(map(close, layer.backward(do_Hessian=True), expected[1:]))
    layer(u + 1)  # and is that of the last forward(…, forward_mode=None)
    assert all(map(close, layer.backward(do_Hessian=True), expected[1:]))


@pytest.mark.parametrize("name", LAYERS)
def test_backward_without_its_forward_is_refused(name):
    layer = LAYERS[name]()
    with pytest.raises(OrderError, match=type(layer).__name__):
        layer.backward()
    layer(torch.zeros(1, layer.dim_input()))
    with pytest.raises(OrderError, match="needs a forward"):
        layer.backward()


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_only_what_was_asked_comes_back(name, forward_mode):
    layer, u, expected = case(name, 3)
    assert layer(u, forward_mode=forward_mode)[1:] == (None, None)
    value, gradient, none = layer(u, do_gradient=True, forward_mode=forward_mode)
    assert none is None
    assert close(gradient, expected[1])
    value, none, hessian = layer(u, do_Hessian=True, forward_mode=forward_mode)
    assert none is None
    assert close(value, expected[0])
    assert close(hessian, expected[2])


@pytest.mark.parametrize("do_gradient", [True, False])
@pytest.mark.parametrize("n", SAMPLES)
@pytest.mark.parametrize("name", LAYERS)
def test_laplacian_is_the_trace_of_the_hessian(name, n, do_gradient):
    layer, u, (_, _, hessian) = case(name, n)
    for forward_mode in (True, False):
        _, gradient, laplacian = layer(u, do_gradient=do_gradient, do_Laplacian=True, forward_mode=forward_mode)
        assert (gradient is None) is not do_gradient
        assert close(laplacian, torch.einsum("naam->nm", hessian).unsqueeze(1))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_directions_forward(name, per_sample):
    layer, u, (_, gradient, hessian) = case(name, 5)
    v = randn(*((5,) if per_sample else ()), 3, layer.dim_input())
    curved = torch.einsum("nka,nabm,nlb->nklm" if per_sample else "ka,nabm,lb->nklm", v, hessian, v)
    _, along, second = layer(u, do_gradient=True, do_Hessian=True, v=v)
    assert close(along, v @ gradient)
    assert close(second, curved)
    _, along, trace = layer(u, do_gradient=True, do_Laplacian=True, v=v)
    assert close(along, v @ gradient)
    assert close(trace, torch.einsum("nkkm->nm", curved).unsqueeze(1))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_backward(name, per_sample):
    layer, u, (_, gradient, hessian) = case(name, 5)
    v = randn(*((5,) if per_sample else ()), layer.dim_output(), 2)
    weighted = torch.einsum("nabm,nmk->nabk", hessian, v if per_sample else v.expand(5, -1, -1))
    _, got, second = layer(u, do_gradient=True, do_Hessian=True, forward_mode=False, v=v)
    assert close(got, gradient @ v)
    assert close(second, weighted)
    layer(u, forward_mode=None)
    assert close(layer.backward(v=v)[0], gradient @ v)


@pytest.mark.parametrize("name", LAYERS)
def test_derivatives_of_what_comes_before_and_after_are_carried_through(name):
    """A layer between two others gives the derivatives that the chain rule gives."""
    middle = tame(LAYERS[name](), 0)
    before = tame(lay.singleLayer(3, middle.dim_input(), tanhActivation()), 2)
    after = tame(lay.singleLayer(middle.dim_output(), 2, tanhActivation()), 3)
    x = randn(5, 3)

    _, jacobian, hessian = oracle.derivatives(NN(before, middle, after), x)

    u, du, d2u = before(x, do_gradient=True, do_Hessian=True)
    u, du, d2u = middle(u, do_gradient=True, do_Hessian=True, dudx=du, d2ud2x=d2u)
    _, got, second = after(u, do_gradient=True, do_Hessian=True, dudx=du, d2ud2x=d2u)
    assert close(got, jacobian)
    assert close(second, hessian)

    u, du, lap = before(x, do_gradient=True, do_Laplacian=True)
    u, du, lap = middle(u, do_gradient=True, do_Laplacian=True, dudx=du, d2ud2x=lap)
    trace = after(u, do_Laplacian=True, dudx=du, d2ud2x=lap)[2]
    assert close(trace, torch.einsum("naam->nm", hessian).unsqueeze(1))

    u = x
    for layer in (before, middle, after):
        u = layer(u, forward_mode=None)[0]
    dg = d2g = None
    for layer in (after, middle, before):
        dg, d2g = layer.backward(do_Hessian=True, dgdf=dg, d2gd2f=d2g)
    assert close(dg, jacobian)
    assert close(d2g, hessian)


@pytest.mark.parametrize("name", LAYERS)
def test_laplacian_and_hessian_together_are_the_hessian(name):
    layer, u, (_, _, hessian) = case(name, 2)
    assert close(layer(u, do_Hessian=True, do_Laplacian=True)[2], hessian)


@pytest.mark.parametrize("name", LAYERS)
def test_dimensions_are_those_of_the_features(name):
    layer, _, (value, _, _) = case(name, 1)
    assert value.shape == (1, layer.dim_output())
    if name in DIMENSIONS:
        assert (layer.dim_input(), layer.dim_output()) == DIMENSIONS[name]


def test_convex_layers_hand_their_input_on():
    layer, u, _ = case("ICNN next", 3)
    assert torch.equal(layer(u)[0][:, -4:], u[:, -4:])
    assert (layer(u)[0].shape) == (3, 7 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        lambda **made: lay.singleLayer(3, 2, bias=False, **made),
        lambda **made: lay.resnetLayer(3, bias=False, **made),
        lambda **made: lay.ICNNLayer(3, 2, 2, bias=False, **made),
        lambda **made: lay.quadraticLayer(3, 2, **made),
        lambda **made: lay.quadraticICNNLayer(3, 2, 2, **made),
    ],
    ids=["single", "resnet", "ICNN", "quadratic", "quadraticICNN"],
)
def test_device_dtype_and_bias_are_kept(kind, dtype):
    layer = kind(device="meta", dtype=dtype)
    for name, parameter in layer.named_parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype is dtype
        assert not name.endswith("b")
    assert "bias=False" in repr(layer) or not hasattr(layer, "bias")


@pytest.mark.parametrize("name", LAYERS)
def test_new_weights_are_bounded_and_differ(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    before = [parameter.clone() for parameter in layer.parameters()]
    inner = layer.layer if isinstance(layer, lay.resnetLayer) else layer
    inner.reset_parameters()
    for old, new in zip(before, layer.parameters(), strict=True):
        assert not torch.equal(old, new)
        assert float(new.detach().abs().max()) <= 1.0


def test_features_of_another_width_are_refused():
    with pytest.raises(ShapeError, match="singleLayer needs 4 features, got 3"):
        lay.singleLayer(4, 2)(torch.zeros(5, 3))


@pytest.mark.parametrize("shape", [(3, 5), (4,), (6, 3, 4), (1, 2, 3, 4)], ids=str)
def test_directions_that_do_not_fit_are_refused(shape):
    with pytest.raises(ShapeError, match=r"v must have the shape \(k, 4\) or \(5, k, 4\)"):
        lay.singleLayer(4, 2)(torch.zeros(5, 4), do_gradient=True, v=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 1), (2,), (6, 2, 1)], ids=str)
def test_weights_that_do_not_fit_are_refused(shape):
    with pytest.raises(ShapeError, match=r"v must have the shape \(2, k\) or \(5, 2, k\)"):
        lay.singleLayer(4, 2)(torch.zeros(5, 4), do_gradient=True, forward_mode=False, v=torch.zeros(shape))


def test_the_base_class_is_no_layer():
    base = hessQuikLayer()
    for method in (base.form, base.input_widths, base.output_widths, base.dim_input, base.dim_output):
        with pytest.raises(NotImplementedError, match="hessQuikLayer must define"):
            method()
