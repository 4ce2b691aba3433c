"""Networks: the documented interface, compositions, and the references by automatic differentiation."""

import copy
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hessquik
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import quadraticActivation, sinActivation, softplusActivation, tanhActivation
from hessquik.errors import CompositionError, HessQuikError, OrderError, ShapeError
from hessquik.proof import prove_quickly
from tests import oracle
from tests.engine.random_networks import tame

TOLERANCE = 1e-12  # rounding in float64
T, S = tanhActivation(), softplusActivation(2.0)
NETWORKS = {
    "fully connected": lambda: net.fullyConnectedNN([4, 7, 5, 2], T),
    "resnet": lambda: net.NN(lay.singleLayer(4, 6, T), net.resnetNN(6, 3, 0.5, S), lay.singleLayer(6, 3)),
    "convex": lambda: net.NN(net.ICNN(4, [None, 5, 7], S), lay.quadraticICNNLayer(4, 7, 2)),
    "convex open": lambda: net.ICNN(4, [None, 5, 7], S),
    "convex inside": lambda: net.NN(
        lay.singleLayer(4, 6, T), net.ICNN(6, [None, 5, 3]), lay.quadraticICNNLayer(6, 3, 2), lay.singleLayer(1, 2, T)
    ),
    "convex and its x into a single layer": lambda: net.NN(net.ICNN(4, [None, 5]), lay.singleLayer(9, 3, T)),
    "features cut for a convex layer": lambda: net.NN(
        lay.singleLayer(4, 9, T), lay.ICNNLayer(4, 5, 6), lay.quadraticICNNLayer(4, 6, 2)
    ),
    "inputs cut for a convex layer": lambda: net.NN(lay.ICNNLayer(3, 1, 6, T), lay.singleLayer(9, 2, T)),
    "quadratic head": lambda: net.NN(lay.singleLayer(4, 6, T), lay.quadraticLayer(6, 3)),
    "quadratic inside": lambda: net.NN(lay.quadraticLayer(4, 3), lay.singleLayer(1, 3, T)),
    "quadratic convex inside": lambda: net.NN(lay.quadraticICNNLayer(4, None, 3), lay.singleLayer(1, 3, T)),
    "linear": lambda: net.NN(lay.singleLayer(4, 3)),
    "one input": lambda: net.NN(lay.singleLayer(1, 6, T), lay.quadraticLayer(6, 3)),
    "many outputs": lambda: net.fullyConnectedNN([2, 4, 17], quadraticActivation()),
    "nested twice": lambda: net.NN(
        net.NN(net.NN(lay.singleLayer(4, 3, T)), net.resnetNN(3, 1)), lay.singleLayer(3, 1)
    ),
    "few hidden units": lambda: net.fullyConnectedNN([17, 2, 1], T),
}
MODES = {"automatic": {}, "forward": {"forward_mode": True}, "backward": {"forward_mode": False}}


def case(name, n=5, seed=0):
    network = tame(NETWORKS[name](), seed)
    x = randn(n, network.dim_input(), seed=seed)
    return network, x, oracle.derivatives(network, x, network.dim_output())


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got, expected):
    return oracle.difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_value_gradient_hessian_and_laplacian(name, n, mode):
    network, x, (value, gradient, hessian) = case(name, n)
    got = network(x, do_gradient=True, do_Hessian=True, **MODES[mode])
    assert all(map(close, got, (value, gradient, hessian)))
    f, none, laplacian = network(x, do_Laplacian=True, **MODES[mode])
    assert none is None
    assert close(f, value)
    assert close(laplacian, torch.einsum("naam->nm", hessian).unsqueeze(1))
    f, gradient_alone, none = network(x, do_gradient=True, **MODES[mode])
    assert none is None
    assert close(gradient_alone, gradient)
    _, none, hessian_alone = network(x, do_Hessian=True, **MODES[mode])
    assert none is None
    assert close(hessian_alone, hessian)
    assert network(x, **MODES[mode])[1:] == (None, None)
    _, both, trace = network(x, do_gradient=True, do_Laplacian=True, **MODES[mode])
    assert close(both, gradient)
    assert close(trace, laplacian)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_networks_chained_in_two_steps(name):
    network, x, _ = case(name)
    after = tame(net.fullyConnectedNN([network.dim_output(), 3, 2], T), 5)
    _, jacobian, hessian = oracle.derivatives(after, oracle.value(network, x)[:, : network.dim_output()])
    _, inner, curvature = oracle.derivatives(network, x, network.dim_output())
    with pytest.raises(OrderError, match=type(network).__name__):
        network.backward()
    f, *_ = network(x, do_gradient=True, forward_mode=None)
    after(f[:, : network.dim_output()], do_gradient=True, forward_mode=None)
    expected = torch.einsum("nap,npqm,nbq->nabm", inner, hessian, inner)
    expected = expected + torch.einsum("nabp,npm->nabm", curvature, jacobian)
    for _ in range(2):  # the state stays
        dg, d2g = after.backward(do_Hessian=True)
        dg, d2g = network.backward(do_Hessian=True, dgdf=dg, d2gd2f=d2g)
        assert close(dg, inner @ jacobian)
        assert close(d2g, expected)


