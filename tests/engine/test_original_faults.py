"""The faults of the original hessQuik 0.0.6, one test each.

The tests named a to l fail there: shared activations, stale state, ignored options, lost axes and the like.
"""

import threading
from itertools import pairwise

import pytest
import torch

from hessquik import Evaluator
from hessquik import layers as lay
from hessquik import networks as net
from hessquik.activations import softplusActivation, tanhActivation
from hessquik.utils import input_derivative_check, input_derivative_check_finite_difference
from tests import oracle
from tests.engine.random_networks import tame

TOLERANCE = 1e-12  # rounding in float64
MODES = (True, False)


def points(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def agrees(network, x, **arguments):
    got = network(x, do_gradient=True, do_Hessian=True, **arguments)
    expected = oracle.derivatives(network, x, network.dim_output())
    return all(oracle.difference(*pair) <= TOLERANCE for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("widths", [(4, 4, 4), (4, 7, 3)], ids=str)
def test_a_one_activation_object_serves_many_layers(widths):
    shared = tanhActivation()
    network = tame(net.NN(*(lay.singleLayer(p, q, shared) for p, q in pairwise(widths))), 0)
    for mode in MODES:
        assert agrees(network, points(5, 4), forward_mode=mode)


def test_a_the_default_activation_serves_many_layers():
    network = tame(net.NN(lay.ICNNLayer(4, None, 7), lay.ICNNLayer(4, 7, 3)), 0)
    for mode in MODES:
        assert agrees(network, points(5, 4), forward_mode=mode)


def test_b_evaluation_leaves_nothing_on_a_network():
    network = tame(net.NN(net.ICNN(3, [None, 4]), lay.quadraticICNNLayer(3, 4, 2), lay.quadraticLayer(1, 2)), 0)
    before = {id(module): dict(vars(module)) for module in network.modules()}
    for arguments in ({}, {"forward_mode": True}, {"forward_mode": False}):
        network(points(5, 3), do_gradient=True, do_Hessian=True, **arguments)
    for module in network.modules():
        assert vars(module).keys() == before[id(module)].keys()
        assert all(vars(module)[key] is value for key, value in before[id(module)].items())


def test_b_two_threads_in_the_middle_of_one_network():
    """The second thread runs wholly between the two halves of the first one's evaluation."""
    first_is_inside, second_is_done = threading.Event(), threading.Event()

    class slowTanh(tanhActivation):
        def compute_derivatives(self, *args, do_Hessian=False):
            if threading.current_thread().name == "first":
                first_is_inside.set()
                assert second_is_done.wait(30)
            return super().compute_derivatives(*args, do_Hessian=do_Hessian)

    network = tame(net.NN(lay.singleLayer(3, 4, tanhActivation()), lay.singleLayer(4, 2, slowTanh())), 0)
    x, found = points(5, 3), []
    expected = network(x, do_gradient=True, do_Hessian=True, forward_mode=False)
    first = threading.Thread(
        target=lambda: found.append(network(x, do_gradient=True, do_Hessian=True, forward_mode=False)), name="first"
    )
    first.start()
    assert first_is_inside.wait(30)
    network(points(7, 3, seed=1), do_gradient=True, do_Hessian=True, forward_mode=False)
    second_is_done.set()
    first.join()
    assert all(map(torch.equal, found[0], expected))


HEADS = {
    "ICNN": lambda: net.ICNN(3, [None, 4, 2]),
    "quadratic": lambda: net.NN(lay.singleLayer(3, 4, tanhActivation()), lay.quadraticLayer(4, 2)),
    "quadraticICNN": lambda: net.NN(net.ICNN(3, [None, 4]), lay.quadraticICNNLayer(3, 4, 2)),
}


@pytest.mark.parametrize("name", HEADS)
def test_c_convex_and_quadratic_layers_have_laplacians(name):
    network, x = tame(HEADS[name](), 0), points(5, 3)
    hessian = oracle.derivatives(network, x, network.dim_output())[2]
    laplacian = network(x, do_Laplacian=True)[2]
    assert oracle.difference(laplacian, torch.einsum("naam->nm", hessian).unsqueeze(1)) <= TOLERANCE


@pytest.mark.parametrize("name", HEADS)
def test_c_convex_and_quadratic_layers_have_directions(name):
    network, x, v = tame(HEADS[name](), 0), points(5, 3), points(2, 3, seed=1)
    hessian = oracle.derivatives(network, x, network.dim_output())[2]
    got = network(x, do_gradient=True, do_Hessian=True, v=v, forward_mode=True)[2]
    assert oracle.difference(got, torch.einsum("ka,nabm,lb->nklm", v, hessian, v)) <= TOLERANCE


@pytest.mark.parametrize("asked", [{"do_Laplacian": True}, {"do_Hessian": True}], ids=["laplacian", "hessian"])
def test_d_second_derivatives_without_the_gradient(asked):
    network, x = tame(net.NN(net.resnetNN(3, 2, 0.5, tanhActivation()), lay.singleLayer(3, 2)), 0), points(5, 3)
    _, gradient, second = network(x, forward_mode=True, **asked)
    assert gradient is None
    assert torch.equal(second, network(x, do_gradient=True, forward_mode=True, **asked)[2])


def test_e_one_sample_keeps_its_axis():
    network = tame(net.NN(net.ICNN(4, [None, 5]), lay.quadraticICNNLayer(4, 5, 2)), 0)
    for mode in MODES:
        assert agrees(network, points(1, 4), forward_mode=mode)


@pytest.mark.parametrize(
    "make",
    [lambda: lay.quadraticLayer(1, 2), lambda: lay.quadraticICNNLayer(1, None, 2), lambda: lay.ICNNLayer(1, None, 2)],
    ids=["quadratic", "quadraticICNN", "ICNN"],
)
def test_e_one_input_keeps_its_axis(make):
    layer, x = tame(make(), 0), points(5, 1)
    for mode in MODES:
        got = layer(x, do_gradient=True, do_Hessian=True, forward_mode=mode)
        for pair in zip(got, oracle.derivatives(layer, x), strict=True):
            assert oracle.difference(*pair) <= TOLERANCE


def test_f_the_hessian_of_a_quadratic_layer_alone_has_a_batch_axis():
    layer = tame(lay.quadraticLayer(4, 2), 0)
    hessian = layer(points(10, 4), do_gradient=True, do_Hessian=True)[2]
    assert hessian.shape == (10, 4, 4, 1)
    torch.testing.assert_close(hessian[3, :, :, 0], layer.A.T @ layer.A)


def test_g_a_quadratic_layer_need_not_be_the_last():
    network = tame(net.NN(lay.quadraticLayer(4, 2), lay.singleLayer(1, 3, tanhActivation())), 0)
    for mode in MODES:
        assert agrees(network, points(5, 4), forward_mode=mode)


def test_g_a_convex_quadratic_layer_knows_its_width_when_it_is_the_first():
    assert lay.quadraticICNNLayer(4, None, 2).dim_input() == 4
    net.NN(lay.singleLayer(3, 4), lay.quadraticICNNLayer(4, None, 2))


def test_h_a_convex_network_returns_its_outputs_alone():
    network, x = tame(net.ICNN(4, [None, 5, 2]), 0), points(6, 4)
    assert network.dim_output() == 2
    for arguments in ({}, {"forward_mode": True}, {"forward_mode": False}):
        value, gradient, hessian = network(x, do_gradient=True, do_Hessian=True, **arguments)
        assert (value.shape, gradient.shape, hessian.shape) == ((6, 2), (6, 4, 2), (6, 4, 4, 2))
    assert network(x, do_Laplacian=True)[2].shape == (6, 1, 2)
    network(x, forward_mode=None)
    gradient, hessian = network.backward(do_Hessian=True)
    assert (gradient.shape, hessian.shape) == ((6, 4, 2), (6, 4, 4, 2))


@pytest.mark.parametrize("n", [4, 5], ids=["as many samples as hidden units", "other"])
def test_i_weights_per_sample(n):
    network = tame(net.NN(lay.singleLayer(3, 4, tanhActivation()), lay.singleLayer(4, 4, tanhActivation())), 0)
    x, v = points(n, 3), points(n * 4, 2, seed=1).reshape(n, 4, 2)
    _, gradient, hessian = oracle.derivatives(network, x)
    got = network(x, do_gradient=True, do_Hessian=True, v=v, forward_mode=False)
    assert oracle.difference(got[1], torch.einsum("nam,nmk->nak", gradient, v)) <= TOLERANCE
    assert oracle.difference(got[2], torch.einsum("nabm,nmk->nabk", hessian, v)) <= TOLERANCE


@pytest.mark.parametrize("arguments", [{}, {"forward_mode": True}, {"forward_mode": False}], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_j_no_samples_give_empty_results_of_the_right_shape(name, arguments):
    network = tame(HEADS[name](), 0)
    m = network.dim_output()
    value, gradient, hessian = network(points(0, 3), do_gradient=True, do_Hessian=True, **arguments)
    assert (value.shape, gradient.shape, hessian.shape) == ((0, m), (0, 3, m), (0, 3, 3, m))
    assert network(points(0, 3), do_Laplacian=True, **arguments)[2].shape == (0, 1, m)


def test_k_laplacian_and_hessian_each_have_a_place():
    network, x = tame(net.fullyConnectedNN([3, 4, 2], softplusActivation()), 0), points(5, 3)
    hessian = oracle.derivatives(network, x)[2]
    found = Evaluator(network)(x, ("hessian", "laplacian"))
    assert oracle.difference(found.hessian, hessian) <= TOLERANCE
    assert oracle.difference(found.laplacian, torch.einsum("naam->nm", hessian)) <= TOLERANCE
    assert found.value is None


@pytest.mark.parametrize("wrapper", [net.NNPytorchAD, net.NNPytorchHessian], ids=lambda kind: kind.__name__)
def test_l_the_callers_tensor_is_left_as_it_was(wrapper):
    x = points(5, 3)
    wrapper(tame(net.fullyConnectedNN([3, 4, 1]), 0))(x, do_gradient=True, do_Hessian=True)
    assert not x.requires_grad
    assert x.grad is None


def test_checks_that_fail_are_seen_to():
    """The original's tests ignore the results of its checks, which accept noise; ours refuse it."""
    generator = torch.Generator().manual_seed(0)

    def noise(x, do_gradient=False, do_Hessian=False, **_):
        n, d = x.shape
        return tuple(torch.randn(n, *(d,) * order, 1, generator=generator, dtype=x.dtype) for order in range(3))

    x = points(5, 3)
    assert input_derivative_check(noise, x, do_Hessian=True) == (False, False)
    assert input_derivative_check_finite_difference(noise, x, do_Hessian=True) == (False, False)


def test_nan_is_not_masked():
    x = torch.tensor([[float("nan"), 1.0]], dtype=torch.float64)
    network = tame(net.fullyConnectedNN([2, 3, 1], softplusActivation()), 0)
    assert all(part.isnan().all() for part in network(x, do_gradient=True, do_Hessian=True))
