"""Networks of one architecture share the steps of their plans, whatever their weights; what is kept is bounded."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch

from hessquik import Evaluator, layout
from hessquik.activations import siluActivation, softplusActivation, tanhActivation
from hessquik.layers import quadraticICNNLayer, singleLayer, skipLayer
from hessquik.networks import ICNN, NN, fullyConnectedNN, resnetNN
from hessquik.proof import prove_quickly
from hessquik.recent import Recent

TANH = tanhActivation()
QUANTITIES = (("value",), ("value", "gradient", "hessian"), ("laplacian",), ("hessian_diagonal", "hessian_packed"))
ARCHITECTURES = {
    "one output": lambda: fullyConnectedNN([2, 8, 1], TANH),
    "many outputs": lambda: fullyConnectedNN([2, 5, 9], siluActivation()),
    "many inputs": lambda: fullyConnectedNN([9, 3, 3, 2], TANH),
    "single weights": lambda: fullyConnectedNN([1, 1, 1], TANH),
    "residual": lambda: NN(singleLayer(3, 4, TANH), resnetNN(4, 2, 0.5, TANH), singleLayer(4, 1)),
    "skip": lambda: NN(skipLayer(3, 4, 3, TANH, skip="matrix"), singleLayer(3, 2)),
    "convex": lambda: NN(ICNN(3, [None, 6, 4], softplusActivation()), quadraticICNNLayer(3, 4, 2)),
}


def with_weights(make, seed, change=lambda name, weight: None):
    """Return a network in float64 with the weights of a seed, some of them changed."""
    torch.manual_seed(seed)
    network = make().double()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            change(name, weight)
    return network


def zero_biases(name, weight):
    if weight.ndim == 1:
        weight.zero_()


def zeros(name, weight):
    weight.zero_()


def ones_and_identities(name, weight):
    weight.fill_(1.0) if weight.ndim < 2 else torch.nn.init.eye_(weight)


def steps(network, quantities):
    return Evaluator(network).plan(quantities).program.steps


def results(network, x):
    evaluate = Evaluator(network)
    return {name: getattr(evaluate(x, names), name) for names in QUANTITIES for name in names}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_decide_the_numbers_and_not_each_others(name, monkeypatch):
    make = ARCHITECTURES[name]
    changes = (zero_biases, ones_and_identities, zeros)
    networks = [with_weights(make, 0), with_weights(make, 1), *(with_weights(make, 2, change) for change in changes)]
    networks.append(with_weights(make, 3))
    x = torch.randn(5, networks[0].dim_input(), dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "recent", Recent(0))
        expected = [results(network, x) for network in networks]
    found = [results(network, x) for network in networks]
    for network, got, wanted in zip(networks, found, expected, strict=True):
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        prove_quickly(network)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("quantities", QUANTITIES, ids=lambda names: names[0])
def test_networks_of_one_architecture_share_steps(name, quantities):
    first, second = (steps(with_weights(ARCHITECTURES[name], seed), quantities) for seed in (4, 5))
    assert first is second


def test_zeros_and_ones_among_the_weights_have_steps_of_their_own():
    asked = ("value", "gradient", "hessian")
    usual, *others = (
        steps(with_weights(lambda: fullyConnectedNN([2, 2, 1], TANH), 0, change), asked)
        for change in (lambda name, weight: None, zeros, ones_and_identities)
    )
    assert all(len(other) < len(usual) for other in others)


def test_numbers_of_formulas_are_part_of_the_steps():
    def network(beta):
        return fullyConnectedNN([2, 8, 1], softplusActivation(beta=beta))

    assert steps(network(1.5), ("value",)) is steps(network(1.5), ("value",))
    assert steps(network(1.5), ("value",)) is not steps(network(2.5), ("value",))


def test_weights_are_not_kept():
    network = with_weights(ARCHITECTURES["convex"], 0)
    evaluate = Evaluator(network, owned=True)
    x = torch.randn(2, 3, dtype=torch.float64)
    for names in QUANTITIES:
        evaluate(x, names)
    plan = evaluate.plan(("value", "gradient", "hessian"))
    held = [weakref.ref(part) for part in (*network.parameters(), *plan.program.constants)]
    assert len(held) > len(list(network.parameters()))
    del network, evaluate, plan
    gc.collect()
    assert not [part for part in held if part() is not None]


def test_steps_that_are_kept_are_bounded():
    kept = Recent(most_bytes=1000)
    for i in range(50):
        assert kept.get(i, lambda i=i: i, size_bytes=150) == i
        assert kept._bytes == sum(size for _, size in kept._kept.values()) <= 1000
    assert list(kept._kept) == [44, 45, 46, 47, 48, 49]
    kept.get(44, lambda: None, size_bytes=150)
    kept.get(50, lambda: 50, size_bytes=150)
    assert list(kept._kept) == [46, 47, 48, 49, 44, 50]
    assert kept.get("large", lambda: "made", size_bytes=2000) == "made"
    assert list(kept._kept) == [46, 47, 48, 49, 44, 50]


def test_threads_make_networks_of_one_architecture_at_once():
    networks = [with_weights(ARCHITECTURES["many outputs"], seed) for seed in range(8)]
    x = torch.randn(3, 2, dtype=torch.float64)
    expected = [results(deepcopy(network), x) for network in networks]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda network: results(network, x), networks))
    for got, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