CHAINS = {
    "convex": (lambda: net.ICNN(4, [None, 5]), lambda: net.NN(lay.quadraticICNNLayer(4, 5, 2))),
    "convex, two": (lambda: net.ICNN(4, [None, 5, 3]), lambda: net.ICNN(4, [3, 2])),
    "convex to any": (lambda: net.ICNN(4, [None, 5]), lambda: net.fullyConnectedNN([9, 3, 2], T)),
    "fully connected": (lambda: net.fullyConnectedNN([4, 5], T), lambda: net.fullyConnectedNN([5, 2], T)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_networks_chained_by_hand_are_the_network_of_both(name):
    """Backward mode in two steps and forward mode with dudx, also after a convex network, which passes on [u x]."""
    first, second = (tame(make(), seed) for seed, make in enumerate(CHAINS[name]))
    whole, x = net.NN(first, second), randn(5, 4)
    m = whole.dim_output()
    expected = oracle.derivatives(whole, x, m)

    u, *_ = first(x, forward_mode=None)
    f, *_ = second(u, forward_mode=None)
    assert close(f[:, :m], expected[0])
    for _ in range(2):
        dg, d2g = second.backward(do_Hessian=True)
        dg, d2g = first.backward(do_Hessian=True, dgdf=dg, d2gd2f=d2g)
        assert close(dg, expected[1])
        assert close(d2g, expected[2])

    u, du, d2u = first(x, do_gradient=True, do_Hessian=True, forward_mode=True, return_input=True)
    got = second(u, do_gradient=True, do_Hessian=True, dudx=du, d2ud2x=d2u)
    assert all(map(close, got, expected))

    features = oracle.derivatives(first, x, first.layers()[-1].dim_output())
    for mode in MODES.values():
        assert all(map(close, first(x, do_gradient=True, do_Hessian=True, return_input=True, **mode), features))


@pytest.mark.parametrize(
    "make", [NETWORKS["convex open"], lambda: lay.resnetLayer(4, act=T)], ids=["network", "layer"]
)
def test_copies_between_the_two_steps(make):
    f, x = tame(make(), 0), randn(3, 4).requires_grad_()
    f(x, forward_mode=None)
    for copied in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        with pytest.raises(OrderError, match="needs a forward"):
            copied.backward()
        assert torch.equal(copied(x)[0], f(x)[0])
    prove_quickly(f if isinstance(f, net.NN) else net.NN(f))
    assert f.backward()[0] is not None


def test_parts_may_have_names(tmp_path):
    parts = OrderedDict(first=lay.singleLayer(3, 4, T), body=net.resnetNN(4, 2), last=lay.singleLayer(4, 2))
    f = net.NN(parts)
    assert f.first is parts["first"]
    assert next(iter(f.state_dict())) == "first.K"
    x = randn(5, 3).float()
    hessquik.save(f, tmp_path / "f.safetensors")
    assert torch.equal(hessquik.load(tmp_path / "f.safetensors")(x)[0], f(x)[0])
    with pytest.raises(CompositionError, match=r"block a gives 4 .* block b needs 5"):
        net.NN(OrderedDict(a=lay.singleLayer(3, 4), b=lay.singleLayer(5, 2)))


CHANGES = {
    "append": lambda f, layer: f.append(layer),
    "insert": lambda f, layer: f.insert(1, layer),
    "extend": lambda f, layer: f.extend([lay.singleLayer(2, 2), layer]),
    "set": lambda f, layer: f.__setitem__(1, layer),
    "+=": lambda f, layer: f.__iadd__([layer]),
    "+": lambda f, layer: f + net.NN(layer),
    "delete": lambda f, layer: f.__delitem__(1),
    "delete all": lambda f, layer: f.__delitem__(slice(None)),
    "pop": lambda f, layer: f.pop(1),
    "*=": lambda f, layer: f.__imul__(2),
    "* 0": lambda f, layer: f * 0,
}


@pytest.mark.parametrize("layer", [lay.singleLayer(7, 7), torch.nn.Tanh()], ids=["width", "kind"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_does_not_fit_is_refused_and_undone(change, layer):
    f = net.NN(lay.singleLayer(3, 4, T), lay.singleLayer(4, 5, T), lay.singleLayer(5, 2))
    before = list(f.named_children())
    with pytest.raises(CompositionError):
        CHANGES[change](f, layer)
    assert list(f.named_children()) == before
    assert f(torch.zeros(1, 3))[0].shape == (1, 2)


def test_changes_that_fit_are_made():
    f = net.NN(lay.singleLayer(3, 4, T))
    f.append(lay.singleLayer(4, 4, T)).extend([lay.singleLayer(4, 4), lay.singleLayer(4, 3)])
    f.insert(1, lay.resnetLayer(4))
    f += [lay.resnetLayer(3)]
    assert [type(layer).__name__ for layer in f][1] == "resnetLayer"
    assert len(f) == 6
    del f[1]
    f[1] = lay.resnetLayer(4, act=T)
    assert f.pop(4) is not None
    assert len(f) == 4
    assert isinstance(f + f, net.NN)
    assert len(2 * f) == 8
    f *= 2
    assert len(f) == 8
    assert [name for name, _ in f.named_layers()] == [str(i) for i in range(8)]
    assert f(torch.zeros(1, 3))[0].shape == (1, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_derivatives_before_the_network_are_carried_forward(name):
    network = tame(NETWORKS[name](), 0)
    before = tame(lay.singleLayer(3, network.dim_input(), T), 5)
    whole = net.NN(before, network)
    t = randn(5, 3)
    value, gradient, hessian = oracle.derivatives(whole, t, network.dim_output())
    u, du, d2u = before(t, do_gradient=True, do_Hessian=True)
    for mode in ({}, {"forward_mode": True}):
        got = network(u, do_gradient=True, do_Hessian=True, dudx=du, d2ud2x=d2u, **mode)
        assert all(map(close, got, (value, gradient, hessian)))
    with pytest.raises(ShapeError, match="forward_mode=True"):
        network(u, do_gradient=True, dudx=du, forward_mode=False)
    trace = torch.einsum("naam->nm", d2u).unsqueeze(1)
    laplacian = network(u, do_Laplacian=True, dudx=du, d2ud2x=trace)[2]
    assert close(laplacian, torch.einsum("naam->nm", hessian).unsqueeze(1))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_directions_and_weights(name, per_sample):
    network, x, (_, gradient, hessian) = case(name)
    rows = (5,) if per_sample else ()
    v, weights = randn(*rows, 3, network.dim_input()), randn(*rows, network.dim_output(), 2, seed=2)
    curved = torch.einsum("nka,nabm,nlb->nklm" if per_sample else "ka,nabm,lb->nklm", v, hessian, v)
    _, along, second = network(x, do_gradient=True, do_Hessian=True, v=v, forward_mode=True)
    assert close(along, v @ gradient)
    assert close(second, curved)
    _, along, trace = network(x, do_gradient=True, do_Laplacian=True, v=v)
    assert close(along, v @ gradient)
    assert close(trace, torch.einsum("nkkm->nm", curved).unsqueeze(1))
    _, weighted, second = network(x, do_gradient=True, do_Hessian=True, v=weights, forward_mode=False)
    assert close(weighted, gradient @ weights)
    assert close(second, torch.einsum("nabm,nmk->nabk", hessian, weights.expand(5, -1, -1)))


@pytest.mark.parametrize("widths", [[2, 3, 4], [4, 3, 2], [3, 4, 3]], ids=str)
def test_directions_alone_are_read_as_documented(widths):
    """The mode is forward exactly if d < m, so that the meaning of v does not depend on operation counts."""
    network, x = tame(net.fullyConnectedNN(widths, T), 0), randn(5, widths[0])
    forward = widths[0] < widths[-1]
    v = randn(3, widths[0]) if forward else randn(widths[-1], 3)
    expected = network(x, do_gradient=True, v=v, forward_mode=forward)[1]
    assert torch.equal(network(x, do_gradient=True, v=v)[1], expected)


def test_directions_of_another_width_are_refused():
    network, x = net.fullyConnectedNN([3, 4, 2], T), torch.zeros(5, 3)
    with pytest.raises(ShapeError, match=r"v must have the shape \(k, 3\) or \(5, k, 3\), got \(2, 4\)"):
        network(x, do_gradient=True, v=torch.zeros(2, 4), forward_mode=True)
    with pytest.raises(ShapeError, match=r"v must have the shape \(2, k\) or \(5, 2, k\), got \(3, 1\)"):
        network(x, do_gradient=True, v=torch.zeros(3, 1), forward_mode=False)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrapper", [net.NNPytorchAD, net.NNPytorchHessian], ids=lambda kind: kind.__name__)
def test_automatic_differentiation_agrees(name, wrapper):
    network, x, expected = case(name)
    before = x.clone()
    got = wrapper(network)(x, do_gradient=True, do_Hessian=True)
    assert all(map(close, got, expected))
    _, gradient, none = wrapper(network)(x, do_gradient=True, forward_mode=True)
    assert none is None
    assert close(gradient, expected[1])
    assert wrapper(network)(x, do_Hessian=True)[1] is None
    assert wrapper(network)(x)[1:] == (None, None)
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize("wrapper", [net.NNPytorchAD, net.NNPytorchHessian], ids=lambda kind: kind.__name__)
def test_automatic_differentiation_of_no_samples(wrapper):
    network, x, expected = case("resnet", 0)
    got = wrapper(network)(x, do_gradient=True, do_Hessian=True)
    assert all(map(close, got, expected))


def test_the_automatic_mode_counts_operations():
    wide, narrow = net.fullyConnectedNN([17, 4, 2]), net.fullyConnectedNN([2, 4, 17])
    assert (wide.setup_forward_mode(), narrow.setup_forward_mode()) == (False, True)
    # With m = 64 adjoints, backward is more than ten times the work.
    assert net.fullyConnectedNN([2, 64, 64, 64]).setup_forward_mode() is True
    # d < m alone would say forward; but that carries d(d + 1)/2 second derivatives through wide layers.
    assert net.fullyConnectedNN([20, 64, 64, 24]).setup_forward_mode() is False
    for mode in (True, False, None):
        assert wide.setup_forward_mode(forward_mode=mode) is mode


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_automatic_mode_is_right_whichever_it_takes(name, forward_mode, monkeypatch):
    network, x, (value, gradient, hessian) = case(name)
    monkeypatch.setattr(net.NN, "_is_forward_cheaper", lambda self, forms, highest: forward_mode)
    assert all(map(close, network(x, do_gradient=True, do_Hessian=True), (value, gradient, hessian)))
    _, got, laplacian = network(x, do_gradient=True, do_Laplacian=True)
    assert close(got, gradient)
    assert close(laplacian, torch.einsum("naam->nm", hessian).unsqueeze(1))


INCOMPATIBLE = {
    "layers": (
        [lambda: lay.singleLayer(3, 4), lambda: lay.singleLayer(5, 2)],
        "block 0 gives 4 .* block 1 needs 5",
    ),
    "nested": (
        [lambda: net.NN(lay.singleLayer(3, 3), lay.singleLayer(3, 4)), lambda: lay.quadraticLayer(2, 2)],
        r"block 0\.1 gives 4 .* block 1 needs 2",
    ),
    "convex": ([lambda: net.ICNN(3, [None, 4]), lambda: lay.singleLayer(4, 2)], "gives 7 .* needs 4"),
    "no layer": ([torch.nn.Tanh], "block 0 must be a layer or a network, got Tanh"),
    "nothing": ([], "at least one layer"),
}


@pytest.mark.parametrize("kind", INCOMPATIBLE)
def test_what_does_not_fit_is_refused(kind):
    makers, message = INCOMPATIBLE[kind]
    with pytest.raises(CompositionError, match=message):
        net.NN(*(make() for make in makers))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 3), r"points must have the shape \(n, 4\), got \(5, 3\)"),
        (torch.zeros(4), r"got \(4,\)"),
        (torch.zeros(5, 4, dtype=torch.float64), r"points must be torch\.float32.*got torch\.float64"),
    ],
    ids=["width", "axes", "dtype"],
)
def test_points_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ShapeError, match=message):
        net.fullyConnectedNN([4, 2])(x)


def test_errors_are_of_one_family_and_of_the_usual_kind():
    assert issubclass(CompositionError, HessQuikError)
    assert issubclass(CompositionError, ValueError)


def test_the_families_are_what_their_arguments_say():
    full = net.fullyConnectedNN([3, 5, 2], T)
    assert (full.widths, full.act, len(full)) == ([3, 5, 2], T, 2)
    res = net.resnetNN(4, 3, 0.5, T)
    assert (res.width, res.depth, res.h, res.act) == (4, 3, 0.5, T)
    convex = net.ICNN(3, [None, 5, 2], T)
    assert (convex.input_dim, convex.widths, convex.act) == (3, [None, 5, 2], T)
    assert (convex.dim_input(), convex.dim_output()) == (3, 2)
    with pytest.raises(ValueError, match="only the first of the widths may be None"):
        net.ICNN(3, [None, 5, None])


def test_slices_and_places_are_layers_and_networks():
    network, x, _ = case("resnet")
    head = network[:2]
    assert isinstance(head, net.NN)
    assert head.dim_output() == 6
    assert close(network[2](head(x)[0])[0], network(x)[0])
    assert network[-1] is network[2]


def test_a_layer_may_stand_in_two_places():
    shared = lay.resnetLayer(4, 0.5, sinActivation())
    network = tame(net.NN(shared, lay.singleLayer(4, 4, T), shared), 0)
    assert len(network.layers()) == 3
    x = randn(5, 4)
    expected = oracle.derivatives(network, x)
    for mode in MODES.values():
        assert all(map(close, network(x, do_gradient=True, do_Hessian=True, **mode), expected))
    network(x, forward_mode=None)
    assert all(map(close, network.backward(do_Hessian=True), expected[1:]))


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_are_differentiable_with_respect_to_the_weights(mode):
    """Weight derivatives of value, gradient and Hessian, for every layer, agree with torch.func on the oracle."""
    network = tame(
        net.NN(
            lay.singleLayer(3, 4, T),
            net.resnetNN(4, 1, 0.5, S),
            net.ICNN(4, [None, 3]),
            lay.quadraticICNNLayer(4, 3, 2),
        ),
        0,
    )
    x = randn(2, 3)

    def loss(parts):
        return sum((part**2).sum() for part in parts)

    loss(network(x, do_gradient=True, do_Hessian=True, **MODES[mode])).backward()
    got = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()

    names, parameters = zip(*network.named_parameters(), strict=True)

    def by_autograd(*weights):
        def value(points):
            return torch.func.functional_call(Oracle(network), dict(zip(names, weights, strict=True)), (points,))

        jacobian = torch.func.jacrev(lambda points: value(points).sum(0))
        gradient = jacobian(x)
        hessian = torch.func.jacrev(lambda points: jacobian(points).sum(1))(x)
        return loss((value(x), gradient, hessian))

    expected = torch.func.grad(by_autograd, argnums=tuple(range(len(parameters))))(*parameters)
    for name, g, e in zip(names, got, expected, strict=True):
        assert oracle.difference(g, e) <= 1e-10, name


class Oracle(torch.nn.Module):
    """The oracle's value as a module, so that ``torch.func`` can replace the weights."""

    def __init__(self, network):
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        self._network = [network]

    def forward(self, points):
        return oracle.value(self._network[0], points)


@pytest.mark.parametrize("mode", MODES)
def test_threads_may_share_a_network(mode):
    """Four threads at once, each with its own points, get the same results as one alone."""
    network = tame(net.NN(net.resnetNN(6, 4, 0.5, T), net.ICNN(6, [None, 8], S), lay.quadraticICNNLayer(6, 8, 2)), 0)
    points = [randn(n, 6, seed=n) for n in (1, 3, 5, 7)]

    def evaluate(x):
        return network(x, do_gradient=True, do_Hessian=True, **MODES[mode])

    expected = [evaluate(x) for x in points]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(25):
            for got, alone in zip(threads.map(evaluate, points), expected, strict=True):
                assert all(map(torch.equal, got, alone))
